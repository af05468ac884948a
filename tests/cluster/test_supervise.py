import os
import re
import signal
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

import treepo_async.cluster.calls
import treepo_async.cluster.supervise
from treepo_async.cluster.narrate import Narrator
from treepo_async.cluster.plan import Plan
from treepo_async.cluster.role import RoleReport, RoleSpec
from treepo_async.cluster.supervise import StoppedError, Supervisor, SupervisorRules
from treepo_async.config.wiring import Wiring
from treepo_async.errors import ConfigError, RoleError
from treepo_async.metrics.record import STEP_NAMES, TREE_SUMS

RULES = SupervisorRules(
    num_steps=2, eval_every=0, start_timeout_s=5.0, stop_timeout_s=1.0, eval_timeout_s=0.3
)
READY = {"event": "ready"}
DONE = {"event": "done", "num_steps": 2, "model": "/run/model"}


class RayError(Exception):
    """What Ray raises, e.g. at a deadline."""


class RayActorError(RayError):
    """What Ray raises once a host is gone."""


class ActorUnavailableError(RayActorError):
    """What Ray raises while a host cannot be reached."""


class ActorUnschedulableError(RayError):
    """What Ray raises where the node of a host was dead before it was made."""


class GetTimeoutError(RayError):
    """What Ray raises at a deadline."""


class RayTaskError(RayError):
    """What Ray raises where a method of a host did."""

    def __init__(self, cause):
        super().__init__(f"ray::RoleHost.start()\n{cause}")
        self.cause = cause


@dataclass
class Role:
    """A role's host: its reports are scripted, the last one without its events for ever.

    `unstarted` has what each start raises, or None.
    """

    reports: list
    unstarted: list = field(default_factory=list)
    num_starts: int = 0
    num_stops: int = 0

    def start(self):
        self.num_starts += 1

    def pid(self):
        error = self.unstarted.pop(0) if self.unstarted else None
        if callable(error):
            error = error()
        if error is not None:
            raise error
        return self.num_starts

    def report(self):
        found = self.reports[0] if len(self.reports) == 1 else self.reports.pop(0)
        if isinstance(found, Exception):
            raise found
        if callable(found):
            found()
            found = RoleReport([], None)
        events, found.events[:] = list(found.events), []
        return RoleReport(events, found.exit_code, found.tail)

    def stop(self, timeout_s):
        self.num_stops += 1


@dataclass
class FakeRay:
    """Calls at once what Ray would call elsewhere."""

    roles: dict
    order: list = field(default_factory=list)
    timeouts: list = field(default_factory=list)
    exceptions = SimpleNamespace(
        RayError=RayError,
        RayActorError=RayActorError,
        RayTaskError=RayTaskError,
        ActorUnavailableError=ActorUnavailableError,
        ActorUnschedulableError=ActorUnschedulableError,
        GetTimeoutError=GetTimeoutError,
    )

    def get(self, call, *, timeout):
        self.timeouts.append(timeout)
        return call()

    def wait(self, calls, *, num_returns, timeout):
        for call in calls:
            call()

    def handle(self, name):
        role = self.roles[name]

        def stop(timeout_s):
            self.order.append(name)
            return lambda: role.stop(timeout_s)

        def start():
            role.start()
            return role.pid

        return SimpleNamespace(
            start=SimpleNamespace(remote=start),
            report=SimpleNamespace(remote=lambda: role.report),
            stop=SimpleNamespace(remote=stop),
        )


@dataclass
class FakeHosts:
    """Two nodes; the roles in `lost` are on the one that goes."""

    handles: dict
    ray: FakeRay
    lost: set = field(default_factory=set)
    moved: list = field(default_factory=list)
    dropped: list = field(default_factory=list)

    def node_of(self, name):
        return "10.0.0.2" if name in self.lost else "10.0.0.1"

    def is_lost(self, name):
        return name in self.lost

    def move(self, spec):
        self.moved.append(spec.name)
        self.lost.discard(spec.name)
        return "10.0.0.1"

    def drop(self, name):
        self.dropped.append(name)
        del self.handles[name]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(treepo_async.cluster.supervise, "LOOK_S", 0.005)
    monkeypatch.setattr(treepo_async.cluster.supervise, "SETTLE_S", 0.2)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def says(*events, exit_code=None, tail=""):
    return RoleReport(list(events), exit_code, tail)


@dataclass
class Driver:
    """A supervisor over scripted roles, and what it told."""

    supervisor: Supervisor
    roles: dict
    ray: FakeRay
    lines: list
    records: list
    logged: list

    @property
    def text(self):
        return [re.sub(r"^\[.{6} s\] ", "", line) for line in self.lines]


