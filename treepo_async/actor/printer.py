"""Lines for a person, and one line of progress: it is overwritten on a terminal, and repeated now and then in a log.

Invariant: whatever is written, and whoever no longer reads it, nothing is raised. The work is in files.
"""

import contextlib
import logging
import os
import shutil
import time
from typing import TextIO

PERIOD_S = 10.0
"""Between two lines of progress in a log."""
CLEAR = "\r\x1b[2K"


class Printer:
    """Writes to one stream, until that is gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_gone = stream.closed
        self._is_terminal = not stream.closed and stream.isatty()
        self._began = time.monotonic()
        self._told = self._began

    def line(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        self.plain(f"[{self.seconds():6.1f} s] {text}")

    def plain(self, text: str) -> None:
        """A line that stays."""
        self._write((CLEAR if self._is_terminal else "") + text + "\n")

    def progress(self, text: str) -> None:
        """Where the work stands."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            self._write(CLEAR + text[: width - 1])
        elif time.monotonic() - self._told >= PERIOD_S:
            self._told = time.monotonic()
            self.line(text)

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._began

    def _write(self, text: str) -> None:
        if self._is_gone:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            # half a character of a record or of a scorer's message cannot be encoded otherwise
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            self._is_gone = True
            with contextlib.suppress(OSError, ValueError):
                self._forget()

    def _forget(self) -> None:
        """Send what is left in the stream's buffer nowhere: else it would fail once more at the end of the process."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self._stream.fileno())
        finally:
            os.close(nowhere)


class LogLines(logging.Handler):
    """Log records as lines of a printer, so that they do not run into the progress."""

    def __init__(self, printer: Printer) -> None:
        super().__init__(logging.WARNING)
        self._printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._printer.line(f"{record.levelname.lower()}: {self.format(record)}")
