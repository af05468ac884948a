import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import DataError
from treepo_async.replay.position import ConsumedBatch, QueuePosition

POSITION = QueuePosition(
    next_index=12,
    next_step=4,
    published=4,
    num_retired=2,
    refills=1,
    exhausted=True,
    live=(8, 10, 11),
    consumed=(
        ConsumedBatch(2, (4, 5), is_trained=True),
        ConsumedBatch(3, (6, 7), is_trained=False),
    ),
    ended={"trained": 4, "dropped": 1},
    reasons={"degenerate": 1, "EngineError": 3},
)


def spoiled(change):
    """The position's text after `change` of its content."""
    found = json.loads(POSITION.to_json("run-a"))
    change(found)
    return json.dumps(found)


def position_with(**values):
    return spoiled(lambda found: found["position"].update(values))


def test_a_position_is_read_as_it_was_written():
    assert QueuePosition.parse(POSITION.to_json("run-a")) == ("run-a", POSITION)
    assert QueuePosition.parse(QueuePosition().to_json("")) == ("", QueuePosition())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not JSON"),
        (POSITION.to_json("run-a")[:-9], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the file has list"),
        (spoiled(lambda f: f.pop("run_id")), "the file has"),
        (spoiled(lambda f: f.update(format=2)), "format is 2"),
        (spoiled(lambda f: f.update(run_id=7)), "run_id is 7"),
        (spoiled(lambda f: f["position"].pop("live")), "position has"),
        (position_with(more=1), "position has"),
        (position_with(next_index=-1), "next_index is -1"),
        (position_with(next_index=1e9), "next_index is 1000000000.0"),
        (position_with(published=True), "published is True"),
        (position_with(refills=None), "refills is None"),
        (position_with(exhausted=0), "exhausted is 0"),
        (position_with(live="8"), "live is '8'"),
        (position_with(live=["8"]), "live is '8'"),
        (position_with(consumed=[{"step": 2}]), "consumed has"),
        (position_with(ended={"trained": float("nan")}), "ended.trained is nan"),
        (position_with(ended=[5]), r"ended is \[5\]"),
        (position_with(reasons={"degenerate": -1}), "reasons.degenerate is -1"),
        (position_with(ended={"trained": 4, "waiting": 1}), "ended has"),
        (position_with(ended={"trained": 5, "dropped": 1}), "are 13 prompts of 12"),
        (position_with(live=[8, 11]), "are 11 prompts of 12"),
        (position_with(live=[8, 11, 10]), "not in lease order"),
        (position_with(live=[8, 10, 12]), "not in lease order"),
        (position_with(live=[7, 10, 11]), "not in lease order"),
        (position_with(num_retired=1), r"steps \[2, 3\], expected each from num_retired 1"),
        (position_with(next_step=5), "to next_step 5"),
    ],
)
def test_what_is_no_position_is_refused_by_name(text, named):
    with pytest.raises(DataError, match=named):
        QueuePosition.parse(text)


@given(
    st.text() | st.recursive(st.none() | st.booleans() | st.integers(), st.lists).map(json.dumps)
)
def test_no_text_does_harm(text):
    with pytest.raises(DataError):
        QueuePosition.parse(text)


def test_a_resumed_run_trains_again_what_its_checkpoint_does_not_cover():
    resumed = POSITION.resumed_at(3)
    resumed.check()
    assert (resumed.next_step, resumed.published, resumed.num_retired) == (3, 3, 3)
    assert resumed.live == (6, 7, 8, 10, 11)
    assert (resumed.consumed, resumed.ended) == ((), {"trained": 6, "dropped": 1})
    assert (resumed.refills, resumed.exhausted) == (0, False)
    assert (resumed.next_index, resumed.reasons) == (12, POSITION.reasons)


def test_a_run_resumed_at_its_newest_step_keeps_what_it_dropped_for_the_next_batch():
    resumed = POSITION.resumed_at(4)
    resumed.check()
    assert (resumed.live, resumed.refills) == (POSITION.live, 1)
    assert resumed.ended == {"trained": 8, "dropped": 1}


@pytest.mark.parametrize("step", [-1, 1, 5])
def test_a_run_is_not_resumed_where_batches_are_not_kept_or_not_reached(step):
    with pytest.raises(DataError, match=f"at policy steps 2 to 4, not at {step}"):
        POSITION.resumed_at(step)
