"""What staleness costs in learning: runs of a grid of `replay.max_staleness` and `learner.correction`, over seeds.

    folders of runs -> StaleRun (`staleness_runs`) -> one row a combination -> staleness.csv, staleness.md, staleness.png

A combination has a row also where its runs failed: how many ended is a column. Spreads are sample standard deviations over the runs
that ended. Imports matplotlib only to draw.
"""

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from treepo_async.bench.staleness_runs import Point, StaleRun, read_run
from treepo_async.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b6ca8", "#3c8d53", "#c8553d", "#7d5ba6", "#b08900", "#555555")
NAMES = {"none": "none", "truncated": "TIS", "importance": "importance (decoupled PPO)"}
OUT = Path("runs/bench-staleness")
SHOWN_LAGS = ("1", "2", "4", "7", "8+")
"""In the table."""
Combination = tuple[int, str]
"""`replay.max_staleness` and `learner.correction`."""


@dataclass(frozen=True, slots=True)
class Row:
    """A combination. Means and spreads are of the runs that ended; None where there are none (or for a spread, one)."""

    max_staleness: int
    correction: str
    ended: int
    runs: int
    accuracy: float | None
    """Sampled, on held-out problems, at the end."""
    accuracy_sd: float | None
    halfway: float | None
    """The same in the middle of the run."""
    greedy: float | None
    reward: float | None
    """Of the last quarter of the steps."""
    reward_sd: float | None
    staleness_mean: float | None
    """Over trained tokens."""
    staleness_max: int | None
    ess: Mapping[str, float]
    """By lag, over all runs, weighted with tokens."""
    step_s: float | None
    """Median over the steps, then over the runs."""


def parse(words: Sequence[str]) -> tuple[list[Path], Path]:
    """Read folders of runs, folders of such folders, and `out=DIR`.

    Raises:
        ConfigError: no folder of a run is among them.
    """
    out = OUT
    found = list[Path]()
    for word in words:
        if word.startswith("out="):
            out = Path(word.removeprefix("out="))
        elif (Path(word) / "config.yaml").is_file():
            found.append(Path(word))
        else:
            found += sorted(file.parent for file in Path(word).glob("*/config.yaml"))
    if not found:
        raise ConfigError(
            f"{' '.join(words) or 'nothing'}: no folder of a run is there (one has config.yaml)"
        )
    return found, out


def write(folders: Iterable[Path], out: Path) -> str:
    """Write table, points and picture. Gives the table.

    Raises:
        DataError: a folder is none of a run, the runs are not of one grid, or none has an evaluation.
    """
    runs = [read_run(folder) for folder in folders]
    check_one_grid(runs)
    if not any(run.points for run in runs):
        raise DataError("no run has an evaluation; run them with eval.every above 0")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "staleness.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        names = (field.name for field in fields(Point))
        rows.writerow(["run", "max_staleness", "correction", "seed", "has_ended", *names])
        for run in runs:
            first = (run.name, run.max_staleness, run.correction, run.seed, run.has_ended)
            rows.writerows((*first, *astuple(point)) for point in run.points)
    text = table([row_of(key, own) for key, own in combined(runs).items()])
    (out / "staleness.md").write_text(text)
    draw(out / "staleness.png", runs)
    return text


def check_one_grid(runs: Sequence[StaleRun]) -> None:
    """Runs are compared, and seeds of a combination averaged, only where all else is alike.

    Raises:
        DataError: two runs differ in another key than those of the grid, or are of one combination and seed.
    """
    first, *others = runs
    for run in others:
        for key in sorted(first.setup.keys() | run.setup.keys()):
            values = [of.setup.get(key, "absent") for of in (first, run)]
            if values[0] != values[1]:
                raise DataError(
                    f"{first.name} and {run.name} differ in {key} ({values[0]} and {values[1]}), so they are not of one grid; "
                    "give folders of runs that differ in seed, replay.max_staleness and learner.correction alone"
                )
    seen = dict[tuple[int, str, int], str]()
    for run in runs:
        place = run.max_staleness, run.correction, run.seed
        if place in seen:
            raise DataError(
                f"{seen[place]} and {run.name} both have replay.max_staleness={run.max_staleness} "
                f"learner.correction={run.correction} seed={run.seed}; give one of them"
            )
        seen[place] = run.name


def combined(runs: Iterable[StaleRun]) -> dict[Combination, list[StaleRun]]:
    """The runs of each combination, in order of staleness and of the corrections' names."""
    order = list(NAMES)
    by_key: dict[Combination, list[StaleRun]] = {}
    for run in runs:
        by_key.setdefault((run.max_staleness, run.correction), []).append(run)

    def place(key: Combination) -> tuple[int, int, str]:
        return key[0], order.index(key[1]) if key[1] in order else len(order), key[1]

    return {key: by_key[key] for key in sorted(by_key, key=place)}


