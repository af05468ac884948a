"""`verify` on the folder of a run as its parts write it, whole and damaged in one way each; and that it changes nothing."""

import hashlib
import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from launch.verify import main
from tests.oracle import random_tree
from treepo_async.cluster.verify import deliveries_in, verify_run
from treepo_async.cluster.verify_replay import stored_trees, verify_replay
from treepo_async.config.command_line import parse, to_yaml
from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.dead_letters import DeadLetters, Letter
from treepo_async.replay.index import Index
from treepo_async.replay.queue import Queue
from treepo_async.replay.recovery import Paths
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.segments import file_of, scan, segments_of
from treepo_async.replay.state import Changes
from treepo_async.replay.store import NewTree, Store
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.manifest import Probe, TensorInfo
from treepo_async.weights.store import NamedTensor, WeightStore
from treepo_async.wire.codec import digest_of, encode_tree

RULES = QueueRules(
    prompts_per_batch=2,
    max_staleness=1,
    num_batches=100,
    lease_timeout_s=10.0,
    max_attempts=1,
    drop_degenerate=False,
    max_refills=0,
)
STEPS, RETIRED = 6, 2


class RunFolder:
    """A run's folder as processes that were killed have left it."""

    def __init__(self, folder, acks):
        self.folder, self.acks = folder, acks
        self.paths = Paths(folder / "replay")

    def write_metrics(self, records):
        lines = [json.dumps({"step": 5, "eval/greedy_accuracy": 0.5}), *map(json.dumps, records)]
        (self.folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 7, "cut')

    def acks_file(self, **changes):
        file = self.folder.parent / "acks.jsonl"
        rows = [{"note": "accepted"} | ack for ack in self.acks]
        rows[-1] |= changes
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def index(self):
        return closing(Index.open(self.paths.index))

    def change_row(self, chosen, **changes):
        """Change a lease as a bug would, which keeps the digests of rows right."""
        with self.index() as index, index.transaction():
            row = next(row for row in index.leases() if chosen(row))
            index._put_leases([row._replace(**changes)])

    def sql(self, command):
        """Change the index as damage would."""
        with closing(sqlite3.connect(self.paths.index)) as database, database:
            database.execute(command)

    def trees(self):
        """Where they lie."""
        with self.index() as index:
            return index.trees()

    def newest_tree(self):
        """Where it lies."""
        return max(self.trees())

    def flip(self, file, at):
        data = bytearray(file.read_bytes())
        data[at] ^= 0xFF
        file.write_bytes(data)


class MadeRun(RunFolder):
    """A run of `STEPS` steps, its first `RETIRED` batches retired, with one prompt given up and step 4 done twice."""

    def __init__(self, folder):
        super().__init__(folder, [])
        folder.mkdir()
        words = ["replay.prompts_per_batch=2", "replay.max_staleness=1", f"run_dir={folder}"]
        (folder / "config.yaml").write_text(to_yaml(parse(words)))
        self.store, state = Store.open(
            self.paths.folder, "run", resume_step=None, segment_bytes=2**12
        )
        self.queue = Queue.of(RULES, state, now=0.0)
        self.letters = DeadLetters(self.paths.folder)
        for step in range(STEPS):
            self.make_step(step)
        self.grow_what_is_admitted()
        self.write_folders()

    def make_step(self, step):
        self.grow_what_is_admitted()
        assert self.queue.next_batch(step) is not None
        for lineage in (0, 1) if step == 4 else (0,) if step < 4 else (1,):
            self.queue.steps.begin(step, lineage)
            self.queue.end_step(step, lineage, f"digest of {step}")
        self.queue.publish(step + 1, lineage, step)
        retired = self.queue.retire(min(step, RETIRED) - 1)
        self.store.commit(self.queue.take_changes())
        self.store.forget(entry.lease_id for entry in retired)

    def grow_what_is_admitted(self):
        while self.queue.may_lease("actor-0"):
            entry = self.queue.lease(0.0, "actor-0")
            if entry.prompt_index == 3:
                self.queue.give_up(entry.lease_id, entry.attempt, "deadline")
                self.letters.add(Letter(entry.row(), "deadline", "p3", "a problem"))
                self.store.commit(self.queue.take_changes())
            else:
                self.accept(entry, self.queue.least_step(entry.lease_id))

    def accept(self, entry, step):
        tree = random_tree(
            np.random.default_rng(entry.prompt_index), versions=[PolicyVersion(0, step)]
        )
        provenance = replace(tree.provenance, lease_id=entry.lease_id)
        frames = encode_tree(replace(tree, provenance=provenance))
        self.queue.accept(
            entry.lease_id, entry.attempt, oldest_step=step, has_spread=True, is_scored=True
        )
        new = NewTree(entry.lease_id, entry.attempt, digest_of(frames), frames)
        self.store.commit(self.queue.take_changes(), [new])
        self.acks.append({"lease": new.lease_id, "attempt": new.attempt, "digest": new.digest})

    def write_folders(self):
        tensor = NamedTensor("w", TensorInfo("F32", (2,)), np.ones(2, np.float32).tobytes())
        checkpoints = CheckpointStore(self.folder / "checkpoints", keep=2)
        for version in ("0.4", "1.6"):
            checkpoints.save(TrainingState(version, 1, "tp1", "", []), [("weights", [tensor])])
        (self.folder / "a.json").write_text("{}")
        WeightStore(self.folder / "weights", keep=2).publish(
            PolicyVersion(1, 6),
            [tensor],
            config_file=self.folder / "a.json",
            probe=Probe([], []),
            evaluate=False,
        )
        told = {"event": "ledger", "process": "actor-0", "pid": 1, "begin": 0.0, "end": 9.0}
        ledger = told | {"seconds": {"compute": 9.0}, "gap_s": 0.0, "heard": None}
        (self.folder / "events.jsonl").write_text(json.dumps(ledger) + "\n")
        versions = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 5), (1, 6)]
        self.write_metrics(
            [{"step": s, "learner/lineage": n, "staleness/max": 1} for n, s in versions]
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run at work, which tests do not change."""
    run = MadeRun(tmp_path_factory.mktemp("made") / "run")
    yield run
    run.store.close()


@pytest.fixture
def run(made, tmp_path):
    """What is left of it when its processes are killed."""
    shutil.copytree(made.folder, tmp_path / "run")
    return RunFolder(tmp_path / "run", [dict(ack) for ack in made.acks])


@pytest.fixture
def working(tmp_path):
    """A run at work, to be gone on with."""
    run = MadeRun(tmp_path / "run")
    yield run
    run.store.close()


def failed(run, **options):
    return [verdict.name for verdict in verify_run(run.folder, **options) if not verdict.holds]


def image_of(folder):
    """Every file with its bytes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        (str(f), f.stat().st_mtime_ns, hashlib.blake2b(f.read_bytes()).hexdigest()) for f in files
    ]


