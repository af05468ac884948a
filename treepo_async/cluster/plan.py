"""What a run will start: its roles, their wiring, and the text a person reads before it begins.

A plan is made for this machine, with every role in one place. On a cluster `seated` makes another one of it, once the hosts of
the roles (`hosts`) have said where they are and which ports are free there.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treepo_async.cluster.placement import Demand, Placement, Share
from treepo_async.cluster.role import RoleSpec, Site
from treepo_async.config.cores import parse_cores
from treepo_async.config.layout import Layout
from treepo_async.config.limits import engine_urls, response_limit
from treepo_async.config.schema import ActorConfig, Config, EngineConfig, LearnerConfig
from treepo_async.config.wiring import EngineAddress, Wiring
from treepo_async.process import free_ports
from treepo_async.types import Prompt

ROLE_RESTARTS = 3
"""Of each role, after it was killed."""
PROMPT_CHARACTERS = 80
MAX_ENGINES = 4
"""That an actor uses if `actor.engines` does not say."""
NUM_PORTS = {"engine": 2, "learner": 2, "replay": 1, "actor": 0}
"""That a role of each kind listens on: SGLang and its gate; offers of weights and the other nodes of the learner; replay."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Roles in the order in which they are started: the slowest to start comes first."""

    run_id: str
    run_dir: Path
    model_dir: Path
    roles: tuple[RoleSpec, ...]
    resume_step: int | None = None
    """Policy step of the checkpoint it goes on from."""


def make_plan(
    config: Config,
    *,
    run_dir: Path,
    model_dir: Path,
    lineage: int = 0,
    resume_step: int | None = None,
) -> Plan:
    """Name, number and wire the roles of a run on this machine.

    Args:
        config: of the run.
        run_dir: of the run.
        model_dir: the initial model.
        lineage: least one of the run's weights.
        resume_step: policy step of the checkpoint to go on from.

    Raises:
        ConfigError: `cluster.host` is no address of this machine.
    """
    run_id = secrets.token_hex(4)
    shared = Wiring(
        run_id=run_id,
        run_dir=str(run_dir.resolve()),
        model_dir=str(model_dir.resolve()),
        replay_endpoint="",
        gate_endpoint="",
        engine_url="",
        role="",
        lineage=lineage,
        resume_step=resume_step,
        keys_dir=_resolved(config.cluster.keys_dir),
        publications_dir=_resolved(config.weights.dir),
    )
    shares = (Share(0, 0, Layout.parse(config.learner.layout).world_size, ()),)
    names = role_names(config, num_nodes=1)
    # on a cluster the address may be of another machine, and `seated` gives other ports
    is_here = config.cluster.ray_address is None
    ports = free_ports(num_ports(names), *([config.cluster.host] if is_here else []))
    sites = deal_ports(names, Site(config.cluster.host, tuple(ports)))
    return Plan(run_id, run_dir, model_dir, _roles(config, shared, shares, sites), resume_step)


def num_ports(names: Iterable[str]) -> int:
    """That roles listen on, all together."""
    return sum(NUM_PORTS[kind_of(name)] for name in names)


def deal_ports(names: Iterable[str], site: Site) -> dict[str, Site]:
    """The site of each role of an address, with its part of the ports.

    Args:
        names: of the roles.
        site: with the ports of all of them.
    """
    sites, ports = {}, site.ports
    for name in names:
        number = NUM_PORTS[kind_of(name)]
        sites[name], ports = Site(site.address, ports[:number]), ports[number:]
    return sites


def seated(plan: Plan, config: Config, placement: Placement, sites: Mapping[str, Site]) -> Plan:
    """The plan with the wiring of a cluster.

    Args:
        plan: of one machine.
        config: of the run.
        placement: of its roles.
        sites: where the host of each role is, by role.
    """
    roles = _roles(config, plan.roles[0].wiring, placement.learner, sites)
    return replace(plan, roles=roles)


def demand_of(config: Config) -> Demand:
    """What is to be placed."""
    num_engines, num_actors = sizes(config)
    if config.engine.url is not None:
        # they run already, and take no place
        return Demand(Layout.parse(config.learner.layout), num_engines, 0, num_actors)
    return Demand(Layout.parse(config.learner.layout), num_engines, config.engine.tp, num_actors)


def kind_of(role: str) -> str:
    """Of a role's name: `engine`, `learner`, `replay` or `actor`."""
    return role.rpartition("-")[0]


def role_names(config: Config, *, num_nodes: int) -> list[str]:
    """Of all roles of a run, in the order in which they are started.

    Args:
        config: of the run.
        num_nodes: that have ranks of the learner.
    """
    num_engines, num_actors = sizes(config)
    numbers = (
        ("engine", num_engines),
        ("learner", num_nodes),
        ("replay", 1),
        ("actor", num_actors),
    )
    return [f"{kind}-{index}" for kind, number in numbers for index in range(number)]


