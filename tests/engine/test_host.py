import asyncio
import contextlib
import shutil
import threading
from dataclasses import dataclass, field, replace

import aiohttp
import pytest

import treepo_async.engine.host
import treepo_async.engine.publications
import treepo_async.engine.vitals
from tests.fakes import (
    BASE,
    VOCAB_SIZE,
    FakeServer,
    FakeSGLang,
    events_in,
    loopback,
    publish_fake,
    until,
)
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.publications import FolderPublications
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import EngineError, WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import published_tensors, verify
from treepo_async.weights.store import WeightStore

FIRST, SECOND, THIRD = (PolicyVersion(0, step) for step in (1, 2, 3))
DRAIN, RETRACT, IN_PLACE = UpdateMode
RULES = HostRules(
    update_mode=DRAIN,
    start_timeout_s=5,
    drain_timeout_s=5,
    update_timeout_s=2,
    eval_timeout_s=60,
    max_restarts=2,
    max_staleness=8,
    gap_alarm=1e-4,
)


class RecordingKeeper(GateKeeper):
    """A keeper that writes its doings between the calls to the server."""

    def __init__(self, endpoint, calls):
        super().__init__(endpoint)
        self.calls = calls

    async def open(self, version, *, evaluate, hold_s):
        self.calls.append(("open", str(version)))
        await super().open(version, evaluate=evaluate, hold_s=hold_s)

    async def close(self, *, is_down=False):
        self.calls.append(("close", None))
        await super().close(is_down=is_down)

    async def drained(self, *, timeout_s):
        in_time = await super().drained(timeout_s=timeout_s)
        self.calls.append(("drained", in_time))
        return in_time


@dataclass
class House:
    """A host on a fake SGLang, and a client at its gate."""

    sglang: FakeSGLang
    server: FakeServer
    host: Host
    gate: GateClient
    task: asyncio.Task
    session: aiohttp.ClientSession

    @property
    def store(self):
        return self.host.publications.store

    async def applied(self, version):
        await until(lambda: self.host.applied == version)
        async with self.gate.passage(least_step=version.step) as open_for:
            assert open_for == version

    async def evaluation_of(self, version):
        async with asyncio.timeout(10):
            assert await self.gate.to_evaluate.get() == version

    def client(self):
        """A client of the server that reads answers as the host updates."""
        return EngineClient(
            self.server.url,
            self.gate,
            self.session,
            namespace="run",
            vocab_size=VOCAB_SIZE,
            request_timeout_s=10,
            update_mode=self.host.rules.update_mode,
        )

    def doings(self):
        """What was done, in order."""
        return [path for path, _ in self.sglang.calls]


@pytest.fixture
def base_dir(tmp_path):
    """The initial model, made the way a publication is."""
    store = WeightStore(tmp_path / "base", keep=1)
    return publish_fake(store, BASE)


@contextlib.asynccontextmanager
async def house(tmp_path, base_dir, *, evaluates=False, evaluates_base=True, **rules):
    endpoint = loopback()
    async with FakeSGLang() as sglang, aiohttp.ClientSession() as session:
        server = FakeServer(sglang, session, tmp_path / "sglang.log")
        keeper = RecordingKeeper(endpoint, sglang.calls)
        host = Host(
            server=server,
            keeper=keeper,
            publications=FolderPublications(WeightStore(tmp_path / "weights", keep=4)),
            rules=replace(RULES, **rules),
            base_dir=base_dir,
            evaluates=evaluates,
            evaluates_base=evaluates_base,
        )
        task = asyncio.create_task(host.run())
        gate = GateClient(endpoint, name="actor-0", evaluates=True, timeout_s=10)
        try:
            async with gate, asyncio.timeout(30):
                async with gate.passage():
                    pass
                yield House(sglang, server, host, gate, task, session)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            keeper.shut()


