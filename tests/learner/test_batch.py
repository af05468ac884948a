"""What rank 0 makes of a batch before and between its updates."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from tests.learner.loss.test_result import FIRST, UPDATE
from tests.oracle import random_tree
from treepo_async.config.command_line import parse
from treepo_async.learner.batch import BatchRules, BatchTrainer
from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.loss.result import result_of
from treepo_async.learner.loss.values import corrected_groups
from treepo_async.learner.packing.bounds import Bounds, bounds_of
from treepo_async.learner.rank import batch_rules
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion

VERSION = PolicyVersion(0, 4)


@dataclass
class RecordingTeam:
    """Gives made-up log-probs and a gap that grows with every update, and keeps what it is asked."""

    calls: list = field(default_factory=list)
    shares: list = field(default_factory=list)

    def train(self, batch, *, version):
        self.calls.append("train")
        self.shares.append(batch)
        return result_of(FIRST, 0.25 * len(self.shares), **UPDATE)

    def logprobs(self, batch, *, of_reference=False):
        self.calls.append("reference" if of_reference else "proximal")
        return [self.logprobs_of(tree, of_reference) for tree in batch.trees]

    def keep_waiting(self, work):
        return work()

    @staticmethod
    def logprobs_of(tree, of_reference=False):
        rng = np.random.default_rng(tree.num_tokens + of_reference)
        return tuple(
            (s.behavior_logprobs + 0.5 * rng.normal(size=len(s))).astype(np.float32)
            for s in tree.segments
        )


def trees(num_trees=5):
    rng = np.random.default_rng(8)
    return [random_tree(rng, nan_share=0.2) for _ in range(num_trees)]


def train(batch, **rules):
    team = RecordingTeam()
    result = BatchTrainer(team, BatchRules("treepo", **rules)).train(batch, version=VERSION)
    return team, result


def test_by_default_a_batch_is_one_update_without_a_pass_before():
    batch = trees()
    team, result = train(batch)
    assert team.calls == ["train"]
    (share,) = team.shares
    assert share.trees == tuple(batch)
    assert (share.proximal, share.reference, share.bounds) == (None, None, Bounds())
    assert result.logprob_gap_max == 0.25


def test_passes_come_before_all_updates_and_every_update_has_its_own_part_of_them():
    batch = trees()
    team, _ = train(batch, num_minibatches=2, needs_proximal=True, needs_reference=True)
    assert team.calls == ["proximal", "reference", "train", "train"]
    assert [len(share.trees) for share in team.shares] == [2, 3]
    assert [t for share in team.shares for t in share.trees] == batch
    for share in team.shares:
        for values, of_reference in ((share.proximal, False), (share.reference, True)):
            for tree, found in zip(share.trees, values, strict=True):
                expected = team.logprobs_of(tree, of_reference)
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one, other)


def test_advantages_are_whitened_over_the_batch_and_normalized_over_each_update():
    batch = trees()
    team, _ = train(batch, num_minibatches=2, normalizer="sequence_mean")
    advantages = batch_advantages(batch, "treepo", whitened=True)
    for share, part in zip(team.shares, (slice(0, 2), slice(2, 5)), strict=True):
        weights = loss_weights(batch[part], advantages[part], "sequence_mean")
        for found, expected in zip(share.advantages, advantages[part], strict=True):
            np.testing.assert_array_equal(found, expected)
        for found, expected in zip(share.weights, weights, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_bounds_are_those_of_the_whole_batch_in_every_update():
    batch = trees()
    team, _ = train(
        batch, num_minibatches=3, needs_proximal=True, needs_bounds=True, mean_square=0.1
    )
    expected = bounds_of(
        batch,
        batch_advantages(batch, "treepo", whitened=True),
        [team.logprobs_of(tree) for tree in batch],
        VERSION,
        mean_square=0.1,
        correct_fresh=False,
    )
    assert expected.largest_square < math.inf
    assert [share.bounds for share in team.shares] == [expected] * 3


def test_corrected_values_are_those_of_the_pass_at_the_start():
    batch = trees()
    team, _ = train(batch, needs_proximal=True, vtrace_cap=1.0)
    proximal = [team.logprobs_of(tree) for tree in batch]
    makers = corrected_groups(batch, proximal, VERSION, cap=1.0, correct_fresh=False)
    expected = batch_advantages(batch, "treepo", whitened=True, make_groups=makers)
    plain = batch_advantages(batch, "treepo", whitened=True)
    for found, one, other in zip(team.shares[0].advantages, expected, plain, strict=True):
        np.testing.assert_array_equal(found, one)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(other))
    assert not np.allclose(np.concatenate(expected), np.concatenate(plain), equal_nan=True)


def test_only_the_first_update_compares_engine_and_learner_unless_the_start_is_known():
    (_, alone), (_, known) = (
        train(trees(), num_minibatches=2, needs_proximal=needs) for needs in (False, True)
    )
    assert (alone.logprob_gap_max, alone.logprob_gap_mean) == (0.25, pytest.approx(0.15))
    assert known.logprob_gap_max == 0.5


def test_a_batch_has_no_more_updates_than_trees():
    team, _ = train(trees(2), num_minibatches=7)
    assert [len(share.trees) for share in team.shares] == [1, 1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["learner.minibatches=2"], {"num_minibatches": 2, "needs_proximal": True}),
        (["learner.mask=window+k3"], {}),
        (
            ["learner.mask=k3+m2po", "learner.mask_m2po=0.1"],
            {"needs_proximal": True, "needs_bounds": True, "mean_square": 0.1},
        ),
        (
            ["learner.value_correction=vtrace", "learner.vtrace_cap=1.5"],
            {"needs_proximal": True, "vtrace_cap": 1.5},
        ),
        (["learner.kl_coef=0.1"], {"needs_reference": True}),
        (["learner.proximal=recomputed"], {"needs_proximal": True}),
        (["model.dtype=bfloat16"], {"correct_fresh": True}),
        (["model.dtype=bfloat16", "learner.correct_fresh=false"], {"correct_fresh": False}),
        (["learner.normalizer=dr_grpo"], {"normalizer": "dr_grpo"}),
        (
            ["learner.estimator=grpo", "learner.leave_one_out=true", "learner.whiten=false"],
            {"estimator": "grpo", "leave_one_out": True, "whiten": False},
        ),
        (["learner.path_weights=unbiased"], {"path_weights": "unbiased"}),
        (
            ["learner.loss=dppo", "learner.correction=none", "learner.minibatches=2"],
            {"num_minibatches": 2, "needs_proximal": True},
        ),
        (
            [
                "learner.loss=dppo",
                "learner.correction=none",
                "learner.minibatches=2",
                "learner.correct_fresh=true",
            ],
            {"num_minibatches": 2, "correct_fresh": True},
        ),
    ],
)
def test_the_config_says_which_passes_a_batch_takes(words, expected):
    rules = batch_rules(parse(words))
    plain = {
        "estimator": "treepo",
        "leave_one_out": False,
        "path_weights": "equal",
        "whiten": True,
        "normalizer": "token_mean",
        "num_minibatches": 1,
        "needs_proximal": False,
        "needs_reference": False,
        "needs_bounds": False,
        "vtrace_cap": None,
        "correct_fresh": False,
    }
    found = {name: getattr(rules, name) for name in plain | expected}
    assert found == plain | expected
