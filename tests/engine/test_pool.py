import asyncio
import contextlib
import random
from collections import Counter

import aiohttp
import numpy as np
import pytest

import treepo_async.engine.client
import treepo_async.engine.pool
from tests.fakes import (
    BASE,
    VOCAB_SIZE,
    FakeSGLang,
    ascii_settings,
    events_in,
    loopback,
    running,
    until,
)
from treepo_async.actor.expand import expand
from treepo_async.engine.client import WARM_TOKENS, EngineClient, SamplingSettings
from treepo_async.engine.fixed import FixedGate
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.pool import EnginePool, Member
from treepo_async.engine.routing import SPILL_REQUESTS, Move, Place
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.types import PolicyVersion, Prompt

SAMPLING = SamplingSettings(0.7, (1,))
PREFIX = [4, 8, 15]
POISON = 66
NEXT = PolicyVersion(0, 1)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.client, "RETRY_S", 0.01)
    monkeypatch.setattr(treepo_async.engine.pool, "PATIENCE_S", 0.3)
    monkeypatch.setattr(treepo_async.engine.pool, "REST_S", 0.3)


class Rig:
    """Fake servers, each with a real gate before it, and a pool over them."""

    def __init__(self, servers, keepers, pool):
        self.servers, self.keepers, self.pool = servers, keepers, pool

    async def extend(self, prefix=PREFIX, *, home=None, num_runs=1, least_step=0, **options):
        place = None if home is None else Place(self.pool.members[home].name, BASE)
        return await self.pool.extend(
            prefix,
            num_runs=num_runs,
            max_new_tokens=4,
            sampling=SAMPLING,
            least_step=least_step,
            home=place,
            **options,
        )

    def served(self):
        return [len(server.bodies("/generate")) for server in self.servers]

    def index(self, completion):
        return [member.name for member in self.pool.members].index(completion.engine)


@contextlib.asynccontextmanager
async def rig(number=2, *, timeout_s=5.0, versions=(), **fake):
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(30))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        servers, keepers, members = [], [], []
        for i in range(number):
            server = await stack.enter_async_context(FakeSGLang(**fake))
            endpoint = loopback()
            keeper = GateKeeper(endpoint)
            stack.callback(keeper.shut)
            await stack.enter_async_context(running(keeper.serve()))
            version = versions[i] if versions else BASE
            server.version = str(version)
            await keeper.open(version, evaluate=False, hold_s=0)
            gate = await stack.enter_async_context(
                GateClient(
                    endpoint, name="actor-0", evaluates=False, timeout_s=20, is_one_of_many=True
                )
            )
            client = EngineClient(
                server.url,
                gate,
                session,
                namespace="run",
                vocab_size=VOCAB_SIZE,
                request_timeout_s=20,
            )
            members.append(Member(server.url, client, gate))
            await until(lambda gate=gate: gate.status().is_open)
            servers.append(server)
            keepers.append(keeper)
        pool = EnginePool(members, timeout_s=timeout_s)
        await stack.enter_async_context(running(pool.watch()))
        yield Rig(servers, keepers, pool)


async def test_a_path_goes_on_where_its_prefix_is():
    async with rig(3) as fleet:
        for home in (2, 0, 1, 2):
            (completion,) = await fleet.extend(home=home)
            assert fleet.index(completion) == home
            assert completion.move is Move.HOME
        assert fleet.served() == [1, 1, 2]


async def test_trees_begin_in_turn_on_idle_engines():
    async with rig(2) as fleet:
        begun = [await fleet.pool.warm(PREFIX, sampling=SAMPLING) for _ in range(2)]
        assert [place.engine for place in begun] == [server.url for server in fleet.servers]
        after = [await fleet.pool.warm(PREFIX, sampling=SAMPLING) for _ in range(4)]
        counts = Counter(place.engine for place in after)
        assert set(counts.values()) == {2}, "each counts as work before it asks"


