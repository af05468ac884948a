"""`python -m tests.faults.soak [kills=500] [seed=0] [mean_s=2] [twin_s=60] [out=DIR]`: kill random parts of a small run, again and again.

    kill a random role -> wait until it and the run have got on (the recovery) -> wait a random time -> kill the next ...

The schedule follows from the seed. No kill comes before the run has recovered from the last one, so each of them hits a
run at work. A run of the same plan without a fault goes before and gives the rate to compare with; what every step must
come out as is computed apart, by `roles.expected`. Exit code 0: nothing lost, nothing trained twice, every step as
expected, every invariant of `cluster.verify` holds, and the rate is at least `MIN_RATE` of that without faults.

Waits: for recoveries, each at most `RECOVERY_S`; one that does not come ends the soak with the ends of all logs.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.outcome import Outcome, judge
from tests.faults.rig import Rig
from tests.faults.roles import RUN_ID
from tests.faults.steady import RigPlan, expected
from treepo_async.cluster.verify_replay import stored_trees, verify_replay

MIN_RATE = 0.6
RECOVERY_S = 60.0
SHARES = {"replay": 3, "actor": 6, "rank": 2, "learner": 1}
"""How often each kind of process is killed, relative to the others."""


@dataclass
class Soak:
    """What happened in one."""

    outcome: Outcome | None = None
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from each kill to the first progress after it, by kind of role."""
    seconds: float = 0.0
    rate: float = 0.0
    """Trees trained a second, each once."""
    twin_rate: float = 0.0
    failures: list[str] = field(default_factory=list)
    """Lines of `cluster.verify` that do not hold."""

    @property
    def num_kills(self) -> int:
        """Of all roles."""
        return sum(map(len, self.recoveries.values()))

    @property
    def holds(self) -> bool:
        """Whether the soak is passed."""
        assert self.outcome is not None, "it has ended"
        return (
            self.outcome.is_whole and not self.failures and self.rate >= MIN_RATE * self.twin_rate
        )

    def __str__(self) -> str:
        found = self.outcome
        assert found is not None, "it has ended"
        again = found.num_updates - found.num_steps
        lines = [
            f"kills       {self.num_kills} in {self.seconds:.0f} s, all recovered",
            f"trees       {found.num_acks} acknowledged, {len(found.lost)} lost",
            f"steps       {found.num_steps}, {again} done again, {len(found.twice)} faults of order, "
            f"{len(found.other)} with another result",
            f"rate        {self.rate:.2f} trees/s, {self.rate / (self.twin_rate or 1):.0%} of "
            f"{self.twin_rate:.2f} without faults",
        ]
        lines += [_row(kind, times) for kind, times in sorted(self.recoveries.items())]
        lines += [f"FAILED      {text}" for text in self.failures]
        lines += [f"LOST        {text}" for text in found.lost[:5]]
        lines += [f"ORDER       {text}" for text in found.twice[:5]]
        lines += [f"OTHER       {text}" for text in found.other[:5]]
        return "\n".join(lines)


def soak(
    folder: Path,
    plan: RigPlan,
    *,
    kills: int,
    seed: int,
    mean_s: float,
    twin_s: float,
    say: Callable[[str], None] = lambda _: None,
) -> Soak:
    """Kill parts of a run of the plan, and see what it came to."""
    found = Soak()
    if twin_s:
        found.twin_rate = _undisturbed_rate(folder / "twin", plan, twin_s)
        say(f"without faults: {found.twin_rate:.2f} trees/s")
    rng = random.Random(seed)
    with Rig(folder / "run", plan) as rig:
        _wait_for_start(rig)
        begin, first = time.monotonic(), rig.progress().steps
        for number in range(kills):
            role = _choose(rng, plan)
            recovery_s = kill_and_recover(rig, role)
            found.recoveries.setdefault(role.partition("-")[0], []).append(recovery_s)
            if (number + 1) % 20 == 0:
                say(f"{number + 1} kills, {rig.progress()}, the last recovery {recovery_s:.2f} s")
            time.sleep(rng.expovariate(1 / mean_s) if mean_s else 0)
        found.seconds = time.monotonic() - begin
        found.rate = (rig.progress().steps - first) * plan.prompts_per_batch / found.seconds
    found.outcome = outcome_of(rig)
    found.failures = failures_of(rig)
    return found


def kill_and_recover(rig: Rig, role: str) -> float:
    """Kill a role, and wait until it and the whole run have got on. Gives the seconds."""
    since, begin = rig.progress(), time.monotonic()
    own = f"acks-{role}.jsonl"
    num_own = len(rig.rows(own))
    rig.kill(role)
    rig.wait_for_progress(since, timeout_s=RECOVERY_S)
    if role.startswith("actor"):
        rig.wait_until(lambda: len(rig.rows(own)) > num_own, f"{role} to get on", timeout_s=60)
    return time.monotonic() - begin


def outcome_of(rig: Rig) -> Outcome:
    """What a run that has ended came to."""
    return judge(
        rig.acks(),
        rig.rows("trained.jsonl"),
        stored=stored_trees(rig.folder / "replay"),
        expected=expected(rig.plan),
    )


def failures_of(rig: Rig) -> list[str]:
    """Lines of the invariants that do not hold of a run that has ended."""
    verdicts = verify_replay(rig.folder / "replay", max_staleness=rig.plan.max_staleness)
    return [verdict.line() for verdict in verdicts if not verdict.holds]


def _undisturbed_rate(folder: Path, plan: RigPlan, seconds: float) -> float:
    with Rig(folder, plan) as rig:
        _wait_for_start(rig)
        begin, first = time.monotonic(), rig.progress().steps
        time.sleep(seconds)
        num_steps, took = rig.progress().steps - first, time.monotonic() - begin
    return num_steps * plan.prompts_per_batch / took


def _wait_for_start(rig: Rig) -> None:
    rig.wait_until(lambda: rig.progress().steps >= 2, "two steps", timeout_s=60)


def _choose(rng: random.Random, plan: RigPlan) -> str:
    (kind,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
    return f"actor-{rng.randrange(plan.num_actors)}" if kind == "actor" else kind


def _row(kind: str, times: Sequence[float]) -> str:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return (
        f"{kind:<11} {len(times)} kills; recovery median {statistics.median(ordered):.2f} s, "
        f"p99 {p99:.2f} s, max {ordered[-1]:.2f} s"
    )


def main(words: Sequence[str]) -> int:
    """Run a soak as the words say. Gives the exit code."""
    settings = {"kills": "500", "seed": "0", "mean_s": "2", "twin_s": "60", "out": ""}
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) < len(words) or given.keys() - settings.keys():
        _say(str(__doc__))
        return 2
    settings |= given
    folder = Path(settings["out"] or tempfile.mkdtemp(prefix="soak-"))
    found = soak(
        folder,
        RigPlan(seed=int(settings["seed"])),
        kills=int(settings["kills"]),
        seed=int(settings["seed"]),
        mean_s=float(settings["mean_s"]),
        twin_s=float(settings["twin_s"]),
        say=_say,
    )
    verdict = "passed" if found.holds else "FAILED"
    _say(f"\nsoak of {RUN_ID}, seed {settings['seed']}: {verdict}\n{found}\nfolder      {folder}")
    return 0 if found.holds else 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
