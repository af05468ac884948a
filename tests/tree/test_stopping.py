import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treepo_async.config.schema import TreeConfig
from treepo_async.scoring.boxed import boxed_end
from treepo_async.tree.stopping import StopRules, find_stop, is_repetitive
from treepo_async.types import StopReason

PIECES = ["a", "b", " ", "7", "{", "}", "\\", "\\boxed{", "boxed", "ab" * 3, "<pad>", "<eos>"]
PAD, EOS = len(PIECES) - 2, len(PIECES) - 1
OPEN, CLOSE, SEVEN, A = (PIECES.index(p) for p in ("\\boxed{", "}", "7", "a"))

tokens_strategy = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)


def decode(token_ids):
    return "".join(PIECES[i] for i in token_ids)


def rules(**changes):
    settings = {
        "eos_token_ids": frozenset({EOS}),
        "decode": decode,
        "boxed_end": boxed_end,
        **changes,
    }
    return StopRules(**settings)


def stop_of(rules, token_ids, *, context=(), segment_tokens=8):
    return find_stop(rules, context, token_ids, segment_tokens=segment_tokens)


def first_stop_token_by_token(rules, context, token_ids, segment_tokens):
    """What `find_stop` promises, one token after the other."""
    for kept in range(1, len(token_ids) + 1):
        if token_ids[kept - 1] in rules.eos_token_ids:
            return kept, StopReason.EOS
        text = rules.decode([*context, *token_ids[:kept]])
        if rules.boxed_end is not None and rules.boxed_end(text) is not None:
            eos_follows = kept < len(token_ids) and token_ids[kept] in rules.eos_token_ids
            if eos_follows and (len(context) + kept) % segment_tokens:
                return kept + 1, StopReason.EOS
            return kept, StopReason.BOXED
        path, span = [*context, *token_ids[:kept]], rules.repetition_window * rules.repetition_count
        # of this block of tokens and of the one before
        blocks_before = 0 if span == 0 else max(0, (len(path) - 1) // span - 1)
        text = rules.decode(path[blocks_before * span :])
        windows = [
            text[i : i + rules.repetition_window]
            for i in range(len(text) - rules.repetition_window + 1)
        ]
        if rules.repetition_count and any(
            windows.count(w) >= rules.repetition_count for w in windows
        ):
            return kept, StopReason.REPETITION
    return None


@settings(deadline=None, max_examples=300)
@given(
    context=tokens_strategy,
    token_ids=tokens_strategy.filter(len),
    eos=st.sampled_from([frozenset(), frozenset({EOS}), frozenset({EOS, PAD})]),
    boxed=st.booleans(),
    window=st.integers(1, 4),
    repetition_count=st.integers(0, 5),
    segment_tokens=st.integers(1, 50),
)
@example([], [CLOSE, OPEN, CLOSE, EOS], frozenset({EOS}), True, 1, 2, 8)
def test_the_stop_is_the_one_a_scan_token_by_token_finds(
    context, token_ids, eos, boxed, window, repetition_count, segment_tokens
):
    stops = rules(
        eos_token_ids=eos,
        boxed_end=boxed_end if boxed else None,
        repetition_window=window,
        repetition_count=repetition_count,
    )
    assert stop_of(
        stops, token_ids, context=context, segment_tokens=segment_tokens
    ) == first_stop_token_by_token(stops, context, token_ids, segment_tokens)


def test_the_toy_vocabulary_reaches_every_stop():
    """Control for the test above."""
    rng, found = random.Random(0), set()
    stops = rules(repetition_window=2, repetition_count=3)
    for _ in range(300):
        stop = stop_of(stops, [rng.randrange(len(PIECES)) for _ in range(12)])
        found.add(stop and stop[1])
    assert found == {None, StopReason.EOS, StopReason.BOXED, StopReason.REPETITION}


@pytest.mark.parametrize("before", [0, 1, 5])
def test_eos_ends_the_run_wherever_it_stands(before):
    assert stop_of(rules(), [A] * before + [EOS]) == (before + 1, StopReason.EOS)
    assert stop_of(rules(), [A] * before + [EOS, A, EOS]) == (before + 1, StopReason.EOS)


def test_any_of_several_eos_ids_ends_the_run():
    stops = rules(eos_token_ids=frozenset({PAD, EOS}))
    assert stop_of(stops, [A, PAD, EOS]) == (2, StopReason.EOS)
    assert stop_of(stops, [A, EOS, PAD]) == (2, StopReason.EOS)


def test_a_run_without_a_stop_goes_on():
    assert stop_of(rules(repetition_count=9), [A, OPEN, SEVEN]) is None


def test_a_box_is_cut_where_it_is_complete():
    assert stop_of(rules(), [A, OPEN, SEVEN, CLOSE, A, A, EOS]) == (4, StopReason.BOXED)


def test_a_box_split_over_two_runs_is_found():
    assert stop_of(rules(), [SEVEN, CLOSE, A], context=[A, OPEN]) == (2, StopReason.BOXED)
    assert stop_of(rules(), [CLOSE], context=[OPEN]) == (1, StopReason.BOXED)


def test_a_box_may_have_begun_long_before_the_run():
    assert stop_of(rules(), [CLOSE], context=[OPEN, *[SEVEN] * 500]) == (1, StopReason.BOXED)


def test_a_box_at_the_end_of_a_segment_ends_the_path_however_far_the_request_ran():
    box = [OPEN, SEVEN, SEVEN, CLOSE]
    assert stop_of(rules(), box, segment_tokens=4) == (4, StopReason.BOXED)
    assert stop_of(rules(), [*box, EOS], segment_tokens=4) == (4, StopReason.BOXED)


def test_eos_right_behind_a_box_is_kept():
    assert stop_of(rules(), [OPEN, SEVEN, CLOSE, EOS, A]) == (4, StopReason.EOS)
    assert stop_of(rules(), [CLOSE, EOS], context=[OPEN]) == (2, StopReason.EOS)
    assert stop_of(rules(), [OPEN, CLOSE, A, EOS]) == (2, StopReason.BOXED)


def test_boxes_can_be_ignored():
    assert stop_of(rules(boxed_end=None), [OPEN, CLOSE, A]) is None


def test_the_earliest_stop_wins():
    stops = rules(repetition_window=1, repetition_count=3)
    assert stop_of(stops, [A, EOS, OPEN, CLOSE]) == (2, StopReason.EOS)
    assert stop_of(stops, [OPEN, CLOSE, A, A, A, EOS]) == (2, StopReason.BOXED)
    assert stop_of(stops, [A, A, A, OPEN, CLOSE, EOS]) == (3, StopReason.REPETITION)


def test_a_box_that_completes_with_a_repetition_is_an_answer_with_its_eos():
    stops = rules(repetition_window=1, repetition_count=2)
    box_and_repetition = [CLOSE, OPEN, CLOSE]
    assert stop_of(stops, box_and_repetition) == (3, StopReason.BOXED)
    assert stop_of(stops, [*box_and_repetition, EOS]) == (4, StopReason.EOS)


def in_pieces(rules, token_ids, ends, segment_tokens):
    """The stop of a response that comes in several runs, counted from its first token."""
    begins = [0, *ends]
    for begin, end in zip(begins, [*ends, len(token_ids)], strict=True):
        stop = stop_of(
            rules, token_ids[begin:end], context=token_ids[:begin], segment_tokens=segment_tokens
        )
        if stop is not None:
            return begin + stop[0], stop[1]
    return None


@settings(deadline=None, max_examples=300)
@given(
    token_ids=st.lists(st.integers(0, 3), min_size=2, max_size=60),
    cuts=st.sets(st.integers(1, 59), max_size=8),
    window=st.integers(1, 4),
    repetition_count=st.integers(2, 5),
    segment_tokens=st.integers(1, 50),
)
def test_repetition_ends_a_path_at_the_same_token_wherever_its_runs_end(
    token_ids, cuts, window, repetition_count, segment_tokens
):
    stops = rules(repetition_window=window, repetition_count=repetition_count)
    ends = sorted(cut for cut in cuts if cut < len(token_ids))
    assert in_pieces(stops, token_ids, ends, segment_tokens) == stop_of(stops, token_ids)


@pytest.mark.parametrize("begin", [0, 1, 100, 255, 256, 300, 777])
def test_the_default_rule_fires_at_one_character_a_token_in_segments_of_ten(begin):
    """Thirty-two characters, eight times, wherever they begin."""
    text = [chr(256 + i) for i in range(begin)] + [chr(0x4E00 + i % 32) for i in range(400)]
    token_ids = [ord(c) for c in text]
    stops = rules(
        eos_token_ids=frozenset(),
        decode=lambda tokens: "".join(map(chr, tokens)),
        boxed_end=None,
        repetition_window=TreeConfig().repetition_window,
        repetition_count=TreeConfig().repetition_count,
    )
    ends = range(10, len(token_ids), 10)
    # the eighth window is whole
    expected = (begin + 8 * 32, StopReason.REPETITION)
    assert in_pieces(stops, token_ids, ends, segment_tokens=10) == expected
    assert stop_of(stops, token_ids) == expected


def test_repetition_is_counted_over_the_last_tokens_only():
    """One character four times in at most eight tokens: not where it is every third, twice as dense it is."""
    stops = rules(
        eos_token_ids=frozenset(),
        decode=lambda tokens: "".join(map(chr, tokens)),
        repetition_window=1,
        repetition_count=4,
    )
    rare = [ord("a") if i % 3 == 0 else 256 + i for i in range(60)]
    assert stop_of(stops, rare) is None
    dense = [ord("a") if i % 2 == 0 else 256 + i for i in range(60)]
    assert stop_of(stops, dense) == (7, StopReason.REPETITION)


def test_the_bytes_of_a_character_that_is_not_whole_are_no_repetition():
    def decode(tokens):
        return bytes(tokens).decode(errors="replace")

    stops = rules(
        eos_token_ids=frozenset(),
        decode=decode,
        boxed_end=None,
        repetition_window=1,
        repetition_count=2,
    )
    token_ids = list("ab\N{GRINNING FACE}c".encode())
    assert in_pieces(stops, token_ids, range(1, len(token_ids)), 8) is None


def test_bytes_that_never_make_a_character_repeat_themselves_like_any_other():
    some = StopRules(frozenset(), lambda tokens: "\ufffd" * len(tokens), None, 8, 3)
    stop = find_stop(some, [], [0] * 60, segment_tokens=10)
    # three at each end may belong to a character that is not whole
    assert stop == (8 + 3 - 1 + 6, StopReason.REPETITION)


def test_repetition_is_off_by_default():
    assert stop_of(rules(), [A] * 500, segment_tokens=500) is None


@pytest.mark.parametrize(
    ("text", "window", "times", "expected"),
    [
        ("aaaa", 1, 4, True),
        ("aaaa", 2, 3, True),
        ("aaaa", 2, 4, False),
        ("abcabc", 3, 2, True),
        ("abcabd", 3, 2, False),
        ("", 1, 1, False),
        ("ab", 3, 1, False),
    ],
)
def test_overlapping_windows_of_a_text_are_counted(text, window, times, expected):
    assert is_repetitive(text, window, times) is expected
