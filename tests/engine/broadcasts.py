"""A broadcast without tensors: an SGLang whose weights are one number takes buckets, a stage notes what it is told to send."""

import asyncio
import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp

from tests.engine.test_host import RULES, RecordingKeeper
from tests.fakes import (
    BASE,
    FakeServer,
    FakeSGLang,
    fake_logprob,
    fake_tensors,
    loopback,
    publish_fake,
    running,
    until,
)
from treepo_async.engine.broadcast import BroadcastPublications
from treepo_async.engine.gate import GateClient
from treepo_async.engine.host import Host
from treepo_async.errors import EngineError
from treepo_async.learner.broadcast_desk import DeskThread
from treepo_async.weights.desk import Desk
from treepo_async.weights.manifest import Manifest, Probe
from treepo_async.weights.parcel import Parcel
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import AskSend, Hello, SendWeights
from treepo_async.wire.sockets import Requester

NUM_STAGES = 2


def parcel_of(version, *, level=None, evaluate=False, tensors=None):
    """Weights whose level is the version's step, in two buckets of the first stage's and none of the second's."""
    proven = float(version.step) if level is None else level
    token_ids = [[2, 3, 5, 7], [11, 13, 17]]
    found = tensors or {t.name: t.info for t in fake_tensors(0.0)}
    manifest = Manifest(
        version=str(version),
        tensors=found,
        hashes={},
        probe=Probe(token_ids, [[fake_logprob(t, proven) for t in ids[1:]] for ids in token_ids]),
        evaluate=evaluate,
    )
    return Parcel(manifest, (tuple((name,) for name in found), ()))


class BroadcastServer(FakeServer):
    """A server that has what the last bucket of a version says; its troubles are used up one an update."""

    def __init__(self, fake, session, log_file):
        super().__init__(fake, session, log_file)
        self.troubles = []

    async def start(self, model_dir, weight_version, *, timeout_s):
        self.incarnation = f"start {len(self.starts)}"
        self.groups.clear()
        return await super().start(model_dir, weight_version, timeout_s=timeout_s)

    async def join_group(self, name, address, port, *, tp, timeout_s):
        self.fake.calls.append(("join", name))
        self.groups.add(name)

    async def begin_update(self, *, timeout_s):
        self.fake.calls.append(("begin", None))

    async def receive_bucket(self, group, names, dtypes, shapes, *, weight_version, **options):
        self.fake.calls.append(("bucket", (group, tuple(names), tuple(dtypes), options["flush"])))
        assert group in self.groups
        match self.troubles.pop(0) if self.troubles else "":
            case "refused":
                raise EngineError("SGLang: Connection reset by peer")
            case "frozen":
                await asyncio.sleep(60)
            case "other":
                self.fake.level += 0.5
            case _:
                self.fake.level = float(weight_version.split(".")[1])
        self.fake.version = weight_version

    async def end_update(self, *, timeout_s):
        self.fake.calls.append(("end", None))


@dataclass
class House:
    """A host that is sent weights, and the desk that offers them."""

    sglang: FakeSGLang
    server: BroadcastServer
    host: Host
    gate: GateClient
    endpoint: str
    orders: list[SendWeights] = field(default_factory=list)
    """What the stages were told to send."""
    desk: DeskThread | None = None

    def open_desk(self, name="desk"):
        self.desk = DeskThread(Desk(name, NUM_STAGES, keep_marked=1), self.endpoint, run_id="run")

    async def close_desk(self):
        await asyncio.to_thread(self.desk.close)
        self.desk = None

    async def applied(self, version):
        await until(lambda: self.host.applied == version)
        async with self.gate.passage(least_step=version.step) as open_for:
            assert open_for == version

    def doings(self):
        return [path for path, _ in self.sglang.calls]

    async def send(self, stage):
        """A stage that begins every order at once."""
        hello, done = Hello(name=f"rank-{stage}", run_id="run"), 0
        async with Requester(
            self.endpoint, name=hello.name, owner="the desk", hello=hello, resend_s=0.3
        ) as desk:
            while True:
                ask = AskSend(stage=stage, address="here", port=1 + stage, done=done, wait_s=0.2)
                answer, _ = await desk.ask(ask, timeout_s=30, wait="an order")
                if isinstance(answer, SendWeights):
                    self.orders.append(answer)
                    done = answer.order
                elif self.desk is None:
                    done = 0


@contextlib.asynccontextmanager
async def house(tmp_path: Path, *, evaluates=False, timeout_s=2.0, **rules):
    """A host on the initial model, with a desk that offers nothing yet."""
    base_dir = publish_fake(WeightStore(tmp_path / "base", keep=1), BASE)
    gate_endpoint, endpoint = loopback(), loopback()
    hello = Hello(name="engine-0", run_id="run")
    async with (
        FakeSGLang() as sglang,
        aiohttp.ClientSession() as session,
        Requester(
            endpoint, name="engine-0", owner="the learner", hello=hello, resend_s=0.3
        ) as requester,
    ):
        server = BroadcastServer(sglang, session, tmp_path / "sglang.log")
        keeper = RecordingKeeper(gate_endpoint, sglang.calls)
        host = Host(
            server=server,
            keeper=keeper,
            publications=BroadcastPublications(
                requester, engine="engine-0", tp=1, timeout_s=timeout_s
            ),
            rules=replace(RULES, **rules),
            base_dir=base_dir,
            evaluates=evaluates,
            evaluates_base=False,
        )
        gate = GateClient(gate_endpoint, name="actor-0", evaluates=True, timeout_s=20)
        it = House(sglang, server, host, gate, endpoint)
        it.open_desk()
        try:
            async with (
                running(host.run()),
                running(it.send(0)),
                running(it.send(1)),
                gate,
                asyncio.timeout(40),
            ):
                async with gate.passage():
                    pass
                yield it
        finally:
            keeper.shut()
            if it.desk is not None:
                await it.close_desk()
