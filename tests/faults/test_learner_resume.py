"""A learner that is killed anywhere and goes on ends at the weights of one that was not, bit for bit."""

import asyncio

import pytest

from tests.fakes import ScriptedEngine, numbered_prompt
from tests.faults.learner_rig import (
    BATCH,
    EOS_RATE,
    EVERY,
    SEED,
    STEPS,
    Case,
    Nursery,
    Run,
    grower_of,
)
from tests.oracle import tiny_qwen2
from treepo_async.cluster.resume import clear_for_resume, find_resume_version, take_lineage
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.manifest import read_tensors

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.timeout(120)]

KILLED_IN = 3
"""Step in which a learner is killed; the checkpoint before it has version 2."""


@pytest.fixture(scope="module")
def nursery():
    found = Nursery()
    yield found
    found.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen2(tied=False).save_pretrained(folder)
    return folder


@pytest.fixture
def run(nursery, model_dir, tmp_path):
    return Run(nursery, model_dir, tmp_path / "run")


@pytest.fixture(scope="module")
def twin(nursery, model_dir, tmp_path_factory):
    """The run that nothing happens to."""
    run = Run(nursery, model_dir, tmp_path_factory.mktemp("twin") / "run")
    return asyncio.run(run.train())


def check_results(found, twin):
    """Every step was done, on the same trees, with the same result; and the end is the same."""
    assert found.checkpoint.hashes == twin.checkpoint.hashes
    assert found.checkpoint.state.num_updates == STEPS
    assert found.digests() == twin.digests()
    assert sorted(found.digests()) == list(range(STEPS))


def check_equals(found, twin):
    """The weights and moments, the trees and the results are the twin's; every step was done, and no tree in two of them."""
    check_results(found, twin)
    assert found.batches == twin.batches
    assert sorted(found.batches) == list(range(STEPS))
    leases = [lease for batch in found.batches.values() for lease in batch]
    assert len(set(leases)) == len(leases) == STEPS * BATCH
    for step, results in found.results.items():
        assert {digest for digest in results.values() if digest} == {twin.digests()[step]}
    assert not [alarm for alarm in found.alarms() if "another result" in alarm["alarm"]]


def hits(twin):
    """The call of each point that lies in step `KILLED_IN`, or in the checkpoint after it."""
    of_step = [e["num_microbatches"] for e in twin.events if e["event"] == "step"]
    assert of_step[KILLED_IN] > 1, "there is a place between microbatches"
    num_tensors = len(read_tensors(twin.checkpoint.folder / "weights.safetensors"))
    once_a_step = ("before_optimizer", "after_optimizer", "after_journal")
    return {
        "learner_forward": sum(of_step[:KILLED_IN]) + 2,
        **{f"learner_{name}": KILLED_IN + 1 for name in once_a_step},
        "learner_mid_checkpoint": 3 * num_tensors + 3 * num_tensors // 2,
    }


POINTS = (
    "learner_forward",
    pytest.param("learner_before_optimizer", marks=pytest.mark.slow),
    pytest.param("learner_after_optimizer", marks=pytest.mark.slow),
    "learner_after_journal",
    "learner_mid_checkpoint",
)
"""The others are among those of the next test too."""


def killed_at(twin, point):
    return {point: {"act": "kill", "hit": hits(twin)[point]}}


@pytest.mark.parametrize("point", POINTS)
async def test_a_learner_that_is_killed_ends_where_it_would_have_to_the_bit(run, twin, point):
    plan = run.plan(**{point: {"act": "kill", "hit": hits(twin)[point]}})
    found = await run.train(plan=plan)
    assert run.injected() == [point.replace("_", ".", 1)]
    check_equals(found, twin)
    assert found.checkpoint.state.version == f"1.{STEPS}"
    begun_again = found.steps()[KILLED_IN + (point == "learner_mid_checkpoint") :][0]
    assert begun_again == EVERY, "at its checkpoint"


async def test_one_that_is_killed_again_and_again_does_too(run, twin):
    """Thrice before there is any checkpoint, around an update and behind a publication; then in both of them."""
    plan = run.plan(
        learner_before_optimizer={"act": "kill", "hit": 2},
        learner_after_optimizer={"act": "kill", "hit": 2},
        learner_mid_publish={"act": "kill", "hit": 3},
        learner_after_publish={"act": "kill", "hit": 2},
        learner_forward={"act": "kill", "hit": hits(twin)["learner_forward"]},
    )
    found = await run.train(plan=plan)
    assert len(run.injected()) == 5
    check_equals(found, twin)
    assert found.checkpoint.state.version == f"5.{STEPS}"


async def gone_on_with(run):
    """What a driver does with the folder of a run that was killed. Gives the step that it began at, and the outcome."""
    version = find_resume_version(run.folder, STEPS)
    step = None if version is None else version.step
    lineage = take_lineage(run.folder)
    clear_for_resume(run.folder)
    return step, await run.train(run_id="run-2", resume_step=step, lineage=lineage)


