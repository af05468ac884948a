import dataclasses

import pytest

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.desk import Desk, Place
from treepo_async.weights.manifest import Manifest, Probe, TensorInfo
from treepo_async.weights.parcel import Parcel

BASE = PolicyVersion(0, 0)
PLACES = Place("10.0.0.1", 5000), Place("10.0.0.2", 6000)


def version(step, lineage=0):
    return PolicyVersion(lineage, step)


def parcel(of, *, evaluate=False):
    tensors = {"a": TensorInfo("F32", (2,))}
    manifest = Manifest(str(of), tensors, {"a": "x"}, Probe([], []), evaluate)
    return Parcel(manifest, ((("a",),), ()))


def desk_with(*steps, marked=(), keep_marked=1):
    desk = Desk("run", num_stages=2, keep_marked=keep_marked)
    for step in steps:
        desk.offer(parcel(version(step), evaluate=step in marked))
    return desk


def staffed(*steps, **options):
    """A desk with offers and both stages there."""
    desk = desk_with(*steps, **options)
    for stage, place in enumerate(PLACES):
        desk.stage_is_at(stage, place)
    return desk


def offered(desk, applied, **wish):
    data = desk.next_for(applied, **wish)
    return None if data is None else Parcel.parse(data).version


def test_an_engine_is_offered_the_newest_version_once():
    desk = desk_with(1, 2, 3)
    assert offered(desk, BASE) == version(3)
    assert offered(desk, version(2)) == version(3)
    assert offered(desk, version(3)) is None
    assert offered(desk, BASE, refused=["0.3"]) is None


def test_a_version_to_be_evaluated_is_passed_over_only_by_engines_that_do_not_evaluate():
    desk = desk_with(1, 2, 3, marked=[2])
    assert offered(desk, BASE, evaluates=True) == version(2)
    assert offered(desk, BASE) == version(3)
    assert offered(desk, version(2), evaluates=True) == version(3)
    assert offered(desk, version(2), evaluates=True, marked_only=True) is None


def test_after_a_learner_went_back_engines_keep_what_is_newer_until_it_is_reached_again():
    desk = desk_with()
    desk.offer(parcel(version(4, lineage=1)))
    assert offered(desk, version(6)) is None
    assert offered(desk, version(3)) == version(4, lineage=1)
    assert offered(desk, BASE) == version(4, lineage=1), "an engine that was started anew"
    desk.offer(parcel(version(6, lineage=1)))
    assert offered(desk, version(6)) == version(6, lineage=1)


def test_copies_stay_of_what_is_to_be_evaluated_and_of_what_is_under_way():
    desk = staffed(1, 2, 3, marked=[1, 2])
    assert desk.withdraw_old() == [version(2), version(3)]
    desk.take("engine-0", version(3), server="x", tp=1)
    desk.offer(parcel(version(4)))
    assert desk.withdraw_old() == [version(2), version(3), version(4)]
    desk.offer(parcel(version(5)))
    desk.taken("engine-0", ok=True)
    assert desk.withdraw_old() == [version(2), version(5)]
    with pytest.raises(WeightsError, match=r"version 0\.3 is not offered any more"):
        desk.take("engine-0", version(3), server="x", tp=1)


def test_whatever_can_be_taken_while_a_version_is_published_has_a_copy_that_stays():
    """As a host does that was offered the first version, and closes its gate while the second and the third one come."""
    desk, steps = staffed(1), range(1, 4)
    for step in steps[1:]:
        copies = desk.withdraw_old()
        assert version(step - 1) in copies, "there is always one to take"
        for each in steps:
            try:
                desk.take("engine-0", version(each), server="x", tp=1)
            except WeightsError:
                assert version(each) not in copies
            else:
                assert version(each) in copies
                desk.taken("engine-0", ok=True)
        desk.offer(parcel(version(step)))


def test_every_stage_is_told_to_send_to_all_ranks_of_the_engine_by_a_group_of_its_own():
    desk = staffed(1)
    groups = desk.take("engine-0", version(1), server="x", tp=2)
    assert [(group.address, group.port) for group in groups] == [
        ("10.0.0.1", 5000),
        ("10.0.0.2", 6000),
    ]
    for stage, group in enumerate(groups):
        order = desk.next_order(stage, done=0)
        assert (order.engine, order.group, order.ranks) == ("engine-0", group.name, 3)
        assert PolicyVersion(order.lineage, order.step) == version(1)
    others = desk.take("engine-1", version(1), server="y", tp=2)
    assert not {g.name for g in groups} & {g.name for g in others}


def test_nothing_is_ordered_before_all_stages_are_there():
    desk = desk_with(1)
    desk.stage_is_at(0, PLACES[0])
    assert desk.take("engine-0", version(1), server="x", tp=1) is None
    assert desk.next_order(0, done=0) is None


def test_an_order_is_given_again_until_the_stage_has_begun_it():
    desk = staffed(1)
    desk.take("engine-0", version(1), server="x", tp=1)
    desk.take("engine-1", version(1), server="y", tp=1)
    first = desk.next_order(0, done=0)
    assert desk.next_order(0, done=0) == first
    second = desk.next_order(0, done=first.order)
    assert second.engine == "engine-1"
    assert desk.next_order(0, done=second.order) is None


def names_of(desk, of, **server):
    fields = {"server": "x", "tp": 1} | server
    return [group.name for group in desk.take("engine-0", of, **fields)]


def test_groups_are_used_again_while_all_goes_well():
    desk = staffed(1, 2)
    first = names_of(desk, version(2))
    desk.sent("engine-0", first[0], ok=True)
    desk.taken("engine-0", ok=True)
    assert names_of(desk, version(2)) == first


@pytest.mark.parametrize("trouble", ["host", "stage", "silence", "server", "ranks"])
def test_groups_are_made_anew_after_trouble(trouble):
    desk = staffed(1)
    first = names_of(desk, version(1))
    server = {}
    if trouble == "host":
        desk.taken("engine-0", ok=False)
    elif trouble == "stage":
        desk.sent("engine-0", first[1], ok=False)
        desk.taken("engine-0", ok=True)
    elif trouble != "silence":
        desk.taken("engine-0", ok=True)
        server = {"server": "y"} if trouble == "server" else {"tp": 2}
    assert not set(first) & set(names_of(desk, version(1), **server))


def test_a_failure_in_a_group_that_was_given_up_is_no_failure_of_the_next():
    desk = staffed(1)
    first = names_of(desk, version(1))
    desk.taken("engine-0", ok=False)
    second = names_of(desk, version(1))
    desk.sent("engine-0", first[0], ok=False)
    desk.taken("engine-0", ok=True)
    assert names_of(desk, version(1)) == second


def test_an_offer_is_what_was_offered():
    desk, wanted = desk_with(), dataclasses.replace(parcel(version(1)), stages=((), (("a",),)))
    desk.offer(wanted)
    assert Parcel.parse(desk.next_for(BASE)) == wanted
