"""A pipeline stage's tensors of a version in host memory, in buckets, so that training goes on while engines are sent them.

Neighbours: `model.hf` gathers the tensors, `weights.parcel` describes them, `broadcast_sender` sends them.

Invariant: the bytes of a bucket do not change while somebody uses its version. Buffers are used again: the first touch of a page costs
more than the copy into it. There is room for two versions, as the newest can be had until the next is offered, and for those that the desk
keeps besides.
"""

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treepo_async.errors import WeightsError
from treepo_async.learner.publish import DTYPE_NAMES
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import TensorInfo
from treepo_async.weights.parcel import StagePart


@dataclass(slots=True)
class FilledBucket:
    """Tensors behind one another."""

    buffer: Tensor
    """uint8 [capacity], in host memory; pinned with CUDA."""
    used: int = 0
    """Bytes."""
    names: list[str] = field(default_factory=list)

    @property
    def data(self) -> Tensor:
        """uint8 [used]."""
        return self.buffer[: self.used]


@dataclass(slots=True)
class _Version:
    buckets: list[FilledBucket]
    num_users: int = 0
    is_dropped: bool = False


class Copies:
    """The versions of one stage that somebody may still be sent. Filled by one thread, used by many."""

    def __init__(self, bucket_bytes: int) -> None:
        """Prepare.

        Args:
            bucket_bytes: of a buffer; a larger tensor has one of its own size.
        """
        self._bucket_bytes = bucket_bytes
        self._versions: dict[PolicyVersion, _Version] = {}
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(
        self,
        version: PolicyVersion,
        tensors: Iterable[tuple[str, Tensor]],
        dtype: torch.dtype,
        *,
        keep: Collection[PolicyVersion] = (),
    ) -> StagePart:
        """Copy a version, and drop those that are not kept. Gives what it consists of.

        Args:
            version: of the tensors.
            tensors: of this stage, by HF name; each is copied before the next is asked for.
            dtype: of the copy.
            keep: earlier versions that stay.
        """
        self._drop(keep)
        buckets: list[FilledBucket] = []
        sizes: dict[str, TensorInfo] = {}
        for name, tensor in tensors:
            sizes[name] = TensorInfo(DTYPE_NAMES[dtype], tuple(tensor.shape))
            self._append(buckets, name, tensor.detach(), dtype)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        with self._lock:
            self._versions[version] = _Version(buckets)
        return StagePart(sizes, tuple(tuple(bucket.names) for bucket in buckets))

    @contextmanager
    def using(self, version: PolicyVersion) -> Iterator[list[FilledBucket]]:
        """The buckets of a version, which stay as they are inside of the `with`.

        Raises:
            WeightsError: it is gone.
        """
        with self._lock:
            found = self._versions.get(version)
            if found is None:
                raise WeightsError(f"the copy of version {version} is gone")
            found.num_users += 1
        try:
            yield found.buckets
        finally:
            with self._lock:
                found.num_users -= 1
                if found.is_dropped and not found.num_users:
                    self._release(found)

    def _drop(self, keep: Collection[PolicyVersion]) -> None:
        with self._lock:
            for version in self._versions.keys() - set(keep):
                dropped = self._versions.pop(version)
                dropped.is_dropped = True
                if not dropped.num_users:
                    self._release(dropped)

    def _release(self, version: _Version) -> None:
        for bucket in version.buckets:
            self._free[len(bucket.buffer)].append(bucket.buffer)

    def _append(
        self, buckets: list[FilledBucket], name: str, tensor: Tensor, dtype: torch.dtype
    ) -> None:
        size = tensor.numel() * dtype.itemsize
        if not buckets or buckets[-1].used + size > len(buckets[-1].buffer):
            buckets.append(FilledBucket(self._buffer(max(size, self._bucket_bytes))))
        bucket = buckets[-1]
        place = bucket.buffer[bucket.used : bucket.used + size].view(dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        bucket.used += size
        bucket.names.append(name)

    def _buffer(self, size: int) -> Tensor:
        with self._lock:
            if self._free[size]:
                return self._free[size].pop()
        return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
