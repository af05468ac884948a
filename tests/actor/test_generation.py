"""The stand-alone loop: every prompt ends once, whatever the engine does."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import pytest

import treepo_async.actor.generation
from tests.fakes import (
    BASE,
    FakeServer,
    FakeSGLang,
    ScriptedEngine,
    ascii_settings,
    engine_failure,
    publish_fake,
    running,
    scoring_by,
    until,
)
from treepo_async.actor.generation import Generation
from treepo_async.actor.grow import Grower
from treepo_async.actor.job import Job
from treepo_async.actor.output import Output
from treepo_async.actor.tally import Tally
from treepo_async.data.source import Skipped
from treepo_async.engine.client import EngineClient
from treepo_async.engine.fixed import Deaths, FixedGate
from treepo_async.engine.kept import KeptEngine
from treepo_async.errors import TreepoError, WeightsError
from treepo_async.types import Prompt
from treepo_async.weights.store import WeightStore
from treepo_async.wire.tree_file import TreeFile

POISON = 77


@pytest.fixture(autouse=True)
def _without_back_off(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.generation, "BACK_OFF_S", 0.0)


def prompt_of(number, *tokens):
    ids = np.array(tokens or [10 + number, 7], np.int32)
    return Prompt(f"p-{number}", ids, f"problem {number}", "1")


def prompts(number):
    return [prompt_of(i) for i in range(number)]


@dataclass
class StillEngine:
    """A `FixedEngine` around a scripted one: nothing dies by itself."""

    url: str = ""
    gate: FixedGate = field(default_factory=lambda: FixedGate(timeout_s=5))
    deaths: Deaths = field(default_factory=Deaths)
    num_restarts: int = 0
    num_delivered: int = 0
    weights_change_after: int = 10**6

    async def confirm(self):
        if self.num_delivered >= self.weights_change_after:
            raise WeightsError("other weights")

    def delivered(self):
        self.num_delivered += 1

    def on_trial(self):
        return contextlib.nullcontext()


@contextlib.contextmanager
def generation(tmp_path, source, engine, *, still=None, max_failed=16, **options):
    job = Job({"out_form": "trees"})
    output = Output(
        tmp_path / "o.jsonl",
        job,
        str,
        overwrite=False,
        retry_failed=options.pop("retry_failed", False),
    )
    scoring = scoring_by(lambda response, _: float(len(response) % 2))
    grower = Grower("standalone", engine, ascii_settings(), scoring, seed=0)
    try:
        yield Generation(
            source,
            options.pop("limit", None),
            grower,
            still or StillEngine(),
            output,
            Tally(len(source), asyncio.get_running_loop().time),
            max_failed,
        )
    finally:
        output.close()


def written(tmp_path):
    file = TreeFile(tmp_path / "o.jsonl")
    return [file.tree(i) for i in range(len(file))]


def ids(trees):
    return [tree.prompt.id for tree in trees]


async def test_every_prompt_gets_its_tree_once(tmp_path):
    with generation(tmp_path, prompts(7), ScriptedEngine()) as work:
        await work.run(concurrent_trees=3)
        assert (work.tally.done, work.tally.ended) == (7, 7)
    trees = written(tmp_path)
    assert sorted(ids(trees)) == [f"p-{i}" for i in range(7)]
    leases = {tree.prompt.id: tree.provenance.lease_id for tree in trees}
    assert leases == {f"p-{i}": f"{i:09d}" for i in range(7)}, "as in a run over the same prompts"


async def test_one_at_a_time_they_stand_in_the_order_of_the_data(tmp_path):
    with generation(tmp_path, prompts(5), ScriptedEngine()) as work:
        await work.run(concurrent_trees=1)
    assert ids(written(tmp_path)) == [f"p-{i}" for i in range(5)]


async def test_only_what_has_not_ended_is_grown_and_under_the_same_lease_id(tmp_path):
    with generation(tmp_path, prompts(6), ScriptedEngine(), limit=2) as work:
        await work.run(concurrent_trees=1)
    engine = ScriptedEngine()
    with generation(tmp_path, prompts(6), engine) as work:
        await work.run(concurrent_trees=2)
    assert {request.prefix[0] for request in engine.requests} == {12, 13, 14, 15}
    assert sorted(ids(written(tmp_path))) == [f"p-{i}" for i in range(6)]


async def test_a_record_without_a_prompt_is_skipped_with_its_reason(tmp_path):
    source = [prompt_of(0), Skipped("p-1", "too long"), prompt_of(2)]
    for _ in range(2):
        with generation(tmp_path, source, ScriptedEngine()) as work:
            await work.run(concurrent_trees=2)
            (ending,) = work.output.endings.by_id.values()
    assert (ending.prompt_id, ending.outcome, ending.reason) == ("p-1", "skipped", "too long")
    assert sorted(ids(written(tmp_path))) == ["p-0", "p-2"]


async def test_a_prompt_that_fails_is_tried_again(tmp_path):
    engine = ScriptedEngine(failures={0: engine_failure(), 1: engine_failure()})
    with generation(tmp_path, prompts(2), engine) as work:
        await work.run(concurrent_trees=1)
        assert (work.tally.errors, work.tally.failed, work.tally.done) == (2, 0, 2)


async def test_a_prompt_that_always_fails_ends_with_its_reason_and_the_work_goes_on(tmp_path):
    engine = ScriptedEngine(failures={call: engine_failure() for call in range(3)})
    with generation(tmp_path, prompts(3), engine) as work:
        await work.run(concurrent_trees=1)
        (ending,) = work.output.endings.by_id.values()
        assert (work.tally.done, work.tally.failed) == (2, 1)
    assert (ending.prompt_id, ending.outcome) == ("p-0", "failed")
    assert ending.reason.startswith("3 attempts, the last: EngineError: no completion")
    assert ids(written(tmp_path)) == ["p-1", "p-2"]


async def test_a_failed_prompt_is_left_alone_unless_it_shall_be_tried_again(tmp_path):
    engine = ScriptedEngine(failures={call: engine_failure() for call in range(3)})
    with generation(tmp_path, prompts(2), engine) as work:
        await work.run(concurrent_trees=1)
    idle = ScriptedEngine()
    with generation(tmp_path, prompts(2), idle) as work:
        await work.run(concurrent_trees=1)
    assert idle.requests == []
    with generation(tmp_path, prompts(2), ScriptedEngine(), retry_failed=True) as work:
        await work.run(concurrent_trees=1)
        assert work.output.endings.by_id == {}
    assert sorted(ids(written(tmp_path))) == ["p-0", "p-1"]


async def test_when_prompt_after_prompt_fails_the_work_ends_and_says_how_to_go_on(tmp_path):
    engine = ScriptedEngine(failures={call: engine_failure() for call in range(100)})
    with generation(tmp_path, prompts(9), engine, max_failed=3) as work:
        with pytest.raises(TreepoError, match=r"3 prompts in a row failed .*retry_failed=true"):
            await work.run(concurrent_trees=1)
        assert work.tally.failed == 3


async def test_a_tree_in_between_makes_failures_no_row(tmp_path):
    # each failing prompt uses three calls; the trees between them a few
    def failing(prefix, number, is_greedy):
        if prefix[0] % 2:
            raise engine_failure()
        return [50, 51, 52, 1]

    with generation(tmp_path, prompts(8), ScriptedEngine(failing), max_failed=2) as work:
        await work.run(concurrent_trees=1)
        assert (work.tally.done, work.tally.failed) == (4, 4)


async def test_no_tree_of_other_weights_is_written(tmp_path):
    still = StillEngine(weights_change_after=2)
    with (
        generation(tmp_path, prompts(5), ScriptedEngine(), still=still) as work,
        pytest.raises(WeightsError),
    ):
        await work.run(concurrent_trees=1)
    assert ids(written(tmp_path)) == ["p-0", "p-1"]


# ------------------------------------------------------------------ an engine that dies


@contextlib.asynccontextmanager
async def mortal(tmp_path, source, *, max_restarts=3, **options):
    """A generation on a server that a prompt can kill, with a keeper that starts it again."""
    folder = publish_fake(WeightStore(tmp_path / "weights", keep=1), BASE)
    async with (
        FakeSGLang(dies_of=POISON, latency_s=0.02) as fake,
        aiohttp.ClientSession() as session,
        asyncio.timeout(40),
    ):
        server = FakeServer(fake, session, tmp_path / "sglang.log")
        engine = KeptEngine(server, folder, start_timeout_s=5, max_restarts=max_restarts)
        client = EngineClient(
            engine.url,
            engine.gate,
            session,
            namespace="n",
            vocab_size=128,
            request_timeout_s=10,
            update_mode=None,
        )
        await engine.start()
        with generation(tmp_path, source, client, still=engine, **options) as work:
            async with running(engine.watch()):
                yield work, server


async def test_a_prompt_that_kills_the_server_fails_alone_and_costs_no_other_its_tree(tmp_path):
    source = prompts(8)
    source[3] = prompt_of(3, POISON, 7)
    async with mortal(tmp_path, source) as (work, server):
        await work.run(concurrent_trees=4)
        (ending,) = work.output.endings.by_id.values()
        assert (work.tally.done, work.tally.failed) == (7, 1)
    assert ending.prompt_id == "p-3"
    assert "the engine died while the tree was being grown" in ending.reason
    assert len(server.starts) == 1 + 3, "three attempts"


async def test_any_number_of_such_prompts_is_found(tmp_path):
    source = prompts(9)
    for number in (1, 4, 6):
        source[number] = prompt_of(number, POISON, number)
    async with mortal(tmp_path, source) as (work, _):
        await work.run(concurrent_trees=3)
        assert sorted(work.output.endings.by_id) == ["p-1", "p-4", "p-6"]
    assert len(written(tmp_path)) == 6


async def test_prompts_that_kill_the_server_use_up_no_restarts_while_they_are_alone(tmp_path):
    source = [prompt_of(0, POISON, 1), prompt_of(1, POISON, 2), prompt_of(2)]
    async with mortal(tmp_path, source, max_restarts=1) as (work, server):
        await work.run(concurrent_trees=2)
        assert sorted(work.output.endings.by_id) == ["p-0", "p-1"]
    assert ids(written(tmp_path)) == ["p-2"]
    assert len(server.starts) == 1 + 1 + 2 + 2, "both at once, then each twice alone"


async def test_a_prompt_that_failed_makes_earlier_restarts_forgotten(tmp_path):
    source = [prompt_of(number, POISON, number) for number in range(3)]
    async with mortal(tmp_path, source, max_restarts=1) as (work, _):
        await work.run(concurrent_trees=1)
        assert sorted(work.output.endings.by_id) == ["p-0", "p-1", "p-2"]


async def test_a_server_killed_from_outside_costs_no_prompt(tmp_path):
    async with mortal(tmp_path, prompts(40)) as (work, server):
        async with running(work.run(concurrent_trees=4)) as run:
            for number, done in ((2, 2), (3, 5)):
                await until(lambda n=done: work.tally.done >= n)
                server.die()
                await until(lambda n=number: len(server.starts) == n)
            await run
        assert (work.tally.done, work.tally.failed) == (40, 0)
        assert len(server.starts) == 3, "trees were being grown when it died"
    assert len(written(tmp_path)) == 40
