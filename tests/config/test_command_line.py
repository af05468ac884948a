import json
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.config import command_line
from treepo_async.config.command_line import (
    describe,
    describe_generation,
    load,
    parse,
    parse_generation,
    to_yaml,
)
from treepo_async.config.schema import Config, GenerateConfig, knobs
from treepo_async.errors import ConfigError

KEYS = [key for key, _ in knobs(Config)]


def help_lines():
    """Key, shown default and help text of each key in `--help`."""
    for line in describe().splitlines():
        if line.startswith("  "):
            key, _, rest = line.strip().partition("=")
            default, end = json.JSONDecoder().raw_decode(rest)
            yield key, rest[:end], default, rest[end:].strip()


def write(folder, text, name="run.yaml"):
    file = folder / name
    file.write_text(text)
    return file


def refusal(*words):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return str(caught.value)


def test_no_words_give_the_embedded_run():
    config = parse([])
    assert config == Config()
    assert (config.model.path, config.data.path, config.learner.layout) == ("tiny", "tiny", "tp1")


def test_help_lists_every_key_with_its_meaning():
    assert [key for key, *_ in help_lines()] == KEYS
    assert all(text for *_, text in help_lines())


def test_every_default_can_be_typed_as_help_shows_it():
    for key, shown, default, _ in help_lines():
        assert attrgetter(key)(parse([f"{key}={shown}"])) == default == attrgetter(key)(Config())


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("steps=7", "steps", 7),
        ("tree.width=8", "tree.width", 8),
        ("learner.lr=1e-3", "learner.lr", 1e-3),
        ("learner.whiten=false", "learner.whiten", False),
        ("data.epochs=2", "data.epochs", 2),
        ("engine.max_total_tokens=null", "engine.max_total_tokens", None),
        ("run_dir=runs/a=b", "run_dir", "runs/a=b"),
        ("data.path=tiny", "data.path", "tiny"),
    ],
)
def test_words_set_values_of_the_right_type(word, key, value):
    found = attrgetter(key)(parse([word]))
    assert (found, type(found)) == (value, type(value))


def test_short_forms_set_the_key_behind_them():
    config = parse(["learner=dp1", "model=some/model", "data=train.jsonl"])
    found = config.learner.layout, config.model.path, config.data.path
    assert found == ("dp1", "some/model", "train.jsonl")
    assert "learner=... is learner.layout=..." in describe()


def test_later_words_win_and_words_win_over_files(tmp_path):
    file = write(tmp_path, "steps: 5\nactors: 5\ntree: {width: 5}\n")
    config = parse(["steps=1", "steps=2", f"config={file}", "actors=3"])
    assert (config.steps, config.actors, config.tree.width) == (2, 3, 5)


