"""The command of the README's first lines, exactly as it stands there. `python -m tests.e2e.headline` runs it and tells what it took."""

import json
import sys
import tempfile
from pathlib import Path

from tests.conftest import LaunchedRun

STEPS, NUM_ACTORS, NUM_RANKS = 2, 8, 8
WORDS = (f"actors={NUM_ACTORS}", "learner=tp4pp2", f"steps={STEPS}")
RUN_S, MOST_GIB = 300, 16


def steps_of(run):
    """The records of the steps, in order."""
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "reward/mean" in record]


def account_of(run):
    """What an ended run took, in words."""
    last = steps_of(run)[-1]
    leases = [last["leases_by_actor"].get(f"actor-{i}", 0) for i in range(NUM_ACTORS)]
    ranks = [last["pids"][f"learner-0/rank-{i}"] for i in range(NUM_RANKS)]
    actors = [last["pids"][f"actor-{i}"] for i in range(NUM_ACTORS)]
    return (
        f"python launch/run.py {' '.join(WORDS)}: {run.seconds:.0f} s, at most {run.memory.most_gib:.1f} GiB (PSS) "
        f"of {run.num_seen()} processes, leases by actor {leases}, pids of actors {actors}, of ranks {ranks}"
    )


def main():
    """Run it in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run = LaunchedRun(WORDS, Path(folder) / "run")
        run.watch_memory()
        try:
            code = run.wait(timeout_s=RUN_S)
            sys.stdout.write(f"{account_of(run) if code == 0 else run}\n")
        finally:
            run.clean_up()
    return code


if __name__ == "__main__":
    sys.exit(main())
