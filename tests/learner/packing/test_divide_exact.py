"""The update does not depend on how a batch is divided: splitting, packing, order, microbatches and replicas leave it as it is."""

from dataclasses import replace

import numpy as np
import pytest

from tests.learner.shares import batch_of
from tests.oracle import random_tree
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.geometry import depth_first
from treepo_async.learner.packing.share import Share

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

EXACT = 1e-5


@pytest.fixture(scope="module", params=["ppo", "gspo", "gspo_segment"])
def learner(request, groups, tmp_path_factory):
    """One that never changes its weights, for a loss of tokens, of trajectories and of segments."""
    from tests.oracle import tiny_qwen2
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    path = tmp_path_factory.mktemp("model")
    tiny_qwen2(tied=False).save_pretrained(path)
    return build_learner(
        path,
        optimizer=OptimizerSettings(learning_rate=0.0, max_grad_norm=0.0),
        loss=LossSettings(loss=request.param),
        microbatch_tokens=64,
        seed=1,
    )


@pytest.fixture(scope="module")
def batch(learner) -> Share:
    """Large trees, some leaves that do not count, and a proximal policy so far away that much is clipped."""
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, num_segments=25, prompt_tokens=9) for _ in range(4)]
    advantages = [rng.normal(size=len(tree.leaves)) for tree in trees]
    advantages[1][::3] = np.nan
    everything = batch_of(trees, [np.zeros(len(tree.leaves)) for tree in trees])
    (share,) = divide(everything, num_replicas=1, budget_tokens=64)
    proximal = [
        [values + 0.4 * rng.normal(size=values.shape).astype(np.float32) for values in tree]
        for tree in learner.logprobs(share)
    ]
    return batch_of(trees, advantages, proximal=proximal)


def update(learner, *shares):
    """Loss and gradient of an update, those of several shares added up."""
    losses, gradients = [], []
    for share in shares:
        result = learner.train(share)
        losses.append(0.0 if np.isnan(result.loss) else result.loss)
        gradients.append([weight.main_grad.clone() for weight in learner.model.parameters()])
    return sum(losses), [sum(parts) for parts in zip(*gradients, strict=True)]


def difference(found, expected):
    """The largest of the relative differences of loss and gradients."""
    loss_error = abs(found[0] / expected[0] - 1)
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(found[1], expected[1], strict=True)
    ]
    return max(loss_error, *errors)


def whole(batch):
    """Every tree in one piece, all in one microbatch."""
    (share,) = divide(batch, num_replicas=1, budget_tokens=10**6)
    assert [len(pieces) for pieces in share.microbatches] == [len(batch.trees)]
    return share


def num_pieces(share):
    return sum(map(len, share.microbatches))


@pytest.mark.parametrize("budget_tokens", [1, 25, 40, 70])
def test_splitting_trees_leaves_loss_and_gradients_as_they_are(learner, batch, budget_tokens):
    expected = update(learner, whole(batch))
    (share,) = divide(batch, num_replicas=1, budget_tokens=budget_tokens)
    assert num_pieces(share) > len(batch.trees)
    assert difference(update(learner, share), expected) < EXACT


def test_flat_packing_is_the_same_update(learner, batch):
    expected = update(learner, whole(batch))
    (share,) = divide(batch, num_replicas=1, budget_tokens=200, packing="flat")
    assert num_pieces(share) == sum(np.count_nonzero(~np.isnan(a)) for a in batch.advantages)
    assert difference(update(learner, share), expected) < EXACT


def test_the_order_of_pieces_and_microbatches_does_not_matter(learner, batch):
    (share,) = divide(batch, num_replicas=1, budget_tokens=90)
    turned = replace(share, microbatches=tuple(pieces[::-1] for pieces in share.microbatches[::-1]))
    assert turned.microbatches != share.microbatches
    assert difference(update(learner, turned), update(learner, share)) < EXACT


def test_neither_does_what_is_in_one_microbatch(learner, batch):
    (share,) = divide(batch, num_replicas=1, budget_tokens=60)
    pieces = [piece for chosen in share.microbatches for piece in chosen]
    alone = replace(share, microbatches=tuple((piece,) for piece in pieces))
    together = replace(share, microbatches=(tuple(pieces), ()))
    assert difference(update(learner, alone), update(learner, together)) < EXACT


def test_neither_does_the_order_of_children(learner, batch):
    mirrored = mirror(batch)
    for tree, other in zip(batch.trees, mirrored.trees, strict=True):
        assert first_leaf(tree) is not first_leaf(other)
    (share,) = divide(mirrored, num_replicas=1, budget_tokens=60)
    assert difference(update(learner, share), update(learner, whole(batch))) < EXACT


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_the_updates_of_the_replicas_add_up(learner, batch, num_replicas):
    shares = divide(batch, num_replicas=num_replicas, budget_tokens=90, num_stages=2)
    assert all(num_pieces(share) for share in shares)
    assert difference(update(learner, *shares), update(learner, whole(batch))) < EXACT


def test_control_without_one_of_its_pieces_it_is_another_update(learner, batch):
    (share,) = divide(batch, num_replicas=1, budget_tokens=60)
    dropped = replace(share, microbatches=(share.microbatches[0][1:], *share.microbatches[1:]))
    assert difference(update(learner, dropped), update(learner, share)) > 1e-2


def test_control_with_the_advantages_of_the_mirrored_trees_it_is_another_update(learner, batch):
    swapped = replace(batch, advantages=mirror(batch).advantages)
    assert difference(update(learner, whole(swapped)), update(learner, whole(batch))) > 1e-2


def mirror(batch):
    """The same trajectories in trees whose children stand in the opposite order."""
    parts = [
        mirrored(tree, advantages, proximal)
        for tree, advantages, proximal in zip(
            batch.trees, batch.advantages, batch.proximal, strict=True
        )
    ]
    trees, advantages, proximal = zip(*parts, strict=True)
    return batch_of(trees, advantages, proximal=proximal)


def first_leaf(tree):
    """Tokens of the leaf that stands first in depth-first order."""
    order = depth_first([segment.parent for segment in tree.segments])
    return tree.segments[next(i for i in order if i in tree.leaves)].token_ids


def mirrored(tree, advantages, proximal):
    """Depth first from the last child to the first is a creation order too."""
    count = len(tree.segments)
    turned = [count - 1 - i for i in range(count)]
    parents = [tree.segments[i].parent for i in turned]
    order = [turned[i] for i in depth_first([p if p < 0 else turned[p] for p in parents])]
    place = {old: new for new, old in enumerate(order)} | {-1: -1}
    segments = tuple(
        replace(tree.segments[old], parent=place[tree.segments[old].parent]) for old in order
    )
    other = replace(tree, segments=segments)
    leaf_of = {segment: leaf for leaf, segment in enumerate(tree.leaves)}
    leaves = [leaf_of[order[segment]] for segment in other.leaves]
    other = replace(other, rewards_L=tree.rewards_L[leaves], accuracies_L=tree.accuracies_L[leaves])
    other.check()
    return other, advantages[leaves], [proximal[old] for old in order]
