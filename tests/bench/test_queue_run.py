"""One replay process, started once, serves all of these."""

import asyncio
import os
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from tests.fakes import events_in, loopback
from treepo_async.bench.queue_actors import ActorsSpec, run
from treepo_async.bench.queue_cells import BATCH_SIZE, parse
from treepo_async.bench.queue_client import QueueClient
from treepo_async.bench.queue_replay import RUN_ID, Arm
from treepo_async.bench.queue_run import bursts, latency, processor_s, running
from treepo_async.bench.queue_trees import Deliveries, make_tree
from treepo_async.errors import TreepoError

OPTIONS = parse(["tokens=64", "segment=16", f"burst={BATCH_SIZE}", "seconds=1"])
TREES = Deliveries.of(make_tree(64, 16))
FEW = Deliveries.of(make_tree(65_536, 4096))
"""So large that a burst is not made longer."""


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    with running(Arm.DURABLE, tmp_path_factory.mktemp("queue") / "durable", peers=3) as found:
        yield found


def test_a_burst_is_acknowledged_tree_by_tree_and_drawn_whole(replay):
    (sample,) = bursts({Arm.DURABLE: replay}, FEW, OPTIONS, 1)
    assert (sample.arm, sample.trees, sample.tokens) == (Arm.DURABLE, BATCH_SIZE, 65_536)
    assert sample.disk_bytes > sample.wire_bytes > 8 * 65_536 * BATCH_SIZE
    assert sample.disk_bytes_per_token < 10
    # nothing is left: what comes next can be drawn whole again
    bursts({Arm.DURABLE: replay}, FEW, OPTIONS, 2)


def test_processor_time_is_told_finer_than_ticks_and_of_every_thread():
    def burn():
        until = time.thread_time() + 0.005
        while time.thread_time() < until:
            pass
        burnt.set()
        done.wait()

    def settled():
        # the kernel books what a thread ran once it sleeps
        time.sleep(0.01)
        return processor_s(os.getpid())

    burnt, done = threading.Event(), threading.Event()
    thread = threading.Thread(target=burn)
    before = settled()
    thread.start()
    burnt.wait()
    spent = settled() - before
    done.set()
    thread.join()
    assert 0.005 <= spent < 0.0095


def test_a_thread_that_ends_while_they_are_read_is_left_out(tmp_path):
    # many, as they are listed in any order
    for number in range(20):
        thread = tmp_path / "7" / "task" / str(number)
        thread.mkdir(parents=True)
        if number % 2:
            (thread / "schedstat").write_text("5000000 20 3\n")
    assert processor_s(7, tmp_path) == 0.05


def test_a_kernel_that_keeps_no_processor_times_is_told_from_a_process_that_has_ended(tmp_path):
    (tmp_path / "7" / "task" / "7").mkdir(parents=True)
    with pytest.raises(TreepoError, match=r"7/task/\*/schedstat is not there.*CONFIG_SCHED_INFO"):
        processor_s(7, tmp_path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(TreepoError, match=f"process {ended.pid} has ended"):
        processor_s(ended.pid)


def test_latency_counts_from_when_a_tree_was_due(replay):
    found = latency(replay, TREES, OPTIONS, rate=2 * BATCH_SIZE)
    assert found.trees == 2 * BATCH_SIZE
    assert 0 < found.p50_s <= found.p99_s <= found.longest_s


def test_latency_is_taken_of_one_batch_where_the_rate_is_low(replay):
    assert latency(replay, TREES, replace(OPTIONS, seconds=0.01), rate=100.0).trees == BATCH_SIZE


async def test_simulated_actors_lease_and_deliver_until_their_time_is_up(replay, capsys):
    spec = ActorsSpec(
        replay.endpoint, RUN_ID, first=0, number=3, tokens=64, segment=16, seconds=0.3
    )
    await asyncio.wait_for(run(spec), 20)
    (event,) = events_in(capsys.readouterr().out, "delivered")
    assert len(event["waits"]) == 3
    assert all(event["waits"]), "every actor delivered"
    num_trees = sum(map(len, event["waits"]))
    replay.client.draw(num_trees - num_trees % BATCH_SIZE)


def test_a_tree_that_is_not_accepted_stops_the_benchmark(replay):
    with pytest.raises(TreepoError, match="unknown_lease"):
        replay.client.push([TREES.frames_of("999999999", 1, 1)], window=1)


def test_the_stand_in_answers_whatever_it_gets(tmp_path):
    with running(Arm.BARE, tmp_path / "bare") as bare:
        (sample,) = bursts({Arm.BARE: bare}, TREES, OPTIONS, 1)
    assert sample.trees == 8 * BATCH_SIZE
    assert sample.disk_bytes == 0


def test_a_replay_process_that_died_is_not_waited_for():
    client = QueueClient(loopback(), run_id=RUN_ID, batch_size=BATCH_SIZE)
    lives = iter([True, True, False])
    assert not client.is_heard(lambda: next(lives))
    client.close()
