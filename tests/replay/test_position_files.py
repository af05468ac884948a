import pytest

from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.position import ConsumedBatch, QueuePosition
from treepo_async.replay.position_files import PositionFiles


def after(num_batches, *, num_retired=0):
    """The position after so many batches of one prompt, all trained, with one further prompt leased."""
    kept = range(num_retired, num_batches)
    return QueuePosition(
        next_index=num_batches + 1,
        next_step=num_batches,
        published=num_batches,
        num_retired=num_retired,
        live=(num_batches,),
        consumed=tuple(ConsumedBatch(step, (step,), is_trained=True) for step in kept),
        ended={"trained": num_retired},
    )


def files_of(folder, run_id="run-a", kept_steps=2):
    return PositionFiles(folder / "replay", run_id, kept_steps=kept_steps)


def names(folder):
    return sorted(file.name for file in (folder / "replay").iterdir())


def test_a_new_run_begins_at_nothing_and_leaves_a_position_to_resume_at(tmp_path):
    assert files_of(tmp_path).start(None) == QueuePosition()
    assert names(tmp_path) == ["position-0.json", "position.json"]


def test_a_replay_that_is_started_again_goes_on_at_its_newest_position(tmp_path):
    files = files_of(tmp_path)
    files.start(None)
    files.write_published(2, after(2))
    files.write(after(3))
    assert files_of(tmp_path).start(None) == after(3)


def test_a_resumed_run_begins_at_its_checkpoint_and_when_started_again_where_it_stands(tmp_path):
    files = files_of(tmp_path)
    files.start(None)
    for step in (1, 2, 3):
        files.write_published(step, after(step))
    resumed = files_of(tmp_path, "run-b")
    assert resumed.start(2) == after(2).resumed_at(2)
    assert files_of(tmp_path, "run-b").start(2) == after(2).resumed_at(2)
    resumed.write(after(7))
    assert files_of(tmp_path, "run-b").start(2) == after(7)
    assert files_of(tmp_path, "run-c").start(3) == after(3).resumed_at(3), "not of run-b's"


def test_the_position_of_another_run_is_refused_by_name_unless_it_is_resumed(tmp_path):
    files_of(tmp_path).start(None)
    with pytest.raises(
        ConfigError, match=r"position\.json was written by run run-a, this is run run-b"
    ):
        files_of(tmp_path, "run-b").start(None)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"format":1,"run_id":"run-a","pos'])
def test_a_damaged_position_is_named(tmp_path, content):
    files_of(tmp_path).start(None)
    (tmp_path / "replay" / "position.json").write_bytes(content)
    for resume_step in (None, 0):
        with pytest.raises(DataError, match=r"replay/position\.json"):
            files_of(tmp_path).start(resume_step)


def test_a_missing_or_unfit_position_to_resume_at_is_named(tmp_path):
    files = files_of(tmp_path)
    files.start(None)
    with pytest.raises(DataError, match=r"replay/position-7\.json cannot be read"):
        files_of(tmp_path, "run-b").start(7)
    files.write_published(7, after(5))
    with pytest.raises(DataError, match=r"position-7\.json: .* at policy steps 0 to 5, not at 7"):
        files_of(tmp_path, "run-b").start(7)


def test_a_process_that_dies_while_it_writes_leaves_the_position_before(tmp_path, monkeypatch):
    files = files_of(tmp_path)
    files.start(None)
    files.write(after(1))
    monkeypatch.setattr(QueuePosition, "to_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write(after(2))
    monkeypatch.undo()
    assert files_of(tmp_path).start(None) == after(1)
    files_of(tmp_path).write(after(3))
    assert files_of(tmp_path).start(None) == after(3)


def test_positions_are_kept_as_far_back_as_checkpoints_are(tmp_path):
    files = files_of(tmp_path, kept_steps=2)
    files.start(None)
    for step in range(1, 7):
        files.write_published(step, after(step))
    (tmp_path / "replay" / "notes.txt").write_text("a person's")
    files.write_retired(after(6, num_retired=5))
    files.write_retired(after(6, num_retired=5))
    kept = [f"position-{step}.json" for step in (3, 4, 5, 6)]
    assert names(tmp_path) == ["notes.txt", *kept, "position.json"]
    for step in (5, 6):
        assert files_of(tmp_path, "run-b").start(step).next_step == step
        (tmp_path / "replay" / "position.json").unlink()


def test_the_same_position_is_written_once(tmp_path):
    files = files_of(tmp_path)
    files.start(None)
    before = (tmp_path / "replay" / "position.json").stat().st_ino
    files.write(QueuePosition())
    assert (tmp_path / "replay" / "position.json").stat().st_ino == before
    files.write(after(1))
    assert (tmp_path / "replay" / "position.json").stat().st_ino != before
