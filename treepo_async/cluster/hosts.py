"""The hosts of a run on a Ray cluster: one Ray actor a role, pinned to the node of its placement with the slots of its role.

    nodes_of -> place -> open_hosts -> prepare (ports) and look (preflight) -> seated plan -> take -> start, by the supervisor

Pinned by node affinity that is not soft, and not by a placement group: who is where is decided here already, by rules that the
strategies of a group (pack, spread) do not have, such as tensor-parallel groups inside a node. A group would hold its slots
together, which matters where two jobs start at once; here a host that is not placed in time ends the start with the name of the
node, and nothing has begun by then.

Waits: for what others hold of the nodes (`FREE_S`), for the hosts to be placed (`PLACE_S`; Ray ends it), for their answers (`ANSWER_S`).

With GPUs each host asks Ray for those of its role, and Ray sets CUDA_VISIBLE_DEVICES for it and for its process. Without, on a
cluster that was there before, it asks for CPUs. On the cluster that this run started nobody else is, and nothing is asked for.
The runtime environment of all hosts is that of the job, see `ray_cluster`.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from treepo_async import chaos
from treepo_async.cluster.placement import Demand, Node, Placement, place
from treepo_async.cluster.plan import (
    Plan,
    deal_ports,
    demand_of,
    kind_of,
    num_ports,
    role_names,
    seated,
)
from treepo_async.cluster.preflight import failures, leave_word, look, question_of
from treepo_async.cluster.role import RoleHost, RoleSpec, Site
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError, TreepoError

FREE_S = 20.0
LOOK_S = 0.5
PLACE_S = 60.0
ANSWER_S = 60.0
INHERITED = (chaos.PLAN_VARIABLE,)
"""Variables of the driver that every role has, wherever it is."""


@dataclass(frozen=True, slots=True)
class Berth:
    """What Ray is asked for, for one role."""

    node: Node
    gpus: int
    cpus: int
    shared_gpus: tuple[int, ...] = ()


@dataclass
class Hosts:
    """The hosts of a run's roles."""

    ray: Any
    berths: dict[str, Berth]
    log_dir: Path
    handles: dict[str, Any] = field(default_factory=dict)
    """Ray actors of `RoleHost`, by role."""

    def create(self, spec: RoleSpec) -> None:
        """Have Ray make the host of a role; it is pending until Ray has placed it."""
        berth = self.berths[spec.name]
        strategies = self.ray.util.scheduling_strategies
        options: dict[str, Any] = {
            "num_cpus": berth.cpus,
            "num_gpus": berth.gpus,
            "max_restarts": 0,
            "scheduling_strategy": strategies.NodeAffinitySchedulingStrategy(
                berth.node.id, soft=False
            ),
        }
        log = (self.log_dir / f"{spec.name}.log").resolve()
        self.handles[spec.name] = self.ray.remote(**options)(RoleHost).remote(spec, log)

    def node_of(self, role: str) -> str:
        """Address of the node of a role."""
        return self.berths[role].node.address

    def move(self, spec: RoleSpec) -> str | None:
        """Make the host of a role that takes no slot anew, on another node if there is one. Gives its address; None: no node lives.

        The node that it was on may be going: that shows many seconds later. The host may live there, out of reach.
        """
        lost, living = self.berths[spec.name].node.id, nodes_of(self.ray)
        able = [node for node in living if node.id != lost] or living
        if not able:
            return None
        node = able[spec.wiring.index % len(able)]
        self.drop(spec.name)
        self.berths[spec.name] = replace(self.berths[spec.name], node=node)
        self.create(spec)
        return node.address

    def drop(self, role: str) -> None:
        """Give up the host of a role; one that lives out of reach ends with its process, once Ray reaches it."""
        self.ray.kill(self.handles.pop(role))

    def is_lost(self, role: str) -> bool:
        """Whether the node of a role is gone."""
        return self.berths[role].node.id not in {node.id for node in nodes_of(self.ray)}


def nodes_of(ray: Any) -> list[Node]:
    """The living nodes of a cluster with what is free on them, the driver's own first, then by address."""
    return _nodes(ray, ray._private.state.available_resources_per_node())


