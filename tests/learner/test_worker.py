import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import treepo_async.learner.publish
import treepo_async.learner.supply
from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    events_in,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
)
from treepo_async import chaos
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker as ActorWorker
from treepo_async.data.source import EndOfData
from treepo_async.errors import DeadlineError, RefusedError, TreepoError, WeightsError
from treepo_async.learner.ancestry import Ancestry
from treepo_async.learner.batch import BatchRules
from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.optimizer import MOMENTS, OptimizerSettings
from treepo_async.learner.publishers import FolderPublisher
from treepo_async.learner.start import INITIAL, Start
from treepo_async.learner.step import WEIGHTS
from treepo_async.learner.worker import MAX_SKIPPED, Worker, WorkerRules
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.manifest import Manifest
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import AskBatch, Hello, Nack, Refusal, Trained
from treepo_async.wire.refusals import Refusals
from treepo_async.wire.sockets import BlockingRequester, Requester

RULES = WorkerRules(
    num_steps=3,
    batch=BatchRules(estimator="treepo"),
    optimizer=OptimizerSettings(),
    eval_every=2,
    save_every=2,
    max_staleness=9,
    batch_timeout_s=20.0,
    reply_timeout_s=20.0,
    gap_alarm=1e-4,
    layout="tp2",
)
DONE = StepResult(
    loss=0.5,
    grad_norm=1.0,
    learning_rate=1e-4,
    num_trained_tokens=10,
    num_trajectory_tokens=20,
    num_microbatches=1,
    correction_weight_mean=1.0,
    correction_capped_share=0.0,
    clipped_share=0.0,
    kl_behavior=0.0,
    entropy=1.0,
    logprob_gap_mean=0.0,
    logprob_gap_max=0.0,
    num_skipped=0,
)
SKIPPED = replace(DONE, loss=float("nan"), num_skipped=1)


@dataclass
class FakeTeam:
    """Trains nothing, gives scripted results, and notes what was known when it was asked."""

    server: object
    results: list = field(default_factory=list)
    calls: list = field(default_factory=list)
    batches: list = field(default_factory=list)
    """Trees and advantages of each call."""
    num_waits: int = 0
    num_exports: int = 0
    """That were begun and not run to their end."""
    nap_s: float = 0.0
    """That an update takes."""
    naps: list = field(default_factory=list)
    """What replay looked like at the end of each."""

    @property
    def num_updates(self):
        return len(self.calls)

    def wait(self):
        self.num_waits += 1

    def train(self, batch, *, version):
        order = self.server.queue.order
        leases = [tree.provenance.lease_id for tree in batch.trees]
        consumed = [entry.lease_id for entry in order.consumed[version.step]]
        assert leases == consumed, "consumed before it is computed on"
        self.batches.append((batch.trees, batch.advantages))
        self.calls.append((version, leases, self.server.queue.published))
        time.sleep(self.nap_s)
        states = [str(entry.state) for entry in order.live.values()]
        self.naps.append((states, self.server.queue.may_lease()))
        return self.results[len(self.calls) - 1] if self.results else DONE

    def export(self, kind=WEIGHTS):
        self.num_exports += 1
        for name in ("model.weight", "model.bias"):
            yield name, torch.full((2,), float(len(self.calls)) + (kind != WEIGHTS) / 2)
        self.num_exports -= 1

    def keep_waiting(self, work):
        return work()

    def score(self, sequences):
        return [np.zeros(len(s) - 1, np.float32) for s in sequences]


@dataclass
class Run:
    """A learner's worker on a real replay, and an actor that feeds it."""

    server: object
    store: WeightStore
    checkpoints: CheckpointStore
    team: FakeTeam
    worker: Worker

    async def train(self):
        return await asyncio.to_thread(self.worker.run)

    def saved(self):
        """Steps of the checkpoints that are there."""
        return [version.step for version in self.checkpoints.versions()]


@dataclass
class Dying:
    """A connection to replay whose owner dies as it asks for a batch."""

    replay: BlockingRequester
    at: int
    """Which batch, counted from 1."""
    num_asked: int = 0

    def ask(self, message, **options):
        self.num_asked += isinstance(message, AskBatch)
        if self.num_asked == self.at:
            raise InterruptedError
        return self.replay.ask(message, **options)