def driver(
    tmp_path,
    *,
    rules=RULES,
    max_restarts=0,
    actor_restarts=1,
    stall_s=60.0,
    lost=(),
    unstarted=None,
    **scripts,
):
    """A supervisor of an engine, a learner, a replay and an actor; `learner=[...]` scripts its reports.

    The actor may be started again `actor_restarts` times; the others `max_restarts` times, after they were killed. The
    pid of a role is the number of its start.
    """
    unstarted = unstarted or {}
    roles = {
        f"{kind}-0": Role(
            list(scripts.get(kind, [says(READY), says()])), list(unstarted.get(kind, []))
        )
        for kind in ("engine", "learner", "replay", "actor")
    }
    wiring = Wiring("run", str(tmp_path), "", "", "", "", "")
    specs = tuple(
        RoleSpec(name, name[:-2], wiring, 1, max_restarts, survives_failure=False)
        if name != "actor-0"
        else RoleSpec(name, "actor", wiring, 1, actor_restarts, survives_failure=True)
        for name in roles
    )
    ray, lines, records, logged = FakeRay(roles), [], [], []
    cluster = SimpleNamespace(ray=ray, record=lambda: None)
    sink = SimpleNamespace(write=records.append, close=lambda: None)
    plan = Plan("run", tmp_path, tmp_path, specs)
    log = SimpleNamespace(write=logged.append, close=lambda: None)
    narrator = Narrator(rules.num_steps, list(roles), [sink], log, lines.append, stall_s)
    hosts = FakeHosts({name: ray.handle(name) for name in roles}, ray, lost=set(lost))
    supervisor = Supervisor(cluster, plan, rules, narrator, hosts)
    return Driver(supervisor, roles, ray, lines, records, logged)


def step(number):
    numbers = dict.fromkeys(STEP_NAMES.values(), 0.0)
    return {
        "event": "step",
        "step": number,
        "policy_step": number + 1,
        **numbers,
        "seconds": {"wall": 2.0, "wait_batch": 1.0},
        "replay": {"trained": 16},
    }


def weights(number, pause_s):
    timing = {"drain_s": 0.0, "load_s": 0.0, "probe_s": 0.0, "pause_s": pause_s, "gap": 1e-6}
    return {"event": "weights", "step": number, "version": f"0.{number}", **timing}


def evaluation(number):
    return {
        "event": "eval",
        "version": f"0.{number}",
        "step": number,
        "sampled_accuracy": 0.25,
        "greedy_accuracy": 0.5,
        "num_problems": 4,
        "seconds": 1.0,
    }


def test_a_run_ends_with_the_learner_and_stops_every_role_the_engine_last(tmp_path):
    it = driver(tmp_path, learner=[says(READY), says(DONE, exit_code=0)])
    assert it.supervisor.run() == "/run/model"
    assert it.text == [f"ready {name} after 0 s" for name in it.roles]
    assert it.ray.order == ["learner-0", "replay-0", "actor-0", "engine-0"]
    assert {(role.num_starts, role.num_stops) for role in it.roles.values()} == {(1, 1)}


def test_a_step_is_written_with_the_weights_that_it_published(tmp_path):
    it = driver(
        tmp_path,
        learner=[says(READY), says(step(0)), says(), says(step(1)), says(DONE, exit_code=0)],
        engine=[says(READY), says(), says(weights(1, 0.1)), says(weights(2, 0.2)), says()],
    )
    it.supervisor.run()
    assert [(r["step"], r["weights/pause_s"]) for r in it.records] == [(1, 0.1), (2, 0.2)]
    assert [r["leases/trained"] for r in it.records] == [16, 16]


def test_weights_may_be_told_before_their_step_and_never_stand_with_another_one(tmp_path):
    it = driver(
        tmp_path,
        learner=[says(READY), says(), says(step(0)), says(step(1)), says(DONE, exit_code=0)],
        engine=[says(READY), says(weights(1, 0.1)), says()],
    )
    it.supervisor.run()
    assert [(r["step"], r["weights/pause_s"]) for r in it.records] == [(1, 0.1), (2, None)]


