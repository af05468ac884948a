"""Check tree attention on this machine: `python -m treepo_async.bench.attention exactness|memory [key=value ...]`.

`exactness`: output and gradients of a backend against dense attention in float64, in bfloat16 and float32, on forests with segments
from one token to 2048 and lengths that are no multiple of a tile. `memory`: peak memory, time and FLOP/s over the
tokens of a microbatch; memory must grow with the tokens, not with their square.

Keys: `backend` (auto), `size` (full; `small` is for a CPU), `dtype` (all; of exactness), `out` (a folder: writes `attention_exactness.json` and
so on). Exit codes: 0, 1 a check failed, 2 wrong words. Needs torch and numpy alone; neighbour: `attention_checks`, and `campaign_parts` calls it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from treepo_async.bench.attention_checks import (
    Heads,
    describe,
    exactness,
    grows_linearly,
    memory,
)
from treepo_async.errors import ConfigError
from treepo_async.learner.attention.plan import alignment, planner

DEFAULTS = {"backend": "auto", "size": "full", "dtype": "all", "out": "gpu_campaign"}
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float32": (torch.float32,),
    "bfloat16": (torch.bfloat16,),
    "all": (torch.float32, torch.bfloat16),
}
Row = dict[str, Any]
PARTS = ("exactness", "memory")
EXIT_FAILED, EXIT_BAD_USE = 1, 2

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "heads": (Heads(14, 2, 64), Heads(8, 4, 128)),
        "tokens": (1, 127, 128, 1000, 3001),
        "segments": (1, 64, 2048),
        "memory": tuple(1024 * n for n in (4, 8, 16, 32, 64)),
        "smallest": 3840,
    },
    "small": {
        "heads": (Heads(4, 2, 16),),
        "tokens": (1, 127, 300),
        "segments": (1, 64),
        "memory": (1024, 2048, 4096),
        "smallest": 960,
    },
}
"""`full` has the heads of Qwen2.5-0.5B, and some of dimension 128. `smallest`: tokens from which growth is judged; below, what
does not depend on them is a large part."""


def main(words: Sequence[str]) -> int:
    """Run the check that is named first. Gives the exit code."""
    try:
        part, options = parse(words)
        passed = run(part, options)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_USE
    return 0 if passed else EXIT_FAILED


def parse(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The part, and the keys with their values.

    Raises:
        ConfigError: an unknown part, key or size.
    """
    part = words[0] if words else ""
    if part not in PARTS:
        raise ConfigError(f"{part!r} is no check; it is one of {', '.join(PARTS)}")
    given = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
    for key in given:
        if key not in DEFAULTS:
            raise ConfigError(f"{key} is an unknown key; the keys are {', '.join(DEFAULTS)}")
    options = DEFAULTS | given
    for key, known in (("size", SIZES), ("dtype", DTYPES)):
        if options[key] not in known:
            raise ConfigError(f"{key}={options[key]!r} is unknown; it is one of {', '.join(known)}")
    return part, options


def run(part: str, options: dict[str, str]) -> bool:
    """Run one check, write and print its rows; whether it passed."""
    backend, size = options["backend"], SIZES[options["size"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = describe(backend, device)
    _say(f"{part} of {about['backend']} on {about['device']}, torch {about['torch']}")
    if part == "exactness":
        passed, rows = _exactness(backend, device, size, DTYPES[options["dtype"]])
    else:
        passed, rows = _memory(backend, device, size)
    _say(f"{part}: {'passed' if passed else 'FAILED'}, {len(rows)} rows")
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    result = about | {"passed": passed, "rows": rows}
    of = "" if options["dtype"] == "all" else f"-{options['dtype']}"
    (out / f"attention_{part}{of}.json").write_text(json.dumps(result, indent=2) + "\n")
    return passed


def _exactness(
    backend: str, device: str, size: dict[str, Any], dtypes: Sequence[torch.dtype]
) -> tuple[bool, list[Row]]:
    rows = [
        _said(asdict(row))
        for heads in size["heads"]
        for dtype in dtypes
        for row in exactness(
            planner(backend),
            device=device,
            heads=heads,
            dtype=dtype,
            tokens=size["tokens"],
            segments=size["segments"],
        )
    ]
    return all(row["passed"] for row in rows), rows


def _memory(backend: str, device: str, size: dict[str, Any]) -> tuple[bool, list[Row]]:
    found = []
    for row in memory(
        planner(backend),
        align=alignment(backend),
        device=device,
        heads=size["heads"][0],
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        tokens=size["memory"],
    ):
        found.append(row)
        _said(asdict(row))
    return grows_linearly(found, size["smallest"]), [asdict(row) for row in found]


def _said(row: Row) -> Row:
    _say("  ".join(f"{key}={_short(value)}" for key, value in row.items()))
    return row


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
