"""The engine that sleeps, on a clock that jumps."""

import asyncio
import contextlib
import random

import numpy as np
import pytest

from treepo_async.bench.async_service import EOS, GateTally, Service, TimedEngine
from treepo_async.bench.async_virtual import run_virtually
from treepo_async.engine.client import SamplingSettings
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import TreepoError
from treepo_async.types import PolicyVersion

SERVICE = Service(median_tokens=64, tail=10, token_s=0.5, prefill_token_s=0.25, chunk_tokens=4)
SAMPLING = SamplingSettings(temperature=1.0, stop_token_ids=(EOS,))
OLD, NEW = PolicyVersion(0, 0), PolicyVersion(0, 1)


class PlannedGate:
    """Closed during some time, under another version afterwards."""

    def __init__(self, closes_at, opens_at):
        self._closes_at, self._opens_at = closes_at, opens_at

    @contextlib.asynccontextmanager
    async def passage(self, least_step=0, **_):
        now = asyncio.get_running_loop().time()
        if self._closes_at <= now < self._opens_at:
            await asyncio.sleep(self._opens_at - now)
            now = self._opens_at
        yield NEW if now >= self._opens_at else OLD


def extend(mode, gate, *, num_runs=1, max_new_tokens=12, prefix=10):
    """Completions, the time they took, and seconds at the gate."""

    async def work():
        clock = asyncio.get_running_loop().time
        tally = GateTally(clock)
        # a median so long that no path ends by itself
        service = Service(1e6, 10, SERVICE.token_s, SERVICE.prefill_token_s, SERVICE.chunk_tokens)
        engine = TimedEngine(service, gate, mode, 10, random.Random(0), tally, clock)
        found = await engine.extend(
            [7] * prefix, num_runs=num_runs, max_new_tokens=max_new_tokens, sampling=SAMPLING
        )
        return found, clock(), tally.seconds()

    return run_virtually(work())


def test_lengths_have_the_median_and_the_tail_that_were_asked_for():
    rng = random.Random(0)
    lengths = [SERVICE.draw_length(0, rng) for _ in range(20_000)]
    median, high = np.quantile(lengths, [0.5, 0.99])
    assert median == pytest.approx(64, rel=0.05)
    assert high / median == pytest.approx(10, rel=0.1)


def test_a_path_that_got_so_far_is_as_long_as_the_longer_ones_of_all_paths():
    rng = random.Random(0)
    longer = [n for n in (SERVICE.draw_length(0, rng) for _ in range(40_000)) if n > 100]
    drawn = [SERVICE.draw_length(100, rng) for _ in range(10_000)]
    assert min(drawn) > 100
    assert np.median(drawn) == pytest.approx(np.median(longer), rel=0.05)


def test_requests_take_the_time_of_their_tokens_side_by_side():
    found, seconds, at_gate = extend(UpdateMode.DRAIN, PlannedGate(99, 99), num_runs=3)
    assert [len(completion.run) for completion in found] == [12] * 3
    assert (seconds, at_gate) == (pytest.approx(6.0), 0.0)
    assert all(c.run.spans == ((OLD, 12, False),) for c in found)


def test_a_request_waits_for_the_gate_and_its_tree_stands_still():
    found, seconds, at_gate = extend(UpdateMode.DRAIN, PlannedGate(0, 2))
    assert (seconds, at_gate) == (pytest.approx(8.0), pytest.approx(2.0))
    assert found[0].run.spans == ((NEW, 12, False),)


@pytest.mark.parametrize(
    ("mode", "mixed", "seconds"),
    [(UpdateMode.IN_PLACE, True, 6.0 + 3.0), (UpdateMode.RETRACT, False, 6.0 + 3.0 + 14 * 0.25)],
)
def test_a_running_request_sees_new_weights_at_the_end_of_a_chunk(mode, mixed, seconds):
    # four tokens take 2 s, so the first look at the gate finds it closed until 5
    (completion,), took, at_gate = extend(mode, PlannedGate(1, 5))
    assert completion.run.spans == ((OLD, 4, False), (NEW, 8, mixed))
    assert (took, at_gate) == (pytest.approx(seconds), pytest.approx(3.0))


def test_an_engine_is_busy_while_a_request_of_any_tree_runs():
    async def work():
        clock = asyncio.get_running_loop().time
        tally = GateTally(clock)
        service = Service(1e6, 10, SERVICE.token_s, SERVICE.prefill_token_s, SERVICE.chunk_tokens)

        async def tree(*tokens):
            engine = TimedEngine(
                service, PlannedGate(10, 12), UpdateMode.DRAIN, 10, random.Random(0), tally, clock
            )
            for number in tokens:
                await engine.extend([7] * 10, num_runs=2, max_new_tokens=number, sampling=SAMPLING)
                await asyncio.sleep(4)

        # one decodes until 3, from 7 to 8 and from 12 to 13 behind the gate; the other until 5 and from 9 to 12.5
        await asyncio.gather(tree(6, 2, 2), tree(10, 7))
        return tally.take_busy(), tally.take_busy()

    busy, after = run_virtually(work())
    assert busy == [(0, 5), (7, 8), (9, 13)]
    assert after == []


def test_what_runs_is_told_up_to_the_moment_and_never_twice():
    now = iter([1.0, 2.0, 5.0])
    tally = GateTally(lambda: next(now))
    tally.begin_request()
    assert tally.take_busy() == [(1.0, 2.0)]
    tally.end_request()
    assert tally.take_busy() == [(2.0, 5.0)]


def test_a_drained_request_never_sees_new_weights():
    (completion,), took, _ = extend(UpdateMode.DRAIN, PlannedGate(1, 5))
    assert completion.run.spans == ((OLD, 12, False),)
    assert took == pytest.approx(6.0)


def test_a_wait_that_nobody_ends_is_an_error_on_a_clock_that_jumps():
    async def work():
        await asyncio.Event().wait()

    with pytest.raises(TreepoError, match="nothing is due"):
        run_virtually(work())


def test_work_on_a_clock_that_jumps_happens_in_the_order_of_time():
    told = []

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        told.append((seconds, asyncio.get_running_loop().time()))

    async def work():
        await asyncio.gather(sleep(3600), sleep(1), sleep(60))

    run_virtually(work())
    assert told == [(1, 1), (60, 60), (3600, 3600)]