@pytest.mark.parametrize("state", ["made", "run"], ids=["at work", "killed"])
def test_a_whole_run_keeps_every_promise_and_is_not_touched(state, tmp_path, request):
    run = request.getfixturevalue(state)
    assert run.paths.index.with_name("index.sqlite-wal").stat().st_size > 0, (
        "not all is in one file"
    )
    acks = tmp_path / "acks.jsonl"
    acks.write_text("".join(json.dumps({"note": "accepted"} | ack) + "\n" for ack in run.acks))
    before = image_of(run.folder)
    verdicts = verify_run(run.folder, acks=deliveries_in([acks]))
    assert {verdict.name: verdict.text for verdict in verdicts if not verdict.holds} == {}
    told = {verdict.name: verdict.text for verdict in verdicts}
    assert told["prompts"].startswith("17 issued = 12 trained + 1 ended otherwise")
    assert told["results"] == "6 steps, 1 done again, 0 with another result"
    assert told["trees"] == "12 trees are wanted, 12 read back"
    assert told["metrics"] == "7 steps told, in 2 lineages, up to 6"
    assert len(segments_of(run.paths.log)) > 1
    assert image_of(run.folder) == before


def test_stored_trees_are_those_that_read_back(run):
    newest = run.newest_tree()
    assert stored_trees(run.paths.folder)[newest.prompt_index] == newest.digest
    run.flip(file_of(run.paths.log, newest.segment), newest.place.end - 3)
    assert newest.prompt_index not in stored_trees(run.paths.folder)