def test_trees_and_idleness_are_counted_into_the_step_they_came_before(tmp_path):
    tree = {
        "event": "tree",
        "actor": "actor-0",
        "outcome": "accepted",
        "grow_s": 1.0,
        **dict.fromkeys(TREE_SUMS, 3),
    }
    load = {"event": "engine", "num_samples": 4, "num_idle": 1}
    it = driver(
        tmp_path,
        engine=[says(READY, load), says()],
        replay=[says(READY, tree, tree), says()],
        learner=[says(READY), says(step(0)), says(step(1)), says(DONE, exit_code=0)],
    )
    it.supervisor.run()
    first, second = it.records
    assert (first["trees/accepted"], first["tokens/decoded"], first["idle/engine"]) == (2, 6, 0.25)
    assert (second.get("trees/accepted"), second["tokens/decoded"]) == (None, 0)
    assert first["idle/learner"] == 0.5
    assert [record["leases_by_actor"] for record in it.records] == [{"actor-0": 2}] * 2


def test_every_step_names_the_processes_that_made_it_ranks_and_restarted_roles_too(tmp_path):
    ranks = [{"event": "rank", "rank": i, "pid": 500 + i} for i in range(2)]
    it = driver(
        tmp_path,
        engine=[says(READY), says(weights(1, 0.1)), says()],
        learner=[
            says(*ranks, READY, step(0)),
            says(exit_code=-9),
            says(ranks[1] | {"pid": 601}, step(1), DONE, exit_code=0),
        ],
        max_restarts=1,
    )
    it.supervisor.run()
    before, after = (record["pids"] for record in it.records)
    assert before == {
        "engine-0": 1,
        "learner-0": 1,
        "replay-0": 1,
        "actor-0": 1,
        "learner-0/rank-0": 500,
        "learner-0/rank-1": 501,
    }
    assert after == before | {"learner-0": 2, "learner-0/rank-1": 601}
    kinds = [(event["role"], event["event"]) for event in it.logged]
    assert kinds.count(("learner-0", "rank")) == 3
    assert kinds.count(("learner-0", "started")) == 2


def test_alarms_and_evaluations_are_told_and_recorded(tmp_path):
    alarm = {"event": "alarm", "alarm": "lease expired", "lease": "7"}
    it = driver(
        tmp_path,
        replay=[says(READY, alarm), says()],
        actor=[says(READY, evaluation(0)), says()],
        learner=[says(READY), says(DONE, exit_code=0)],
    )
    it.supervisor.run()
    assert "ALARM replay-0: lease expired  lease=7" in it.text
    assert any(line.startswith("eval policy 0.0  sampled 0.250  greedy 0.500") for line in it.text)
    assert [r["eval/greedy_accuracy"] for r in it.records] == [0.5]


def test_a_run_that_does_not_get_on_says_who_is_waited_for_and_logs_it(tmp_path):
    waiting = {"event": "waiting", "wait": "batch of step 0", "missing": "0 of 16 trees are in"}
    queue = {"event": "queue", "leases": {"actor-0": 2}}
    engine = {"event": "engine", "num_samples": 4, "num_idle": 4, "in_flight": 0, "trouble": ""}
    it = driver(
        tmp_path,
        stall_s=0.05,
        engine=[says(READY, engine), says()],
        replay=[says(READY, queue), says()],
        learner=[says(READY, waiting), *[says()] * 30, says(DONE, exit_code=0)],
    )
    it.supervisor.run()
    stalls = [line for line in it.text if line.startswith("STALLED 0 s: waiting for first tree")]
    assert stalls
    assert "2 leases out (actor-0: 2)" in stalls[0]
    assert "learner waits for the batch of step 0: 0 of 16 trees are in" in stalls[0]
    logged = [event for event in it.logged if event["event"] == "stalled"]
    assert [event["text"] for event in logged] == stalls
    assert {event["role"] for event in logged} == {"driver"}


def test_roles_that_start_for_long_are_named(tmp_path):
    it = driver(
        tmp_path,
        stall_s=0.05,
        learner=[says(READY), *[says()] * 30, says(DONE, exit_code=0)],
        actor=[says()],
    )
    it.supervisor.run()
    assert any(line.startswith("still starting after 0 s: actor-0 (0 s)") for line in it.text)
    assert not any(event["event"] == "stalled" for event in it.logged)


@pytest.mark.parametrize(
    ("done", "evaluated", "waits"),
    [(4, 4, False), (4, 2, True), (3, 2, False), (1, 0, False), (1, -1, True), (0, 0, False)],
)
def test_the_run_waits_for_the_last_evaluation_that_is_due(tmp_path, done, evaluated, waits):
    rules = SupervisorRules(
        num_steps=4, eval_every=2, start_timeout_s=5, stop_timeout_s=1, eval_timeout_s=60
    )
    it = driver(
        tmp_path,
        rules=rules,
        learner=[says(READY), says({**DONE, "num_steps": done}, exit_code=0)],
        actor=[
            says(READY, *([{"event": "evaluated", "step": evaluated}] if evaluated >= 0 else [])),
            *[says()] * 20,
            says({"event": "evaluated", "step": 4}),
            says(),
        ],
    )
    it.supervisor.run()
    assert (len(it.roles["actor-0"].reports) == 1) == waits


