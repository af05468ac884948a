import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.tree.cut import Run, VersionSpan, cut
from treepo_async.types import ROOT, PolicyVersion, StopReason

OLD, NEW = PolicyVersion(0, 3), PolicyVersion(0, 4)

spans_strategy = st.lists(
    st.builds(VersionSpan, st.sampled_from([OLD, NEW]), st.integers(0, 9), st.booleans()),
    min_size=1,
    max_size=5,
).filter(lambda spans: sum(s.num_tokens for s in spans) > 0)


def make_run(*spans):
    num_tokens = sum(s.num_tokens for s in spans)
    return Run(
        np.arange(num_tokens, dtype=np.int32),
        -np.arange(num_tokens, dtype=np.float32),
        tuple(spans),
    )


def versions_of_tokens(run):
    return [(s.policy_version, s.mixed_context) for s in run.spans for _ in range(s.num_tokens)]


@settings(deadline=None, max_examples=200)
@given(
    spans=spans_strategy,
    start=st.integers(0, 20),
    segment_tokens=st.integers(1, 7),
    first_index=st.integers(0, 5),
    stop=st.sampled_from([None, StopReason.EOS]),
)
def test_segments_are_the_run_cut_into_one_level_and_one_version_each(
    spans, start, segment_tokens, first_index, stop
):
    run, parent = make_run(*spans), first_index - 1
    segments = cut(
        run,
        parent=parent,
        first_index=first_index,
        start=start,
        segment_tokens=segment_tokens,
        stop=stop,
    )
    assert np.array_equal(np.concatenate([s.token_ids for s in segments]), run.token_ids)
    logprobs = np.concatenate([s.behavior_logprobs for s in segments])
    assert np.array_equal(logprobs, run.behavior_logprobs)
    assert [s.parent for s in segments] == [parent + i for i in range(len(segments))]
    assert [s.stop for s in segments] == [None] * (len(segments) - 1) + [stop]
    versions_T, begin = versions_of_tokens(run), 0
    for segment in segments:
        covered = range(begin, begin + len(segment))
        assert {(start + i) // segment_tokens for i in covered} == {segment.level}
        assert {versions_T[i] for i in covered} == {(segment.policy_version, segment.mixed_context)}
        begin += len(segment)


def test_a_run_of_one_version_is_cut_at_grid_multiples_only():
    segments = cut(
        make_run(VersionSpan(OLD, 11)),
        parent=ROOT,
        first_index=0,
        start=2,
        segment_tokens=4,
        stop=StopReason.LENGTH,
    )
    assert [(s.level, len(s)) for s in segments] == [(0, 2), (1, 4), (2, 4), (3, 1)]


def test_a_version_boundary_on_the_grid_makes_no_extra_cut():
    segments = cut(
        make_run(VersionSpan(OLD, 4), VersionSpan(OLD, 0), VersionSpan(NEW, 3)),
        parent=ROOT,
        first_index=0,
        start=0,
        segment_tokens=4,
        stop=None,
    )
    assert [(s.policy_version, len(s)) for s in segments] == [(OLD, 4), (NEW, 3)]


@settings(deadline=None, max_examples=100)
@given(spans=spans_strategy, share=st.floats(0, 1))
def test_the_head_of_a_run_keeps_each_token_in_its_version(spans, share):
    run = make_run(*spans)
    kept = max(1, int(share * len(run)))
    head = run.head(kept)
    assert np.array_equal(head.token_ids, run.token_ids[:kept])
    assert np.array_equal(head.behavior_logprobs, run.behavior_logprobs[:kept])
    assert versions_of_tokens(head) == versions_of_tokens(run)[:kept]


@pytest.mark.parametrize(
    ("num_logprobs", "num_spanned"), [(2, 3), (3, 2)], ids=["log-probs", "spans"]
)
def test_a_run_whose_parts_disagree_in_length_is_refused(num_logprobs, num_spanned):
    with pytest.raises(ValueError, match=f"3 tokens, {num_logprobs} log-probs .* {num_spanned} t"):
        Run(
            np.zeros(3, np.int32),
            np.zeros(num_logprobs, np.float32),
            (VersionSpan(OLD, num_spanned),),
        )
