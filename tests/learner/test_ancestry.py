import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.learner.ancestry import Ancestry
from treepo_async.types import PolicyVersion


def version(text):
    return PolicyVersion.parse(text)


def ancestry(lineage, origins, inherited=None):
    origins = {number: version(text) for number, text in origins.items()}
    return Ancestry.of(lineage, origins, inherited or {})


def names(found, *texts):
    return [str(found.canonical(version(text))) for text in texts]


def test_the_first_lineage_has_its_own_names_alone():
    found = ancestry(0, {0: "0.0"})
    assert names(found, "0.0", "0.7", "1.3") == ["0.0", "0.7", "1.3"]


def test_what_was_sampled_before_the_checkpoint_bears_the_names_of_the_lineage_that_goes_on_from_it():
    found = ancestry(1, {0: "0.0", 1: "0.4"})
    assert names(found, "0.0", "0.4", "0.5", "1.5") == ["1.0", "1.4", "0.5", "1.5"]


def test_without_a_checkpoint_the_initial_model_is_the_same():
    found = ancestry(2, {0: "0.0", 1: "0.0", 2: "0.0"})
    assert names(found, "0.0", "1.0", "0.1", "1.1") == ["2.0", "2.0", "0.1", "1.1"]


def test_a_step_repeated_to_the_bit_makes_the_next_version_the_same():
    found = ancestry(1, {1: "0.4"})
    assert found.repeated(4, "d4", {0: "d4"}) == []
    assert names(found, "0.5", "0.6") == ["1.5", "0.6"]
    assert found.repeated(5, "d5", {0: "d5"}) == []
    assert names(found, "0.6") == ["1.6"]


def test_a_step_with_another_result_is_told_once_and_nothing_behind_it_is_the_same():
    found = ancestry(1, {1: "0.4"})
    assert found.repeated(4, "other", {0: "d4"}) == [0]
    assert found.repeated(5, "d5", {0: "d5"}) == []
    assert names(found, "0.4", "0.5", "0.6") == ["1.4", "0.5", "0.6"]


def test_a_step_that_an_earlier_lineage_did_not_end_says_nothing():
    found = ancestry(1, {1: "0.4"})
    assert found.repeated(4, "d4", {0: ""}) == []
    assert names(found, "0.5") == ["0.5"]


def test_the_same_step_is_compared_with_each_lineage_that_had_the_same_weights():
    found = ancestry(2, {1: "0.4", 2: "0.4"})
    assert found.repeated(4, "d4", {0: "d4", 1: "x", 2: ""}) == [1]
    assert names(found, "0.5", "1.5", "1.4") == ["2.5", "1.5", "2.4"]


def test_what_a_checkpoint_knew_is_known_to_whoever_goes_on_from_it():
    found = ancestry(2, {1: "0.4", 2: "1.8"}, inherited={0: 6})
    assert names(found, "0.4", "0.6", "0.7", "1.8", "1.9") == ["2.4", "2.6", "0.7", "2.8", "1.9"]


def test_a_sibling_that_began_from_a_later_checkpoint_which_is_damaged_now_is_reached_again():
    """1 went on from 0.4, which cannot be read any more, so 2 goes on from 0.2."""
    found = ancestry(2, {1: "0.4", 2: "0.2"})
    assert names(found, "1.2", "1.4", "0.4") == ["2.2", "1.4", "0.4"]
    assert found.repeated(2, "d2", {0: "d2"}) == []
    assert found.repeated(3, "d3", {0: "d3"}) == []
    assert names(found, "1.4", "0.4") == ["2.4", "2.4"]
    assert found.repeated(4, "d4", {0: "", 1: "d4"}) == []
    assert names(found, "1.5", "0.5") == ["2.5", "0.5"]


@pytest.mark.parametrize("origin", ["1.3", "2.3"])
def test_an_origin_that_is_not_of_an_earlier_lineage_is_followed_no_further(origin):
    found = Ancestry(3, {1: version(origin)}, {})
    assert names(found, "1.2") == ["1.2"]


def test_trees_are_renamed_segment_by_segment_and_those_without_an_old_name_stay_themselves():
    tree = random_tree(np.random.default_rng(1))
    own = [segment.policy_version for segment in tree.segments]
    first = min(own)
    found = Ancestry(9, {}, {first.lineage: first.step})
    (renamed,) = found.rename([tree])
    wanted = [PolicyVersion(9, v.step) if v == first else v for v in own]
    assert [segment.policy_version for segment in renamed.segments] == wanted
    pairs = zip(tree.segments, renamed.segments, strict=True)
    assert all(old.token_ids is new.token_ids for old, new in pairs)
    assert Ancestry(9).rename([tree])[0] is tree


@given(st.integers(0, 10**9))
def test_whatever_dies_when_a_name_is_the_same_only_where_the_weights_are(seed):
    """A run of lineages that begin anywhere, against the weights themselves: here the text of all that was done to them."""
    rng = random.Random(seed)
    origins, weights, results, kept = {}, {(0, 0): ""}, {}, {}
    for lineage in range(rng.randrange(2, 7)):
        choices = [PolicyVersion(0, 0), *kept]
        origin = rng.choice(choices) if lineage else choices[0]
        origins[lineage] = origin
        found = Ancestry.of(lineage, origins, kept.get(origin, {}))
        now = weights[origin]
        for step in range(origin.step + 1):
            weights.setdefault((lineage, step), _at(weights, origins, lineage, step))
        for step in range(origin.step, origin.step + rng.randrange(5)):
            done = f"{step}{'!' * (rng.random() < 0.1)}/"
            digest = f"{now}{done}"
            found.repeated(step, digest, results.get(step, {}))
            results.setdefault(step, {})[lineage] = digest
            now += done
            weights[lineage, step + 1] = now
            if rng.random() < 0.4:
                kept[PolicyVersion(lineage, step + 1)] = dict(found.equal)
        for (other, step), value in weights.items():
            name = found.canonical(PolicyVersion(other, step))
            if name.lineage == lineage:
                assert value == weights[lineage, step], (origins, other, step)


def _at(weights, origins, lineage, step):
    origin = origins[lineage]
    if origin.lineage == lineage or step > origin.step:
        return weights[lineage, step]
    return weights[origin.lineage, step]
