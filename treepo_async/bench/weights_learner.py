"""The learner's end of `bench.py weights` as a process of its own: tensors in memory, published as a learner's rank 0 does.

Everything behind the tensors is what a run uses: `learner.publishers`, the desk, the senders. What it leaves out is Megatron: nothing is
gathered from tensor-parallel ranks, and the log-probs of the probe are computed beforehand. Two sets of weights take turns.

Waits: for the next order of the benchmark (which ends it, or closes the pipe).
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from treepo_async.learner.broadcast_copy import Copies
from treepo_async.learner.broadcast_desk import DeskThread
from treepo_async.learner.broadcast_group import Meeting
from treepo_async.learner.broadcast_sender import Sender
from treepo_async.learner.publish import PROBE_SEQUENCES, PROBE_TOKENS
from treepo_async.learner.publishers import BroadcastPublisher, FolderPublisher, Publisher
from treepo_async.process import die_with_parent
from treepo_async.types import Float32, Int32, PolicyVersion
from treepo_async.weights.desk import Desk
from treepo_async.weights.parcel import StagePart
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import BlockingRequester

Result = TypeVar("Result")

RUN_ID = "bench"
KEEP = 3
LIMIT_S = 120.0
NUM_SETS = 2
CHANGE = 0.002
"""Standard deviation that the second set of weights differs by."""
PROBE_SHAPE = (PROBE_SEQUENCES, PROBE_TOKENS)


@dataclass(frozen=True, slots=True)
class LearnerJob:
    """What the process is told."""

    model_dir: str
    folder: str
    """Of the publications that go by a folder."""
    desks: dict[int, str]
    """Endpoint of the desk, by number of pipeline stages."""
    bucket_bytes: int


class LearnerProcess(AbstractContextManager["LearnerProcess"]):
    """The process, from outside."""

    def __init__(self, job: LearnerJob) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_main, args=(job, other), daemon=True)
        self._process.start()
        other.close()
        self.score_s = float(self._pipe.recv_bytes())
        """What a probe's log-probs take."""

    def publish(self, arm: str, step: int) -> float:
        """Publish version 0.`step` by an arm: `disk`, or `broadcast-N` from N stages. Gives the seconds until it may train on."""
        self._pipe.send_bytes(json.dumps([arm, step]).encode())
        return float(self._pipe.recv_bytes())

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


@dataclass
class _Weights:
    """A set of weights and the log-probs of the probe under them."""

    tensors: dict[str, Tensor]
    logprobs: list[Float32]


class _Team:
    """Stands for the ranks of a learner, all in this process."""

    def __init__(self, bucket_bytes: int, num_stages: int) -> None:
        self.current: _Weights
        self.copies = [Copies(bucket_bytes) for _ in range(num_stages)]

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Of the probe, known beforehand."""
        return self.current.logprobs

    def export(self) -> Iterator[tuple[str, Any]]:
        """All tensors."""
        yield from self.current.tensors.items()

    def keep_waiting(self, work: Callable[[], Result]) -> Result:
        """There is nobody to tell."""
        return work()

    def offer(
        self, version: PolicyVersion, dtype: str, keep: Collection[PolicyVersion]
    ) -> list[StagePart]:
        """As many tensors from each stage, one stage after another where real ones copy at once."""
        named = list(self.current.tensors.items())
        each = -(-len(named) // len(self.copies))
        return [
            copies.add(version, named[i * each : (i + 1) * each], getattr(torch, dtype), keep=keep)
            for i, copies in enumerate(self.copies)
        ]


def _main(job: LearnerJob, pipe: Connection) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    sequences = _probe()
    sets, score_s = _sets(Path(job.model_dir), sequences)
    arms = {"disk": _disk(job), **{f"broadcast-{n}": _broadcast(job, n) for n in job.desks}}
    pipe.send_bytes(str(score_s).encode())
    while True:
        try:
            arm, step = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        team, publisher = arms[arm]
        team.current = sets[step % NUM_SETS]
        begin = time.monotonic()
        publisher.publish(PolicyVersion(0, step), sequences, evaluate=False)
        pipe.send_bytes(str(time.monotonic() - begin).encode())


def _disk(job: LearnerJob) -> tuple[_Team, Publisher]:
    team, store = _Team(job.bucket_bytes, 1), WeightStore(Path(job.folder), keep=KEEP)
    config_file = Path(job.model_dir) / "config.json"
    return team, FolderPublisher(store, team, torch.float32, config_file, LIMIT_S)


def _broadcast(job: LearnerJob, num_stages: int) -> tuple[_Team, Publisher]:
    team, endpoint = _Team(job.bucket_bytes, num_stages), job.desks[num_stages]
    desk = DeskThread(
        Desk(f"bench{num_stages}", num_stages, keep_marked=1), endpoint, run_id=RUN_ID
    )
    hello = Hello(name="learner-0", run_id=RUN_ID)

    def connect() -> BlockingRequester:
        return BlockingRequester(endpoint, name="learner-0", owner="the desk", hello=hello)

    for stage, copies in enumerate(team.copies):
        Sender(stage, copies, Meeting("127.0.0.1"), connect, timeout_s=LIMIT_S)
    store = WeightStore(Path(job.folder).with_name(f"noted-{num_stages}"), keep=KEEP)
    return team, BroadcastPublisher(store, team, desk, torch.float32, LIMIT_S)


def _probe() -> list[Int32]:
    rng = np.random.default_rng(0)
    return list(rng.integers(2, 300, PROBE_SHAPE).astype(np.int32))


def _sets(model_dir: Path, sequences: Sequence[Int32]) -> tuple[list[_Weights], float]:
    """The weights on disk and changed ones, and the seconds that the probe's log-probs took."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    sets, score_s = [], 0.0
    for number in range(NUM_SETS):
        if number:
            _change(model)
        begin = time.monotonic()
        logprobs = _logprobs(model, sequences)
        score_s = time.monotonic() - begin
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        sets.append(_Weights(state, logprobs))
    return sets, score_s


def _change(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += CHANGE * torch.randn(weight.shape, generator=generator)


def _logprobs(model: Any, sequences: Sequence[Int32]) -> list[Float32]:
    ids = torch.tensor(np.stack(sequences), dtype=torch.long)
    with torch.no_grad():
        logits = torch.log_softmax(model(ids).logits[:, :-1], -1)
    found = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return list(found.numpy())
