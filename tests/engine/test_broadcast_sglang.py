"""Broadcasts into a real SGLang, from Megatron ranks and from stages of this process, judged by Hugging Face transformers."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import pytest_asyncio

from tests.fakes import events_in, loopback, running, until
from tests.learner.ranks import Ranks
from tests.oracle import sequence_logprobs, tiny_qwen2
from treepo_async.config.layout import Layout
from treepo_async.engine.broadcast import BroadcastPublications
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.process import free_ports
from treepo_async.types import PolicyVersion
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import BlockingRequester, Requester

START_S, CALL_S = 150.0, 60.0
CLOSE, CLEAR = 1e-4, 0.1
"""Nats: what two float32 implementations may differ by, and what wrong weights do not stay below."""
PROBE = [[7, 3, 99, 12, 4], [64, 2, 2, 31, 8, 8, 100, 5, 27, 33]]
RUN_ID, ENGINE = "run", "engine-0"
BUCKET_BYTES = 2**16
"""So small that the model takes several."""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(2 * START_S),
    pytest.mark.asyncio(loop_scope="module"),
]


@dataclass(frozen=True)
class Case:
    """A learner that offers the weights of a folder until a file says that it may end."""

    layout: Layout
    folder: Path
    endpoint: str
    until: Path


def connect_to(endpoint):
    hello = Hello(name="learner-0", run_id=RUN_ID)
    return BlockingRequester(endpoint, name="learner-0", owner="the desk", hello=hello)


def offer_from_ranks(case):
    """A rank of the learner, its groups open."""
    import torch
    import torch.distributed as dist

    from treepo_async.learner.broadcast import StageBroadcast
    from treepo_async.learner.broadcast_desk import DeskThread
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.control import Control
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.publishers import BroadcastPublisher
    from treepo_async.learner.team import Team
    from treepo_async.weights.desk import Desk
    from treepo_async.weights.store import WeightStore

    learner = build_learner(
        case.folder,
        optimizer=OptimizerSettings(),
        loss=LossSettings(),
        microbatch_tokens=128,
        seed=0,
    )
    control = Control(timeout_s=30.0)
    broadcast = StageBroadcast.open(
        lambda: connect_to(case.endpoint),
        address="127.0.0.1",
        bucket_bytes=BUCKET_BYTES,
        timeout_s=CALL_S,
    )
    team = Team(learner, control, broadcast)
    if dist.get_rank() > 0:
        team.follow()
        broadcast.close()
        return
    desk = DeskThread(Desk("ranks", case.layout.pp, keep_marked=1), case.endpoint, run_id=RUN_ID)
    store = WeightStore(case.until.parent / "weights", keep=2)
    publisher = BroadcastPublisher(store, team, desk, torch.float32, CALL_S)
    publisher.publish(
        PolicyVersion(0, 1), [np.array(ids, np.int32) for ids in PROBE], evaluate=False
    )
    while not case.until.exists():
        team.wait()
        time.sleep(0.1)
    team.stop()
    broadcast.close()
    desk.close()


@dataclass
class House:
    """A host at work on a real server, and what it said."""

    host: Host
    gate: GateClient
    endpoint: str
    models: list
    events: list = field(default_factory=list)

    async def applied(self, version):
        await until(lambda: self.host.applied == version, timeout_s=CALL_S)
        async with self.gate.passage(version.step):
            pass

    async def gap(self, model):
        """Of the engine to Hugging Face's log-probs under a model, in nats."""
        found = await self.host.server.score(PROBE, timeout_s=CALL_S)
        return max(
            np.abs(np.array(a) - judge(model, ids)).max()
            for a, ids in zip(found, PROBE, strict=True)
        )


def judge(model, token_ids):
    return sequence_logprobs(model, token_ids).detach().numpy()