async def test_a_publication_is_applied_behind_a_closed_gate_in_one_order(
    tmp_path, base_dir, capsys
):
    async with house(tmp_path, base_dir) as it:
        assert it.doings() == ["start", "open"]
        folder = publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        assert it.doings()[2:] == [
            "close",
            "drained",
            "/flush_cache",
            "/update_weights_from_disk",
            "/generate",
            "open",
        ]
        (loaded,) = it.sglang.bodies("/update_weights_from_disk")
        assert loaded == {"model_path": str(folder), "weight_version": "0.1", "flush_cache": True}
        await until(lambda: it.sglang.level == 1.0)
    events = events_in(capsys.readouterr().out)
    assert events[0]["event"] == "ready"
    (weights,) = [event for event in events if event["event"] == "weights"]
    assert (weights["version"], weights["step"]) == ("0.1", 1)
    assert weights["gap"] < 1e-9
    assert weights["pause_s"] >= weights["drain_s"] + weights["load_s"]


@pytest.mark.parametrize("mode", [RETRACT, IN_PLACE])
async def test_requests_live_through_an_update_that_pauses_them(tmp_path, base_dir, mode):
    async with house(tmp_path, base_dir, update_mode=mode) as it:
        it.sglang.latency_s = 1.0
        work = asyncio.create_task(sample(it))
        await until(lambda: it.sglang.running)
        folder = publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        assert it.doings()[2:] == [
            "/generate",
            "close",
            "/pause_generation",
            "/update_weights_from_disk",
            "/continue_generation",
            "/generate",
            "open",
        ]
        assert it.sglang.bodies("/pause_generation") == [mode.value]
        assert it.sglang.bodies("/update_weights_from_disk") == [
            {
                "model_path": str(folder),
                "weight_version": "0.1",
                "flush_cache": mode is RETRACT,
            }
        ]
        assert not work.done()
        spans = (await work).run.spans
        assert [tuple(span) for span in spans] == [(BASE, 2, False), (FIRST, 2, mode is IN_PLACE)]
        assert it.sglang.bodies("/abort_request") == []


async def sample(it):
    sampling = SamplingSettings(1.0, ())
    (completion,) = await it.client().extend(
        [4, 8], num_runs=1, max_new_tokens=4, sampling=sampling
    )
    return completion


@pytest.mark.parametrize("mode", [RETRACT, IN_PLACE])
async def test_no_answer_counts_that_names_weights_which_the_probe_then_refuses(
    tmp_path, base_dir, mode
):
    async with house(tmp_path, base_dir, update_mode=mode) as it:
        it.sglang.ignores_update = True
        it.sglang.latency_s = 0.3
        it.sglang.probe_s = 1.0
        work = asyncio.create_task(sample(it))
        await until(lambda: it.sglang.running)
        publish_fake(it.store, FIRST)
        await until(lambda: len(it.server.starts) == 2)
        asked = it.sglang.bodies("/generate")
        assert not work.done()
        assert not it.sglang.running
        it.sglang.ignores_update = False
        it.sglang.probe_s = 0.0
        spans = (await work).run.spans
        assert [span.policy_version for span in spans] != [BASE, FIRST]
        assert len(it.sglang.bodies("/generate")) > len(asked)
        await it.applied(FIRST)


async def test_the_weights_stay_until_the_last_request_in_flight_is_back(tmp_path, base_dir):
    async with house(tmp_path, base_dir) as it:
        async with it.gate.passage() as version:
            publish_fake(it.store, FIRST)
            await until(lambda: "close" in it.doings())
            await asyncio.sleep(0.3)
            assert version == BASE
            assert it.sglang.level == 0.0
        await it.applied(FIRST)


async def test_requests_that_do_not_end_in_time_are_aborted(tmp_path, base_dir, capsys):
    async with house(tmp_path, base_dir, drain_timeout_s=0.2) as it:
        async with it.gate.passage():
            publish_fake(it.store, FIRST)
            await until(lambda: it.host.applied == FIRST)
        assert it.sglang.bodies("/abort_request") == [{"rid": "", "abort_all": True}]
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["alarm"].startswith("drain timed out")


