import json
from pathlib import Path

import numpy as np
import pytest

from treepo_async.cluster.plan import describe, make_plan
from treepo_async.config.command_line import parse
from treepo_async.config.schema import ActorConfig, Config, LearnerConfig
from treepo_async.config.wiring import Wiring
from treepo_async.errors import ConfigError
from treepo_async.types import Prompt


def plan_of(config, folder=Path("run")):
    return make_plan(config, run_dir=folder, model_dir=Path("model"))


def test_every_role_has_a_name_a_module_and_its_number():
    plan = plan_of(Config(actors=3))
    assert [(role.name, role.module, role.wiring.index) for role in plan.roles] == [
        ("engine-0", "engine", 0),
        ("learner-0", "learner", 0),
        ("replay-0", "replay", 0),
        ("actor-0", "actor", 0),
        ("actor-1", "actor", 1),
        ("actor-2", "actor", 2),
    ]
    assert all(role.wiring.role == role.name for role in plan.roles)


def test_all_roles_share_one_wiring_on_loopback_with_absolute_folders():
    plan = plan_of(Config(actors=2))
    shared = {
        json.dumps({**json.loads(r.wiring.to_json()), "role": "", "index": 0}) for r in plan.roles
    }
    assert len(shared) == 1
    wiring = plan.roles[0].wiring
    assert wiring.run_id == plan.run_id
    assert wiring.replay_endpoint.startswith("tcp://127.0.0.1:")
    assert wiring.gate_endpoint.startswith("tcp://127.0.0.1:")
    assert wiring.engine_url.startswith("http://127.0.0.1:")
    assert Path(wiring.run_dir) == Path("run").resolve()
    assert Path(wiring.model_dir).is_absolute()
    ports = {url.rpartition(":")[2] for url in (wiring.replay_endpoint, wiring.gate_endpoint, wiring.engine_url)}  # fmt: skip
    assert len(ports) == 3


def test_two_runs_never_share_an_id():
    assert plan_of(Config()).run_id != plan_of(Config()).run_id


def test_every_role_is_started_again_when_killed_and_actors_when_they_fail_too():
    plan = plan_of(Config())
    assert all(role.max_restarts > 0 for role in plan.roles)
    assert {role.module for role in plan.roles if role.survives_failure} == {"actor"}


def test_threads_come_from_the_config():
    config = Config(learner=LearnerConfig(cpu_threads=4), actor=ActorConfig(cpu_threads=2))
    threads = {r.module: r.cpu_threads for r in plan_of(config).roles}
    assert (threads["learner"], threads["actor"]) == (4, 2)


def test_actors_are_dealt_to_the_engines_in_turn():
    plan = plan_of(Config(actors=5, engines=2))
    engines = {r.name: (r.wiring.engine_url, r.wiring.gate_endpoint) for r in plan.roles}
    for index in range(5):
        assert engines[f"actor-{index}"] == engines[f"engine-{index % 2}"]
    assert engines["engine-0"] != engines["engine-1"]


def test_a_plan_that_goes_on_says_from_where_to_roles_and_person():
    plan = make_plan(Config(), run_dir=Path("run"), model_dir=Path("model"), resume_step=20)
    assert {role.wiring.resume_step for role in plan.roles} == {20}
    prompt = Prompt("p", np.arange(3, dtype=np.int32), "1", "1")
    assert "run (seed 0, resumed at step 20)" in describe(Config(), plan, prompt)
    assert {role.wiring.resume_step for role in plan_of(Config()).roles} == {None}


def test_a_wiring_is_read_back_as_it_was_handed_over():
    wiring = plan_of(Config()).roles[-1].wiring
    assert Wiring.parse(wiring.to_json()) == wiring


def test_the_plan_tells_a_person_what_will_run():
    config = Config(actors=2, steps=60, seed=3)
    prompt = Prompt("tiny-train-0", np.arange(9, dtype=np.int32), "1+2*3\n" + "4" * 80, "7")
    text = describe(config, plan_of(config), prompt)
    assert text.splitlines() == [
        "  run      run (seed 3)",
        "  model    tiny at model",
        "  data     tiny, scored by exact",
        r"  prompt   '1+2*3\n" + "4" * 71 + "...' (9 tokens), e.g. tiny-train-0",
        "  tree     16 leaves, segments of 10 x depth 7, responses up to 70 tokens",
        "  batch    16 trees x 16 leaves = 256 trajectories a step, 60 steps, staleness at most 1",
        "  learner  Megatron-Core tp1, lr 6e-05, float32",
        "  roles    1 engine, 1 learner, 1 replay, 2 actor",
    ]


def test_trees_from_a_file_need_no_actor_and_an_engine_only_to_evaluate():
    offline = parse(["data.trees=t.jsonl", "eval.every=0", "actors=3", "engines=2"])
    assert [role.name for role in plan_of(offline).roles] == ["learner-0", "replay-0"]
    evaluated = parse(["data.trees=t.jsonl", "eval.every=2", "actors=3", "engines=2"])
    names = [role.name for role in plan_of(evaluated).roles]
    assert names == ["engine-0", "learner-0", "replay-0", "actor-0"]


def test_the_plan_of_an_offline_run_says_so():
    config = parse(["data.trees=t.jsonl", "eval.every=0", "data.epochs=2", "steps=7"])
    prompt = Prompt("p", np.arange(3, dtype=np.int32), "1", "1")
    text = describe(config, plan_of(config), prompt)
    assert "trees of t.jsonl, 2 passes, scored already" in text
    assert "16 trees a step, 7 steps at most, offline" in text
    assert "leaves" not in text


def test_other_machines_reach_replay_and_the_gates_at_the_host_that_was_named_with_its_keys():
    config = parse(["cluster.host=127.0.0.2", "cluster.keys_dir=keys"])
    plan = make_plan(config, run_dir=Path("run"), model_dir=Path("model"))
    for role in plan.roles:
        assert role.wiring.replay_endpoint.startswith("tcp://127.0.0.2:")
        assert role.wiring.gate_endpoint.startswith("tcp://127.0.0.2:")
        assert role.wiring.engine_url.startswith("http://127.0.0.1:"), "SGLang stays on loopback"
        assert role.wiring.keys_dir == str(Path("keys").resolve())


def test_without_a_host_everything_stays_on_loopback_without_keys():
    plan = make_plan(parse([]), run_dir=Path("run"), model_dir=Path("model"))
    for role in plan.roles:
        assert role.wiring.replay_endpoint.startswith("tcp://127.0.0.1:")
        assert role.wiring.keys_dir is None


def test_a_run_on_this_machine_binds_an_address_of_it(tmp_path):
    words = ["cluster.host=203.0.113.7", "cluster.keys_dir=keys"]
    folders = {"run_dir": tmp_path, "model_dir": tmp_path}
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7 is no address of this machine"):
        make_plan(parse(words), **folders)
    on_cluster = make_plan(parse([*words, "cluster.ray_address=auto"]), **folders)
    assert on_cluster.roles[0].wiring.address == "203.0.113.7", "which may be another machine's"