def test_an_evaluation_that_never_comes_is_waited_for_until_its_deadline(tmp_path):
    rules = SupervisorRules(
        num_steps=2, eval_every=1, start_timeout_s=5, stop_timeout_s=1, eval_timeout_s=0.2
    )
    it = driver(tmp_path, rules=rules, learner=[says(READY), says(DONE, exit_code=0)])
    assert it.supervisor.run() == "/run/model"


def test_an_actor_that_dies_is_started_again_and_the_run_goes_on(tmp_path):
    it = driver(
        tmp_path,
        actor=[
            says(READY),
            says(exit_code=-9, tail="Traceback\n  | EngineError: gone\n  +----"),
            says(READY),
            says(),
        ],
        learner=[says(READY), *[says()] * 5, says(DONE, exit_code=0)],
    )
    it.supervisor.run()
    assert it.roles["actor-0"].num_starts == 2
    (line,) = [line for line in it.text if "starting it again" in line]
    assert line.startswith("actor-0 was killed by SIGKILL; starting it again (")
    assert line.endswith("see logs/actor-0.log)")


@pytest.mark.parametrize("kind", ["engine", "learner", "replay"])
def test_a_role_that_was_killed_is_started_again(tmp_path, kind):
    scripts = {"learner": [says(READY), *[says()] * 5, says(DONE, exit_code=0)]}
    scripts[kind] = [says(READY), says(exit_code=-9), *scripts.get(kind, [says()])]
    it = driver(tmp_path, max_restarts=1, **scripts)
    it.supervisor.run()
    assert it.roles[f"{kind}-0"].num_starts == 2
    assert any(f"{kind}-0 was killed by SIGKILL; starting it again" in line for line in it.text)


@pytest.mark.parametrize("kind", ["engine", "learner", "replay"])
def test_a_role_that_ended_by_itself_had_a_reason_and_is_not_started_again(tmp_path, kind):
    said = {"event": "failed", "cause": "WeightsError: no publication can be used"}
    scripts = {kind: [says(READY), says(said, exit_code=1, tail="its traceback"), says()]}
    it = driver(tmp_path, max_restarts=3, **scripts)
    with pytest.raises(RoleError, match=f"{kind}-0 ended with code 1: WeightsError: no") as caught:
        it.supervisor.run()
    assert caught.value.tail == "its traceback"
    assert it.roles[f"{kind}-0"].num_starts == 1


def test_an_actor_that_keeps_dying_ends_the_run(tmp_path):
    died = [says(exit_code=1, tail="no GPU") for _ in range(2)]
    it = driver(tmp_path, actor=[says(READY), *died, says()])
    with pytest.raises(RoleError, match="actor-0 ended with code 1") as caught:
        it.supervisor.run()
    assert caught.value.tail == "no GPU"


def test_deaths_are_forgiven_once_the_run_has_made_a_new_step(tmp_path):
    died = says(exit_code=-9)
    it = driver(
        tmp_path,
        max_restarts=1,
        engine=[says(READY), *(report for number in range(4) for report in (says(), died)), says()],
        learner=[
            says(READY),
            *(report for number in range(4) for report in (says(step(number)), says())),
            says(DONE, exit_code=0),
        ],
    )
    it.supervisor.run()
    assert it.roles["engine-0"].num_starts == 5


def test_a_step_that_is_only_done_again_forgives_no_death(tmp_path):
    died = says(exit_code=-9, tail="out of memory")
    again = [report for _ in range(5) for report in (says(READY, step(3)), died)]
    it = driver(tmp_path, max_restarts=2, learner=again)
    with pytest.raises(RoleError, match="learner-0 was killed by SIGKILL"):
        it.supervisor.run()
    assert it.roles["learner-0"].num_starts == 3


@pytest.mark.parametrize(
    ("exit_code", "cause"), [(-9, "was killed by SIGKILL"), (3, "ended with code 3")]
)
def test_the_death_of_the_learner_ends_the_run_with_its_last_lines(tmp_path, exit_code, cause):
    it = driver(tmp_path, learner=[says(READY), says(exit_code=exit_code, tail="out of memory")])
    with pytest.raises(RoleError, match=f"learner-0 {cause}") as caught:
        it.supervisor.run()
    assert (caught.value.role, caught.value.tail) == ("learner-0", "out of memory")
    assert {role.num_stops for role in it.roles.values()} == {1}