def folder_of(store, team):
    return FolderPublisher(
        store, team, torch.float32, store.folder.parent / "config.json", RULES.reply_timeout_s
    )


FRESH = Start(INITIAL, INITIAL, Ancestry(0))


@contextlib.asynccontextmanager
async def learning(
    tmp_path,
    *,
    results=(),
    with_actor=True,
    prompt=numbered_prompt,
    start=FRESH,
    resume_step=None,
    run_id="run",
    max_staleness=None,
    **rules,
):
    """Called again with the same folder, it is that run's learner started anew, beside a replay started anew."""
    wanted = replace(RULES, **rules)
    (tmp_path / "config.json").write_text("{}")
    store = WeightStore(tmp_path / "weights", keep=10)
    checkpoints = CheckpointStore(tmp_path / "checkpoints", keep=2)
    queue = {
        "num_batches": wanted.num_steps,
        "max_staleness": wanted.num_steps if max_staleness is None else max_staleness,
    }
    replay_of = {"folder": tmp_path / "replay", "resume_step": resume_step, "run_id": run_id}
    async with (
        serve_replay(prompt=prompt, **replay_of, **queue) as (server, endpoint),
        asyncio.timeout(40),
        contextlib.AsyncExitStack() as stack,
    ):
        if with_actor:
            await stack.enter_async_context(acting(endpoint, run_id))
        hello = Hello(name="learner-0", run_id=run_id)
        replay = BlockingRequester(
            endpoint, name="learner-0", owner="replay", hello=hello, resend_s=1.0
        )
        stack.callback(replay.close)
        team = FakeTeam(server, list(results))
        worker = Worker(
            team,
            replay,
            store,
            checkpoints,
            publisher=folder_of(store, team),
            start=start,
            rules=wanted,
        )
        yield Run(server, store, checkpoints, team, worker)


@contextlib.asynccontextmanager
async def acting(endpoint, run_id="run"):
    hello = Hello(name="actor-0", run_id=run_id)
    async with Requester(endpoint, name="actor-0", owner="replay", hello=hello) as requester:
        scoring = scoring_by(lambda response, _: float(len(response) % 2))
        grower = Grower("actor-0", ScriptedEngine(), ascii_settings(), scoring, 0)
        actor = ActorWorker(ReplayClient(requester), grower)
        async with running(actor.run(concurrent_trees=2)):
            yield


async def test_each_step_consumes_trains_publishes_and_then_says_so(tmp_path, capsys):
    async with learning(tmp_path) as it:
        assert await it.train() == 3
        assert it.team.calls == [
            (PolicyVersion(0, 0), ["000000000", "000000001"], 0),
            (PolicyVersion(0, 1), ["000000002", "000000003"], 1),
            (PolicyVersion(0, 2), ["000000004", "000000005"], 2),
        ]
        assert it.server.queue.published == 3
        assert it.server.queue.ledger() == {"trained": 6}
        versions = it.store.versions()
        marked = [Manifest.read(it.store.path(v)).evaluate for v in versions]
    assert versions == [PolicyVersion(0, 1), PolicyVersion(0, 2), PolicyVersion(0, 3)]
    assert marked == [False, True, True], "every second one, and the last"
    steps = events_in(capsys.readouterr().out, "step")
    assert [(e["step"], e["policy_step"], e["num_trees"]) for e in steps] == [
        (0, 1, 2),
        (1, 2, 2),
        (2, 3, 2),
    ]
    for event in steps:
        seconds = event["seconds"]
        assert sum(v for k, v in seconds.items() if k != "wall") == pytest.approx(seconds["wall"])
        assert min(seconds["train"], seconds["ack"], seconds["publish"]) > 0
    assert steps[2]["staleness_mean"] == 2.0
    rows, _ = it.worker.ledger.take_rows()
    parts = [row.name for row in rows if row.args != {"message": "Retired"}]
    assert parts[:5] == ["wait_batch", "ack", "train", "ack", "publish"]
    assert [row.args["leases"] for row in rows if row.name == "train"] == [
        ["000000000", "000000001"],
        ["000000002", "000000003"],
        ["000000004", "000000005"],
    ]