async def test_however_much_a_tree_asks_at_its_beginning_the_others_still_count():
    async with rig(1) as fleet:
        meter = fleet.pool.members[0].meter
        places = [await fleet.pool.warm(PREFIX, sampling=SAMPLING) for _ in range(3)]
        for _ in range(3):
            await fleet.pool.extend(
                PREFIX, num_runs=1, max_new_tokens=4, sampling=SAMPLING, home=places[0]
            )
        assert set(meter.begun) == {place.reservation for place in places[1:]}


async def test_a_tree_that_its_prompt_takes_to_another_engine_counts_there():
    async with rig(2) as fleet:
        fleet.servers[0].generate_faults.append("drop")
        place = await fleet.pool.warm([5] * WARM_TOKENS, sampling=SAMPLING)
        left, taken = (member.meter.begun for member in fleet.pool.members)
        assert place.engine == fleet.servers[1].url
        assert (set(left), set(taken)) == (set(), {place.reservation})


async def test_runs_count_from_the_moment_their_engine_is_chosen():
    async with rig(2, latency_s=0.1) as fleet:
        found = await asyncio.gather(*(fleet.extend([5 + i], num_runs=2) for i in range(6)))
        served = Counter(fleet.index(c) for completions in found for c in completions)
        assert served == {0: 6, 1: 6}
        assert [(m.meter.own, m.meter.num_own) for m in fleet.pool.members] == [(0, 0)] * 2


async def test_a_tree_begins_where_fewer_requests_run():
    async with rig(2, latency_s=20) as fleet, running(fleet.extend(home=0, num_runs=3)):
        await until(lambda: len(fleet.servers[0].running) == 3)
        begun = await fleet.pool.warm(PREFIX, sampling=SAMPLING)
        assert begun.engine == fleet.servers[1].url


async def test_the_load_of_other_actors_comes_from_the_host():
    async with rig(2) as fleet:
        await fleet.extend(home=0)
        fleet.keepers[0].tell_load(7)
        member = fleet.pool.members[0]
        await until(lambda: member.reading(0, asyncio.get_running_loop().time()).load > 0)
        assert member.meter.num_others == 7
        begun = await fleet.pool.warm(PREFIX, sampling=SAMPLING)
        assert begun.engine == fleet.servers[1].url


async def test_children_of_an_overloaded_engine_spill_and_their_prefix_is_computed_once():
    long = [5] * WARM_TOKENS
    async with rig(2, latency_s=20) as fleet:
        many = int(SPILL_REQUESTS) * 8
        async with running(fleet.extend(home=0, num_runs=many)):
            await until(lambda: len(fleet.servers[0].running) == many)
            meter = fleet.pool.members[0].meter
            meter._mean = meter.own
            fleet.servers[1].latency_s = 0
            completions = await fleet.extend(long, home=0, num_runs=2)
        assert [c.move for c in completions] == [Move.SPILLED] * 2
        asked = [
            b["sampling_params"]["max_new_tokens"] for b in fleet.servers[1].bodies("/generate")
        ]
        assert sorted(asked) == [0, 4, 4]
        assert [c.warmed_tokens for c in completions] == [1, 0]


async def test_a_request_in_an_engine_that_dies_is_sent_again_elsewhere_and_comes_back_when_it_is_there():
    async with rig(2, latency_s=20) as fleet:
        asked = asyncio.ensure_future(fleet.extend(home=0, num_runs=2))
        await until(lambda: len(fleet.servers[0].running) == 2)
        fleet.servers[1].latency_s = 0
        await fleet.keepers[0].close(is_down=True)
        fleet.servers[0]._lost |= fleet.servers[0].running.keys()
        for abort in fleet.servers[0].running.values():
            abort.set()
        completions = await asked
        assert [fleet.index(c) for c in completions] == [1, 1]
        assert [c.move for c in completions] == [Move.MIGRATED] * 2
        (child,) = await fleet.extend(home=0)
        assert (fleet.index(child), child.move) == (1, Move.MIGRATED)
        fleet.servers[0].latency_s = 0
        await fleet.keepers[0].open(BASE, evaluate=False, hold_s=0)
        await until(lambda: fleet.pool.members[0].gate.status().is_open)
        await asyncio.sleep(0.3)
        (child,) = await fleet.extend(home=0)
        assert (fleet.index(child), child.move) == (0, Move.HOME)


