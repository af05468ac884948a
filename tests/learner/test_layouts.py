"""Every way to split the learner against Hugging Face, one trajectory at a time in float64."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import GROUP_TIMEOUT_S, Ranks
from tests.learner.shares import batch_of
from tests.oracle import random_tree, segment_logprobs, tiny_qwen2, trajectory_loss
from treepo_async.config.layout import Layout

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NUM_UPDATES, MICROBATCH_TOKENS = 2, 100
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
    spoil: str = ""
    """What to do wrong."""

    @property
    def name(self):
        is_sequence_parallel = self.sequence_parallel and self.layout.tp > 1
        parts = [
            str(self.layout),
            self.model,
            "sp" if is_sequence_parallel else "",
            f"{self.microbatch_tokens}-tokens",
            self.spoil,
        ]
        return "-".join(filter(None, parts))


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
    case("tp4pp2", "grouped"),
    case("tp2pp2dp2", "tied"),
]
CONTROLS = [
    case("tp2", "untied", spoil="norms-not-reduced"),
    case("dp2", "untied", spoil="same-share-twice"),
]


def whole(split):
    """The case of one rank with the model of a split one."""
    return case("tp1", split.model)


def batch():
    rng = np.random.default_rng(6)
    trees = [random_tree(rng, temperature=0.9) for _ in range(5)]
    return trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


def shaken(logprobs):
    """Log-probs of a policy so far away that some tokens are clipped."""
    rng = np.random.default_rng(1)
    return [
        [(values + 0.2 * rng.normal(size=len(values))).astype(np.float32) for values in tree]
        for tree in logprobs
    ]


def flat(logprobs):
    return torch.from_numpy(np.concatenate([values for tree in logprobs for values in tree]))


def reference_updates(model, logprobs):
    """What Hugging Face and torch make of the batch in float64, by name; gradients are the first ones, clipped."""
    trees, advantages = batch()
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
        loss = trajectory_loss(
            model, trees, advantages, **CLIP, cap=2.0, proximal_logprobs=proximal
        )
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), MAX_GRAD_NORM)
        found |= {f"loss {update}": loss.detach(), f"grad_norm {update}": grad_norm}
        if update == 0:
            found |= {f"gradient {name}": w.grad.clone() for name, w in weights.items()}
        adam.step()
    return found | {f"weight {name}": weight.detach() for name, weight in weights.items()}


def learner_of(case):
    from treepo_async.learner.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.step import build_learner

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
        loss=LossSettings(**CLIP),
        microbatch_tokens=case.microbatch_tokens,
        seed=3,
        sequence_parallel=case.sequence_parallel,
    )
    if case.spoil == "norms-not-reduced":
        for weight in learner.model.parameters():
            weight.sequence_parallel = False
    return learner


def batch_and_share(case):
    """The whole batch, and the part of this replica with the centre of its clip range."""
    from treepo_async.learner.divide import divide
    from treepo_async.learner.mcore import parallel_state

    proximal = json.loads((case.folder / case.model / "proximal.json").read_text())
    arrays = [[np.array(values, np.float32) for values in tree] for tree in proximal]
    whole = batch_of(*batch(), proximal=arrays)
    replicas = divide(whole, num_replicas=case.layout.dp, budget_tokens=case.microbatch_tokens)
    replica = parallel_state.get_data_parallel_rank()
    return whole, replicas[0 if case.spoil == "same-share-twice" else replica]


def learner_updates(case):
    """What a learner makes of the batch, written by each rank of a case."""
    from treepo_async.learner.control import Control
    from treepo_async.learner.hf import export
    from treepo_async.learner.team import Team

    learner, (whole, share) = learner_of(case), batch_and_share(case)
    team = Team(learner, Control(timeout_s=GROUP_TIMEOUT_S))
    logprobs = torch.zeros(0)
    if torch.distributed.get_rank() == 0:
        logprobs = flat(team.logprobs(whole))
        team.stop()
    else:
        team.follow()
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
    expected = {name: reference_updates(models[name], logprobs[name]) for name in MODELS}
    ranks.wait()
    return expected, folder


def told_by(case, rank, folder):
    told = json.loads((folder / f"{case.name}-{rank}.json").read_text())
    return told["results"], told["exported"]


def worst_errors(case, updates):
    """Relative errors against the reference, the worst of each kind."""
    expected, folder = updates
    wanted = expected[case.model]
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
            if case.microbatch_tokens != MICROBATCH_TOKENS:
                expected["num_microbatches"] = found["num_microbatches"]
            assert found == pytest.approx(expected, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_first_rank_alone_exports_in_the_order_of_a_whole_learner(updates, case):
    _, folder = updates
    _, wanted = told_by(whole(case), 0, folder)
    exported = [told_by(case, rank, folder)[1] for rank in range(case.layout.world_size)]
    assert exported == [wanted, *[[]] * (case.layout.world_size - 1)]


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_control_a_spoilt_split_is_another_update(updates, case):
    assert worst_errors(case, updates)["gradient"] > 1e-2
