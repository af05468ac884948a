"""A campaign in words: the last lines of the console, and `campaign.md` with the tables of its parts. Neighbour: `campaign` calls it.

Tables come from the files of the parts: those in markdown as they are, those in JSON through the module that wrote them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treepo_async.bench.campaign_parts import FAILED, SKIPPED, Result
from treepo_async.bench.markdown import markdown

STAMP = (
    "date",
    "commit",
    "is_modified",
    "code",
    "device",
    "devices",
    "device_gib",
    "driver",
    "python",
    "torch",
    "megatron-core",
    "sglang",
    "cpu",
    "cores",
    "memory_gib",
)
"""What is said of the environment, in this order, where it is known."""


def summary(results: Sequence[Result]) -> str:
    """How many parts ended how, and by name those that did not run or failed."""
    counts = {
        outcome: [r for r in results if r.outcome == outcome]
        for outcome in dict.fromkeys(r.outcome for r in results)
    }
    lines = [", ".join(f"{len(found)} {outcome}" for outcome, found in counts.items())]
    for outcome in (SKIPPED, FAILED):
        lines += [f"{outcome}: {r.name}: {r.reason}" for r in counts.get(outcome, [])]
    return "\n".join(lines)


def page(environment: Mapping[str, Any], results: Sequence[Result], out: Path) -> str:
    """`campaign.md`.

    Args:
        environment: of this start.
        results: of all parts so far.
        out: the campaign's folder.
    """
    stamp = [(key, environment.get(key)) for key in STAMP]
    rows = [(r.name, r.outcome, f"{r.seconds:.0f}", r.reason, f"`{r.line}`") for r in results]
    parts = [
        "# GPU campaign",
        markdown(("", ""), [(key, value) for key, value in stamp if value not in (None, "")]),
        markdown(("part", "outcome", "seconds", "", "command"), rows),
    ]
    for file in sorted(out.glob("*/table.md")):
        parts += [f"## {file.parent.name}", file.read_text().strip()]
    for file in sorted(out.glob("*.json")):
        parts += _of_json(file)
    return "\n\n".join(parts) + "\n"


def _of_json(file: Path) -> list[str]:
    """The results of a part that wrote JSON; nothing of other files."""
    found = json.loads(file.read_text())
    title = f"## {file.stem}"
    if found.get("rows"):
        # of many rows of one kind the worst is what decides
        is_exactness = file.stem.startswith("attention_exactness")
        found_rows = _worst(found["rows"]) if is_exactness else found["rows"]
        columns = tuple(found_rows[0])
        cells = [[_short(row[key]) for key in columns] for row in found_rows]
        return [title, markdown(columns, cells)]
    if "stages" in found:
        size = found["bytes"]
        rows = [(k, f"{s:.4f}", f"{size / s / 1e9:.2f}") for k, s in found["stages"].items()]
        return [f"{title}: {size:,} bytes", markdown(("stage", "seconds", "GB/s"), rows)]
    if "by_kind" in found:
        wall = found["wall_s"]
        rows = [(k, f"{s:.4f}", f"{s / wall:.0%}") for k, s in found["by_kind"].items()]
        return [f"{title}: {found['cell']}", markdown(("kernels", "seconds", "of the pass"), rows)]
    return []


def _worst(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each precision, heads and quantity the row with the largest error."""
    kinds: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["dtype"], row["heads"], row["quantity"])
        if key not in kinds or row["error"] > kinds[key]["error"]:
            kinds[key] = row
    return list(kinds.values())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
