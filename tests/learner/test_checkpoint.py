"""A learner that goes on from a checkpoint, in the layout that wrote it and in others."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import Ranks
from tests.learner.shares import batch_of
from tests.oracle import random_tree, tiny_qwen2
from treepo_async.config.layout import Layout
from treepo_async.errors import ConfigError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(280)]

NUM_BEFORE, NUM_AFTER = 2, 2
"""Updates before the checkpoint, and after it."""
NUM_UPDATES, RATE = NUM_BEFORE + NUM_AFTER, 2e-3
WRITTEN_IN = ("tp1", "tp2", "tp2pp2dp2")
LAYOUTS = ("tp1", "tp2", "pp2", "dp2", "tp2pp2dp2")
BFLOAT16_LAYOUTS = ("tp1", "tp2pp2")
PROBE = [np.array([5, 9, 2, 70], np.int32)]


@dataclass(frozen=True)
class Case:
    """A learner that makes all updates, or those that its checkpoint has not."""

    layout: Layout
    folder: Path
    resumes: str = ""
    """Layout of the learner that wrote the checkpoint."""
    spoil: str = ""
    """What to do wrong."""
    dtype: str = "float32"

    @property
    def name(self):
        kind = "" if self.dtype == "float32" else self.dtype
        return "-".join(filter(None, [str(self.layout), self.resumes, self.spoil, kind]))

    def store(self, layout):
        return CheckpointStore(self.folder / "checkpoints" / self.dtype / layout, keep=2)

    def note_draw(self, when):
        """Write down what this process's generator gives next."""
        file = self.folder / f"{self.name}-{when}.draw.json"
        file.write_text(json.dumps(torch.rand(4).tolist()))


def batches():
    rng = np.random.default_rng(11)
    for _ in range(NUM_UPDATES):
        trees = [random_tree(rng, temperature=0.9) for _ in range(3)]
        yield trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


def learner_of(case):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    return build_learner(
        case.folder / "model",
        optimizer=OptimizerSettings(learning_rate=RATE, warmup_steps=4, epsilon=1e-5),
        loss=LossSettings(),
        microbatch_tokens=60,
        seed=3,
        dtype=getattr(torch, case.dtype),
    )


def spoil(learner, how):
    from treepo_async.learner.optimizer import MOMENTS

    if how == "moments-forgotten":
        for moment in map(learner.optimizer.moment, MOMENTS):
            for weight in learner.model.parameters():
                moment(weight).zero_()
    if how == "master-weights-rounded":
        for weight in learner.model.parameters():
            weight.main_param.copy_(weight.main_param.bfloat16())
    if how == "updates-not-counted":
        learner.optimizer.restore_count(0)