@pytest.mark.parametrize("damage", ["cut", "flipped", "no manifest", "other shape"])
async def test_a_damaged_publication_never_reaches_the_engine_and_a_later_one_does(
    tmp_path, base_dir, capsys, damage
):
    async with house(tmp_path, base_dir) as it:
        spoiled = WeightStore(tmp_path / "spoiled", keep=4)
        folder = publish_fake(spoiled, FIRST)
        spoil(folder, damage)
        folder.rename(it.store.path(FIRST))
        await until(lambda: FIRST in it.host.refused)
        await asyncio.sleep(0.2)
        assert it.doings() == ["start", "open"]
        publish_fake(it.store, SECOND)
        await it.applied(SECOND)
    alarms = events_in(capsys.readouterr().out, "alarm")
    assert [(a["alarm"], a["version"]) for a in alarms] == [("publication refused", "0.1")]


def spoil(folder, damage):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-4])
    elif damage == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        header = data.replace(b"[2,3]", b"[3,2]")
        assert header != data
        file.write_bytes(header)


@pytest.mark.parametrize(
    ("trouble", "mode"),
    [
        ("refuses_update", DRAIN),
        ("refuses_flush", DRAIN),
        ("refuses_update", RETRACT),
        ("refuses_resume", RETRACT),
        ("refuses_update", IN_PLACE),
        ("refuses_resume", IN_PLACE),
    ],
)
async def test_an_update_that_fails_restarts_the_engine_from_the_last_good_weights(
    tmp_path, base_dir, capsys, trouble, mode
):
    async with house(tmp_path, base_dir, update_mode=mode) as it:
        first = publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        setattr(it.sglang, trouble, True)
        publish_fake(it.store, SECOND)
        await until(lambda: len(it.server.starts) == 2)
        setattr(it.sglang, trouble, False)
        await it.applied(SECOND)
        assert it.server.starts[1] == (first, "0.1")
        begin, end = it.doings().index("open", 2), it.doings().index("start", 1)
        assert it.doings()[begin + 1 : end].count("close") == 2
        assert "open" not in it.doings()[begin + 1 : end], "somebody was let in before the restart"
        if trouble == "refuses_update":
            assert "/continue_generation" not in it.doings()[begin + 1 : end], "weights of no name"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["alarm"] == "engine restarted"
    assert alarm["detail"].startswith("applying 0.2 failed: SGLang")


@pytest.mark.parametrize("mode", UpdateMode)
async def test_weights_that_were_not_loaded_are_found_out_by_the_probe(
    tmp_path, base_dir, capsys, mode
):
    async with house(tmp_path, base_dir, update_mode=mode) as it:
        it.sglang.ignores_update = True
        publish_fake(it.store, FIRST)
        await until(lambda: len(it.server.starts) == 2)
        it.sglang.ignores_update = False
        await it.applied(FIRST)
        assert it.server.starts[1] == (base_dir, "0.0")
        assert ("open", "0.1") not in it.sglang.calls[: it.sglang.calls.index(("start", "0.0"), 1)]
    events = events_in(capsys.readouterr().out)
    (alarm,) = [e for e in events if e["event"] == "alarm"]
    assert "the probe differs by 1 nats" in alarm["detail"]
    assert [e["gap"] < 1e-9 for e in events if e["event"] == "weights"] == [True]


@pytest.mark.parametrize("probe_level", [float("nan"), 1.02])
async def test_a_probe_that_never_fits_ends_the_host_after_its_restarts(
    tmp_path, base_dir, probe_level
):
    async with house(tmp_path, base_dir) as it:
        publish_fake(it.store, FIRST, probe_level=probe_level)
        await until(it.task.done)
        assert len(it.server.starts) == 1 + RULES.max_restarts
        assert ("open", "0.1") not in it.sglang.calls
        with pytest.raises(ExceptionGroup) as caught:
            it.task.result()
    assert caught.group_contains(EngineError, match="gave up after 2 restarts: applying 0.1")


async def test_a_probe_that_differs_a_little_is_alarmed_and_applied(tmp_path, base_dir, capsys):
    async with house(tmp_path, base_dir) as it:
        publish_fake(it.store, FIRST, probe_level=1.0002)
        await it.applied(FIRST)
        assert len(it.server.starts) == 1
    (alarm,) = [e for e in events_in(capsys.readouterr().out) if e["event"] == "alarm"]
    assert alarm["alarm"] == "engine and learner differ on the probe"
    assert alarm["gap"] == pytest.approx(2e-4)


