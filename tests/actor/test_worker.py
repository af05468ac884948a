import asyncio
import contextlib

import pytest

import treepo_async.actor.worker
from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    engine_failure,
    loopback,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
    until,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker
from treepo_async.errors import RefusedError
from treepo_async.replay.entry import State
from treepo_async.types import PolicyVersion
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.sockets import Requester

RUN_S = 20.0


@contextlib.asynccontextmanager
async def worker_on(endpoint, engine, *, name="actor-0", scorer=lambda *_: 1.0, shuffle=False):
    async with Requester(endpoint, name=name, owner="replay") as requester:
        replay = ReplayClient(requester)
        await replay.hello(name=name, run_id="run", timeout_s=5)
        scoring = scoring_by(scorer)
        yield Worker(replay, Grower(name, engine, ascii_settings(), scoring, 0, shuffle))


def states(server):
    return [entry.state for entry in server.queue.order.kept()]


def stored_trees(server):
    return [decode_tree(server.spool.read(lease_id)) for lease_id in server.queue.order.live]


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
    endpoint = loopback()
    async with asyncio.timeout(RUN_S), contextlib.AsyncExitStack() as stack:
        async with serve_replay(endpoint=endpoint, folder=tmp_path) as (server, _):
            worker = await stack.enter_async_context(worker_on(endpoint, ScriptedEngine()))
            await stack.enter_async_context(running(worker.serve(concurrent_trees=2)))
            await until(lambda: states(server) == [State.ACCEPTED] * 2)
            await until(server.queue.is_finished)
            await asyncio.sleep(1.5)
        async with serve_replay(endpoint=endpoint, folder=tmp_path) as (server, _):
            assert states(server) == [State.WAITING] * 2
            await until(lambda: states(server) == [State.ACCEPTED] * 2, timeout_s=RUN_S)


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
            server.queue.publish(1, 0)
            await until(lambda: server.queue.reasons["stale"] > 0)
            assert not work.done()
            engine.version = PolicyVersion(0, 1)
            await work
        assert states(server) == [State.TRAINED, State.TRAINED, State.ACCEPTED, State.ACCEPTED]
    assert {r.least_step for r in engine.requests} == {0, 1}


async def test_a_tree_that_replay_calls_invalid_ends_the_worker():
    engine = ScriptedEngine(version=PolicyVersion(0, 9))
    async with serve_replay() as (_, endpoint), worker_on(endpoint, engine) as worker:
        with pytest.raises(ExceptionGroup) as caught:
            await worker.run(concurrent_trees=1)
    assert caught.group_contains(RefusedError, match="step_S has 9")


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


async def test_leases_of_a_living_worker_do_not_expire(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 0.05)
    held = asyncio.Event()
    engine = ScriptedEngine(held={numbered_prompt(0).token_ids[0]: held})
    async with serve_replay(lease_timeout_s=0.4) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as worker:
            work = asyncio.create_task(worker.run(concurrent_trees=1))
            await asyncio.sleep(0.9)
            assert states(server)[0] is State.LEASED
            held.set()
            await work
        assert server.queue.reasons == {}


async def test_leases_of_a_silent_worker_go_to_another():
    engine = ScriptedEngine(held={numbered_prompt(0).token_ids[0]: asyncio.Event()})
    async with serve_replay(lease_timeout_s=0.5) as (server, endpoint), asyncio.timeout(RUN_S):
        async with worker_on(endpoint, engine) as silent:
            work = asyncio.create_task(silent.run(concurrent_trees=1))
            await until(lambda: states(server) == [State.LEASED])
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        async with worker_on(endpoint, ScriptedEngine(), name="actor-1") as worker:
            await worker.run(concurrent_trees=1)
        assert states(server) == [State.ACCEPTED, State.ACCEPTED]
        assert server.queue.reasons == {"lease_expired": 1}


async def test_an_actor_of_another_run_is_turned_away():
    async with (
        serve_replay() as (_, endpoint),
        Requester(endpoint, name="actor-0", owner="replay") as requester,
    ):
        with pytest.raises(RefusedError, match="is of run other"):
            await ReplayClient(requester).hello(name="actor-0", run_id="other", timeout_s=5)
