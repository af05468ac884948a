"""One run from a checked config to its end: prepare, plan, place, supervise."""

from collections.abc import Callable
from pathlib import Path

from treepo_async.cluster.join import invited
from treepo_async.cluster.narrate import Narrator
from treepo_async.cluster.plan import Plan
from treepo_async.cluster.ray_cluster import ray_cluster
from treepo_async.cluster.supervise import Supervisor, SupervisorRules
from treepo_async.config.schema import Config
from treepo_async.metrics.sinks import JsonlSink, Sink, SparedSink, TensorBoardSink


def run(config: Config, plan: Plan, *, say: Callable[[str], None]) -> str:
    """Carry out a plan. Gives the folder of the trained model.

    Raises:
        RoleError: a role died for good.
        StoppedError: a signal ended the run.
    """
    sinks = _open_sinks(plan.run_dir, say, tensorboard=config.metrics.tensorboard)
    events = SparedSink(JsonlSink(plan.run_dir / "events.jsonl"), "events.jsonl", say)
    rules = SupervisorRules(
        num_steps=config.steps,
        eval_every=config.eval.every,
        start_timeout_s=config.cluster.start_timeout_s,
        stop_timeout_s=config.cluster.stop_timeout_s,
        eval_timeout_s=config.eval.timeout_s,
    )
    cache_dir = Path(config.cache_dir)
    try:
        with (
            ray_cluster(
                config.cluster.ray_address, cache_dir=cache_dir, num_roles=len(plan.roles)
            ) as cluster,
            invited(plan),
        ):
            names = [role.name for role in plan.roles]
            narrator = Narrator(config.steps, names, sinks, events, say, config.cluster.stall_s)
            return Supervisor(cluster, plan, rules, narrator).run()
    finally:
        for sink in [*sinks, events]:
            sink.close()


def _open_sinks(run_dir: Path, say: Callable[[str], None], *, tensorboard: bool) -> list[Sink]:
    sinks: dict[str, Sink] = {"metrics.jsonl": JsonlSink(run_dir / "metrics.jsonl")}
    if tensorboard:
        sinks["tensorboard"] = TensorBoardSink(run_dir / "tensorboard")
    return [SparedSink(sink, name, say) for name, sink in sinks.items()]
