"""The backends against the textbook, and the plans that layers share."""

import copy
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from tests.learner.forests import HEADS, gradients, tensors, textbook, visible
from tests.oracle import random_tree, visible_by_ancestors
from treepo_async.bench.forests import random_end
from treepo_async.errors import ConfigError
from treepo_async.learner.attention.cascade import CascadePlan
from treepo_async.learner.attention.dense import DensePlan, visibility
from treepo_async.learner.attention.flex import FlexPlan
from treepo_async.learner.attention.plan import (
    KEPT_PLANS,
    PlanCache,
    alignment,
    kept_plans,
    planner,
    resolve,
)
from treepo_async.learner.packing.pack import pack
from treepo_async.learner.packing.piece import Piece

SEEDS = st.integers(0, 2**32 - 1)
SCALE = 0.3


def forest(seed, most=150):
    rng = np.random.default_rng(seed)
    end = random_end(rng, int(rng.integers(1, most)), longest=int(rng.integers(1, 30)))
    return rng, torch.from_numpy(end)


def compare(plan, end, inputs, tolerance):
    """Output and gradients of a plan against the textbook in float64."""
    out = plan(*inputs, SCALE)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = textbook(*exact, torch.from_numpy(visible(end)), SCALE)
    pairs = zip(
        [out, *gradients(out, inputs)], [expected, *gradients(expected, exact)], strict=True
    )
    for found, wanted in pairs:
        assert found.shape == wanted.shape
        assert (found.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_mask_of_packed_trees_is_the_definition_of_a_path(seed):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, num_segments=int(rng.integers(1, 12))) for _ in range(2)]
    ones = [np.ones(len(tree.leaves)) for tree in trees]
    pieces = [Piece(i, tuple(range(len(tree.leaves)))) for i, tree in enumerate(trees)]
    (batch,) = pack(trees, ones, ones, [pieces], align=16)
    expected = np.eye(batch.num_tokens, dtype=bool)
    at = 0
    for tree in trees:
        alone = visible_by_ancestors(tree)
        expected[at : at + len(alone), at : at + len(alone)] = alone
        at += len(alone)
    assert np.array_equal(visibility(torch.from_numpy(batch.end)).numpy(), expected)


@given(SEEDS, st.sampled_from(HEADS), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_cascade_gives_the_textbook_output_and_gradients_in_float64(seed, heads, block):
    rng, end = forest(seed)
    compare(CascadePlan(end, block), end, tensors(rng, len(end), heads), 1e-12)


@given(SEEDS, st.sampled_from(HEADS))
@settings(max_examples=20, deadline=None)
def test_dense_gives_the_textbook_output_and_gradients_in_float64(seed, heads):
    rng, end = forest(seed)
    compare(DensePlan(end), end, tensors(rng, len(end), heads), 1e-12)


@pytest.mark.parametrize("backend", [CascadePlan, DensePlan])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precisions_are_near_float64(backend, dtype, tolerance):
    rng, end = forest(7, most=250)
    compare(backend(end), end, tensors(rng, len(end), dtype=dtype, dim=32), tolerance)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param([], id="nothing"),
        pytest.param([1], id="one token"),
        pytest.param(list(range(1, 200)), id="all padding"),
        pytest.param([300] * 300, id="a single chain"),
        pytest.param([150, *range(2, 151)], id="a root and as many leaves of one token"),
        pytest.param([*range(160, 80, -1), *range(81, 161)], id="a fork at every token"),
    ],
)
def test_cascade_of_the_edge_cases_is_the_textbook(end):
    rng = np.random.default_rng(0)
    end = torch.tensor(end, dtype=torch.int32)
    if len(end) == 0:
        assert CascadePlan(end)(*tensors(rng, 0), SCALE).shape == (1, 4, 0, 8)
        return
    compare(CascadePlan(end), end, tensors(rng, len(end)), 1e-12)


def test_cascade_takes_views_of_one_projection():
    _, end = forest(3)
    mixed = torch.randn(len(end), 1, 2, 4 * 8, dtype=torch.float64, requires_grad=True)
    query, key, value = mixed.split([16, 8, 8], dim=-1)
    inputs = [
        query.reshape(len(end), 1, 4, 8).permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
    ]
    assert not inputs[1].is_contiguous()
    compare(CascadePlan(end), end, inputs, 1e-12)


@pytest.mark.parametrize("backend", ["dense", "cascade"])
def test_a_token_changes_its_descendants_and_nothing_else(backend):
    rng, end = forest(11)
    inputs = [t.detach() for t in tensors(rng, len(end))]
    plan = planner(backend)(end)
    before = plan(*inputs, SCALE)
    sees = torch.from_numpy(visible(end))
    for token in range(0, len(end), 7):
        changed = [t.clone() for t in inputs]
        changed[1][:, :, token] += 1.0
        changed[2][:, :, token] += 1.0
        differs = (plan(*changed, SCALE) != before).any(dim=-1)[0]
        assert torch.equal(differs.any(dim=0), sees[:, token])


@pytest.mark.parametrize("backend", ["dense", "cascade"])
def test_no_gradient_of_a_leaf_reaches_another_branch(backend):
    # tokens 0-3 are the prompt, 4-9 one leaf, 10-15 its sibling
    end = torch.tensor([16] * 4 + [10] * 6 + [16] * 6, dtype=torch.int32)
    inputs = tensors(np.random.default_rng(0), len(end))
    out = planner(backend)(end)(*inputs, SCALE)
    for grad in torch.autograd.grad(out[:, :, 10:].sum(), inputs):
        assert (grad[:, :, 4:10] == 0).all()
    of_key = torch.autograd.grad(
        planner(backend)(end)(*inputs, SCALE)[:, :, 10:].square().sum(), inputs
    )[1]
    assert (of_key[:, :, :4] != 0).any()


