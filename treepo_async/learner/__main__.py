"""`python -m treepo_async.learner WIRING`: the learner's ranks of this machine as one role."""

import sys
from functools import partial

from treepo_async.config.command_line import load
from treepo_async.config.layout import Layout
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.errors import WeightsError
from treepo_async.learner.node import Work, run_ranks
from treepo_async.learner.rank import RankJob, run_rank
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_blocking_role
from treepo_async.process import free_ports
from treepo_async.weights.checkpoints import Checkpoint, CheckpointStore


def main(wiring: Wiring) -> None:
    """Train, and leave the trained model in `<run>/model`."""
    config = load(wiring.config_file)
    layout = Layout.parse(config.learner.layout)
    run_ranks(
        partial(_work, config, wiring, layout),
        num_ranks=layout.world_size,
        max_restarts=config.learner.max_restarts,
    )


def _work(config: Config, wiring: Wiring, layout: Layout) -> Work:
    """What the ranks do from where the run stands now."""
    (port,) = free_ports(1)
    checkpoints = CheckpointStore(wiring.checkpoints_dir, keep=config.checkpoint.keep)
    job = RankJob(
        config=config,
        wiring=wiring,
        layout=layout,
        address=f"127.0.0.1:{port}",
        checkpoint=newest_whole(checkpoints),
    )
    return partial(run_rank, job)


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