@pytest.mark.parametrize(
    "rules",
    [
        {"estimator": "treepo", "path_weights": "unbiased", "whiten": False},
        {"estimator": "grpo", "leave_one_out": True, "whiten": False},
        {"estimator": "spo", "whiten": True},
    ],
)
async def test_a_batch_is_trained_with_the_advantages_that_the_rules_name(tmp_path, rules):
    async with learning(tmp_path, num_steps=1, batch=BatchRules(**rules)) as it:
        await it.train()
        ((trees, found),) = it.team.batches
    options = {"estimator": "treepo", "whiten": True} | rules
    options["whitened"] = options.pop("whiten")
    expected, default = (
        np.concatenate([a.ravel() for a in batch_advantages(trees, **o)])
        for o in (options, {"estimator": "treepo", "whitened": True})
    )
    assert np.array_equal(np.concatenate([a.ravel() for a in found]), expected, equal_nan=True)
    assert not np.array_equal(expected, default), "the rules matter"


async def test_checkpoints_are_made_on_the_way_and_at_the_end_and_trees_are_forgotten_that_all_cover(
    tmp_path, capsys
):
    async with learning(tmp_path, num_steps=5, save_every=2) as it:
        retire, kept = it.server.queue.retire, []

        def note(step):
            kept.append((step, it.saved(), sorted(it.server.queue.order.consumed)))
            return retire(step)

        it.server.queue.retire = note
        await it.train()
        assert it.saved() == [4, 5]
        newest = it.checkpoints.newest(print)
        held = [i for i in range(10) if it.server.store.holds(f"{i:09d}")]
    assert kept == [(1, [2, 4], [0, 1, 2, 3]), (3, [4, 5], [2, 3, 4])], "what both of them cover"
    assert held == [8, 9], "for whoever must go back to the older one"
    assert (newest.state.version, newest.state.num_updates, newest.state.layout) == (
        "0.5",
        5,
        "tp2",
    )
    assert set(newest.hashes) == {f"{kind}.safetensors" for kind in (WEIGHTS, *MOMENTS)}
    saved = events_in(capsys.readouterr().out, "saved")
    assert [event["version"] for event in saved] == ["0.2", "0.4", "0.5"]


async def test_a_learner_that_goes_back_trains_the_same_batches_again_under_a_new_lineage(tmp_path):
    async with learning(tmp_path, num_steps=5, save_every=2) as it:
        replay = it.worker._replay
        it.worker._replay = Dying(replay, at=4)
        with pytest.raises(InterruptedError):
            await it.train()
        died = [leases for _, leases, _ in it.team.calls]
        checkpoint = it.checkpoints.newest(print)
        start = Start.of(
            checkpoint.state,
            published=it.store.versions(),
            saved=it.checkpoints.versions(),
            origins={},
            lineage=0,
        )
        again = FakeTeam(it.server)
        it.worker = Worker(
            again,
            replay,
            it.store,
            it.checkpoints,
            publisher=folder_of(it.store, again),
            start=start,
            rules=replace(RULES, num_steps=5),
        )
        assert await it.train() == 5
        versions = [str(version) for version in it.store.versions()]
        assert it.server.queue.ledger() == {"trained": 10}
    assert checkpoint.state.version == "0.2"
    assert again.calls[0][1] == died[2]
    assert [str(version) for version, _, _ in again.calls] == ["1.2", "1.3", "1.4"]
    assert versions == ["0.1", "0.2", "0.3", "1.3", "1.4", "1.5"]
    names = {s.policy_version for trees, _ in again.batches for t in trees for s in t.segments}
    assert names == {PolicyVersion(1, 0)}, "under which its own lineage knows the weights"


