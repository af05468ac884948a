"""The real learner as a process beside a real replay and an actor of this one, with an engine that answers by rule.

What an actor grows does not depend on when it does: the tokens follow from the prompt, and the policy step that samples from
the lease. So two runs train on the same trees, and what differs in their weights is the learner's doing. The engine takes the
newest lineage that has published the step, as an engine host would.

`Nursery` is one warm process; each learner is forked from it and forks its ranks, so a start costs no imports. Like a role,
a learner dies with the process that holds it, and its ranks with it.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    events_in,
    loopback,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
)
from treepo_async import chaos
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker as ActorWorker
from treepo_async.config.command_line import parse, to_yaml
from treepo_async.config.wiring import Wiring
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import Checkpoint, CheckpointStore
from treepo_async.weights.store import versions_in
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import Requester

BATCH, STEPS, EVERY = 2, 6, 2
FIRST_TOKEN = int(numbered_prompt(0).token_ids[0])
END_S = 120.0
LOOK_S = 0.005
SEED, EOS_RATE = 5, 0.2


@dataclass
class FollowingEngine(ScriptedEngine):
    """Samples trees of even prompts under the least step that will do, the others under that of their own batch."""

    weights: Path = Path()
    _versions: dict[int, PolicyVersion] = field(default_factory=dict)

    async def extend(self, prefix, *, least_step=0, **options):
        """See `ScriptedEngine`; waits until the step has been published."""
        index = prefix[0] - FIRST_TOKEN
        step = index // BATCH if index % 2 else least_step
        while step and not self._published(step):  # noqa: ASYNC110  a folder tells nobody
            await asyncio.sleep(LOOK_S)
        self._versions[index] = max(self._published(step), default=PolicyVersion(0, 0))
        return await super().extend(prefix, least_step=least_step, **options)

    def _published(self, step):
        there = versions_in(self.weights) if self.weights.is_dir() else []
        return [version for version in there if version.step == step]

    def _complete(self, prefix, *options):
        self.version = self._versions[prefix[0] - FIRST_TOKEN]
        return super()._complete(prefix, *options)

    def _version_for(self, least_step):
        return self.version


@dataclass(frozen=True)
class Case:
    """A learner's start."""

    wiring: Wiring
    plan: Path | None = None
    """Of the faults."""
    prepare: Callable[[], None] | None = None
    """Done in the learner's process before it begins."""
    work: Callable[[Wiring], None] | None = None
    """In the place of the learner's main."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    checkpoint: Checkpoint
    """The last one; its hashes are those of weights and optimizer."""
    events: list[dict]
    """Of all learners of the run."""
    batches: dict[int, list[str]]
    """Leases of the steps that are kept."""
    results: dict[int, dict[int, str]]
    """Digest by step and lineage."""

    def steps(self):
        """The steps as they were done, those that were repeated too."""
        return [event["step"] for event in self.events if event["event"] == "step"]

    def digests(self):
        """The last digest of each step."""
        return {e["step"]: e["digest"] for e in self.events if e["event"] == "step"}

    def alarms(self):
        return [event for event in self.events if event["event"] == "alarm"]


class Nursery:
    """A warm process from which learners are forked."""

    def __init__(self):
        spawn = multiprocessing.get_context("spawn")
        self._calls, other = spawn.Pipe()
        self._process = spawn.Process(target=_nurse, args=(other,), daemon=False)
        self._process.start()

    def start(self, case):
        """Start a learner. Gives its process id."""
        self._calls.send(("start", case))
        return self._calls.recv()

    def wait(self):
        """The exit code of the learner that was started last; negative where it was killed."""
        self._calls.send(("wait", None))
        assert self._calls.poll(END_S), "the learner did not end"
        return self._calls.recv()

    def close(self):
        self._process.kill()
        self._process.join()


def _nurse(calls):
    import treepo_async.learner.__main__  # noqa: F401  what the learners shall find imported

    pid = 0
    while True:
        call, case = calls.recv()
        if call == "start":
            pid = os.fork()
            if pid == 0:
                _learn(case)
            calls.send(pid)
        else:
            calls.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _learn(case):
    """The main of a role, with its words in a file and the faults of a plan. Never returns."""
    from treepo_async.learner.__main__ import main
    from treepo_async.process import die_with_parent

    die_with_parent()
    log = os.open(Path(case.wiring.run_dir) / "learner.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    if case.plan is not None:
        chaos.point = chaos.Plan(case.plan, "learner-0").reach
    if case.prepare is not None:
        case.prepare()
    code = 1
    try:
        (case.work or main)(case.wiring)
        code = 0
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)


class Run:
    """A folder in which learners train, one after another."""

    def __init__(self, nursery, model_dir, folder, *, max_staleness=1, keep=4, words=()):
        """Begin; `keep` is above the number of checkpoints, so that replay keeps all batches to be looked at."""
        self.nursery, self.folder = nursery, folder
        self._model_dir, self._max_staleness = model_dir, max_staleness
        folder.mkdir(parents=True)
        config = parse(
            [
                f"steps={STEPS}",
                f"seed={SEED}",
                "eval.every=0",
                f"checkpoint.every={EVERY}",
                f"checkpoint.keep={keep}",
                f"replay.prompts_per_batch={BATCH}",
                f"replay.max_staleness={max_staleness}",
                "learner.microbatch_tokens=40",
                "learner.lr=0.01",
                "learner.warmup_steps=0",
                "learner.max_restarts=5",
                *words,
            ]
        )
        (folder / "config.yaml").write_text(to_yaml(config))

    def plan(self, **points):
        """A plan of faults: `learner_forward={"act": "kill", "hit": 3}`."""
        file = self.folder / "plan.json"
        named = {name.replace("_", ".", 1): rule for name, rule in points.items()}
        file.write_text(json.dumps({"log": str(self.folder / "chaos.log"), "points": named}))
        return file

    def injected(self):
        """Points that acted."""
        log = self.folder / "chaos.log"
        return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []

    @contextlib.asynccontextmanager
    async def serving(self, *, run_id="run", resume_step=None, lineage=0, seed=SEED):
        """Replay and an actor. Gives the server and the wiring of a learner."""
        async with (
            serve_replay(
                folder=self.folder / "replay",
                run_id=run_id,
                resume_step=resume_step,
                num_batches=STEPS,
                max_staleness=self._max_staleness,
                prompts_per_batch=BATCH,
            ) as (server, endpoint),
            Requester(
                endpoint, name="actor-0", owner="replay", hello=Hello(name="actor-0", run_id=run_id)
            ) as requester,
        ):
            engine = FollowingEngine(seed=seed, eos_rate=EOS_RATE, weights=self.folder / "weights")
            actor = ActorWorker(ReplayClient(requester), grower_of(engine))
            wiring = Wiring(
                run_id=run_id,
                run_dir=str(self.folder),
                model_dir=str(self._model_dir),
                replay_endpoint=endpoint,
                gate_endpoint=loopback(),
                engine_url="",
                role="learner-0",
                lineage=lineage,
                resume_step=resume_step,
            )
            async with running(actor.run(concurrent_trees=2 * BATCH)):
                yield server, wiring

    async def train(self, *, prepare=None, plan=None, **serving):
        """One learner, from its start to its end. Gives what the run came to."""
        async with self.serving(**serving) as (server, wiring):
            self.nursery.start(Case(wiring, plan, prepare))
            assert await asyncio.to_thread(self.nursery.wait) == 0, self.log()
            return self.outcome(server)

    async def train_until(self, plan, **serving):
        """One learner until it reaches the point at which its plan stops it; then everything is killed."""
        async with self.serving(**serving) as (_, wiring):
            pid = self.nursery.start(Case(wiring, plan))
            async with asyncio.timeout(END_S):
                while not self.injected():  # noqa: ASYNC110  nor does a file
                    await asyncio.sleep(LOOK_S)
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(self.nursery.wait)

    def outcome(self, server):
        consumed = server.queue.order.consumed
        return Outcome(
            CheckpointStore(self.folder / "checkpoints", keep=4).newest(print),
            events_in(self.log()),
            {step: [entry.lease_id for entry in batch] for step, batch in consumed.items()},
            server.queue.steps.results,
        )

    def log(self):
        return (self.folder / "learner.log").read_text()


def grower_of(engine):
    """Its tokens and log-probs do not depend on any weights."""
    scoring = scoring_by(lambda response, _: float(sum(response.encode()) % 3 == 0))
    return Grower("actor-0", engine, ascii_settings(), scoring, SEED)