def test_a_learner_that_ends_well_without_being_done_is_a_death_too(tmp_path):
    it = driver(tmp_path, learner=[says(READY), says(exit_code=0)])
    with pytest.raises(RoleError, match="learner-0 ended with code 0"):
        it.supervisor.run()


def test_the_loss_of_a_ray_worker_is_told_by_the_name_of_its_role(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "engine-0.log").write_text("its last line\n")
    it = driver(tmp_path, engine=[says(READY), RayError("The actor died.\nmore")])
    with pytest.raises(
        RoleError,
        match=r"engine-0 lost its Ray worker on node 10\.0\.0\.1: RayError The actor died",
    ) as e:
        it.supervisor.run()
    assert e.value.tail == "its last line"


def test_a_role_that_is_started_again_has_its_own_time_to_get_ready(tmp_path):
    rules = replace(RULES, start_timeout_s=0.3)
    it = driver(
        tmp_path,
        rules=rules,
        max_restarts=1,
        replay=[says(READY), *[says()] * 40, says(exit_code=-9), says()],
    )
    with pytest.raises(RoleError, match=r"replay-0 was not ready after 0\.3 s"):
        it.supervisor.run()
    assert it.roles["replay-0"].num_starts == 2


def test_what_fails_once_the_model_is_there_is_told_and_the_run_has_ended_well(tmp_path):
    rules = replace(RULES, eval_every=1, eval_timeout_s=20)
    it = driver(
        tmp_path,
        rules=rules,
        actor=[says(READY), says(), says(exit_code=1), says(exit_code=1), says()],
        learner=[says(READY), says(DONE, exit_code=0), says()],
    )
    assert it.supervisor.run() == "/run/model"
    assert it.text[-1] == "after the last step: actor-0 ended with code 1"


def test_an_evaluation_that_an_earlier_start_of_the_run_had_is_not_waited_for(tmp_path):
    rules = replace(RULES, num_steps=9, eval_every=2, eval_timeout_s=20)
    it = driver(tmp_path, rules=rules, learner=[says(READY), says(DONE, exit_code=0)])
    it.supervisor.plan = replace(it.supervisor.plan, resume_step=2)
    began = time.monotonic()
    assert it.supervisor.run() == "/run/model"
    assert time.monotonic() - began < 10


def test_a_role_that_is_not_ready_in_time_ends_the_run_by_its_name(tmp_path):
    rules = SupervisorRules(
        num_steps=2, eval_every=0, start_timeout_s=0.1, stop_timeout_s=1, eval_timeout_s=1
    )
    it = driver(tmp_path, rules=rules, replay=[says()])
    with pytest.raises(RoleError, match=r"replay-0 was not ready after 0\.1 s"):
        it.supervisor.run()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_role_that_a_terminals_signal_took_along_is_no_failure(tmp_path):
    def interrupt_and_lose_ray():
        os.kill(os.getpid(), signal.SIGINT)
        raise RayError("the worker died")

    it = driver(tmp_path, learner=[says(READY), interrupt_and_lose_ray, says(DONE)])
    with pytest.raises(StoppedError):
        it.supervisor.run()


def test_a_signal_stops_the_run_in_order_and_keeps_the_last_step(tmp_path):
    it = driver(
        tmp_path, learner=[says(READY), says(step(0)), interrupt, says(step(1)), says(DONE)]
    )
    with pytest.raises(StoppedError):
        it.supervisor.run()
    assert "SIGINT: stopping; once more to stop at once" in it.text
    assert [record["step"] for record in it.records] == [1]
    assert {role.num_stops for role in it.roles.values()} == {1}


def test_without_an_engine_a_step_is_told_at_once(tmp_path):
    it = driver(tmp_path, learner=[says(READY), says(step(0)), says(DONE, exit_code=0)])
    it.supervisor.narrator.roles = ["learner-0", "replay-0"]
    it.supervisor.narrator.on_event("learner-0", step(0))
    assert [record["step"] for record in it.records] == [1]
    assert it.supervisor.narrator.is_settled()


def test_each_evaluation_that_comes_gives_the_next_one_its_time(tmp_path, monkeypatch):
    rules = replace(RULES, eval_every=1, eval_timeout_s=0.3)

    def late(number):
        def wait():
            time.sleep(0.2)
            it.supervisor.narrator.on_event("actor-0", {"event": "evaluated", "step": number})

        return wait

    it = driver(
        tmp_path,
        rules=rules,
        learner=[says(READY), says(DONE, exit_code=0)],
        actor=[says(READY), says(), late(0), late(1), late(2), says()],
    )
    it.supervisor.run()
    assert it.supervisor.narrator.evaluated_step == 2
    assert "ended without the evaluation of the last policy" not in it.text