def test_a_later_file_wins_over_an_earlier_one(tmp_path):
    first = write(tmp_path, "steps: 5\nactors: 5\n")
    second = write(tmp_path, "steps: 6\n", "second.yaml")
    config = parse([f"config={first}", f"config={second}"])
    assert (config.steps, config.actors) == (6, 5)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("step=3", "unknown key step; did you mean steps?"),
        ("tree.widht=3", "unknown key tree.widht; did you mean tree.width?"),
        ("replay.max_stalenes=3", "did you mean replay.max_staleness?"),
        ("width=8", "did you mean tree.width?"),
        ("lr=1", "did you mean learner.lr?"),
        (
            "cpu_threads=2",
            "did you mean engine.cpu_threads or actor.cpu_threads or learner.cpu_threads?",
        ),
        ("zzzz=1", "unknown key zzzz; see --help for the keys"),
        ("tree=5", "tree is a section, set one of its keys, e.g. tree.segment_tokens"),
        ("tree={widht: 8}", "unknown key tree.widht; did you mean tree.width?"),
    ],
)
def test_an_unknown_key_gets_the_key_that_was_meant(word, hint):
    assert refusal(word).startswith(f"{word}: ")
    assert hint in refusal(word)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("steps=abc", "steps: Value 'abc' of type 'str' could not be converted to Integer"),
        ("steps=1.5", "could not be converted to Integer"),
        ("steps=", "Incompatible value 'None'"),
        ("steps.more=3", "could not be converted to Integer"),
        ("learner.whiten=maybe", "is not a valid bool"),
        ("data.epochs=none", "data.epochs: Value 'none'"),
        ("run_dir=${nope}", "Interpolation key 'nope' not found"),
        ("data.instruction=${\\boxed{}}", "token recognition error"),
        ("run_dir={a", "is not YAML"),
        ("run_dir='", "is not YAML"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_with_its_word(word, reason):
    assert refusal(word).startswith(word)
    assert reason in refusal(word)


@pytest.mark.parametrize("word", ["steps", "--steps", "=3", ""])
def test_a_word_that_is_no_assignment_is_refused(word):
    assert refusal(word) == f"{word!r} is not key=value; see --help for the keys"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tree:\n  widht: 8\n", "unknown key tree.widht; did you mean tree.width?"),
        ("lerner: {lr: 1}\n", "unknown key lerner"),
        ("tree: {width: many}\n", "tree.width: Value 'many'"),
        ("learner: tp4\n", "learner is a section, set one of its keys, e.g. learner.layout"),
        ("learner:\n", "learner is a section"),
        ("3: 4\n", "unknown key 3"),
        ("- steps\n", "holds no mapping of keys to values"),
        ("steps: [\n", "is not YAML"),
        ("steps: 1\nsteps: 2\n", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_the_file(tmp_path, text, reason):
    file = write(tmp_path, text)
    message = refusal(f"config={file}")
    assert message.startswith(str(file))
    assert reason in message


def test_a_binary_file_is_no_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00steps")
    assert refusal(f"config={file}").startswith(f"{file} is not YAML")


def test_an_empty_file_changes_nothing(tmp_path):
    assert load(write(tmp_path, "")) == Config()


def test_a_named_config_is_found_and_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "CONFIG_DIR", tmp_path)
    assert refusal("config=papr") == "config=papr: no such file, and configs/ has none"
    write(tmp_path, "steps: 9\n", "paper.yaml")
    write(tmp_path, "steps: 8\n", "laptop.yaml")
    assert parse(["config=paper"]).steps == 9
    assert refusal("config=papr") == "config=papr: no such file, and configs/ has laptop, paper"


def test_every_config_that_is_delivered_can_be_parsed():
    for file in command_line.CONFIG_DIR.glob("*.yaml"):
        parse([f"config={file.stem}", "data=train.jsonl"])


plain_text = st.text(st.characters(codec="utf-8"), max_size=20).filter(
    lambda text: "${" not in text and text != "???"
)


@settings(deadline=None, max_examples=30)
@given(
    instruction=plain_text,
    run_dir=st.none() | plain_text,
    lr=st.floats(1e-12, 1e6),
    epochs=st.none() | st.integers(1, 10**9),
    whiten=st.booleans(),
)
def test_a_config_reads_back_what_it_wrote(
    tmp_path_factory, instruction, run_dir, lr, epochs, whiten
):
    config = Config(run_dir=run_dir)
    config.data = replace(config.data, instruction=instruction, epochs=epochs)
    config.learner = replace(config.learner, lr=lr, whiten=whiten)
    assert load(write(tmp_path_factory.getbasetemp(), to_yaml(config))) == config


def test_the_default_config_reads_back(tmp_path):
    assert load(write(tmp_path, to_yaml(Config()))) == Config()


def test_loading_a_missing_file_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load(tmp_path / "gone.yaml")


def test_parsing_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from treepo_async.config.command_line import describe, parse\n"
        "describe(); parse(['steps=3'])\n"
        "heavy = {'torch', 'sglang', 'ray', 'megatron', 'transformers', 'zmq', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------ the stand-alone actor

GENERATE = ("out=trees.jsonl", "limit=3")


def refused_generation(*words):
    with pytest.raises(ConfigError) as caught:
        parse_generation(words)
    return str(caught.value)


def test_a_generation_has_the_keys_of_trees_and_its_own():
    config = parse_generation([*GENERATE, "tree.width=4", "data=p.jsonl", "model=m", "seed=3"])
    assert (config.out, config.limit, config.tree.width) == ("trees.jsonl", 3, 4)
    assert (config.data.path, config.model.path, config.seed) == ("p.jsonl", "m", 3)
    assert config.tree == replace(parse([]).tree, width=4), "the defaults of a run"


def test_the_help_of_a_generation_lists_every_key_with_its_meaning():
    lines = [line for line in describe_generation().splitlines() if line.startswith("  ")]
    assert [line.strip().partition("=")[0] for line in lines] == [
        key for key, _ in knobs(GenerateConfig)
    ]
    assert "learner=" not in describe_generation()


def test_a_file_for_training_can_be_used_to_generate(tmp_path):
    file = write(tmp_path, "steps: 3\ntree: {width: 5}\nlearner: {lr: 1.0e-3}\nactors: 9\n")
    config = parse_generation([f"config={file}", *GENERATE])
    assert config.tree.width == 5
    file = write(tmp_path, "data: {path: p.jsonl, trees: t.jsonl, eval_path: e.jsonl, epochs: 2}\n")
    config = parse_generation([f"config={file}", "model=m", *GENERATE])
    assert (config.data.path, config.data.trees, config.data.epochs) == ("p.jsonl", None, None)
    assert "data.epochs is for training" in refused_generation("data.epochs=2", *GENERATE)
    misspelled = write(tmp_path, "tree: {widht: 5}\n")
    assert "did you mean tree.width?" in refused_generation(f"config={misspelled}", *GENERATE)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("learner=tp2", "learner is a key of training (launch/run.py)"),
        ("learner.lr=1", "learner.lr=1: learner is a key of training"),
        ("steps=4", "steps is a key of training"),
        ("otu=x.jsonl", "unknown key otu; did you mean out?"),
        ("out_form=tree", "out_form=tree is not one of trees, trajectories"),
        ("tree=4", "tree is a section"),
    ],
)
def test_a_word_that_means_nothing_to_a_generation_is_refused(word, reason):
    assert reason in refused_generation(*GENERATE, word)
