"""What a run will start: its roles, their wiring, and the text a person reads before it begins."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from treepo_async.cluster.role import RoleSpec
from treepo_async.config.cores import parse_cores
from treepo_async.config.limits import response_limit
from treepo_async.config.schema import Config
from treepo_async.config.wiring import EngineAddress, Wiring
from treepo_async.process import free_ports
from treepo_async.types import Prompt

ROLE_RESTARTS = 3
"""Of each role, after it was killed."""
PROMPT_CHARACTERS = 80
MAX_ENGINES = 4
"""That an actor uses if `actor.engines` does not say."""


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
    """Name, number and wire the roles of a run.

    Args:
        config: of the run.
        run_dir: of the run.
        model_dir: the initial model.
        lineage: least one of the run's weights.
        resume_step: policy step of the checkpoint to go on from.
    """
    run_id = secrets.token_hex(4)
    num_engines, num_actors = sizes(config)
    replay_port, *engine_ports = free_ports(1 + 2 * max(1, num_engines))
    shared = Wiring(
        run_id=run_id,
        run_dir=str(run_dir.resolve()),
        model_dir=str(model_dir.resolve()),
        replay_endpoint=f"tcp://{config.cluster.host}:{replay_port}",
        gate_endpoint="",
        engine_url="",
        role="",
        lineage=lineage,
        resume_step=resume_step,
        keys_dir=_resolved(config.cluster.keys_dir),
        publications_dir=_resolved(config.weights.dir),
    )
    engines = [
        EngineAddress(f"http://127.0.0.1:{port}", f"tcp://{config.cluster.host}:{gate}")
        for gate, port in zip(engine_ports[::2], engine_ports[1::2], strict=True)
    ]
    num_used = min(config.actor.engines or MAX_ENGINES, len(engines))

    def role(kind: str, index: int, cpu_threads: int = 1, cores: str | None = None) -> RoleSpec:
        name, home = f"{kind}-{index}", index % len(engines)
        wiring = replace(
            shared,
            role=name,
            index=index,
            gate_endpoint=engines[home].gate_endpoint,
            engine_url=engines[home].url,
            engines=tuple((engines[home:] + engines[:home])[:num_used]),
        )
        return RoleSpec(
            name,
            kind,
            wiring,
            cpu_threads,
            ROLE_RESTARTS,
            survives_failure=kind == "actor",
            cores=frozenset() if cores is None else parse_cores(f"{kind}.cores", cores),
        )

    return Plan(
        run_id,
        run_dir,
        model_dir,
        (
            *(
                role("engine", i, config.engine.cpu_threads, config.engine.cores)
                for i in range(num_engines)
            ),
            role("learner", 0, config.learner.cpu_threads, config.learner.cores),
            role("replay", 0),
            *(
                role("actor", i, config.actor.cpu_threads, config.actor.cores)
                for i in range(num_actors)
            ),
        ),
        resume_step,
    )


def _resolved(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).resolve())


def sizes(config: Config) -> tuple[int, int]:
    """Number of engines and of actors: where the trees come from a file, one of each to evaluate, or none."""
    if config.data.trees is None:
        return config.engines, config.actors
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
