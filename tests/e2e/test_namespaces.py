"""A run on two Ray nodes with an address each: two network namespaces of this machine, which share its disk.

What is reached at loopback by mistake is not reached here. Needs root, for `ip netns`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_async.wire.keys import make_keys

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.99.0.1", "10.99.0.2")
PORT = 6399
SECOND_JOINS_S = 60
RUN_S = 300
WORDS = ("actors=2", "learner=tp2pp2dp2", "steps=2", "eval.every=0", "replay.prompts_per_batch=4")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.timeout(2 * RUN_S),
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, which takes root"),
]


def ip(*words):
    subprocess.run(["ip", *words], check=True, timeout=10)


def inside(name, *command, **options):
    return subprocess.Popen(["ip", "netns", "exec", name, *command], cwd=ROOT, text=True, **options)


@pytest.fixture
def namespaces(tmp_path, monkeypatch):
    """Two of them, with a Ray node in each; `(first, second)`."""
    for name, value in (("AUTH_MODE", "disabled"), ("worker_niceness", "0"), ("USAGE_STATS_ENABLED", "0")):  # fmt: skip
        monkeypatch.setenv(f"RAY_{name}", value)
    names = [f"treepo{os.getpid()}{end}" for end in "ab"]
    links = [f"tp{os.getpid()}{end}" for end in "ab"]
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
    for name, link, address in zip(names, links, ADDRESSES, strict=True):
        ip("link", "set", link, "netns", name)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", link, "up")
    common = ("--object-store-memory=83886080", "--block")
    head = (*RAY, "start", "--head", f"--node-ip-address={ADDRESSES[0]}", f"--port={PORT}", "--num-cpus=5")  # fmt: skip
    other = (*RAY, "start", f"--address={ADDRESSES[0]}:{PORT}", f"--node-ip-address={ADDRESSES[1]}", "--num-cpus=4")  # fmt: skip
    with (tmp_path / "ray.log").open("w") as log:
        nodes = [
            inside(names[0], *head, "--include-dashboard=false", *common, stdout=log, stderr=log)
        ]
        nodes += [inside(names[1], *other, *common, stdout=log, stderr=log)]
        try:
            wait_for_nodes(names[0])
            yield names
        finally:
            for node in nodes:
                node.terminate()
            for node in nodes:
                node.wait(60)
            for name in names:
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
                for pid in pids.stdout.split():
                    os.kill(int(pid), 9)
                ip("netns", "del", name)


def wait_for_nodes(name):
    ask = f"import ray; ray.init('{ADDRESSES[0]}:{PORT}', log_to_driver=False); print(len(ray.nodes()))"
    deadline = time.monotonic() + SECOND_JOINS_S
    while time.monotonic() < deadline:
        asking = inside(name, sys.executable, "-c", ask, stdout=-1, stderr=-1)
        if "2" in asking.communicate(timeout=60)[0].split():
            return
        time.sleep(1)
    raise AssertionError("the second node did not join")


def train(name, run_dir, *words):
    """The exit code of a run, and what it said."""
    address = f"cluster.ray_address={ADDRESSES[0]}:{PORT}"
    command = (sys.executable, "launch/run.py", address, f"run_dir={run_dir}", *WORDS, *words)
    run = inside(name, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said, _ = run.communicate(timeout=RUN_S)
    finally:
        run.kill()
    return run.returncode, said


def test_a_run_over_two_addresses_does_its_steps_and_without_keys_it_is_refused(
    namespaces, tmp_path
):
    code, said = train(namespaces[0], tmp_path / "refused")
    assert code == 2, said
    assert "roles run on 2 machines (10.99.0.1, 10.99.0.2)" in said
    assert "launch/keys.py" in said

    make_keys(tmp_path / "keys")
    code, said = train(namespaces[0], tmp_path / "run", f"cluster.keys_dir={tmp_path / 'keys'}")
    assert code == 0, said
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    ranks = {event["rank"]: event["role"] for event in events if event["event"] == "rank"}
    assert {ranks[number] for number in range(4)} == {"learner-0"}
    assert {ranks[number] for number in range(4, 8)} == {"learner-1"}
    ready = {event["role"]: event for event in events if event["event"] == "ready"}
    assert ready["engine-0"]["url"].startswith(f"http://{ADDRESSES[0]}:")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    finished = json.loads(metrics[-1])["leases_by_actor"]
    assert finished.keys() == {"actor-0", "actor-1"}, "an actor on each node"
