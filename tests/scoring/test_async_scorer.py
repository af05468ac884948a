import asyncio
import math
import threading

import numpy as np
import pytest

from tests.fakes import until
from treepo_async.errors import ConfigError
from treepo_async.scoring.async_scorer import Inline, open_scorer, try_scorer
from treepo_async.scoring.failures import Attempt, Failure
from treepo_async.scoring.pool import Pool


def failing_on_b(response, answer):
    if response == "b":
        raise LookupError
    return float(response == answer)


async def test_a_scorer_in_a_thread_gives_scores_in_order_and_counts_failures():
    async with Inline(failing_on_b) as scorer:
        np.testing.assert_array_equal(await scorer.score(["a", "b", "c"], "a"), [1, np.nan, 0])
        assert (await scorer.attempt("a", "a")).accuracy == 1.0
        assert math.isnan((await scorer.attempt("b", "a")).accuracy)
    assert scorer.failures.counts == {Failure.RAISED: 2}


async def test_other_work_goes_on_while_a_thread_scores():
    entered, released = threading.Event(), threading.Event()

    def slow(response, answer):
        entered.set()
        return float(released.wait(10.0))

    for score in (Inline(slow).score(["a"], ""), Inline(slow).attempt("a", "")):
        scoring = asyncio.ensure_future(score)
        await until(entered.is_set)
        released.set()
        assert await scoring in ([1.0], Attempt(1.0))
        entered.clear()
        released.clear()


async def test_exact_needs_no_process_and_everything_else_has_its_own():
    assert isinstance(open_scorer("exact", workers=1, timeout_s=1), Inline)
    for name in ("math", "tests.scoring.scorers:obey"):
        assert isinstance(open_scorer(name, workers=1, timeout_s=1), Pool)
    async with open_scorer("exact", workers=1, timeout_s=1) as scorer:
        assert await scorer.score(["\\boxed{1}", "\\boxed{2}"], "1") == [1.0, 0.0]


def test_an_unknown_name_is_refused_at_once():
    with pytest.raises(ConfigError, match="did you mean math"):
        open_scorer("mth", workers=1, timeout_s=1)


@pytest.mark.parametrize("name", ["exact", "math", "tests.scoring.scorers:equal"])
def test_a_scorer_that_can_be_used_passes_its_trial(name):
    try_scorer(name)


@pytest.mark.parametrize("name", ["mth", "no_such_module_here:f", "tests.scoring.scorers:absent"])
def test_a_scorer_that_cannot_be_used_fails_its_trial(name):
    with pytest.raises(ConfigError, match=f"scorer '{name}'"):
        try_scorer(name)