def _nodes(ray: Any, free: Mapping[str, Mapping[str, float]]) -> list[Node]:
    """With what is free by the id of a node; of one that is not named, with all it has."""
    own = ray.get_runtime_context().get_node_id()
    found = []
    for row in ray.nodes():
        if row["Alive"]:
            has = free.get(row["NodeID"], row["Resources"])
            cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
            all_gpus = int(row["Resources"].get("GPU", 0))
            found.append(Node(row["NodeID"], row["NodeManagerAddress"], cpus, gpus, all_gpus))
    return sorted(found, key=lambda node: (node.id != own, node.address, node.id))


def place_on(ray: Any, demand: Demand) -> Placement:
    """The placement of a run on what is free; waits up to `FREE_S` for what others hold, such as a run that just ended.

    Raises:
        ConfigError: there is no room.
    """
    deadline = time.monotonic() + FREE_S
    while True:
        try:
            return place(demand, nodes_of(ray))
        except ConfigError as error:
            # raises at once where there would be no room on empty nodes either
            place(demand, _nodes(ray, {}))
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{error}; others hold a part of the nodes, see: ray status"
                ) from error
        time.sleep(LOOK_S)


def berths_of(config: Config, placement: Placement, *, is_own: bool) -> dict[str, Berth]:
    """What to ask Ray for, by role.

    Args:
        config: of the run.
        placement: of its roles.
        is_own: whether the run started the cluster: its CPUs then are a label.
    """
    nodes, berths = placement.nodes, {}
    takes_cpus = not is_own and not placement.on_gpus

    def berth(node: int, slots: int, gpus: tuple[int, ...]) -> Berth:
        shared = gpus if placement.is_shared else ()
        own_gpus = 0 if shared else len(gpus)
        return Berth(nodes[node], own_gpus, slots if takes_cpus else 0, shared)

    seats = placement.engines
    for name in role_names(config, num_nodes=len(placement.learner)):
        kind, index = kind_of(name), int(name.rpartition("-")[2])
        if kind == "learner":
            share = placement.learner[index]
            berths[name] = berth(share.node, share.num_ranks, share.gpus)
        elif kind == "engine":
            slots = 0 if config.engine.url is not None else config.engine.tp
            berths[name] = berth(seats[index].node, slots, seats[index].gpus)
        else:
            node = placement.replay if kind == "replay" else placement.actors[index]
            berths[name] = Berth(nodes[node], 0, 0)
    return berths


def open_hosts(
    ray: Any, config: Config, plan: Plan, *, is_own: bool
) -> tuple[Plan, Hosts, Placement]:
    """Place every role, have Ray make its host, look around on its node, and complete its wiring.

    Args:
        ray: connected.
        config: of the run.
        plan: of one machine.
        is_own: whether the run started the cluster, on this machine.

    Returns:
        The plan with the wiring of the cluster, its hosts, and where everything is.

    Raises:
        ConfigError: there is no room, or a node lacks something; all of it is named.
    """
    placement = place_on(ray, demand_of(config))
    berths = berths_of(config, placement, is_own=is_own)
    hosts = Hosts(ray, berths, plan.run_dir / "logs")
    for name in berths:
        # which role it will be; the rest is known once all have said where they are
        hosts.create(replace(plan.roles[0], name=name, module=kind_of(name)))
    sites = _prepare(config, hosts)
    if not is_own:
        _look(config, plan, hosts)
        plan = seated(plan, config, placement, sites)
    plan = replace(
        plan, roles=tuple(replace(r, shared_gpus=berths[r.name].shared_gpus) for r in plan.roles)
    )
    told = {role.name: hosts.handles[role.name].take.remote(role) for role in plan.roles}
    _answers(hosts, told)
    return plan, hosts, placement


def _prepare(config: Config, hosts: Hosts) -> dict[str, Site]:
    """Where each host is, once Ray has placed it."""
    ray, berths = hosts.ray, hosts.berths
    host = address_for(config, [berth.node for berth in berths.values()])
    by_address: dict[str, list[str]] = {}
    for name in hosts.handles:
        by_address.setdefault(host or berths[name].node.address, []).append(name)
    # one of them draws for all: hosts that draw at the same time may draw the same port
    calls = {}
    for address, names in by_address.items():
        for name in names:
            number = num_ports(names) if name == names[0] else 0
            calls[name] = hosts.handles[name].prepare.remote(address, number)
    _, waiting = ray.wait(list(calls.values()), num_returns=len(calls), timeout=PLACE_S)
    if waiting:
        late = [name for name, call in calls.items() if call in waiting]
        raise ConfigError(_not_placed(ray, late, berths, config.cluster.runtime_env))
    drawn = _answers(hosts, calls)
    sites: dict[str, Site] = {}
    for names in by_address.values():
        sites |= deal_ports(names, drawn[names[0]])
    return sites


