"""The speed of the replay queue: `bench.py queue`.

Every measurement is appended to a CSV file as soon as it is made; `table.md` and `environment.json` stand beside them. Trees and index
lie below `out` while it runs, on the disk that is measured. Neighbours: `queue_cells` reads the words, `queue_run` measures,
`queue_report` writes.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from treepo_async.bench import machine, queue_run
from treepo_async.bench import queue_report as report
from treepo_async.bench import queue_samples as samples
from treepo_async.bench.queue_cells import QueueOptions
from treepo_async.bench.queue_replay import Arm
from treepo_async.bench.queue_samples import Burst, Latency, Memory
from treepo_async.bench.queue_trees import Deliveries, make_tree


def compare(options: QueueOptions, say: Callable[[str], None]) -> None:
    """Measure, say what comes out, and write it.

    Raises:
        TreepoError: replay ended, or did not take a tree.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    machine.note(options.out / "environment.json")
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        if options.trees:
            _watch_memory(options, Path(name), say)
        else:
            _measure(options, Path(name), say)


def _measure(options: QueueOptions, folder: Path, say: Callable[[str], None]) -> None:
    bursts: list[Burst] = []
    latencies: list[Latency] = []
    with ExitStack() as stack:
        replays = {
            arm: stack.enter_context(queue_run.running(arm, folder / arm, peers=options.peers))
            for arm in Arm
        }
        for tokens in options.tokens:
            trees = Deliveries.of(make_tree(tokens, options.segment))
            say(f"{tokens:,} tokens in {len(trees.tree.segments)} segments")
            queue_run.bursts(replays, trees, options, 0)  # warms up
            for number in range(1, options.rounds + 1):
                found = queue_run.bursts(replays, trees, options, number)
                samples.append(options.out / "bursts.csv", found)
                bursts += found
                say(report.round_line(sorted(found, key=lambda burst: list(Arm).index(burst.arm))))
            if not options.seconds:
                continue
            (summary,) = report.summaries_of(b for b in bursts if b.tokens == tokens)
            rate = queue_run.LOAD * summary.rate(Arm.DURABLE).median
            latencies.append(queue_run.latency(replays[Arm.DURABLE], trees, options, rate))
            samples.append(options.out / "latency.csv", latencies[-1:])
            say(report.latency_line(latencies[-1]))
    has_crowd = options.actors and options.seconds
    crowds = [queue_run.crowd(options, folder / "crowd")] if has_crowd else []
    samples.append(options.out / "actors.csv", crowds)
    for crowd in crowds:
        say(report.crowd_line(crowd))
    report.write_table(options.out / "table.md", report.summaries_of(bursts), latencies, crowds)
    say((options.out / "table.md").read_text())


def _watch_memory(options: QueueOptions, folder: Path, say: Callable[[str], None]) -> None:
    def tell(found: Memory) -> None:
        samples.append(options.out / "memory.csv", [found])
        say(report.memory_line(found))

    queue_run.memory(options, folder / "memory", tell)