async def test_a_resumed_run_publishes_its_checkpoint_for_engines_that_have_the_first_model(
    tmp_path,
):
    async with learning(tmp_path, num_steps=2) as it:
        await it.train()
        checkpoint = it.checkpoints.newest(print)
    for version in ("0.1", "0.2"):
        (tmp_path / "weights" / version).rename(tmp_path / f"gone-{version}")
    start = Start.of(
        checkpoint.state, published=[], saved=[PolicyVersion(0, 2)], origins={}, lineage=1
    )
    async with learning(tmp_path, num_steps=3, start=start, resume_step=2, run_id="2") as it:
        assert await it.train() == 3
        assert [str(v) for v in it.store.versions()] == ["1.2", "1.3"]
        probe = Manifest.read(it.store.path(PolicyVersion(1, 2))).probe
        assert probe.token_ids == checkpoint.state.probe_token_ids != []
        assert it.team.calls == [(PolicyVersion(1, 2), ["000000004", "000000005"], 2)]
        assert it.server.queue.steps.lineages[1] == 3


async def test_replay_hears_of_loaded_weights_before_anything_is_sampled_under_them(tmp_path):
    async with learning(tmp_path, num_steps=2) as it:
        await it.train()
        checkpoint = it.checkpoints.newest(print)
    start = Start.of(
        checkpoint.state,
        published=it.store.versions(),
        saved=[PolicyVersion(0, 2)],
        origins={},
        lineage=0,
    )
    async with learning(tmp_path, num_steps=3, start=start) as it:
        publish, told = it.server.queue.publish, []

        def note(step, lineage, consumed_step):
            told.append((step, lineage, consumed_step, it.server.queue.order.next_step))
            publish(step, lineage, consumed_step)

        it.server.queue.publish = note
        await it.train()
    assert told == [(2, 1, 1, 2), (3, 1, 2, 3)], "the first before a batch was asked for"


async def test_a_result_is_journalled_before_its_weights_can_be_seen(tmp_path, capsys):
    async with learning(tmp_path) as it:
        end_step, seen = it.server.queue.end_step, []

        def note(step, lineage, digest):
            published = it.store.path(PolicyVersion(lineage, step + 1)).exists()
            seen.append((step, lineage, digest, published))
            return end_step(step, lineage, digest)

        it.server.queue.end_step = note
        await it.train()
    digests = [event["digest"] for event in events_in(capsys.readouterr().out, "step")]
    assert seen == [(step, 0, digest, False) for step, digest in enumerate(digests)]
    assert len(set(digests)) == 3


async def test_a_step_that_comes_out_otherwise_when_it_is_done_again_is_told(tmp_path, capsys):
    async with learning(tmp_path, num_steps=3, save_every=9) as it:
        await it.train()
    start = Start.of(None, published=it.store.versions(), saved=[], origins={}, lineage=0)
    results = [DONE, replace(DONE, loss=0.25), DONE]
    capsys.readouterr()
    async with learning(tmp_path, results=results, start=start, save_every=9) as it:
        await it.train()
    alarms = [
        (event["step"], event["alarm"])
        for event in events_in(capsys.readouterr().out, "alarm")
        if "step 1 done again has another result than in lineage 0" in event["alarm"]
    ]
    assert [step for step, _ in alarms] == [1], "and of what follows from it nothing is said"


async def test_a_learner_whose_place_another_has_taken_ends_before_it_changes_anything(tmp_path):
    async with learning(tmp_path) as it:
        it.server.queue.steps.meet(1, 0)
        with pytest.raises(RefusedError, match="rolled_back: lineage 0"):
            await it.train()
        assert (it.team.calls, it.store.versions()) == ([], [])


def plan_of(tmp_path, monkeypatch, **points):
    """Faults at the points of this process."""
    file = tmp_path / "plan.json"
    named = {f"learner.{name}": rule for name, rule in points.items()}
    file.write_text(json.dumps({"log": str(tmp_path / "chaos.log"), "points": named}))
    monkeypatch.setattr(chaos, "point", chaos.Plan(file, "").reach)


TENSORS = 6
"""Of a checkpoint: two of each kind."""


