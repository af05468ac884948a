"""Learning curves of runs side by side: held-out accuracy over decoded tokens and over updates.

Reads the `metrics.jsonl` of runs that are given by arm, writes `curves.csv`, `table.md` and `plot.png`. A point is an
evaluation; its tokens are all that the engine had decoded for trees until then, those of dropped trees too. Imports
matplotlib only to draw.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from treepo_async.errors import ConfigError, DataError

COLOURS = ("#1b6ca8", "#c8553d", "#3c8d53", "#7d5ba6")
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation of one run."""

    arm: str
    run: str
    step: int
    decoded_tokens: int
    sampled_accuracy: float
    pass_at_k: float | None
    greedy_accuracy: float


def parse(words: Sequence[str]) -> tuple[dict[str, list[Path]], Path]:
    """Read `ARM=RUN,RUN...` words, and `out=DIR`.

    Raises:
        ConfigError: a word of another form, or no arm.
    """
    arms: dict[str, list[Path]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{word!r} is not ARM=RUN,RUN..., e.g. tree=runs/a,runs/b")
        arms[name] = [Path(part) for part in value.split(",")]
    (out, *more) = arms.pop("out", [Path("runs/bench-curves")])
    if more:
        raise ConfigError(f"out={out},... names more than one folder")
    if not arms:
        raise ConfigError("no arm is given, e.g. tree=runs/a,runs/b flat=runs/c,runs/d")
    return arms, out


def points_of(arm: str, run: Path) -> list[Point]:
    """The evaluations of a run, in order.

    Raises:
        DataError: it has no metrics, or no evaluation.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise DataError(f"{arm}={run}: {file} is not there; give the folder of a run")
    decoded, points = 0, list[Point]()
    for record in map(json.loads, file.read_text().splitlines()):
        decoded += record.get("tokens/decoded", 0)
        if "eval/sampled_accuracy" in record:
            points.append(_point(arm, run, decoded, record))
    if not points:
        raise DataError(f"{arm}={run}: no evaluation in {file}; run with eval.every above 0")
    return points


def _point(arm: str, run: Path, decoded: int, record: Mapping[str, Any]) -> Point:
    return Point(
        arm,
        run.name,
        record["step"],
        decoded,
        record["eval/sampled_accuracy"],
        record.get("eval/pass_at_k"),
        record["eval/greedy_accuracy"],
    )


def write(arms: Mapping[str, Sequence[Path]], out: Path) -> str:
    """Write the three files. Gives the table."""
    curves = [points_of(arm, run) for arm, runs in arms.items() for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Point))
        rows.writerows(astuple(point) for curve in curves for point in curve)
    text = table(curves)
    (out / "table.md").write_text(text)
    draw(out / "plot.png", curves)
    return text


def table(curves: Sequence[Sequence[Point]]) -> str:
    """One row a run: sampled accuracy by step, and what the last one cost."""
    steps = sorted({point.step for curve in curves for point in curve})
    lines = [
        "| arm | run | " + " | ".join(map(str, steps)) + " | pass@k | greedy | decoded tokens |",
        "|---" * (len(steps) + 5) + "|",
    ]
    for curve in curves:
        by_step = {point.step: point for point in curve}
        cells = [f"{by_step[s].sampled_accuracy:.3f}" if s in by_step else "" for s in steps]
        last = curve[-1]
        best = "" if last.pass_at_k is None else f"{last.pass_at_k:.2f}"
        cells += [best, f"{last.greedy_accuracy:.2f}", f"{last.decoded_tokens:,}"]
        lines.append(f"| {last.arm} | {last.run} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(file: Path, curves: Sequence[Sequence[Point]]) -> None:
    """Draw sampled accuracy over decoded tokens and over updates, a colour an arm, a style a run."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(curve[0].arm for curve in curves))
    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    by_tokens, by_step = figure.subplots(1, 2, sharey=True)
    for arm, colour in zip(arms, COLOURS * len(arms), strict=False):
        own = [curve for curve in curves if curve[0].arm == arm]
        for curve, style in zip(own, STYLES * len(own), strict=False):
            heights = [point.sampled_accuracy for point in curve]
            look = {"linestyle": style, "color": colour, "marker": "o", "markersize": 3}
            label = f"{arm}: {curve[0].run}"
            by_tokens.plot([p.decoded_tokens / 1000 for p in curve], heights, label=label, **look)
            by_step.plot([point.step for point in curve], heights, label=label, **look)
    by_tokens.set_xlabel("decoded tokens (thousands)")
    by_step.set_xlabel("updates")
    by_tokens.set_ylabel("sampled accuracy, held out")
    for axes in (by_tokens, by_step):
        axes.grid(alpha=0.25)
    by_step.legend(fontsize=8)
    figure.savefig(file)
