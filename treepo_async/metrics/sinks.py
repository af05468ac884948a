"""Where step records go: `metrics.jsonl` always, TensorBoard events beside it.

A sink may raise OSError, as on a full disk; one within `SparedSink` does not, so that no run ends over a record.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Takes one flat record per step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Store the record; `record["step"]` numbers it."""

    def close(self) -> None:
        """Flush and release files."""


class JsonlSink:
    """One JSON object a line, written at once; of one that cannot be written nothing is left."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Sink`."""
        left = memoryview(json.dumps(record).encode() + b"\n")
        num_written = 0
        try:
            while left:
                taken = self._file.write(left)
                left, num_written = left[taken:], num_written + taken
        except OSError:
            if num_written:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._file.tell() - num_written)
            raise

    def close(self) -> None:
        """See `Sink`."""
        self._file.close()


class TensorBoardSink:
    """Every number of a record as a scalar."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Sink`."""
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in record.items()
            if isinstance(value, int | float) and name not in ("step", "time")
        ]
        event = self._event(
            step=record["step"], wall_time=record["time"], summary=self._summary(value=values)
        )
        self._writer.add_event(event)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class SparedSink:
    """A sink whose records are dropped where they cannot be written; the first of a series is told of."""

    def __init__(self, sink: Sink, name: str, say: Callable[[str], None]) -> None:
        """Guard a sink.

        Args:
            sink: which one.
            name: of what it writes, for a person.
            say: takes a line.
        """
        self._sink, self._name, self._say = sink, name, say
        self.num_dropped = 0
        self._is_told = False

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Sink`."""
        try:
            self._sink.write(record)
        except OSError as error:
            self.num_dropped += 1
            if not self._is_told:
                self._say(
                    f"ALARM {self._name} cannot be written: {error.strerror or error}; records are dropped until it can"
                )
            self._is_told = True
        else:
            self._is_told = False

    def close(self) -> None:
        """See `Sink`."""
        try:
            self._sink.close()
        except OSError as error:
            self._say(f"ALARM {self._name} cannot be closed: {error.strerror or error}")
        if self.num_dropped:
            self._say(f"{self._name} lacks {self.num_dropped} records")
