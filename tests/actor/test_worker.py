import asyncio
import contextlib
import math
import time
from dataclasses import replace

import pytest

import treepo_async.actor.replay_client
import treepo_async.actor.worker
from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    engine_failure,
    events_in,
    loopback,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
    until,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.health import Health
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker
from treepo_async.engine.answer import NotFiniteError
from treepo_async.errors import EngineError, RefusedError
from treepo_async.replay.entry import State
from treepo_async.types import PolicyVersion
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import Requester

RUN_S = 20.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BACK_OFF_S", 0.05)


@contextlib.asynccontextmanager
async def worker_on(
    endpoint,
    engine,
    *,
    name="actor-0",
    scorer=lambda *_: 1.0,
    shuffle=False,
    sick_after=8,
    max_tree_bytes=None,
    timeout_s=math.inf,
):
    hello = Hello(name=name, run_id="run")
    async with Requester(
        endpoint, name=name, owner="replay", hello=hello, resend_s=0.5
    ) as requester:
        replay = ReplayClient(requester, max_tree_bytes=max_tree_bytes)
        await replay.hello(hello, timeout_s=5)
        settings = replace(ascii_settings(), timeout_s=timeout_s)
        grower = Grower(name, engine, settings, scoring_by(scorer), 0, shuffle)
        yield Worker(replay, grower, Health(sick_after))


def states(server):
    return [entry.state for entry in server.queue.order.kept()]


def stored_trees(server):
    return [decode_tree(server.store.read(lease_id)) for lease_id in server.queue.order.live]


async def test_a_worker_grows_every_lease_and_returns_when_there_are_no_more():
    engine = ScriptedEngine(seed=4)
    async with serve_replay(num_batches=1) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            await worker.run(concurrent_trees=3)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]
        trees = stored_trees(server)
    assert [tree.prompt.id for tree in trees] == ["p0", "p1"]
    for tree in trees:
        tree.check()
        assert len(tree.leaves) == 6
        assert tree.provenance.actor == "actor-0"
        assert tree.sampling.temperature == pytest.approx(0.8)
        assert {tuple(s.token_ids) for s in tree.segments} <= pieces_of(engine.runs)


def pieces_of(runs):
    """All contiguous pieces of what the engine returned."""
    return {
        tuple(run[i:j]) for run in runs for i in range(len(run)) for j in range(i + 1, len(run) + 1)
    }


async def test_a_worker_grows_again_what_a_replay_lost_after_the_last_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "LEASE_WAIT_S", 0.05)
    replay = {"endpoint": loopback(), "folder": tmp_path, "on_disk": False}
    async with asyncio.timeout(RUN_S), contextlib.AsyncExitStack() as stack:
        async with serve_replay(**replay) as (server, _):
            worker = await stack.enter_async_context(
                worker_on(replay["endpoint"], ScriptedEngine())
            )
            await stack.enter_async_context(running(worker.serve(concurrent_trees=2)))
            await until(server.queue.is_finished)
        async with serve_replay(**replay) as (server, _):
            assert not server.queue.is_finished()
            await until(server.queue.is_finished, timeout_s=RUN_S)


async def test_a_lease_that_the_engine_fails_on_is_given_up_and_grown_again():
    engine = ScriptedEngine(failures={0: engine_failure()})
    async with serve_replay() as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            await worker.run(concurrent_trees=1)
        first, second = server.queue.order.kept()
        assert (first.state, first.attempt) == (State.ACCEPTED, 2)
        assert (second.state, second.attempt) == (State.ACCEPTED, 1)
        assert server.queue.reasons == {"EngineError": 1}


async def test_a_lease_that_the_engine_always_fails_on_ends_in_quarantine():
    engine = ScriptedEngine(failures={call: engine_failure() for call in range(3)})
    async with serve_replay(max_attempts=3) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]
        assert server.queue.ledger()["quarantined"] == 1


async def test_a_stale_tree_is_dropped_and_its_lease_grown_again_under_newer_weights():
    engine = ScriptedEngine(eos_rate=0.5, obeys_least_step=False)
    rules = {"num_batches": 2, "max_attempts": 1000}
    async with serve_replay(**rules) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            work = asyncio.create_task(worker.run(concurrent_trees=2))
            await until(lambda: states(server) == [State.ACCEPTED] * 2)
            server.queue.next_batch(0)
            server.queue.publish(1, 0, 0)
            await until(lambda: server.queue.reasons["stale"] > 0)
            assert not work.done()
            engine.version = PolicyVersion(0, 1)
            await work
        assert states(server) == [State.TRAINED, State.TRAINED, State.ACCEPTED, State.ACCEPTED]
    assert {r.least_step for r in engine.requests} == {0, 1}


