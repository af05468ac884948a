import asyncio
import contextlib
import errno
import json
import math
import time
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pytest

from tests.fakes import LIMITS, VOCAB_SIZE, loopback, serve_replay, until
from treepo_async.data.source import EndOfData
from treepo_async.errors import DataError, DeadlineError, RefusedError
from treepo_async.replay.entry import State
from treepo_async.replay.index import Index
from treepo_async.replay.server import ReplayServer
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)
from treepo_async.wire.codec import decode_tree, digest_of, encode_tree
from treepo_async.wire.messages import (
    Ack,
    AskBatch,
    AskLease,
    Batch,
    Beat,
    Gate,
    GiveUp,
    Hello,
    Leased,
    NoBatch,
    NoLease,
    Published,
    PutTree,
    Retired,
    Trained,
)
from treepo_async.wire.sockets import BlockingRequester, Requester

RUN_ID = "run-a"
SOON_S = 8.0


@dataclass
class ScriptedPrompts:
    """As many prompts as told, some of which cannot be used."""

    num_prompts: int = 1000
    bad: tuple[int, ...] = ()

    def __call__(self, index: int) -> Prompt:
        if index >= self.num_prompts:
            raise EndOfData("all prompts are handed out")
        if index in self.bad:
            raise DataError(f"prompt {index} is too long")
        return Prompt(
            f"prompt-{index}", np.array([5, index % 50], np.int32), f"text {index}", str(index)
        )


def tree_for(lease, *, step=0, accuracies=(1.0, 0.0), token_id=7):
    """Two paths of one segment each, sampled under policy step `step`."""
    version = PolicyVersion(0, step)
    segments = tuple(
        Segment(ROOT, 0, np.array([token_id, leaf], np.int32), np.array([-0.5, -1.0], np.float32), version, StopReason.EOS)
        for leaf in range(2)
    )  # fmt: skip
    values = np.array(accuracies, np.float32)
    return Tree(
        Prompt(lease.prompt_id, np.array(lease.token_ids, np.int32), lease.text, lease.answer),
        segments,
        values * 2 - 1,
        values,
        Sampling(1.0, 4, 2, 2, 2),
        Provenance(lease.lease_id, "actor-0", decoded_tokens=4, num_requests=2),
    )


class Peer:
    """What actors and the learner say to replay, each answer within seconds."""

    def __init__(self, replay: Requester) -> None:
        self.replay = replay

    async def ask(self, message, attachment=()):
        return await self.replay.ask(message, attachment, timeout_s=SOON_S, wait="an answer")

    async def lease(self, wait_s=5.0):
        return (await self.ask(AskLease(wait_s=wait_s)))[0]

    async def put(self, lease, tree):
        frames = encode_tree(tree)
        message = PutTree(lease_id=lease.lease_id, attempt=lease.attempt, digest=digest_of(frames))
        answer, _ = await self.ask(message, frames)
        assert isinstance(answer, Ack)
        return answer.note

    async def batch(self, step, wait_s=5.0, lineage=0):
        return await self.ask(AskBatch(step=step, lineage=lineage, wait_s=wait_s))


@dataclass
class Served:
    """A replay that serves, and how to reach it."""

    server: ReplayServer
    endpoint: str
    peers: contextlib.AsyncExitStack

    async def peer(self, name, **options) -> Peer:
        hello = Hello(name=name, run_id=RUN_ID)
        requester = Requester(self.endpoint, name=name, owner="replay", hello=hello, **options)
        return Peer(await self.peers.enter_async_context(requester))


RULES = {
    "prompts_per_batch": 2,
    "max_staleness": 1,
    "num_batches": 100,
    "lease_timeout_s": 60.0,
    "max_attempts": 3,
    "drop_degenerate": True,
    "max_refills": 64,
}


@contextlib.asynccontextmanager
async def serving(prompts, **changes):
    options = {**RULES, "run_id": RUN_ID, **changes}
    async with serve_replay(prompt=prompts, **options) as (server, endpoint):
        async with contextlib.AsyncExitStack() as peers:
            yield Served(server, endpoint, peers)
        server.queue.check_integrity()


def waiting_in(served):
    return served.server._askers.waiting


def events_of(capsys, name):
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"event":')]
    return [event for event in found if event["event"] == name]


# ------------------------------------------------------------------ the way of a tree


