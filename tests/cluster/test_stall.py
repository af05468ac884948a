import pytest

from treepo_async.cluster.stall import StallWatch

ROLES = ("engine-0", "learner-0", "replay-0", "actor-0", "actor-1")
STALL_S = 30.0
WAITING = {"event": "waiting", "wait": "batch of step 4", "missing": "12 of 16 trees are in"}


def engine(in_flight=0, trouble=""):
    return {"event": "engine", "in_flight": in_flight, "trouble": trouble}


def queue(**leases):
    return {"event": "queue", "leases": {name.replace("_", "-"): n for name, n in leases.items()}}


class Run:
    """A watch on a run, and the second that it is in."""

    def __init__(self, *, ready=ROLES):
        self.now = 100.0
        self.watch = StallWatch(STALL_S, ROLES, self.now)
        for role in ROLES:
            self.watch.on_start(role, self.now)
        for role in ready:
            self.say(role, {"event": "ready"})

    def say(self, role, event):
        self.watch.on_event(role, event, self.now)

    def go_on(self, seconds, **events):
        """Second by second; `events` are told in each of them. Gives what the watch said."""
        told = []
        for _ in range(seconds):
            self.now += 1
            for role, event in events.items():
                self.say(role.replace("_", "-"), event)
            report = self.watch.report(self.now)
            told += [] if report is None else [report]
        return told


def test_a_stall_is_told_within_its_time_with_the_blocker_and_again_every_stall_s():
    run = Run()
    told = run.go_on(
        100,
        engine_0=engine(),
        replay_0=queue(actor_0=2, actor_1=1),
        learner_0=WAITING,
    )
    assert [report.is_stall for report in told] == [True, True, True]
    assert told[0].text == (
        "STALLED 30 s: waiting for first tree by actor-0, actor-1; engine-0 healthy, 0 requests in flight; "
        "3 leases out (actor-0: 2, actor-1: 1); learner waits for the batch of step 4: 12 of 16 trees are in"
    )
    assert [report.text[:12] for report in told] == [
        "STALLED 30 s",
        "STALLED 60 s",
        "STALLED 90 s",
    ]


@pytest.mark.parametrize("kind", ["tree", "step", "eval", "evaluated", "weights", "saved"])
def test_a_run_that_gets_on_is_left_in_peace_and_any_progress_ends_a_stall(kind):
    run = Run()
    for _ in range(10):
        assert run.go_on(25, engine_0=engine(), replay_0=queue()) == []
        run.say("learner-0", {"event": kind, "outcome": "accepted"})
    assert len(run.go_on(30, engine_0=engine(), replay_0=queue())) == 1
    run.say("learner-0", {"event": kind, "outcome": "accepted"})
    assert run.go_on(29, engine_0=engine(), replay_0=queue()) == []


@pytest.mark.parametrize("outcome", ["stale", "reward_error", "degenerate"])
def test_a_tree_that_is_not_accepted_is_no_progress(outcome):
    run = Run()
    tree = {"event": "tree", "outcome": outcome}
    assert len(run.go_on(30, engine_0=engine(), replay_0=tree, learner_0=WAITING)) == 1


def test_heartbeats_and_alarms_are_no_progress():
    run = Run()
    alarm = {"event": "alarm", "alarm": "lease taken back"}
    assert len(run.go_on(30, engine_0=engine(), replay_0=alarm, learner_0=WAITING)) == 1


def test_a_role_that_starts_is_named_and_that_is_no_stall():
    run = Run(ready=("engine-0", "replay-0", "actor-0", "actor-1"))
    (report,) = run.go_on(30, engine_0=engine(), replay_0=queue())
    assert report == ("still starting after 30 s: learner-0 (30 s)", False)
    run.say("learner-0", {"event": "ready"})
    (report,) = run.go_on(30, engine_0=engine(), replay_0=queue(), learner_0=WAITING)
    assert report.is_stall


def blocker(report):
    return report.text.partition("waiting for ")[2].partition(";")[0]


@pytest.mark.parametrize(
    ("events", "blamed"),
    [
        (
            {
                "engine_0": engine(4, "without a sign of life for 20 s"),
                "replay_0": queue(actor_0=1),
                "learner_0": WAITING,
            },
            "engine-0 to answer",
        ),
        ({"replay_0": queue(actor_0=1), "learner_0": WAITING}, "engine-0 to answer"),
        ({"engine_0": engine(), "learner_0": WAITING}, "replay-0"),
        ({"engine_0": engine(), "replay_0": queue()}, "learner-0 to end its step"),
        (
            {"engine_0": engine(7), "replay_0": queue(actor_0=1), "learner_0": WAITING},
            "first tree: engine-0 has requests in flight",
        ),
        (
            {"engine_0": engine(), "replay_0": queue(actor_1=3), "learner_0": WAITING},
            "first tree by actor-1",
        ),
        (
            {"engine_0": engine(), "replay_0": queue(), "learner_0": WAITING},
            "actor-0, actor-1 to ask for a lease",
        ),
    ],
    ids=["sick engine", "silent engine", "replay", "learner", "engine at work", "actor", "nobody"],
)
def test_whoever_should_end_the_wait_is_named(events, blamed):
    (report,) = Run().go_on(30, **events)
    assert blocker(report) == blamed


def test_the_last_alarm_of_a_silent_role_is_said_again():
    run = Run()
    run.go_on(5, engine_0=engine(), replay_0=queue(), learner_0=WAITING)
    run.say("replay-0", {"event": "alarm", "alarm": "replay cannot write, nothing is acknowledged"})
    (report,) = run.go_on(25, engine_0=engine(), learner_0=WAITING)
    assert blocker(report) == "replay-0"
    assert "replay-0 silent (its last alarm: replay cannot write, nothing" in report.text


def test_a_tree_that_came_makes_the_next_one_a_further_one():
    run = Run()
    run.say("replay-0", {"event": "tree", "outcome": "accepted"})
    (report,) = run.go_on(30, engine_0=engine(), replay_0=queue(actor_0=1), learner_0=WAITING)
    assert blocker(report) == "a tree by actor-0"


def test_a_process_that_was_started_anew_is_not_judged_by_the_words_of_the_one_before():
    run = Run()
    run.go_on(5, engine_0=engine(0, "being started again"), replay_0=queue(), learner_0=WAITING)
    run.watch.on_start("engine-0", run.now)
    run.say("engine-0", {"event": "ready"})
    (report,) = run.go_on(30, engine_0=engine(), replay_0=queue(), learner_0=WAITING)
    assert "engine-0 healthy" in report.text