def ledger(begin, **seconds):
    end = begin + sum(seconds.values())
    return {
        "event": "ledger",
        "kind": "actor",
        "pid": 1,
        "begin": begin,
        "end": end,
        "seconds": seconds,
    }


def test_the_time_of_a_step_and_of_the_run_is_told_with_what_roles_say_while_they_end(tmp_path):
    it = driver(
        tmp_path,
        actor=[says(READY, ledger(10.0, compute=1.5, wait_data=0.5)), says()],
        learner=[says(READY), says(step(0)), says(DONE, exit_code=0)],
        engine=[says(READY), says(), says(weights(1, 0.1)), says()],
    )
    actor = it.roles["actor-0"]

    def stop(timeout_s):
        actor.reports[-1].events[:] = [ledger(12.0, idle=2.0), {"event": "alarm", "alarm": "gone"}]

    actor.stop = stop
    it.supervisor.run()
    (record,) = it.records
    assert record["ledger/actor/compute"] == 0.75
    lines = [event for event in it.logged if event["event"] == "ledger"]
    assert [(line["role"], line["begin"], line["end"]) for line in lines] == [
        ("actor-0", 10.0, 14.0)
    ]
    (total,) = [event for event in it.logged if event["event"] == "ledger_total"]
    assert total["seconds"] == {"actor": {"compute": 1.5, "wait_data": 0.5, "idle": 2.0}}
    assert it.lines[-1].split()[1:] == ["37.5", "12.5", "0.0", "0.0", "0.0", "0.0", "50.0", "4"]
    assert "ALARM" not in "".join(it.lines), "that others have gone alarms nobody"


def test_what_is_drawn_is_handed_on(tmp_path):
    it = driver(tmp_path, learner=[says(READY, {"event": "spans", "rows": []}), says(DONE)])
    drawn = SimpleNamespace(events=[], starts=[])
    drawn.on_event = lambda role, event: drawn.events.append((role, event["event"]))
    drawn.on_start = lambda role, pid: drawn.starts.append(role)
    it.supervisor.narrator.trace = drawn
    it.supervisor.run()
    assert ("learner-0", "spans") in drawn.events
    assert sorted(drawn.starts) == ["actor-0", "engine-0", "learner-0", "replay-0"]


def test_an_actor_whose_node_is_gone_is_started_on_another_one(tmp_path):
    it = driver(
        tmp_path,
        lost=["actor-0"],
        actor=[says(READY), RayError("The node is dead"), says(READY), says()],
        learner=[says(READY), *[says()] * 5, says(DONE, exit_code=0)],
    )
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]
    assert it.roles["actor-0"].num_starts == 2
    assert "actor-0 lost its host on node 10.0.0.2; starting it on 10.0.0.1" in it.text


def test_an_actor_whose_host_is_gone_is_started_again_before_its_node_counts_as_dead(tmp_path):
    it = driver(
        tmp_path,
        actor=[says(READY), RayActorError("The actor died"), says(READY), says()],
        learner=[says(READY), *[says()] * 5, says(DONE, exit_code=0)],
    )
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]
    assert "actor-0 lost its host on node 10.0.0.1; starting it on 10.0.0.1" in it.text


def test_an_actor_that_keeps_losing_its_host_ends_the_run(tmp_path):
    gone = [RayActorError("The actor died") for _ in range(2)]
    it = driver(tmp_path, actor=[says(READY), *gone, says()])
    with pytest.raises(RoleError, match="actor-0 lost its Ray worker on node"):
        it.supervisor.run()
    assert it.supervisor.hosts.moved == ["actor-0"]


def test_a_host_that_does_not_answer_on_a_living_node_ends_the_run(tmp_path):
    it = driver(tmp_path, actor=[says(READY), RayError("Get timed out"), says()])
    with pytest.raises(RoleError, match="actor-0 lost its Ray worker on node"):
        it.supervisor.run()
    assert it.supervisor.hosts.moved == []


def test_an_actors_host_that_a_terminals_signal_took_along_is_not_started_again(tmp_path):
    def interrupt_and_lose_the_host():
        os.kill(os.getpid(), signal.SIGINT)
        raise RayActorError("The actor died")

    it = driver(tmp_path, actor=[says(READY), interrupt_and_lose_the_host, says()])
    with pytest.raises(StoppedError):
        it.supervisor.run()
    assert it.supervisor.hosts.moved == []


