import random
from collections import Counter

import numpy as np
import pytest

from treepo_async.tree.fallback import boundary, candidates
from treepo_async.types import ROOT, PolicyVersion, Segment, StopReason


def chain(*logprobs, cut_level=None):
    """A path of full levels of four tokens with these log-probs; one level may be cut in two."""
    segments = []
    for level, logprob in enumerate(logprobs):
        sizes = (1, 3) if level == cut_level else (4,)
        for size in sizes:
            segments.append(
                Segment(
                    parent=len(segments) - 1,
                    level=level,
                    token_ids=np.full(size, 7, np.int32),
                    behavior_logprobs=np.full(size, logprob, np.float32),
                    policy_version=PolicyVersion(0, 0),
                )
            )
    return segments


def drawn(rule, segments, num_draws=2000):
    rng = random.Random(0)
    last = len(segments) - 1
    return Counter(boundary(rule, segments, last, rng) for _ in range(num_draws))


def test_a_random_boundary_is_any_of_the_path_alike():
    found = drawn("random", chain(-1.0, -1.0, -1.0, -1.0))
    assert set(found) == {ROOT, 0, 1, 2}
    assert min(found.values()) > 400


def test_a_level_of_low_confidence_is_the_likeliest_to_be_sampled_anew():
    # before levels of 1, 3 and 1 nats: e^1 : e^3 : e^1
    found = drawn("low_confidence", chain(-1.0, -3.0, -1.0))
    assert set(found) == {ROOT, 0, 1}
    assert found[0] / 2000 == pytest.approx(np.e**3 / (np.e**3 + 2 * np.e), abs=0.03)
    assert found[ROOT] / 2000 == pytest.approx(np.e / (np.e**3 + 2 * np.e), abs=0.03)


def test_from_start_is_the_prompt():
    assert set(drawn("from_start", chain(-1.0, -1.0))) == {ROOT}


@pytest.mark.parametrize("rule", ["random", "low_confidence"])
def test_a_boundary_is_on_the_grid_where_a_level_was_cut(rule):
    found = drawn(rule, chain(-1.0, -1.0, -1.0, cut_level=1))
    # segment 1 ends inside of level 1
    assert set(found) == {ROOT, 0, 2}


def test_the_prompt_is_what_is_left_to_fork():
    assert boundary("random", [], ROOT, random.Random(0)) == ROOT


def test_only_answered_paths_are_forked_again_in_random_order():
    stops = [StopReason.EOS, StopReason.LENGTH, StopReason.BOXED, StopReason.REPETITION]
    segments = [
        Segment(ROOT, 0, np.ones(1, np.int32), np.zeros(1, np.float32), PolicyVersion(0, 0), stop)
        for stop in stops
    ]
    orders = {tuple(candidates(segments, range(4), random.Random(seed))) for seed in range(20)}
    assert orders == {(0, 2), (2, 0)}
    assert candidates(segments, [1, 3], random.Random(0)) == [ROOT]