async def test_two_actors_fill_a_batch_that_the_learner_gets_in_lease_order():
    async with serving(ScriptedPrompts()) as served:
        one, two, learner = [await served.peer(n) for n in ("actor-0", "actor-1", "learner-0")]
        asked = asyncio.create_task(learner.batch(0))
        first, second = await one.lease(), await two.lease()
        assert (first.prompt_id, first.token_ids, first.text, first.answer) == (
            "prompt-0", [5, 0], "text 0", "0",
        )  # fmt: skip
        assert (first.attempt, first.least_step) == (1, 0)
        assert await two.put(second, tree_for(second)) == "accepted"
        assert not asked.done()
        assert await one.put(first, tree_for(first)) == "accepted"
        batch, frames = await asked
    assert isinstance(batch, Batch)
    assert batch.lease_ids == [first.lease_id, second.lease_id]
    assert batch.ledger == {"consumed": 2}
    assert len(frames) == 2 * batch.frames_per_tree
    trees = [decode_tree(frames[i : i + batch.frames_per_tree]) for i in (0, batch.frames_per_tree)]
    assert [t.prompt.id for t in trees] == ["prompt-0", "prompt-1"]
    assert encode_tree(trees[0]) == encode_tree(tree_for(first))


async def test_a_batch_asked_for_twice_has_the_same_trees():
    async with serving(ScriptedPrompts()) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        for _ in range(4):
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease))
        first, again = await learner.batch(0), await learner.batch(0)
    assert first[0].lease_ids == again[0].lease_ids == ["000000000", "000000001"]
    assert first[1] == again[1]


async def test_a_batch_out_of_turn_is_refused_and_replay_goes_on():
    async with serving(ScriptedPrompts()) as served:
        learner = await served.peer("learner-0")
        with pytest.raises(RefusedError, match="wrong_step: asked for 3, next is 0"):
            await learner.batch(3)
        assert isinstance((await learner.batch(0, wait_s=0.0))[0], NoBatch)


async def test_publications_make_room_and_retired_trees_are_forgotten():
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        for step in range(3):
            for _ in range(2):
                lease = await actor.lease()
                assert lease.least_step == step
                await actor.put(lease, tree_for(lease, step=step))
            assert (await learner.batch(step))[0].step == step
            assert isinstance(await actor.lease(wait_s=0.0), NoLease), "the learner is behind"
            await learner.ask(Published(step=step + 1, lineage=0, consumed_step=step))
            await learner.ask(Retired(step=step))
        assert served.server.store.num_bytes == 0
        assert served.server.queue.ledger() == {"trained": 6}


async def test_the_learners_blocking_requester_gets_a_batch():
    def learn(endpoint):
        hello = Hello(name="learner-0", run_id=RUN_ID)
        learner = BlockingRequester(endpoint, name="learner-0", owner="replay", hello=hello)
        try:
            return learner.ask(
                AskBatch(step=0, lineage=0, wait_s=5), timeout_s=SOON_S, wait="a batch"
            )
        finally:
            learner.close()

    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        batch = asyncio.create_task(asyncio.to_thread(learn, served.endpoint))
        for _ in range(2):
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease))
        answer, frames = await batch
    assert len(frames) == 2 * answer.frames_per_tree


async def test_a_tree_put_twice_is_acknowledged_as_a_duplicate():
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        assert await actor.put(lease, tree_for(lease)) == "accepted"
        assert await actor.put(lease, tree_for(lease)) == "duplicate"
        served.server.queue.order.live[lease.lease_id].attempt = 2
        later = msgspec.structs.replace(lease, attempt=2)
        assert await actor.put(later, tree_for(lease, token_id=9)) == "duplicate"
        stored = decode_tree(served.server.store.read(lease.lease_id))
    assert stored.segments[0].token_ids[0] == 7, "the first one stays"


async def test_another_tree_of_the_same_attempt_is_refused_with_an_alarm(capsys):
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        await actor.put(lease, tree_for(lease))
        with pytest.raises(RefusedError, match="another tree of attempt 1"):
            await actor.put(lease, tree_for(lease, token_id=9))
        assert await actor.put(lease, tree_for(lease)) == "duplicate"
    assert "two different trees" in events_of(capsys, "alarm")[0]["alarm"]


async def test_a_tree_whose_bytes_changed_on_the_way_is_refused():
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        sent, arrived = encode_tree(tree_for(lease)), encode_tree(tree_for(lease, token_id=9))
        put = PutTree(lease_id=lease.lease_id, attempt=1, digest=digest_of(sent))
        with pytest.raises(RefusedError, match="digest differs"):
            await actor.ask(put, arrived)


async def test_a_tree_that_is_too_large_is_refused_and_the_next_one_taken():
    async with serving(ScriptedPrompts(), limits=replace(LIMITS, max_tree_bytes=2_000)) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        tree = tree_for(lease)
        long = replace(tree, prompt=replace(tree.prompt, text="x" * 2_000))
        with pytest.raises(RefusedError, match=r"oversize: .*max_tree_bytes is 2000"):
            await actor.put(lease, long)
        lease = await actor.lease()
        assert await actor.put(lease, tree_for(lease)) == "accepted"


