"""A process group of one pipeline stage's sender (rank 0) and the tensor-parallel ranks of one engine, beside the learner's own groups.

SGLang joins it by its own `init_weights_update_group`, so the names under which both ends meet in the store are the ones that torch's
`_new_process_group_helper` makes: it is called here as it is there.

Waits: for the engine to join, and for it to take all buckets of a version (the engine ends both; `timeout_s` each). With NCCL a
collective that outlives its own deadline would end this whole process, so it is given twice the time and aborted here before.
"""

import time
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from treepo_async.errors import WeightsError
from treepo_async.learner.groups import device

POLL_S = 0.002


class Meeting:
    """Where the groups of this process meet: a store that it serves, one for all groups."""

    def __init__(self, address: str) -> None:
        """Serve at a free port.

        Args:
            address: of this node, as the engines reach it.
        """
        self.address = address
        self._store = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.port: int = self._store.port


class Group:
    """An open group."""

    def __init__(self, meeting: Meeting, name: str, *, num_ranks: int, timeout_s: float) -> None:
        """Open, which waits for the engine's ranks.

        Args:
            meeting: where they meet.
            name: of the group, never used before.
            num_ranks: of the group, this one included.
            timeout_s: for the engine to join, and for it to take all buckets of a `send`.

        Raises:
            WeightsError: the engine did not join.
        """
        self.name, self._timeout_s, self._is_closed = name, timeout_s, False
        self._with_cuda = torch.cuda.is_available()
        limit = timedelta(seconds=2 * timeout_s if self._with_cuda else timeout_s)
        try:
            # a connection of its own: one that waits for a key is held by whoever waits
            store = dist.TCPStore(
                meeting.address,
                meeting.port,
                is_master=False,
                wait_for_workers=False,
                timeout=limit,
            )
            self._group, _ = c10d._new_process_group_helper(
                num_ranks,
                0,
                [],
                c10d.Backend("nccl" if self._with_cuda else "gloo"),
                c10d.PrefixStore(name, store),
                group_name=name,
                timeout=limit,
            )
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"group {name}: the engine did not join: {error}") from error
        c10d._world.pg_group_ranks[self._group] = {i: i for i in range(num_ranks)}

    def send(self, buckets: Iterable[Tensor]) -> None:
        """Broadcast buckets one after another, all within one deadline.

        Args:
            buckets: uint8 [B] each, in host memory.

        Raises:
            WeightsError: the engine did not take all in time, or the group is closed.
        """
        deadline = time.monotonic() + self._timeout_s
        for number, bucket in enumerate(buckets):
            left_s = deadline - time.monotonic()
            try:
                if self._is_closed:
                    raise WeightsError("the group is closed")
                self._send_one(bucket, max(left_s, 0.001))
            except (RuntimeError, ValueError) as error:
                # torch calls a group that was closed meanwhile a ValueError
                cause = str(error)
                if time.monotonic() >= deadline:
                    cause = f"the engine did not take all within {self._timeout_s:g} s (weights.timeout_s)"
                raise WeightsError(f"group {self.name}: bucket {number}: {cause}") from error

    def close(self) -> None:
        """Leave, whatever the engine does, and whoever is sending."""
        self._is_closed = True
        if self._with_cuda:
            # a communicator with a collective under way would wait for it
            c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)

    def _send_one(self, bucket: Tensor, limit_s: float) -> None:
        if not self._with_cuda:
            options = dist.BroadcastOptions()
            options.rootRank, options.timeout = 0, timedelta(seconds=limit_s)
            self._group.broadcast([bucket], options).wait()
            return
        deadline = time.monotonic() + limit_s
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            on_device = bucket.to(device(), non_blocking=True)
            work = dist.broadcast(on_device, 0, group=self._group, async_op=True)
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise WeightsError("it was not taken in time")
            time.sleep(POLL_S)
        # until here the device memory may not be given to anybody else
        stream.synchronize()
