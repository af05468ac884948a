"""`python -m treepo_async.learner WIRING`: the learner's ranks of this node as one role.

With ranks on several nodes the process of the first one leads the others (`lead`, `follow`).
"""

import contextlib
import sys
from functools import partial
from pathlib import Path

from treepo_async.config.command_line import load
from treepo_async.config.layout import Layout
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.errors import WeightsError
from treepo_async.learner.follow import Follower
from treepo_async.learner.group_line import Message, group_secret
from treepo_async.learner.lead import Leader, Start, listen
from treepo_async.learner.node import Work, run_ranks
from treepo_async.learner.rank import RankJob, run_rank
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_blocking_role
from treepo_async.process import free_ports
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import Checkpoint, CheckpointStore


def main(wiring: Wiring) -> None:
    """Train, and leave the trained model in `<run>/model`."""
    config = load(wiring.config_file)
    layout = Layout.parse(config.learner.layout)
    if not wiring.group_address:
        run_ranks(
            partial(_work, config, wiring, layout),
            num_ranks=layout.world_size,
            max_restarts=config.learner.max_restarts,
        )
        return
    secret = group_secret(Path(wiring.run_dir))
    ranks = range(wiring.first_rank, wiring.first_rank + (wiring.num_ranks or 0))
    if wiring.first_rank > 0:
        Follower(
            wiring.group_address,
            secret,
            wiring.role,
            ranks,
            partial(_work_as_told, config, wiring, layout),
            config.cluster.start_timeout_s,
            on_join=partial(emit, "ready"),
            on_over=partial(emit, "over"),
        ).run()
        return
    with contextlib.closing(listen(wiring.group_address)) as listener:
        Leader(
            listener,
            secret,
            layout.world_size,
            ranks,
            partial(_start, config, wiring, layout),
            config.learner.max_restarts,
            config.cluster.start_timeout_s,
        ).run()


def _work(config: Config, wiring: Wiring, layout: Layout) -> Work:
    """What the ranks do from where the run stands now."""
    (port,) = free_ports(1)
    return partial(run_rank, _job(config, wiring, layout, f"127.0.0.1:{port}"))


def _start(config: Config, wiring: Wiring, layout: Layout) -> Start:
    """What the ranks of this node do from where the run stands now, and what the other nodes must know of it."""
    (port,) = free_ports(1, wiring.address)
    job = _job(config, wiring, layout, f"{wiring.address}:{port}")
    version = None if job.checkpoint is None else job.checkpoint.state.version
    return partial(run_rank, job), {"address": job.address, "checkpoint": version}


def _work_as_told(config: Config, wiring: Wiring, layout: Layout, said: Message) -> Work:
    """What the ranks of this node do, by what the leader says.

    Raises:
        WeightsError: the checkpoint is not whole here; is the run's folder the same on every node?
    """
    checkpoint = None
    if said["checkpoint"] is not None:
        store = CheckpointStore(wiring.checkpoints_dir, keep=config.checkpoint.keep)
        checkpoint = store.at(PolicyVersion.parse(said["checkpoint"]))
    return partial(run_rank, RankJob(config, wiring, layout, said["address"], checkpoint))


def _job(config: Config, wiring: Wiring, layout: Layout, address: str) -> RankJob:
    checkpoints = CheckpointStore(wiring.checkpoints_dir, keep=config.checkpoint.keep)
    return RankJob(config, wiring, layout, address, newest_whole(checkpoints))


def newest_whole(checkpoints: CheckpointStore) -> Checkpoint | None:
    """Where to go on from; None where there is no checkpoint at all.

    Raises:
        WeightsError: there are some and none is whole: replay may have forgotten the trees that led to them.
    """
    damaged: list[WeightsError] = []
    newest = checkpoints.newest(damaged.append)
    if newest is None and damaged:
        raise WeightsError(
            f"no checkpoint in {checkpoints.folder} is whole: {damaged[0]}; bring one back from a copy, or begin "
            "another run"
        )
    for error in damaged:
        emit("alarm", alarm="checkpoint passed over", detail=str(error))
    return newest


if __name__ == "__main__":
    run_blocking_role(partial(main, Wiring.parse(sys.argv[1])))