@pytest.mark.parametrize(("alarm", "refused"), [(1e-4, 1e-2), (0.5, 5.0), (8.0, 8.0)])
def test_weights_are_refused_far_above_the_alarm_but_within_what_bfloat16_rounds(alarm, refused):
    assert replace(RULES, gap_alarm=alarm).gap_refused == pytest.approx(refused)


async def test_publications_are_expected_in_the_dtype_of_the_run(tmp_path, base_dir):
    assert {info.dtype for info in published_tensors(base_dir).values()} == {"F32"}
    assert {info.dtype for info in published_tensors(base_dir, "bfloat16").values()} == {"BF16"}
    async with house(tmp_path, base_dir, dtype="bfloat16", max_staleness=0) as it:
        publish_fake(it.store, FIRST)
        await until(it.task.done)
        with pytest.raises(ExceptionGroup) as caught:
            it.task.result()
    assert caught.group_contains(WeightsError, match="dtype='F32'.*dtype='BF16'")


async def test_a_refused_publication_without_which_nobody_can_go_on_ends_the_host(
    tmp_path, base_dir
):
    async with house(tmp_path, base_dir, max_staleness=0) as it:
        folder = publish_fake(it.store, FIRST)
        damage = bytearray((folder / "model.safetensors").read_bytes())
        damage[-1] ^= 1
        # written elsewhere and renamed, as the host may look at any time
        (tmp_path / "damaged").write_bytes(damage)
        (tmp_path / "damaged").rename(folder / "model.safetensors")
        await until(lambda: it.task.done() or it.host.applied == FIRST)
        if it.host.applied == FIRST:
            pytest.skip("the host was faster than the damage")
        with pytest.raises(ExceptionGroup) as caught:
            it.task.result()
    assert caught.group_contains(WeightsError, match="damaged")


async def test_a_server_that_dies_is_started_again_with_the_weights_it_had(
    tmp_path, base_dir, capsys
):
    async with house(tmp_path, base_dir) as it:
        first = publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        it.server.is_running = False
        await until(lambda: len(it.server.starts) == 2)
        assert it.server.starts[1] == (first, "0.1")
        await it.applied(FIRST)
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert "SGLang died\na line of its log" in alarm["detail"]


async def test_a_server_that_dies_while_a_publication_is_verified_is_noticed_at_once(
    tmp_path, base_dir, monkeypatch
):
    verified = threading.Event()

    def slow_verify(*arguments):
        verified.wait(20)
        return verify(*arguments)

    monkeypatch.setattr(treepo_async.engine.publications, "verify", slow_verify)
    async with house(tmp_path, base_dir) as it:
        publish_fake(it.store, FIRST)
        await asyncio.sleep(0.2)
        it.server.is_running = False
        await until(lambda: len(it.server.starts) == 2)
        assert it.host.applied == BASE
        verified.set()
        await it.applied(FIRST)


async def test_a_server_that_keeps_dying_ends_the_host(tmp_path, base_dir):
    async with house(tmp_path, base_dir, max_restarts=1) as it:
        it.server.is_running = False
        await until(lambda: len(it.server.starts) == 2)
        it.server.is_running = False
        await until(it.task.done)
        with pytest.raises(ExceptionGroup) as caught:
            it.task.result()
    assert caught.group_contains(EngineError, match="gave up after 1 restarts: SGLang died")


async def test_restarts_are_forgiven_once_weights_were_applied(tmp_path, base_dir):
    async with house(tmp_path, base_dir, max_restarts=1) as it:
        for number, version in enumerate((FIRST, SECOND, THIRD), start=2):
            it.server.is_running = False
            await until(lambda number=number: len(it.server.starts) == number)
            publish_fake(it.store, version)
            await it.applied(version)


async def test_a_host_tells_every_second_how_its_server_is(tmp_path, base_dir, capsys):
    async with house(tmp_path, base_dir) as it:
        it.sglang.latency_s = 60.0
        work = asyncio.create_task(sample(it))
        await until(lambda: it.sglang.running)
        told = []

        def has_told():
            told.extend(events_in(capsys.readouterr().out, "engine"))
            return any(event["in_flight"] == 1 for event in told)

        await until(has_told)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    assert {event["trouble"] for event in told} == {""}
    assert all(event["num_idle"] <= event["num_samples"] for event in told)


