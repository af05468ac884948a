"""`python launch/bench.py NAME [key=value ...]`: measure a part, or the whole, or compare what was measured.

`http [requests=640]`: what a request to the engine costs outside of the engine.
`sampling [depth=7] [segment=16] [width=16,64] [branch=2] [prompt=256] [prompts=8] [pairs=5] [layers=8] [hidden=512]
[running=64] [stop=none|natural] [out=DIR]`: both ways in turn on one engine, over all combinations of the comma lists.
`learner [branching=early,spread,late,treepo] [width=8,16,64] [depth=7] [segment=32] [prompt=32] [prompts=1] [trees=FILE]
[shape=cpu] [dtype=float32] [attention=auto] [recompute=none] [budget=4096] [rounds=5] [out=DIR]`: tree-packed against flat and
padded training of the same trees, made ones or those of a file.
`queue [tokens=65536,4096] [segment=256] [burst=256] [window=16] [peers=4] [rounds=7] [actors=256] [seconds=10] [trees=0] [out=DIR]`: what the
wire and the disk of the replay queue take; with `trees=1000000` its memory over so many trees instead.
`async [backend=scripted|real|sim] [arms=sync2,sync,one_step,async,async_inflight,async_eager] [seeds=0,1,2] [staleness=4] [update=retract]
[out=DIR]`: synchronous against asynchronous arms on the same configuration and seeds; `docs/async_benchmark.md` has the keys of each back end.
`routing [actors=3] [concurrent=4] [trees=36] [rounds=3] [policies=prefix,random,round_robin] [updates=none,drain,retract] [layers=2]
[hidden=128] [out=DIR]`: where the requests of uneven trees go with two engines.
`weights [layers=10] [hidden=512] [rounds=7] [stages=1,2] [bucket=67108864] [folder=/dev/shm] [out=DIR]`: new weights into an engine by a
folder and by broadcast, against a plain copy of the same bytes.
`curves ARM=RUN,RUN... [out=DIR]`: held-out accuracy of runs side by side, over decoded tokens and over updates.
`staleness RUN|DIR... [out=DIR]`: what staleness and corrections did to the learning of runs, mean and spread over seeds.
`sim [actors=8,16,32,64,128,256,512,1024] [out=DIR]`: how far a run can grow, simulated; `sim calibrate=RUN predict=RUN,RUN`: what a real run
predicts for others; `sim validate=DIR [seed=0]`: the same with three runs that are made there.
`sweep KEY=VALUE,VALUE ... out=DIR ["keys=KEY=VALUE ..."] [warm=tiny] [url=URL] [ray=ADDRESS]`: a run for each combination.
`guard [only=NAME,NAME] [update=RUNS]`: whether a part has become slower than `baselines.json` allows.
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
        goes_on = words[:1] in (["sampling"], ["learner"], ["async"], ["sweep"])
        again = "; the same command goes on with what is missing" if goes_on else ""
        print(f"stopped{again}", file=sys.stderr)
        return EXIT_STOPPED


def _run(words: list[str]) -> int:
    bench = BENCHES.get(words[0]) if words else None
    if bench is None:
        print(__doc__, file=sys.stderr)
        return EXIT_BAD_USE
    bench(words[1:])
    return 0


# each imports what it needs, because each needs other packages than the others


def _http(words: list[str]) -> None:
    from treepo_async.bench import http

    asyncio.run(http.measure(http.parse(words), CACHE_DIR, _say))


def _sampling(words: list[str]) -> None:
    from treepo_async.bench import command, sampling

    asyncio.run(sampling.compare(command.parse(words), CACHE_DIR, _say))


def _learner(words: list[str]) -> None:
    from treepo_async.bench import learner_cells

    options = learner_cells.parse(words)
    from treepo_async.bench import learner  # starts Megatron, which takes a while

    learner.compare(options, _say)


def _queue(words: list[str]) -> None:
    from treepo_async.bench import queue, queue_cells

    queue.compare(queue_cells.parse(words), _say)


def _async(words: list[str]) -> None:
    from treepo_async.bench import async_cells, async_compare

    async_compare.compare(async_cells.parse(words), _say)


def _routing(words: list[str]) -> None:
    from treepo_async.bench import routing, routing_cells

    asyncio.run(routing.compare(routing_cells.parse(words), CACHE_DIR, _say))


def _weights(words: list[str]) -> None:
    from treepo_async.bench import weights, weights_cells

    asyncio.run(weights.compare(weights_cells.parse(words), CACHE_DIR, _say))


def _curves(words: list[str]) -> None:
    from treepo_async.bench import curves

    arms, out = curves.parse(words)
    print(curves.write(arms, out), end="")


def _staleness(words: list[str]) -> None:
    from treepo_async.bench import staleness

    folders, out = staleness.parse(words)
    print(staleness.write(folders, out), end="")


def _sim(words: list[str]) -> None:
    from treepo_async.bench import cell_runs, sim

    sim.simulate(sim.parse(words), cell_runs.launch, _say)


def _sweep(words: list[str]) -> None:
    from treepo_async.bench import cell_runs, sweep

    asked = sweep.parse(words)
    if not asked.model:
        sweep.run(asked, cell_runs.launch, _say)
        return
    from treepo_async.bench import sweep_warm

    asyncio.run(sweep_warm.run_warm(asked, CACHE_DIR, cell_runs.launch, _say))


def _guard(words: list[str]) -> None:
    from treepo_async.bench import guard, guard_checks

    guard.guard(guard_checks.all_checks(), guard.parse(words), _say)


BENCHES = {
    "http": _http,
    "sampling": _sampling,
    "learner": _learner,
    "queue": _queue,
    "async": _async,
    "routing": _routing,
    "weights": _weights,
    "curves": _curves,
    "staleness": _staleness,
    "sim": _sim,
    "sweep": _sweep,
    "guard": _guard,
}


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
