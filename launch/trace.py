"""`python launch/trace.py RUN [out=FILE]`: what every process of a run did when, as a trace that Perfetto or Chrome opens.

Reads `trace.jsonl` in the folder of the run, which may be at work, and writes one JSON file in the trace event format
(default: RUN/trace.json). Open it at https://ui.perfetto.dev or in chrome://tracing; nothing is sent anywhere.

Exit codes: 0 written, 2 a bad word, or a folder without a trace.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.run import EXIT_BAD_CONFIG
from treepo_async.errors import ConfigError
from treepo_async.metrics.chrome_trace import chrome_trace
from treepo_async.metrics.trace_log import TRACE_FILE, read_trace

USAGE = "RUN [out=FILE]"


def main(words: list[str]) -> int:
    """Write the trace, and say what is in it. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(__doc__)
        return 0
    try:
        run, out = _parse(words)
        records = _records_of(run)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    trace = chrome_trace(records)
    out.write_text(json.dumps(trace))
    kinds = Counter(event["ph"] for event in trace["traceEvents"])
    spans, arrows = kinds["X"], kinds["s"]
    counts = f"{spans} spans, {kinds['C']} counts, {kinds['i']} instants, {arrows} arrows"
    seconds = max(r["at"] + r.get("s", 0.0) for r in records) - min(r["at"] for r in records)
    print(f"{out}: {counts} of {seconds:.1f} s; open it at https://ui.perfetto.dev")
    return 0


def _records_of(run: Path) -> list[dict[str, Any]]:
    records = read_trace(run)
    if not records:
        raise ConfigError(f"{run} has no {TRACE_FILE}: run with metrics.trace=true")
    return records


def _parse(words: list[str]) -> tuple[Path, Path]:
    """The run, and the file to write."""
    runs = [Path(word) for word in words if "=" not in word]
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    if len(runs) != 1 or keys.keys() - {"out"}:
        raise ConfigError(f"give the folder of one run: {USAGE}")
    return runs[0], Path(keys.get("out", runs[0] / "trace.json"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
