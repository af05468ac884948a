import math

from treepo_async.scoring.failures import Attempt, Failure, Failures, counts_text, failed


def noted(*failures):
    lines = []
    counter = Failures(lines.append)
    for failure in failures:
        assert math.isnan(counter.note(failed(failure, f"detail of {failure}\n")))
    return counter, lines


def test_failures_are_counted_by_reason_and_scores_are_not():
    counter, _ = noted(Failure.RAISED, Failure.TIMED_OUT, Failure.RAISED)
    assert counter.note(Attempt(0.5)) == 0.5
    assert counter.counts == {Failure.RAISED: 2, Failure.TIMED_OUT: 1}


def test_counts_are_told_with_the_most_frequent_first():
    counts = {Failure.TIMED_OUT: 2, Failure.RAISED: 10}
    assert counts_text(counts) == "12 (raised 10, timed out 2)"
    assert counts_text({}) == "0"


def test_the_first_failure_of_each_reason_is_logged_with_its_detail():
    _, lines = noted(Failure.RAISED, Failure.BAD_KEY, Failure.RAISED)
    assert lines == [
        "a response stays unscored, raised: detail of raised",
        "a response stays unscored, bad key: detail of bad_key",
    ]


def test_later_failures_are_logged_as_counts_ever_more_rarely():
    _, lines = noted(*[Failure.DIED] * 2500)
    assert lines[1:] == [
        "reward errors so far: 10 (died 10)",
        "reward errors so far: 100 (died 100)",
        "reward errors so far: 1000 (died 1000)",
    ]


def test_the_counts_are_told_at_the_end_where_there_are_any():
    counter, lines = noted(Failure.RAISED)
    counter.tell()
    assert lines[-1] == "reward errors: 1 (raised 1)"
    nothing, no_lines = noted()
    nothing.tell()
    assert no_lines == []
