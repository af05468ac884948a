import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from treepo_async.cluster.plan import make_plan
from treepo_async.cluster.prepare import make_run_dir
from treepo_async.cluster.role import RoleHost, check_cores, visible_gpus
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError
from treepo_async.tiny.tokenizer import save_tokenizer
from treepo_async.wire.hello import hello_of
from treepo_async.wire.messages import Ack
from treepo_async.wire.sockets import Requester

SOON_S = 30.0


@pytest.fixture
def spec(tmp_path):
    """Of a replay that can run: a model folder without weights is all that it needs."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    save_tokenizer(model_dir, max_tokens=512)
    sizes = {"vocab_size": 128, "max_position_embeddings": 512}
    (model_dir / "config.json").write_text(json.dumps(sizes))
    config = Config(run_dir=str(tmp_path / "run"))
    run_dir = tmp_path / "run"
    make_run_dir(run_dir, config, sizes)
    plan = make_plan(config, run_dir=run_dir, model_dir=model_dir)
    return next(role for role in plan.roles if role.module == "replay")


@pytest.fixture
def hosted(tmp_path):
    """Hosts as plain objects; what they started is stopped after the test."""
    hosts = []

    def host(spec):
        hosts.append(RoleHost(spec, tmp_path / f"{len(hosts)}.log"))
        return hosts[-1]

    yield host
    for each in hosts:
        each.stop(1.0)


def reports_until(host, holds):
    """All events up to the report for which `holds`, and that report."""
    events, deadline = [], time.monotonic() + SOON_S
    while time.monotonic() < deadline:
        report = host.report()
        events += report.events
        if holds(report):
            return events, report
        time.sleep(0.05)
    raise AssertionError(f"not in {SOON_S} s: {host.report()}")


def has_ended(report):
    return report.exit_code is not None


def test_a_role_that_is_not_there_ends_with_its_last_words(spec, hosted, tmp_path):
    host = hosted(replace(spec, module="no_such_role"))
    pid = host.start()
    events, report = reports_until(host, has_ended)
    assert pid > 1
    assert (events, report.exit_code) == ([], 1)
    assert report.tail.endswith("No module named treepo_async.no_such_role")
    assert (tmp_path / "0.log").read_text().rstrip("\n").endswith(report.tail)


def test_a_role_that_fails_leaves_its_traceback(spec, hosted):
    host = hosted(replace(spec, wiring=replace(spec.wiring, model_dir="/nowhere")))
    host.start()
    _, report = reports_until(host, has_ended)
    assert report.exit_code == 1
    assert "FileNotFoundError" in report.tail
    assert "/nowhere/config.json" in report.tail


@pytest.mark.parametrize(
    ("inherited", "named"),
    [(None, "0,1"), ("3,5", "3,5"), ("GPU-8f3a, MIG-7b/1/0", "GPU-8f3a,MIG-7b/1/0")],
)
def test_shared_gpus_are_named_among_those_that_the_host_sees(inherited, named):
    assert visible_gpus((0, 1), inherited) == {"CUDA_VISIBLE_DEVICES": named}
    assert visible_gpus((), inherited) == {}, "it has those of its host"


@pytest.mark.parametrize("inherited", ["3", "", " "])
def test_more_gpus_than_the_host_sees_are_refused(inherited):
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES={inherited} names .* GPU 1"):
        visible_gpus((0, 1), inherited)


def test_cores_that_a_node_has_not_are_refused_by_key_and_number_before_anything_starts(
    spec, hosted
):
    host = hosted(replace(spec, module="engine", cores=frozenset({0, 4096})))
    with pytest.raises(ConfigError, match=r"engine\.cores names 4096, of which node"):
        host.start()
    assert host.stop(1.0) is None, "there is no process"
    check_cores("engine", frozenset({2, 3}), {1, 2, 3})


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ({"cores": frozenset({4096})}, r"engine\.cores names 4096"),
        ({"shared_gpus": (1,)}, "CUDA_VISIBLE_DEVICES=GPU-9 names 1 GPUs"),
    ],
)
def test_what_a_node_has_not_is_refused_when_a_host_is_told_what_to_start(
    spec, hosted, monkeypatch, lacking, said
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-9")
    with pytest.raises(ConfigError, match=said):
        hosted(spec).take(replace(spec, module="engine", **lacking))


def test_who_asks_again_for_a_start_has_the_process_that_runs(spec, hosted):
    host = hosted(spec)
    assert host.start() == host.start()


def test_a_role_reports_its_events_serves_and_stops_in_order(spec, hosted, tmp_path, monkeypatch):
    async def greet(endpoint):
        async with Requester(endpoint, name="test", owner="replay") as replay:
            return await replay.ask(
                hello_of(spec.wiring), timeout_s=SOON_S, wait="replay to come up"
            )

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a,GPU-9")
    host = hosted(replace(spec, shared_gpus=(1,)))
    pid = host.start()
    events, report = reports_until(host, lambda report: {"event": "ready"} in report.events)
    assert events.count({"event": "ready"}) == 1
    assert report.exit_code is None
    again, _ = reports_until(host, lambda report: report.events)
    assert again, "it goes on telling"
    assert {"event": "ready"} not in again, "each event is reported once"
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"TREEPO_ROLE=replay-0" in environment
    assert b"CUDA_VISIBLE_DEVICES=GPU-9" in environment
    assert isinstance(asyncio.run(greet(spec.wiring.replay_endpoint))[0], Ack)
    assert host.stop(10.0) == 0
    assert host.report().exit_code == 0
    assert "ready" not in (tmp_path / "0.log").read_text(), "events are no log"


def test_a_role_can_be_started_again(spec, hosted):
    host = hosted(replace(spec, module="no_such_role"))
    for _ in range(2):
        host.start()
        _, report = reports_until(host, has_ended)
        assert report.exit_code == 1


def test_before_its_start_a_role_has_nothing_to_report(spec, hosted):
    host = hosted(spec)
    report = host.report()
    assert (report.events, report.exit_code, report.tail) == ([], None, "")
    assert host.stop(1.0) is None


def test_a_log_that_takes_nothing_is_told_of_once_and_the_role_goes_on(spec):
    host = RoleHost(replace(spec, module="no_such_role"), Path("/dev/full"))
    host.start()
    events, report = reports_until(host, has_ended)
    assert report.tail.endswith("No module named treepo_async.no_such_role")
    assert [(event["event"], event["alarm"]) for event in events] == [
        ("alarm", "the log of a role cannot be written")
    ]
    assert "/dev/full: No space left on device" in events[0]["detail"]