async def test_a_prompt_that_kills_servers_kills_two_of_three_and_costs_no_other_request():
    async with rig(3) as fleet:
        deaths, revived = [0] * 3, []

        def die(number):
            deaths[number] += 1
            revived.append(asyncio.ensure_future(revive(number)))

        async def revive(number):
            await asyncio.sleep(0.1)
            await fleet.keepers[number].open(BASE, evaluate=False, hold_s=0)

        for i, server in enumerate(fleet.servers):
            server.dies_of, server.latency_s = POISON, 0.05
            server.on_death = lambda i=i: die(i)
        others = [fleet.extend([5 + i], home=i % 3) for i in range(9)]
        poisoned, *good = await asyncio.gather(
            fleet.extend([POISON], home=0), *others, return_exceptions=True
        )
        assert isinstance(poisoned, EngineError)
        assert not [each for each in good if isinstance(each, BaseException)]
        await asyncio.gather(*revived)
        assert sum(deaths) == 3
        assert sorted(deaths)[0] == 0, f"deaths by engine: {deaths}"


async def test_a_closed_gate_is_waited_at_for_a_while_and_not_again_before_it_opens():
    async with rig(2) as fleet:
        await fleet.keepers[0].close()
        await until(lambda: not fleet.pool.members[0].gate.status().is_open)
        clock = asyncio.get_running_loop().time
        begin = clock()
        (completion,) = await fleet.extend(home=0)
        assert completion.move is Move.MIGRATED
        waited = clock() - begin
        begin = clock()
        await fleet.extend(home=0)
        assert clock() - begin < waited / 2
        await fleet.keepers[0].open(NEXT, evaluate=False, hold_s=0)
        fleet.servers[0].version = str(NEXT)
        await until(lambda: fleet.pool.members[0].admits(1))
        (completion,) = await fleet.extend(home=0)
        assert completion.move is Move.HOME, "other weights are no reason to leave"


async def test_only_engines_whose_weights_are_new_enough_serve():
    async with rig(2, versions=(BASE, NEXT)) as fleet:
        (completion,) = await fleet.extend(home=0, least_step=1)
        assert (fleet.index(completion), completion.submitted) == (1, NEXT)


async def test_with_all_engines_out_the_deadline_names_each_and_how_it_stands():
    async with rig(2, timeout_s=0.5) as fleet:
        await fleet.keepers[0].close(is_down=True)
        await fleet.keepers[1].close()
        await until(lambda: not any(m.gate.status().is_open for m in fleet.pool.members))
        with pytest.raises(DeadlineError) as caught:
            await fleet.extend(home=0)
        said = str(caught.value)
        assert f"{fleet.servers[0].url}: closed at 0.0, its server is down" in said
        assert f"{fleet.servers[1].url}: closed at 0.0" in said


async def test_requests_go_on_as_soon_as_one_of_all_dead_engines_is_back():
    async with rig(2) as fleet:
        for keeper in fleet.keepers:
            await keeper.close(is_down=True)
        await until(lambda: all(m.gate.status().is_down for m in fleet.pool.members))
        asked = asyncio.ensure_future(fleet.extend(home=0))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await fleet.keepers[1].open(BASE, evaluate=False, hold_s=0)
        (completion,) = await asked
        assert fleet.index(completion) == 1


async def test_what_runs_on_an_engine_whose_host_is_silent_is_sent_again_elsewhere(monkeypatch):
    async with rig(2, latency_s=20) as fleet:
        asked = asyncio.ensure_future(fleet.extend(home=0))
        await until(lambda: fleet.servers[0].running)
        fleet.servers[1].latency_s = 0
        gate = fleet.pool.members[0].gate
        monkeypatch.setattr(gate, "_see", lambda _: None)
        monkeypatch.setattr(treepo_async.engine.pool, "SILENT_S", 1.5)
        (completion,) = await asked
        assert (fleet.index(completion), completion.move) == (1, Move.MIGRATED)
        await until(lambda: not fleet.servers[0].running)