@pytest.mark.parametrize(("act", "tensor"), [("enospc", 4), ("eio", 1)])
async def test_a_checkpoint_that_cannot_be_written_is_left_out_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, act, tensor
):
    plan_of(tmp_path, monkeypatch, mid_checkpoint={"act": act, "hit": TENSORS + tensor})
    async with learning(tmp_path, num_steps=6) as it:
        retire, retired = it.server.queue.retire, []
        it.server.queue.retire = lambda step: retired.append((step, it.saved())) or retire(step)
        assert await it.train() == 6
        assert it.team.num_exports == 0, "the other ranks gather to the end, so rank 0 does"
        assert it.checkpoints.newest(print).state.version == "0.6"
    assert it.saved() == [2, 6]
    assert retired == [(1, [2, 6])], "no tree is forgotten that the older one needs"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert (alarm["alarm"], alarm["step"]) == ("a checkpoint is left out, the run goes on", 4)
    assert "0.2 is the newest there is; make room" in alarm["detail"]


async def test_only_the_last_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    plan_of(tmp_path, monkeypatch, mid_checkpoint={"act": "enospc", "hit": TENSORS + 1, "times": 2})
    async with learning(tmp_path, num_steps=4) as it:
        with pytest.raises(WeightsError, match=r"0\.4 cannot be written: No space left on device"):
            await it.train()
        assert it.checkpoints.newest(print).state.version == "0.2"
        again = Start.of(
            it.checkpoints.newest(print).state,
            published=it.store.versions(),
            saved=it.checkpoints.versions(),
            origins={},
            lineage=0,
        )
    async with learning(tmp_path, num_steps=4, start=again) as it:
        assert await it.train() == 4
        assert [version for version, _, _ in it.team.calls] == [(1, 2), (1, 3)]


async def test_a_publication_waits_for_room_on_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(treepo_async.learner.publish, "ROOM_S", 0.01)
    plan_of(tmp_path, monkeypatch, mid_publish={"act": "enospc", "hit": 2, "times": 3})
    async with learning(tmp_path) as it:
        assert await it.train() == 3
        assert it.team.num_exports == 0
    assert [str(version) for version in it.store.versions()] == ["0.1", "0.2", "0.3"]
    assert not list(it.store.folder.glob(".*")), "nothing half-written is left"
    alarms = events_in(capsys.readouterr().out, "alarm")
    assert [alarm["alarm"] for alarm in alarms] == ["a publication waits for room on disk"]
    assert "No space left on device" in alarms[0]["detail"]


