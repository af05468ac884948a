"""How rank 0 tells the other ranks what to do next: one order at a time, over gloo whatever the device.

Waits: a rank waits in `receive` for the next order. Rank 0 ends the wait with an order, and while it has none with
`Order.WAIT` at least every few seconds, so the group's timeout is the longest a rank can hang when rank 0 has stopped
without a word. Neighbours: `team` speaks it on both sides.

Invariant: every rank takes part in every order, in the same sequence.
"""

from collections.abc import Iterable
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.learner.mcore import parallel_state


class Order(IntEnum):
    """What all ranks do next; each but WAIT and STOP is a method of `Learner`."""

    WAIT = 0
    TRAIN = 1
    LOGPROBS = 2
    SCORE = 3
    EXPORT = 4
    STOP = 5
    OFFER = 6


class Control:
    """The orders of one world of ranks; needs opened groups, and every rank must make one."""

    def __init__(self, *, timeout_s: float) -> None:
        """Open the groups.

        Args:
            timeout_s: longest wait for the next order.
        """
        timeout = timedelta(seconds=timeout_s)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._world = dist.new_group(backend="gloo", timeout=timeout)
        replicas = self._replicas()
        groups = [dist.new_group(ranks, backend="gloo", timeout=timeout) for ranks in replicas]
        self.replica = next(i for i, ranks in enumerate(replicas) if self.rank in ranks)
        self._leaders = [min(ranks) for ranks in replicas]
        self._own_group = groups[self.replica]

    @property
    def num_replicas(self) -> int:
        """Data-parallel size."""
        return len(self._leaders)

    def order(self, order: Order, details: bytes = b"") -> None:
        """Rank 0: have every rank `receive` an order."""
        if self.size > 1:
            dist.broadcast(torch.tensor([order, len(details)]), 0, group=self._world)
            if details:
                dist.broadcast(_tensor(details), 0, group=self._world)

    def receive(self) -> tuple[Order, bytes]:
        """Ranks above 0: the next order that is no WAIT, and its details."""
        header = torch.tensor([Order.WAIT, 0])
        while True:
            dist.broadcast(header, 0, group=self._world)
            order, size = header.tolist()
            if order != Order.WAIT:
                return Order(order), self._broadcast(size, 0, self._world) if size else b""

    def scatter(self, payloads: Iterable[bytes] = ()) -> bytes:
        """Carry each data-parallel replica its payload, once, and there to all its ranks.

        Args:
            payloads: on rank 0 one per replica, taken one at a time; on the others ignored.

        Returns:
            The payload of this rank's replica.
        """
        if self.rank == 0:
            pairs = zip(self._leaders, payloads, strict=True)
            mine: bytes | None = next(pairs)[1]
            for leader, payload in pairs:
                self._send(payload, leader)
        elif self.rank in self._leaders:
            mine = self._receive_payload(0)
        else:
            mine = None
        return self._share_in_replica(mine)

    def gather(self, payload: bytes) -> list[bytes]:
        """Bring the payload of each data-parallel replica to rank 0.

        Args:
            payload: the same on all ranks of a replica.

        Returns:
            On rank 0 one per replica; on the others nothing.
        """
        if self.rank == 0:
            return [payload, *(self._receive_payload(leader) for leader in self._leaders[1:])]
        if self.rank in self._leaders:
            self._send(payload, 0)
        return []

    def _send(self, payload: bytes, to: int) -> None:
        dist.send(torch.tensor([len(payload)]), to, group=self._world)
        if payload:
            dist.send(_tensor(payload), to, group=self._world)

    def _receive_payload(self, source: int) -> bytes:
        size = torch.tensor([0])
        dist.recv(size, source, group=self._world)
        data = torch.empty(int(size), dtype=torch.uint8)
        if len(data):
            dist.recv(data, source, group=self._world)
        return _bytes(data)

    def _share_in_replica(self, payload: bytes | None) -> bytes:
        """The payload of the replica's leader, on all its ranks."""
        leader = self._leaders[self.replica]
        size = torch.tensor([0 if payload is None else len(payload)])
        dist.broadcast(size, leader, group=self._own_group)
        if payload is None:
            return self._broadcast(int(size), leader, self._own_group)
        dist.broadcast(_tensor(payload), leader, group=self._own_group)
        return payload

    def _broadcast(self, size: int, source: int, group: Any) -> bytes:
        data = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(data, source, group=group)
        return _bytes(data)

    def _replicas(self) -> list[list[int]]:
        """Global ranks of each data-parallel replica."""
        mine = torch.tensor([parallel_state.get_data_parallel_rank()])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self._world)
        of_rank = [int(replica) for replica in found]
        return [
            [rank for rank, replica in enumerate(of_rank) if replica == wanted]
            for wanted in range(max(of_rank) + 1)
        ]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(data: Tensor) -> bytes:
    return data.numpy().tobytes()
