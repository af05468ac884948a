import asyncio

from tests.fakes import running, until
from treepo_async.engine.turns import Turns


async def hold(turn, log, name, release):
    async with turn:
        log.append(name)
        await release.wait()
    log.append(f"{name} left")


async def test_many_share_and_one_is_alone_after_them_and_before_those_who_come_later():
    turns, log = Turns(), []
    sharing, alone, later = asyncio.Event(), asyncio.Event(), asyncio.Event()
    later.set()
    async with (
        running(hold(turns.shared(), log, "a", sharing)),
        running(hold(turns.shared(), log, "b", sharing)),
    ):
        await until(lambda: log == ["a", "b"])
        async with running(hold(turns.alone(), log, "one", alone)) as one:
            await asyncio.sleep(0)
            async with running(hold(turns.shared(), log, "c", later)) as c:
                await asyncio.sleep(0.02)
                assert log == ["a", "b"]
                sharing.set()
                await until(lambda: "one" in log)
                await asyncio.sleep(0.02)
                assert "c" not in log
                alone.set()
                await asyncio.gather(one, c)
    assert log == ["a", "b", "a left", "b left", "one", "one left", "c", "c left"]


async def test_two_who_want_to_be_alone_are_so_one_after_the_other():
    turns, log, go = Turns(), [], asyncio.Event()
    go.set()
    await asyncio.gather(*(hold(turns.alone(), log, name, go) for name in "ab"))
    assert log == ["a", "a left", "b", "b left"]


async def test_whoever_is_cancelled_while_waiting_or_inside_holds_nobody_up():
    turns, log, never, go = Turns(), [], asyncio.Event(), asyncio.Event()
    go.set()
    async with running(hold(turns.shared(), log, "a", never)):
        await until(lambda: log == ["a"])
        async with running(hold(turns.alone(), log, "one", never)):
            await asyncio.sleep(0.02)
    await asyncio.wait_for(hold(turns.shared(), log, "b", go), 5)
    await asyncio.wait_for(hold(turns.alone(), log, "c", go), 5)
    assert log == ["a", "b", "b left", "c", "c left"]
