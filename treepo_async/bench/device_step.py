"""A few updates of the learner on a device against the same on a CPU: `python -m treepo_async.bench.device_step [key=value ...]`.

Both are processes of their own, as one can see CUDA and the other cannot: each opens its process groups (NCCL with CUDA, gloo without),
builds a learner from a Hugging Face folder (`build.build_learner`), makes `updates` updates on the same made trees and writes losses, gradient norms and
log-probs of the trained policy. The CPU computes in float32; the device in float32, whose numbers must agree to rounding, and in bfloat16.
Without CUDA all compute on the CPU. Writes `device_step.json`. Exit codes: 0, 1 they disagree, 2 wrong words.

Needs torch, numpy, Megatron-Core, safetensors and tokenizers. Waits for its processes (`CHILD_S` each). Neighbours: `model` writes the folder,
`learner_trees` makes the trees.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treepo_async.bench import machine
from treepo_async.bench.cells import Stop
from treepo_async.bench.model import prepare
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

if TYPE_CHECKING:
    from treepo_async.learner.packing.share import Share

DEFAULTS = {"layers": "4", "hidden": "256", "updates": "3", "out": "gpu_campaign"}
CHILD_S = 180.0
ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2}
"""Largest difference from float32 on a CPU, by the dtype of the device: of losses and log-probs absolute, of gradient norms relative. An update
of Adam divides by the size of a gradient, so that rounding of small ones shows in what comes after."""
SEGMENT, PROMPT, BUDGET = 24, 40, 512
CHILD, ON_CPU = "--child", "cpu"
EXIT_FAILED, EXIT_BAD_USE = 1, 2
Numbers = dict[str, list[float]]


def main(words: Sequence[str]) -> int:
    """Compare, or be one of the compared. Gives the exit code."""
    if words[:1] == [CHILD]:
        sys.stdout.write(json.dumps(train(Path(words[1]), words[2], int(words[3]))) + "\n")
        return 0
    try:
        options = DEFAULTS | read_words(words, DEFAULTS)
        layers, hidden, updates = (int(options[key]) for key in ("layers", "hidden", "updates"))
    except (ConfigError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_USE
    with tempfile.TemporaryDirectory() as cache:
        folder = prepare(Path(cache), layers, hidden, Stop.NONE)
        expected = _trained(folder, "float32", updates, on_cpu=True)
        found = {name: _trained(folder, name, updates, on_cpu=False) for name in ALLOWED}
    rows = [row for name, result in found.items() for row in compare(name, result, expected)]
    for row in rows:
        sys.stdout.write("  ".join(f"{key}={_short(value)}" for key, value in row.items()) + "\n")
    passed = all(row["passed"] for row in rows)
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    about = {"passed": passed, "rows": rows, "expected": expected, "found": found}
    (out / "device_step.json").write_text(
        json.dumps({**about, **machine.describe()}, indent=2) + "\n"
    )
    return 0 if passed else EXIT_FAILED


def compare(
    dtype: str, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What each kind of number differs by at most, and whether that is allowed.

    Args:
        dtype: of what was found.
        found: from `train`.
        expected: from `train` on a CPU in float32.
    """
    rows = []
    for name in ("losses", "gradient_norms", "logprobs"):
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        scale = np.abs(b) if name == "gradient_norms" else 1.0
        gap = float(np.max(np.abs(a - b) / scale)) if a.shape == b.shape else float("inf")
        rows.append(
            {
                "device": found["device"],
                "groups": found["groups"],
                "attention": found["attention"],
                "dtype": dtype,
                "quantity": name,
                "gap": gap,
                # NaN is no agreement
                "passed": gap <= ALLOWED[dtype],
            }
        )
    return rows


def train(folder: Path, dtype: str, updates: int) -> dict[str, Any]:
    """Make the updates in this process, on CUDA where it sees it.

    Args:
        folder: of the model.
        dtype: of weights and activations.
        updates: at least one.
    """
    import torch
    import torch.distributed as dist

    from treepo_async.bench.learner_run import one_rank
    from treepo_async.learner.attention.plan import resolve
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.groups import device
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.packing.divide import divide

    with one_rank():
        learner = build_learner(
            folder,
            optimizer=OptimizerSettings(learning_rate=1e-4),
            loss=LossSettings(),
            microbatch_tokens=BUDGET,
            seed=0,
            dtype=getattr(torch, dtype),
        )
        batch = _batch(dtype, learner.shape.vocab_size)
        (share,) = divide(batch, num_replicas=1, budget_tokens=BUDGET)
        results = [learner.train(share) for _ in range(updates)]
        scored = learner.score(
            [batch.trees[0].prompt.token_ids, batch.trees[1].segments[0].token_ids]
        )
        return {
            "device": str(device()),
            "groups": dist.get_backend(),
            "attention": resolve("auto"),
            "losses": [result.loss for result in results],
            "gradient_norms": [result.grad_norm for result in results],
            "logprobs": [float(value) for values in scored for value in values],
        }


def _batch(dtype: str, vocab_size: int) -> "Share":
    """The trees of an update."""
    from treepo_async.bench.learner_cells import Branching, LearnerCell
    from treepo_async.bench.learner_trees import leaf_values, trees_of
    from treepo_async.learner.loss.normalizer import loss_weights
    from treepo_async.learner.packing.share import Share

    cell = LearnerCell(
        shape="",
        dtype=dtype,
        attention="auto",
        recompute="none",
        budget=BUDGET,
        prompts=3,
        trees="",
        branching=Branching.TREEPO,
        width=8,
        depth=5,
        segment=SEGMENT,
        prompt=PROMPT,
    )
    trees = trees_of(cell, vocab_size)
    advantages = leaf_values(trees)
    weights = tuple(loss_weights(trees, advantages, "token_mean"))
    return Share(tuple(trees), tuple(advantages), weights)


def _trained(folder: Path, dtype: str, updates: int, *, on_cpu: bool) -> dict[str, Any]:
    """What a process of its own found."""
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, CHILD, str(folder), dtype, str(updates)],
        # matrices this small gain nothing from threads, which on a busy machine wait long for each other
        env=os.environ
        | {"OMP_NUM_THREADS": "1"}
        | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=CHILD_S,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{dtype} on {found['device']}: losses {found['losses']}\n")
    sys.stdout.flush()
    return found


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
