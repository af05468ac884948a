import pytest

from treepo_async.bench.queue_trees import VOCAB_SIZE, WIDTH, Deliveries, make_tree
from treepo_async.types import PolicyVersion
from treepo_async.wire.codec import decode_tree, digest_of
from treepo_async.wire.facts import facts_of
from treepo_async.wire.messages import decode


@pytest.mark.parametrize(("tokens", "segment"), [(64, 64), (512, 16), (4096, 256), (65_536, 256)])
def test_a_tree_has_just_so_many_tokens_and_at_most_the_width_of_paths(tokens, segment):
    tree = make_tree(tokens, segment)
    tree.check()
    assert tree.num_tokens == tokens
    assert {len(s) for s in tree.segments} == {segment}
    assert 1 <= len(tree.leaves) <= WIDTH


def test_paths_fork_into_two_until_there_are_enough():
    levels = [s.level for s in make_tree(65_536, 256).segments]
    assert [levels.count(level) for level in range(6)] == [2, 4, 8, 16, 32, 64]


def test_each_delivery_names_its_lease_and_has_its_digest():
    deliveries = Deliveries.of(make_tree(512, 64))
    for lease_id, attempt in (("000000007", 1), ("000000008", 3)):
        head, *tree = deliveries.frames_of(lease_id, attempt, request=5)
        message = decode(head)
        assert (message.lease_id, message.attempt, message.request) == (lease_id, attempt, 5)
        assert message.digest == digest_of(tree)
        facts = facts_of(tree, vocab_size=VOCAB_SIZE)
        assert (facts.lease_id, facts.has_spread, facts.num_tokens) == (lease_id, True, 512)
        assert decode_tree(tree, vocab_size=VOCAB_SIZE).num_tokens == 512


def test_a_delivery_is_of_the_policy_step_that_its_lease_needs():
    _, tree = Deliveries.of(make_tree(512, 64)).put("000000001", 1, step=3)
    assert facts_of(tree).versions == (PolicyVersion(0, 3),)


@pytest.mark.parametrize("tokens", [4096, 65_536])
def test_a_unique_token_costs_less_than_ten_bytes_on_the_wire(tokens):
    frames = Deliveries.of(make_tree(tokens, 256)).frames_of("000000001", 1, 1)
    framing = 9 * len(frames)
    assert sum(map(len, frames)) + framing < 10 * tokens
