import asyncio
import contextlib
import threading
from collections import Counter

import numpy as np
import pytest

from tests.fakes import (
    EOS,
    ScriptedEngine,
    ascii_settings,
    engine_failure,
    events_in,
    open_gate,
    running,
    until,
)
from treepo_async.actor.evaluate import Evaluator
from treepo_async.scoring.async_scorer import Inline
from treepo_async.scoring.exact import exact
from treepo_async.types import PolicyVersion, Prompt

FIRST, SECOND = PolicyVersion(0, 1), PolicyVersion(0, 2)


def problem(first_token, answer):
    return Prompt(f"p{first_token}", np.array([first_token, 5], np.int32), "", answer)


PROBLEMS = [problem(10, "7"), problem(11, "8"), problem(12, "7"), problem(13, "7")]


def answers(prefix, number, is_greedy):
    """Greedy says 7 always, sampling to the first problem only, and once to the last; all talk on behind the box."""
    digit = "7" if is_greedy or prefix[0] == 10 or (prefix[0], number) == (13, 1) else "9"
    return [ord(c) for c in rf"\boxed{{{digit}}}\boxed{{8}}"] + [EOS]


@contextlib.asynccontextmanager
async def evaluating(engine, *, scorer=exact, num_samples=1, timeout_s=10.0, **rules):
    async with open_gate(evaluates=True) as (keeper, gate):
        evaluator = Evaluator(
            engine,
            gate,
            PROBLEMS,
            ascii_settings(**rules),
            scorer=Inline(scorer),
            num_samples=num_samples,
            timeout_s=timeout_s,
        )
        async with running(evaluator.run()):
            yield keeper


async def evaluate(keeper, version):
    await keeper.open(version, evaluate=True, hold_s=60)
    assert keeper.is_held()
    await until(lambda: not keeper.is_held())


async def test_both_accuracies_are_counted_up_to_the_first_stop(capsys):
    engine = ScriptedEngine(script=answers)
    async with evaluating(engine) as keeper:
        await evaluate(keeper, FIRST)
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert event["sampled_accuracy"] == pytest.approx(1 / 4)
    assert event["greedy_accuracy"] == pytest.approx(3 / 4)
    assert (event["version"], event["step"], event["num_problems"]) == ("0.1", 1, 4)
    assert {r.least_step for r in engine.requests} == {1}
    assert {r.max_new_tokens for r in engine.requests} == {20}
    assert sorted({r.sampling.temperature for r in engine.requests}) == [0.0, 0.8]


async def test_every_problem_is_sampled_k_times_and_its_best_sample_counts_as_pass_at_k(capsys):
    engine = ScriptedEngine(script=answers)
    async with evaluating(engine, num_samples=4) as keeper:
        await evaluate(keeper, FIRST)
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert event["num_samples"] == 4
    assert event["sampled_accuracy"] == pytest.approx((4 + 0 + 0 + 1) / 16)
    assert event["pass_at_k"] == pytest.approx(2 / 4)
    assert event["greedy_accuracy"] == pytest.approx(3 / 4)
    runs = Counter((r.sampling.temperature, r.num_runs) for r in engine.requests)
    assert runs == {(0.8, 4): 4, (0.0, 1): 4}


async def test_one_sample_has_no_pass_at_k(capsys):
    async with evaluating(ScriptedEngine(script=answers)) as keeper:
        await evaluate(keeper, FIRST)
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert "pass_at_k" not in event


@pytest.mark.parametrize(
    ("text", "accuracy"), [(r"xyabxyab\boxed{7}", 0.0), (r"xyabcdefxy\boxed{7}", 3 / 4)]
)
async def test_a_response_that_repeats_itself_is_cut_as_in_training(text, accuracy, capsys):
    # twice the same two characters in at most eight tokens, over two segments
    texts = [ord(c) for c in text]
    engine = ScriptedEngine(script=lambda *_: texts)
    async with evaluating(engine) as keeper:
        await evaluate(keeper, FIRST)
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert event["greedy_accuracy"] == pytest.approx(accuracy)


async def test_a_failed_score_counts_as_wrong_and_not_as_left_out(capsys):
    def scorer(response, answer):
        if answer == "8":
            raise LookupError
        return 1.0

    async with evaluating(ScriptedEngine(script=answers), scorer=scorer) as keeper:
        await evaluate(keeper, FIRST)
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert event["sampled_accuracy"] == event["greedy_accuracy"] == pytest.approx(3 / 4)


async def test_the_loop_that_answers_the_gate_is_not_held_up_by_a_slow_scorer(capsys):
    entered, released = threading.Event(), threading.Event()

    def scorer(response, answer):
        entered.set()
        return float(released.wait(10.0))

    async with evaluating(ScriptedEngine(script=answers), scorer=scorer) as keeper:
        await keeper.open(FIRST, evaluate=True, hold_s=60)
        await until(entered.is_set)
        released.set()
        await until(lambda: not keeper.is_held())
    (event,) = events_in(capsys.readouterr().out, "eval")
    assert event["sampled_accuracy"] == event["greedy_accuracy"] == 1.0


@pytest.mark.parametrize("trouble", ["engine failure", "timeout"])
async def test_a_failed_evaluation_lets_the_version_go_and_the_next_one_is_evaluated(
    capsys, trouble
):
    engine = ScriptedEngine(script=answers)
    if trouble == "timeout":
        engine.held = {10: asyncio.Event()}
    else:
        engine.failures = {3: engine_failure()}
    timeout_s = 1.0 if trouble == "timeout" else 10.0
    async with evaluating(engine, timeout_s=timeout_s) as keeper:
        await evaluate(keeper, FIRST)
        engine.held.clear()
        await evaluate(keeper, SECOND)
    events = [e for e in events_in(capsys.readouterr().out) if e["event"] != "spans"]
    assert [(e["event"], e.get("version") or e["step"]) for e in events] == [
        ("alarm", "0.1"),
        ("evaluated", 1),
        ("eval", "0.2"),
        ("evaluated", 2),
    ]
    assert events[0]["alarm"] == "evaluation failed"
