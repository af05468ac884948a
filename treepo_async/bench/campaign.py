"""Everything that only a GPU can show, part by part: `bash launch/gpu_campaign.sh [--cpu] [PART ...]`.

A part is a command with a deadline, run in a process of its own, with its output in `NAME.log`. A part whose packages are not installed is skipped and says
which; one that passed with the same command, code and device is kept, so a campaign that was stopped goes on. One that fails stops no other.
`campaign.json` and `campaign.md` in the folder `OUT` are written anew after each part. Exit codes: 0 nothing failed, 1 a part did, 2 wrong words, or no CUDA and no
`--cpu`. Neighbours: `campaign_parts` has the parts, `campaign_report` writes. Waits for each part, `Part.limit_s`.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo_async.bench import campaign_report as report
from treepo_async.bench import machine
from treepo_async.bench.campaign_parts import FAILED, PASSED, SKIPPED, Part, Result, parts_of
from treepo_async.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXIT_FAILED, EXIT_BAD_USE = 1, 2
STATE = "campaign.json"


def main(words: Sequence[str]) -> int:
    """Run the parts that are named, or all. Gives the exit code."""
    on_cpu = "--cpu" in words
    out = Path(os.environ.get("OUT", "gpu_campaign"))
    try:
        parts = chosen([word for word in words if word != "--cpu"], on_cpu=on_cpu, out=out)
        device = _device(on_cpu)
    except ConfigError as error:
        sys.stderr.write(f"gpu_campaign: {error}\n")
        return EXIT_BAD_USE
    out.mkdir(parents=True, exist_ok=True)
    results = run(parts, out, device, _say)
    _say("")
    _say(report.summary(results))
    return EXIT_FAILED if any(result.outcome == FAILED for result in results) else 0


def chosen(names: Sequence[str], *, on_cpu: bool, out: Path) -> list[Part]:
    """The parts of these names, in the campaign's order; without names all. The name of a group, what stands before a `-`, means all of it.

    Raises:
        ConfigError: there is no such part.
    """
    parts = parts_of(on_cpu=on_cpu, out=out)
    known = {word for part in parts for word in (part.name, part.group)}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{name} is no part; the parts are {', '.join(part.name for part in parts)}, and --cpu rehearses"
            )
    return [part for part in parts if not names or {part.name, part.group} & set(names)]


def run(
    parts: Sequence[Part], out: Path, device: Mapping[str, str], say: Callable[[str], None]
) -> list[Result]:
    """Run what is missing. Gives all results of these parts.

    Args:
        parts: from `chosen`.
        out: an existing folder.
        device: what is measured, see `_device`.
        say: prints a line.
    """
    origin = {"code": machine.code_digest(), "device": device["device"]}
    before = _results(out / STATE)
    found: dict[str, Result] = {}
    for part in parts:
        earlier = before.get(part.name)
        say(f"== {part.name}: {part.line}")
        if earlier is not None and earlier.stands_for(part, origin):
            found[part.name] = earlier.kept()
        elif absent := _absent(part):
            reason = f"not installed: {', '.join(absent)}"
            found[part.name] = Result(part.name, part.line, SKIPPED, 0.0, reason, origin)
        else:
            found[part.name] = _run(part, out, origin)
        result = found[part.name]
        say(f"== {part.name} {result.outcome} in {result.seconds:.0f} s {result.reason}".rstrip())
        before |= found
        _write(out, device, list(before.values()))
    return [found[part.name] for part in parts]


def _run(part: Part, out: Path, origin: Mapping[str, str]) -> Result:
    """One part, to its end or its deadline; its output goes to a file, and here too when it fails."""
    began, log = time.monotonic(), out / f"{part.name}.log"
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                part.command,
                cwd=ROOT,
                env=os.environ | part.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=part.limit_s,
                check=False,
            ).returncode
            reason = "" if code == 0 else f"exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {part.limit_s:.0f} s, see {log.name}"
    if reason:
        sys.stdout.write(_end(log.read_text(errors="replace")))
    outcome = FAILED if reason else PASSED
    return Result(part.name, part.line, outcome, time.monotonic() - began, reason, dict(origin))


def _absent(part: Part) -> list[str]:
    return [name for name in part.needs if importlib.util.find_spec(name) is None]


def _end(text: str, characters: int = 2000) -> str:
    return text[-characters:].rstrip() + "\n"


def _results(file: Path) -> dict[str, Result]:
    if not file.exists():
        return {}
    found = json.loads(file.read_text())["parts"]
    return {row["name"]: Result(**row) for row in found}


def _write(out: Path, device: Mapping[str, str], results: Sequence[Result]) -> None:
    state: dict[str, Any] = {
        "environment": {**machine.describe(), **device},
        "parts": [result.to_row() for result in results],
    }
    (out / STATE).write_text(json.dumps(state, indent=2) + "\n")
    (out / "campaign.md").write_text(report.page(state["environment"], results, out))


def _device(on_cpu: bool) -> dict[str, str]:
    """What is measured on.

    Raises:
        ConfigError: CUDA is wanted and not there.
    """
    if on_cpu:
        return {"device": "cpu"}
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"{sys.executable} sees no CUDA device; bash launch/gpu_campaign.sh --cpu rehearses without one"
        )
    return {
        "device": torch.cuda.get_device_name(),
        "devices": str(torch.cuda.device_count()),
        "device_gib": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}",
        "driver": _driver(),
    }


def _driver() -> str:
    """Its version; nothing where the driver's own tool is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0].strip()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