def about_half(response, _answer):
    return float(sum(response.encode()) % 2)


async def test_a_control_run_permutes_each_trees_scores_and_the_same_lease_gives_the_same_again():
    async def accuracies(*, shuffle):
        engine = ScriptedEngine(seed=4)
        async with serve_replay() as (server, endpoint), asyncio.timeout(RUN_S):
            async with worker_on(endpoint, engine, scorer=about_half, shuffle=shuffle) as worker:
                await worker.run(concurrent_trees=1)
            trees = stored_trees(server)
        for tree in trees:
            assert tree.rewards_L.tolist() == (2 * tree.accuracies_L - 1).tolist()
        return [tree.accuracies_L.tolist() for tree in trees]

    honest, control, again = [await accuracies(shuffle=s) for s in (False, True, True)]
    assert control == again != honest
    assert [sorted(tree) for tree in control] == [sorted(tree) for tree in honest]


def held_on_first():
    """An engine that never answers the first prompt, and everything else at once."""
    return ScriptedEngine(held={numbered_prompt(0).token_ids[0]: asyncio.Event()})


async def test_leases_of_a_living_worker_do_not_expire(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 0.05)
    engine = held_on_first()
    async with serve_replay(lease_timeout_s=0.4) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            work = asyncio.create_task(worker.run(concurrent_trees=1))
            await asyncio.sleep(0.9)
            assert states(server)[0] is State.LEASED
            engine.held.popitem()[1].set()
            await work
        assert server.queue.reasons == {}


async def test_leases_of_a_silent_worker_go_to_another(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 60.0)
    async with (
        serve_replay(lease_timeout_s=0.5) as (server, endpoint),
        worker_on(endpoint, held_on_first()) as silent,
        running(silent.run(concurrent_trees=1)),
        asyncio.timeout(RUN_S),
    ):
        await until(lambda: states(server) == [State.LEASED])
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]
        assert server.queue.reasons == {"lease_expired": 1}


async def test_a_worker_that_is_told_to_end_hands_its_leases_back_at_once():
    async with serve_replay(lease_timeout_s=60.0) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, held_on_first()) as leaving:
            async with running(leaving.run(concurrent_trees=1)):
                await until(lambda: states(server) == [State.LEASED])
            assert states(server) == [State.WAITING]
            entry = server.queue.order.live["000000000"]
            assert entry.attempt == entry.uncounted == 1, "the attempt does not count"
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]
        assert server.queue.reasons == {}


async def test_work_on_a_lease_that_was_taken_back_is_ended_at_the_next_beat(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 0.05)
    async with serve_replay(lease_limit_s=0.3) as (server, endpoint), asyncio.timeout(RUN_S):
        engine = held_on_first()
        async with worker_on(endpoint, engine) as worker, running(worker.run(1)) as work:
            await until(lambda: worker.num_lost == 1)
            assert server.queue.reasons["lease_too_long"] == 1
            engine.held.popitem()[1].set()
            await work
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]


async def test_a_silent_replay_is_told_of_once_and_growing_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 0.02)
    monkeypatch.setattr(treepo_async.actor.replay_client, "SILENT_S", 0.1)
    replay = {"endpoint": loopback(), "folder": tmp_path}
    engine = held_on_first()
    async with asyncio.timeout(RUN_S), contextlib.AsyncExitStack() as stack:
        async with serve_replay(**replay) as (server, endpoint):
            worker = await stack.enter_async_context(worker_on(endpoint, engine))
            work = await stack.enter_async_context(running(worker.run(concurrent_trees=2)))
            await until(lambda: sorted(states(server)) == [State.ACCEPTED, State.LEASED])
        num_requests = len(engine.requests)
        await asyncio.sleep(0.5)
        engine.held.popitem()[1].set()
        await until(lambda: len(engine.requests) > num_requests)
        async with serve_replay(**replay) as (server, _):
            await work
            assert states(server) == [State.ACCEPTED, State.ACCEPTED]
    alarms = [event["alarm"] for event in events_in(capsys.readouterr().out, "alarm")]
    assert alarms.count("replay has been silent for 10 s") == 1


