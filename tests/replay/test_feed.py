"""Trees of a file through the real queue and its server: what the learner gets is what actors would have brought."""

import asyncio
import contextlib
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import LIMITS, VOCAB_SIZE, events_in, serve_replay, until
from tests.oracle import random_tree
from treepo_async.errors import DataError, TreepoError
from treepo_async.replay.feed import TreeFeed, adopted, check_length
from treepo_async.replay.server import ReplayServer
from treepo_async.types import NO_LINEAGE
from treepo_async.wire.codec import decode_tree, encode_tree
from treepo_async.wire.messages import (
    AskBatch,
    AskLease,
    Batch,
    Hello,
    NoBatch,
    NoLease,
    Published,
    Retired,
)
from treepo_async.wire.sockets import Requester


def spread_trees(number):
    """Trees whose leaves differ in accuracy."""
    rng, found = np.random.default_rng(6), []
    while len(found) < number:
        tree = random_tree(rng, num_segments=9, vocab_size=VOCAB_SIZE)
        if len(set(tree.accuracies_L.tolist())) > 1:
            found.append(tree)
    return found


def flat(tree):
    ones = np.ones_like(tree.rewards_L)
    return replace(tree, rewards_L=ones, accuracies_L=ones)


class Trees(list):
    """Trees by number; an exception in the place of one is raised."""

    def tree(self, index):
        if isinstance(self[index], Exception):
            raise self[index]
        return self[index]


class Learner:
    def __init__(self, replay):
        self.replay = replay

    async def ask(self, message):
        return await self.replay.ask(message, timeout_s=8, wait="an answer")

    async def batch(self, step):
        """The trees of a step; None when there are no more."""
        answer, frames = await self.ask(AskBatch(step=step, lineage=0, wait_s=0.5))
        if isinstance(answer, NoBatch):
            assert answer.final, answer.reason
            return None
        assert isinstance(answer, Batch)
        n = answer.frames_per_tree
        return [decode_tree(frames[i : i + n]) for i in range(0, len(frames), n)]

    async def train(self, step):
        trees = await self.batch(step)
        if trees is not None:
            await self.ask(Published(step=step + 1, lineage=0, consumed_step=step))
        return trees


@contextlib.asynccontextmanager
async def feeding(trees, *, epochs=1, max_tokens=1000, name="learner-0", **options):
    rules = {"num_batches": 100, "max_staleness": 0, "drop_degenerate": True, **options}

    def make(group):
        return TreeFeed(Trees(trees), epochs, max_tokens, group.queue, group.add)

    async with (
        serve_replay(make_feed=make, **rules) as (server, endpoint),
        asyncio.timeout(30),
    ):
        hello = Hello(name=name, run_id="run")
        async with Requester(endpoint, name=name, owner="replay", hello=hello) as replay:
            yield Learner(replay), server
        server.queue.check_integrity()


def same_but_adopted(found, tree):
    return all(
        a.token_ids.tolist() == b.token_ids.tolist()
        and a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes()
        for a, b in zip(found.segments, tree.segments, strict=True)
    ) and (found.rewards_L.tobytes() == tree.rewards_L.tobytes())


async def test_batches_are_the_trees_of_the_file_in_their_order_until_it_ends(capsys):
    trees = spread_trees(7)
    async with feeding(trees) as (learner, server):
        batches = [await learner.train(step) for step in range(4)]
        assert server.queue.ledger() == {"trained": 6, "accepted": 1}
    assert batches[3] is None, "one tree is left, and it makes no batch"
    found = [tree for batch in batches[:3] for tree in batch]
    assert all(same_but_adopted(a, b) for a, b in zip(found, trees, strict=False))
    assert [tree.provenance.lease_id for tree in found] == [f"{i:09d}" for i in range(6)]
    events = events_in(capsys.readouterr().out, "tree")
    assert len(events) == 7
    assert {(e["actor"], e["decoded_tokens"]) for e in events} == {("file", 0)}


async def test_no_tree_is_too_old_whatever_its_versions_were():
    async with feeding(spread_trees(12), max_staleness=0) as (learner, _):
        for step in range(6):
            trees = await learner.train(step)
            versions = {s.policy_version for tree in trees for s in tree.segments}
            assert {version.lineage for version in versions} == {NO_LINEAGE}