@given(SEEDS)
@settings(max_examples=5, deadline=None)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_without_compilation_is_the_textbook_going_forward(seed):
    rng, end = forest(seed, most=300)
    inputs = [t.detach() for t in tensors(rng, len(end), dim=16, dtype=torch.float32)]
    out = FlexPlan(end, kernel=flex_attention)(*inputs, SCALE)
    expected = DensePlan(end)(*inputs, SCALE)
    assert out.shape == expected.shape
    assert torch.allclose(out, expected, atol=1e-5)


def test_auto_is_by_device():
    on_cuda = torch.cuda.is_available()
    assert resolve("auto") == ("flex" if on_cuda else "cascade")
    assert alignment("auto") == (128 if on_cuda else 1)
    assert alignment("dense") == 1


def test_an_unknown_backend_is_named():
    with pytest.raises(ConfigError, match=r"learner\.attention='flax' is unknown; it is one of"):
        planner("flax")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex works here")
@pytest.mark.parametrize("ask", [resolve, planner, alignment])
def test_flex_without_cuda_is_refused_with_the_way_out(ask):
    with pytest.raises(ConfigError, match=r"flex needs CUDA.*take auto, cascade or dense"):
        ask("flex")


class Counted:
    """Makes dense plans and counts them."""

    def __init__(self):
        self.number = 0

    def __call__(self, end):
        self.number += 1
        return DensePlan(end)


def chain(num_tokens):
    return torch.full((num_tokens,), num_tokens, dtype=torch.int32)


def test_layers_share_the_plan_of_a_microbatch():
    build = Counted()
    plans = PlanCache(build)
    mask = chain(8).view(1, 1, 1, 8)
    found = {id(plans.of(other.flatten())) for other in (mask, mask.detach(), mask.view(8))}
    assert (len(found), build.number) == (1, 1)


def test_another_microbatch_has_another_plan_though_equal():
    build = Counted()
    plans = PlanCache(build)
    first, second = chain(8), chain(8)
    assert plans.of(first) is not plans.of(second)
    assert plans.of(first[:4]) is not plans.of(first)
    assert build.number == 3


def test_a_change_in_place_is_noticed():
    plans, end = PlanCache(DensePlan), chain(4)
    plans.of(end)
    end[:2] = 2
    assert torch.equal(plans.of(end).mask, visibility(end))
    assert not torch.equal(visibility(end), visibility(chain(4)))


class ByPointer:
    """What the cache would be without holding on to tensors."""

    def __init__(self):
        self.plans = {}

    def of(self, end):
        return self.plans.setdefault((end.data_ptr(), len(end), end._version), DensePlan(end))


class Memory:
    """An allocator that hands out the first place nobody holds, as allocators like to do."""

    def __init__(self, num_places, num_tokens):
        self.places = np.zeros((num_places, num_tokens), np.int32)
        self.holders = [lambda: None] * num_places

    def take(self, end):
        place = next(i for i, holder in enumerate(self.holders) if holder() is None)
        self.places[place] = end
        view = self.places[place].view()  # lives as long as a tensor of it does
        self.holders[place] = weakref.ref(view)
        return torch.from_numpy(view)


def num_stale(plans):
    """Plans that were of another mask, in microbatches that come and go."""
    memory, stale = Memory(8, 16), 0
    for i in range(1, 12):
        end = memory.take([i] * i + [16] * (16 - i))
        stale += not torch.equal(plans.of(end).mask, visibility(end))
        del end
    return stale


def test_memory_that_is_used_again_gives_no_stale_plan():
    assert num_stale(PlanCache(DensePlan, capacity=3)) == 0
    assert num_stale(ByPointer()) == 10


def test_a_copy_of_a_cache_believes_no_pointer_of_the_original():
    plans, end = PlanCache(DensePlan), chain(8)
    original = plans.of(end)
    twin = copy.deepcopy(plans)
    assert twin.of(end) is not original
    assert plans.of(end) is original


def test_an_evicted_plan_is_built_again():
    build = Counted()
    plans = PlanCache(build, capacity=2)
    ends = [chain(4), chain(5), chain(6)]
    for end in [*ends, ends[0]]:
        assert torch.equal(plans.of(end).mask, visibility(end))
    assert build.number == 4


@pytest.mark.parametrize("num_stages", [1, 4, 7])
def test_a_stage_finds_the_plan_again_behind_the_forward_passes_of_all_stages(num_stages):
    build = Counted()
    plans = PlanCache(build, capacity=kept_plans(num_stages))
    ends = [chain(4 + i) for i in range(num_stages + 1)]
    for end in [*ends, *ends]:
        plans.of(end)
    assert build.number == num_stages + 1
    assert kept_plans(num_stages) >= KEPT_PLANS


@pytest.mark.parametrize("backend", ["dense", "cascade"])
def test_recomputation_finds_the_plan_and_gives_the_same_gradients(backend):
    rng, end = forest(5)
    inputs = tensors(rng, len(end))
    made = []

    def build(end):
        made.append(planner(backend)(end))
        return made[-1]

    plans = PlanCache(build)

    def layer(query, key, value, end):
        return plans.of(end.flatten())(query, key, value, SCALE)

    expected = gradients(layer(*inputs, end), inputs)
    again = checkpoint(layer, *inputs, end[None], use_reentrant=False)
    for found, wanted in zip(gradients(again, inputs), expected, strict=True):
        assert torch.equal(found, wanted)
    assert len(made) == 1