def train(case):
    """What each rank does; rank 0 writes the tensors in the end."""
    from treepo_async.learner.checkpoint import load, save
    from treepo_async.learner.control import Control
    from treepo_async.learner.optimizer import MOMENTS
    from treepo_async.learner.step import WEIGHTS
    from treepo_async.learner.team import Team

    learner, begin = learner_of(case), 0
    if case.resumes:
        load(learner, case.store(case.resumes).newest(print))
        begin = NUM_BEFORE
    case.note_draw(f"rank-{torch.distributed.get_rank()}")
    spoil(learner, case.spoil)
    team = Team(learner, Control(timeout_s=30.0))
    if torch.distributed.get_rank() > 0:
        team.follow()
        return
    team.wait()
    losses = []
    for step, batch in list(enumerate(batches()))[begin:]:
        if step == NUM_BEFORE and not case.resumes:
            layout = str(case.layout)
            version = PolicyVersion(0, NUM_BEFORE)
            save(case.store(layout), team, version, layout=layout, probe_sequences=PROBE)
            case.note_draw("saved")
        result = team.train(batch_of(*batch), version=PolicyVersion(1, 6 + step))
        losses.append(result.loss)
    (scores,) = team.score(PROBE)
    tensors = {
        f"{kind} {name}": tensor.clone()
        for kind in (WEIGHTS, *MOMENTS)
        for name, tensor in team.export(kind)
    }
    team.stop()
    told = {
        "num_updates": team.num_updates,
        "lr": result.learning_rate,
        "losses": losses[-NUM_AFTER:],
    }
    (case.folder / f"{case.name}.json").write_text(json.dumps(told))
    save_file(
        tensors | {"scores": torch.from_numpy(scores)}, case.folder / f"{case.name}.safetensors"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("runs")
    tiny_qwen2(tied=False, num_layers=4, num_heads=4, num_kv_heads=4).save_pretrained(
        found / "model"
    )
    whole = [Case(Layout.parse(layout), found) for layout in LAYOUTS]
    whole += [Case(Layout.parse(x), found, dtype="bfloat16") for x in BFLOAT16_LAYOUTS]
    Ranks(train, whole, deadline_s=120).wait()
    whole, rounded = whole[: len(LAYOUTS)], whole[len(LAYOUTS) :]
    resumed = [replace(case, resumes=layout) for case in whole for layout in WRITTEN_IN]
    resumed += [
        replace(case, resumes=str(case.layout))
        for case in whole
        if str(case.layout) not in WRITTEN_IN
    ]
    controls = [
        replace(whole[0], resumes="tp1", spoil=spoil)
        for spoil in ("moments-forgotten", "updates-not-counted")
    ]
    controls += [replace(rounded[0], resumes="tp1", spoil="master-weights-rounded")]
    resumed += [replace(a, resumes=str(b.layout)) for a in rounded for b in rounded]
    Ranks(train, [*resumed, *controls], deadline_s=120).wait()
    return found


def tensors_of(folder, name):
    return load_file(folder / f"{name}.safetensors")


def error(folder, name, *, reference="tp1"):
    found, wanted = tensors_of(folder, name), tensors_of(folder, reference)
    assert found.keys() == wanted.keys()
    return max(
        float((found[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12))
        for name in wanted
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written_in", WRITTEN_IN)
def test_a_resumed_learner_ends_where_one_that_never_stopped_does_in_any_layout(
    folder, layout, written_in
):
    assert error(folder, f"{layout}-{written_in}") < 1e-5
    told = json.loads((folder / f"{layout}-{written_in}.json").read_text())
    wanted = json.loads((folder / "tp1.json").read_text())
    assert told.pop("losses") == pytest.approx(wanted.pop("losses"), rel=1e-5)
    assert told == pytest.approx(wanted)
    assert told["num_updates"] == NUM_UPDATES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_its_own_layout_it_ends_there_to_the_bit(folder, layout):
    found, wanted = (tensors_of(folder, name) for name in (f"{layout}-{layout}", layout))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def drawn(folder, name, when):
    return json.loads((folder / f"{name}-{when}.draw.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written_in", WRITTEN_IN)
def test_every_rank_draws_on_where_rank_0_of_the_first_learner_stood(folder, layout, written_in):
    wanted = drawn(folder, written_in, "saved")
    for rank in range(Layout.parse(layout).world_size):
        assert drawn(folder, f"{layout}-{written_in}", f"rank-{rank}") == wanted
        assert drawn(folder, layout, f"rank-{rank}") != wanted, "what it draws without a checkpoint"


@pytest.mark.parametrize("spoil", ["moments-forgotten", "updates-not-counted"])
def test_control_a_learner_that_forgets_its_optimizer_ends_elsewhere(folder, spoil):
    assert error(folder, f"tp1-tp1-{spoil}") > 1e-2


@pytest.mark.parametrize("layout", BFLOAT16_LAYOUTS)
def test_in_bfloat16_it_ends_there_to_the_bit_too(folder, layout):
    found, wanted = (
        tensors_of(folder, f"{name}-bfloat16") for name in (f"{layout}-{layout}", layout)
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("layout", "written_in"), [("tp1", "tp2pp2"), ("tp2pp2", "tp1")])
def test_in_bfloat16_another_layout_ends_near_there(folder, layout, written_in):
    name = f"{layout}-{written_in}-bfloat16"
    found, wanted = tensors_of(folder, name), tensors_of(folder, "tp1-bfloat16")
    names = [n for n in wanted if n.startswith("weights ")]
    assert max(float((found[n] - wanted[n]).abs().max()) for n in names) < 2 * NUM_UPDATES * RATE
    told, expected = (
        json.loads((folder / f"{n}.json").read_text()) for n in (name, "tp1-bfloat16")
    )
    assert told.pop("losses") == pytest.approx(expected.pop("losses"), rel=0.1)
    assert told == expected


def test_control_without_its_master_weights_it_ends_elsewhere(folder):
    found, wanted = (
        tensors_of(folder, name)
        for name in ("tp1-tp1-master-weights-rounded-bfloat16", "tp1-bfloat16")
    )
    assert not any(torch.equal(found[n], wanted[n]) for n in wanted if "proj.weight" in n)


def test_a_checkpoint_of_a_bfloat16_model_holds_float32_master_weights(folder):
    case = Case(Layout(), folder, dtype="bfloat16")
    for file in case.store("tp1").newest(print).folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert not all(torch.equal(t, t.bfloat16().float()) for t in tensors.values())


@pytest.mark.usefixtures("groups")
def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_a_tensor(folder, tmp_path):
    from treepo_async.learner.checkpoint import load

    case = Case(Layout(), folder)
    checkpoint = case.store("tp1").newest(print)
    strange = tmp_path / "0.2"
    strange.mkdir()
    for file in checkpoint.folder.glob("*.safetensors"):
        save_file({"model.other": torch.zeros(2)}, strange / file.name)
    with pytest.raises(ConfigError, match=r"has no tensor 'model\..*of another model"):
        load(learner_of(case), replace(checkpoint, folder=strange))
