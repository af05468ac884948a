"""Lines for a person, and one line of progress: it is overwritten on a terminal, and repeated now and then in a log."""

import logging
import shutil
import time
from typing import TextIO

PERIOD_S = 10.0
"""Between two lines of progress in a log."""
CLEAR = "\r\x1b[2K"


class Printer:
    """Writes to one stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._began = time.monotonic()
        self._told = self._began

    def line(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        self.plain(f"[{self.seconds():6.1f} s] {text}")

    def plain(self, text: str) -> None:
        """A line that stays."""
        self._stream.write((CLEAR if self._is_terminal else "") + text + "\n")
        self._stream.flush()

    def progress(self, text: str) -> None:
        """Where the work stands."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            self._stream.write(CLEAR + text[: width - 1])
            self._stream.flush()
        elif time.monotonic() - self._told >= PERIOD_S:
            self._told = time.monotonic()
            self.line(text)

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._began


class LogLines(logging.Handler):
    """Log records as lines of a printer, so that they do not run into the progress."""

    def __init__(self, printer: Printer) -> None:
        super().__init__(logging.WARNING)
        self._printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._printer.line(f"{record.levelname.lower()}: {self.format(record)}")