async def test_the_age_of_a_pruned_path_does_not_make_its_tree_stale():
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        for lease in [await actor.lease() for _ in range(2)]:
            await actor.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        lease = await actor.lease()
        tree = tree_for(lease, step=1)
        old = replace(tree.segments[0], policy_version=PolicyVersion(0, 0), stop=StopReason.PRUNED)
        values = np.array([1, 0, np.nan], np.float32)
        tree = replace(tree, segments=(*tree.segments, old), rewards_L=values, accuracies_L=values)
        assert await actor.put(lease, tree) == "accepted"
        other = await actor.lease()
        with pytest.raises(RefusedError, match="stale"):
            await actor.put(other, tree_for(other, step=0))


async def test_a_degenerate_tree_is_dropped_and_its_place_given_again_at_staleness_zero():
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        for accuracies in [(1, 1), (0, 0), (math.nan, math.nan), (1, 0), (0, 1)]:
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease, accuracies=accuracies))
        batch, _ = await learner.batch(0)
    assert batch.lease_ids == ["000000003", "000000004"]
    assert batch.ledger == {
        "consumed": 2,
        "dropped": 3,
        "reason/degenerate": 2,
        "reason/reward_error": 1,
    }


async def test_each_tree_is_told_to_the_driver_dropped_ones_too(capsys):
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        for accuracies in [(1, 0), (1, math.nan), (1, 1)]:
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease, accuracies=accuracies))
    events = events_of(capsys, "tree")
    assert [e["outcome"] for e in events] == ["accepted", "degenerate", "degenerate"]
    assert [(e["accuracy_sum"], e["num_scored"]) for e in events] == [(1, 2), (1, 1), (2, 2)]
    assert events[0]["actor"] == "actor-0"
    assert (events[0]["num_leaves"], events[0]["delivered_tokens"]) == (2, 4)


# ------------------------------------------------------------------ waits


async def test_who_waits_for_a_lease_gets_it_as_soon_as_there_is_one():
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        one, two, learner = [await served.peer(n) for n in ("actor-0", "actor-1", "learner-0")]
        leases = [await one.lease(), await one.lease()]
        waiting = asyncio.create_task(two.lease())
        for lease in leases:
            await one.put(lease, tree_for(lease))
        await learner.batch(0)
        begin = time.monotonic()
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        lease = await waiting
    assert lease.lease_id == "000000002"
    assert time.monotonic() - begin < 2


async def test_a_wait_without_end_is_answered_in_time_with_what_is_missing():
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        first, _ = await actor.lease(), await actor.lease()
        await actor.put(first, tree_for(first))
        begin = time.monotonic()
        (answer, _), no_lease = await asyncio.gather(
            learner.batch(0, wait_s=0.3), actor.lease(wait_s=0.3)
        )
        waited = time.monotonic() - begin
    assert answer == NoBatch(
        request=answer.request,
        reason="1 of 2 trees are in, 1 being grown, 0 waiting for an actor",
    )
    assert no_lease == NoLease(request=no_lease.request, reason="admission: the learner is behind")
    assert 0.3 <= waited < 2


@pytest.mark.parametrize("wait_s", [math.nan, math.inf, 1e300, -1.0], ids=str)
async def test_no_wait_is_longer_than_replay_allows(wait_s):
    async with serving(ScriptedPrompts(), max_staleness=0) as served:
        learner = await served.peer("learner-0")
        asked = asyncio.create_task(learner.batch(0, wait_s=wait_s))
        await until(lambda: waiting_in(served) or asked.done())
        for waiting in waiting_in(served).values():
            assert waiting.deadline <= time.monotonic() + 60
        asked.cancel()


async def test_a_batch_without_all_its_trees_waits_for_the_actor_that_has_the_rest():
    async with serving(ScriptedPrompts(num_prompts=3), max_staleness=5) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        leases = [await actor.lease() for _ in range(3)]
        waiting = asyncio.create_task(actor.lease())
        for lease in leases:
            assert not waiting.done()
            await actor.put(lease, tree_for(lease))
        end_of_leases = await waiting
        assert end_of_leases == NoLease(
            request=end_of_leases.request, reason="no prompt is left to grow", final=True
        )
        assert (await learner.batch(0))[0].lease_ids == ["000000000", "000000001"]
        end_of_batches, _ = await learner.batch(1)
    assert end_of_batches == NoBatch(
        request=end_of_batches.request, reason="the data has ended", final=True
    )


async def test_a_prompt_that_cannot_be_used_is_passed_over(capsys):
    async with serving(ScriptedPrompts(bad=(0, 2))) as served:
        actor = await served.peer("actor-0")
        assert [(await actor.lease()).prompt_id for _ in range(2)] == ["prompt-1", "prompt-3"]
    alarms = events_of(capsys, "alarm")
    assert [a["detail"] for a in alarms] == ["prompt 0 is too long", "prompt 2 is too long"]