async def test_a_file_is_gone_through_as_often_as_told():
    trees = spread_trees(3)
    async with feeding(trees, epochs=2) as (learner, _):
        batches = [await learner.train(step) for step in range(4)]
    assert batches[3] is None
    found = [tree for batch in batches[:3] for tree in batch]
    assert all(same_but_adopted(a, b) for a, b in zip(found, trees * 2, strict=True))


async def test_trees_without_spread_are_dropped_as_those_of_actors_are():
    trees = spread_trees(4)
    trees[1] = flat(trees[1])
    async with feeding(trees) as (learner, server):
        found = await learner.train(0)
        assert server.queue.ledger()["reason/degenerate"] == 1
    assert [same_but_adopted(a, b) for a, b in zip(found, (trees[0], trees[2]), strict=True)] == [
        True,
        True,
    ]


async def test_what_cannot_be_used_is_told_and_passed_over(capsys):
    trees = spread_trees(4)
    nan = np.full_like(trees[2].rewards_L, np.nan)
    bad = DataError("t.jsonl entry 2: tree line: cut off")
    unscored = replace(trees[2], rewards_L=nan, accuracies_L=nan)
    async with feeding([trees[0], bad, unscored, trees[3]]) as (learner, server):
        found = await learner.train(0)
        assert server.queue.ledger()["reason/bad_tree"] == 1
    assert same_but_adopted(found[1], trees[3])
    lost = [e["reason"] for e in events_in(capsys.readouterr().out, "alarm")]
    assert lost == [str(bad), "reward_error"]


async def test_a_file_of_nothing_but_damage_ends_the_run():
    bad = [DataError(f"entry {i} is damaged") for i in range(30)]

    class Idle(ReplayServer):
        async def run(self):
            await asyncio.Event().wait()

    def make(group):
        return TreeFeed(Trees(bad), 1, 100, group.queue, group.add)

    async with serve_replay(num_batches=9, make_feed=make, server_type=Idle) as (server, _):
        with pytest.raises(TreepoError, match="8 prompts in a row were lost"):
            server._turn([], 0.0)


async def test_an_actor_gets_no_lease_and_is_told_so_for_good():
    async with feeding(spread_trees(4), name="actor-0") as (actor, server):
        answer, _ = await actor.ask(AskLease(wait_s=5))
        assert isinstance(answer, NoLease)
        assert answer.final
        assert server.queue.ledger() == {"accepted": 2}


async def test_a_batch_that_died_with_replay_is_read_again(tmp_path):
    trees = spread_trees(4)
    options = {"folder": tmp_path, "max_staleness": 1}
    async with feeding(trees, **options) as (learner, _):
        first = await learner.batch(0)
    async with feeding(trees, **options) as (learner, _):
        again = await learner.batch(0)
    assert all(same_but_adopted(a, b) for a, b in zip(again, first, strict=True))


def test_a_tree_of_a_file_belongs_to_its_lease_and_to_no_version_of_the_run():
    (tree,) = spread_trees(1)
    found = adopted(tree, "000000007")
    assert found.provenance == replace(tree.provenance, lease_id="000000007")
    assert {segment.policy_version for segment in found.segments} == {(NO_LINEAGE, 0)}
    assert same_but_adopted(found, tree)
    found.check()


def test_a_tree_longer_than_the_model_is_refused():
    (tree,) = spread_trees(1)
    longest = len(tree.prompt.token_ids) + int(tree.num_tokens_L.max())
    check_length(tree, longest)
    with pytest.raises(DataError, match=f"have {longest} tokens, the model has {longest - 1}"):
        check_length(tree, longest - 1)


async def test_no_tree_is_taken_from_the_file_beyond_the_disk_budget_until_a_checkpoint_makes_room():
    trees = spread_trees(12)
    limits = replace(LIMITS, max_disk_bytes=4 * max(map(size_of, trees)))
    async with feeding(trees, max_staleness=5, limits=limits) as (learner, server):
        await until(lambda: server.store.num_bytes > 0)
        assert len(server.queue.order.live) < 6
        for step in range(6):
            assert server.store.num_bytes <= limits.max_disk_bytes
            assert await learner.train(step) is not None
            await learner.ask(Retired(step=step))


def size_of(tree):
    return sum(map(len, encode_tree(tree))) + 200
