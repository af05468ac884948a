"""The outermost frame of a role's process: its signals, and the cause of its end as an event."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from treepo_async.metrics.events import emit
from treepo_async.metrics.spans import tell_clock


async def run_role(work: Coroutine[Any, Any, None]) -> None:
    """Run an asyncio role: SIGTERM cancels it, Ctrl-C is left to the driver."""
    tell_clock()
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    except Exception as error:
        emit("failed", cause=cause_of(error))
        raise


def run_blocking_role(work: Callable[[], None]) -> None:
    """Run a synchronous role: SIGTERM ends it, Ctrl-C is left to the driver."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tell_clock()
    try:
        work()
    except Exception as error:
        emit("failed", cause=cause_of(error))
        raise


def cause_of(error: BaseException) -> str:
    """The first failure inside of any groups, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"


def _end(*_: Any) -> None:
    raise SystemExit(0)
