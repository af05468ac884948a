import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.config.layout import Layout
from treepo_async.errors import ConfigError

sizes = st.integers(1, 64)


@given(sizes, sizes, sizes)
def test_a_layout_reads_what_it_writes(tp, pp, dp):
    layout = Layout(tp, pp, dp)
    assert Layout.parse(str(layout)) == layout
    assert layout.world_size == tp * pp * dp


@given(st.permutations([("tp", 2), ("pp", 3), ("dp", 4)]), st.integers(1, 3))
def test_axes_come_in_any_order_and_default_to_one(axes, num_axes):
    text = "".join(f"{axis}{size}" for axis, size in axes[:num_axes])
    assert Layout.parse(text)._asdict() == {"tp": 1, "pp": 1, "dp": 1, **dict(axes[:num_axes])}


@pytest.mark.parametrize(
    ("text", "layout", "world_size"),
    [
        ("tp4pp2", Layout(4, 2, 1), 8),
        ("tp2pp2dp2", Layout(2, 2, 2), 8),
        ("dp3", Layout(1, 1, 3), 3),
        ("tp1", Layout(), 1),
    ],
)
def test_the_grammar_by_example(text, layout, world_size):
    assert Layout.parse(text) == layout
    assert layout.world_size == world_size


def test_a_single_rank_is_written_as_tp1():
    assert str(Layout()) == "tp1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tp",
        "4",
        "tp0",
        "tp2tp2",
        "cp2",
        "TP2",
        "tp-1",
        "tp 2",
        "tp2,pp2",
        "tp2x",
        "2tp",
        "tp2\n",
    ],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=re.escape(f"learner.layout={text!r} is not a layout")):
        Layout.parse(text)