def test_a_damaged_tree_is_found(run):
    newest = run.newest_tree()
    run.flip(file_of(run.paths.log, newest.segment), newest.place.end - 3)
    assert failed(run) == ["log", "trees"]


def test_damage_in_the_middle_of_the_log_is_found(run):
    found = [r for s in segments_of(run.paths.log) for r in scan(run.paths.log, s)]
    notes = [record.place for record in found if record.kind == 2]
    run.flip(file_of(run.paths.log, notes[-2].segment), notes[-2].offset + 60)
    assert "log" in failed(run)


def test_a_torn_end_of_the_log_is_no_damage(run):
    file = file_of(run.paths.log, segments_of(run.paths.log)[-1])
    with file.open("ab") as opened:
        opened.write(b"the beginning of a record")
    assert failed(run) == []


@pytest.mark.parametrize("acks", [{"digest": 5}, {"lease": "000000090"}, {"attempt": 7}])
def test_a_lost_acknowledged_tree_is_found(run, acks):
    assert failed(run, acks=deliveries_in([run.acks_file(**acks)])) == ["acks"]


def test_an_index_that_disagrees_with_the_log_is_found(run):
    run.change_row(lambda row: row.state == "accepted", owner="actor-7")
    assert failed(run) == ["index"]


def test_a_prompt_without_a_row_is_found(run):
    run.sql("delete from leases where prompt_index = 16")
    assert {"prompts", "index"} <= {*failed(run)}


def test_a_prompt_in_another_step_is_found(run):
    run.change_row(lambda row: row.step == 4, step=5)
    assert {"once", "index"} <= {*failed(run)}


def test_a_prompt_that_the_log_has_in_two_batches_is_found(working):
    state = working.queue.state()
    row = next(row for row in state.rows if row.step == 4)
    working.store.commit(Changes(state.counts, (row._replace(step=5),)))
    assert failed(working) == ["once", "batches", "ages"]


def test_a_step_that_came_out_otherwise_is_found(working):
    working.queue.end_step(5, 2, "another digest")
    working.store.commit(working.queue.take_changes())
    assert failed(working) == ["results"]


def test_a_tree_that_is_too_old_for_its_batch_is_found(working):
    working.queue.rules = replace(RULES, max_staleness=4)
    working.accept(working.queue.lease(0.0, "actor-0"), 4)
    for step in (6, 7, 8):
        working.make_step(step)
    assert failed(working) == ["ages"]


def test_a_damaged_row_of_the_index_is_found(run):
    run.sql("update leases set reason = 'nothing' where prompt_index = 3")
    assert failed(run) == ["replay"]


def test_a_missing_index_is_found(run):
    run.paths.index.unlink()
    assert failed(run) == ["replay"]


def test_a_prompt_given_up_that_nobody_is_told_of_is_found(run):
    (run.paths.folder / "dead_letters.jsonl").unlink()
    assert failed(run) == ["dead letters"]


def test_a_damaged_checkpoint_is_found(run):
    (run.folder / "checkpoints" / "0.4" / "weights.safetensors").write_bytes(b"")
    assert failed(run) == ["checkpoints"]


def test_a_damaged_publication_is_found(run):
    run.flip(run.folder / "weights" / "1.6" / "model.safetensors", -1)
    assert failed(run) == ["publications"]


def test_publications_are_looked_for_where_the_run_puts_them(run, tmp_path):
    shutil.move(run.folder / "weights", tmp_path / "elsewhere")
    words = ["replay.prompts_per_batch=2", "replay.max_staleness=1"]
    config = parse([*words, f"weights.dir={tmp_path / 'elsewhere'}"])
    (run.folder / "config.yaml").write_text(to_yaml(config))
    assert failed(run) == []
    run.flip(tmp_path / "elsewhere" / "1.6" / "model.safetensors", -1)
    assert failed(run) == ["publications"]


