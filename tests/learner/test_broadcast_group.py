"""The groups that weights are sent in, over gloo to processes that join as SGLang does, and die as it does."""

import multiprocessing
import os
import threading
import time
from datetime import timedelta

import pytest
import torch

from treepo_async.errors import WeightsError
from treepo_async.learner.broadcast_group import Group, Meeting

LIMIT_S = 60.0
BUCKETS = [torch.arange(size, dtype=torch.uint8) for size in (200, 10, 50)]
HEAD = 200

pytestmark = [pytest.mark.engine, pytest.mark.timeout(90)]


def receive(name, buckets, pause_s, pipe):
    """Join a group as rank 1, take some buckets, each after a pause, and die without a word."""
    port = int(pipe.recv_bytes())
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    limit = timedelta(seconds=LIMIT_S)
    store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=limit))
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(name, store),
        group_name=name,
        timeout=limit,
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    for bucket in buckets:
        time.sleep(pause_s)
        taken = torch.zeros_like(bucket)
        dist.broadcast(taken, 0, group=group)
        # the head of it: nobody reads the pipe until all is sent
        pipe.send_bytes(taken[:HEAD].numpy().tobytes())
    os._exit(0)


class Engine:
    """A process that takes so many buckets; forked, as it would import torch for long."""

    def __init__(self, name, buckets, pause_s=0.0):
        fork = multiprocessing.get_context("fork")
        self.pipe, other = fork.Pipe()
        self.process = fork.Process(
            target=receive, args=(name, buckets, pause_s, other), daemon=True
        )
        self.process.start()
        other.close()

    def join(self, meeting):
        self.pipe.send_bytes(str(meeting.port).encode())

    def taken(self):
        found = []
        try:
            while True:
                found.append(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(LIMIT_S)
            return found


def send(meeting, name, outcomes):
    try:
        group = Group(meeting, name, num_ranks=2, timeout_s=LIMIT_S)
        group.send(BUCKETS)
        outcomes[name] = ""
    except WeightsError as error:
        outcomes[name] = str(error)


def test_an_engine_that_dies_between_buckets_costs_its_own_group_and_no_other():
    engines = {"dies": Engine("dies", BUCKETS[:1]), "lives": Engine("lives", BUCKETS)}
    meeting, outcomes = Meeting("127.0.0.1"), {}
    for engine in engines.values():
        engine.join(meeting)
    threads = [threading.Thread(target=send, args=(meeting, name, outcomes)) for name in engines]
    for thread in threads:
        thread.start()
    taken = {name: engine.taken() for name, engine in engines.items()}
    for thread in threads:
        thread.join(LIMIT_S)
    wanted = [bucket.numpy().tobytes() for bucket in BUCKETS]
    assert taken == {"dies": wanted[:1], "lives": wanted}
    assert outcomes["lives"] == ""
    assert outcomes["dies"].startswith("group dies: bucket ")


def test_an_engine_that_does_not_join_is_given_up_at_the_deadline():
    with pytest.raises(WeightsError, match="group nobody: the engine did not join"):
        Group(Meeting("127.0.0.1"), "nobody", num_ranks=2, timeout_s=1.0)


def test_an_engine_that_takes_all_too_slowly_is_given_up_however_fast_it_takes_each():
    limit_s, large = 2.0, [torch.zeros(2**24, dtype=torch.uint8)] * 3
    meeting, engine = Meeting("127.0.0.1"), Engine("slow", large, pause_s=0.4 * limit_s)
    engine.join(meeting)
    group = Group(meeting, "slow", num_ranks=2, timeout_s=limit_s)
    with pytest.raises(WeightsError, match=r"did not take all within 2 s \(weights\.timeout_s\)"):
        group.send(large)
    group.close()
    assert len(engine.taken()) < len(large)


def test_nothing_is_sent_in_a_group_that_was_closed_meanwhile():
    group = Group(Meeting("127.0.0.1"), "closed", num_ranks=1, timeout_s=LIMIT_S)
    group.send(BUCKETS)
    group.close()
    with pytest.raises(WeightsError, match="group closed: bucket 0: the group is closed"):
        group.send(BUCKETS)
