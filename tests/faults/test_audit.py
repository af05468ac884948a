"""The audit of a job's files, of jobs that are whole and of jobs that are made wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.faults.audit import audit
from tests.oracle import random_tree
from treepo_async.wire.tree_line import encode_line

IDS = ["p-1", "p-2", "p-3", "p-4"]
VOCAB_SIZE = 128


def tree(prompt_id):
    made = random_tree(np.random.default_rng(1), num_segments=4, vocab_size=VOCAB_SIZE)
    return encode_line(replace(made, prompt=replace(made.prompt, id=prompt_id)))


def ending(prompt_id, outcome="skipped", reason="too long"):
    return json.dumps({"prompt_id": prompt_id, "outcome": outcome, "reason": reason}).encode()


@pytest.fixture
def found(tmp_path):
    """What is found in a job with these trees and endings."""

    def look(trees, endings, vocab_size=VOCAB_SIZE):
        out = tmp_path / "o.jsonl"
        out.write_bytes(b"".join(line + b"\n" for line in trees))
        (tmp_path / "o.jsonl.failed.jsonl").write_bytes(b"".join(e + b"\n" for e in endings))
        return audit(out, IDS, vocab_size=vocab_size)

    return look


def test_a_job_is_whole_where_each_prompt_has_a_tree_or_a_reason(found):
    whole = found([tree("p-3"), tree("p-1")], [ending("p-2"), ending("p-4", "failed")])
    assert (whole.num_trees, whole.wrong) == (2, [])
    assert whole.endings == {"skipped": 1, "failed": 1}


@pytest.mark.parametrize(
    ("trees", "endings", "reason"),
    [
        (["p-1", "p-2"], ["p-3"], "p-4 ended 0 times"),
        (["p-1", "p-2", "p-1"], ["p-3", "p-4"], "p-1 ended 2 times"),
        (["p-1", "p-2"], ["p-3", "p-4", "p-2"], "p-2 ended 2 times"),
        (["p-1", "p-2"], ["p-3", "p-4", "p-3"], "p-3 ended 2 times"),
        (["p-1", "p-2", "q-5"], ["p-3", "p-4"], "q-5 is no prompt of the job"),
    ],
    ids=["lost", "two trees", "a tree and a reason", "two reasons", "stranger"],
)
def test_a_prompt_that_did_not_end_exactly_once_is_named(found, trees, endings, reason):
    assert found(map(tree, trees), map(ending, endings)).wrong == [reason]


def test_a_tree_that_does_not_parse_is_named_and_its_prompt_counts_as_lost(found):
    torn = found([tree("p-1"), tree("p-2")[:-30]], [ending("p-3"), ending("p-4")])
    assert "o.jsonl entry 2: " in torn.wrong[0]
    assert torn.wrong[1:] == ["p-2 ended 0 times"]
    (first, *_) = found([tree("p-1")], map(ending, IDS[1:]), vocab_size=2).wrong
    assert "o.jsonl entry 1: " in first


@pytest.mark.parametrize(
    "line",
    [b'{"prompt_id": "p-4"', b"[]", b'{"prompt_id": "p-4"}', ending("p-4", "lost"), ending("p-4", reason="")],
)  # fmt: skip
def test_an_ending_that_does_not_parse_is_named(found, line):
    bad = found([tree("p-1"), tree("p-2")], [ending("p-3"), line]).wrong
    assert "failed.jsonl line 2: " in bad[0]
    assert bad[1:] == ["p-4 ended 0 times"]


def test_a_job_without_a_tree_has_lost_all(found):
    assert len(found([], []).wrong) == 1 + len(IDS)