def test_a_run_whose_processes_told_of_no_time_is_found(run):
    (run.folder / "events.jsonl").unlink()
    assert failed(run) == ["time"]


def test_missing_steps_and_stale_steps_are_found_in_what_was_told(run):
    run.write_metrics([{"step": s, "learner/lineage": 0, "staleness/max": 0} for s in (1, 3)])
    assert failed(run) == ["metrics"]
    run.write_metrics([{"step": 1, "learner/lineage": 0, "staleness/max": 2}])
    assert failed(run) == ["staleness"]


def test_with_trees_in_memory_none_is_looked_for(run):
    names = [
        verdict.name
        for verdict in verify_replay(run.paths.folder, max_staleness=1, keeps_trees=False)
    ]
    assert "prompts" in names
    assert not {"trees", "ages"} & {*names}


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        verify_run(tmp_path)


@pytest.mark.parametrize("line", ["[]", "{", '{"note": "accepted", "lease": "1"}'])
def test_a_file_that_holds_no_acknowledgements_is_refused(tmp_path, line):
    file = tmp_path / "acks.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=r"acks\.jsonl"):
        deliveries_in([file])


def test_the_command_prints_a_line_for_each_and_its_exit_code_says_whether_all_hold(run, capsys):
    assert main([str(run.folder), f"acks={run.acks_file()}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == "15 of 15 invariants hold"
    (run.paths.folder / "dead_letters.jsonl").unlink()
    assert main([str(run.folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "13 of 14 invariants hold; these do not: dead letters"
    )
    assert main([str(run.folder), "ignore=dead letters"]) == 0


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "acts=b"], ["a", "acks=nothing"]])
def test_the_command_refuses_what_it_does_not_understand(words, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_whose_index_was_rebuilt_of_what_was_left_of_the_log_is_judged_from_there_on(
    working,
):
    working.store.forget(entry.lease_id for entry in working.queue.retire(3))
    working.store.commit(working.queue.take_changes())
    gone = segments_of(working.paths.log)[:-2]
    needed = {tree.segment for tree in working.trees()}
    for segment in gone:
        if segment not in needed:
            file_of(working.paths.log, segment).unlink()
    working.store.close()
    working.paths.index.unlink()
    working.store, _ = Store.open(
        working.paths.folder, "run", resume_step=None, segment_bytes=2**12
    )
    acks = deliveries_in([working.acks_file()])
    assert failed(working, acks=acks) == []
    told = {verdict.name: verdict.text for verdict in verify_run(working.folder, acks=acks)}
    for name in ("prompts", "once", "acks"):
        assert re.search(r"\(rows from prompt \d+ on; the index was rebuilt\)", told[name])
    newest = working.newest_tree()
    working.sql(f"delete from leases where prompt_index = {newest.prompt_index}")
    assert "prompts" in failed(working)


def test_only_a_prompt_that_the_log_shows_going_back_is_excused_for_its_lost_tree(working):
    entry = next(entry for entry in working.queue.order.live.values() if entry.state == "accepted")
    acks = deliveries_in([working.acks_file()])
    row = entry.row()._replace(state="waiting", attempt=entry.attempt + 1)
    counts = working.queue.state().counts
    working.store.commit(Changes(counts, (row,)))
    working.store.forget([entry.lease_id])
    working.store.commit(Changes(counts, ()))
    (told,) = [v for v in verify_run(working.folder, acks=acks) if v.name == "acks"]
    assert told.holds
    assert f"0 lost, 1 given back by replay: {entry.prompt_index} attempt" in told.text
    other = acks[0]._replace(prompt_index=max(ack.prompt_index for ack in acks) + 50)
    assert "acks" in failed(working, acks=[*acks, other])


def test_each_batch_is_judged_by_the_bound_of_its_step(working):
    working.queue.rules = replace(RULES, max_staleness=4)
    working.accept(working.queue.lease(0.0, "actor-0"), 4)
    for step in (6, 7, 8):
        working.make_step(step)
    assert failed(working) == ["ages"]
    told = {"learner/lineage": 1, "staleness/max": 2, "staleness/bound": 4}
    working.write_metrics([told | {"step": step} for step in range(1, 10)])
    assert failed(working) == []
