"""launch/setup.sh against a fake Python: what is real here is the script, bash and the files."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ("cpu.txt", "test.txt")

FAKE_PYTHON = """#!/usr/bin/env bash
# Answers as python and as its pip; writes down what it was asked; fails where the test says so.
echo "$*" >> "$CALLS"
case "$*" in
  --version) echo "Python ${FAKE_VERSION:-3.11.7}" ;;
  -c*) [[ ${FAKE_VERSION:-3.11.7} == 3.1[12].* ]] ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *pip*list*) printf 'Package Version\\n%s\\n' "${FAKE_LIST:-torch 2.13.0}"; sleep 0.1; echo zz 1 ;;
  *pip*install*"${FAIL_ON:-nothing}"*) echo "${FAIL_WITH:-}"; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts and requirement files and a fake Python and df."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    tools = tmp_path / "tools"
    tools.mkdir()
    write_tool(tools / "python3", FAKE_PYTHON)
    write_tool(tools / "df", "#!/bin/sh\necho header; echo disk 0 0 ${FREE_KIB:-99999999} 0 /\n")
    return tmp_path


def write_tool(path, text):
    path.write_text(text)
    path.chmod(0o755)


def set_up(checkout, *arguments, **variables):
    """Run the script; return its exit code, what it printed, and what Python was asked to do."""
    calls = checkout / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", checkout / "launch" / "setup.sh", *arguments],
        env={"PATH": f"{checkout / 'tools'}:{os.environ['PATH']}", "CALLS": calls, **variables},
        capture_output=True,
        text=True,
        timeout=50,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def installs(calls):
    return [call.split(" install ")[1] for call in calls if " install " in call]


def test_torch_comes_first_and_the_rest_without_dependencies(checkout):
    code, out, calls = set_up(checkout, "--test")

    assert code == 0, out
    assert installs(calls) == [
        "-c requirements/cpu.txt torch==2.13.0",
        "--no-deps -r requirements/cpu.txt",
        "--no-deps -r requirements/test.txt",
    ]


def test_a_second_call_asks_python_for_nothing_and_says_nothing(checkout):
    set_up(checkout)

    assert set_up(checkout) == (0, "", [])


def test_the_test_tools_are_added_to_a_finished_environment(checkout):
    set_up(checkout)

    _, _, calls = set_up(checkout, "--test")

    assert installs(calls) == ["--no-deps -r requirements/test.txt"]


def test_a_changed_requirement_file_is_installed_again(checkout):
    set_up(checkout)
    with (checkout / "requirements" / "cpu.txt").open("a") as file:
        file.write("another==1.0\n")

    _, _, calls = set_up(checkout)

    assert len(installs(calls)) == 2


@pytest.mark.parametrize("step", ["torch==", "--no-deps"])
def test_an_interrupted_install_is_resumed(checkout, step):
    code, _, _ = set_up(checkout, FAIL_ON=step)
    assert code == 4
    assert not (checkout / ".venv" / "setup.cpu.stamp").exists()

    code, _, calls = set_up(checkout)

    assert code == 0
    assert len(installs(calls)) == 2


def test_an_environment_without_its_python_is_not_taken_for_complete(checkout):
    set_up(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()

    _, _, calls = set_up(checkout)

    assert "-m venv .venv" in calls


@pytest.mark.parametrize("version", ["3.10.13", "3.13.0"])
def test_another_python_is_refused_with_the_way_out(checkout, version):
    code, out, calls = set_up(checkout, FAKE_VERSION=version)

    assert code == 2
    assert f"python3 is not Python 3.11 or 3.12 (Python {version})" in out
    assert "PYTHON=" in out
    assert not installs(calls)


def test_a_missing_python_is_refused(checkout):
    code, out, _ = set_up(checkout, PYTHON="python-that-is-not-there")

    assert code == 2
    assert "python-that-is-not-there is not Python 3.11 or 3.12" in out


def test_the_chosen_python_is_used(checkout):
    write_tool(checkout / "tools" / "python3", "#!/bin/sh\nexit 1\n")
    write_tool(checkout / "tools" / "python3.12", FAKE_PYTHON)

    assert set_up(checkout, PYTHON="python3.12", FAKE_VERSION="3.12.1")[0] == 0


def test_too_little_disk_is_refused_before_anything_is_made(checkout):
    code, out, _ = set_up(checkout, FREE_KIB=str(5 * 1024**2))

    assert code == 3
    assert "5 GiB free" in out
    assert not (checkout / ".venv").exists()


def test_an_unreachable_index_says_what_to_do_and_keeps_the_log(checkout):
    message = "ERROR: No matching distribution found for torch==2.13.0"

    code, out, _ = set_up(checkout, FAIL_ON="torch==", FAIL_WITH=message)

    assert code == 4
    assert "pip config list" in out
    assert message in out
    assert message in (checkout / ".venv" / "setup.log").read_text()


def test_a_cuda_build_of_torch_is_pointed_out(checkout):
    code, out, _ = set_up(checkout, FAKE_LIST="nvidia-cublas 13.0")

    assert code == 0
    assert "CUDA build of torch" in out
    assert "CUDA build of torch" not in set_up(checkout, "--test")[1]


def test_an_unknown_argument_is_refused(checkout):
    assert set_up(checkout, "--tests")[0] == 2


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_an_exact_public_version(name):
    for pin in pins(name):
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin), pin


def test_nothing_is_pinned_twice_and_no_cuda_package_is_pinned():
    names = [canonical(pin.split("==")[0]) for name in REQUIREMENTS for pin in pins(name)]

    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "torchvision"))]


def test_every_declared_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["test"]
    pinned = {canonical(pin.split("==")[0]) for name in REQUIREMENTS for pin in pins(name)}

    assert {canonical(re.match(r"[\w.-]+", need)[0]) for need in declared} <= pinned
