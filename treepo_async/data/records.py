"""Question and answer records from JSONL, parquet or a Hugging Face dataset.

`source` turns them into prompts. The invariant: a record that cannot be used is skipped and counted, never
fatal, and a record keeps its number whatever happens to the ones before it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_async.errors import ConfigError, DataError

PROMPT_FIELDS = ("prompt", "question", "problem")
ANSWER_FIELDS = ("answer", "solution", "ground_truth")
MAX_MESSAGES = 5
"""Messages kept about skipped records."""

_DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+){0,2}")


@dataclass(frozen=True, slots=True)
class Record:
    """One problem of a file."""

    number: int
    """Line or row number in its source, from 1."""
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record that holds no problem."""

    number: int
    reason: str
    """With the way out."""


@dataclass(frozen=True, slots=True)
class Records:
    """What could be read of a source."""

    name: str
    """File stem or dataset name, the first part of a prompt's id."""
    records: tuple[Record, ...]
    """At least one."""
    num_skipped: int
    skipped: list[str]
    """The first few reasons, each with source, record number and the way out."""


_Row = tuple[int, Mapping[str, Any] | DataError]
"""A record's number and its fields, or why it has none."""


def read_records(data: str, prompt_field: str | None, answer_field: str | None) -> Records:
    """Read every usable record of a source into memory.

    Args:
        data: path of a `.jsonl` or `.parquet` file, or a Hugging Face dataset as
            `owner/name[:config[:split]]` (split `train` unless given).
        prompt_field: field of the question, dots for nested ones; None looks for a well-known name.
        answer_field: field of the answer, likewise.

    Raises:
        ConfigError: the source does not exist or has a form that is not read.
        DataError: no record is usable.
    """
    name, found = each_record(data, prompt_field, answer_field)
    records: list[Record] = []
    skipped: list[str] = []
    num_skipped = 0
    for record in found:
        if isinstance(record, Record):
            records.append(record)
            continue
        num_skipped += 1
        if len(skipped) < MAX_MESSAGES:
            skipped.append(f"{data} record {record.number}: {record.reason}")
    if not records:
        reason = skipped[0] if skipped else f"{data} is empty; give a source with records"
        raise DataError(f"no usable record ({num_skipped} skipped): {reason}")
    return Records(name, tuple(records), num_skipped, skipped)


def each_record(
    data: str, prompt_field: str | None, answer_field: str | None
) -> tuple[str, Iterator[Record | Unusable]]:
    """The name of a source and all of its records in their order, read as they are asked for.

    Args:
        data: as for `read_records`.
        prompt_field: likewise.
        answer_field: likewise.

    Raises:
        ConfigError: the source does not exist or has a form that is not read.
    """
    name, rows = _open(data)

    def records() -> Iterator[Record | Unusable]:
        for number, row in rows:
            try:
                yield _record(number, row, prompt_field, answer_field)
            except DataError as error:
                yield Unusable(number, str(error))

    return name, records()


def final_gsm8k_answer(answer: str) -> str:
    """The `18` of a worked answer that ends in a line `#### 18`; any other answer as it is."""
    last_line = answer.rstrip().rpartition("\n")[2]
    final = last_line.removeprefix("####").strip()
    return final if final and last_line.startswith("####") else answer


def is_file(data: str) -> bool:
    """Whether a source is a file of this machine, there or not, rather than a dataset of the hub."""
    return Path(data).suffix in (".jsonl", ".parquet") or not _DATASET_ID.fullmatch(data)


def _open(data: str) -> tuple[str, Iterator[_Row]]:
    path = Path(data).expanduser()
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix in readers:
        if not path.is_file():
            raise ConfigError(f"data file {data} does not exist; check the path")
        return path.stem, readers[path.suffix](path)
    if _DATASET_ID.fullmatch(data) and not path.exists():
        return data.split("/")[1].replace(":", "-"), _dataset_rows(data)
    raise ConfigError(
        f"data {data!r} is not read; give tiny, a .jsonl or .parquet file, or a Hugging Face dataset "
        "as owner/name[:config[:split]]"
    )


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Mapping[str, Any] | DataError:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"not valid JSON ({error}); repair or delete the line")
    if not isinstance(fields, dict):
        return DataError(f"holds a {type(fields).__name__}; write one JSON object on each line")
    return fields


def _parquet_rows(path: Path) -> Iterator[_Row]:
    # here, because pyarrow takes longer to import than a small file to read
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}; write it again") from error
    number = 0
    for group in range(file.num_row_groups):
        end = number + file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(row_groups=[group]):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            # nothing tells where in the group the damage ends
            reason = f"its rows are damaged ({error}); write the file again"
            yield from ((lost, DataError(reason)) for lost in range(number + 1, end + 1))
            number = end


def _dataset_rows(data: str) -> Iterator[_Row]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data {data!r} is a Hugging Face dataset, which needs the optional extra `datasets`; "
            "pip install 'treepo-async[datasets]', or give a .jsonl or .parquet file"
        ) from error
    name, config, split = (*data.split(":"), None, None)[:3]
    yield from enumerate(load_dataset(name, config, split=split or "train"), start=1)


def _record(
    number: int,
    row: Mapping[str, Any] | DataError,
    prompt_field: str | None,
    answer_field: str | None,
) -> Record:
    if isinstance(row, DataError):
        raise row
    question = _text(row, prompt_field, PROMPT_FIELDS, "data.prompt_field")
    answer = _text(row, answer_field, ANSWER_FIELDS, "data.answer_field")
    for text in (question, answer):
        _check_encodable(text)
    return Record(number, question, final_gsm8k_answer(answer))


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds half a character at {error.start}; repair or delete it") from error


def _text(
    fields: Mapping[str, Any], wanted: str | None, well_known: tuple[str, ...], key: str
) -> str:
    """The one field's value as text."""
    name = wanted or _find(fields, well_known, key)
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise DataError(f"has no field {name!r} but {_names(fields)}; set {key} to one of them")
        value = value[part]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(
            f"field {name!r} is a {type(value).__name__}, not text or a number; set {key} to another"
        )
    text = str(value).strip()
    if not text:
        raise DataError(f"field {name!r} is empty; fill it or delete the record")
    return text


def _find(fields: Mapping[str, Any], well_known: tuple[str, ...], key: str) -> str:
    found = [name for name in well_known if name in fields]
    if len(found) == 1:
        return found[0]
    problem = f"more than one of them ({', '.join(found)})" if found else "none of them"
    raise DataError(
        f"looked for {', '.join(well_known)} and found {problem}; "
        f"the record's fields are {_names(fields)}: set {key} to one of them"
    )


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(str(name) for name in fields) or "no fields"
