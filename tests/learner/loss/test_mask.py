"""Masks in closed form; `test_objective` has them against the textbook on trees."""

import math

import pytest
import torch

from tests.learner.made import edges_of, tensor
from treepo_async.config.schema import MASKS as NAMES
from treepo_async.learner.loss.mask import MASKS, MaskRules, kept
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.edges import UNKNOWN_LAG

LENGTHS = [4, 1, 2]


def run(names, log_ratio, bounds=None, edges=None, **numbers):
    names = (names,) if isinstance(names, str) else names
    rules = MaskRules(names, **numbers)
    found = kept(edges or edges_of(LENGTHS), tensor(*log_ratio), rules, bounds or Bounds())
    assert found.dtype == torch.bool
    return found.int().tolist()


def test_every_mask_of_the_config_is_there():
    assert tuple(MASKS) == NAMES


def test_without_rules_every_token_is_kept():
    assert run((), [9.0] * 7) == [1] * 7


def test_geometric_allows_less_for_longer_segments():
    """Mean log-ratios of 0.3 in segments of 4, 1 and 2 tokens; 2 * 0.25 / sqrt(n) is 0.25, 0.5, 0.354."""
    log_ratio = [0.6, 0.0, 0.3, 0.3, 0.3, 0.6, 0.0]
    found = run("geometric", log_ratio, Bounds(log_ratio_std=0.25), sigmas=2.0, per_lag=0.0)
    assert found == [0, 0, 0, 0, 1, 1, 1]
    down = [-d for d in log_ratio]
    assert run("geometric", down, Bounds(log_ratio_std=0.25), sigmas=2.0, per_lag=0.0) == found


def test_geometric_allows_more_for_older_segments_and_nothing_for_an_unknown_age():
    edges = edges_of([1, 1, 1, 1], lag=[0, 1, 2, UNKNOWN_LAG])
    found = run("geometric", [0.15] * 4, Bounds(0.1), edges, sigmas=1.0, per_lag=0.05 + 1e-9)
    assert found == [0, 1, 1, 0]
    close = run("geometric", [0.09] * 4, Bounds(0.1), edges, sigmas=1.0, per_lag=0.05)
    assert close == [1, 1, 1, 1], "nor is anything taken off"


def test_geometric_and_m2po_mask_nothing_without_bounds():
    assert run(("geometric", "m2po"), [50.0] * 7) == [1] * 7


@pytest.mark.parametrize(("mean", "keeps"), [(0.79, 0), (0.81, 1), (1.0, 1), (1.19, 1), (1.21, 0)])
def test_window_keeps_segments_by_the_geometric_mean_of_their_ratios(mean, keeps):
    d = math.log(mean)
    found = run("window", [d + 0.7, d - 0.7, d, d, 0.0, 0.0, 0.0], low=0.8, high=1.2)
    assert found == [keeps] * 4 + [1] * 3


def test_k3_sees_what_cancels_in_a_mean():
    wide, narrow = [0.7, -0.7, 0.7, -0.7], [0.05, 0.05, 0.05, 0.05]
    mean = sum(math.exp(d) - 1 - d for d in wide) / 4
    assert run("k3", [*wide, 0, 0, 0], k3=mean - 1e-6) == [0, 0, 0, 0, 1, 1, 1]
    assert run("k3", [*wide, 0, 0, 0], k3=mean + 1e-6) == [1] * 7
    assert run("k3", [*narrow, 0, 0, 0], k3=0.01) == [1] * 7


def test_vetoes_reach_a_token_a_segment_or_all_that_continues_it():
    """A tree of six slots of two tokens: 0 -> (1 -> 3 -> 5, 2), 4 hangs on the prompt; a token of 1 is vetoed."""
    edges = edges_of([2] * 6, parents=[-1, 0, 0, 1, -1, 3], paths=[[0, 1, 3, 5], [0, 2], [4]])
    log_ratio = [0.0] * 12
    log_ratio[3] = math.log(0.01)
    found = {
        name: run(name, log_ratio, edges=edges, veto=0.02)
        for name in ("veto_token", "veto_segment", "veto_subtree")
    }
    assert found["veto_token"] == [1, 1, 1, 0, *[1] * 8]
    assert found["veto_segment"] == [1, 1, 0, 0, *[1] * 8]
    assert found["veto_subtree"] == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    assert run("veto_token", log_ratio, edges=edges, veto=0.009) == [1] * 12


@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 8, 9, 40])
def test_a_veto_at_the_top_reaches_the_end_of_the_longest_path(num_slots):
    log_ratio = [-20.0] + [0.0] * (num_slots - 1)
    assert run("veto_subtree", log_ratio, edges=edges_of([1] * num_slots)) == [0] * num_slots


def test_m2po_leaves_out_squares_above_the_bound_of_the_batch():
    log_ratio = [0.1, -0.1, 0.3, -0.3, 0.0, 0.5, -0.5]
    found = run("m2po", log_ratio, Bounds(largest_square=0.1))
    assert found == [1, 1, 1, 1, 1, 0, 0]


def test_several_masks_keep_what_all_of_them_keep():
    log_ratio = [0.6, -0.6, 0.0, 0.0, 1.0, 0.0, 0.0]
    numbers = {"k3": 0.2, "veto": 0.6}
    assert run("k3", log_ratio, **numbers) == [1, 1, 1, 1, 0, 1, 1]
    assert run("veto_token", log_ratio, **numbers) == [1, 0, 1, 1, 1, 1, 1]
    assert run(("k3", "veto_token"), log_ratio, **numbers) == [1, 0, 1, 1, 0, 1, 1]


def test_log_ratios_of_zero_are_kept_by_every_mask():
    bounds = Bounds(log_ratio_std=0.0, largest_square=0.0)
    assert run(NAMES, [0.0] * 7, bounds, per_lag=0.0) == [1] * 7