@pytest.fixture(scope="module")
def models():
    """Random models of four layers that share nothing but their shape; version n is model n."""
    return [tiny_qwen2(tied=False, seed=seed).eval() for seed in range(3)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(models, tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    models[0].save_pretrained(base_dir)
    gate_endpoint, endpoint = loopback(), loopback()
    hello = Hello(name=ENGINE, run_id=RUN_ID)
    options = ServerOptions(free_ports(1)[0], "float32", 128, 2048, 8, 512, base_dir / "log")
    async with (
        aiohttp.ClientSession() as session,
        Requester(
            endpoint, name=ENGINE, owner="the learner", hello=hello, resend_s=1.0
        ) as requester,
    ):
        host = Host(
            server=Server(options, session),
            keeper=GateKeeper(gate_endpoint),
            publications=BroadcastPublications(requester, engine=ENGINE, tp=1, timeout_s=CALL_S),
            rules=HostRules(UpdateMode.DRAIN, START_S, CALL_S, CALL_S, CALL_S, 3, 8, CLOSE),
            base_dir=base_dir,
            evaluates=False,
            evaluates_base=False,
        )
        try:
            async with (
                running(host.run()),
                GateClient(gate_endpoint, name="a", evaluates=False, timeout_s=START_S) as gate,
            ):
                async with gate.passage():
                    pass
                yield House(host, gate, endpoint, models)
        finally:
            host.keeper.shut()
            await host.server.stop()


async def test_weights_of_tensor_and_pipeline_parallel_ranks_are_those_that_the_engine_has(
    house, tmp_path
):
    house.models[1].save_pretrained(tmp_path / "model")
    assert await house.gap(house.models[0]) < CLOSE
    done = tmp_path / "done"
    case = Case(Layout.parse("tp2pp2"), tmp_path / "model", house.endpoint, done)
    ranks = Ranks(offer_from_ranks, [case], deadline_s=START_S)
    try:
        await house.applied(PolicyVersion(0, 1))
        assert await house.gap(house.models[1]) < CLOSE
        assert await house.gap(house.models[0]) > CLEAR
    finally:
        done.touch()
        ranks.wait()
    assert len(house.host.server.groups) == 2, "one of each stage"


@dataclass
class Stages:
    """Two pipeline stages of a learner in this process: what they copy, and what is said of it."""

    desk: object
    copies: list

    def offer(self, version, told, sent):
        """Offer a model under a version, and have the stages send another one's tensors."""
        import torch

        from treepo_async.weights.manifest import Manifest, Probe
        from treepo_async.weights.parcel import Parcel

        named = list(sent.state_dict().items())
        half = len(named) // 2
        parts = [
            copies.add(version, share, torch.float32)
            for copies, share in zip(self.copies, (named[:half], named[half:]), strict=True)
        ]
        manifest = Manifest(
            version=str(version),
            tensors={name: info for part in parts for name, info in part.tensors.items()},
            hashes={},
            probe=Probe(PROBE, [judge(told, ids).tolist() for ids in PROBE]),
            evaluate=False,
        )
        self.desk.offer(Parcel(manifest, tuple(part.buckets for part in parts)))


@contextlib.contextmanager
def stages_at(endpoint, name) -> Iterator[Stages]:
    from treepo_async.learner.broadcast_copy import Copies
    from treepo_async.learner.broadcast_desk import DeskThread
    from treepo_async.learner.broadcast_group import Meeting
    from treepo_async.learner.broadcast_sender import Sender
    from treepo_async.weights.desk import Desk

    desk = DeskThread(Desk(name, 2, keep_marked=1), endpoint, run_id=RUN_ID)
    copies = [Copies(BUCKET_BYTES) for _ in range(2)]
    senders = [
        Sender(stage, of, Meeting("127.0.0.1"), lambda: connect_to(endpoint), timeout_s=CALL_S)
        for stage, of in enumerate(copies)
    ]
    try:
        yield Stages(desk, copies)
    finally:
        for sender in senders:
            sender.close()
        desk.close()


async def test_a_learner_that_was_started_anew_opens_groups_of_its_own(house):
    version = PolicyVersion(1, 2)
    with stages_at(house.endpoint, "again") as stages:
        stages.offer(version, told=house.models[2], sent=house.models[2])
        await house.applied(version)
        assert await house.gap(house.models[2]) < CLOSE
        assert house.host.server.is_alive()
        await until(lambda: house.host.publications.has(version) is False)


async def test_tensors_that_are_not_what_was_said_are_refused_and_undone(house, capsys):
    """The control: every count and shape is right, only the numbers are another model's."""
    wrong, right = PolicyVersion(1, 3), PolicyVersion(1, 4)
    before = house.host.server.incarnation
    with stages_at(house.endpoint, "control") as stages:
        stages.offer(wrong, told=house.models[1], sent=house.models[2])
        await until(lambda: house.host.server.incarnation != before, timeout_s=CALL_S)
        assert house.host.applied != wrong
        stages.offer(right, told=house.models[1], sent=house.models[1])
        await house.applied(right)
        assert await house.gap(house.models[1]) < CLOSE
    alarms = [event["detail"] for event in events_in(capsys.readouterr().out, "alarm")]
    assert any("applying 1.3 failed: the probe differs by" in detail for detail in alarms)