async def test_an_actor_whose_leases_keep_failing_ends_with_the_reason():
    engine = ScriptedEngine(failures={call: engine_failure() for call in range(100)})
    async with serve_replay(max_attempts=1000) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine, sick_after=3) as worker:
            with pytest.raises(ExceptionGroup) as caught:
                await worker.run(concurrent_trees=1)
        assert caught.group_contains(EngineError, match="3 leases in a row failed .*no completion")
        assert server.queue.reasons == {"EngineError": 3}
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]


async def test_an_engine_with_log_probs_that_are_not_finite_is_called_sick_and_nothing_of_it_kept():
    failures = {call: NotFiniteError("not finite") for call in range(1000)}
    rules = {"max_attempts": 1000}
    async with serve_replay(**rules) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, ScriptedEngine(failures=failures), sick_after=99) as worker:
            with pytest.raises(ExceptionGroup) as caught:
                await worker.run(concurrent_trees=8)
        assert caught.group_contains(EngineError, match="engine is sick: 100% of the last 20 trees")
        assert State.ACCEPTED not in states(server)
        assert server.queue.reasons["not_finite"] >= 20
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]


async def test_a_tree_that_is_too_large_is_not_sent_and_its_lease_given_up():
    async with serve_replay(max_attempts=1) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, ScriptedEngine(), max_tree_bytes=100, sick_after=2) as it:
            with pytest.raises(ExceptionGroup) as caught:
                await it.run(concurrent_trees=1)
        assert caught.group_contains(EngineError, match=r"more than replay\.max_tree_bytes=100")
        assert server.queue.reasons["oversize"] == 2
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert State.ACCEPTED in states(server)


async def test_trees_of_weights_that_were_never_published_end_the_worker_and_are_not_stored():
    engine = ScriptedEngine(version=PolicyVersion(0, 9))
    async with serve_replay(max_attempts=99) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine, sick_after=2) as worker:
            with pytest.raises(ExceptionGroup) as caught:
                await worker.run(concurrent_trees=1)
        assert caught.group_contains(EngineError, match=r"future_version: sampled under 0\.9")
        assert State.ACCEPTED not in states(server)


async def test_an_actor_of_another_run_is_turned_away():
    async with (
        serve_replay() as (_, endpoint),
        Requester(endpoint, name="actor-0", owner="replay") as requester,
    ):
        with pytest.raises(RefusedError, match="is of run other"):
            await ReplayClient(requester).hello(Hello(name="actor-0", run_id="other"), timeout_s=5)


SCORE_S = 0.06


def slow_scorer(*_):
    """A leaf of six takes its part of `SCORE_S`."""
    time.sleep(SCORE_S / 6)
    return 1.0


async def test_the_time_of_every_slot_is_booked_by_what_it_was_at():
    released = asyncio.Event()
    engine = ScriptedEngine(held={int(numbered_prompt(0).token_ids[0]): released})
    async with (
        serve_replay(num_batches=1) as (server, endpoint),
        asyncio.timeout(RUN_S),
        worker_on(endpoint, engine, scorer=slow_scorer) as worker,
    ):
        async with running(worker.run(concurrent_trees=3)):
            await until(lambda: server.queue.ledger().get("accepted"))
            await asyncio.sleep(0.3)
            released.set()
            await until(server.queue.is_finished)
        reading = worker.slots.ledger.read()
        rows, _ = worker.slots.ledger.take_rows()
    assert sum(reading.seconds.values()) == pytest.approx(reading.wall)
    # one slot of three was held that long
    assert reading.seconds["grow"] > 0.3 / 3
    assert reading.seconds["lease"] > 0
    assert 0 < reading.seconds["put"] < reading.seconds["grow"]
    assert reading.seconds["score"] > 2 * SCORE_S / 3
    grown = [row.args for row in rows if row.name == "grow"]
    assert sorted(words["lease"] for words in grown) == ["000000000", "000000001"]
    assert {(words["leaves"], words["newest"]) for words in grown} == {(6, "0.0")}
    assert {row.track for row in rows} <= {"slot-0", "slot-1", "slot-2"}


async def test_a_lease_that_failed_is_back_at_replay_before_its_slot_backs_off():
    engine = ScriptedEngine(failures={0: engine_failure()})
    async with (
        serve_replay() as (_, endpoint),
        asyncio.timeout(RUN_S),
        worker_on(endpoint, engine) as worker,
    ):
        await worker.run(concurrent_trees=1)
        rows, _ = worker.slots.ledger.take_rows()
    names = [row.name for row in rows if row.name != "score"]
    assert names[:4] == ["lease", "grow", "put", "back_off"]
    assert rows[2].args["reason"] == "EngineError"
