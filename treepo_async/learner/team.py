"""All ranks of the learner as one object: rank 0 calls its methods, the other ranks `follow`.

Each method sends the order and its arguments, then does on rank 0 what `follow` does on the others. Waits: `follow` waits
for the next order (`control` has the deadline; rank 0 ends it).
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from treepo_async.learner.broadcast import StageBroadcast
from treepo_async.learner.control import Control, Order
from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.pack import Float32, Int32
from treepo_async.learner.packing.share import SegmentValues, Share
from treepo_async.learner.packing.share_codec import (
    share_from_bytes,
    share_to_bytes,
    values_from_bytes,
    values_to_bytes,
)
from treepo_async.learner.step import WEIGHTS, Learner
from treepo_async.metrics.categories import RANK
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.types import PolicyVersion, Tree
from treepo_async.weights.parcel import StagePart

Result = TypeVar("Result")

TICK_S = 5.0
PUBLISHING = (Order.EXPORT, Order.OFFER)
"""Orders that hand weights on; the others compute."""


class Team:
    """The learner of a world of ranks."""

    def __init__(
        self,
        learner: Learner,
        control: Control,
        broadcast: StageBroadcast | None = None,
        *,
        tick_s: float = TICK_S,
    ) -> None:
        """Take what there is.

        Args:
            learner: this rank's.
            control: of all ranks.
            broadcast: needed for `offer` alone.
            tick_s: how often rank 0 tells the others that it lives while it works alone; less than they wait for an order.
        """
        self._learner, self._control = learner, control
        self._broadcast, self._tick_s = broadcast, tick_s

    @property
    def num_updates(self) -> int:
        """Updates the optimizer has made."""
        return self._learner.optimizer.num_updates

    def wait(self) -> None:
        """Tell the other ranks that there is nothing to do yet, and that rank 0 lives."""
        self._control.order(Order.WAIT)

    def train(self, batch: Share, *, version: PolicyVersion) -> StepResult:
        """`Learner.train`, every data-parallel replica on its part.

        Args:
            batch: all trees of one update; it has no microbatches yet.
            version: the version the current weights were published as.
        """
        shares = self._divide(batch)
        self._control.order(Order.TRAIN, _json(version))
        self._scatter(shares)
        return self._learner.train(shares[0], version=version)

    def logprobs(self, batch: Share, *, of_reference: bool = False) -> list[SegmentValues]:
        """`Learner.logprobs` of every tree of a batch, in its order.

        Args:
            batch: its microbatches are not read.
            of_reference: under the reference policy instead of the current weights.
        """
        shares = self._divide(batch)
        self._control.order(Order.LOGPROBS, _json(of_reference))
        self._scatter(shares)
        found = self._learner.logprobs(shares[0], of_reference=of_reference)
        replicas = self._control.gather(_join(found)) if self._control.size > 1 else [_join(found)]
        return _merge(batch.trees, shares, replicas)

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """`Learner.score`."""
        self._control.order(Order.SCORE, _json([ids.tolist() for ids in sequences]))
        return self._learner.score(sequences)

    def export(self, kind: str = WEIGHTS) -> Iterator[tuple[str, Any]]:
        """`Learner.export`; it must be run to its end before anything else is called."""
        self._control.order(Order.EXPORT, _json(kind))
        yield from self._learner.export(kind)

    def offer(
        self, version: PolicyVersion, dtype: str, keep: Collection[PolicyVersion]
    ) -> list[StagePart]:
        """Have every pipeline stage copy its weights, to be sent to engines beside the training. Gives what each has.

        Args:
            version: of the weights.
            dtype: of the copies, as torch spells it.
            keep: versions whose copies stay.
        """
        self._control.order(Order.OFFER, _json([version, dtype, list(keep)]))
        return self._offer(version, dtype, keep)

    def keep_waiting(self, work: Callable[[], Result]) -> Result:
        """Do what concerns rank 0 alone and may take long; the other ranks hear meanwhile that it lives.

        Args:
            work: run in a thread of its own; it may not touch the model.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="rank-0 alone") as pool:
            future = pool.submit(work)
            while not wait([future], timeout=self._tick_s).done:
                self.wait()
            return future.result()

    def stop(self) -> None:
        """End `follow` on the other ranks."""
        self._control.order(Order.STOP)

    def follow(self, slot: Slot | None = None) -> None:
        """Ranks above 0: carry out orders until `stop`.

        Args:
            slot: on which the time is booked.
        """
        slot = slot or Slot(SlotLedger(RANK), "rank")
        while True:
            with slot("wait_order"):
                order, details = self._control.receive()
            if order is Order.STOP:
                return
            with slot("publish" if order in PUBLISHING else "order", order=order.name):
                self._carry_out(order, details)

    def _carry_out(self, order: Order, details: bytes) -> None:
        match order:
            case Order.TRAIN:
                share = share_from_bytes(self._control.scatter())
                self._learner.train(share, version=PolicyVersion(*json.loads(details)))
            case Order.LOGPROBS:
                share = share_from_bytes(self._control.scatter())
                found = self._learner.logprobs(share, of_reference=json.loads(details))
                self._control.gather(_join(found))
            case Order.SCORE:
                self._learner.score([np.array(x, np.int32) for x in json.loads(details)])
            case Order.EXPORT:
                for _ in self._learner.export(json.loads(details)):
                    raise AssertionError("only rank 0 is given tensors")
            case Order.OFFER:
                version, dtype, keep = json.loads(details)
                self._offer(PolicyVersion(*version), dtype, [PolicyVersion(*kept) for kept in keep])

    def _offer(
        self, version: PolicyVersion, dtype: str, keep: Collection[PolicyVersion]
    ) -> list[StagePart]:
        assert self._broadcast is not None, "weights go by a folder"
        return self._broadcast.copy(
            version, self._learner.export_stage(), getattr(torch, dtype), keep=keep
        )

    def _divide(self, batch: Share) -> list[Share]:
        return self.keep_waiting(
            partial(
                divide,
                batch,
                num_replicas=self._control.num_replicas,
                num_stages=self._learner.num_stages,
                budget_tokens=self._learner.microbatch_tokens,
                packing=self._learner.packing,
                cost=self._learner.cost,
            )
        )

    def _scatter(self, shares: Sequence[Share]) -> None:
        if self._control.size > 1:
            self._control.scatter(map(share_to_bytes, shares))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _join(values: Sequence[SegmentValues]) -> bytes:
    return b"".join(values_to_bytes(of_tree) for of_tree in values)


def _merge(
    trees: Sequence[Tree], shares: Sequence[Share], replicas: Sequence[bytes]
) -> list[SegmentValues]:
    """What the replicas found for their trees, for each tree of the batch; a tree may be in several."""
    place = {id(tree): i for i, tree in enumerate(trees)}
    merged = [np.full(tree.num_tokens, np.nan, np.float32) for tree in trees]
    for share, data in zip(shares, replicas, strict=True):
        flat, begin = np.frombuffer(data, np.float32), 0
        for tree in share.trees:
            values = flat[begin : begin + tree.num_tokens]
            known = ~np.isnan(values)
            merged[place[id(tree)]][known] = values[known]
            begin += tree.num_tokens
    return [values_from_bytes(t, v.tobytes()) for t, v in zip(trees, merged, strict=True)]
