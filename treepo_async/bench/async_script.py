"""What a scripted run is made of, as one file that all of its processes read."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from treepo_async.bench.async_service import Service
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.tree.rules import GrowthRules

RUN_ID = "bench"
"""Of every benchmark's replay, see `queue_replay`."""


@dataclass(frozen=True, slots=True)
class Script:
    """One cell."""

    arm: str
    seed: int
    max_staleness: int
    update_mode: UpdateMode
    growth: str
    actors: int
    """Processes, each with an engine of its own."""
    slots: int
    """Trees that an actor grows at once."""
    prompts: int
    """Of a batch."""
    segment: int
    depth: int
    width: int
    service: Service
    train_token_s: float
    """Of a unique token."""
    publish_s: float
    """From the end of an update until engines may load its weights."""
    load_s: float
    """For which an engine's gate is closed beside draining."""
    warm_up: int
    """Steps that do not count."""
    seconds: float
    """Measured after that; the step that runs then is ended."""
    replay_port: int
    gate_ports: tuple[int, ...]
    """Of each engine."""

    @property
    def rules(self) -> GrowthRules:
        """How trees grow."""
        return GrowthRules(
            segment_tokens=self.segment,
            max_depth=self.depth,
            width=self.width,
            branching_factor=2,
            first_fork_min=2,
            first_fork_max=2,
            fallback="random",
            growth=self.growth,
        )

    @property
    def replay_endpoint(self) -> str:
        """Where replay is."""
        return f"tcp://127.0.0.1:{self.replay_port}"

    def gate_endpoint(self, engine: int) -> str:
        """Where the host of an engine is."""
        return f"tcp://127.0.0.1:{self.gate_ports[engine]}"

    def write(self, folder: Path) -> None:
        """For the processes in the folder."""
        (folder / "script.json").write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What `write` wrote."""
        values = json.loads((folder / "script.json").read_text())
        values["service"] = Service(**values["service"])
        values["update_mode"] = UpdateMode(values["update_mode"])
        values["gate_ports"] = tuple(values["gate_ports"])
        return cls(**values)
