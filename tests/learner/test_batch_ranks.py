"""Rank 0 and the ranks that follow it, over real groups.

Whole batches, all that rank 0 asks of the others included, end at the weights of one rank; a batch is sent once for each
replica; and the others wait for rank 0 as long as they hear of it.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.learner.ranks import GROUP_TIMEOUT_S, Ranks
from tests.oracle import random_tree, sequence_logprobs, tiny_qwen2
from treepo_async.config.layout import Layout
from treepo_async.types import PolicyVersion

pytestmark = [pytest.mark.engine, pytest.mark.timeout(150)]

LAYOUTS = ("tp1", "dp2", "dp4", "tp2pp2", "pp2dp2")
NUM_TREES, NUM_BATCHES = 4, 2
VERSION = PolicyVersion(1, 5)
PROBE = [np.array([5, 9, 2, 70], np.int32), np.array([7, 7], np.int32)]
SCATTERED = ("tp2dp2", "dp4")
ORDER_TIMEOUT_S, TICK_S, NEVER_S = 1.5, 0.2, 60.0
ALONE_S = 2.2
"""Longer than any rank waits for an order."""


@dataclass(frozen=True)
class Case:
    layout: Layout
    folder: Path
    work: Callable[["Case"], None]
    """What each of its ranks does."""
    spoil: str = ""
    """What to do wrong."""

    @property
    def file(self):
        return self.folder / f"{self.layout}{self.spoil}.safetensors"

    def tell(self, words):
        """Write down what this rank has to say."""
        rank = torch.distributed.get_rank()
        file = self.folder / f"{self.work.__name__}-{self.layout}{self.spoil}-{rank}.json"
        file.write_text(json.dumps(words))


def batches():
    """Each with a tree of a single trajectory: an update of it alone leaves most replicas without any."""
    rng = np.random.default_rng(12)
    for _ in range(NUM_BATCHES):
        trees = [random_tree(rng, num_segments=n, temperature=0.9) for n in (1, 9, 12, 6)]
        yield trees[:NUM_TREES]


def train(case):
    """What each rank does; rank 0 writes the weights."""
    from treepo_async.learner.batch import BatchRules, BatchTrainer
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.control import Control
    from treepo_async.learner.loss.mask import MaskRules
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.team import Team

    learner = build_learner(
        case.folder / "model",
        optimizer=OptimizerSettings(learning_rate=2e-3, epsilon=1e-2),
        loss=LossSettings(
            proximal="recomputed",
            kl_coef=0.0 if case.spoil else 0.3,
            mask=MaskRules(names=("m2po",)),
        ),
        microbatch_tokens=40,
        seed=3,
        with_reference=True,
    )
    learner.packing = "auto"
    team = Team(learner, Control(timeout_s=GROUP_TIMEOUT_S))
    if torch.distributed.get_rank() > 0:
        team.follow()
        return
    rules = BatchRules(
        "treepo",
        whiten=False,
        num_minibatches=NUM_TREES,
        needs_proximal=True,
        needs_reference=True,
        needs_bounds=True,
        mean_square=0.5,
        vtrace_cap=1.0,
    )
    trainer = BatchTrainer(team, rules)
    results = [trainer.train(trees, version=VERSION) for trees in batches()]
    tensors = {name: tensor.clone() for name, tensor in team.export()}
    team.stop()
    told = [r.loss for r in results] + [r.masked_share for r in results]
    save_file(tensors | {"told": torch.tensor(told)}, case.file)


class Sends(TorchDispatchMode):
    """Notes what this rank sends to another one: (to whom, bytes)."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.c10d.send:
            (tensor,), _, to, _ = args
            self.found.append((to, tensor.nbytes))
        return func(*args, **(kwargs or {}))


def payloads(layout):
    return [b"x" * (100 + i) for i in range(layout.dp)]


def scatter(case):
    """Each rank tells what it got, and what it sent."""
    from treepo_async.learner.control import Control

    control = Control(timeout_s=GROUP_TIMEOUT_S)
    with Sends() as sends:
        mine = control.scatter(payloads(case.layout) if control.rank == 0 else ())
    case.tell({"replica": control.replica, "got": len(mine), "sends": sends.found})


def work_alone(case):
    """Rank 0 works alone, then asks for scores; the others tell what ended their following."""
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.control import Control
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.team import Team

    learner = build_learner(
        case.folder / "model",
        optimizer=OptimizerSettings(),
        loss=LossSettings(),
        microbatch_tokens=40,
        seed=3,
    )
    # who was built first waits here, and not for an order
    torch.distributed.barrier()
    tick_s = NEVER_S if case.spoil == "-silent" else TICK_S
    team = Team(learner, Control(timeout_s=ORDER_TIMEOUT_S), tick_s=tick_s)
    if torch.distributed.get_rank() > 0:
        try:
            team.follow()
        except RuntimeError as error:
            case.tell(str(error))
        else:
            case.tell("stopped")
        return
    team.keep_waiting(partial(time.sleep, ALONE_S))
    if case.spoil != "-silent":
        case.tell([scores.tolist() for scores in team.score(PROBE)])
        team.stop()


def do(case):
    case.work(case)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("batches")
    tiny_qwen2(tied=True, num_layers=2).save_pretrained(found / "model")
    cases = [Case(Layout.parse(layout), found, train) for layout in LAYOUTS]
    cases += [Case(Layout(), found, train, spoil="-no-divergence")]
    cases += [Case(Layout.parse(layout), found, scatter) for layout in SCATTERED]
    cases += [Case(Layout.parse("tp2"), found, work_alone, spoil) for spoil in ("", "-silent")]
    Ranks(do, cases, deadline_s=120).wait()
    return found


def distance(folder, name, other="tp1"):
    found, expected = (load_file(folder / f"{n}.safetensors") for n in (name, other))
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_minibatches_with_passes_before_them_end_at_the_weights_of_one_rank(folder, layout):
    assert distance(folder, str(Layout.parse(layout))) < 1e-5


def test_some_tokens_are_masked_and_some_are_not(folder):
    shares = load_file(folder / f"{Layout()}.safetensors")["told"][NUM_BATCHES:]
    assert 0 < shares.min() <= shares.max() < 1


def test_control_without_the_divergence_the_weights_are_others(folder):
    assert distance(folder, f"{Layout()}-no-divergence") > 1e-3


def told(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("layout", [Layout.parse(layout) for layout in SCATTERED], ids=str)
def test_a_batch_is_sent_once_to_each_other_replica(folder, layout):
    found = [told(folder, f"scatter-{layout}-{rank}") for rank in range(layout.world_size)]
    sizes = [len(payload) for payload in payloads(layout)]
    assert [rank["got"] for rank in found] == [sizes[rank["replica"]] for rank in found]
    leaders = [[rank["replica"] for rank in found].index(i) for i in range(layout.dp)]
    batches = [[to, size] for to, size in found[0]["sends"] if size in sizes]
    assert batches == [[leaders[i], sizes[i]] for i in range(1, layout.dp)]
    assert [rank["sends"] for rank in found[1:]] == [[]] * (layout.world_size - 1)


def test_ranks_that_hear_of_rank_0_outwait_their_timeout_and_follow_its_next_order(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    scores = told(folder, "work_alone-tp2-0")
    for found, ids in zip(scores, PROBE, strict=True):
        assert found == pytest.approx(sequence_logprobs(model, ids).tolist(), abs=1e-4)
    assert told(folder, "work_alone-tp2-1") == "stopped"


def test_control_ranks_that_hear_nothing_of_rank_0_give_up(folder):
    assert "timed out" in told(folder, "work_alone-tp2-silent-1").lower()
