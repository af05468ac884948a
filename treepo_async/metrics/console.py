"""One readable line per step and per event, for a person and for a log file alike."""

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def step_line(record: Record, num_steps: int) -> str:
    """A step in one line: what was learned, how stale it was, what it cost, who waited."""
    width = len(str(num_steps))
    return "  ".join(
        [
            f"step {record['step']:>{width}}/{num_steps}",
            f"reward {_number(record['reward/mean'], '+.3f')}",
            f"acc {_number(record['accuracy/train'], '.2f')} (all {_number(record['accuracy/sampled'], '.2f')})",
            _staleness(record),
            f"tokens {record['tokens/decoded']}/{record['tokens/delivered']}"
            f" = {_number(record['tokens/decoded_per_delivered'], '.2f')}",
            f"idle learner {_number(record['idle/learner'], '.0%')} engine {_number(record['idle/engine'], '.0%')}",
            f"gap {_number(_larger(record['gap/probe_max'], record['gap/sampled_max']), '.0e')}",
            f"pause {_number(record['weights/pause_s'], '.2f')} s",
            f"{_number(record['time/wall_s'], '.1f')} s",
        ]
    )


def eval_line(event: Record) -> str:
    """An evaluation in one line; `pass@k` where there is more than one sample of a problem."""
    best = f"pass@{event['num_samples']} {event['pass_at_k']:.3f}  " if "pass_at_k" in event else ""
    return (
        f"eval policy {event['version']}  sampled {event['sampled_accuracy']:.3f}  {best}"
        f"greedy {event['greedy_accuracy']:.3f}  on {event['num_problems']} held-out problems  {event['seconds']:.1f} s"
    )


def alarm_line(role: str, event: Record) -> str:
    """An alarm in one line."""
    details = {k: v for k, v in event.items() if k not in ("event", "alarm")}
    texts = (f"{key}={next(iter(str(value).splitlines()), '')}" for key, value in details.items())
    return "  ".join([f"ALARM {role}: {event['alarm']}", *texts])


def _staleness(record: Record) -> str:
    if record["staleness/max"] is None:
        return "offline"
    return f"stale {_number(record['staleness/mean'], '.2f')} max {record['staleness/max']}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _larger(a: float | None, b: float | None) -> float | None:
    known = [value for value in (a, b) if value is not None]
    return max(known, default=None)
