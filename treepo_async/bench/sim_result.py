"""What a simulated run leaves. Neighbour: `sim_world`, which fills it."""

from dataclasses import dataclass, field

from treepo_async.bench.sim_engine import Pieces


@dataclass(frozen=True, slots=True)
class GrownTree:
    """A tree as the learner gets it."""

    tokens: int
    """Each counted once."""
    leaf_tokens: int
    """Each counted once for every leaf below it."""
    pieces: Pieces
    """Tokens by version."""


@dataclass(frozen=True, slots=True)
class SimStep:
    """A step of the learner."""

    step: int
    """From 1."""
    end_s: float
    wait_batch_s: float
    train_s: float
    publish_s: float
    trees: int
    tokens: int
    leaf_tokens: int
    decoded_tokens: int
    """Of the trees that were delivered since the step before."""
    discarded_tokens: int
    """Of these, of trees that were dropped."""
    delivered: int
    """Trees, since the step before."""
    dropped: int
    """Of these, for want of spread."""
    lags: dict[int, int]
    """Tokens by publications between sampling and training."""


@dataclass
class SimResult:
    """What became of a run."""

    steps: list[SimStep] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By role (all slots of all actors, all engines) and category of `metrics.categories`, from the end of the warm-up on."""
    pauses: list[float] = field(default_factory=list)
    """Of all engines, for new weights."""
    decoded_tokens: int = 0
    leased: int = 0
    ended: int = 0
    """Leases whose trees were delivered."""
    dropped: int = 0
    trained: int = 0
    """Trees."""

    def mean_step_s(self, *, warm_up: int = 0) -> float:
        """From the end of the warm-up on."""
        begin = self.steps[warm_up - 1].end_s if warm_up else 0.0
        return (self.steps[-1].end_s - begin) / (len(self.steps) - warm_up)

    def tokens_per_s(self, *, warm_up: int = 0) -> float:
        """Trained tokens of all leaves, likewise."""
        rest = self.steps[warm_up:]
        return sum(s.leaf_tokens for s in rest) / (self.mean_step_s(warm_up=warm_up) * len(rest))

    def share(self, role: str, *activities: str) -> float:
        """Of the time of a role."""
        seconds = self.seconds[role]
        whole = sum(seconds.values())
        return sum(seconds.get(name, 0.0) for name in activities) / whole if whole else 0.0