def _roles(
    config: Config, base: Wiring, shares: Sequence[Share], sites: Mapping[str, Site]
) -> tuple[RoleSpec, ...]:
    """Every role with its wiring.

    Args:
        config: of the run.
        base: what all wirings have in common.
        shares: of the learner, by node.
        sites: of each role.
    """
    replay, leader = sites["replay-0"], sites["learner-0"]
    engines = [_engine_address(config, index, sites) for index in range(sizes(config)[0])]
    num_used = min(config.actor.engines or MAX_ENGINES, len(engines))
    offers, group = leader.ports
    shared = replace(
        base,
        replay_endpoint=f"tcp://{replay.address}:{replay.ports[0]}",
        weights_endpoint=(
            f"tcp://{leader.address}:{offers}" if config.weights.transport == "broadcast" else ""
        ),
        group_address=f"{leader.address}:{group}" if len(shares) > 1 else "",
    )

    def role(name: str) -> RoleSpec:
        kind, _, number = name.rpartition("-")
        index = int(number)
        wiring = replace(shared, role=name, index=index, address=sites[name].address)
        if engines:
            home = index % len(engines)
            wiring = replace(
                wiring,
                gate_endpoint=engines[home].gate_endpoint,
                engine_url=engines[home].url,
                engines=tuple((engines[home:] + engines[:home])[:num_used]),
            )
        if kind == "learner" and len(shares) > 1:
            share = shares[index]
            wiring = replace(wiring, first_rank=share.first_rank, num_ranks=share.num_ranks)
        return _spec(config, kind, wiring)

    return tuple(role(name) for name in role_names(config, num_nodes=len(shares)))


def _spec(config: Config, kind: str, wiring: Wiring) -> RoleSpec:
    sections: dict[str, EngineConfig | LearnerConfig | ActorConfig] = {
        "engine": config.engine,
        "learner": config.learner,
        "actor": config.actor,
    }
    section = sections.get(kind)
    cores = section.cores if section else None
    return RoleSpec(
        wiring.role,
        kind,
        wiring,
        section.cpu_threads if section else 1,
        ROLE_RESTARTS,
        survives_failure=kind == "actor",
        cores=frozenset() if cores is None else parse_cores(f"{kind}.cores", cores),
    )


def _engine_address(config: Config, index: int, sites: Mapping[str, Site]) -> EngineAddress:
    """Of an engine: SGLang is reached at the address of its host, on one machine at loopback whatever replay binds."""
    site = sites[f"engine-{index}"]
    is_on_node = site.address != config.cluster.host
    url = f"http://{site.address if is_on_node else '127.0.0.1'}:{site.ports[0]}"
    if config.engine.url is not None:
        url = engine_urls(config.engine)[index]
    return EngineAddress(url, f"tcp://{site.address}:{site.ports[1]}")


def _resolved(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).resolve())


def sizes(config: Config) -> tuple[int, int]:
    """Number of engines and of actors: where the trees come from a file, one of each to evaluate, or none."""
    if config.data.trees is None:
        return len(engine_urls(config.engine)) or config.engines, config.actors
    return (1, 1) if config.eval.every else (0, 0)


def describe(config: Config, plan: Plan, prompt: Prompt | str) -> str:
    """The plan as text, with one prompt as the engine will get it, or what is said in its place."""
    kinds: dict[str, int] = {}
    for role in plan.roles:
        kinds[role.module] = kinds.get(role.module, 0) + 1
    resumed = "" if plan.resume_step is None else f", resumed at step {plan.resume_step}"
    lines = [
        ("run", f"{plan.run_dir} (seed {config.seed}{resumed})"),
        ("model", f"{config.model.path} at {plan.model_dir}"),
        ("data", _data(config)),
        ("prompt", _prompt(prompt)),
        ("tree", _tree(config)),
        ("batch", _batch(config)),
        (
            "learner",
            f"Megatron-Core {config.learner.layout}, lr {config.learner.lr:g}, {config.model.dtype}",
        ),
        ("roles", ", ".join(f"{n} {kind}" for kind, n in kinds.items())),
    ]
    return "\n".join(f"  {name:<8} {text}" for name, text in lines)


def _prompt(prompt: Prompt | str) -> str:
    if isinstance(prompt, str):
        return prompt
    return f"{shorten(prompt.text)!r} ({len(prompt.token_ids)} tokens), e.g. {prompt.id}"


def _data(config: Config) -> str:
    if config.data.trees is None:
        return f"{config.data.path}, scored by {config.reward.scorer}"
    epochs = config.data.epochs or 1
    return (
        f"trees of {config.data.trees}, {epochs} pass{'es' if epochs > 1 else ''}, scored already"
    )


def _tree(config: Config) -> str:
    if config.data.trees is not None:
        return "as the file has them"
    tree = config.tree
    return (
        f"{tree.width} leaves, segments of {tree.segment_tokens} x depth {tree.max_depth}, "
        f"responses up to {response_limit(config)} tokens"
    )


def _batch(config: Config) -> str:
    replay, width = config.replay, config.tree.width
    if config.data.trees is not None:
        return f"{replay.prompts_per_batch} trees a step, {config.steps} steps at most, offline"
    return (
        f"{replay.prompts_per_batch} trees x {width} leaves = {replay.prompts_per_batch * width} trajectories a "
        f"step, {config.steps} steps, staleness at most {replay.max_staleness}"
    )


def shorten(text: str) -> str:
    """A text that fits on a line."""
    return text if len(text) <= PROMPT_CHARACTERS else text[: PROMPT_CHARACTERS - 3] + "..."
