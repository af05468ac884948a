"""`python launch/bench.py http|sampling|curves [key=value ...]`: measure the engine, or trees against independent sampling.

`http [requests=640]`: what a request to the engine costs outside of the engine.
`sampling [depth=7] [segment=16] [width=16,64] [branch=2] [prompt=256] [prompts=8] [pairs=5] [layers=8] [hidden=512]
[running=64] [stop=none|natural] [out=DIR]`: both ways in turn on one engine, over all combinations of the comma lists.
`curves ARM=RUN,RUN... [out=DIR]`: held-out accuracy of runs side by side, over decoded tokens and over updates.
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from treepo_async.bench import command, curves, http, sampling
from treepo_async.errors import ConfigError, DataError, TreepoError

CACHE_DIR = Path(".cache/treepo_async")
EXIT_FAILED, EXIT_BAD_USE, EXIT_STOPPED = 1, 2, 130


def main(words: list[str]) -> int:
    """Run the benchmark that is named first. Gives the exit code."""
    try:
        return _run(words)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_USE
    except TreepoError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        # the others keep nothing of what they measured
        again = (
            "; the same command goes on with what is missing" if words[:1] == ["sampling"] else ""
        )
        print(f"stopped{again}", file=sys.stderr)
        return EXIT_STOPPED


def _run(words: list[str]) -> int:
    match words:
        case ["http", *rest]:
            asyncio.run(http.measure(http.parse(rest), CACHE_DIR, _say))
        case ["sampling", *rest]:
            asyncio.run(sampling.compare(command.parse(rest), CACHE_DIR, _say))
        case ["curves", *rest]:
            arms, out = curves.parse(rest)
            print(curves.write(arms, out), end="")
        case _:
            print(__doc__, file=sys.stderr)
            return EXIT_BAD_USE
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
