"""Named places at which a test may break a process: a call that does nothing, unless a plan says otherwise.

    chaos.point("learner.after_journal")

A plan is a JSON file named by `TREEPO_CHAOS`; without it `point` is an empty function. It maps names of points to rules:

    {"log": "/run/chaos.log", "points": {"replay.after_sync": {"act": "kill", "hit": 3}}}

`hit` is the call, counted from 1 in each process, at which the point acts; `times` (1) how often it acts in the whole test,
over all processes, as counted in the log; `role` limits it to the processes whose `TREEPO_ROLE` begins so. Every injection
is in the log before it acts, one line `<point> <act> <pid>`.

    kill      SIGKILL to this very process
    stop      SIGSTOP to it; whoever wrote the plan lets it go on
    sleep     for `seconds`
    enospc    raises OSError(ENOSPC); eio likewise
    short     is for the caller to do: `point` gives the word back, and the caller writes a part of what it should
"""

import errno
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

PLAN_VARIABLE = "TREEPO_CHAOS"
ROLE_VARIABLE = "TREEPO_ROLE"


class Plan:
    """The rules of a plan file, for this process."""

    def __init__(self, file: Path, role: str) -> None:
        plan = json.loads(file.read_text())
        self._log = Path(plan["log"])
        self._rules: dict[str, dict[str, Any]] = {
            name: rule
            for name, rule in plan["points"].items()
            if role.startswith(rule.get("role", ""))
        }
        self._hits: Counter[str] = Counter()

    def reach(self, name: str) -> str | None:
        """A point is reached: act if its rule says so now."""
        rule = self._rules.get(name)
        if rule is None:
            return None
        self._hits[name] += 1
        if self._hits[name] < rule.get("hit", 1) or self._num_done(name) >= rule.get("times", 1):
            return None
        return self._act(name, rule)

    def _num_done(self, name: str) -> int:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return sum(line.split(" ", 1)[0] == name for line in lines)

    def _act(self, name: str, rule: dict[str, Any]) -> str | None:
        act = str(rule["act"])
        with self._log.open("a") as log:
            log.write(f"{name} {act} {os.getpid()}\n")
            log.flush()
            os.fsync(log.fileno())
        match act:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "sleep":
                time.sleep(rule["seconds"])
            case "enospc" | "eio":
                number = errno.ENOSPC if act == "enospc" else errno.EIO
                raise OSError(number, os.strerror(number), f"injected at {name}")
            case "short":
                return act
        return None


def _no_point(_: str) -> str | None:
    return None


_file = os.environ.get(PLAN_VARIABLE)
point = Plan(Path(_file), os.environ.get(ROLE_VARIABLE, "")).reach if _file else _no_point
"""See the module."""
