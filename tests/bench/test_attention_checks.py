"""The checks of tree attention: what they pass and, above all, what they do not."""

import json

import pytest
import torch

from treepo_async.bench import attention
from treepo_async.bench.attention_checks import Heads, Memory, exactness, grows_linearly
from treepo_async.learner.attention.dense import DensePlan
from treepo_async.learner.attention.plan import planner

SMALL = {"device": "cpu", "heads": Heads(4, 2, 16), "tokens": (1, 90), "segments": (1, 30)}


class Leaking(DensePlan):
    """Sees one token too many: the last key of a subtree that has closed."""

    def __init__(self, end):
        super().__init__(end)
        self.mask |= torch.eye(len(end), dtype=torch.bool).roll(1, dims=0).tril()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cascade", "dense"])
def test_backends_are_exact(backend, dtype):
    rows = list(exactness(planner(backend), dtype=dtype, **SMALL))
    assert [row for row in rows if not row.passed] == []
    assert {row.quantity for row in rows if row.tokens == 90} >= {"output", "key gradient"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_leaks_is_found(dtype):
    assert not all(row.passed for row in exactness(Leaking, dtype=dtype, **SMALL))


def measured(tokens, bytes_per_token):
    return Memory(tokens, 0, 0.0, bytes_per_token, 0.0, 0.0, 0.0, 0.0)


def test_memory_may_grow_with_the_tokens_and_not_with_their_square():
    sizes = (2048, 4096, 16384, 65536)
    assert grows_linearly([measured(n, 1000 + 1e6 / n) for n in sizes])
    assert not grows_linearly([measured(n, 1000 + n) for n in sizes])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: '' is no check; it is one of exactness, memory\n"),
        (["memory", "sice=full"], "error: sice is an unknown key; the keys are backend, size, out"),
        (["memory", "size=tiny"], "error: size='tiny' is unknown; it is one of full, small\n"),
        (["memory", "backend=flax"], "error: learner.attention='flax' is unknown"),
    ],
)
def test_wrong_words_end_with_2_and_their_name(words, message, capsys):
    assert attention.main(words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_part_writes_its_rows_and_says_that_it_passed(tmp_path, capsys):
    assert attention.main(["memory", "size=small", "backend=dense", f"out={tmp_path}"]) == 0
    written = json.loads((tmp_path / "attention_memory.json").read_text())
    assert (written["backend"], written["passed"], len(written["rows"])) == ("dense", True, 3)
    assert capsys.readouterr().out.endswith("memory: passed, 3 rows\n")
