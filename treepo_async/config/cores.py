"""The grammar of CPU cores: `0`, `0,4-7`."""

import re

from treepo_async.errors import ConfigError

_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def parse_cores(key: str, text: str) -> frozenset[int]:
    """The numbers of the cores that a knob names.

    Args:
        key: of the knob.
        text: its value.

    Raises:
        ConfigError: it names none, or in another way.
    """
    cores: set[int] = set()
    for part in text.split(","):
        found = _PART.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ConfigError(f"{key}={text} does not name CPU cores; write e.g. 0, 4-7 or 0,4-7")
        cores.update(range(first, last + 1))
    return frozenset(cores)
