import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from treepo_async.cluster.join import WIRING_FILE, Guests, accept, guests, invited, read
from treepo_async.cluster.plan import make_plan
from treepo_async.cluster.prepare import make_run_dir
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError, RoleError
from treepo_async.tiny.tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 30.0


@pytest.fixture
def plan(tmp_path):
    """Of a run whose replay never comes up, so that its actors wait for it."""
    model_dir, run_dir = tmp_path / "model", tmp_path / "run"
    model_dir.mkdir()
    save_tokenizer(model_dir, max_tokens=512)
    sizes = {"vocab_size": 128, "max_position_embeddings": 512}
    (model_dir / "config.json").write_text(json.dumps(sizes))
    config = Config(run_dir=str(run_dir))
    config.actors, config.engines = 3, 2
    make_run_dir(run_dir, config, sizes)
    return make_plan(config, run_dir=run_dir, model_dir=model_dir)


def test_a_run_invites_while_it_lasts_and_only_its_owner_reads_how(plan):
    with invited(plan):
        file = plan.run_dir / WIRING_FILE
        assert file.stat().st_mode & 0o777 == 0o600
        invitation = accept(plan.run_dir)
        assert (invitation.run_id, invitation.pid) == (plan.run_id, os.getpid())
        assert invitation.is_open(plan.run_dir)
    assert not file.exists()
    assert not invitation.is_open(plan.run_dir)
    with pytest.raises(ConfigError, match=r"no run goes on there .*start it with: python launch"):
        accept(plan.run_dir)


def test_an_invitation_dies_with_its_driver_and_with_the_run_that_takes_its_place(plan):
    with invited(plan):
        invitation = accept(plan.run_dir)
        file = plan.run_dir / WIRING_FILE
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {"create_time": said["create_time"] - 100}))
        with pytest.raises(ConfigError, match=rf"its driver \(pid {os.getpid()}\) is gone; go on"):
            accept(plan.run_dir)
        file.write_text(json.dumps(said | {"run_id": "another"}))
        assert not invitation.is_open(plan.run_dir)
        file.write_text('{"pid": 1}')
        with pytest.raises(ConfigError, match="cannot be read"):
            read(plan.run_dir)


def test_a_run_on_a_file_of_trees_needs_no_guests(plan):
    roles = tuple(role for role in plan.roles if role.module != "actor")
    with (
        invited(replace(plan, roles=roles)),
        pytest.raises(ConfigError, match="no actor is needed"),
    ):
        accept(plan.run_dir)


def test_guests_have_names_of_their_own_evaluate_nothing_and_are_spread_over_the_engines(plan):
    with invited(plan):
        specs = guests(accept(plan.run_dir), 4)
    names = [spec.name for spec in specs]
    assert len({*names}) == 4
    assert all(name.startswith("guest-") and f"-{os.getpid()}-" in name for name in names)
    assert [spec.wiring.role for spec in specs] == names
    assert all(spec.wiring.index >= 3 for spec in specs), "index 0 evaluates"
    own = [role.wiring.engine_url for role in plan.roles if role.module == "actor"]
    assert [spec.wiring.engine_url for spec in specs] == [*own, own[0]]
    assert {spec.module for spec in specs} == {"actor"}


def test_guests_that_all_fail_end_the_command_with_the_reason(plan):
    (plan.run_dir / "config.yaml").unlink()
    said = []
    with invited(plan):
        party = Guests(
            plan.run_dir, accept(plan.run_dir), guests(accept(plan.run_dir), 1), said.append
        )
        with pytest.raises(RoleError, match=r"guest-.* ended with code 1") as caught:
            party.run()
    assert "config.yaml" in caught.value.tail
    assert any("ended with code 1" in line for line in said)


@pytest.mark.faults
@pytest.mark.parametrize("ending", ["run", "ctrl-c"])
def test_guests_leave_with_the_run_and_by_ctrl_c(plan, ending):
    with invited(plan):
        command = [sys.executable, "launch/actor.py", f"join={plan.run_dir}", "actors=2"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline() for _ in range(2)]
        assert all(line.startswith("started guest-") for line in lines)
        assert len(guests_of(plan)) == 2
        if ending == "ctrl-c":
            process.send_signal(signal.SIGINT)
            text, _ = process.communicate(timeout=SOON_S)
    if ending == "run":
        text, _ = process.communicate(timeout=SOON_S)
    assert process.returncode == 0, text
    said = "has ended" if ending == "run" else "left; their leases went back"
    assert said in text
    deadline = time.monotonic() + SOON_S
    while left := guests_of(plan):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def guests_of(plan):
    """Processes of the run's guests that are there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"treepo_async.actor" in command and plan.run_id.encode() in command:
                found.append(folder.name)
    return found


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["join=nowhere"], "join=nowhere: no run goes on there"),
        (["join=nowhere", "actors=0"], "actors=0 must be a number from 1 to"),
        (["join=nowhere", "actors=x"], "actors=x must be a number from 1 to"),
        (["join=nowhere", "tree.width=8"], "tree.width does not go with join="),
    ],
)
def test_a_bad_invitation_ends_with_2_and_the_way_out(words, reason):
    done = subprocess.run(
        [sys.executable, "launch/actor.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
