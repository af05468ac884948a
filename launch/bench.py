"""`python launch/bench.py http|sampling|learner|queue|curves [key=value ...]`: measure engine, sampling, training or the queue.

`http [requests=640]`: what a request to the engine costs outside of the engine.
`sampling [depth=7] [segment=16] [width=16,64] [branch=2] [prompt=256] [prompts=8] [pairs=5] [layers=8] [hidden=512]
[running=64] [stop=none|natural] [out=DIR]`: both ways in turn on one engine, over all combinations of the comma lists.
`learner [branching=early,spread,late,treepo] [width=8,16,64] [depth=7] [segment=32] [prompt=32] [prompts=1] [trees=FILE]
[shape=cpu] [dtype=float32] [attention=auto] [recompute=none] [budget=4096] [rounds=5] [out=DIR]`: tree-packed against flat and
padded training of the same trees, made ones or those of a file.
`queue [tokens=65536,4096] [segment=256] [burst=256] [window=16] [peers=4] [rounds=7] [actors=256] [seconds=10] [trees=0] [out=DIR]`: what the
wire and the disk of the replay queue take; with `trees=1000000` its memory over so many trees instead.
`curves ARM=RUN,RUN... [out=DIR]`: held-out accuracy of runs side by side, over decoded tokens and over updates.
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
        goes_on = words[:1] in (["sampling"], ["learner"])
        again = "; the same command goes on with what is missing" if goes_on else ""
        print(f"stopped{again}", file=sys.stderr)
        return EXIT_STOPPED


def _run(words: list[str]) -> int:
    # imported where they are asked for, because each needs other packages than the others
    match words:
        case ["http", *rest]:
            from treepo_async.bench import http

            asyncio.run(http.measure(http.parse(rest), CACHE_DIR, _say))
        case ["sampling", *rest]:
            from treepo_async.bench import command, sampling

            asyncio.run(sampling.compare(command.parse(rest), CACHE_DIR, _say))
        case ["learner", *rest]:
            from treepo_async.bench import learner_cells

            options = learner_cells.parse(rest)
            from treepo_async.bench import learner  # starts Megatron, which takes a while

            learner.compare(options, _say)
        case ["queue", *rest]:
            from treepo_async.bench import queue, queue_cells

            queue.compare(queue_cells.parse(rest), _say)
        case ["curves", *rest]:
            from treepo_async.bench import curves

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
