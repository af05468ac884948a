import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.oracle import random_tree
from tests.wire.test_codec import assert_same
from treepo_async.actor.endings import Outcome
from treepo_async.actor.job import Job
from treepo_async.actor.output import Output, beside, check_apart, held
from treepo_async.errors import ConfigError
from treepo_async.wire.tree_file import TreeFile

RNG = np.random.default_rng(8)
TREES = [random_tree(RNG, num_segments=6, nan_share=0.2) for _ in range(4)]
JOB = Job({"out_form": "trees", "seed": 0}, data="d", model="m", prompt_limit=9)
SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])


def opened(out, job=JOB, **options):
    return Output(out, job, str, **{"overwrite": False, "retry_failed": False, **options})


def write(out, trees, *, finish=True, job=JOB):
    output = opened(out, job)
    output.settle_weights("w")
    for tree in trees:
        output.append(tree)
    if finish:
        output.finish()
    output.close()


def of_fd(fd):
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@SUFFIXES
def test_a_finished_output_has_its_trees_and_its_job(tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    write(out, TREES)
    assert names(tmp_path) == [out.name, f"{out.name}.job.json"]
    file = TreeFile(out)
    for index, tree in enumerate(TREES):
        assert_same(file.tree(index), tree)
    assert json.loads(beside(out, "job.json").read_text())["weights"] == "w"


@SUFFIXES
def test_an_output_is_gone_on_with_before_and_after_it_was_finished(tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    write(out, TREES[:1], finish=False)
    assert out.exists() == (suffix == ".jsonl")
    for done in (1, 2, 3):
        output = opened(out)
        assert output.done == {tree.prompt.id for tree in TREES[:done]}
        output.close()
        write(out, TREES[done : done + 1], finish=done > 1)
    whole = tmp_path / f"whole{suffix}"
    write(whole, TREES)
    assert out.read_bytes() == whole.read_bytes()


def test_a_table_that_was_made_is_not_lost_when_its_lines_are_not_removed(tmp_path):
    out = tmp_path / "o.parquet"
    write(out, TREES[:2])
    lines = beside(out, "unfinished.jsonl")
    write(out, TREES[2:3], finish=False)
    assert (len(TreeFile(out)), lines.exists()) == (2, True)
    write(out, TREES[3:])
    assert (len(TreeFile(out)), lines.exists()) == (4, False)


@SUFFIXES
def test_trajectories_are_written_and_gone_on_with_too(tmp_path, suffix):
    job = replace(JOB, keys={"out_form": "trajectories", "seed": 0})
    out = tmp_path / f"o{suffix}"
    write(out, TREES[:2], job=job)
    write(out, TREES[2:], job=job)
    output = opened(out, job)
    assert output.done == {tree.prompt.id for tree in TREES}
    output.close()


@SUFFIXES
def test_another_job_is_refused_and_told_what_differs_and_the_way_out(tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    write(out, TREES)
    content = out.read_bytes()
    other = replace(JOB, keys={"out_form": "trees", "seed": 1}, data="e")
    with pytest.raises(
        ConfigError, match=r"holds another job: seed=1 was 0; data: e was d; .*overwrite=true"
    ):
        opened(out, other)
    output = opened(out)
    with pytest.raises(ConfigError, match="weights: v was w"):
        output.settle_weights("v")
    output.close()
    assert out.read_bytes() == content


def test_a_file_that_no_job_wrote_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"o\.jsonl\.job\.json is not beside it.*overwrite=true"):
        opened(out)
    assert (names(tmp_path), out.read_text()) == (["o.jsonl"], "mine\n")


def test_a_job_file_that_cannot_be_read_is_refused_with_the_way_out(tmp_path):
    out = tmp_path / "o.jsonl"
    write(out, TREES)
    beside(out, "job.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match=r"job\.json cannot be used: .*overwrite=true"):
        opened(out)


@SUFFIXES
def test_to_overwrite_is_to_begin_anew(tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    write(out, TREES)
    output = opened(out, replace(JOB, data="e"), overwrite=True)
    output.end("p", Outcome.FAILED, "no")
    assert output.done == set()
    output.close()
    again = opened(out, JOB, overwrite=True)
    assert not again.has_ended("p")
    again.close()


def test_a_prompt_has_ended_with_a_tree_or_with_a_reason(tmp_path):
    out = tmp_path / "o.jsonl"
    output = opened(out)
    output.append(TREES[0])
    output.end("skipped", Outcome.SKIPPED, "too long")
    output.end("failed", Outcome.FAILED, "no answer")
    output.close()
    for retry_failed, ended in ((False, [1, 1, 1, 0]), (True, [1, 1, 0, 0])):
        output = opened(out, retry_failed=retry_failed)
        ids = [TREES[0].prompt.id, "skipped", "failed", "new"]
        assert [output.has_ended(i) for i in ids] == ended
        output.close()


def test_an_output_belongs_to_one_actor_at_a_time(tmp_path):
    out = tmp_path / "o.jsonl"
    with held(out):
        with pytest.raises(ConfigError, match="being written by another actor"), held(out):
            pass
        with held(tmp_path / "p.jsonl"):
            pass
    with held(out):
        pass
    assert names(tmp_path) == [".o.jsonl.lock", ".p.jsonl.lock"]


def test_an_actor_that_waits_with_the_lock_file_open_is_kept_off_by_the_next_holder(tmp_path):
    out = tmp_path / "o.jsonl"
    with held(out):
        waiting = (tmp_path / ".o.jsonl.lock").open("w")
    with waiting:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConfigError, match="being written by another actor"), held(out):
            pass


def test_a_folder_in_the_place_of_the_output_is_refused(tmp_path):
    (tmp_path / "o.jsonl").mkdir()
    with pytest.raises(ConfigError, match="is there and is no file"), held(tmp_path / "o.jsonl"):
        pass
    assert names(tmp_path) == ["o.jsonl"]


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.failed.jsonl", "o.jsonl.unfinished.jsonl"])
def test_the_data_may_be_none_of_the_files_of_its_output(tmp_path, name):
    out, data, link = tmp_path / "o.jsonl", tmp_path / name, tmp_path / "link.jsonl"
    check_apart(out, str(data.with_name("d.jsonl")))
    with pytest.raises(ConfigError, match=rf"data=.* is .*{name}, which out="):
        check_apart(out, str(tmp_path / "x" / ".." / name))
    data.write_text("{}\n")
    link.symlink_to(data)
    (tmp_path / "hard.jsonl").hardlink_to(data)
    for same in (link, tmp_path / "hard.jsonl"):
        with pytest.raises(ConfigError, match="name another out"):
            check_apart(out, str(same))


@SUFFIXES
def test_what_holds_no_trees_is_not_overwritten(tmp_path, suffix):
    out = tmp_path / f"o{suffix}"
    out.write_text('{"question": "1+1", "answer": "2"}\n')
    with pytest.raises(ConfigError, match=r"holds no trees .* overwrite=true leaves it alone"):
        opened(out, overwrite=True)
    assert names(tmp_path) == [out.name]


@pytest.mark.parametrize("form", ["trees", "trajectories"])
@SUFFIXES
def test_trees_whose_job_is_lost_may_be_overwritten(tmp_path, suffix, form):
    out = tmp_path / f"o{suffix}"
    write(out, TREES, job=replace(JOB, keys={"out_form": form, "seed": 0}))
    beside(out, "job.json").unlink()
    output = opened(out, overwrite=True)
    assert output.done == set()
    output.close()


def test_what_takes_a_files_place_is_on_disk_first_and_then_its_name(tmp_path, monkeypatch):
    out, synced = tmp_path / "o.parquet", []
    write(out, TREES)

    def fsync(fd, real=os.fsync):
        synced.append(of_fd(fd).removeprefix(str(tmp_path)))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    opened(out).close()
    for file in ("job.json", "unfinished.jsonl"):
        at = synced.index(f"/.o.parquet.{file}.tmp")
        assert synced[at + 1] == "", "the folder"


def test_endings_are_synced_with_the_trees(tmp_path, monkeypatch):
    output, synced = opened(tmp_path / "o.jsonl"), []
    output.end("p", Outcome.FAILED, "no")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(of_fd(fd)))
    output.sync()
    output.sync()
    assert synced == [str(tmp_path / "o.jsonl.failed.jsonl"), str(tmp_path)]
    monkeypatch.undo()
    output.close()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"), held(tmp_path / "no" / "o.jsonl"):
        pass
