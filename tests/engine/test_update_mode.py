import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.engine.update_mode import UpdateMode, version_spans
from treepo_async.errors import EngineError
from treepo_async.tree.cut import VersionSpan
from treepo_async.types import PolicyVersion

DRAIN, RETRACT, IN_PLACE = UpdateMode
OLD, NEW, NEWER = (PolicyVersion(0, step) for step in (3, 4, 6))


def said(*spans):
    """What SGLang would say of spans given as (version, end)."""
    starts = [0, *(end for _, end in spans)]
    return [
        {"version": str(version), "start": start, "end": end}
        for start, (version, end) in zip(starts, spans, strict=False)
    ]


@pytest.mark.parametrize("mode", UpdateMode)
def test_a_request_of_one_version_is_pure_in_every_mode(mode):
    assert version_spans(said((OLD, 5)), OLD, mode) == (VersionSpan(OLD, 5, False),)


@pytest.mark.parametrize("spans", [[(OLD, 2), (NEW, 5)], [(NEW, 5)]], ids=["later", "all"])
def test_a_drained_engine_may_not_sample_under_another_version(spans):
    with pytest.raises(EngineError, match=r"sampled under 0\.4, but submitted under 0\.3"):
        version_spans(said(*spans), OLD, DRAIN)


def test_tokens_after_a_retraction_are_pure():
    found = version_spans(said((OLD, 2), (NEW, 5), (NEWER, 6)), OLD, RETRACT)
    assert found == (VersionSpan(OLD, 2), VersionSpan(NEW, 3), VersionSpan(NEWER, 1))


def test_tokens_after_an_update_in_place_are_mixed():
    found = version_spans(said((OLD, 2), (NEW, 5), (NEWER, 6)), OLD, IN_PLACE)
    assert found == (
        VersionSpan(OLD, 2),
        VersionSpan(NEW, 3, mixed_context=True),
        VersionSpan(NEWER, 1, mixed_context=True),
    )


def test_a_request_that_waited_out_an_update_in_place_is_mixed_from_its_first_token():
    """Its namespace is the old one: its prefix may come from the old cache."""
    assert version_spans(said((NEW, 5)), OLD, IN_PLACE) == (VersionSpan(NEW, 5, True),)


def test_a_request_without_tokens_has_no_spans():
    assert version_spans([], OLD, RETRACT) == ()
    assert version_spans(said((NEW, 0)), OLD, RETRACT) == ()


NONSENSE = {
    "older than submitted": said((PolicyVersion(0, 2), 5)),
    "back": said((NEWER, 2), (NEW, 5)),
    "back to the first": said((OLD, 2), (NEW, 4), (OLD, 5)),
    "gap": [said((OLD, 2))[0], {"version": "0.4", "start": 3, "end": 5}],
    "overlap": [said((OLD, 2))[0], {"version": "0.4", "start": 1, "end": 5}],
    "late start": [{"version": "0.3", "start": 1, "end": 5}],
    "earlier lineage": said((PolicyVersion(1, 2), 2), (NEW, 5)),
}


@pytest.mark.parametrize("mode", [RETRACT, IN_PLACE])
@pytest.mark.parametrize("spans", NONSENSE.values(), ids=NONSENSE)
def test_spans_that_do_not_ascend_are_refused(mode, spans):
    with pytest.raises(EngineError, match=re.escape("under 0.3 do not ascend")):
        version_spans(spans, OLD, mode)


@pytest.mark.parametrize("mode", UpdateMode)
def test_a_version_that_is_none_of_ours_is_refused(mode):
    with pytest.raises(ValueError, match="'default' is not <lineage>"):
        version_spans([{"version": "default", "start": 0, "end": 5}], OLD, mode)


@given(
    st.lists(st.integers(1, 4), max_size=5),
    st.sampled_from([RETRACT, IN_PLACE]),
    st.integers(0, 2),
)
def test_spans_cover_every_token_and_only_those_of_the_submitted_version_are_surely_pure(
    lengths, mode, age
):
    versions = [PolicyVersion(0, 3 + age + i) for i in range(len(lengths))]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    found = version_spans(said(*zip(versions, ends, strict=True)), OLD, mode)
    assert [s.num_tokens for s in found] == lengths
    assert [s.policy_version for s in found] == versions
    assert [s.mixed_context for s in found] == [mode is IN_PLACE and v != OLD for v in versions]


@given(name=st.text(), length=st.integers(1, 9))
def test_weights_that_never_change_are_of_the_submitted_version_whatever_their_name(name, length):
    spans = [{"version": name, "start": 0, "end": length}]
    assert version_spans(spans, OLD, None) == (VersionSpan(OLD, length),)


def test_two_names_in_one_answer_are_a_change_that_should_not_be():
    with pytest.raises(EngineError, match=r"weights changed from 0\.3 to 0\.4 under a request"):
        version_spans(said((OLD, 2), (NEW, 5)), OLD, None)
