"""`bench.py guard [only=NAME,NAME] [update=RUNS]`: whether a part has become slower, told by ratios alone.

    check (`guard_checks`) -> ratio -> against `baselines.json` -> verdict; any `slower` is a failure

Ratios are of two things measured one after the other on one machine, and larger is better in every one. A baseline is the median of
several runs with a band below it: three times their spread, at least `LEAST_BAND` of the value, nothing for what is simulated. A ratio below
the band is measured once more, and the better one counts: what disturbs a measurement makes it worse. `update` rewrites
the baselines of the checks that are picked. Waits: as the checks do, for commands that have deadlines.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treepo_async.bench import machine
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError, DataError, TreepoError

BASELINES = Path(__file__).with_name("baselines.json")
EXAMPLES = {"only": "sim,codec", "update": "3"}
LEAST_BAND = 0.1
SPREADS = 3
LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class Check:
    """A ratio that can be measured."""

    name: str
    what: str
    """The ratio, in words."""
    command: str
    """By which a person measures it."""
    measure: Callable[[], float]
    is_exact: bool = False
    """Whether it comes out the same on every machine."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a ratio was."""

    value: float
    band: float
    """By which it may be lower."""
    runs: tuple[float, ...]
    command: str
    machine: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A ratio next to its baseline."""

    check: Check
    value: float
    baseline: Baseline | None

    @property
    def verdict(self) -> str:
        """`ok`, `slower`, `faster` (above the band: the baseline may be raised) or `no baseline`."""
        if self.baseline is None:
            return "no baseline"
        low, high = (self.baseline.value + sign * self.baseline.band for sign in (-1, 1))
        # what is exact is so up to the digits of a file
        slack = 1e-9 * self.baseline.value
        if self.value < low - slack:
            return "slower"
        return "faster" if self.value > high + slack else "ok"


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """What is asked for."""

    only: tuple[str, ...]
    """Names of checks; empty: all."""
    update: int
    """Runs of which new baselines are made; 0: compare."""


def parse(words: Sequence[str]) -> GuardOptions:
    """Read `key=value` words.

    Raises:
        ConfigError: an unknown key, or too few runs.
    """
    values = read_words(words, EXAMPLES)
    update = values.get("update", "0")
    if not update.isdecimal() or 0 < int(update) < LEAST_RUNS:
        raise ConfigError(f"update={update} must be a number of runs, at least {LEAST_RUNS}")
    only = tuple(values["only"].split(",")) if "only" in values else ()
    return GuardOptions(only, int(update))


def guard(
    checks: Sequence[Check],
    options: GuardOptions,
    say: Callable[[str], None],
    file: Path = BASELINES,
) -> None:
    """Compare, or make baselines, and say the table.

    Raises:
        ConfigError: a name in `only` is no check.
        TreepoError: a ratio is lower than its band allows, or has no baseline.
    """
    picked = _picked(checks, options.only)
    if options.update:
        update(picked, options.update, say, file)
        return
    baselines = read_baselines(file)
    findings = [compared(check, baselines.get(check.name), say) for check in picked]
    say(table(findings, _machine()))
    bad = [f.check.name for f in findings if f.verdict in ("slower", "no baseline")]
    if bad:
        raise TreepoError(f"{', '.join(bad)}: slower than the baseline allows, or without one")


def compared(check: Check, baseline: Baseline | None, say: Callable[[str], None]) -> Finding:
    """Measure, and once more where that is too low."""
    finding = Finding(check, check.measure(), baseline)
    if finding.verdict == "slower" and not check.is_exact:
        say(f"{check.name}: {finding.value:.3f} is low, once more")
        finding = Finding(check, max(finding.value, check.measure()), baseline)
    say(f"{check.name}: {finding.value:.3f} {finding.verdict}")
    return finding


def update(checks: Sequence[Check], runs: int, say: Callable[[str], None], file: Path) -> None:
    """Measure all checks in turn, several times, and write their baselines; those of others stay.

    In turn, so that checks that read one command share its runs, and a disturbed minute is in one run of each.
    """
    found: dict[str, list[float]] = {check.name: [] for check in checks}
    for number in range(runs):
        for check in checks:
            if number == 0 or not check.is_exact:
                found[check.name].append(check.measure())
                say(f"{check.name}: {found[check.name][-1]:.3f}, run {number + 1} of {runs}")
    made = {check.name: baseline_of(check, found[check.name]) for check in checks}
    baselines = {**read_baselines(file), **made}
    text = {name: asdict(baselines[name]) for name in sorted(baselines)}
    file.write_text(json.dumps(text, indent=1) + "\n")


def baseline_of(check: Check, values: Sequence[float]) -> Baseline:
    """From ratios of several runs."""
    value = statistics.median(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    band = 0.0 if check.is_exact else max(SPREADS * spread, LEAST_BAND * value)
    return Baseline(value, band, tuple(values), check.command, _machine())


def read_baselines(file: Path) -> Mapping[str, Baseline]:
    """By name of the check; none when there is no file.

    Raises:
        DataError: the file is none that `update` wrote.
    """
    if not file.is_file():
        return {}
    try:
        found: dict[str, dict[str, Any]] = json.loads(file.read_text())
        return {
            name: Baseline(**values | {"runs": tuple(values["runs"])})
            for name, values in found.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file} has no baselines ({error!r}); write it with guard update=3"
        ) from error


def table(findings: Sequence[Finding], here: str) -> str:
    """One row a check, and which baselines are of another machine than the one here."""
    lines = [
        "| check | ratio | value | baseline | band | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for finding in findings:
        base = finding.baseline
        figures = ("", "") if base is None else (f"{base.value:.3f}", f"-{base.band:.3f}")
        lines.append(
            f"| {finding.check.name} | {finding.check.what} | {finding.value:.3f} | {figures[0]} | {figures[1]} | "
            f"{finding.verdict} |"
        )
    return "\n".join([*lines, *_of_others(findings, here)]) + "\n"


def _of_others(findings: Sequence[Finding], here: str) -> list[str]:
    """What is exact is the same everywhere."""
    names: dict[str, list[str]] = {}
    for finding in findings:
        base = finding.baseline
        if base is not None and base.machine != here and not finding.check.is_exact:
            names.setdefault(base.machine, []).append(finding.check.name)
    return [
        f"\nThis machine is {here}. The baselines of {', '.join(checks)} are of another: {there}. "
        "Their verdicts hold only as far as the two are alike; update=3 makes baselines here."
        for there, checks in names.items()
    ]


def _picked(checks: Sequence[Check], names: Sequence[str]) -> list[Check]:
    known = {check.name: check for check in checks}
    for name in names:
        if name not in known:
            raise ConfigError(f"only={name} is no check; they are {', '.join(known)}")
    return [known[name] for name in names] if names else list(checks)


def _machine() -> str:
    about = machine.describe()
    return f"{about['cores']} cores, {about['cpu']}"
