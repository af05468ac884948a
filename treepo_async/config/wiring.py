"""What the driver decides at run time and hands to every role: names, folders, addresses."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

CONFIG_FILE = "config.yaml"
"""In a run's folder."""
ENGINE_KEY_FILE = "engine_key.yaml"
"""In a run's folder."""
POLICY_FILE = "policy_version"
"""In the folder of a trained model: which one it is."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is."""

    url: str
    """Of its SGLang server."""
    gate_endpoint: str
    """Of its host's gate."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything a role needs to know that is no knob."""

    run_id: str
    run_dir: str
    model_dir: str
    """Folder of the initial model, with its tokenizer."""
    replay_endpoint: str
    gate_endpoint: str
    """Of the role's own engine: the one that a host serves, or an actor's home."""
    engine_url: str
    role: str
    """Name of the process, e.g. `actor-0`."""
    index: int = 0
    """Its number among the processes of its kind."""
    lineage: int = 0
    """Least lineage of the weights of this run; those below it were used before."""
    resume_step: int | None = None
    """Policy step of the checkpoint that this run goes on from; None for a fresh run."""
    keys_dir: str | None = None
    """Folder of the CURVE keys; see `wire.keys`."""
    engines: tuple[EngineAddress, ...] = ()
    """Those that an actor uses, its home first."""
    weights_endpoint: str = ""
    """Where the learner's rank 0 offers weights; empty where they go by a folder."""
    publications_dir: str | None = None
    """Folder of the publications; None: in the run's."""
    address: str = "127.0.0.1"
    """Of the role's node, as other nodes reach it."""
    first_rank: int = 0
    """Of the learner's ranks on this node."""
    num_ranks: int | None = None
    """Of the learner's ranks on this node; None: all."""
    group_address: str = ""
    """`host:port` where the learner of the first node leads those of the others; empty on one node."""

    @property
    def config_file(self) -> Path:
        """The resolved config of the run."""
        return Path(self.run_dir) / CONFIG_FILE

    @property
    def config_digest(self) -> str:
        """By which replay sees that a peer was given the same config."""
        return digest_of(self.config_file)

    @property
    def tokenizer_digest(self) -> str:
        """By which replay sees that a peer has the same tokenizer; empty where the model has none."""
        return digest_of(Path(self.model_dir) / "tokenizer.json")

    @property
    def engine_key_file(self) -> Path:
        """Of the key that the engines of the run ask of their clients."""
        return Path(self.run_dir) / ENGINE_KEY_FILE

    @property
    def weights_dir(self) -> Path:
        """Where the learner publishes and the engine host looks."""
        return publications_of(Path(self.run_dir), self.publications_dir)

    @property
    def checkpoints_dir(self) -> Path:
        """Where the learner saves what it needs to go on."""
        return Path(self.run_dir) / "checkpoints"

    def to_json(self) -> str:
        """One line that `parse` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        said = json.loads(text)
        engines = tuple(EngineAddress(**engine) for engine in said.pop("engines"))
        return cls(**said, engines=engines)


def publications_of(run_dir: Path, named: str | None) -> Path:
    """The folder of a run's publications: `weights.dir`, or a place in the run's own."""
    return Path(named or run_dir / "weights")


def digest_of(file: Path) -> str:
    """A short name for the content of a file; empty where there is none that can be read."""
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""
