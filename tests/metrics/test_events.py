import contextlib
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.metrics.events import emit, parse

FINITE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def emitted(capsys, event, **fields):
    emit(event, **fields)
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert out.count("\n") == 1, "one line"
    return parse(out)


@given(fields=st.dictionaries(st.text(min_size=1).filter(lambda key: key != "event"), FINITE))
def test_an_event_comes_back_as_it_was_sent(fields):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        emit("step", **fields)
    assert parse(out.getvalue()) == {"event": "step", **fields}


def test_text_of_several_lines_stays_on_one(capsys):
    event = emitted(capsys, "alarm", detail='first\nsecond\r "quoted" \u2028 end')
    assert event == {"event": "alarm", "detail": 'first\nsecond\r "quoted" \u2028 end'}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_numbers_that_are_not_finite_become_null_also_inside(capsys, value):
    event = emitted(
        capsys, "step", loss=value, seconds={"wall": value, "train": 2.5}, gaps=[1.0, value]
    )
    assert event == {
        "event": "step",
        "loss": None,
        "seconds": {"wall": None, "train": 2.5},
        "gaps": [1.0, None],
    }


def test_what_is_sent_is_json_for_everybody(capsys):
    emit("step", loss=math.nan, nested={"a": [math.inf]})
    line = capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "INFO: started",
        "7",
        "null",
        "[1]",
        '{"step": 1, "event": "step"}',
        ' {"event": "step"}',
        '{"event": "st',
        '{"event": "step"} and more',
        '{"event":}',
    ],
)
def test_a_line_that_is_no_event_is_left_to_the_log(line):
    assert parse(line) is None