async def test_one_bad_answer_moves_nothing_and_failures_in_a_row_do():
    async with rig(2) as fleet:
        fleet.servers[0].generate_faults.append("500")
        (completion,) = await fleet.extend(home=0)
        assert completion.move is Move.HOME
        fleet.servers[0].generate_faults.extend(["500", "garbage"])
        (completion,) = await fleet.extend(home=0)
        assert completion.move is Move.MIGRATED


async def test_a_cancelled_request_is_aborted_in_its_engine_and_is_no_load_any_more():
    async with rig(2, latency_s=20) as fleet:
        async with running(fleet.extend(home=1)):
            await until(lambda: fleet.servers[1].running)
        await until(lambda: not fleet.servers[1].running)
        assert fleet.pool.members[1].meter.own == 0
        assert not fleet.pool.members[1].running


async def test_runs_that_never_began_are_no_load_either():
    async with rig(2, latency_s=20) as fleet:
        async with running(fleet.extend([5] * WARM_TOKENS, num_runs=3, is_cached=False)):
            await until(lambda: fleet.servers[0].running)
            assert fleet.pool.members[0].meter.num_own == 4
        await until(lambda: not fleet.servers[0].running)
        assert fleet.pool.members[0].meter.num_own == 0


async def test_each_engines_requests_and_tokens_are_told(capsys, monkeypatch):
    monkeypatch.setattr(treepo_async.engine.pool, "TELL_S", 0.0)
    async with rig(2) as fleet:
        await fleet.extend(home=1, num_runs=3)
        await until(lambda: all(m.num_requests == 0 for m in fleet.pool.members))
    told = [e for e in events_in(capsys.readouterr().out, "route") if e["num_requests"]]
    assert [(e["engine"], e["num_requests"], e["decoded_tokens"]) for e in told] == [
        (fleet.servers[1].url, 3, 12)
    ]


async def test_a_tree_stays_on_one_engine_and_moves_as_a_whole_when_that_dies():
    prompt = Prompt("p", np.array([70, 71], np.int32), "", "")
    async with rig(2) as fleet:

        async def grow(lease):
            return await expand(
                prompt,
                fleet.pool,
                ascii_settings(),
                random.Random(0),
                lease_id=lease,
                actor="a",
                least_step=0,
            )

        _, cost = await grow("0")
        assert cost.num_children > 0
        assert (cost.num_spilled, cost.num_migrated, cost.moved_tokens) == (0, 0, 0)
        assert sorted(fleet.served())[0] == 0
        busy = 0 if fleet.served()[0] else 1
        fleet.servers[1 - busy].generate_faults.extend([""] * 4 + ["drop"])
        segments, cost = await grow("1")
        assert cost.num_migrated > 0
        assert cost.moved_tokens > 0
        assert len(segments) > 5
        assert min(fleet.served()) > 0


async def test_gates_without_a_host_may_stand_before_the_engines_of_a_pool():
    async with (
        FakeSGLang() as one,
        FakeSGLang() as two,
        aiohttp.ClientSession() as session,
        asyncio.timeout(10),
    ):
        members = []
        for server in (one, two):
            gate = FixedGate(timeout_s=5)
            gate.open()
            client = EngineClient(
                server.url,
                gate,
                session,
                namespace="n",
                vocab_size=VOCAB_SIZE,
                request_timeout_s=5,
                update_mode=None,
            )
            members.append(Member(server.url, client, gate))
        pool = EnginePool(members, timeout_s=5)
        members[0].gate.doubt()
        (completion,) = await pool.extend(
            PREFIX,
            num_runs=1,
            max_new_tokens=4,
            sampling=SAMPLING,
            home=Place(one.url),
        )
        assert (completion.engine, completion.move) == (two.url, Move.MIGRATED)


async def test_a_token_outside_of_the_vocabulary_is_refused_before_anything_is_sent():
    async with rig(2) as fleet:
        with pytest.raises(EngineError, match="token id 128 is outside the vocabulary of 128"):
            await fleet.extend([VOCAB_SIZE], home=0)
        assert fleet.served() == [0, 0]
