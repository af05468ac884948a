"""The checks of tree attention: what they pass and, above all, what they do not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from treepo_async.bench import attention
from treepo_async.bench.attention_checks import (
    Heads,
    Memory,
    exactness,
    grows_linearly,
    memory,
)
from treepo_async.bench.forests import regular_end
from treepo_async.learner.attention.dense import DensePlan
from treepo_async.learner.attention.plan import planner

ROOT = Path(__file__).resolve().parents[2]
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
    assert grows_linearly([measured(n, 1000 + 1e6 / n) for n in sizes], 4000)
    assert not grows_linearly([measured(n, 1000 + n) for n in sizes], 4000)
    # the first is not judged
    assert not grows_linearly([measured(n, 1000 + 1e8 / n) for n in sizes][::-1], 4000)
    assert grows_linearly([measured(2048, 1), *(measured(n, 1000) for n in sizes[1:])], 4000)


def test_what_was_not_judged_has_not_passed():
    rows = [measured(n, 1000.0) for n in (2048, 4096, 16384)]
    assert grows_linearly(rows, 4096)
    assert not grows_linearly(rows, 16384)
    assert not grows_linearly(rows, 20000)
    assert not grows_linearly([replace(row, bytes_per_token=0.0) for row in rows], 4096)


@pytest.mark.parametrize(("backend", "is_linear"), [("cascade", True), ("dense", False)])
def test_the_memory_of_the_cascade_grows_with_the_tokens_and_that_of_dense_does_not(
    backend, is_linear
):
    rows = list(
        memory(
            planner(backend),
            align=1,
            device="cpu",
            heads=Heads(4, 2, 16),
            dtype=torch.float32,
            tokens=(1024, 2048, 4096) if is_linear else (1024, 2048),
        )
    )
    assert grows_linearly(rows, 900) is is_linear


def test_pairs_are_counted_on_the_tokens_that_are_left_of_the_tree():
    (row,) = memory(
        planner("dense"),
        align=128,
        device="cpu",
        heads=Heads(2, 1, 4),
        dtype=torch.float32,
        tokens=(512,),
    )
    whole = regular_end(prompt=22, segment=11, depth=7, forks=(0, 2, 4, 6))
    assert (row.tokens, len(whole)) == (384, 506)
    visible = sum(min(int(end), 384) - place for place, end in enumerate(whole[:384]))
    assert row.pairs == visible


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: '' is no check; it is one of exactness, memory\n"),
        (
            ["memory", "sice=full"],
            "error: sice is an unknown key; the keys are backend, size, dtype, out",
        ),
        (["memory", "size=tiny"], "error: size='tiny' is unknown; it is one of full, small\n"),
        (
            ["exactness", "dtype=half"],
            "error: dtype='half' is unknown; it is one of float32, bfloat16, all",
        ),
        (["memory", "backend=flax"], "error: learner.attention='flax' is unknown"),
    ],
)
def test_wrong_words_end_with_2_and_their_name(words, message, capsys):
    assert attention.main(words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_part_writes_its_rows_and_says_that_it_passed(tmp_path):
    words = ["memory", "size=small", "backend=cascade", f"out={tmp_path}"]
    # as the campaign runs it: a process that has had other memory before uses that again, and its peak says little
    done = subprocess.run(
        [sys.executable, "-m", "treepo_async.bench.attention", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "attention_memory.json").read_text())
    assert (written["backend"], written["passed"], len(written["rows"])) == ("cascade", True, 3)
    assert done.stdout.endswith("memory: passed, 3 rows\n")