# ------------------------------------------------------------------ lost actors


async def test_a_silent_actors_lease_goes_to_the_other_and_its_late_tree_still_counts(capsys):
    rules = {"max_staleness": 0, "prompts_per_batch": 1, "lease_timeout_s": 0.3}
    async with serving(ScriptedPrompts(), **rules) as served:
        silent, other = await served.peer("actor-0"), await served.peer("actor-1")
        lost = await silent.lease()
        moved = await other.lease()
        assert (moved.lease_id, moved.attempt) == (lost.lease_id, 2)
        assert await silent.put(lost, tree_for(lost)) == "accepted"
        assert await other.put(moved, tree_for(moved)) == "duplicate"
    (alarm,) = events_of(capsys, "alarm")
    assert (alarm["alarm"], alarm["lease"], alarm["reason"]) == (
        "lease taken back", lost.lease_id, "lease_expired",
    )  # fmt: skip


async def test_beats_keep_a_lease():
    rules = {"max_staleness": 0, "prompts_per_batch": 1, "lease_timeout_s": 1.0}
    async with serving(ScriptedPrompts(), **rules) as served:
        actor, other = await served.peer("actor-0"), await served.peer("actor-1")
        lease = await actor.lease()
        for _ in range(9):
            await asyncio.sleep(0.15)
            await actor.replay.tell(Beat(leases=[lease.lease_id]))
        assert isinstance(await other.lease(wait_s=0.0), NoLease)
        assert served.server.queue.is_leased(lease.lease_id, 1)


async def test_an_actor_that_gives_up_hands_its_prompt_on_at_once():
    rules = {"max_staleness": 0, "prompts_per_batch": 1}
    async with serving(ScriptedPrompts(), **rules) as served:
        one, two = await served.peer("actor-0"), await served.peer("actor-1")
        lease = await one.lease()
        waiting = asyncio.create_task(two.lease())
        await one.ask(GiveUp(lease_id=lease.lease_id, attempt=1, reason="EngineError"))
        moved = await waiting
    assert (moved.lease_id, moved.attempt) == (lease.lease_id, 2)


async def test_nobody_can_give_up_the_lease_of_another():
    async with serving(ScriptedPrompts(), max_staleness=0, prompts_per_batch=1) as served:
        one, two = await served.peer("actor-0"), await served.peer("actor-1")
        lease = await one.lease()
        await two.ask(GiveUp(lease_id=lease.lease_id, attempt=1, reason="EngineError"))
        assert served.server.queue.is_held(lease.lease_id, "actor-0")
        assert await one.put(lease, tree_for(lease)) == "accepted"


async def test_no_lease_is_handed_to_an_actor_that_has_gone():
    rules = {"max_staleness": 0, "max_attempts": 1}
    async with serving(ScriptedPrompts(), **rules) as served:
        one, learner = await served.peer("actor-0"), await served.peer("learner-0")
        leases = [await one.lease(), await one.lease()]
        hello = Hello(name="actor-1", run_id=RUN_ID)
        gone = Requester(served.endpoint, name="actor-1", owner="replay", hello=hello)
        async with gone:
            asks = [
                asyncio.create_task(gone.ask(AskLease(wait_s=30.0), timeout_s=30, wait="a lease"))
                for _ in range(4)
            ]
            await until(lambda: len(waiting_in(served)) == 4)
            for ask in asks:
                ask.cancel()
        for lease in leases:
            await one.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        two = await served.peer("actor-2")
        moved = [await two.lease() for _ in range(2)]
        assert [m.lease_id for m in moved] == ["000000002", "000000003"]
        entries = [served.server.queue.order.live[m.lease_id] for m in moved]
        assert [entry.tries for entry in entries] == [1, 1], "what did not reach it costs nothing"
        assert waiting_in(served) == {}


async def test_a_lease_asked_for_twice_by_one_request_is_given_once():
    async with serving(ScriptedPrompts(), prompts_per_batch=4) as served:
        actor = await served.peer("actor-0", resend_s=0.05)
        server, lost = served.server, []
        send = server.router.send_now

        def lose_the_first_two(peer, message, attachment=()):
            if isinstance(message, Leased) and len(lost) < 2:
                lost.append(message)
                return True
            return send(peer, message, attachment)

        server.router.send_now = lose_the_first_two
        lease = await actor.lease()
        assert len(lost) == 2
        assert {(m.lease_id, m.attempt) for m in [lease, *lost]} == {("000000000", 1)}
        assert (await actor.lease()).lease_id == "000000001", "another request, another lease"
        await actor.put(lease, tree_for(lease))
        await actor.lease()
        assert len(server._askers.granted) == 2, "the delivered one is forgotten"


# ------------------------------------------------------------------ refusals


