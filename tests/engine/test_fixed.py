import asyncio

import pytest

from tests.fakes import running
from treepo_async.engine.fixed import VERSION, Deaths, FixedGate
from treepo_async.errors import DeadlineError
from treepo_async.types import PolicyVersion


async def passes(gate):
    async with gate.passage(7) as version:
        return version


async def test_a_request_waits_for_the_gate_and_passes_under_the_one_version():
    gate = FixedGate(timeout_s=5)
    async with running(passes(gate)) as waiting:
        await asyncio.sleep(0.02)
        assert not waiting.done()
        gate.open()
        assert await waiting == VERSION
    assert await passes(gate) == VERSION


@pytest.mark.parametrize("shut", [FixedGate.close, FixedGate.doubt])
async def test_a_gate_that_stays_shut_is_a_deadline_that_names_who_should_have_opened_it(shut):
    gate = FixedGate(timeout_s=0.02)
    gate.open()
    shut(gate)
    with pytest.raises(DeadlineError, match=r"the server to be there again; the keeper"):
        await passes(gate)


async def test_a_doubt_lasts_until_the_gate_is_opened():
    gate = FixedGate(timeout_s=5)
    gate.open()
    assert not gate.is_doubted()
    gate.doubt()
    assert gate.is_doubted()
    gate.open()
    assert not gate.is_doubted()


async def test_no_other_version_is_ever_proven():
    gate = FixedGate(timeout_s=5)
    assert await gate.stands_by(VERSION)
    assert not await gate.stands_by(PolicyVersion(0, 1))


async def test_a_death_is_told_to_all_who_wait_and_to_none_who_come_later():
    deaths = Deaths()
    async with running(deaths.wait()) as first, running(deaths.wait()) as second:
        await asyncio.sleep(0)
        deaths.tell()
        await asyncio.gather(first, second)
        async with running(deaths.wait()) as later:
            await asyncio.sleep(0.02)
            assert not later.done()
