import numpy as np

from treepo_async.actor.places import Places
from treepo_async.engine.answer import Completion
from treepo_async.engine.routing import Move, Place
from treepo_async.tree.cut import Run
from treepo_async.types import ROOT, PolicyVersion

OLD, NEW = PolicyVersion(0, 1), PolicyVersion(0, 2)
NO_RUN = Run(np.array([], np.int32), np.array([], np.float32), ())


def completion(engine="a", version=OLD, *, prefix=100, cached=99, warmed=0, move=Move.HOME):
    return Completion(
        NO_RUN,
        prefix,
        cached,
        0.0,
        submitted=version,
        engine=engine,
        move=move,
        warmed_tokens=warmed,
    )


def test_a_path_is_where_its_last_segment_was_sampled_and_a_trunk_is_where_the_prompt_is():
    places = Places()
    assert places.of(ROOT) is None
    begun = Place("a", reservation=7)
    places.begin(begun)
    assert places.of(ROOT) == begun, "with which the engine knows the tree"
    assert places.of(5) == begun, "kept of an earlier tree"
    places.add(5, range(6, 8), completion("b", move=Move.MIGRATED))
    assert places.of(6) == places.of(7) == Place("b", OLD)
    assert places.of(ROOT) == begun


def test_the_first_run_says_where_a_tree_begins_that_was_not_warmed():
    places = Places()
    places.add(ROOT, range(1), completion("b"))
    assert places.of(ROOT) == Place("b", OLD)


def test_children_are_counted_by_why_they_moved_with_what_was_computed_again():
    places = Places()
    places.add(ROOT, range(1), completion(cached=0))
    places.add(0, range(1, 2), completion())
    places.add(0, range(2, 3), completion("b", cached=60, warmed=20, move=Move.SPILLED))
    places.add(2, range(3, 4), completion("b"))
    places.add(3, range(4, 5), completion("c", cached=0, move=Move.MIGRATED))
    assert places.costs() == {
        "num_children": 4,
        "num_spilled": 1,
        "num_migrated": 1,
        "moved_tokens": (40 + 20) + 100,
        "refilled_tokens": 0,
    }


def test_a_prefix_computed_again_under_other_weights_is_no_lost_locality():
    places = Places()
    places.add(ROOT, range(1), completion())
    places.add(0, range(1, 2), completion(version=NEW, cached=10))
    places.add(1, range(2, 3), completion(version=NEW, cached=99))
    costs = places.costs()
    assert costs["refilled_tokens"] == 90
    assert costs["num_spilled"] == costs["num_migrated"] == costs["moved_tokens"] == 0
