"""Runs on a Ray cluster of two nodes, which are two raylets of this machine: who is on which, and what a loss comes to.

Both share one address and one disk, so what differs between real machines (addresses, keys, folders) is not tried here.
"""

import os
import signal
import time

import psutil
import pytest

from tests.conftest import LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(600)]

RUN_S = 400
HEADLINE = ("actors=8", "learner=tp4pp2", "steps=2", "eval.every=0")
SMALL = ("actors=2", "learner=pp2dp2", "eval.every=0", "replay.prompts_per_batch=4", "checkpoint.every=1")  # fmt: skip
STORE = {"object_store_memory": 80 * 2**20}


class TwoNodes:
    """The cluster, and runs on it."""

    def __init__(self, cpus, tmp_path_factory):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": cpus[0], "include_dashboard": False, **STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.second = self.cluster.add_node(num_cpus=cpus[1], **STORE)
        self._folders, self._runs = tmp_path_factory, []

    def launch(self, *words, run_dir=None):
        folder = run_dir or self._folders.mktemp("cluster") / "run"
        address = f"cluster.ray_address={self.cluster.address}"
        self._runs.append(LaunchedRun((address, *words), folder))
        return self._runs[-1]

    def node_of(self, pid):
        """The raylet that a process descends from, as the number of its node."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.nodes()]
        for ancestor in psutil.Process(pid).parents():
            if ancestor.pid in raylets:
                return raylets.index(ancestor.pid)
        raise AssertionError(f"{pid} is of no node")

    def nodes(self):
        return [self.cluster.head_node, self.second]

    def roles(self):
        """Processes of roles, on any node."""
        marks = [
            ["-m", f"treepo_async.{kind}"] for kind in ("engine", "learner", "replay", "actor")
        ]
        return [
            p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:3] in marks
        ]

    def close(self):
        for run in self._runs:
            run.clean_up()
        self.cluster.shutdown()


@pytest.fixture
def two_nodes(tmp_path_factory, monkeypatch):
    """`two_nodes(5, 4)` starts a cluster with so many CPUs on its nodes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = []

    def start(*cpus):
        started.append(TwoNodes(cpus, tmp_path_factory))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_the_headline_runs_on_two_nodes_with_a_stage_of_the_learner_on_each(two_nodes):
    nodes = two_nodes(5, 4)
    run = nodes.launch(*HEADLINE)
    run.wait_for_line("step 1/2", timeout_s=RUN_S)
    roles = [f"{kind}-0" for kind in ("engine", "learner", "replay")]
    where = {role: nodes.node_of(run.pid_of(role)) for role in [*roles, "learner-1"]}
    ranks = [nodes.node_of(run.pid_of_rank(number)) for number in range(8)]
    assert len(set(ranks[:4])) == len(set(ranks[4:])) == 1
    assert ranks[0] == where["learner-0"] == where["replay-0"] != ranks[4] == where["learner-1"]
    assert sorted(nodes.node_of(run.pid_of(f"actor-{i}")) for i in range(8)) == [0] * 4 + [1] * 4
    assert run.wait(timeout_s=RUN_S) == 0, str(run)
    assert {event["role"] for event in run.events("rank")} == {"learner-0", "learner-1"}
    assert nodes.roles() == []


def test_a_rank_that_is_killed_on_the_second_node_costs_no_step(two_nodes):
    nodes = two_nodes(3, 2)
    run = nodes.launch(*SMALL, "steps=4")
    run.wait_for_line("step 1/4", timeout_s=RUN_S)
    os.kill(run.pid_of_rank(3), signal.SIGKILL)
    run.wait_for_line("learner's ranks are started again", timeout_s=60)
    assert run.wait(timeout_s=RUN_S) == 0, str(run)
    assert any("step 4/4" in line for line in run.lines)
    assert any("rank 3 was killed by SIGKILL" in e.get("detail", "") for e in run.events("alarm"))


def test_a_killed_driver_leaves_no_role_on_any_node_and_the_run_can_be_gone_on_with(two_nodes):
    nodes = two_nodes(3, 2)
    run = nodes.launch(*SMALL, "steps=3")
    run.wait_for_line("step 1/3", timeout_s=RUN_S)
    assert len(nodes.roles()) >= 6
    run.process.kill()
    deadline = time.monotonic() + 30
    while nodes.roles():
        assert time.monotonic() < deadline, nodes.roles()
        time.sleep(0.2)
    again = nodes.launch(run_dir=run.run_dir)
    assert again.wait(timeout_s=RUN_S) == 0, str(again)
    assert any("resumed at step" in line for line in again.lines)


def test_a_lost_node_with_ranks_ends_the_run_by_its_address_and_says_how_to_go_on(two_nodes):
    nodes = two_nodes(3, 2)
    run = nodes.launch(*SMALL, "steps=50")
    run.wait_for_line("step  1/50", timeout_s=RUN_S)
    nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    assert run.wait(timeout_s=90) == 1
    said = "\n".join(run.errors)
    assert "learner-1 lost its Ray worker on node" in said
    assert f"go on with: python launch/run.py run_dir={run.run_dir}" in said
    assert nodes.roles() == []
