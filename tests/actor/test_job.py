from dataclasses import replace

import pytest

from treepo_async.actor.job import Job, data_digest, model_digest
from treepo_async.config.command_line import parse_generation
from treepo_async.errors import DataError


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.fixture
def job_of(model_dir):
    def make(*words):
        config = parse_generation(["out=o.jsonl", "limit=9", *words])
        return Job.of(config, model_dir, prompt_limit=440)

    return make


def test_a_job_is_read_back_as_it_was_written_and_is_the_same(job_of):
    job = job_of("tree.width=4")
    again = Job.parse(job.to_json())
    assert again == job
    assert list(job.differences(again)) == []


@pytest.mark.parametrize(
    ("word", "difference"),
    [
        ("tree.width=4", "tree.width=4 was 16"),
        ("seed=3", "seed=3 was 0"),
        ("out_form=trajectories", "out_form=trajectories was trees"),
        ("reward.scorer=math", "reward.scorer=math was exact"),
        ("prune.min_value=0.5", "prune.min_value=0.5 was 0.0"),
        ("data.instruction=x", "data.instruction=x was "),
    ],
)
def test_a_key_that_decides_the_trees_makes_another_job_and_is_named(job_of, word, difference):
    (found,) = job_of(word).differences(job_of())
    assert found.startswith(difference)


@pytest.mark.parametrize(
    "word",
    ["limit=2", "concurrent_trees=1", "reward.timeout_s=3", "engine.max_restarts=9", "cache_dir=x"],
)
def test_how_the_work_is_done_makes_no_other_job(job_of, word):
    assert list(job_of(word).differences(job_of())) == []


def test_another_model_limit_or_weights_make_another_job(job_of, model_dir):
    job = replace(job_of(), weights="abc")
    (model_dir / "model.safetensors").write_bytes(bytes(999) + b"x")
    found = [*replace(job_of(), prompt_limit=3, weights="abd").differences(job)]
    assert [text.partition(":")[0] for text in found] == ["model", "prompt_limit", "weights"]
    assert found[1:] == ["prompt_limit: 3 was 440", "weights: abd was abc"]


def test_weights_are_compared_once_both_are_known(job_of):
    assert list(replace(job_of(), weights="abc").differences(job_of())) == []
    assert list(job_of().differences(replace(job_of(), weights="abc"))) == []


def test_a_key_that_an_earlier_program_did_not_have_had_its_default(job_of):
    earlier = job_of()
    del earlier.keys["tree.split"]
    assert list(job_of().differences(earlier)) == []
    assert list(job_of("tree.split=entropy").differences(earlier)) == [
        "tree.split=entropy was even"
    ]


def test_data_is_known_by_its_name_and_content_wherever_it_lies(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.jsonl").write_text("x")
    first, second = (data_digest(str(tmp_path / folder / "p.jsonl")) for folder in "ab")
    assert first == second
    (tmp_path / "b" / "p.jsonl").write_text("y")
    assert data_digest(str(tmp_path / "b" / "p.jsonl")) != first
    assert data_digest("tiny") == "tiny"


def test_a_change_anywhere_in_small_weights_changes_the_model(model_dir):
    digests = {model_digest(model_dir)}
    for place in (0, 500, 999):
        content = bytearray(1000)
        content[place] = 1
        (model_dir / "model.safetensors").write_bytes(content)
        digests.add(model_digest(model_dir))
    assert len(digests) == 4


def test_of_large_weights_the_whole_length_is_sampled(model_dir):
    size = 16 * 2**20
    digests = set()
    for place in (None, 0, size // 2, size - size // 64):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        (model_dir / "model.safetensors").write_bytes(content)
        digests.add(model_digest(model_dir))
    assert len(digests) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "extra": 3}',
        '{"format": 1, "keys": ["seed"]}',
        '{"format": 1, "data": 3}',
        '{"format": 1, "prompt_limit": "9"}',
        '{"format": 1, "weights": null}',
        "[" * 100_000,
    ],
)
def test_what_describes_no_job_is_refused(text):
    with pytest.raises(DataError):
        Job.parse(text)
