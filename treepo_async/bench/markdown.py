"""Tables as the reports of all benchmarks write them."""

from collections.abc import Iterable


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table: its header, and a line a row."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
