"""`python -m treepo_async.bench.async_roles FOLDER`: all processes of a scripted run.

    actors (`async_actor`) <-> gates (`async_gates`) <- learner (`async_learner`)
          trees -> replay (`queue_replay`: the server of a run) -> batches

Each is forked from this process, which has imported everything, and writes its events to `FOLDER/<role>.jsonl`. Waits: this
process for the learner, which ends by itself (the caller has the deadline), and for any role that fails before; the others
are killed then.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from treepo_async.bench.async_actor import act
from treepo_async.bench.async_gates import keep_gates
from treepo_async.bench.async_learner import learn
from treepo_async.bench.async_script import Script
from treepo_async.bench.queue_replay import Arm, ReplaySpec, serve
from treepo_async.process import die_with_parent, keep_freed_memory

PUBLICATIONS = "publications"
STOP_S = 5.0


def run_all(folder: Path) -> int:
    """Run until the learner has ended. Gives the exit status of the role that ended first."""
    script = Script.read(folder)
    publications = folder / PUBLICATIONS
    publications.mkdir()
    spec = ReplaySpec(
        Arm.DURABLE,
        script.replay_endpoint,
        str(folder / "replay"),
        script.prompts,
        script.max_staleness,
    )
    works: dict[str, Callable[[], None]] = {
        "replay": lambda: asyncio.run(serve(spec)),
        "gates": lambda: asyncio.run(keep_gates(script, publications)),
        "learner": partial(learn, script, publications),
    }
    for index in range(script.actors):
        works[f"actor-{index}"] = partial(_act, script, index)
    fork = get_context("fork")
    roles = [fork.Process(target=_be, args=(folder, *work), name=work[0]) for work in works.items()]
    for role in roles:
        role.start()
    try:
        return _first_end(roles)
    finally:
        for role in roles:
            role.kill()
        for role in roles:
            role.join(STOP_S)


def _act(script: Script, index: int) -> None:
    asyncio.run(act(script, index))


def _first_end(roles: Sequence[BaseProcess]) -> int:
    ended = wait([role.sentinel for role in roles])
    first = next(role for role in roles if role.sentinel in ended)
    first.join(STOP_S)
    code = first.exitcode or 0
    return code if first.name == "learner" else code or 1


def _be(folder: Path, role: str, work: Callable[[], None]) -> None:
    """A forked process: its events go to its own file."""
    die_with_parent()
    keep_freed_memory()
    with (folder / f"{role}.jsonl").open("w") as told:
        os.dup2(told.fileno(), sys.stdout.fileno())
        work()


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
