"""The judgement of fault tests, on lines in which something is wrong in one way each."""

import pytest

from tests.faults.outcome import judge

EXPECTED = [(["a", "b"], "w0"), (["c", "d"], "w1")]


def ack(index, tag, *, note="accepted", digest=0):
    return {"lease": f"{index:09d}", "attempt": 1, "note": note, "tag": tag, "digest": digest}


def update(step, tags, *, lineage=0, first=None, weights=None):
    first = 2 * step if first is None else first
    return {
        "lineage": lineage,
        "step": step,
        "leases": [f"{first:09d}", f"{first + 1:09d}"],
        "tags": tags,
        "contents": EXPECTED[step][0],
        "weights": weights or EXPECTED[step][1],
    }


ACKS = [ack(0, "t0"), ack(1, "t1"), ack(2, "t2"), ack(3, "t3"), ack(4, "t4", digest=44)]
TRAINED = [update(0, ["t0", "t1"]), update(1, ["t2", "t3"])]


def found(acks=ACKS, trained=TRAINED, stored=None):
    return judge(acks, trained, stored={4: 44} if stored is None else stored, expected=EXPECTED)


def test_a_run_without_faults_is_whole():
    assert found().is_whole
    assert (found().num_acks, found().num_steps, found().num_updates) == (5, 2, 2)


def test_a_step_that_is_done_again_with_the_same_trees_is_no_harm():
    again = found(trained=[*TRAINED, update(1, ["t2", "t3"], lineage=1)])
    assert again.is_whole
    assert (again.num_steps, again.num_updates) == (2, 3)


@pytest.mark.parametrize(
    ("acks", "stored"),
    [
        (ACKS, {}),
        (ACKS, {4: 45}),
        ([ack(0, "another growth")], {}),
        ([ack(5, "t5", note="duplicate")], {}),
    ],
    ids=["nowhere", "other bytes", "another growth was trained", "nothing it could be one of"],
)
def test_an_acknowledged_tree_that_is_nowhere_is_lost(acks, stored):
    assert len(found(acks=acks, stored=stored).lost) == 1


def test_a_tree_that_was_dropped_or_came_second_is_not_lost():
    acks = [ack(9, "t9", note="degenerate"), ack(0, "another growth", note="duplicate")]
    assert found(acks=acks).lost == []


def test_a_tree_that_differs_from_what_was_acknowledged_when_a_step_is_done_again_is_lost():
    again = update(1, ["t2", "grown again"], lineage=1)
    assert found(trained=[*TRAINED, again]).lost == ["000000003 attempt 1 (accepted)"]


def test_a_prompt_in_two_steps_and_a_step_that_is_missing_are_found():
    assert found(trained=[update(0, ["t0", "t1"]), update(1, ["t1", "t2"], first=1)]).twice == [
        "000000001 in steps [0, 1]"
    ]
    assert found(trained=TRAINED[1:]).twice == ["step 0 was never made"]


def test_a_step_of_a_lineage_that_was_rolled_back_is_trained_by_the_later_one():
    late = [update(1, ["t2", "t3"], lineage=1), update(1, ["t1", "t2"], first=1)]
    assert found(trained=[TRAINED[0], *late]).twice == []


def test_weights_other_than_expected_are_found():
    assert found(trained=[TRAINED[0], update(1, ["t2", "t3"], weights="w9")]).other == [
        "step 1 in lineage 0"
    ]