def test_what_a_host_refuses_is_told_in_its_own_words(tmp_path):
    refused = RayTaskError(ConfigError("engine.cores names 4096"))
    it = driver(tmp_path, engine=[refused])
    said = r"engine-0 cannot be run on node 10\.0\.0\.1: ConfigError: engine\.cores names 4096$"
    with pytest.raises(RoleError, match=said):
        it.supervisor.run()


@pytest.mark.parametrize("error", [RayError, RayActorError])
@pytest.mark.parametrize("kind", ["engine", "learner", "replay"])
def test_a_node_with_what_nobody_else_has_ends_the_run_by_its_address(tmp_path, kind, error):
    scripts = {kind: [says(READY), error("The node is dead"), says()]}
    it = driver(tmp_path, max_restarts=3, lost=[f"{kind}-0"], **scripts)
    with pytest.raises(RoleError, match=rf"{kind}-0 lost its Ray worker on node 10\.0\.0\.2"):
        it.supervisor.run()
    assert it.supervisor.hosts.moved == []


@pytest.mark.parametrize(
    ("lost", "error"),
    [(["engine-0"], RayError("The node is dead")), ([], RayActorError("The actor died"))],
)
def test_an_engine_that_is_not_the_first_is_done_without_once_its_host_is_gone(
    tmp_path, lost, error
):
    it = driver(
        tmp_path,
        lost=lost,
        engine=[says(READY), error],
        learner=[says(READY), *[says()] * 5, says(DONE, exit_code=0)],
    )
    as_second_engine(it)
    assert it.supervisor.run() == "/run/model"
    node = it.supervisor.hosts.node_of("engine-0")
    assert f"engine-0 lost its host on node {node}; going on without it" in it.text
    assert "engine-0" not in it.ray.order


LOST_AT_START = [RayActorError("The actor died"), ActorUnschedulableError("The node is dead")]
SILENT = ActorUnavailableError("The actor is unavailable")


def going_on():
    """Of a learner that ends well after a few looks."""
    return [says(READY), *[says()] * 9, says(DONE, exit_code=0)]


@pytest.mark.parametrize("error", LOST_AT_START)
def test_an_actor_whose_host_is_lost_while_it_is_started_again_is_started_on_another_node(
    tmp_path, error
):
    it = driver(
        tmp_path,
        actor_restarts=2,
        actor=[says(READY), says(exit_code=-9), says(READY), says()],
        unstarted={"actor": [None, error]},
        learner=going_on(),
    )
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]
    assert it.roles["actor-0"].num_starts == 3


@pytest.mark.parametrize("error", LOST_AT_START)
def test_an_actor_that_loses_its_host_on_the_other_node_too_is_moved_as_long_as_it_may(
    tmp_path, error
):
    def losing(restarts):
        return driver(
            tmp_path,
            actor_restarts=restarts,
            actor=[says(READY), RayActorError("The actor died"), says(READY), says()],
            unstarted={"actor": [None, error]},
            learner=going_on(),
        )

    it = losing(2)
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"] * 2
    it = losing(1)
    with pytest.raises(RoleError, match="actor-0 lost its Ray worker on node"):
        it.supervisor.run()
    assert it.supervisor.hosts.moved == ["actor-0"]


def test_an_actor_whose_host_is_lost_in_the_first_start_is_started_on_another_node(tmp_path):
    it = driver(tmp_path, unstarted={"actor": [LOST_AT_START[0]]}, learner=going_on())
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]


def as_second_engine(it):
    """The engine as one that is not the first."""
    plan = it.supervisor.plan
    second = replace(plan.roles[0], wiring=replace(plan.roles[0].wiring, index=1))
    it.supervisor.plan = replace(plan, roles=(second, *plan.roles[1:]))


def test_an_engine_that_is_not_the_first_is_done_without_where_its_host_is_lost_while_it_starts(
    tmp_path,
):
    it = driver(
        tmp_path,
        max_restarts=1,
        engine=[says(READY), says(exit_code=-9)],
        unstarted={"engine": [None, LOST_AT_START[0]]},
        learner=going_on(),
    )
    as_second_engine(it)
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.dropped == ["engine-0"]


