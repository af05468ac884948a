"""What peers sent that was no tree: kept for a person to look at, the newest `max_files` of it.

Of a flood of it only a part is kept, `BURST` and then one every `EVERY_S`: writing files must not keep honest peers waiting.
A file is JSON: `reason`, `frame_bytes` (the lengths of all frames) and `begins` (the first `KEPT_BYTES` bytes, in hex).
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KEPT_BYTES = 4096
MAX_FRAMES = 64
"""Whose lengths are written."""
MAX_FILES = 100
BURST, EVERY_S = 16, 1.0

log = logging.getLogger(__name__)


class Quarantine:
    """A folder of refused input."""

    def __init__(
        self,
        folder: Path,
        max_files: int = MAX_FILES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._numbers = itertools.cycle(range(max_files))
        self._clock = clock
        self._spared, self._looked_at = float(BURST), clock()
        """Files that may be written now; as of that time."""

    def keep(self, reason: str, frames: Sequence[bytes]) -> str:
        """Write down what was refused. Gives the file's name, "" where it was not or could not be written."""
        if not self._may_write():
            return ""
        text = json.dumps(
            {
                "reason": reason[:KEPT_BYTES],
                "frame_bytes": [len(frame) for frame in frames[:MAX_FRAMES]],
                "begins": _beginning(frames).hex(),
            }
        )
        file = self._folder / f"{next(self._numbers):04}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        except OSError as error:
            log.warning("what was refused could not be kept: %s", error)
            return ""
        return file.name

    def _may_write(self) -> bool:
        now = self._clock()
        self._spared = min(BURST, self._spared + (now - self._looked_at) / EVERY_S)
        self._looked_at = now
        if self._spared < 1:
            return False
        self._spared -= 1
        return True


def _beginning(frames: Sequence[bytes]) -> bytes:
    begins = b""
    for frame in frames:
        begins += bytes(frame[: KEPT_BYTES - len(begins)])
        if len(begins) == KEPT_BYTES:
            break
    return begins