async def test_a_peer_of_another_run_is_refused_with_both_names():
    async with serving(ScriptedPrompts()) as served:
        peer = await served.peer("actor-9")
        with pytest.raises(
            RefusedError, match=r"^wrong_run: actor-9 .* run run-b.* run run-a"
        ) as e:
            await peer.ask(Hello(name="actor-9", run_id="run-b"))
        assert (e.value.reason, e.value.retry) == ("wrong_run", False)
        with pytest.raises(RefusedError, match="protocol 99"):
            await peer.ask(Hello(name="actor-9", run_id=RUN_ID, protocol=99))
        answer, _ = await peer.ask(Hello(name="actor-9", run_id=RUN_ID))
    assert isinstance(answer, Ack)


async def test_a_stale_tree_is_refused_and_its_prompt_given_again():
    async with serving(ScriptedPrompts(), max_staleness=0, prompts_per_batch=1) as served:
        actor, learner = await served.peer("actor-0"), await served.peer("learner-0")
        lease = await actor.lease()
        await actor.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        lease = await actor.lease()
        with pytest.raises(RefusedError, match=r"policy step 0.*needs 1") as caught:
            await actor.put(lease, tree_for(lease, step=0))
        assert caught.value.reason == "stale"
        again = await actor.lease()
        assert (again.lease_id, again.attempt) == (lease.lease_id, 2)
        assert await actor.put(again, tree_for(again, step=1)) == "accepted"


def with_token_outside(lease):
    return tree_for(lease, token_id=VOCAB_SIZE)


def of_the_future(lease):
    return tree_for(lease, step=2)


def of_another_lease(lease):
    tree = tree_for(lease)
    return Tree(tree.prompt, tree.segments, tree.rewards_L, tree.accuracies_L, tree.sampling, Provenance("000000099", "a"))  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (with_token_outside, "token_ids_T"),
        (of_the_future, "sampled under 0.2"),
        (of_another_lease, "provenance.lease_id"),
    ],
)
async def test_an_invalid_tree_is_refused_and_its_prompt_given_again(capsys, spoil, name):
    async with serving(ScriptedPrompts(), max_staleness=0, prompts_per_batch=1) as served:
        actor, other = await served.peer("actor-0"), await served.peer("actor-1")
        lease = await actor.lease()
        with pytest.raises(RefusedError, match=name) as caught:
            await actor.put(lease, spoil(lease))
        reason = "future_version" if spoil is of_the_future else "invalid"
        assert (caught.value.reason, caught.value.retry) == (reason, False)
        again = await other.lease()
        assert (again.lease_id, again.attempt) == (lease.lease_id, 2)
        assert await other.put(again, tree_for(again)) == "accepted"
    if spoil is not of_the_future:
        (alarm,) = events_of(capsys, "alarm")
        assert alarm["alarm"] == "invalid message refused"
        assert name in alarm["detail"]


async def test_a_tree_of_a_publication_that_replay_has_not_heard_of_yet_is_taken():
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        assert await actor.put(lease, tree_for(lease, step=1)) == "accepted"


async def test_what_is_no_request_is_refused_and_replay_serves_on():
    async with serving(ScriptedPrompts()) as served:
        actor = await served.peer("actor-0")
        lease = await actor.lease()
        put = PutTree(lease_id=lease.lease_id, attempt=7)
        for message, attachment in [
            (Gate(epoch=1, is_open=True), []),
            (put, []),
            (put, [b"junk"] * 14),
        ]:
            with pytest.raises(RefusedError) as caught:
                await actor.ask(message, attachment)
            assert caught.value.reason == "invalid"
        never = msgspec.structs.replace(lease, lease_id="never")
        with pytest.raises(RefusedError) as caught:
            await actor.put(never, tree_for(never))
        assert caught.value.reason == "unknown_lease"
        assert await actor.put(lease, tree_for(lease)) == "accepted"


async def test_bytes_that_are_no_message_harm_nobody():
    async with serving(ScriptedPrompts()) as served:
        vandal, actor = await served.peer("vandal"), await served.peer("actor-0")
        rng = np.random.default_rng(0)
        for _ in range(300):
            frames = [rng.bytes(int(rng.integers(0, 40))) for _ in range(int(rng.integers(1, 4)))]
            await vandal.replay._socket.send_multipart(frames)
        lease = await actor.lease()
        assert await actor.put(lease, tree_for(lease)) == "accepted"
        assert served.server.queue.order.live[lease.lease_id].state is State.ACCEPTED


# ------------------------------------------------------------------ who gets a lease


