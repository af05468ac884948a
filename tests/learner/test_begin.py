"""From which checkpoint the ranks begin."""

import pytest

from tests.fakes import events_in
from treepo_async.errors import WeightsError
from treepo_async.learner.__main__ import newest_whole
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState


@pytest.fixture
def checkpoints(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    for version in ("0.2", "0.4"):
        store.save(TrainingState(version, 1, "tp1", "", []), [("weights", [])])
    return store


def damage(checkpoints, version):
    (checkpoints.folder / version / "weights.safetensors").write_bytes(b"")


def test_without_checkpoints_a_run_begins_with_the_initial_model(tmp_path):
    assert newest_whole(CheckpointStore(tmp_path / "none", keep=1)) is None


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_and_that_is_told(checkpoints, capsys):
    damage(checkpoints, "0.4")
    assert newest_whole(checkpoints).state.version == "0.2"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["alarm"] == "checkpoint passed over"


def test_where_none_is_whole_nothing_begins_anew(checkpoints):
    damage(checkpoints, "0.2")
    damage(checkpoints, "0.4")
    with pytest.raises(
        WeightsError, match=r"no checkpoint in .* is whole: .*0\.4.*; bring one back"
    ):
        newest_whole(checkpoints)
