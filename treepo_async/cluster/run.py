"""One run from a checked config to its end: connect, place, supervise."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treepo_async.cluster.hosts import Hosts, driver_variables, open_hosts
from treepo_async.cluster.join import invited
from treepo_async.cluster.narrate import Narrator
from treepo_async.cluster.placement_text import describe as describe_placement
from treepo_async.cluster.plan import Plan, demand_of
from treepo_async.cluster.ray_cluster import ROOT, RayCluster, check_token_file, ray_cluster
from treepo_async.cluster.runtime_env import load_runtime_env, runtime_env_of
from treepo_async.cluster.supervise import Supervisor, SupervisorRules
from treepo_async.config.schema import ClusterConfig, Config
from treepo_async.metrics.sinks import JsonlSink, Sink, SparedSink, TensorBoardSink
from treepo_async.metrics.trace_log import TRACE_FILE, RotatingSink, TraceLog


def run(config: Config, plan: Plan, *, say: Callable[[str], None]) -> str:
    """Carry out a plan. Gives the folder of the trained model.

    Raises:
        ConfigError: the cluster has no room for the run, or a node lacks something.
        RoleError: a role died for good.
        StoppedError: a signal ended the run.
    """
    cluster = _cluster(config, plan)
    sinks = _open_sinks(plan.run_dir, say, tensorboard=config.metrics.tensorboard)
    events = SparedSink(JsonlSink(plan.run_dir / "events.jsonl"), "events.jsonl", say)
    trace = (
        SparedSink(RotatingSink(plan.run_dir), TRACE_FILE, say) if config.metrics.trace else None
    )
    rules = SupervisorRules(
        num_steps=config.steps,
        eval_every=config.eval.every,
        start_timeout_s=config.cluster.start_timeout_s,
        stop_timeout_s=config.cluster.stop_timeout_s,
        eval_timeout_s=config.eval.timeout_s,
    )
    try:
        with cluster as there:
            plan_there, hosts = _place(config, plan, there, say)
            with invited(plan_there):
                names = [role.name for role in plan_there.roles]
                drawn = None if trace is None else TraceLog(trace.write)
                narrator = Narrator(
                    config.steps, names, sinks, events, say, config.cluster.stall_s, drawn
                )
                return Supervisor(there, plan_there, rules, narrator, hosts).run()
    finally:
        for sink in [*sinks, events, *([] if trace is None else [trace])]:
            sink.close()


def _cluster(config: Config, plan: Plan) -> contextlib.AbstractContextManager[RayCluster]:
    """The cluster of the run, not connected yet.

    Raises:
        ConfigError: a file that is named for it cannot be used.
    """
    demand, files = demand_of(config), check_files(config.cluster)
    return ray_cluster(
        config.cluster.ray_address,
        cache_dir=Path(config.cache_dir),
        num_cpus=len(plan.roles) + demand.layout.world_size + demand.engine_slots,
        token_file=config.cluster.token_file,
        runtime_env=runtime_env_of(files, driver_variables(), root=ROOT),
    )


def check_files(cluster: ClusterConfig) -> dict[str, Any]:
    """Read what is named for an existing cluster. Gives the runtime environment as it is written.

    Raises:
        ConfigError: a file is missing, open to others, or holds something else.
    """
    if cluster.token_file is not None:
        check_token_file(cluster.token_file)
    return load_runtime_env(cluster.runtime_env)


def _place(
    config: Config, plan: Plan, cluster: RayCluster, say: Callable[[str], None]
) -> tuple[Plan, Hosts]:
    """The plan as the cluster has it, and the hosts of its roles; on more than one node it is said who is where."""
    is_own = config.cluster.ray_address is None
    plan, hosts, placement = open_hosts(cluster.ray, config, plan, is_own=is_own)
    if placement.is_shared or len(placement.nodes) > 1:
        say(describe_placement(placement, demand_of(config)))
    return plan, hosts


def _open_sinks(run_dir: Path, say: Callable[[str], None], *, tensorboard: bool) -> list[Sink]:
    sinks: dict[str, Sink] = {"metrics.jsonl": JsonlSink(run_dir / "metrics.jsonl")}
    if tensorboard:
        sinks["tensorboard"] = TensorBoardSink(run_dir / "tensorboard")
    return [SparedSink(sink, name, say) for name, sink in sinks.items()]