def row_of(key: Combination, runs: Sequence[StaleRun]) -> Row:
    """Sum up a combination."""
    ended = [run for run in runs if run.has_ended and run.points]
    finals = [run.points[-1].sampled_accuracy for run in ended]
    rewards = [run.reward for run in ended if run.reward is not None]
    lags = [run.staleness_mean for run in ended if run.staleness_mean is not None]
    return Row(
        *key,
        ended=len(ended),
        runs=len(runs),
        accuracy=_mean(finals),
        accuracy_sd=_spread(finals),
        halfway=_mean([run.points[len(run.points) // 2].sampled_accuracy for run in ended]),
        greedy=_mean([run.points[-1].greedy_accuracy for run in ended]),
        reward=_mean(rewards),
        reward_sd=_spread(rewards),
        staleness_mean=_mean(lags),
        staleness_max=max((run.staleness_max for run in ended), default=None),
        ess=_ess(ended),
        step_s=statistics.median([run.step_s for run in ended]) if ended else None,
    )


def table(rows: Sequence[Row]) -> str:
    """One row a combination."""
    lags = [lag for lag in SHOWN_LAGS if any(lag in row.ess for row in rows)]
    heads = [
        "max_staleness",
        "correction",
        "ended",
        "accuracy at the end",
        "halfway",
        "greedy",
        "reward, last quarter",
        "staleness, mean (max)",
        *(f"ESS at lag {lag}" for lag in lags),
        "s a step",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            f"{row.max_staleness}",
            NAMES.get(row.correction, row.correction),
            f"{row.ended} of {row.runs}",
            _figure(row.accuracy, row.accuracy_sd),
            _figure(row.halfway),
            _figure(row.greedy),
            _figure(row.reward, row.reward_sd),
            f"{_figure(row.staleness_mean, digits=2)} ({row.staleness_max})" if row.ended else "",
            *(_figure(row.ess.get(lag), digits=4) for lag in lags),
            _figure(row.step_s, digits=2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(file: Path, runs: Sequence[StaleRun]) -> None:
    """Draw accuracy over trained tokens and over time: a row a correction, a colour a bound, a band of one deviation."""
    from matplotlib.figure import Figure

    groups = {key: [run for run in own if run.has_ended] for key, own in combined(runs).items()}
    corrections = list(dict.fromkeys(correction for _, correction in groups))
    bounds = sorted({bound for bound, _ in groups})
    colours = dict(zip(bounds, COLOURS * len(bounds), strict=False))
    figure = Figure(figsize=(11, 3.4 * len(corrections)), dpi=120, layout="constrained")
    panels = figure.subplots(len(corrections), 2, sharey=True, sharex="col", squeeze=False)
    for correction, (by_tokens, by_time) in zip(corrections, panels, strict=True):
        for bound in bounds:
            own = groups.get((bound, correction), [])
            look = (colours[bound], f"max_staleness={bound} ({len(own)} runs)")
            _draw_mean(by_tokens, own, lambda point: point.trained_tokens / 1000, *look)
            _draw_mean(by_time, own, lambda point: point.seconds, *look)
        by_tokens.set_ylabel("sampled accuracy, held out")
        by_tokens.set_title(f"correction: {NAMES.get(correction, correction)}", fontsize=10)
        by_tokens.legend(fontsize=8, loc="lower right")
    panels[-1][0].set_xlabel("trained tokens (thousands, each once for every leaf)")
    panels[-1][1].set_xlabel("seconds from the first evaluation")
    figure.savefig(file)


def _draw_mean(
    axes: "Axes",
    runs: Sequence[StaleRun],
    at: Callable[[Point], float],
    colour: str,
    label: str,
) -> None:
    axes.grid(alpha=0.25)
    columns = list(zip(*(run.points for run in runs), strict=False))
    if not columns:
        return
    places = [statistics.mean(map(at, points)) for points in columns]
    heights = [[point.sampled_accuracy for point in points] for points in columns]
    means = [statistics.mean(values) for values in heights]
    spreads = [_spread(values) or 0.0 for values in heights]
    axes.plot(places, means, color=colour, marker="o", markersize=3, label=label)
    lows = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    highs = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(places, lows, highs, color=colour, alpha=0.12, linewidth=0)


def _ess(runs: Sequence[StaleRun]) -> dict[str, float]:
    tokens: dict[str, float] = {}
    weighted: dict[str, float] = {}
    for run in runs:
        for lag, (number, ess) in run.ess.items():
            tokens[lag] = tokens.get(lag, 0) + number
            weighted[lag] = weighted.get(lag, 0) + number * ess
    return {lag: weighted[lag] / number for lag, number in tokens.items() if number}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _figure(value: float | None, spread: float | None = None, digits: int = 3) -> str:
    if value is None:
        return ""
    after = "" if spread is None else f" ± {spread:.{digits}f}"
    return f"{value:.{digits}f}{after}"