@pytest.mark.parametrize("kind", ["actor", "engine", "learner", "replay"])
def test_a_host_that_cannot_be_reached_for_a_moment_keeps_its_role(tmp_path, kind):
    scripts = {"learner": going_on()}
    scripts[kind] = [says(READY), SILENT, SILENT, *scripts.get(kind, [says()])]
    it = driver(tmp_path, **scripts)
    assert it.supervisor.run() == "/run/model"
    assert (it.supervisor.hosts.moved, it.supervisor.hosts.dropped) == ([], [])
    assert it.roles[f"{kind}-0"].num_starts == 1
    (line,) = [line for line in it.text if "does not answer" in line]
    assert line.startswith(f"{kind}-0 on node 10.0.0.1 does not answer: ActorUnavailableError")
    assert line.endswith("asking again for up to 30 s")


def test_a_host_that_has_answered_has_all_its_time_when_it_is_silent_again(tmp_path):
    it = driver(tmp_path, replay=[says(READY), SILENT, says(), SILENT, says()], learner=going_on())
    assert it.supervisor.run() == "/run/model"
    assert len([line for line in it.text if "asking again for up to 30 s" in line]) == 2


def test_an_engine_that_stays_silent_is_done_without_after_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(treepo_async.cluster.calls, "SILENT_S", 0.03)
    learner = [says(READY), *[says()] * 200, says(DONE, exit_code=0)]
    it = driver(tmp_path, engine=[says(READY), SILENT], learner=learner)
    as_second_engine(it)
    drop, left = it.supervisor.hosts.drop, it.roles["learner-0"].reports

    def drop_and_end(name):
        drop(name)
        left[:] = left[-1:]

    it.supervisor.hosts.drop = drop_and_end
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.dropped == ["engine-0"]
    assert "engine-0 lost its host on node 10.0.0.1; going on without it" in it.text


def test_an_actor_whose_silent_host_has_no_answer_by_the_deadline_is_started_elsewhere(tmp_path):
    it = driver(
        tmp_path,
        actor=[says(READY), SILENT, GetTimeoutError("timed out"), says(READY), says()],
        learner=going_on(),
    )
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]
    limits = [limit for limit in it.ray.timeouts if 1.0 < limit < 60.0]
    assert len(limits) == 1, "of the call to the silent host alone"
    assert limits[0] <= 30.0


def test_a_silent_first_engine_ends_the_run_after_its_time_by_name(tmp_path):
    it = driver(tmp_path, engine=[says(READY), SILENT, GetTimeoutError("timed out")])
    said = r"engine-0 lost its Ray worker on .*GetTimeoutError .* \(it was asked for up to 30 s\)"
    with pytest.raises(RoleError, match=said):
        it.supervisor.run()


def test_a_silent_host_of_a_node_that_is_gone_is_not_waited_for(tmp_path):
    it = driver(
        tmp_path,
        lost=["actor-0"],
        actor=[says(READY), SILENT, says(READY), says()],
        learner=going_on(),
    )
    assert it.supervisor.run() == "/run/model"
    assert it.supervisor.hosts.moved == ["actor-0"]


def test_a_host_that_is_silent_while_its_role_starts_is_asked_again(tmp_path):
    it = driver(tmp_path, unstarted={"learner": [SILENT, SILENT]}, learner=going_on())
    assert it.supervisor.run() == "/run/model"
    assert it.roles["learner-0"].num_starts == 3


def test_a_host_that_is_silent_while_its_role_starts_is_not_asked_again_after_a_signal(tmp_path):
    def interrupt_and_cut_off():
        interrupt()
        return SILENT

    it = driver(tmp_path, unstarted={"actor": [interrupt_and_cut_off]})
    with pytest.raises(StoppedError):
        it.supervisor.run()
    assert it.roles["actor-0"].num_starts == 1


def with_follower(tmp_path, *events):
    """Replay's place is that of a process of the learner that follows, and ends with code 0 before the leader."""
    it = driver(
        tmp_path,
        replay=[says(READY), says(*events, exit_code=0), says(exit_code=0)],
        learner=[says(READY), says(), says(), says(DONE, exit_code=0)],
    )
    plan = it.supervisor.plan
    wiring = replace(plan.roles[2].wiring, first_rank=4)
    follower = replace(plan.roles[2], module="learner", wiring=wiring)
    it.supervisor.plan = replace(plan, roles=(*plan.roles[:2], follower, *plan.roles[3:]))
    return it


def test_a_process_of_the_learner_that_follows_may_be_seen_to_end_before_the_leader(tmp_path):
    it = with_follower(tmp_path, {"event": "over"})
    assert it.supervisor.run() == "/run/model"


def test_a_process_of_the_learner_that_was_asked_to_end_has_not_followed_to_the_end(tmp_path):
    it = with_follower(tmp_path)
    with pytest.raises(RoleError, match="replay-0 ended with code 0"):
        it.supervisor.run()
