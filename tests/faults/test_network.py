"""A network that cuts, delays, breaks and repeats what actors, learner and replay say to each other.

Real sockets, replay, actors' loop and learner's loop in this process, with proxies between them. Each run does all its steps
after the network has healed, which is the progress, and comes out as a run on a whole network.
"""

import asyncio
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.fakes import loopback, running, serve_replay, until
from tests.faults.outcome import judge
from tests.faults.proxy import Proxy
from tests.faults.roles import RUN_ID, lead, run_actor
from tests.faults.steady import RigPlan, expected, prompt_at
from treepo_async.cluster.verify_replay import read_lines, stored_trees, verify_replay
from treepo_async.replay.server import ReplayServer
from treepo_async.wire import options

PLAN = RigPlan(
    num_actors=2,
    concurrent_trees=3,
    tree_s=0.02,
    step_s=0.01,
    prompts_per_batch=2,
    max_staleness=2,
    num_steps=16,
    resend_s=0.1,
)
END_S = 30.0
CUT_S = 0.6
"""Twice as long as a connection lives without a heartbeat."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(90)]


@pytest.fixture(autouse=True)
def quick_heartbeats(monkeypatch):
    """A silent peer is cut within a third of a second."""
    monkeypatch.setattr(options, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(options, "HEARTBEAT_TIMEOUT_MS", 300)


@dataclass
class Net:
    """A run whose actor-0 and learner have a proxy each; actor-1 is on a whole network."""

    folder: Path
    plan: RigPlan
    server: ReplayServer
    actor: Proxy
    learner: Proxy
    actors: list[asyncio.Task[None]]
    done: asyncio.Task[int]

    def steps(self):
        """Steps that the learner has made."""
        return len(read_lines(self.folder / "trained.jsonl"))

    def acks(self, actor=None):
        """What actors were told, all or one of them."""
        names = range(self.plan.num_actors) if actor is None else [actor]
        return [row for i in names for row in read_lines(self.folder / f"acks-actor-{i}.jsonl")]

    def num_sent(self):
        """Trees that actor-0 has sent, each as often as it did."""
        return sum(capture.count(b"PutTree") for capture in self.actor.captures)

    async def reach(self, steps):
        """Until that many steps are made."""
        await until(lambda: self.steps() >= steps, timeout_s=END_S)

    async def finish(self):
        """The rest of the steps; then everything must be as if nothing had happened."""
        assert await asyncio.wait_for(self.done, END_S) == self.plan.num_steps
        # apart, as it runs a loop of its own
        found = await asyncio.to_thread(self._judged)
        assert found.is_whole, found
        assert found.num_updates == self.plan.num_steps, "the learner was never started again"
        verdicts = verify_replay(
            self.folder / "replay", max_staleness=self.plan.max_staleness, acks=()
        )
        assert [v.line() for v in verdicts if not v.holds] == []

    def _judged(self):
        return judge(
            self.acks(),
            read_lines(self.folder / "trained.jsonl"),
            stored=stored_trees(self.folder / "replay"),
            expected=expected(self.plan),
        )


@contextlib.asynccontextmanager
async def network(folder, *, lease_timeout_s=30.0, **changes):
    """A run at work, with two steps done."""
    (folder / "config.json").write_text("{}")
    async with contextlib.AsyncExitStack() as stack:
        server, endpoint = await stack.enter_async_context(
            serve_replay(
                prompt=prompt_at,
                endpoint=loopback(),
                folder=folder / "replay",
                run_id=RUN_ID,
                prompts_per_batch=PLAN.prompts_per_batch,
                max_staleness=PLAN.max_staleness,
                num_batches=replace(PLAN, **changes).num_steps,
                lease_timeout_s=lease_timeout_s,
                max_attempts=100,
            )
        )
        actor = await stack.enter_async_context(Proxy(endpoint))
        learner = await stack.enter_async_context(Proxy(endpoint))
        ports = {"replay": endpoint, "actor-0": actor.endpoint, "learner": learner.endpoint}
        ports = {role: int(address.rpartition(":")[2]) for role, address in ports.items()}
        plan = replace(PLAN, ports=ports, **changes)
        works = [run_actor(folder, plan, f"actor-{i}") for i in range(plan.num_actors)]
        actors = [await stack.enter_async_context(running(work)) for work in works]
        done = asyncio.create_task(asyncio.to_thread(lead, folder, plan, None))
        net = Net(folder, plan, server, actor, learner, actors, done)
        try:
            await net.reach(2)
            yield net
        finally:
            net.learner.heal()
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.shield(done), END_S)


async def test_an_actor_that_was_cut_off_goes_on_when_it_is_back(tmp_path):
    async with network(tmp_path) as net:
        net.actor.partition()
        await asyncio.sleep(CUT_S)
        told = len(net.acks(0))
        assert not net.done.done(), "its leases are waited for"
        net.actor.heal()
        await net.finish()
        assert len(net.acks(0)) > told


async def test_what_an_actor_sends_into_a_hole_is_sent_again(tmp_path):
    async with network(tmp_path) as net:
        net.actor.to_target.block()
        await asyncio.sleep(CUT_S)
        told = len(net.acks(0))
        net.actor.to_target.unblock()
        await net.finish()
        assert len(net.acks(0)) > told


async def test_a_tree_whose_ack_is_lost_is_sent_again_and_stored_once(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "HEARTBEAT_TIMEOUT_MS", 5_000)
    async with network(tmp_path, tree_s=0.1) as net:
        told, num_sent = len(net.acks(0)), net.num_sent()
        net.actor.to_peer.block()
        await until(lambda: net.num_sent() >= num_sent + 4)
        assert len(net.acks(0)) <= told + PLAN.concurrent_trees, "but for what was on its way"
        net.actor.to_peer.unblock()
        await net.finish()
        assert net.num_sent() > len(net.acks(0)) > told


async def test_leases_of_a_cut_off_actor_go_to_another_and_its_late_trees_change_nothing(tmp_path):
    async with network(tmp_path, lease_timeout_s=0.5, tree_s=0.1) as net:
        net.actor.to_target.block()
        steps = net.steps()
        await net.reach(min(steps + 6, PLAN.num_steps - 2))
        reasons = net.server.queue.ledger()
        assert reasons.get("reason/lease_expired", 0) > 0
        net.actor.to_target.unblock()
        await net.finish()


async def test_a_learner_that_was_cut_off_waits_and_goes_on(tmp_path):
    async with network(tmp_path) as net:
        net.learner.partition()
        await asyncio.sleep(CUT_S)
        steps = net.steps()
        await asyncio.sleep(0.2)
        assert net.steps() == steps < PLAN.num_steps, "without replay nothing is trained"
        net.learner.heal()
        await net.finish()


async def test_a_learner_that_hears_nothing_of_replay_for_a_while_trains_nothing_twice(tmp_path):
    async with network(tmp_path) as net:
        net.learner.to_peer.block()
        await asyncio.sleep(CUT_S)
        net.learner.to_peer.unblock()
        await net.finish()


async def test_connections_that_are_reset_again_and_again_lose_nothing(tmp_path):
    async with network(tmp_path) as net:
        num_reset = 0
        for _ in range(5):
            num_reset += net.actor.reset() + net.learner.reset()
            await asyncio.sleep(0.15)
        assert num_reset >= 10
        await net.finish()


@pytest.mark.slow
async def test_on_a_slow_and_uneven_line_everything_arrives(tmp_path):
    async with network(tmp_path, num_steps=6) as net:
        for proxy in (net.actor, net.learner):
            proxy.to_target.bytes_per_s = proxy.to_peer.bytes_per_s = 20_000
            proxy.to_target.jitter_s = proxy.to_peer.jitter_s = 0.05
        await net.finish()


@pytest.mark.slow
async def test_half_a_second_of_latency_costs_time_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "HEARTBEAT_TIMEOUT_MS", 5_000)
    async with network(tmp_path, num_steps=4, resend_s=0.4) as net:
        net.actor.to_target.delay_s = net.actor.to_peer.delay_s = 0.5
        net.learner.to_target.delay_s = 0.1
        await net.finish()


async def test_a_host_that_takes_connections_and_leads_nowhere_is_got_over(tmp_path):
    async with network(tmp_path) as net:
        net.actor.answers = net.learner.answers = False
        net.actor.reset()
        net.learner.reset()
        await asyncio.sleep(CUT_S)
        steps = net.steps()
        assert steps < PLAN.num_steps
        net.actor.heal()
        net.learner.heal()
        # the dead host is back, and knows nothing of what it took
        net.actor.reset()
        net.learner.reset()
        await net.finish()


async def test_a_connection_of_a_former_process_that_is_played_again_is_refused(tmp_path):
    async with network(tmp_path) as net:
        net.actors[0].cancel()
        await asyncio.wait([net.actors[0]])
        captures = [bytes(capture) for capture in net.actor.captures]
        async with running(run_actor(tmp_path, net.plan, "actor-0")):
            told = len(net.acks(0))
            await until(lambda: len(net.acks(0)) > told)
            answers = [await _played(net.actor, capture) for capture in captures * 3]
            assert all(b"fenced" in answer and b"Leased" not in answer for answer in answers)
            await net.finish()


async def _played(proxy, capture):
    """What comes back when a capture is sent once more."""
    async with proxy.played_again(capture) as answer:
        with contextlib.suppress(TimeoutError):
            await until(lambda: b"fenced" in answer, timeout_s=2.0)
        return bytes(answer)
