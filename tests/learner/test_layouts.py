"""Every way to split the learner against Hugging Face, one trajectory at a time in float64."""

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import GROUP_TIMEOUT_S, Ranks
from tests.learner.shares import batch_of
from tests.oracle import (
    random_tree,
    segment_logprobs,
    sequence_logprobs,
    tiny_qwen2,
    trajectory_loss,
)
from tests.textbook import Textbook, textbook_loss, trajectories_of
from treepo_async.config.layout import Layout
from treepo_async.tree.levels import num_levels

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NUM_UPDATES, MICROBATCH_TOKENS = 2, 100
KL_COEF = 0.5
LEARNING_RATE, MAX_GRAD_NORM = 2e-3, 0.1
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.95), 1e-5, 0.1

MODELS = {
    "untied": {"tied": False},
    "tied": {"tied": True},
    "grouped": {"tied": False, "num_heads": 8, "num_kv_heads": 2},
}
"""What is trained: four layers each; the last has fewer key-value heads than four tensor-parallel ranks."""


@dataclass(frozen=True)
class Case:
    layout: Layout
    model: str
    folder: Path
    sequence_parallel: bool = True
    microbatch_tokens: int = MICROBATCH_TOKENS
    recompute: str = "none"
    attention: str = "auto"
    loss: str = "ppo"
    """With `gspo` comes a divergence to the model as it was at the beginning."""
    spoil: str = ""
    """What to do wrong."""

    @property
    def wanted(self):
        """What its updates are compared with."""
        return self.model, self.loss

    @property
    def name(self):
        is_sequence_parallel = self.sequence_parallel and self.layout.tp > 1
        parts = [
            str(self.layout),
            self.model,
            "sp" if is_sequence_parallel else "",
            f"{self.microbatch_tokens}-tokens",
            *(part for part in (self.recompute, self.attention, self.loss) if part not in USUAL),
            self.spoil,
        ]
        return "-".join(filter(None, parts))


USUAL = ("none", "auto", "ppo")


def case(layout, model, **fields):
    return Case(Layout.parse(layout), model, Path(), **fields)


CASES = [
    case("tp1", "untied"),
    case("tp1", "tied"),
    case("tp1", "grouped"),
    case("tp2", "untied", sequence_parallel=False),
    case("tp2", "untied"),
    case("tp2", "tied"),
    case("pp2", "untied"),
    case("pp2", "tied"),
    case("dp2", "untied"),
    case("dp2", "tied", microbatch_tokens=1),
    case("dp2", "untied", microbatch_tokens=10**6),
    case("tp2pp2", "untied", sequence_parallel=False),
    case("tp2pp2", "untied"),
    case("tp2pp2", "tied"),
    case("tp4", "grouped", sequence_parallel=False),
    case("tp4", "grouped"),
    case("tp4pp2", "untied", sequence_parallel=False),
    case("tp4pp2", "untied"),
    case("tp4pp2", "grouped", sequence_parallel=False),
    case("tp4pp2", "grouped"),
    case("tp2pp2dp2", "tied"),
    case("tp2", "untied", attention="dense"),
    case("tp2", "untied", recompute="full"),
    case("pp2", "untied", recompute="full"),
    case("tp2pp2", "untied", recompute="selective"),
    case("tp2pp2", "tied", recompute="full"),
    case("tp2pp2", "untied", sequence_parallel=False, recompute="full"),
    case("tp1", "untied", loss="gspo"),
    case("tp2pp2dp2", "untied", loss="gspo"),
]
BY_PIECE = (
    "num_microbatches",
    "num_trained_tokens",
    "num_compared_tokens",
    "logprob_gap_mean",
    "clipped_share",
    "clipped",
)
"""What depends on how trees are cut: a token counts once for each piece it is in, and is clipped where one of the piece's
trajectories is."""
CONTROLS = [
    case("tp2", "untied", spoil="norms-not-reduced"),
    case("dp2", "untied", spoil="same-share-twice"),
]


def whole(split):
    """The case of one rank with the model of a split one."""
    return case("tp1", split.model, loss=split.loss)


def batch():
    rng = np.random.default_rng(6)
    trees = [random_tree(rng, temperature=0.9) for _ in range(5)]
    return trees, [rng.normal(size=(len(tree.leaves), num_levels(tree))) for tree in trees]