@pytest.mark.parametrize(
    ("step", "begun_at"), [(1, None), pytest.param(KILLED_IN, EVERY, marks=pytest.mark.slow)]
)
async def test_a_run_whose_every_process_is_killed_goes_on_to_the_same_weights(
    run, twin, step, begun_at
):
    await run.train_until(run.plan(learner_after_journal={"act": "stop", "hit": step + 1}))
    found_at, found = await gone_on_with(run)
    assert found_at == begun_at
    check_equals(found, twin)


async def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_leads_to_the_same_weights(
    nursery, model_dir, tmp_path, twin
):
    """Although replay was told what it may forget: the trees since the older one are still there."""
    run = Run(nursery, model_dir, tmp_path / "run", keep=2)
    step = 2 * EVERY + 1
    await run.train_until(run.plan(learner_after_journal={"act": "stop", "hit": step + 1}))
    newest = CheckpointStore(run.folder / "checkpoints", keep=2).newest(print).folder
    file = newest / "exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    begun_at, found = await gone_on_with(run)
    assert (newest.name, begun_at) == (f"0.{2 * EVERY}", EVERY)
    check_results(found, twin)
    assert min(found.batches) > 0, "replay had forgotten some"
    passed_over = [a["detail"] for a in found.alarms() if a["alarm"] == "checkpoint passed over"]
    assert ["exp_avg.safetensors is damaged" in detail for detail in passed_over] == [True]


@pytest.mark.slow
async def test_a_rank_of_several_that_is_killed_costs_no_bit_either(nursery, model_dir, tmp_path):
    one, other = (
        Run(nursery, model_dir, tmp_path / name, words=["learner.layout=tp2"])
        for name in ("whole", "killed")
    )
    whole = await one.train()
    plan = other.plan(learner_before_optimizer={"act": "kill", "hit": KILLED_IN + 1})
    found = await other.train(plan=plan)
    assert other.injected()
    check_equals(found, whole)


def forget_names():
    """Have the learner take versions of earlier lineages for other weights."""
    from treepo_async.learner.ancestry import Ancestry

    Ancestry.canonical = lambda self, version: version


async def test_control_without_the_names_of_earlier_lineages_it_ends_elsewhere(run, twin):
    plan = run.plan(learner_forward={"act": "kill", "hit": hits(twin)["learner_forward"]})
    found = await run.train(plan=plan, prepare=forget_names)
    assert found.batches == twin.batches
    assert found.checkpoint.hashes != twin.checkpoint.hashes


@pytest.mark.slow
async def test_control_other_trees_end_elsewhere(run, twin):
    found = await run.train(seed=SEED + 1)
    assert found.batches == twin.batches
    assert found.checkpoint.hashes != twin.checkpoint.hashes
    assert not set(found.digests().values()) & set(twin.digests().values())


def train_plainly(wiring):
    """Lease, grow, train, again and again, in one process: the synchronous algorithm."""
    from pathlib import Path

    from treepo_async.config.command_line import load
    from treepo_async.config.layout import Layout
    from treepo_async.learner import checkpoint
    from treepo_async.learner.batch import BatchTrainer
    from treepo_async.learner.control import Control
    from treepo_async.learner.groups import close_groups, open_groups
    from treepo_async.learner.rank import RankJob, batch_rules, learner_of
    from treepo_async.learner.team import Team
    from treepo_async.process import free_ports

    config = load(wiring.config_file)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    open_groups(Layout(), rank=0, address=address, timeout_s=30.0)
    team = Team(
        learner_of(RankJob(config, wiring, Layout(), address, None)), Control(timeout_s=30.0)
    )
    trainer = BatchTrainer(team, batch_rules(config))
    grower = grower_of(ScriptedEngine(seed=SEED, eos_rate=EOS_RATE))
    for step in range(STEPS):
        trees = [
            asyncio.run(
                grower.grow(numbered_prompt(index), lease_id=f"{index:09d}", least_step=step)
            )
            for index in range(step * BATCH, (step + 1) * BATCH)
        ]
        trainer.train(trees, version=PolicyVersion(0, step))
    store = CheckpointStore(Path(wiring.run_dir) / "plain", keep=1)
    checkpoint.save(store, team, PolicyVersion(0, STEPS), layout="tp1", probe_sequences=[])
    close_groups()


async def test_without_staleness_the_run_is_the_synchronous_algorithm_to_the_bit(
    nursery, model_dir, tmp_path, twin
):
    run = Run(nursery, model_dir, tmp_path / "run", max_staleness=0)
    found = await run.train()
    async with run.serving(run_id="plain") as (_, wiring):
        nursery.start(Case(wiring, work=train_plainly))
        assert await asyncio.to_thread(nursery.wait) == 0, run.log()
    plain = CheckpointStore(run.folder / "plain", keep=1).newest(print)
    assert found.checkpoint.hashes == plain.hashes
    assert found.checkpoint.hashes != twin.checkpoint.hashes, "with staleness it is another one"
