"""Whether a server is well, as its host and the driver see it: idle or not, how many requests it has, and whether it lives.

Waits: for SGLang's counters (2 s a call), for an answer to a probe of life (`hang_s`). Nothing waits for this: it only tells.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from treepo_async.engine.pulse import Pulse
from treepo_async.engine.server import Server, num_in_flight
from treepo_async.errors import EngineError
from treepo_async.metrics.events import emit

SAMPLE_S = 0.25
"""How often the server is asked whether it is idle."""
SAMPLES_PER_EVENT = 4
SILENT_S = 5.0
"""Without a sign of life for this long, a server is said to be in trouble."""
PROBE_IDS = (0, 0)
"""Tokens of a probe of life; every vocabulary has them."""

log = logging.getLogger(__name__)


def _ignore(_: int) -> None:
    return


class Vitals:
    """See the module; `watch()` must run beside its users."""

    def __init__(
        self, server: Server, hang_s: float, on_load: Callable[[int], None] = _ignore
    ) -> None:
        """Prepare.

        Args:
            server: to look at.
            hang_s: without a sign of life it hangs.
            on_load: is told, with every sample, how many requests the server has.
        """
        self._server, self._hang_s, self._on_load = server, hang_s, on_load
        self._pulse = Pulse(hang_s)
        self._is_at_work = False
        self._probe: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """From now on the server lets requests in."""
        self._is_at_work = True
        self._pulse.begin(time.monotonic())

    def end(self) -> None:
        """The server is to be started again."""
        self._is_at_work = False

    def hangs(self) -> bool:
        """Whether the server must be started again."""
        return self._pulse.hangs(time.monotonic())

    async def watch(self) -> None:
        """Tell the driver, once a second, in how many samples the server had nothing to do, and whether it is well."""
        while True:
            answers = [await self._is_idle() for _ in range(SAMPLES_PER_EVENT)]
            known = [is_idle for is_idle in answers if is_idle is not None]
            emit(
                "engine",
                num_samples=len(known),
                num_idle=sum(known),
                in_flight=self._pulse.in_flight,
                trouble=self._trouble(),
            )
            if self._pulse.wants_probe(time.monotonic()):
                self._probe = asyncio.create_task(self._ask_for_life(), name="probe of life")

    async def _is_idle(self) -> bool | None:
        """Whether the server has nothing to do, a moment later; None where it does not say."""
        await asyncio.sleep(SAMPLE_S)
        try:
            loads = await self._server.loads()
        except EngineError as error:
            log.warning("no load report: %s", error)
            return None
        in_flight = num_in_flight(loads)
        self._pulse.see(loads, in_flight, time.monotonic())
        self._on_load(in_flight)
        return in_flight == 0

    async def _ask_for_life(self) -> None:
        try:
            await self._server.score([PROBE_IDS], timeout_s=self._hang_s)
            self._pulse.probed(time.monotonic(), answered=True)
        except EngineError as error:
            log.warning("no answer to the probe of life: %s", error)
            self._pulse.probed(time.monotonic(), answered=False)

    def _trouble(self) -> str:
        """What is wrong with the server; empty for one that is well."""
        if not self._is_at_work:
            return "being started again"
        silent_s = self._pulse.silent_s(time.monotonic())
        return "" if silent_s < SILENT_S else f"without a sign of life for {silent_s:.0f} s"
