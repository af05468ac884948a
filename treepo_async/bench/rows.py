"""A CSV file of samples that is only ever appended to, and its rows read back.

Neighbours: `samples` and `learner_samples` say what stands in a row.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo_async.errors import DataError

WAY_OUT = "remove it, or take another out="


def append_rows(file: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows, after a header if the file is new."""
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(file: Path, types: Mapping[str, Callable[[str], Any]]) -> Iterator[dict[str, Any]]:
    """The values of each row; none when there is no file.

    Args:
        file: that `append_rows` wrote.
        types: what to make of the text of each column that is wanted.

    Raises:
        DataError: a line that `append_rows` did not write.
    """
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    for number, row in enumerate(csv.DictReader(lines), start=2):
        place = f"{file} line {number}"
        if not lines[number - 1].endswith("\n"):
            raise DataError(f"{place} was cut off; {WAY_OUT}")
        try:
            yield {name: of(row[name]) for name, of in types.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place} is no sample ({error!r}); {WAY_OUT}") from error