def shaken(logprobs):
    """Log-probs of a policy so far away that some tokens are clipped."""
    rng = np.random.default_rng(1)
    return [
        [(values + 0.2 * rng.normal(size=len(values))).astype(np.float32) for values in tree]
        for tree in logprobs
    ]


def flat(logprobs):
    return torch.from_numpy(np.concatenate([values for tree in logprobs for values in tree]))


def loss_of(model, kind, proximal, initial):
    """The loss of the batch under the model, one trajectory after another."""
    trees, advantages = batch()
    if kind == "ppo":
        return trajectory_loss(
            model, trees, advantages, **CLIP, cap=2.0, proximal_logprobs=proximal
        )

    def of_leaf(t, leaf):
        tree = trees[t]
        response = [tree.segments[i].token_ids for i in tree.path(tree.leaves[leaf])]
        ids = np.concatenate([tree.prompt.token_ids, *response])
        return sequence_logprobs(model, ids, tree.sampling.temperature)[
            len(tree.prompt.token_ids) - 1 :
        ]

    trajectories = trajectories_of(trees, advantages, of_leaf, proximal=proximal, reference=initial)
    return textbook_loss(trajectories, Textbook(**CLIP, loss=kind, kl_coef=KL_COEF))


def reference_updates(model, logprobs, kind):
    """What Hugging Face and torch make of the batch in float64, by name; gradients are the first ones, clipped."""
    found = {"logprobs": flat(logprobs)}
    proximal = shaken(logprobs)
    weights = dict(model.named_parameters())
    adam = torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
    )
    for update in range(NUM_UPDATES):
        adam.zero_grad()
        loss = loss_of(model, kind, proximal, logprobs)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
        found |= {f"loss {update}": loss.detach(), f"grad_norm {update}": grad_norm}
        if update == 0:
            found |= {f"gradient {name}": w.grad.clone() for name, w in weights.items()}
        adam.step()
    return found | {f"weight {name}": weight.detach() for name, weight in weights.items()}


def learner_of(case):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    learner = build_learner(
        case.folder / case.model,
        optimizer=OptimizerSettings(
            learning_rate=LEARNING_RATE,
            max_grad_norm=MAX_GRAD_NORM,
            beta1=BETAS[0],
            beta2=BETAS[1],
            epsilon=EPSILON,
            weight_decay=WEIGHT_DECAY,
        ),
        loss=LossSettings(
            **CLIP,
            loss=case.loss,
            kl_coef=0.0 if case.loss == "ppo" else KL_COEF,
            correct_fresh=True,
        ),
        microbatch_tokens=case.microbatch_tokens,
        seed=3,
        with_reference=case.loss != "ppo",
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
        attention=case.attention,
    )
    if case.spoil == "norms-not-reduced":
        for weight in learner.model.parameters():
            weight.sequence_parallel = False
    return learner


def whole_batch(case):
    """All trees, with the centre of their clip range."""
    proximal = json.loads((case.folder / case.model / "proximal.json").read_text())
    arrays = [[np.array(values, np.float32) for values in tree] for tree in proximal]
    return batch_of(*batch(), proximal=arrays)


def share_of(case, whole):
    """The part of this replica."""
    from treepo_async.learner.mcore import parallel_state
    from treepo_async.learner.packing.divide import divide

    replicas = divide(whole, num_replicas=case.layout.dp, budget_tokens=case.microbatch_tokens)
    replica = parallel_state.get_data_parallel_rank()
    return replicas[0 if case.spoil == "same-share-twice" else replica]


def logprobs_of(case, learner, whole):
    """Of every replica together, on rank 0 alone: under the weights, and under those of the beginning if they are kept."""
    from treepo_async.learner.control import Control
    from treepo_async.learner.team import Team

    team = Team(learner, Control(timeout_s=GROUP_TIMEOUT_S))
    if torch.distributed.get_rank() > 0:
        team.follow()
        return [], []
    now = team.logprobs(whole)
    initial = team.logprobs(whole, of_reference=True) if learner.reference else []
    team.stop()
    return now, initial


