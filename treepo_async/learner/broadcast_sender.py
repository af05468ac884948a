"""The sender of one pipeline stage: carries out the desk's orders beside the training, one thread an engine.

Waits: for an order (`ASK_S`; asked again for ever, until `close`), and what `broadcast_group` waits for. Nobody waits for a sender
but the engine it sends to, whose host has a deadline of its own.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial

import torch

from treepo_async.errors import DeadlineError, TreepoError, WeightsError
from treepo_async.learner.broadcast_copy import Copies
from treepo_async.learner.broadcast_group import Group, Meeting
from treepo_async.metrics.categories import Category
from treepo_async.metrics.events import emit
from treepo_async.metrics.spans import span
from treepo_async.types import PolicyVersion
from treepo_async.wire.messages import AskSend, SendWeights, WeightsSent
from treepo_async.wire.sockets import BlockingRequester

ASK_S = 0.5
"""An order is waited for so long at a time: `close` takes as long."""
ANSWER_S = 10.0

Connect = Callable[[], BlockingRequester]
"""Opens a connection to the desk, for one thread."""


class Sender:
    """See the module."""

    def __init__(
        self, stage: int, copies: Copies, meeting: Meeting, connect: Connect, *, timeout_s: float
    ) -> None:
        """Begin to ask for orders.

        Args:
            stage: of the pipeline.
            copies: what it sends.
            meeting: where its groups meet.
            connect: to the desk.
            timeout_s: of each engine's part.
        """
        self._stage, self._copies, self._meeting = stage, copies, meeting
        self._connect, self._timeout_s = connect, timeout_s
        self._groups: dict[str, Group] = {}
        """By engine."""
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        """Of a thread; it ends the learner at its next publication."""
        self._is_closed = threading.Event()
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = self._start(self._work, f"sender {stage}")

    def check(self) -> None:
        """Whether all is well.

        Raises:
            WeightsError: a thread has ended for another reason than an engine.
        """
        if self._failure is not None:
            raise WeightsError(
                f"the sender of stage {self._stage} has ended, no engine can be sent weights: {self._failure!r}"
            ) from self._failure

    def close(self) -> None:
        """End; what is under way ends with the process."""
        self._is_closed.set()
        self._thread.join()

    def _start(self, work: Callable[[], None], name: str) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  raised again by `check`
                self._failure = error

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def _work(self) -> None:
        desk, begun = self._connect(), 0
        try:
            while not self._is_closed.is_set():
                order = self._next_order(desk, begun)
                if order is None:
                    continue
                begun = order.order
                self._start(partial(self._carry_out, order), f"to {order.engine}")
        finally:
            desk.close()

    def _next_order(self, desk: BlockingRequester, begun: int) -> SendWeights | None:
        ask = AskSend(
            stage=self._stage,
            address=self._meeting.address,
            port=self._meeting.port,
            done=begun,
            wait_s=ASK_S,
        )
        try:
            answer, _ = desk.ask(ask, timeout_s=ANSWER_S, wait="an order to send weights")
        except DeadlineError as error:
            # the desk is a thread of the learner's first rank, which ends with all other ranks
            logging.getLogger(__name__).warning("%s", error)
            return None
        return answer if isinstance(answer, SendWeights) else None

    def _carry_out(self, order: SendWeights) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        version = PolicyVersion(order.lineage, order.step)
        error = ""
        try:
            with (
                span("send", Category.SYNC, track=f"to {order.engine}", version=str(version)),
                self._copies.using(version) as buckets,
            ):
                self._group_of(order).send(bucket.data for bucket in buckets)
        except TreepoError as caught:
            error = str(caught)[:500]
            self._leave(order)
            emit(
                "alarm",
                alarm="weights were not sent",
                version=str(version),
                engine=order.engine,
                detail=error,
            )
        self._report(order, error)

    def _group_of(self, order: SendWeights) -> Group:
        with self._lock:
            found = self._groups.get(order.engine)
            if found is not None and found.name == order.group:
                return found
            # whoever takes a group out closes it, once
            self._groups.pop(order.engine, None)
        if found is not None:
            found.close()
        opened = Group(self._meeting, order.group, num_ranks=order.ranks, timeout_s=self._timeout_s)
        with self._lock:
            self._groups[order.engine] = opened
        return opened

    def _leave(self, order: SendWeights) -> None:
        with self._lock:
            found = self._groups.get(order.engine)
            if found is None or found.name != order.group:
                return
            del self._groups[order.engine]
        found.close()

    def _report(self, order: SendWeights, error: str) -> None:
        desk = self._connect()
        try:
            sent = WeightsSent(engine=order.engine, group=order.group, error=error)
            desk.ask(sent, timeout_s=ANSWER_S, wait="the desk to note what was sent")
        except TreepoError as caught:
            logging.getLogger(__name__).warning("%s", caught)
        finally:
            desk.close()