async def test_the_next_version_waits_for_the_evaluation_of_the_one_before(tmp_path, base_dir):
    async with house(tmp_path, base_dir, evaluates=True) as it:
        await it.evaluation_of(BASE)
        await it.gate.evaluated(BASE)
        publish_fake(it.store, FIRST, evaluate=True)
        await it.evaluation_of(FIRST)
        publish_fake(it.store, SECOND)
        publish_fake(it.store, THIRD)
        await asyncio.sleep(0.4)
        assert it.host.applied == FIRST
        await it.gate.evaluated(FIRST)
        await it.applied(THIRD)
        loaded = [b["weight_version"] for b in it.sglang.bodies("/update_weights_from_disk")]
        assert loaded == ["0.1", "0.3"], "the newest one, and none between"


async def test_a_host_that_takes_the_place_of_another_does_not_have_the_first_model_evaluated_again(
    tmp_path, base_dir
):
    async with house(tmp_path, base_dir, evaluates=True, evaluates_base=False) as it:
        publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        assert it.gate.to_evaluate.empty()


async def test_an_evaluation_goes_on_over_the_death_of_the_server(tmp_path, base_dir):
    async with house(tmp_path, base_dir, evaluates=True) as it:
        await it.evaluation_of(BASE)
        it.server.is_running = False
        await until(lambda: len(it.server.starts) == 2)
        publish_fake(it.store, FIRST)
        await asyncio.sleep(0.4)
        assert it.host.applied == BASE
        assert it.gate.to_evaluate.empty()
        await it.gate.evaluated(BASE)
        await it.applied(FIRST)


async def test_a_server_on_which_nothing_is_evaluated_goes_on_to_the_newest_version(
    tmp_path, base_dir
):
    async with house(tmp_path, base_dir, evaluates=False) as it:
        staged = WeightStore(tmp_path / "staged", keep=4)
        folders = [publish_fake(staged, v, evaluate=True) for v in (FIRST, SECOND, THIRD)]
        for folder in reversed(folders):
            folder.rename(it.store.folder / folder.name)
        await it.applied(THIRD)
        await asyncio.sleep(0.2)
        loaded = [b["weight_version"] for b in it.sglang.bodies("/update_weights_from_disk")]
        assert loaded == ["0.3"]
        assert it.gate.to_evaluate.empty()


async def test_a_server_whose_weights_are_gone_begins_anew_from_the_initial_model(
    tmp_path, base_dir
):
    async with house(tmp_path, base_dir) as it:
        publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        shutil.rmtree(it.store.path(FIRST))
        it.server.is_running = False
        await until(lambda: len(it.server.starts) == 2)
        assert it.server.starts[1] == (base_dir, "0.0")
        publish_fake(it.store, SECOND)
        await it.applied(SECOND)
        assert len(it.server.starts) == 2


async def test_the_driver_hears_how_often_the_server_had_nothing_to_do(
    tmp_path, base_dir, capsys, monkeypatch
):
    monkeypatch.setattr(treepo_async.engine.vitals, "SAMPLE_S", 0.03)
    async with house(tmp_path, base_dir) as it:
        it.sglang.running["somebody"] = asyncio.Event()
        await asyncio.sleep(0.4)
        it.sglang.running.clear()
        await asyncio.sleep(0.4)
    shares = [
        e["num_idle"] / e["num_samples"] for e in events_in(capsys.readouterr().out, "engine")
    ]
    assert min(shares) == 0
    assert shares[-1] == 1


async def test_an_engine_that_only_evaluates_passes_over_all_other_versions(tmp_path, base_dir):
    rules = {"evaluates": True, "evaluates_base": False, "grows_trees": False}
    async with house(tmp_path, base_dir, **rules) as it:
        publish_fake(it.store, FIRST)
        publish_fake(it.store, SECOND, evaluate=True)
        publish_fake(it.store, THIRD)
        await it.evaluation_of(SECOND)
        await it.gate.evaluated(SECOND)
        await asyncio.sleep(0.3)
        loaded = [body["weight_version"] for body in it.sglang.bodies("/update_weights_from_disk")]
        assert loaded == ["0.2"]
        assert it.host.applied == SECOND


