"""The lines of a tree file as a parquet table and back: a row a line, its columns the line's fields.

A table is written once, from a file of lines that is complete, and appears by one rename.
"""

import types
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import msgspec

from treepo_async.errors import DataError, WireError
from treepo_async.wire.forms import FLOAT32_FIELDS, Form, fields_of_line, line_of_row
from treepo_async.wire.whole_file import whole_file

ROWS_PER_GROUP = 256
"""What a reader has in memory at once."""


def write_table(lines_file: Path, table: Path, form: Form) -> None:
    """Write the lines of a file as a table; returns once it is on disk.

    Args:
        lines_file: whole lines.
        table: replaced.
        form: of the lines.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(_arrow_fields(pa, form.line))
    with (
        lines_file.open("rb") as lines,
        whole_file(table) as file,
        pq.ParquetWriter(file, schema) as writer,
    ):
        while batch := list(islice(lines, ROWS_PER_GROUP)):
            rows = [fields_of_line(line, form) for line in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def read_lines(table: Path, form: Form) -> Iterator[bytes]:
    """The lines that a table was written from, without line ends.

    Raises:
        DataError: the file is no parquet, or not of this form.
    """
    reader = TableReader(table)
    for index in range(len(reader)):
        try:
            yield line_of_row(reader.row(index), form)
        except WireError as error:
            raise DataError(f"{table} row {index + 1}: {error}") from error


class TableReader:
    """Rows by number, one group of them in memory."""

    def __init__(self, table: Path) -> None:
        """Open.

        Raises:
            DataError: the file is no parquet.
        """
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        # what a damaged page may raise besides: texts that are no UTF-8
        self._damage = (ArrowException, OSError, UnicodeDecodeError)
        try:
            self._file = ParquetFile(table)
        except (ArrowException, OSError) as error:
            raise DataError(f"{table} is not a parquet file: {error}; write it again") from error
        groups = range(self._file.metadata.num_row_groups)
        self._sizes = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._group, self._rows = -1, list[dict[str, Any]]()

    def __len__(self) -> int:
        return sum(self._sizes)

    def row(self, index: int) -> dict[str, Any]:
        """The fields of a row.

        Raises:
            WireError: its group of rows is damaged.
        """
        group = 0
        while index >= self._sizes[group]:
            index -= self._sizes[group]
            group += 1
        if group != self._group:
            try:
                rows = self._file.read_row_group(group).to_pylist()
            except self._damage as error:
                raise WireError(f"table rows are damaged: {error}") from error
            self._group, self._rows = group, rows
        return self._rows[index]


def _arrow_fields(pa: Any, struct: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    return [(f.name, _arrow(pa, f.name, f.type)) for f in msgspec.structs.fields(struct)]


def _arrow(pa: Any, name: str, hint: Any) -> Any:
    """The column type of a field."""
    inner = [arg for arg in get_args(hint) if arg not in (types.NoneType, ...)]
    if get_origin(hint) in (Union, types.UnionType):
        return _arrow(pa, name, inner[0])
    if get_origin(hint) in (list, tuple, Sequence):
        return pa.list_(_arrow(pa, name, inner[0]))
    if issubclass(hint, msgspec.Struct):
        return pa.struct(_arrow_fields(pa, hint))
    if issubclass(hint, bool):
        return pa.bool_()
    if issubclass(hint, int):
        return pa.int32() if name.endswith("token_ids") else pa.int64()
    if issubclass(hint, float):
        return pa.float32() if name in FLOAT32_FIELDS else pa.float64()
    return pa.string()
