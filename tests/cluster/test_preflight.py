"""What nodes are asked before a run, on folders of this machine; each failure names the node and the way out."""

from dataclasses import replace

import pytest

from treepo_async.cluster.preflight import (
    LEAST_SHARED_MEMORY,
    failures,
    leave_word,
    look,
    program_digest,
    question_of,
)
from treepo_async.config.command_line import parse
from treepo_async.errors import ConfigError
from treepo_async.wire.keys import make_keys

ROLES = ("replay-0", "actor-0")


@pytest.fixture
def question(tmp_path):
    run_dir, model_dir, data = tmp_path / "run", tmp_path / "model", tmp_path / "data.jsonl"
    run_dir.mkdir()
    model_dir.mkdir()
    (model_dir / "config.json").write_text("{}")
    data.write_text("{}\n")
    config = parse([f"data={data}", f"model={model_dir}"])
    return question_of(config, run_dir=run_dir, model_dir=model_dir, roles=ROLES)


def told(question, change=lambda sight: sight):
    word = leave_word(question)
    own = replace(look(question), shared_memory=LEAST_SHARED_MEMORY)
    return list(failures(question, word, own, {"10.0.0.2": change(own)}))


def test_a_node_that_sees_the_same_has_no_failure(question):
    assert told(question) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"python": "2.7.18"}, "Python is 2.7.18, the driver's is"),
        (
            {"program": "other"},
            "source of treepo_async differs from the driver's; bring every node",
        ),
        (
            {"word": ""},
            "is not the driver's folder; put it on a file system that every node mounts",
        ),
        ({"model": ""}, "is missing, or another model"),
        ({"sizes": (-1,)}, "data.jsonl is missing; copy it there"),
        ({"sizes": (1,)}, "data.jsonl has 1 bytes, the driver's 3"),
        (
            {"keys_trouble": "cluster.keys_dir=/k has no folder"},
            "cluster.keys_dir=/k has no folder",
        ),
        ({"shared_memory": 64 << 20}, "/dev/shm has 64 MiB, 256 are needed"),
    ],
)
def test_what_a_node_lacks_is_told_with_its_name_and_the_way_out(question, change, says):
    (failure,) = told(question, lambda sight: replace(sight, **change))
    assert failure.startswith("node 10.0.0.2: ")
    assert says in failure


def test_another_patch_of_python_is_no_failure(question):
    def patch(sight):
        return replace(sight, python=f"{sight.python.rpartition('.')[0]}.99")

    assert told(question, patch) == []


def test_a_folder_of_publications_that_a_node_does_not_share_is_told(tmp_path):
    config = parse([f"weights.dir={tmp_path / 'shm' / 'weights'}"])
    asked = question_of(config, run_dir=tmp_path, model_dir=tmp_path, roles=())
    assert told(asked) == [], "it is made where it is missing"
    (failure,) = told(asked, lambda sight: replace(sight, weights_word=""))
    assert failure.startswith(f"node 10.0.0.2: weights.dir={tmp_path / 'shm' / 'weights'} is not")
    with pytest.raises(ConfigError, match=r"weights\.dir=/proc/none cannot be written"):
        leave_word(replace(asked, weights_dir="/proc/none"))
    broadcast = parse([f"weights.dir={tmp_path}", "weights.transport=broadcast"])
    found = question_of(broadcast, run_dir=tmp_path, model_dir=tmp_path, roles=())
    assert found.weights_dir is None


def test_a_model_that_cannot_be_read_is_as_one_that_is_missing(question, tmp_path):
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").mkdir()
    assert look(question).model == ""


def test_a_folder_of_the_same_name_elsewhere_is_seen_by_its_word(question, tmp_path):
    word = leave_word(question)
    other = tmp_path / "elsewhere"
    other.mkdir()
    leave_word(replace(question, run_dir=str(other)))
    assert look(replace(question, run_dir=str(other))).word != word
    assert look(replace(question, run_dir=str(tmp_path / "nowhere"))).word == ""


def test_keys_are_tried_by_the_roles_of_the_node(question, tmp_path):
    keys = tmp_path / "keys"
    make_keys(keys, ["actor-0"])
    asked = replace(question, keys_dir=str(keys))
    assert look(asked).keys_trouble == ""
    assert "learner-0" not in look(replace(asked, roles=("learner-0",))).keys_trouble
    assert look(replace(asked, roles=("learner-0",))).keys_trouble, "no key of it, and none for all"
    (keys / "server.key_secret").unlink()
    assert "server.key_secret" in look(asked).keys_trouble
    assert look(replace(asked, roles=("actor-0",))).keys_trouble == ""


def test_built_in_data_and_datasets_of_the_hub_are_no_files(tmp_path):
    for words in ([], ["model=m", "data=owner/name"]):
        found = question_of(parse(words), run_dir=tmp_path, model_dir=tmp_path, roles=())
        assert found.files == ()


def test_the_program_is_known_by_the_content_of_its_files(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = program_digest(tmp_path)
    (tmp_path / "cache.pyc").write_text("other")
    assert program_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert program_digest(tmp_path) != first