async def test_one_that_finds_no_room_in_time_ends_the_run_and_says_what_to_do(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(treepo_async.learner.publish, "ROOM_S", 0.01)
    plan_of(tmp_path, monkeypatch, mid_publish={"act": "enospc", "hit": 2, "times": 10**9})
    async with learning(tmp_path, reply_timeout_s=0.2) as it:
        with pytest.raises(WeightsError, match=r"cannot be published: .*; make room there"):
            await it.train()
    assert [str(version) for version in it.store.versions()] == ["0.1"]


async def test_behind_a_slow_learner_actors_are_idle_and_nothing_is_dropped_or_too_old(
    tmp_path, capsys
):
    async with learning(tmp_path, num_steps=4, max_staleness=1) as it:
        it.team.nap_s = 0.2
        assert await it.train() == 4
        assert it.server.queue.ledger() == {"trained": 8}
    ahead = ["accepted"] * 2
    assert it.team.naps == [(ahead, False), (ahead, False), (ahead, False), ([], False)]
    steps = events_in(capsys.readouterr().out, "step")
    assert [event["staleness_max"] for event in steps] == [0, 1, 1, 1]


async def test_a_publication_is_there_before_replay_hears_of_it(tmp_path):
    async with learning(tmp_path) as it:
        publish, seen = it.server.queue.publish, []

        def note(step, lineage, consumed_step):
            seen.append((step, it.store.path(PolicyVersion(lineage, step)).exists()))
            publish(step, lineage, consumed_step)

        it.server.queue.publish = note
        await it.train()
    assert seen == [(1, True), (2, True), (3, True)]


async def test_without_evaluation_no_version_is_marked(tmp_path):
    async with learning(tmp_path, eval_every=0) as it:
        await it.train()
        assert not any(Manifest.read(it.store.path(v)).evaluate for v in it.store.versions())


async def test_a_skipped_update_is_told_and_still_published(tmp_path, capsys):
    async with learning(tmp_path, results=[SKIPPED, SKIPPED, DONE]) as it:
        assert await it.train() == 3
        assert len(it.store.versions()) == 3
    alarms = events_in(capsys.readouterr().out, "alarm")
    assert [(a["alarm"].partition(":")[0], a["step"], a["leases"]) for a in alarms] == [
        ("update skipped", 0, ["000000000", "000000001"]),
        ("update skipped", 1, ["000000002", "000000003"]),
    ]


async def test_too_many_steps_in_a_row_without_an_update_end_the_run(tmp_path):
    half = replace(SKIPPED, num_updates=2)
    results = [SKIPPED, SKIPPED, half, *[SKIPPED] * MAX_SKIPPED]
    async with learning(tmp_path, results=results, num_steps=9) as it:
        with pytest.raises(TreepoError, match=r"3 steps in a row .* lower learner\.lr"):
            await it.train()
        assert len(it.team.calls) == len(results)


async def test_a_gap_to_the_engine_is_told(tmp_path, capsys):
    gaps = [replace(DONE, logprob_gap_max=gap) for gap in (float("nan"), 1e-5, 2e-4)]
    async with learning(tmp_path, results=gaps) as it:
        await it.train()
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert (alarm["step"], alarm["gap"]) == (2, 2e-4)


async def test_the_end_of_the_data_ends_the_run_with_the_steps_done(tmp_path):
    def prompt(index):
        if index >= 3:
            raise EndOfData
        return numbered_prompt(index)

    async with learning(tmp_path, prompt=prompt) as it:
        assert await it.train() == 1


async def test_a_batch_that_does_not_come_is_a_deadline_that_names_what_is_missing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(treepo_async.learner.supply, "BATCH_WAIT_S", 0.1)
    async with learning(tmp_path, with_actor=False, batch_timeout_s=0.3) as it:
        with pytest.raises(
            DeadlineError,
            match=r"the batch of step 0 \(0 of 2 trees are in.*\); the actors should have ended it",
        ):
            await it.train()
        assert it.team.num_waits > 0, "the other ranks hear that rank 0 lives"
    waiting = events_in(capsys.readouterr().out, "waiting")
    assert waiting[0]["wait"] == "batch of step 0"


@dataclass
class Full:
    """A connection to a replay whose disk takes no result for three waits."""

    replay: BlockingRequester
    reason: str = Refusal.DISK_FULL
    left: int = 3

    def ask(self, message, **options):
        if isinstance(message, Trained) and self.left:
            self.left -= 1
            options["on_resend"]()
            refusals = Refusals(None, Nack(reason=self.reason, detail="no room", retry=True))
            raise refusals.deadline_error(options["wait"], "replay", options["timeout_s"])
        return self.replay.ask(message, **options)


async def test_a_replay_whose_disk_is_full_is_asked_until_there_is_room_and_that_is_told_once(
    tmp_path, capsys
):
    async with learning(tmp_path) as it:
        it.worker._replay = Full(it.worker._replay)
        assert await it.train() == 3
        assert it.team.num_waits >= 3, "the other ranks hear that rank 0 lives"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["alarm"] == "the learner waits for room on replay's disk"
    assert "an answer to Trained (refused until then by disk_full: no room)" in alarm["detail"]


async def test_a_replay_that_refuses_for_another_reason_until_the_deadline_ends_the_run(tmp_path):
    async with learning(tmp_path) as it:
        it.worker._replay = Full(it.worker._replay, reason=Refusal.HELLO_FIRST)
        with pytest.raises(DeadlineError, match="hello_first"):
            await it.train()


async def test_each_step_tells_the_bound_that_it_was_trained_under(tmp_path, capsys):
    async with learning(tmp_path, max_staleness=1) as it:
        it.worker._rules = replace(it.worker._rules, max_staleness=1)
        await it.train()
    steps = events_in(capsys.readouterr().out, "step")
    assert [event["max_staleness"] for event in steps] == [1, 1, 1]
