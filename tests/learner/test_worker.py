import asyncio
import contextlib
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import treepo_async.learner.worker
from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    events_in,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker as ActorWorker
from treepo_async.data.source import EndOfData
from treepo_async.errors import DeadlineError, TreepoError
from treepo_async.learner.batch import BatchRules
from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.optimizer import MOMENTS
from treepo_async.learner.step import WEIGHTS
from treepo_async.learner.worker import MAX_SKIPPED, Start, Worker, WorkerRules
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.manifest import Manifest
from treepo_async.weights.store import WeightStore
from treepo_async.wire.sockets import BlockingRequester, Requester

RULES = WorkerRules(
    num_steps=3,
    batch=BatchRules(estimator="treepo"),
    eval_every=2,
    save_every=2,
    batch_timeout_s=20.0,
    reply_timeout_s=20.0,
    gap_alarm=1e-4,
    dtype=torch.float32,
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

    @property
    def num_updates(self):
        return len(self.calls)

    def wait(self):
        self.num_waits += 1

    def train(self, batch, *, version):
        order = self.server.queue.order
        leases = [tree.provenance.lease_id for tree in batch.trees]
        consumed = [entry.lease_id for entry in order.consumed[order.next_step - 1]]
        assert leases == consumed, "consumed before it is computed on"
        self.batches.append((batch.trees, batch.advantages))
        self.calls.append((version, leases, self.server.queue.published))
        return self.results[len(self.calls) - 1] if self.results else DONE

    def export(self, kind=WEIGHTS):
        yield "model.weight", torch.full((2,), float(len(self.calls)) + (kind != WEIGHTS) / 2)

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


FRESH = Start(PolicyVersion(0, 0), newest_published=-1)


@contextlib.asynccontextmanager
async def learning(
    tmp_path,
    *,
    results=(),
    with_actor=True,
    prompt=numbered_prompt,
    start=FRESH,
    resume_step=None,
    **rules,
):
    """Called again with the same folder, it is that run's learner started anew, beside a replay started anew."""
    wanted = replace(RULES, **rules)
    (tmp_path / "config.json").write_text("{}")
    store = WeightStore(tmp_path / "weights", keep=10)
    checkpoints = CheckpointStore(tmp_path / "checkpoints", keep=2)
    queue = {"num_batches": wanted.num_steps, "max_staleness": wanted.num_steps}
    replay_of = {"folder": tmp_path / "replay", "resume_step": resume_step}
    async with (
        serve_replay(prompt=prompt, **replay_of, **queue) as (server, endpoint),
        asyncio.timeout(40),
        contextlib.AsyncExitStack() as stack,
    ):
        if with_actor:
            await stack.enter_async_context(acting(endpoint))
        replay = BlockingRequester(endpoint, name="learner-0", owner="replay", resend_s=1.0)
        stack.callback(replay.close)
        team = FakeTeam(server, list(results))
        worker = Worker(
            team,
            replay,
            store,
            checkpoints,
            config_file=tmp_path / "config.json",
            start=start,
            rules=wanted,
        )
        yield Run(server, store, checkpoints, team, worker)


@contextlib.asynccontextmanager
async def acting(endpoint):
    async with Requester(endpoint, name="actor-0", owner="replay") as requester:
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
    assert steps[2]["staleness_mean"] == 2.0


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


async def test_checkpoints_are_made_on_the_way_and_at_the_end_and_only_then_are_trees_forgotten(
    tmp_path, capsys
):
    async with learning(tmp_path, save_every=2) as it:
        retire, kept = it.server.queue.retire, []

        def note(step):
            kept.append((step, it.saved(), sorted(it.server.queue.order.consumed)))
            return retire(step)

        it.server.queue.retire = note
        await it.train()
        assert it.saved() == [2, 3]
        newest = it.checkpoints.newest(print)
        assert not any(it.server.spool.holds(f"{i:09d}") for i in range(6))
    assert kept == [(1, [2], [0, 1]), (2, [2, 3], [2])], "saved before it is said"
    assert (newest.state.version, newest.state.num_updates, newest.state.layout) == (
        "0.3",
        3,
        "tp2",
    )
    assert set(newest.hashes) == {f"{kind}.safetensors" for kind in (WEIGHTS, *MOMENTS)}
    saved = events_in(capsys.readouterr().out, "saved")
    assert [event["version"] for event in saved] == ["0.2", "0.3"]


async def test_a_learner_that_goes_back_trains_the_same_batches_again_under_a_new_lineage(tmp_path):
    async with learning(tmp_path, num_steps=5, save_every=2) as it:
        ask, asked = it.worker._ask, []

        def die_at_the_fourth_batch(message):
            asked.append(type(message).__name__)
            if asked.count("AskBatch") == 4:
                raise InterruptedError
            return ask(message)

        it.worker._ask = die_at_the_fourth_batch
        with pytest.raises(InterruptedError):
            await it.train()
        died = [leases for _, leases, _ in it.team.calls]
        checkpoint = it.checkpoints.newest(print)
        it.worker._ask = ask
        start = Start.of(
            checkpoint.state,
            published=it.store.versions(),
            saved=it.checkpoints.versions(),
            lineage=0,
        )
        again = FakeTeam(it.server)
        it.worker = Worker(
            again,
            it.worker._replay,
            it.store,
            it.checkpoints,
            config_file=tmp_path / "config.json",
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


async def test_a_resumed_run_publishes_its_checkpoint_for_engines_that_have_the_first_model(
    tmp_path,
):
    async with learning(tmp_path, num_steps=2) as it:
        await it.train()
        checkpoint = it.checkpoints.newest(print)
    for version in ("0.1", "0.2"):
        (tmp_path / "weights" / version).rename(tmp_path / f"gone-{version}")
    start = Start.of(checkpoint.state, published=[], saved=[PolicyVersion(0, 2)], lineage=1)
    async with learning(tmp_path, num_steps=3, start=start, resume_step=2) as it:
        assert await it.train() == 3
        assert [str(v) for v in it.store.versions()] == ["1.2", "1.3"]
        probe = Manifest.read(it.store.path(PolicyVersion(1, 2))).probe
        assert probe.token_ids == checkpoint.state.probe_token_ids != []
        assert it.team.calls == [(PolicyVersion(1, 2), ["000000004", "000000005"], 2)]


@pytest.mark.parametrize(
    ("loaded", "saved", "published", "lineage", "version", "newest"),
    [
        (None, [], [], 0, "0.0", -1),
        (None, [], ["0.1", "0.2"], 0, "1.0", 2),
        ("0.2", ["0.2"], ["0.1", "0.2", "0.3"], 0, "1.2", 3),
        ("1.4", ["1.4"], ["0.4", "1.4", "1.5"], 0, "2.4", 5),
        ("1.4", ["1.4"], [], 2, "2.4", -1),
        ("0.2", ["0.2", "1.4"], [], 1, "2.2", -1),
        ("0.2", ["0.2"], [], 5, "5.2", -1),
    ],
)
def test_whoever_begins_again_takes_a_lineage_that_nobody_had(
    loaded, saved, published, lineage, version, newest
):
    state = None if loaded is None else TrainingState(loaded, 1, "tp1", "", [[1, 2]])
    start = Start.of(
        state,
        published=[PolicyVersion.parse(text) for text in published],
        saved=[PolicyVersion.parse(text) for text in saved],
        lineage=lineage,
    )
    assert (str(start.version), start.newest_published) == (version, newest)


async def test_a_publication_is_there_before_replay_hears_of_it(tmp_path):
    async with learning(tmp_path) as it:
        publish, seen = it.server.queue.publish, []

        def note(step, consumed_step):
            seen.append((step, it.store.path(PolicyVersion(0, step)).exists()))
            publish(step, consumed_step)

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
    assert [(a["alarm"].partition(":")[0], a["step"]) for a in alarms] == [
        ("update skipped", 0),
        ("update skipped", 1),
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
    monkeypatch.setattr(treepo_async.learner.worker, "BATCH_WAIT_S", 0.1)
    async with learning(tmp_path, with_actor=False, batch_timeout_s=0.3) as it:
        with pytest.raises(
            DeadlineError,
            match=r"the batch of step 0 \(0 of 2 trees are in.*\); the actors should have ended it",
        ):
            await it.train()
        assert it.team.num_waits > 0, "the other ranks hear that rank 0 lives"
    waiting = events_in(capsys.readouterr().out, "waiting")
    assert waiting[0]["wait"] == "batch of step 0"
