"""Spans for the trace: what took how long, as one event line of a few rows; the driver keeps them (`trace_log`).

Times are those of `time.monotonic`, which all processes of a machine share and nobody sets; a role says once (`tell_clock`)
how its machine's stands to the time of day.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import Row

MAX_LINE_BYTES = 3500
"""Of a line of rows: the ranks of a learner write into one pipe, which keeps lines of up to 4,096 bytes whole."""
BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def span(name: str, category: str, *, track: str, **args: Any) -> Iterator[dict[str, Any]]:
    """Tell how long the `with` took, also where it fails. Gives its arguments, to add to. May be used by any thread.

    Args:
        name: what is done.
        category: see `categories.Category`.
        track: beside which other spans it is drawn; those of one track nest or follow each other.
        **args: e.g. the version.
    """
    begin = time.monotonic()
    try:
        yield args
    finally:
        emit_rows([Row(track, name, category, begin, time.monotonic() - begin, args)])


def emit_rows(rows: Sequence[Row]) -> None:
    """Tell of spans, in lines that are short enough to stay whole."""
    batch: list[list[Any]] = []
    size = 0
    for row in rows:
        shown = [row.track, row.name, row.category, round(row.begin, 6), round(row.seconds, 6)]
        entry = [*shown, dict(row.args)]
        length = len(json.dumps(entry))
        if batch and size + length > MAX_LINE_BYTES:
            emit("spans", rows=batch)
            batch, size = [], 0
        batch.append(entry)
        size += length + 2
    if batch:
        emit("spans", rows=batch)


def tell_clock() -> None:
    """Tell which machine's monotonic clock this process has, and how it stands to the time of day."""
    emit("clock", machine=machine_id(), monotonic=time.monotonic(), wall=time.time())


def machine_id() -> str:
    """The same for all processes that share a monotonic clock: one start of one machine."""
    try:
        return BOOT_FILE.read_text().strip()
    except OSError:
        return os.uname().nodename