def _answers(hosts: Hosts, calls: Mapping[str, Any]) -> dict[str, Any]:
    """What hosts answer, by role.

    Raises:
        ConfigError: one cannot.
    """
    found = {}
    for name, call in calls.items():
        try:
            found[name] = hosts.ray.get(call, timeout=ANSWER_S)
        except hosts.ray.exceptions.RayError as error:
            raise ConfigError(f"node {hosts.node_of(name)} {_why_none(error)}") from error
    return found


def _why_none(error: Exception) -> str:
    """Why a host has no answer, and what would help."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TreepoError):
        return f"cannot be used: {cause}"
    return (
        f"cannot run treepo_async: {type(error).__name__} {last_line(cause or error)}; install the same environment on "
        "every node, with this source under the same path, or have Ray carry it: cluster.runtime_env"
    )


def address_for(config: Config, nodes: Sequence[Node]) -> str | None:
    """The address that all roles bind, where they share a machine; None: each that of its node.

    Raises:
        ConfigError: there are several machines and no keys, or `cluster.host` names one address for all of them.
    """
    machines = sorted({node.address for node in nodes})
    if len(machines) == 1:
        return config.cluster.host
    if config.cluster.keys_dir is None:
        raise ConfigError(
            f"roles run on {len(machines)} machines ({', '.join(machines[:4])}{', ...' if machines[4:] else ''}), whose "
            "sockets are open to others, and need cluster.keys_dir; make one with: python launch/keys.py DIR, on a file "
            "system that every node mounts"
        )
    if config.cluster.host != "127.0.0.1":
        raise ConfigError(
            f"cluster.host={config.cluster.host} is for a run on one machine; on {len(machines)} each binds the address "
            "that Ray knows it by: leave it out"
        )
    return None


def _look(config: Config, plan: Plan, hosts: Hosts) -> None:
    """Compare every node that is used with the driver's machine.

    Raises:
        ConfigError: a node lacks something.
    """
    berths = hosts.berths
    by_node: dict[str, list[str]] = {}
    for name, berth in berths.items():
        by_node.setdefault(berth.node.id, []).append(name)
    questions = {
        names[0]: question_of(config, run_dir=plan.run_dir, model_dir=plan.model_dir, roles=names)
        for names in by_node.values()
    }
    if len({berth.node.address for berth in berths.values()}) == 1:
        # those who publish and those who load see the same folder, also where the driver is elsewhere
        questions = {name: replace(asked, weights_dir=None) for name, asked in questions.items()}
    # of keys the driver needs none
    question = replace(next(iter(questions.values())), roles=())
    word = leave_word(question)
    calls = {name: hosts.handles[name].look.remote(asked) for name, asked in questions.items()}
    seen = {
        f"{berths[name].node.address} ({berths[name].node.id[:6]})": sight
        for name, sight in _answers(hosts, calls).items()
    }
    found = list(failures(question, word, look(question), seen))
    if found:
        raise ConfigError("\n".join(found))


def _not_placed(
    ray: Any, late: Sequence[str], berths: Mapping[str, Berth], runtime_env: str | None
) -> str:
    free = ray._private.state.available_resources_per_node()
    lines = []
    for name in late:
        berth = berths[name]
        has = free.get(berth.node.id, {})
        lines.append(
            f"{name} was not placed within {PLACE_S:g} s: it needs {berth.gpus} GPUs and {berth.cpus} CPUs of node "
            f"{berth.node.address}, which has {has.get('GPU', 0):g} and {has.get('CPU', 0):g} free"
        )
    if runtime_env is not None:
        lines.append(
            f"making the environment of cluster.runtime_env={runtime_env} may take longer: Ray keeps it on a node, so "
            "start again, or bring what it installs into the image; look in /tmp/ray/session_latest/logs/runtime_env*"
        )
    lines.append("something else took them, or the node is going; look with: ray status")
    return "\n".join(lines)


def last_line(error: BaseException) -> str:
    """Of a text that may begin with a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def driver_variables() -> dict[str, str]:
    """Variables of the driver that roles on other machines have too."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}
