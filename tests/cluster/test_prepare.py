import json

import numpy as np
import pytest

from tests.fakes import MODEL
from tests.oracle import random_tree
from treepo_async.cluster.prepare import (
    choose_run_dir,
    make_run_dir,
    prepare_model,
    read_model_config,
    try_inputs,
)
from treepo_async.config.command_line import load, parse
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError, DataError, TreepoError
from treepo_async.tiny.tokenizer import save_tokenizer
from treepo_async.wire.tree_line import encode_line


def model_at(path, tmp_path):
    return prepare_model(str(path), cache_dir=tmp_path / "cache", seed=0, report=lambda *_: None)


def test_a_folder_is_the_model(tmp_path):
    assert model_at(tmp_path, tmp_path) == tmp_path


@pytest.mark.parametrize("path", ["no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_nothing_is_named(path, tmp_path):
    with pytest.raises(ConfigError, match=f"model.path={path} is no folder"):
        model_at(path, tmp_path)


@pytest.mark.parametrize("path", ["no owner/of that name", "/no-such-folder"])
def test_a_name_that_no_hub_knows_is_a_config_error(path, tmp_path):
    with pytest.raises(ConfigError, match=f"model.path={path} cannot be downloaded.*local folder"):
        model_at(path, tmp_path)


def test_a_model_that_cannot_be_downloaded_is_a_config_error(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"(?s)model.path=owner/model cannot be downloaded"):
        model_at("owner/model", tmp_path)


def test_a_run_folder_is_made_with_the_resolved_config(tmp_path):
    config = Config(run_dir=str(tmp_path / "deep" / "run"), steps=7)
    run_dir = choose_run_dir(config.run_dir)
    assert run_dir == tmp_path / "deep" / "run"
    assert not run_dir.exists()
    make_run_dir(run_dir, config, MODEL)
    assert (run_dir / "logs").is_dir()
    saved = load(run_dir / "config.yaml")
    assert (saved.steps, saved.run_dir) == (7, str(run_dir))
    assert saved.tree.max_response_tokens == saved.tree.segment_tokens * saved.tree.max_depth
    assert saved.engine.context_length == MODEL["max_position_embeddings"]


def test_without_a_name_a_run_goes_below_runs():
    assert choose_run_dir(None).parent.name == "runs"


@pytest.fixture
def model_dir(tmp_path):
    """All that the inputs need of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder, max_tokens=512)
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


def test_inputs_that_can_be_used_give_a_prompt(model_dir):
    prompt = try_inputs(Config(), model_dir, MODEL)
    assert prompt.id == "tiny-train-0"
    assert len(prompt.token_ids) > 0


def test_a_model_that_cannot_be_trained_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["MistralForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"MistralForCausalLM.*trained are Qwen2ForCausalLM"):
        read_model_config(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data=missing.jsonl"], r"missing\.jsonl does not exist"),
        (["reward.scorer=exat"], "did you mean exact"),
        (["reward.scorer=no_such_module_here:f"], "cannot be imported"),
        (["tree.max_depth=60"], r"lower tree\.max_depth"),
    ],
)
def test_inputs_that_cannot_be_used_are_named_before_anything_starts(words, named, model_dir):
    with pytest.raises(TreepoError, match=named):
        try_inputs(parse(words), model_dir, MODEL)


@pytest.mark.parametrize(
    ("layout", "key"),
    [("tp5", "vocab_size"), ("pp4", "num_hidden_layers"), ("tp8", "num_attention")],
)
def test_a_layout_that_does_not_fit_the_model_is_refused_before_anything_starts(
    layout, key, model_dir
):
    with pytest.raises(ConfigError, match=f"{key}.*not a multiple of the learner's"):
        try_inputs(parse([f"learner={layout}"]), model_dir, MODEL)


def test_data_without_a_usable_prompt_says_why(model_dir, tmp_path):
    long = {"question": "x" * 2000, "answer": "1"}
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(json.dumps({**long, "number": i}) for i in range(3)))
    with pytest.raises(
        DataError, match=r"none of the first 100 prompts can be used: long-.*tokens"
    ):
        try_inputs(parse([f"data={data}", "eval.every=0"]), model_dir, MODEL)


def test_evaluation_needs_a_held_out_problem(model_dir, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"question": "1+1?", "answer": "2"}))
    with pytest.raises(DataError, match=r"no held-out problem; give data\.eval_path"):
        try_inputs(parse([f"data={data}"]), model_dir, MODEL)


def trees_file(path, number=3, **options):
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, **options) for _ in range(number)]
    path.write_bytes(b"".join(encode_line(tree) + b"\n" for tree in trees))
    return trees


OFFLINE = ("replay.prompts_per_batch=2", "eval.every=0")


def test_trees_of_a_file_are_looked_at_before_anything_starts(model_dir, tmp_path):
    trees = trees_file(tmp_path / "t.jsonl")
    config = parse([f"data.trees={tmp_path}/t.jsonl", *OFFLINE, "data=gone.jsonl", "model=m"])
    prompt = try_inputs(config, model_dir, MODEL)
    assert prompt.id == trees[0].prompt.id


@pytest.mark.parametrize(
    ("options", "words", "reason"),
    [
        ({"vocab_size": 9000}, [], r"outside 0\.\.383; give the trees of a model like tiny"),
        (
            {"prompt_tokens": 100_000},
            [],
            r"the model has 512 positions; give the trees of a model like",
        ),
        ({"number": 1}, [], r"has 1 trees, fewer than a batch of 2; .* raise data\.epochs"),
        ({}, ["eval.every=1", "data.eval_path=gone.jsonl", "data=gone.jsonl"], "does not exist"),
    ],
    ids=["vocabulary", "length", "number", "evaluation"],
)
def test_trees_that_cannot_be_trained_on_are_named_before_anything_starts(
    model_dir, tmp_path, options, words, reason
):
    trees_file(tmp_path / "t.jsonl", **options)
    config = parse([f"data.trees={tmp_path}/t.jsonl", *OFFLINE, *words])
    with pytest.raises(TreepoError, match=reason):
        try_inputs(config, model_dir, MODEL)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_model_config_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_the_key_of_an_engine_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "engine.url=http://127.0.0.1:30000"
    for words, saved in (([], None), ([url, "engine.api_key_file=key"], str(tmp_path / "key"))):
        make_run_dir(tmp_path / "run", parse(words), MODEL)
        assert load(tmp_path / "run" / "config.yaml").engine.api_key_file == saved
