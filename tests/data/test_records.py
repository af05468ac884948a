import json
import sys
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

from treepo_async.data.records import final_gsm8k_answer, read_records
from treepo_async.errors import ConfigError, DataError

GSM8K = [
    {
        "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many?",
        "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": "How much is it?", "answer": "It is 1000+1.\n#### 1,001"},
]


def write_jsonl(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return str(path)


def test_gsm8k_records_are_reduced_to_their_final_answer(tmp_path):
    found = read_records(write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K), None, None)
    assert found.name == "gsm8k"
    assert [(r.number, r.answer) for r in found.records] == [(1, "72"), (2, "1,001")]
    assert found.records[1].question == "How much is it?"
    assert (found.num_skipped, found.skipped) == (0, [])


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("work\n#### 18", "18"),
        ("#### -3.5  \n\n", "-3.5"),
        ("####18", "18"),
        ("18", "18"),
        ("#### 18\nbut then more", "#### 18\nbut then more"),
        ("costs #### 18", "costs #### 18"),
        ("work\n####", "work\n####"),
    ],
)
def test_only_a_last_line_with_hashes_is_a_gsm8k_answer(answer, final):
    assert final_gsm8k_answer(answer) == final


@pytest.mark.parametrize("question", ["prompt", "question", "problem"])
@pytest.mark.parametrize("answer", ["answer", "solution", "ground_truth"])
def test_well_known_fields_are_found(tmp_path, question, answer):
    path = write_jsonl(tmp_path / "a.jsonl", [{question: "2+2?", answer: 4, "level": 1}])
    record = read_records(path, None, None).records[0]
    assert (record.question, record.answer) == ("2+2?", "4")


def test_named_fields_win_and_dots_reach_inside(tmp_path):
    fields = {"question": "no", "text": "2+2?", "answer": "no", "reward": {"truth": "4"}}
    path = write_jsonl(tmp_path / "a.jsonl", [fields])
    record = read_records(path, "text", "reward.truth").records[0]
    assert (record.question, record.answer) == ("2+2?", "4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "q", "answer": "1"}, "found none of them.*fields are text, answer.*prompt_field"),
        (
            {"problem": "q", "solution": "s", "answer": "1"},
            r"more than one.*answer, solution.*answer_",
        ),
        ({"question": "q", "answer": None}, "'answer' is a NoneType, not text or a number"),
        ({"question": ["q"], "answer": "1"}, "'question' is a list"),
        ({"question": "q", "answer": True}, "'answer' is a bool"),
        ({"question": "q", "answer": " "}, "'answer' is empty"),
        ({}, "the record's fields are no fields"),
        ("[1]", "holds a list; write one JSON object"),
        ('{"question"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_when_no_record_is_left_the_first_reason_is_raised(tmp_path, fields, message):
    path = write_jsonl(tmp_path / "a.jsonl", [fields])
    with pytest.raises(DataError, match=message) as raised:
        read_records(path, None, None)
    assert f"{path} record 1" in str(raised.value)


def test_a_named_field_that_is_not_there_is_told_with_those_that_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", GSM8K)
    with pytest.raises(
        DataError, match=r"no field 'query' but question, answer; set data\.prompt_field"
    ):
        read_records(path, "query", None)


def test_broken_records_are_skipped_and_counted_and_numbers_stay(tmp_path):
    lines = ['{"question": "q', "", *["{}"] * 10, {"question": "q", "answer": "1"}, b"\xff".hex()]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, lines)
    path.write_bytes(path.read_bytes() + b'\n{"question": "\xff", "answer": "1"}\n')
    found = read_records(str(path), None, None)
    assert [r.number for r in found.records] == [13]
    assert found.num_skipped == 13
    assert len(found.skipped) == 5
    assert found.skipped[0].startswith(f"{path} record 1: not valid JSON")
    assert found.skipped[1].startswith(f"{path} record 3: looked for")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"0 skipped.*a\.jsonl is empty"):
        read_records(str(tmp_path / "a.jsonl"), None, None)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_record_with_half_a_character_is_skipped(tmp_path, field):
    broken = json.dumps({"question": "q", "answer": "1"} | {field: "\ud83d"})
    path = tmp_path / "a.jsonl"
    path.write_text(f'{broken}\n{{"question": "q", "answer": "1"}}\n')
    found = read_records(str(path), None, None)
    assert [r.number for r in found.records] == [2]
    assert "half a character" in found.skipped[0]


def test_parquet_is_read_like_jsonl(tmp_path):
    records = [*GSM8K, {"question": None, "answer": "1"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "p.parquet")
    found = read_records(str(tmp_path / "p.parquet"), None, None)
    assert (
        found.records == read_records(write_jsonl(tmp_path / "p.jsonl", GSM8K), None, None).records
    )
    assert found.num_skipped == 1


def test_a_damaged_parquet_file_is_refused(tmp_path):
    (tmp_path / "p.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"p\.parquet is not a parquet file"):
        read_records(str(tmp_path / "p.parquet"), None, None)


def test_a_damaged_footer_of_a_parquet_file_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GSM8K), path)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    content[-8 - size : -8] = b"\xff" * size
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.parquet is not a parquet file"):
        read_records(str(path), None, None)


def test_a_damaged_group_of_rows_is_skipped_and_numbers_stay(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [{"question": f"q{i}", "answer": "1"} for i in range(1, 7)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(content)
    found = read_records(str(path), None, None)
    assert [(r.number, r.question) for r in found.records] == [(n, f"q{n}") for n in (1, 2, 5, 6)]
    assert found.num_skipped == 2
    assert "record 3: its rows are damaged" in found.skipped[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere/train.jsonl", "nowhere/train.jsonl does not exist"),
        ("train.csv", "'train.csv' is not read; give tiny, a .jsonl or .parquet file"),
        ("a/b/c/d", "is not read"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        read_records(data, None, None)


def test_a_dataset_id_without_the_extra_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the optional extra `datasets`; pip install"):
        read_records("openai/gsm8k", None, None)


@pytest.mark.parametrize(
    ("data", "asked", "name"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train"), "gsm8k"),
        ("openai/gsm8k:main", ("openai/gsm8k", "main", "train"), "gsm8k-main"),
        ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test"), "gsm8k-main-test"),
    ],
)
def test_a_dataset_id_is_loaded_with_its_config_and_split(monkeypatch, data, asked, name):
    calls = []
    library = ModuleType("datasets")
    library.load_dataset = lambda path, config, split: calls.append((path, config, split)) or GSM8K
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = read_records(data, None, None)
    assert calls == [asked]
    assert found.name == name
    assert [r.answer for r in found.records] == ["72", "1,001"]