async def test_where_no_tree_is_grown_a_refused_publication_ends_nothing(
    tmp_path, base_dir, capsys
):
    rules = {"evaluates": True, "evaluates_base": False, "grows_trees": False, "max_staleness": 0}
    async with house(tmp_path, base_dir, **rules) as it:
        spoiled = publish_fake(WeightStore(tmp_path / "spoiled", keep=4), SECOND, evaluate=True)
        spoil(spoiled, "cut")
        spoiled.rename(it.store.path(SECOND))
        await until(lambda: SECOND in it.host.refused)
        publish_fake(it.store, THIRD, evaluate=True)
        await it.evaluation_of(THIRD)
        assert not it.task.done()
    alarms = [e["alarm"] for e in events_in(capsys.readouterr().out, "alarm")]
    assert alarms == ["publication refused"]


async def test_the_time_of_a_server_is_booked_by_its_requests_and_its_updates(
    tmp_path, base_dir, monkeypatch, capsys
):
    monkeypatch.setattr(treepo_async.engine.vitals, "SAMPLE_S", 0.01)
    async with house(tmp_path, base_dir) as it:
        it.sglang.running["somebody"] = asyncio.Event()
        await asyncio.sleep(0.2)
        it.sglang.running.clear()
        publish_fake(it.store, FIRST)
        await it.applied(FIRST)
        await asyncio.sleep(0.2)
    out = capsys.readouterr().out
    told = events_in(out, "ledger")
    seconds = {
        name: sum(event["seconds"].get(name, 0.0) for event in told)
        for name in ("compute", "sync", "idle")
    }
    assert sum(seconds.values()) == pytest.approx(told[-1]["end"] - told[0]["begin"], rel=1e-3)
    assert seconds["compute"] > 0.1
    assert seconds["idle"] > 0.1
    (applied,) = events_in(out, "weights")
    assert seconds["sync"] == pytest.approx(applied["pause_s"], rel=0.2, abs=0.01)
    rows = [row for event in events_in(out, "spans") for row in event["rows"]]
    parts = {name: begin for track, name, _, begin, *_ in rows if track == "server"}
    assert parts["update"] <= parts["drain"] < parts["load"] < parts["probe"]


@dataclass(frozen=True)
class Deaf(FolderPublications):
    """Those of a learner that hears nothing before `hears` is set."""

    hears: asyncio.Event
    loads: bool
    told: list[str] = field(default_factory=list)

    async def load(self, server, version, **options):
        if not self.loads:
            raise WeightsError("not sent")
        return await super().load(server, version, **options)

    async def loaded(self, version, error):
        await self.hears.wait()
        self.told.append(error)


@pytest.mark.parametrize("mode", [DRAIN, RETRACT])
async def test_after_an_update_that_was_not_begun_requests_do_not_wait_until_the_learner_hears_of_it(
    tmp_path, base_dir, mode
):
    async with house(tmp_path, base_dir, update_mode=mode) as it:
        it.host.publications = deaf = Deaf(it.store, asyncio.Event(), loads=False)
        publish_fake(it.store, FIRST)
        await until(lambda: it.doings().count("open") == 2)
        async with it.gate.passage():
            assert (deaf.told, it.sglang.paused) == ([], "")
        deaf.hears.set()
        await until(lambda: deaf.told)
        assert deaf.told[0] == "not sent"


async def test_a_server_is_started_again_while_the_learner_is_told_why(tmp_path, base_dir):
    async with house(tmp_path, base_dir) as it:
        it.host.publications = deaf = Deaf(it.store, asyncio.Event(), loads=True)
        it.sglang.refuses_update = True
        publish_fake(it.store, FIRST)
        await until(lambda: it.doings().count("open") == 2)
        assert (deaf.told, len(it.server.starts)) == ([], 2)
        it.sglang.refuses_update = False
        deaf.hears.set()
        await it.applied(FIRST)
        await until(lambda: len(deaf.told) == 2)
        assert "applying 0.1 failed" in deaf.told[0]
        assert deaf.told[1] == ""
