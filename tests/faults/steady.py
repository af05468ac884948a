"""What of a run for fault tests no fault can change: its prompts, their trees, and the weights after each step.

The tree of a prompt is the same whoever grows it and whenever, and the weights after a step follow from those before and
its trees; so `expected` says what every step must come out as, computed without any of the processes of `roles`.
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tests.fakes import BASE, ScriptedEngine, ascii_settings, scoring_by
from treepo_async.actor.grow import Grower
from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.step import WEIGHTS
from treepo_async.types import PolicyVersion, Prompt
from treepo_async.weights.store import versions_in

NUM_WEIGHTS = 64
VERSION_POLL_S = 0.02


@dataclass(frozen=True)
class RigPlan:
    """What a run is made of; the same plan gives the same trees and weights."""

    seed: int = 0
    num_actors: int = 3
    concurrent_trees: int = 4
    tree_s: float = 0.4
    """Mean time to grow a tree, spent asleep."""
    step_s: float = 0.03
    prompts_per_batch: int = 4
    max_staleness: int = 3
    save_every: int = 4
    keep: int = 2
    num_steps: int = 10**6
    resend_s: float = 1.0
    lease_timeout_s: float = 30.0
    dies: str = ""
    """Replay is killed once, when some trees are acknowledged: `acks_last` as it should be, or `acks_first`, before their commit."""
    ports: dict[str, int] = field(default_factory=dict)
    """Of replay as it binds (`replay`), and as each role sees it, where that differs."""

    def endpoint(self, role: str) -> str:
        """Where a role finds replay."""
        return f"tcp://127.0.0.1:{self.ports.get(role, self.ports['replay'])}"

    def to_json(self) -> str:
        """One line that `parse` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "RigPlan":
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def prompt_at(index: int) -> Prompt:
    """The prompt of an index, different for each of the first 120^3."""
    ids = [2 + index // 120**place % 120 for place in range(3)]
    return Prompt(f"p{index}", np.array(ids, np.int32), f"problem {index}", "1")


# ---------------------------------------------------------------- trees


@dataclass(frozen=True)
class SteadyGrower(Grower):
    """Gives a prompt the same tree at each attempt, after a time that follows from prompt and attempt."""

    mean_s: float = 0.0
    weights: Path | None = None

    async def grow(self, prompt, *, lease_id, attempt=1, least_step=0, **more):
        """See `Grower.grow`."""
        rng = random.Random(f"{self.seed}/{lease_id}/{attempt}/time")
        await asyncio.sleep(self.mean_s * rng.uniform(0.5, 1.5))
        engine = ScriptedEngine(seed=self.seed, version=await self._version(least_step))
        grower = Grower(self.actor, engine, self.settings, self.scoring, self.seed)
        return await grower.grow(
            prompt, lease_id=lease_id, attempt=1, least_step=least_step, **more
        )

    async def _version(self, least_step):
        """The newest publication, once it is as new as that."""
        if self.weights is None:
            return PolicyVersion(0, least_step)
        while True:
            found = max(versions_in(self.weights), default=BASE) if self.weights.is_dir() else BASE
            if found.step >= least_step:
                return found
            await asyncio.sleep(VERSION_POLL_S)


def steady_grower(plan: RigPlan, name: str, weights: Path | None, *, tree_s: float) -> SteadyGrower:
    """The grower of an actor of the plan."""
    return SteadyGrower(
        actor=name,
        engine=ScriptedEngine(),
        settings=ascii_settings(width=4, max_depth=3),
        scoring=scoring_by(lambda _, text: float(len(text) % 2)),
        seed=plan.seed,
        mean_s=tree_s,
        weights=weights,
    )


def content_of(tree) -> str:
    """What of a tree does not depend on who grew it, and under which weights."""
    parts = [tree.provenance.lease_id.encode(), tree.rewards_L.tobytes()]
    for segment in tree.segments:
        parts += [bytes([segment.level]), segment.token_ids.tobytes()]
    return hashlib.blake2b(b"/".join(parts), digest_size=8).hexdigest()


def tag_of(tree) -> str:
    """What tells this growth of a tree from any other one."""
    return f"{tree.provenance.actor} in {tree.provenance.grow_s!r} s"


# ---------------------------------------------------------------- weights


class HashTeam:
    """Its weights are a hash of the weights before and the trees; the moments only count."""

    def __init__(self, weights, num_updates, *, step_s=0.0, file=None) -> None:
        self.weights, self.num_updates = weights, num_updates
        self._step_s, self._file = step_s, file

    @classmethod
    def first(cls, **more):
        """The team of the initial model."""
        return cls(torch.zeros(NUM_WEIGHTS), 0, **more)

    def train(self, batch, *, version):
        """Make the update of a batch, and note it."""
        time.sleep(self._step_s)
        contents = [content_of(tree) for tree in batch.trees]
        self.weights = next_weights(self.weights, contents)
        self.num_updates += 1
        if self._file is not None:
            leases = [tree.provenance.lease_id for tree in batch.trees]
            row = {"lineage": version.lineage, "step": version.step, "leases": leases}
            row |= {"tags": [tag_of(tree) for tree in batch.trees]}
            row |= {"contents": contents, "weights": hash_of(self.weights), "time": time.time()}
            append(self._file, row)
        first, second = self.weights[:2].tolist()
        return replace(RESULT, loss=first, grad_norm=abs(second))

    def logprobs(self, batch, *, of_reference=False):
        raise AssertionError("no rule of the rig needs them")

    def wait(self):
        pass

    def keep_waiting(self, work):
        return work()

    def score(self, sequences):
        return [np.zeros(len(ids) - 1, np.float32) for ids in sequences]

    def export(self, kind=WEIGHTS):
        """Two tensors of each kind."""
        values = (
            self.weights if kind == WEIGHTS else torch.full_like(self.weights, self.num_updates)
        )
        yield "model.first", values[: NUM_WEIGHTS // 2]
        yield "model.second", values[NUM_WEIGHTS // 2 :]


RESULT = StepResult(
    loss=0.0,
    grad_norm=0.0,
    learning_rate=1e-4,
    num_trained_tokens=10,
    num_trajectory_tokens=20,
    num_microbatches=1,
    correction_weight_mean=1.0,
    correction_capped_share=0.0,
    clipped_share=0.0,
    kl_behavior=0.0,
    entropy=1.0,
    logprob_gap_mean=0.0,
    logprob_gap_max=0.0,
    num_skipped=0,
)


def next_weights(weights, contents):
    """Weights after an update."""
    seed = hashlib.blake2b(weights.numpy().tobytes() + "/".join(contents).encode(), digest_size=8)
    rng = np.random.default_rng(int.from_bytes(seed.digest(), "little"))
    return torch.from_numpy(rng.standard_normal(NUM_WEIGHTS, np.float32))


def hash_of(weights) -> str:
    return hashlib.blake2b(weights.numpy().tobytes(), digest_size=8).hexdigest()


def expected(plan: RigPlan) -> Iterator[tuple[list[str], str]]:
    """Of each step: what is in its trees, and the hash of the weights after it; computed one prompt after another."""
    team, grower = HashTeam.first(), steady_grower(plan, "twin", None, tree_s=0.0)
    size, step = plan.prompts_per_batch, 0
    while True:
        indexes = range(step * size, (step + 1) * size)
        trees = [
            asyncio.run(grower.grow(prompt_at(index), lease_id=f"{index:09d}")) for index in indexes
        ]
        contents = [content_of(tree) for tree in trees]
        team.weights = next_weights(team.weights, contents)
        yield contents, hash_of(team.weights)
        step += 1


# ---------------------------------------------------------------- files


def append(file: Path, row: dict[str, object]) -> None:
    """Add a line, whole or not at all."""
    with file.open("ab", buffering=0) as opened:
        opened.write(json.dumps(row).encode() + b"\n")
