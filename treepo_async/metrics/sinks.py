"""Where step records go: `metrics.jsonl` always, TensorBoard events beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Sink(Protocol):
    """Takes one flat record per step."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Store the record; `record["step"]` numbers it."""

    def close(self) -> None:
        """Flush and release files."""


class JsonlSink:
    """One JSON object a line, flushed at once."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Sink`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

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
