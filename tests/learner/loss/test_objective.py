"""The objective over packed pieces against the textbook, trajectory by trajectory, in float64."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from tests.textbook import Textbook, effective_sample_size, textbook_loss, trajectories_of
from treepo_async.config.schema import CORRECTIONS, LOSSES, MASKS, NORMALIZERS
from treepo_async.errors import ConfigError
from treepo_async.learner.loss.mask import MaskRules
from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.loss.objective import SUMS, LossSettings, Objective
from treepo_async.learner.packing.bounds import Bounds, bounds_of
from treepo_async.learner.packing.edges import Edges
from treepo_async.learner.packing.pack import empty_batch, pack
from treepo_async.learner.packing.piece import Piece, counted_leaves
from treepo_async.tree.levels import num_levels
from treepo_async.types import NO_LINEAGE, PolicyVersion

SEEDS = st.integers(0, 2**32 - 1)
VERSION = PolicyVersion(1, 5)
VERSIONS = (
    PolicyVersion(1, 5),
    PolicyVersion(1, 4),
    PolicyVersion(0, 5),
    PolicyVersion(0, 2),
    PolicyVersion(NO_LINEAGE, 0),
)
FRESH = {"versions": (VERSION,), "mixed_share": 0.0}
MASKING = Textbook(
    mask_sigmas=0.5, mask_low=0.7, mask_high=1.4, mask_k3=0.05, mask_veto=0.6, mask_m2po=0.05
)
"""Numbers with which every mask leaves out some tokens of the trees here."""


class Case:
    """A random batch: trees, advantages by level, log-probs of every kind, and its pieces."""

    def __init__(self, seed, *, num_trees=3, version=VERSION, trees=None, **kind):
        rng = np.random.default_rng(seed)
        kind = {"versions": VERSIONS, "nan_share": 0.25, **kind}
        self.version = version
        self.trees = trees or [
            random_tree(rng, **{"num_segments": int(rng.integers(1, 14)), **kind})
            for _ in range(num_trees)
        ]
        num_trees = len(self.trees)
        shapes = [(len(tree.leaves), num_levels(tree)) for tree in self.trees]
        self.advantages = [
            np.where(np.isnan(tree.rewards_L)[:, None], np.nan, rng.normal(size=shape))
            for tree, shape in zip(self.trees, shapes, strict=True)
        ]
        self.scales = [rng.random(shape) for shape in shapes]
        self.proximal = self.near(rng, [self.behavior(t) for t in range(num_trees)], 0.4)
        self.reference = self.near(rng, self.proximal, 0.5)
        now = self.near(rng, self.proximal, 0.3)
        self.theta = [[torch.tensor(v).double().requires_grad_() for v in of] for of in now]
        self.entropy = [
            [torch.tensor(rng.random(len(v))).requires_grad_() for v in of] for of in now
        ]
        self.rng = rng

    def behavior(self, t):
        return [segment.behavior_logprobs for segment in self.trees[t].segments]

    @staticmethod
    def near(rng, values, spread):
        """Log-probs not far from others, float32 as they come from a pass."""
        return [
            [(v + spread * rng.normal(size=len(v))).astype(np.float32) for v in of] for of in values
        ]

    def pieces(self, *, split):
        """Microbatches of pieces: one of whole trees, or any division of the trajectories."""
        counted = [list(counted_leaves(values)) for values in self.advantages]
        whole = [Piece(t, tuple(leaves)) for t, leaves in enumerate(counted) if leaves]
        if not split:
            return [whole]
        found = [[] for _ in range(int(self.rng.integers(1, 4)))]
        for piece in whole:
            leaves = self.rng.permutation(piece.leaves)
            cuts = np.sort(self.rng.integers(0, len(leaves) + 1, 2))
            for part in np.split(leaves, cuts):
                if len(part):
                    into = found[int(self.rng.integers(len(found)))]
                    into.append(Piece(piece.tree, tuple(part.tolist())))
        return found

    def trajectories(self, book):
        def along(values):
            def of_leaf(t, leaf):
                path = self.trees[t].path(self.trees[t].leaves[leaf])
                return torch.cat([values[t][i] for i in path])

            return of_leaf

        return trajectories_of(
            self.trees,
            self.advantages,
            along(self.theta),
            version=self.version,
            proximal=self.proximal if book.proximal in ("auto", "recomputed") else None,
            reference=self.reference,
            entropy=along(self.entropy),
            scales=self.scales,
        )

    def weights(self, book):
        weights = [np.ones(len(tree.leaves)) for tree in self.trees]
        if book.normalizer is not None:
            weights = loss_weights(self.trees, self.advantages, book.normalizer)
        return [
            (w if w.ndim == 2 else w[:, None]) * scale
            for w, scale in zip(weights, self.scales, strict=True)
        ]

    def packed(self, book, *, split=False):
        """Loss, and the sums over all microbatches."""
        objective = Objective(settings_of(book))
        known = book.proximal in ("auto", "recomputed")
        bounds = Bounds()
        if known:
            bounds = bounds_of(
                self.trees,
                self.advantages,
                self.proximal,
                self.version,
                mean_square=book.mask_m2po,
                correct_fresh=book.correct_fresh,
            )
        total, sums = torch.zeros(()).double(), torch.zeros(len(SUMS)).double()
        microbatches = self.pieces(split=split)
        for batch in pack(self.trees, self.advantages, self.weights(book), microbatches):
            edges = Edges.of(
                batch,
                torch.device("cpu"),
                version=self.version,
                proximal=self.proximal if known else None,
                reference=self.reference,
                dtype=torch.float64,
            )

            def gathered(values, batch=batch):
                rows = [values[t][s] for t, s, _ in batch.segments()]
                return torch.cat([torch.zeros(0).double(), *rows])

            loss, found, _ = objective(edges, gathered(self.theta), gathered(self.entropy), bounds)
            total, sums = total + loss, sums + found
        return total, dict(zip(SUMS, sums.tolist(), strict=True))

    def gradients(self, loss):
        leaves = [v for values in (self.theta, self.entropy) for of in values for v in of]
        if not loss.requires_grad:
            return [torch.zeros_like(v) for v in leaves]
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def check(self, book, *, split=False):
        expected = textbook_loss(self.trajectories(book), book)
        found, sums = self.packed(book, split=split)
        expected = torch.as_tensor(expected)
        torch.testing.assert_close(found, expected.double(), rtol=1e-10, atol=1e-10)
        for one, other in zip(self.gradients(found), self.gradients(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        return sums


def chain(versions):
    """A tree of one path, a level of one token for each version."""
    tree = random_tree(np.random.default_rng(0), num_segments=1, segment_tokens=1)
    (only,) = tree.segments
    segments = [
        replace(only, parent=i - 1, level=i, policy_version=v, stop=None, mixed_context=False)
        for i, v in enumerate(versions)
    ]
    segments[-1] = replace(segments[-1], stop=only.stop)
    sampling = replace(tree.sampling, max_depth=len(segments))
    return replace(tree, segments=tuple(segments), sampling=sampling)


def settings_of(book):
    """What the objective is told for what the textbook is asked."""
    own = {f.name for f in fields(LossSettings)} - {"mask"}
    masks = MaskRules(
        book.masks,
        book.mask_sigmas,
        book.mask_lag,
        book.mask_low,
        book.mask_high,
        book.mask_k3,
        book.mask_veto,
    )
    return LossSettings(**{name: getattr(book, name) for name in own}, mask=masks)


# ------------------------------------------------------------------ equality


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@given(seed=SEEDS, split=st.booleans())
@settings(max_examples=12, deadline=None)
def test_every_loss_with_every_normalizer_is_that_of_the_textbook(loss, normalizer, seed, split):
    case = Case(seed, forks_on_grid=normalizer == "unique_token")
    case.check(Textbook(loss=loss, normalizer=normalizer), split=split)


@pytest.mark.parametrize("proximal", ["current", "recomputed", "interpolated"])
@pytest.mark.parametrize("anchor", ["proximal", "behavior"])
@pytest.mark.parametrize("loss", LOSSES)
@given(seed=SEEDS, split=st.booleans(), correct_fresh=st.booleans())
@settings(max_examples=6, deadline=None)
def test_every_loss_around_every_policy_is_that_of_the_textbook(
    loss, anchor, proximal, seed, split, correct_fresh
):
    book = Textbook(loss=loss, anchor=anchor, proximal=proximal, correct_fresh=correct_fresh)
    Case(seed).check(book, split=split)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("mask", MASKS)
@given(seed=SEEDS, split=st.booleans(), loss=st.sampled_from(LOSSES), fresh=st.booleans())
@settings(max_examples=10, deadline=None)
def test_every_correction_and_mask_is_that_of_the_textbook(
    mask, correction, seed, split, loss, fresh
):
    book = replace(
        MASKING,
        loss=loss,
        correction=correction,
        masks=(mask,),
        correction_cap=1.3,
        correction_floor=0.8,
        correct_fresh=fresh,
    )
    Case(seed).check(book, split=split)


@given(
    seed=SEEDS,
    split=st.booleans(),
    loss=st.sampled_from(LOSSES),
    masks=st.lists(st.sampled_from(MASKS), unique=True).map(tuple),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    dual=st.sampled_from([None, 1.5, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_masks_divergence_entropy_and_dual_clip_together_are_those_of_the_textbook(
    seed, split, loss, masks, estimator, dual
):
    book = replace(
        MASKING,
        loss=loss,
        masks=masks,
        dual_clip=dual,
        clip_low=0.1,
        clip_high=0.1,
        tv_clip=0.02,
        kl_coef=0.3,
        kl_estimator=estimator,
        entropy_coef=0.2,
        normalizer=None,
    )
    Case(seed).check(book, split=split)


@pytest.mark.parametrize("mask", MASKS)
def test_the_masks_of_these_tests_leave_out_some_tokens_and_keep_some(mask):
    sums = Case(5, num_trees=6).check(replace(MASKING, masks=(mask,)))
    masked, tokens = column(sums, "masked"), sums["trajectory_tokens"]
    assert 0.02 < masked / tokens < 0.98


# ------------------------------------------------------------------ controls


def test_control_advantages_that_are_summed_before_the_clip_are_another_loss():
    case, book = Case(3, num_trees=6), Textbook(normalizer=None)
    right = textbook_loss(case.trajectories(book), book)
    batch = pack(case.trees, case.advantages, case.weights(book), case.pieces(split=False))[0]
    net = batch.positive - batch.negative
    summed = replace(batch, positive=np.maximum(net, 0), negative=np.maximum(-net, 0))
    found = []
    for one in (batch, summed):
        edges = Edges.of(
            one,
            torch.device("cpu"),
            version=VERSION,
            proximal=case.proximal,
            dtype=torch.float64,
        )
        rows = [case.theta[t][s] for t, s, _ in one.segments()]
        theta = torch.cat(rows)
        found.append(Objective(LossSettings())(edges, theta, theta, Bounds())[0].item())
    assert found[0] == pytest.approx(right.item(), rel=1e-10)
    assert abs(found[1] - right.item()) > 1e-3 * abs(right.item())


def test_control_a_normalizer_for_each_microbatch_is_another_loss():
    case, book = Case(4), Textbook()
    right = case.packed(book)[0].item()
    parts = 0.0
    for piece in case.pieces(split=False)[0]:
        alone = Case(4)
        alone.advantages = [
            values if t == piece.tree else np.full_like(values, np.nan)
            for t, values in enumerate(alone.advantages)
        ]
        parts += alone.packed(book)[0].item() / len(case.trees)
    assert abs(parts - right) > 1e-3 * abs(right)


# ------------------------------------------------------------------ fresh tokens, statistics


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("anchor", ["proximal", "behavior"])
def test_with_every_token_fresh_nothing_is_weighed_or_masked(loss, correction, anchor):
    case = Case(7, **FRESH)
    plain = Textbook(loss=loss, correction="none")
    expected, _ = case.packed(plain)
    book = replace(MASKING, loss=loss, correction=correction, anchor=anchor, masks=MASKS)
    found, sums = case.packed(book)
    assert found.item() == expected.item()
    assert column(sums, "masked") == 0
    assert column(sums, "weight") == sums["trajectory_tokens"]
    for one, other in zip(case.gradients(found), case.gradients(expected), strict=True):
        assert torch.equal(one, other)
    others = replace(book, correct_fresh=True)
    assert column(case.packed(others)[1], "masked") > 0, "control"


def column(sums, name):
    return sum(v for key, v in sums.items() if key.startswith("lag/") and key.endswith(f"/{name}"))


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_rows_by_lag_and_by_level_add_up_to_the_same_totals(seed):
    _, sums = Case(seed).packed(replace(MASKING, masks=("window",)), split=True)
    for name in ("tokens", "weight", "weight_square", "kl_behavior", "clipped", "masked"):
        by_level = [v for k, v in sums.items() if k.startswith("level/") and k.endswith(f"/{name}")]
        assert sum(by_level) == pytest.approx(column(sums, name), rel=1e-9)
    assert column(sums, "tokens") == sums["trajectory_tokens"]


def test_tokens_stand_in_the_row_of_their_lag_and_of_their_level():
    case = Case(11, nan_share=0.0)
    _, sums = case.packed(Textbook(correction="importance"))
    expected = {}
    for one in case.trajectories(Textbook()):
        for level, lag in zip(one.level, one.lag, strict=True):
            for row in (f"level/{level}", f"lag/{'unknown' if lag is None else lag}"):
                expected[row] = expected.get(row, 0) + 1
    found = {k.removesuffix("/tokens"): v for k, v in sums.items() if k.endswith("/tokens") and v}
    assert found == expected
    assert {"lag/0", "lag/1", "lag/3", "lag/unknown"} <= expected.keys()


def test_old_tokens_and_deep_levels_share_the_last_row():
    lags = [1, 7, 8, 20, 300, *[0] * 15]
    tree = chain([PolicyVersion(1, 300 - lag) for lag in lags])
    case = Case(12, version=PolicyVersion(1, 300), trees=[tree])
    _, sums = case.packed(Textbook())
    rows = {k.removesuffix("/tokens"): v for k, v in sums.items() if k.endswith("/tokens") and v}
    assert rows == {
        "lag/0": 15,
        "lag/1": 1,
        "lag/7": 1,
        "lag/8+": 3,
        **{f"level/{level}": 1 for level in range(16)},
        "level/16+": 4,
    }


def test_the_sums_of_weights_give_the_effective_sample_size_of_all_trajectories():
    case, book = Case(13), Textbook(correction="importance")
    _, sums = case.packed(book, split=True)
    found = column(sums, "weight") ** 2 / (column(sums, "tokens") * column(sums, "weight_square"))
    assert found == pytest.approx(effective_sample_size(case.trajectories(book), book), rel=1e-9)
    assert found < 0.95


def test_divergence_and_entropy_are_no_part_of_the_policy_loss():
    case = Case(14)
    book = Textbook(kl_coef=0.5, entropy_coef=0.25)
    loss, sums = case.packed(book)
    plain, _ = case.packed(Textbook())
    assert sums["policy_loss"] == pytest.approx(plain.item(), rel=1e-12)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert sums["loss"] != pytest.approx(sums["policy_loss"])
    assert sums["kl_reference"] > 0
    assert sums["referenced"] == sums["trajectory_tokens"]


def test_a_microbatch_without_tokens_has_a_loss_and_sums_of_zero():
    edges = Edges.of(empty_batch(4), torch.device("cpu"), version=VERSION)
    theta = torch.zeros(0, requires_grad=True)
    for loss in LOSSES:
        objective = Objective(LossSettings(loss=loss, mask=MaskRules(MASKS)))
        found, sums, gap = objective(edges, theta, theta, Bounds())
        assert (found.item(), gap.item()) == (0.0, 0.0)
        assert sums.shape == (len(SUMS),)
        assert not sums.any()
        found.backward()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ({"loss": "gpso"}, "loss 'gpso' is unknown, did you mean 'gspo'"),
        ({"correction": "truncate"}, "did you mean 'truncated'"),
        ({"correction": "xyz"}, "there are: none, truncated, icepop, importance"),
        ({"mask": MaskRules(("k3", "windo"))}, "mask 'windo' is unknown, did you mean 'window'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(key, named):
    with pytest.raises(ConfigError, match=named):
        Objective(LossSettings(**key))


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        (LossSettings(proximal="recomputed"), "start of the batch"),
        (LossSettings(kl_coef=0.1), "reference"),
    ],
)
def test_log_probs_that_are_missing_are_refused(settings_, named):
    tree = random_tree(np.random.default_rng(0))
    ones = [np.ones(len(tree.leaves))]
    (batch,) = pack([tree], ones, ones, [[Piece(0, (0,))]])
    edges = Edges.of(batch, torch.device("cpu"), version=VERSION)
    theta = torch.zeros(batch.num_trained_tokens)
    with pytest.raises(ValueError, match=named):
        Objective(settings_)(edges, theta, theta, Bounds())
