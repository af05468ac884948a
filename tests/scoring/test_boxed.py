import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.scoring.boxed import boxed_end, last_boxed

FRAGMENTS = st.lists(
    st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "\\", "a", " ", "boxed"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(
    ("text", "complete", "content"),
    [
        ("so \\boxed{33} then", "so \\boxed{33}", "33"),
        ("\\boxed{\\frac{1}{2}}.", "\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "\\boxed{1}", "2"),
        ("\\boxed{1} and \\boxed{2", "\\boxed{1}", "1"),
        ("\\boxed{\\{1, 2\\}}", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\}3}", "\\boxed{\\}3}", "\\}3"),
        ("\\boxed{a\\\\}", "\\boxed{a\\\\}", "a\\\\"),
        ("\\\\boxed{7}", "\\\\boxed{7}", "7"),
        ("{ \\boxed{3}", "{ \\boxed{3}", "3"),
        ("} \\boxed{3}", "} \\boxed{3}", "3"),
        ("\\boxed{}", "\\boxed{}", ""),
        ("\\boxed{1 \\boxed{2} 3}", "\\boxed{1 \\boxed{2}", "1 \\boxed{2} 3"),
    ],
)
def test_a_complete_box_is_found_with_its_braces_balanced(text, complete, content):
    assert text[: boxed_end(text)] == complete
    assert last_boxed(text) == content


@pytest.mark.parametrize("text", ["", "boxed{3}", "\\boxed", "\\boxed{3", "\\boxed{{3}", "{3}"])
def test_text_without_a_complete_box_has_none(text):
    assert boxed_end(text) is None
    assert last_boxed(text) is None


@settings(deadline=None)
@given(FRAGMENTS, FRAGMENTS)
def test_text_that_grows_keeps_its_first_box(text, more):
    end = boxed_end(text)
    if end is not None:
        assert boxed_end(text + more) == end


@settings(deadline=None)
@given(FRAGMENTS)
def test_the_first_box_ends_at_the_shortest_prefix_that_has_one(text):
    prefixes = [end for end in range(len(text) + 1) if last_boxed(text[:end]) is not None]
    assert boxed_end(text) == (prefixes[0] if prefixes else None)


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 100_000, "{" * 1_000_000, "\\" * 1_000_000, "\\boxed{1}" * 100_000]
)
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    boxed_end(text)
    last_boxed(text)
    assert time.process_time() - start < 2