async def test_of_several_who_wait_the_one_that_holds_the_fewest_leases_is_served_first():
    async with serving(ScriptedPrompts(), max_staleness=1) as served:
        greedy, modest, late = [await served.peer(f"actor-{i}") for i in range(3)]
        learner = await served.peer("learner-0")
        leases = [await greedy.lease() for _ in range(3)] + [await modest.lease()]
        asks = []
        for peer in (greedy, greedy, modest, late):
            asks.append(asyncio.create_task(peer.lease()))
            await until(lambda: len(waiting_in(served)) == len(asks))
        for lease in (leases[0], leases[1], leases[3]):
            await greedy.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        assert [(await ask).lease_id for ask in asks[2:]] == ["000000004", "000000005"]
        assert not any(ask.done() for ask in asks[:2]), "greedy holds one, the others held none"
        for ask in asks[:2]:
            ask.cancel()


async def test_room_for_all_is_shared_in_turn():
    async with serving(ScriptedPrompts(), prompts_per_batch=3, max_staleness=0) as served:
        one, two, learner = [await served.peer(n) for n in ("actor-0", "actor-1", "learner-0")]
        for lease in [await one.lease() for _ in range(3)]:
            await one.put(lease, tree_for(lease))
        asks = []
        for peer in (one, one, one, two):
            asks.append(asyncio.create_task(peer.lease()))
            await until(lambda: len(waiting_in(served)) == len(asks))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        given = [(await asks[i]).lease_id for i in (0, 3, 1)]
        assert given == ["000000003", "000000004", "000000005"]
        asks[2].cancel()


# ------------------------------------------------------------------ replay dies


class Run:
    """A replay that is started, ended and started again, and peers that know nothing of it."""

    def __init__(self, folder, stack, **rules):
        self.endpoint, self.folder, self.stack = loopback(), folder, stack
        self.rules = {**RULES, "run_id": RUN_ID, **rules}

    def replay(self, **changes):
        options = {"endpoint": self.endpoint, "folder": self.folder, **self.rules, **changes}
        return serve_replay(prompt=ScriptedPrompts(), **options)

    async def peer(self, name, run_id=RUN_ID):
        hello = Hello(name=name, run_id=run_id)
        requester = Requester(self.endpoint, name=name, owner="replay", hello=hello, resend_s=0.2)
        return Peer(await self.stack.enter_async_context(requester))


@pytest.fixture
async def stack():
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(40):
        yield stack


async def train(actor, learner, step, lineage=0):
    """Have a step grown, trained and published, with staleness 0. Gives its lease ids."""
    for _ in range(2):
        lease = await actor.lease()
        await actor.put(lease, tree_for(lease, step=step))
    batch, _ = await learner.batch(step, lineage=lineage)
    await learner.ask(Trained(step=step, lineage=lineage, digest=f"digest {step}"))
    await learner.ask(Published(step=step + 1, lineage=lineage, consumed_step=step))
    return batch.lease_ids


async def test_a_replay_that_is_started_again_has_every_lease_and_tree_as_they_were(
    tmp_path, stack
):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, other, learner = [await run.peer(n) for n in ("actor-0", "actor-1", "learner-0")]
    async with run.replay():
        leases = [await actor.lease() for _ in range(2)]
        await actor.put(leases[1], tree_for(leases[1]))
        batch = asyncio.create_task(learner.batch(0))
        await asyncio.sleep(0.1)
    put = asyncio.create_task(actor.put(leases[0], tree_for(leases[0])))
    await asyncio.sleep(0.3)
    async with run.replay() as (server, _):
        assert await put == "accepted", "grown before replay died"
        assert isinstance(await other.lease(wait_s=0.0), NoLease), "nothing is grown again"
        answer, frames = await batch
        assert answer.lease_ids == [lease.lease_id for lease in leases]
        assert len(frames) == 2 * answer.frames_per_tree
        assert server.queue.ledger() == {"consumed": 2}


async def test_trees_in_memory_die_with_replay_and_are_grown_again(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0, on_disk=False)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        leases = [await actor.lease() for _ in range(2)]
        for lease in leases:
            await actor.put(lease, tree_for(lease))
    async with run.replay() as (server, _):
        batch = asyncio.create_task(learner.batch(0))
        again = [await actor.lease() for _ in range(2)]
        assert [a.lease_id for a in again] == [lease.lease_id for lease in leases]
        for lease in again:
            await actor.put(lease, tree_for(lease))
        assert (await batch)[0].lease_ids == [lease.lease_id for lease in leases]
        assert server.queue.ledger() == {"consumed": 2, "reason/tree_lost": 2}


async def test_a_peer_that_replay_does_not_know_greets_it_and_asks_again(tmp_path, stack):
    run = Run(tmp_path, stack)
    async with run.replay() as (server, endpoint):
        async with Requester(endpoint, name="actor-7", owner="replay") as stranger:
            with pytest.raises((RefusedError, DeadlineError)):
                await stranger.ask(AskLease(wait_s=0.0), timeout_s=1.0, wait="a lease")
        actor = await run.peer("actor-0")
        assert isinstance(await actor.lease(), Leased)
        assert server.queue.actors == {"actor-0"}


