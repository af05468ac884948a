"""Measures of the queue: bursts of every arm in turn, latency at half load, memory over many trees.

Every arm has a replay process of its own, which idles while another is measured. Waits: for such a process to
answer its first request (deadline `wire.bare.PATIENCE_S`, the process ends the wait).
"""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from treepo_async.bench.queue_actors import ActorsSpec
from treepo_async.bench.queue_cells import BATCH_SIZE, QueueOptions
from treepo_async.bench.queue_client import Put, QueueClient
from treepo_async.bench.queue_replay import RUN_ID, Arm, ReplaySpec
from treepo_async.bench.queue_samples import Burst, Crowd, Latency, Memory
from treepo_async.bench.queue_trees import Deliveries, make_tree
from treepo_async.errors import DeadlineError, TreepoError
from treepo_async.metrics.events import parse
from treepo_async.process import free_ports, start_child, stop_child

STOP_S = 5.0
LOAD = 0.5
"""Of the measured rate, at which latency is measured."""
MOST_WAITING = 4096
"""Leases that are prepared at once."""
NUM_PROCESSES = 4
"""Of simulated actors."""
DRAW_S = 0.5
"""For which the learner asks before it looks whether the actors still run."""
NUM_LOOKS = 50
"""At the memory."""
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Replay:
    """A running process and a connection to it."""

    arm: Arm
    client: QueueClient
    process: psutil.Process
    folder: Path
    endpoint: str

    def processor_s(self) -> float:
        """Processor time of the threads of the process so far. Replay keeps the threads that it begins with."""
        return processor_s(self.process.pid)

    def disk_bytes(self) -> int:
        """Of its folder."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())


def processor_s(pid: int, proc: Path = PROC) -> float:
    """Of all threads that a process has, to the nanosecond: the clock of a process as a whole has ticks of 10 ms.

    Raises:
        TreepoError: the process has ended, or the kernel does not tell.
    """
    tasks, spent = proc / str(pid) / "task", list[int]()
    with contextlib.suppress(FileNotFoundError):
        for thread in tasks.iterdir():
            # it may have ended since it was listed
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                spent.append(int((thread / "schedstat").read_text().split()[0]))
    if not tasks.is_dir():
        raise TreepoError(
            f"process {pid} has ended, and its processor time is not known; its log says why"
        )
    if not spent:
        raise TreepoError(
            f"{tasks}/*/schedstat is not there; processor time needs a Linux kernel with CONFIG_SCHED_INFO"
        )
    return sum(spent) / 1e9


@contextlib.contextmanager
def running(arm: Arm, folder: Path, *, peers: int = 1, **limits: int) -> Iterator[Replay]:
    """A replay process of an arm with a folder of its own.

    Args:
        arm: what answers.
        folder: made.
        peers: actors that deliver.
        limits: see `ReplaySpec`.

    Raises:
        TreepoError: it did not answer.
    """
    folder.mkdir(parents=True)
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    spec = ReplaySpec(arm, endpoint, str(folder), BATCH_SIZE, **limits)
    command = [sys.executable, "-m", "treepo_async.bench.queue_replay", spec.to_json()]
    log_file = folder.parent / f"{folder.name}.log"
    with log_file.open("wb") as log:
        child = start_child(command, env={}, stdout=subprocess.DEVNULL, stderr=log)
    client = QueueClient(endpoint, run_id=RUN_ID, batch_size=BATCH_SIZE, peers=peers)
    try:
        if not client.is_heard(lambda: child.poll() is None):
            raise TreepoError(f"replay ended at once: {log_file.read_text()[-500:]}")
        client.greet()
        yield Replay(arm, client, psutil.Process(child.pid), folder, endpoint)
    except DeadlineError as error:
        raise TreepoError(f"{error}; its last words: {log_file.read_text()[-500:]}") from error
    finally:
        client.close()
        stop_child(child, timeout_s=STOP_S)


def bursts(
    replays: Mapping[Arm, Replay], trees: Deliveries, options: QueueOptions, number: int
) -> list[Burst]:
    """One round: a burst for each arm, each round beginning with another one."""
    arms = list(replays)
    turn = number % len(arms)
    order = [*arms[turn:], *arms[:turn]]
    return [
        _burst(replays[arm], trees, options, number, place)
        for place, arm in enumerate(order, start=1)
    ]


def _burst(
    replay: Replay, trees: Deliveries, options: QueueOptions, number: int, place: int
) -> Burst:
    size, client = burst_size(trees, options), replay.client
    puts: Sequence[Put]
    if replay.arm is Arm.BARE:
        puts = [trees.frames_of(f"{i:09d}", 1, i) for i in range(size)]
    else:
        puts = client.lease(size, trees)
    disk_bytes, processor_s = replay.disk_bytes(), replay.processor_s()
    wall_s = client.push(puts, options.window)
    sample = Burst(
        arm=replay.arm,
        tokens=trees.tree.num_tokens,
        segments=len(trees.tree.segments),
        window=options.window,
        peers=options.peers,
        round=number,
        place=place,
        trees=size,
        wall_s=wall_s,
        replay_cpu_s=replay.processor_s() - processor_s,
        wire_bytes=sum(len(frame) for put in puts for frame in put),
        disk_bytes=replay.disk_bytes() - disk_bytes,
    )
    if replay.arm is not Arm.BARE:
        client.draw(size)
    return sample


def burst_size(trees: Deliveries, options: QueueOptions) -> int:
    """More of small trees, so that a burst takes its time."""
    factor = max(1, min(8, 65_536 // trees.tree.num_tokens))
    return options.burst * factor


def latency(replay: Replay, trees: Deliveries, options: QueueOptions, rate: float) -> Latency:
    """From the time at which a tree is due, whether or not earlier ones are answered, until its answer.

    Args:
        replay: of an arm that keeps trees.
        trees: to deliver.
        options: how long.
        rate: trees/s, at times as of a Poisson process.
    """
    number = max(BATCH_SIZE, min(MOST_WAITING, int(rate * options.seconds)))
    number -= number % BATCH_SIZE
    rng, due, at = random.Random(0), [], 0.0
    for _ in range(number):
        at += rng.expovariate(rate)
        due.append(at)
    puts = replay.client.lease(number, trees)
    waits = sorted(replay.client.push_at(puts, due))
    replay.client.draw(number)
    return Latency(
        arm=replay.arm,
        tokens=trees.tree.num_tokens,
        trees=number,
        rate=rate,
        p50_s=waits[number // 2],
        p99_s=waits[int(0.99 * number)],
        longest_s=waits[-1],
    )


def crowd(options: QueueOptions, folder: Path) -> Crowd:
    """Many actors that lease and deliver small trees as fast as they can, and a learner that draws.

    Raises:
        TreepoError: an actor failed, or none got an acknowledgement in time.
    """
    number, tokens = options.actors, min(options.tokens)
    shares = [number // NUM_PROCESSES + (i < number % NUM_PROCESSES) for i in range(NUM_PROCESSES)]
    # as many leases as actors, those of trees that are not drawn included: some always wait
    staleness = max(1, number // BATCH_SIZE) - 1
    with running(Arm.DURABLE, folder, max_staleness=staleness) as replay:
        outputs = [folder.parent / f"actors-{i}.out" for i in range(NUM_PROCESSES)]
        children = [
            _start_actors(replay, options, tokens, sum(shares[:i]), shares[i], output)
            for i, output in enumerate(outputs)
        ]
        try:
            while any(child.poll() is None for child in children):
                replay.client.try_draw(DRAW_S)
            rss_bytes = replay.process.memory_info().rss
        finally:
            for child in children:
                stop_child(child, timeout_s=STOP_S)
    told = [_told(output) for output in outputs]
    waits = [waits for event in told for waits in event["waits"]]
    each = sorted(wait for actor in waits for wait in actor)
    if not each:
        raise TreepoError(f"no tree of {number} actors was acknowledged in {options.seconds} s")
    return Crowd(
        actors=number,
        processes=len(children),
        tokens=tokens,
        trees=len(each),
        wall_s=max(event["ended"] for event in told) - min(event["began"] for event in told),
        least_trees=min(map(len, waits)),
        most_trees=max(map(len, waits)),
        p50_s=each[len(each) // 2],
        p99_s=each[int(0.99 * len(each))],
        rss_bytes=rss_bytes,
    )


def _start_actors(
    replay: Replay, options: QueueOptions, tokens: int, first: int, number: int, output: Path
) -> subprocess.Popen[bytes]:
    spec = ActorsSpec(
        replay.endpoint, RUN_ID, first, number, tokens, options.segment, options.seconds
    )
    command = [sys.executable, "-m", "treepo_async.bench.queue_actors", spec.to_json()]
    with output.open("wb") as stdout, output.with_suffix(".log").open("wb") as log:
        return start_child(command, env={}, stdout=stdout, stderr=log)


def _told(output: Path) -> dict[str, Any]:
    """What a process of actors told at its end.

    Raises:
        TreepoError: it did not get so far.
    """
    for line in output.read_text().splitlines():
        event = parse(line)
        if event is not None:
            return event
    raise TreepoError(f"simulated actors failed: {output.with_suffix('.log').read_text()[-500:]}")


def memory(options: QueueOptions, folder: Path, say: Callable[[Memory], None]) -> None:
    """Deliver and draw many small trees, and look at the size of the process now and then."""
    trees = Deliveries.of(make_tree(2 * options.segment, options.segment))
    number = min(options.trees, 2048)
    with running(Arm.DURABLE, folder, peers=options.peers) as replay:
        began, num_done, next_look = time.monotonic(), 0, 0
        while num_done < options.trees:
            number = min(number, options.trees - num_done)
            replay.client.push(replay.client.lease(number, trees), options.window)
            replay.client.draw(number)
            num_done += number
            if num_done >= next_look:
                next_look += options.trees // NUM_LOOKS
                info = replay.process.memory_full_info()
                say(
                    Memory(
                        trees=num_done,
                        seconds=time.monotonic() - began,
                        rss_bytes=info.rss,
                        own_bytes=info.uss,
                        disk_bytes=replay.disk_bytes(),
                        files=replay.process.num_fds(),
                    )
                )
