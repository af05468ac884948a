"""How a role tells the driver something: one JSON line on its standard output.

Only the driver writes files, so a role needs no shared disk; what is no event line is a role's own log.
"""

import json
import math
import sys
from typing import Any

_MARK = '{"event":'


def emit(event: str, **fields: Any) -> None:
    """Write one event; numbers that are not finite become null."""
    found = {"event": event, **fields}
    try:
        line = json.dumps(found, allow_nan=False)
    except ValueError:
        line = json.dumps(_finite(found))
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parse(line: str) -> dict[str, Any] | None:
    """The event in a line of output, None when it is something else."""
    if not line.startswith(_MARK):
        return None
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
