"""What a simulated run is: its size, its rules, and the service times of its parts.

Neighbours: `sim_world` runs one; `sim_calibrate` finds the service times of a real run; `sim_scale` and `sim_arms` vary the rest.
Times are seconds of one process; a parameter's default is of the embedded task on two CPU cores (docs/simulation.md has the
source of each).
"""

from dataclasses import dataclass, field

from treepo_async.bench.sim_drops import Drops
from treepo_async.bench.sim_engine import MODES, EngineSpeed
from treepo_async.bench.sim_replay import ReplaySpeed
from treepo_async.bench.sim_trees import Lengths, LogNormal, TreeShape
from treepo_async.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LearnerSpeed:
    """Of a step: T_train."""

    batch_s: float = 0.05
    """Whatever the batch holds."""
    token_s: float = 0.00006
    """More for each token of its trees."""


@dataclass(frozen=True, slots=True)
class WeightsSpeed:
    """From the learner to the engines."""

    publish_s: float = 0.025
    """For which the learner is held."""
    send_s: float = 0.0
    """From then until the first engine can begin to load."""
    each_s: float = 0.0
    """From one engine to the next, where they are served in sequence."""
    load_s: float = 0.035
    """In which an engine decodes nothing: loading and proof."""


@dataclass(frozen=True)
class SimSettings:
    """A simulated run."""

    actors: int = 2
    trees_per_actor: int = 8
    engines: int = 1
    """An actor uses one of them, the one of its number modulo `engines`."""
    prompts_per_batch: int = 16
    max_staleness: int = 1
    num_steps: int = 40
    update_mode: str = "drain"
    shape: TreeShape = field(default_factory=TreeShape)
    lengths: Lengths = field(default_factory=lambda: LogNormal(30, 2))
    degenerate: float | Drops = 0.0
    """Share of trees without spread, which are dropped: of all, or by the step of the policy."""
    dropped_size: float = 1.0
    """Tokens of such a tree, over those of another."""
    drop_degenerate: bool = True
    max_refills: int = 64
    score_s: float = 0.0
    """From the last token of a tree until it is delivered."""
    engine: EngineSpeed = field(default_factory=EngineSpeed)
    learner: LearnerSpeed = field(default_factory=LearnerSpeed)
    replay: ReplaySpeed = field(default_factory=ReplaySpeed)
    weights: WeightsSpeed = field(default_factory=WeightsSpeed)
    seed: int = 0

    def degenerate_at(self, published: int) -> float:
        """Share of trees without spread among those that are begun after so many publications."""
        if not isinstance(self.degenerate, Drops):
            return self.degenerate
        # the policy moves on in the step in which a tree is begun: its middle stands for it
        place = self.degenerate.place(published + 0.5, self.prompts_per_batch)
        return self.degenerate.at(place)

    def check(self) -> None:
        """Raise ConfigError for what cannot be simulated."""
        counts = ("actors", "trees_per_actor", "engines", "prompts_per_batch", "num_steps")
        for name in counts:
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.update_mode not in MODES:
            raise ConfigError(f"update_mode={self.update_mode} must be one of {', '.join(MODES)}")
        if not isinstance(self.degenerate, Drops) and not 0 <= self.degenerate < 1:
            raise ConfigError(f"degenerate={self.degenerate} must be at least 0 and below 1")
