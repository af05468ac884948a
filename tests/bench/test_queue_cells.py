from pathlib import Path

import pytest

from treepo_async.bench.queue_cells import parse
from treepo_async.errors import ConfigError


def test_without_words_trees_of_both_sizes_are_measured():
    options = parse([])
    assert (options.tokens, options.segment) == ((65_536, 4_096), 256)
    assert (options.actors, options.trees, options.out) == (256, 0, Path("runs/bench-queue"))


def test_words_replace_what_they_name():
    options = parse(["tokens=512", "trees=32", "actors=0", "out=x"])
    assert (options.tokens, options.trees, options.actors, options.out) == ((512,), 32, 0, Path("x"))  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tree=7", "unknown key tree; did you mean trees?"),
        ("rounds=0", "rounds='0' is not a whole number from 1"),
        ("tokens=1024,x", "tokens='x' is not a whole number"),
        ("tokens=1000", "tokens=1000 is no multiple of segment=256"),
        ("burst=100", "burst=100 is no multiple of the batches of 16"),
        ("trees=100", "trees=100 is no multiple of the batches of 16"),
        ("window=17", "window=17 is more than 16"),
    ],
)
def test_a_bad_word_is_refused_by_name(word, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse([word])
