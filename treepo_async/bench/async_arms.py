"""What each arm of `bench.py async` is to a run: how far generation is ahead, and what new weights do to it. Pure.

The arms are a ladder, so that the gain of a whole is the product of the gains of its rungs:

    sync -> one_step      overlap: the next batch is grown while one is trained
         -> async         staleness: K batches ahead, so that a slow tree holds up no step
         -> async_inflight  in-flight updates: running requests go on under new weights, nobody waits for the slowest
         -> async_eager   no barrier within a tree: what is left of it are requests that run to completion

`sync2` stands beside the ladder: it has no overlap, and in return each phase has both halves of the machine.
"""

from dataclasses import dataclass

from treepo_async.bench.async_rows import Arm

HALVES = ("engine.cores=0", "learner.cores=1")
"""Keys that give each side one core of two; the actors share one of them."""
WHOLE = ("engine.cpu_threads=2", "learner.cpu_threads=2")
"""Keys that give each phase both."""
RUNGS = {
    Arm.ONE_STEP: "overlap",
    Arm.ASYNC: "staleness",
    Arm.ASYNC_INFLIGHT: "in-flight updates",
    Arm.ASYNC_EAGER: "no barrier in a tree",
}
"""What an arm adds to the one before it."""


@dataclass(frozen=True, slots=True)
class ArmSettings:
    """An arm, spelled out."""

    max_staleness: int
    update_mode: str
    """As `engine.update_mode`."""
    growth: str = "barrier"
    """As `tree.growth`."""
    has_whole_machine: bool = False
    """Each phase has what others share between roles."""

    def keys(self, actor_core: int = 0) -> list[str]:
        """Overrides of a run on a machine with two cores, on one of which the actors run unless all have both."""
        halves = (*HALVES, f"actor.cores={actor_core}")
        return [
            f"replay.max_staleness={self.max_staleness}",
            f"engine.update_mode={self.update_mode}",
            f"tree.growth={self.growth}",
            *(WHOLE if self.has_whole_machine else halves),
        ]


def settings_of(arm: Arm, *, staleness: int, update_mode: str) -> ArmSettings:
    """What an arm is.

    Args:
        arm: which one.
        staleness: K of the asynchronous arms.
        update_mode: of those whose requests live through new weights.
    """
    match arm:
        case Arm.SYNC2:
            return ArmSettings(0, "drain", has_whole_machine=True)
        case Arm.SYNC:
            return ArmSettings(0, "drain")
        case Arm.ONE_STEP:
            return ArmSettings(1, "drain")
        case Arm.ASYNC:
            return ArmSettings(staleness, "drain")
        case Arm.ASYNC_INFLIGHT:
            return ArmSettings(staleness, update_mode)
        case Arm.ASYNC_EAGER:
            return ArmSettings(staleness, update_mode, growth="eager")
