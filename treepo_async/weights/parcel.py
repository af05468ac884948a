"""A version on its way by broadcast: its manifest, and which tensors travel together from which pipeline stage. Pure.

Neighbours: the learner's ranks fill buckets (`learner.broadcast_copy`), the desk offers the parcel, an engine host checks it before the
engine is asked for anything.

Invariant: every tensor of the manifest is in one bucket of one stage.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import UNREADABLE, Manifest, TensorInfo, compare

Bucket = tuple[str, ...]
"""Names of tensors, in the order of their bytes."""
TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""How torch and SGLang spell what safetensors spells so."""


@dataclass(frozen=True, slots=True)
class StagePart:
    """What one pipeline stage has of a version."""

    tensors: dict[str, TensorInfo]
    buckets: tuple[Bucket, ...]

    def to_words(self) -> Any:
        """What `of_words` reads back, as JSON takes it."""
        return [self.tensors, self.buckets]

    @classmethod
    def of_words(cls, words: Any) -> Self:
        """Read what `to_words` gave."""
        tensors, buckets = words
        return cls(
            {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()},
            tuple(tuple(bucket) for bucket in buckets),
        )


@dataclass(frozen=True, slots=True)
class Parcel:
    """A version that is offered."""

    manifest: Manifest
    stages: tuple[tuple[Bucket, ...], ...]
    """The buckets of each pipeline stage, first to last."""

    @property
    def version(self) -> PolicyVersion:
        """Of its weights."""
        return PolicyVersion.parse(self.manifest.version)

    def check(self, expected: Mapping[str, TensorInfo]) -> None:
        """Compare it with the model, before an engine is asked to take it.

        Raises:
            WeightsError: a tensor is missing, unknown or of another shape or dtype, or is not in exactly one bucket.
        """
        compare(f"offer of {self.version}", self.manifest.tensors, expected)
        counts = Counter(name for stage in self.stages for bucket in stage for name in bucket)
        wrong = [
            name
            for name in expected.keys() | counts.keys()
            if counts[name] != 1 or name not in expected
        ]
        if wrong:
            raise WeightsError(
                f"offer of {self.version}: {wrong[0]} is in {counts[wrong[0]]} buckets, not in one ({len(wrong)} such)"
            )

    def to_bytes(self) -> bytes:
        """What `parse` reads back."""
        return json.dumps([self.manifest.to_json(), self.stages]).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote.

        Raises:
            WeightsError: it is something else.
        """
        try:
            manifest, stages = json.loads(data)
            return cls(
                Manifest.parse(manifest),
                tuple(tuple(tuple(bucket) for bucket in stage) for stage in stages),
            )
        except UNREADABLE as error:
            raise WeightsError(f"an offer of weights cannot be read: {error}") from error