def learner_updates(case):
    """What a learner makes of the batch, written by each rank of a case."""
    from treepo_async.learner.model.hf import export

    learner, whole = learner_of(case), whole_batch(case)
    now, initial = logprobs_of(case, learner, whole)
    logprobs = flat(now) if now else torch.zeros(0)
    if learner.reference:
        # as its ranks were told, but for the way
        given = [[initial]] if initial else [None]
        torch.distributed.broadcast_object_list(given, 0)
        whole = replace(whole, reference=tuple(given[0][0]))
    share = share_of(case, whole)
    version = whole.trees[0].segments[0].policy_version
    results, tensors = [], {}
    for update in range(NUM_UPDATES):
        result = learner.train(share, version=version)
        results.append(asdict(result))
        if update == 0:
            gradients = export(learner.model, learner.shape, lambda weight: weight.main_grad)
            tensors |= {f"gradient {name}": gradient.clone() for name, gradient in gradients}
    tensors |= {f"weight {name}": weight.clone() for name, weight in learner.export()}
    written = case.folder / f"{case.name}-{torch.distributed.get_rank()}"
    told = {"results": results, "exported": list(tensors)}
    written.with_suffix(".json").write_text(json.dumps(told))
    save_file(tensors | {"logprobs": logprobs}, written.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """What the reference made of each model, and the folder with what the ranks made of it."""
    folder = tmp_path_factory.mktemp("layouts")
    trees, _ = batch()
    models, logprobs = {}, {}
    for name, sizes in MODELS.items():
        model = tiny_qwen2(num_layers=4, **sizes)
        model.save_pretrained(folder / name)
        models[name] = model.double()
        logprobs[name] = [segment_logprobs(model, tree) for tree in trees]
        proximal = [[values.tolist() for values in tree] for tree in shaken(logprobs[name])]
        (folder / name / "proximal.json").write_text(json.dumps(proximal))
    cases = [replace(case, folder=folder) for case in (*CASES, *CONTROLS)]
    ranks = Ranks(learner_updates, cases, deadline_s=150)
    expected = {
        (name, loss): reference_updates(deepcopy(models[name]), logprobs[name], loss)
        for name, loss in {case.wanted for case in cases}
    }
    ranks.wait()
    return expected, folder


def told_by(case, rank, folder):
    told = json.loads((folder / f"{case.name}-{rank}.json").read_text())
    return told["results"], told["exported"]


def worst_errors(case, updates):
    """Relative errors against the reference, the worst of each kind."""
    expected, folder = updates
    wanted = expected[case.wanted]
    found = load_file(folder / f"{case.name}-0.safetensors")
    for update, result in enumerate(told_by(case, 0, folder)[0]):
        found |= {f"{key} {update}": torch.tensor(result[key]) for key in ("loss", "grad_norm")}
    assert found.keys() == wanted.keys()
    errors = {}
    for name, tensor in wanted.items():
        kind = name.partition(" ")[0]
        error = float((found[name].double() - tensor).norm() / tensor.norm())
        errors[kind] = max(error, errors.get(kind, 0.0))
    return errors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_split_learner_makes_the_updates_of_hugging_face(updates, case):
    errors = worst_errors(case, updates)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rank_tells_what_a_whole_learner_tells(updates, case):
    _, folder = updates
    wanted, _ = told_by(whole(case), 0, folder)
    for rank in range(case.layout.world_size):
        results, _ = told_by(case, rank, folder)
        for found, expected in zip(results, wanted, strict=True):
            is_cut_alike = case.microbatch_tokens == MICROBATCH_TOKENS and case.layout.dp == 1
            check_equal(found, expected, but=() if is_cut_alike else BY_PIECE)


def check_equal(found, expected, *, but):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            check_equal(found[name], value, but=but)
        elif name not in but:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_rank_alone_exports_in_the_order_of_a_whole_learner(updates, case):
    _, folder = updates
    _, wanted = told_by(whole(case), 0, folder)
    exported = [told_by(case, rank, folder)[1] for rank in range(case.layout.world_size)]
    assert exported == [wanted, *[[]] * (case.layout.world_size - 1)]


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_control_a_spoilt_split_is_another_update(updates, case):
    assert worst_errors(case, updates)["gradient"] > 1e-2
