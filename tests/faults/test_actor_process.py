"""The actor as a process, killed in the middle of a tree, and told to end: on a fake SGLang and a real replay."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from tests.fakes import LIMITS, FakeSGLang, loopback, running, serve_replay, until
from treepo_async.cluster.plan import make_plan
from treepo_async.cluster.prepare import make_run_dir
from treepo_async.config.command_line import parse
from treepo_async.config.wiring import EngineAddress
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.replay.entry import State
from treepo_async.tiny.tokenizer import save_tokenizer
from treepo_async.types import PolicyVersion

BATCH = 4
SMALL = ("tree.width=4", "tree.segment_tokens=4", "tree.max_depth=3", "eval.every=0", "actors=1")
START_S = 40.0
GONE_S = 10.0

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
def wiring(tmp_path):
    """Of an actor, but for its addresses."""
    model_dir, run_dir = tmp_path / "model", tmp_path / "run"
    model_dir.mkdir()
    save_tokenizer(model_dir, max_tokens=256)
    sizes = {"vocab_size": LIMITS.vocab_size, "max_position_embeddings": 256}
    (model_dir / "config.json").write_text(json.dumps(sizes))
    config = parse([*SMALL, f"run_dir={run_dir}"])
    make_run_dir(run_dir, config, sizes)
    plan = make_plan(config, run_dir=run_dir, model_dir=model_dir)
    return next(role.wiring for role in plan.roles if role.module == "actor")


@contextlib.asynccontextmanager
async def engine_and_replay(wiring):
    """Gives the fake engine, the replay, and the wiring with their addresses."""
    keeper = GateKeeper(gate := loopback())
    try:
        async with (
            FakeSGLang(latency_s=0.1) as sglang,
            serve_replay(prompts_per_batch=BATCH, lease_timeout_s=600.0) as (server, endpoint),
            running(keeper.serve()),
        ):
            await keeper.open(PolicyVersion(0, 0), evaluate=False, hold_s=0)
            found = replace(
                wiring,
                run_id="run",
                replay_endpoint=endpoint,
                gate_endpoint=gate,
                engine_url=sglang.url,
                engines=(EngineAddress(sglang.url, gate),),
            )
            yield sglang, server, found
    finally:
        keeper.shut()


@contextlib.contextmanager
def actor_process(wiring, tmp_path, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "treepo_async.actor", wiring.to_json()],
        env={**os.environ, **environment},
        stdout=(tmp_path / "actor.log").open("ab"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def states(server):
    return Counter(entry.state for entry in server.queue.order.kept())


async def test_an_actor_killed_in_the_middle_of_a_tree_loses_nothing_that_another_does_not_grow(
    wiring, tmp_path
):
    plan = {
        "log": str(tmp_path / "chaos.log"),
        "points": {"actor.mid_tree": {"act": "kill", "hit": 3}},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    async with engine_and_replay(wiring) as (_, server, wiring):
        with actor_process(wiring, tmp_path, TREEPO_CHAOS=str(tmp_path / "plan.json")) as killed:
            await until(lambda: killed.poll() is not None, timeout_s=START_S)
        assert killed.returncode == -signal.SIGKILL, (tmp_path / "actor.log").read_text()
        assert (tmp_path / "chaos.log").read_text().startswith("actor.mid_tree kill")
        assert states(server) == {State.LEASED: BATCH}, "no part of a tree is there"
        # of the same name, as the driver starts it: its leases are free at once
        with actor_process(wiring, tmp_path):
            await until(lambda: states(server) == {State.ACCEPTED: BATCH}, timeout_s=START_S)
        assert {*server.queue.order.live} == {f"{i:09d}" for i in range(BATCH)}


async def test_an_actor_that_is_told_to_end_hands_its_leases_back_and_ends_well(wiring, tmp_path):
    async with engine_and_replay(wiring) as (sglang, server, wiring):
        sglang.latency_s = 60.0
        with actor_process(wiring, tmp_path) as process:
            await until(lambda: len(sglang.running) >= BATCH, timeout_s=START_S)
            process.terminate()
            async with asyncio.timeout(GONE_S):
                await until(lambda: process.poll() is not None, timeout_s=GONE_S)
            log = (tmp_path / "actor.log").read_text()
            assert process.returncode == 0, log
        assert states(server) == {State.WAITING: BATCH}
        assert server.queue.reasons.total() == 0
        await until(lambda: not sglang.running)
