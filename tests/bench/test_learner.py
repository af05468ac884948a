"""Small sweeps over the learner on a model of two layers, in this process; and what the benchmark may import."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from treepo_async.bench.learner_cells import Way, parse
from treepo_async.bench.learner_samples import Origin
from treepo_async.bench.learner_shapes import SHAPES, find_shape
from treepo_async.bench.learner_trees import trees_of
from treepo_async.errors import ConfigError
from treepo_async.wire.tree_line import encode_line

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["shape=2x64", "width=4", "depth=3", "segment=4", "prompt=5"]
ORIGIN = Origin("c0de", "cpu")

MEASURE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"no {name} on this machine", name=name)

sys.meta_path.insert(0, Missing())
import launch.bench
sys.exit(launch.bench.main(["learner", *sys.argv[2:]]))
"""
"""A machine that has only torch, numpy and Megatron-Core."""


def measured(*words, missing="", timeout_s=50):
    return subprocess.run(
        [sys.executable, "-c", MEASURE, missing, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.engine
def test_a_sweep_needs_little_writes_its_files_and_is_not_repeated(tmp_path):
    missing = "omegaconf,msgspec,safetensors,transformers,ray,sglang,zmq,psutil,pyarrow,aiohttp,matplotlib"
    words = [*SMALL, "branching=late,treepo", "rounds=2", f"out={tmp_path}"]
    done = measured(*words, missing=missing)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "samples.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["branching"], row["round"], row["way"]) for row in rows] == [
        ("late", "1", "tree"),
        ("late", "1", "flat"),
        ("late", "2", "flat"),
        ("late", "2", "tree"),
        ("treepo", "1", "tree"),
        ("treepo", "1", "flat"),
        ("treepo", "1", "padded"),
        ("treepo", "2", "flat"),
        ("treepo", "2", "padded"),
        ("treepo", "2", "tree"),
    ]
    assert [int(row["tokens"]) for row in rows[:2]] == [5 + 4 * (1 + 2 + 4), 4 * (5 + 4 * 3)]
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 3
    assert "| late 3x4 width 4 prompt 5 | 4 | 68 / 33 |" in (tmp_path / "table.md").read_text()
    (entry,) = json.loads((tmp_path / "environment.json").read_text())
    assert entry["torch_threads"] >= 1
    assert entry["torch"] is not None

    again = measured(*words)
    assert again.returncode == 0, again.stderr
    assert "round" not in again.stdout
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 11

    # as if other code had measured them
    text = (tmp_path / "samples.csv").read_text().replace(rows[0]["code"], "0123456789ab")
    (tmp_path / "samples.csv").write_text(text)
    other = measured(*words, "branching=late", "rounds=1")
    assert other.returncode == 0, other.stderr
    assert "not counted, of other code or another device: 10 samples" in other.stdout
    assert other.stdout.count("round 1") == 1
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 13
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 2


@pytest.mark.engine
@pytest.mark.usefixtures("groups")
def test_every_way_trains_the_same_trajectories_and_no_way_changes_the_weights():
    from treepo_async.bench.learner_run import build, jobs_of, measure, warm_up

    (cell,) = parse([*SMALL, "branching=treepo", "attention=cascade", "prompts=2"]).cells
    learner = build(cell)
    before = [weight.detach().clone() for weight in learner.model.parameters()]
    jobs = jobs_of(cell, learner.shape)
    assert list(jobs) == [Way.TREE, Way.FLAT, Way.PADDED]
    warmed = warm_up(learner, jobs, cell.dtype)
    found = {sample.way: sample for sample in measure(learner, cell, jobs, warmed, 1, ORIGIN)}
    assert len({sample.trajectories for sample in found.values()}) == 1
    assert found[Way.TREE].tokens < found[Way.FLAT].tokens < found[Way.PADDED].tokens
    assert found[Way.FLAT].trained == found[Way.PADDED].trained
    tree, flat = found[Way.TREE], found[Way.FLAT]
    assert tree.flops < flat.flops
    assert tree.gradient_norm == pytest.approx(flat.gradient_norm, rel=1e-4)
    assert 0 < tree.gradient_gap < 1e-4
    assert flat.gradient_gap == found[Way.PADDED].gradient_gap == 0
    assert all(sample.wall_s > 0 and sample.peak_bytes > 0 for sample in found.values())
    for weight, old in zip(learner.model.parameters(), before, strict=True):
        assert (weight == old).all()


@pytest.mark.engine
@pytest.mark.usefixtures("groups")
def test_ways_that_give_different_gradients_are_refused():
    from treepo_async.bench.learner_run import DifferentGradientError, build, jobs_of, warm_up

    (cell,) = parse([*SMALL, "branching=late", "attention=cascade"]).cells
    learner = build(cell)
    jobs = jobs_of(cell, learner.shape)
    share = jobs[Way.FLAT].share
    # a gradient of the same norm
    mirrored = replace(share, weights=tuple(-values for values in share.weights))
    jobs[Way.FLAT] = replace(jobs[Way.FLAT], share=mirrored)
    with pytest.raises(DifferentGradientError, match="differs from that of flat packing by 2 of"):
        warm_up(learner, jobs, cell.dtype)


@pytest.mark.engine
@pytest.mark.usefixtures("groups")
def test_generators_are_seeded_before_the_model_is_built(monkeypatch):
    """On CUDA Megatron draws weights from a generator that only seeding makes."""
    import torch

    from treepo_async.bench.learner_run import build
    from treepo_async.learner import build as module

    seeds = []

    def noted(*args):
        seeds.append(torch.initial_seed())
        return build_model(*args)

    build_model = module.build_model
    monkeypatch.setattr(module, "build_model", noted)
    (cell,) = parse([*SMALL, "branching=late", "attention=cascade"]).cells
    torch.manual_seed(123)
    build(cell)
    assert seeds == [0]


@pytest.mark.parametrize(("prompts", "is_padded"), [((5, 5), False), ((5, 9), True)])
def test_padding_is_measured_where_prompts_alone_differ_in_length(prompts, is_padded, tmp_path):
    from treepo_async.bench.learner_run import jobs_of

    (cell,) = parse([*SMALL, "branching=late", "attention=cascade", "prompts=2"]).cells
    shape = find_shape(cell.shape)
    trees = [
        tree
        for seed, prompt in enumerate(prompts)
        for tree in trees_of(replace(cell, prompt=prompt, prompts=seed + 1), shape.vocab_size)[-1:]
    ]
    file = tmp_path / "trees.jsonl"
    file.write_bytes(b"\n".join(map(encode_line, trees)))
    of_file = parse([f"trees={file}", "shape=2x64", "prompts=2", "attention=cascade"]).cells[0]
    assert (Way.PADDED in jobs_of(of_file, shape)) is is_padded


def test_a_shape_is_a_name_or_layers_by_hidden_size():
    assert find_shape("qwen2.5-7b") is SHAPES["qwen2.5-7b"]
    found = find_shape("4x512")
    assert found == SHAPES["cpu"]
    assert (find_shape("8x256").num_layers, find_shape("8x256").hidden_size) == (8, 256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-8b", "shape=qwen3-8b is unknown; it is one of cpu, qwen2.5-0.5b"),
        ("4x", "shape=4x is unknown"),
        ("4x100", "shape=4x100: the hidden size 100 is no multiple of 64"),
    ],
)
def test_any_other_shape_is_refused(name, message):
    with pytest.raises(ConfigError) as caught:
        find_shape(name)
    assert message in str(caught.value)
