"""How the driver hears of a ledger: every `TELL_S`, and once more at the end, an event with the seconds since the last.

Waits: for time to pass; a thread that tells is ended by whoever opened it.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

from treepo_async.metrics.categories import KINDS
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import Since, SlotLedger, by_category
from treepo_async.metrics.spans import emit_rows

TELL_S = 2.0


class Teller:
    """Tells of one ledger."""

    def __init__(self, ledger: SlotLedger, kind: str, *, rank: int | None = None) -> None:
        """Begin where the ledger stands.

        Args:
            ledger: of this process.
            kind: of the process, a key of `categories.KINDS`.
            rank: of a learner's process; such share the name of their role.
        """
        if ledger.activities is not KINDS[kind]:
            raise ValueError(f"a ledger of a process of kind {kind} has other activities")
        self._ledger, self._since = ledger, Since(ledger)
        self._fields: dict[str, Any] = {"kind": kind, "pid": os.getpid()}
        if rank is not None:
            self._fields["rank"] = rank
        self._told_at = ledger.clock()

    def tell(self) -> None:
        """Tell of the time since the last call, and of the spans that ended in it."""
        taken = self._since.take()
        self._told_at = taken.at
        seconds = by_category(taken, self._ledger.activities)
        emit(
            "ledger",
            **self._fields,
            begin=round(taken.at - taken.wall, 6),
            end=round(taken.at, 6),
            seconds={name: round(spent, 6) for name, spent in seconds.items()},
        )
        rows, num_dropped = self._ledger.take_rows()
        emit_rows(rows)
        if num_dropped:
            emit("spans_dropped", number=num_dropped)

    def tell_if_due(self) -> None:
        """`tell`, at most every `TELL_S`: for a loop that comes by often."""
        if self._ledger.clock() - self._told_at >= TELL_S:
            self.tell()


@contextlib.asynccontextmanager
async def telling(teller: Teller) -> AsyncIterator[None]:
    """Tell every `TELL_S` inside of the `async with`, and at its end."""
    task = asyncio.create_task(_tell_on(teller), name="ledger")
    try:
        yield
    finally:
        task.cancel()
        teller.tell()


@contextlib.contextmanager
def telling_beside(teller: Teller) -> Iterator[None]:
    """The same from a thread, for a process that is busy or blocked for long."""
    is_over = threading.Event()

    def tell_on() -> None:
        while not is_over.wait(TELL_S):
            teller.tell()

    thread = threading.Thread(target=tell_on, name="ledger", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        teller.tell()


async def _tell_on(teller: Teller) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        teller.tell()