async def test_a_later_process_of_an_actor_fences_the_earlier_one_and_has_its_leases(
    tmp_path, stack
):
    run = Run(tmp_path, stack, max_staleness=0)
    async with run.replay() as (server, _):
        frozen = await run.peer("actor-0")
        lost = await frozen.lease()
        later = await run.peer("actor-0")
        again = await later.lease()
        assert (again.lease_id, again.attempt) == (lost.lease_id, 2)
        with pytest.raises(RefusedError) as caught:
            await frozen.put(lost, tree_for(lost))
        assert caught.value.reason == "fenced"
        assert await later.put(again, tree_for(again)) == "accepted"
        assert server.queue.reasons == {"actor_ended": 1}


async def test_nothing_is_told_before_it_is_on_disk(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    seen = []
    async with run.replay() as (server, _):
        send = server.router.send_now

        def look(peer, message, attachment=()):
            with contextlib.closing(Index.open(tmp_path / "index.sqlite")) as index:
                rows = {row.prompt_index: row for row in index.leases()}
                steps = [(s.step, s.digest) for s in index.steps()]
            seen.append((type(message).__name__, getattr(message, "note", ""), rows, steps))
            return send(peer, message, attachment)

        server.router.send_now = look
        await train(actor, learner, 0)
    leased = next(rows for name, _, rows, _ in seen if name == "Leased")
    assert leased[0].state == "leased"
    accepted = next(rows for _, note, rows, _ in seen if note == "accepted")
    assert accepted[0].state == "accepted"
    (consumed, begun) = next((rows, steps) for name, _, rows, steps in seen if name == "Batch")
    assert [consumed[i].step for i in (0, 1)] == [0, 0]
    assert begun == [(0, "")]
    assert seen[-1][3] == [(0, "digest 0")]
    assert seen[-1][2][0].state == "trained"


async def test_a_disk_that_is_full_acknowledges_nothing_and_loses_nothing(tmp_path, stack, capsys):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay() as (server, _):
        leases = [await actor.lease() for _ in range(2)]
        commit, is_full = server.store.commit, [True]

        def commit_if_there_is_room(changes, trees=()):
            if is_full[0]:
                raise OSError(errno.ENOSPC, "no space left on device")
            commit(changes, trees)

        server.store.commit = commit_if_there_is_room
        puts = [asyncio.create_task(actor.put(x, tree_for(x))) for x in leases]
        await until(lambda: server._group.is_stuck)
        await asyncio.sleep(0.3)
        assert not any(put.done() for put in puts)
        is_full[0] = False
        assert {await put for put in puts} <= {"accepted", "duplicate"}
        assert (await learner.batch(0))[0].lease_ids == [x.lease_id for x in leases]
    alarms = [alarm["alarm"] for alarm in events_of(capsys, "alarm")]
    assert alarms == ["replay cannot write, nothing is acknowledged", "replay can write again"]


async def test_a_learner_that_goes_back_gets_the_same_trees_in_the_same_order(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        for step in range(3):
            await train(actor, learner, step)
        await learner.ask(Retired(step=0))
        first = [await learner.batch(step) for step in (1, 2)]
    async with run.replay() as (server, _):
        again = await run.peer("learner-0")
        for step, (batch, frames) in zip((1, 2), first, strict=True):
            same, same_frames = await again.batch(step, lineage=1)
            assert (same.lease_ids, same_frames) == (batch.lease_ids, frames)
            assert same.results == {0: f"digest {step}"}
            await again.ask(Trained(step=step, lineage=1, digest=f"digest {step}"))
            await again.ask(Published(step=step + 1, lineage=1, consumed_step=step))
        assert (server.queue.ledger(), server.queue.published) == ({"trained": 6}, 3)
        with pytest.raises(RefusedError, match="wrong_step"):
            await again.batch(0, lineage=1)


async def test_a_step_with_another_result_than_before_is_told(tmp_path, stack, capsys):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        await train(actor, learner, 0)
        await learner.batch(0, lineage=1)
        await learner.ask(Trained(step=0, lineage=1, digest="another"))
    (alarm,) = events_of(capsys, "alarm")
    assert (alarm["alarm"], alarm["step"]) == ("a step done again has another result", 0)


@pytest.mark.parametrize(
    "message",
    [
        AskBatch(step=1, lineage=0, wait_s=0.0),
        Trained(step=0, lineage=0, digest="late"),
        Published(step=1, lineage=0, consumed_step=0),
    ],
    ids=lambda m: type(m).__name__,
)
async def test_a_learner_whose_lineage_was_rolled_back_is_refused(tmp_path, stack, message):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        await train(actor, learner, 0)
        await learner.batch(0, lineage=1)
        with pytest.raises(RefusedError, match="lineage 0 was rolled back"):
            await learner.ask(message)


async def test_a_resumed_run_trains_on_the_trees_that_were_there(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        batches = [await train(actor, learner, step) for step in range(3)]
    later = await run.peer("learner-0", run_id="run-b")
    for step in (1, 2):
        # the first start goes on from the checkpoint, a restart from where the resumed run stands
        async with run.replay(resume_step=1, run_id="run-b"):
            batch, _ = await later.batch(step, lineage=1)
            assert batch.lease_ids == batches[step]
            await later.ask(Published(step=step + 1, lineage=1, consumed_step=step))


async def test_an_actor_of_an_earlier_driver_is_refused(tmp_path, stack):
    run = Run(tmp_path, stack)
    actor = await run.peer("actor-0")
    async with run.replay():
        lease = await actor.lease()
    async with run.replay(resume_step=None, run_id="run-b"):
        with pytest.raises(RefusedError, match="run-a"):
            await actor.put(lease, tree_for(lease))


async def test_accepted_trees_that_are_too_old_after_a_resume_are_grown_again(
    tmp_path, stack, capsys
):
    run = Run(tmp_path, stack, max_staleness=1)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay():
        for _ in range(4):
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
    async with run.replay(max_staleness=0) as (server, _):
        asked = asyncio.create_task(learner.batch(1))
        again = [await actor.lease() for _ in range(2)]
        assert [x.lease_id for x in again] == ["000000002", "000000003"]
        for lease in again:
            await actor.put(lease, tree_for(lease, step=1))
        assert (await asked)[0].step == 1
        assert server.queue.reasons == {"stale_accepted": 2}
    stale = [e for e in events_of(capsys, "tree") if e["outcome"] == "stale"]
    assert [e["decoded_tokens"] for e in stale] == [4, 4], "what they cost is told"


async def test_a_prompt_that_fails_with_two_actors_becomes_a_dead_letter(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0, prompts_per_batch=1, max_attempts=2)
    actors = [await run.peer(f"actor-{i}") for i in range(2)]
    async with run.replay() as (server, _):
        await actors[1].ask(Beat(leases=[]))
        for actor in actors:
            lease = await actor.lease()
            assert lease.lease_id == "000000000"
            await actor.ask(
                GiveUp(lease_id=lease.lease_id, attempt=lease.attempt, reason="EngineError")
            )
        assert (await actors[0].lease()).lease_id == "000000001", "the run goes on"
        assert server.queue.ledger()["quarantined"] == 1
    (line,) = (tmp_path / "dead_letters.jsonl").read_text().splitlines()
    letter = json.loads(line)
    assert (letter["prompt_id"], letter["attempts"]) == ("prompt-0", 2)
    assert (letter["actors"], letter["reason"]) == (["actor-0", "actor-1"], "EngineError")


async def test_a_stale_tree_of_the_last_attempt_makes_a_dead_letter(tmp_path, stack):
    run = Run(tmp_path, stack, max_staleness=0, prompts_per_batch=1, max_attempts=1)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay() as (server, _):
        lease = await actor.lease()
        await actor.put(lease, tree_for(lease))
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        lease = await actor.lease()
        with pytest.raises(RefusedError, match="stale"):
            await actor.put(lease, tree_for(lease, step=0))
        assert server.queue.ledger()["quarantined"] == 1
        again = await actor.lease()
        assert await actor.put(again, tree_for(again, step=1)) == "accepted"
    assert '"reason": "stale"' in (tmp_path / "dead_letters.jsonl").read_text()


async def test_a_publication_ahead_of_all_batches_is_refused():
    async with serving(ScriptedPrompts()) as served:
        learner = await served.peer("learner-0")
        for step in (1, 2**31 - 1):
            with pytest.raises(RefusedError, match="wrong_step"):
                await learner.ask(Published(step=step, lineage=0, consumed_step=0))
        assert served.server.queue.published == 0


async def test_no_lease_goes_out_beyond_the_disk_budget_until_a_checkpoint_makes_room(
    tmp_path, stack
):
    limits = replace(LIMITS, max_disk_bytes=1_500)
    run = Run(tmp_path, stack, max_staleness=3, limits=limits)
    actor, learner = await run.peer("actor-0"), await run.peer("learner-0")
    async with run.replay() as (server, _):
        for _ in range(2):
            lease = await actor.lease()
            await actor.put(lease, tree_for(lease))
        assert server.store.num_bytes > 600
        answer = await actor.lease(wait_s=0.0)
        assert answer.reason == "admission: the disk budget is used up"
        await learner.batch(0)
        await learner.ask(Published(step=1, lineage=0, consumed_step=0))
        await learner.ask(Retired(step=0))
        assert isinstance(await actor.lease(), Leased)
