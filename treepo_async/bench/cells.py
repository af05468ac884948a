"""What one comparison is made of, and how much of an engine it needs."""

from dataclasses import dataclass, fields
from enum import StrEnum

from treepo_async.bench.shapes import decoded_share, paths_per_level


class Arm(StrEnum):
    """How the trajectories of a prompt are sampled."""

    TREE = "tree"
    INDEPENDENT = "independent"


class Stop(StrEnum):
    """What ends a path."""

    NONE = "none"
    """The response limit alone."""
    NATURAL = "natural"
    """What ends it in training: end of sequence, a box, repetition."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a sweep; its fields are named as the command line's keys."""

    depth: int
    """Segments of a full-length response."""
    segment: int
    """Tokens of a segment."""
    width: int
    """Trajectories a prompt."""
    branch: int
    """Paths that a path becomes at a boundary, the first one included."""
    prompt: int
    """Tokens of a prompt."""
    prompts: int
    """Prompts grown at once."""
    layers: int
    hidden: int
    running: int
    """Most requests that the engine decodes at once."""
    stop: Stop
    shape: str = ""
    """A published size, which then counts in place of `layers` and `hidden`: bfloat16, with weights that the engine makes up."""

    @property
    def model(self) -> str:
        """What the model is called."""
        return self.shape or f"{self.layers} layers x {self.hidden}"

    @property
    def limit(self) -> int:
        """Most tokens of a response."""
        return self.depth * self.segment

    @property
    def trajectories(self) -> int:
        """Delivered by each arm."""
        return self.prompts * self.width

    @property
    def context(self) -> int:
        """Most tokens of a request, prompt and response."""
        return self.prompt + self.limit

    @property
    def decoded_share(self) -> float:
        """Decoded over delivered tokens of full-length trees."""
        return decoded_share(self.width, self.depth, self.branch, self.branch)

    @property
    def decoded_tokens(self) -> int:
        """Decoded by the tree arm, at full length."""
        paths = paths_per_level(self.width, self.depth, self.branch, self.branch)
        return self.prompts * self.segment * sum(paths)

    @property
    def cache_tokens(self) -> int:
        """Entries of the KV cache with which neither arm loses a prefix before others have read it.

        All prompts and all responses of independent sampling, as if nothing but the prompts were shared, and one entry
        to spare for each response.
        """
        return self.prompts * (self.prompt + self.width * (self.limit + 1))

    def __str__(self) -> str:
        return (
            f"{self.depth}x{self.segment} width {self.width} branch {self.branch} "
            f"prompt {self.prompt}"
        )


CELL_FIELDS = tuple(field.name for field in fields(Cell))
