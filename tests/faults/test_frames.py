"""What no honest peer sends, against the real server: each is refused for what it is, and nobody else notices.

The server is driven turn by turn without sockets, so that a hundred thousand frames take seconds; where the socket is the
matter, there is one.
"""

import asyncio
import contextlib
import errno
import gc
import itertools
import random
import statistics
import struct
import time
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from tests.fakes import LIMITS, numbered_prompt, serve_replay
from tests.faults.frames import invalid
from treepo_async.replay.budget import MANY
from treepo_async.replay.dead_letters import DeadLetters
from treepo_async.replay.peers import Peers
from treepo_async.replay.quarantine import Quarantine
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.server import ReplayServer
from treepo_async.replay.store import NewTree, Store
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)
from treepo_async.wire.codec import digest_of, encode_tree
from treepo_async.wire.messages import (
    Ack,
    AskBatch,
    AskLease,
    Batch,
    Beat,
    GiveUp,
    Hello,
    Leased,
    Nack,
    NoLease,
    Published,
    PutTree,
    Refusal,
    Trained,
    decode,
    encode,
    numbered,
)
from treepo_async.wire.sockets import Requester

pytestmark = pytest.mark.faults

ENDLESS_S = 1e9
APART_S = 20.0
"""Between invalid messages of one peer: it is never suspended."""
PEERS_A_TURN = 64
RULES = {
    "prompts_per_batch": 4,
    "max_staleness": 1,
    "num_batches": 10**6,
    "lease_timeout_s": ENDLESS_S,
    "max_attempts": 3,
    "drop_degenerate": False,
    "max_refills": 8,
}


def some_prompt(index):
    """The prompt of an index, all of whose tokens are in the vocabulary."""
    return replace(numbered_prompt(index % 100), id=f"p{index}")


def tree_frames(lease_id, *, step=0, lineage=0, num_tokens=4):
    """A good tree of a lease: two paths of one segment each."""
    prompt = some_prompt(int(lease_id))
    segments = tuple(
        Segment(
            ROOT,
            0,
            np.full(num_tokens, 7 + leaf, np.int32),
            np.full(num_tokens, -0.5, np.float32),
            PolicyVersion(lineage, step),
            StopReason.EOS,
        )
        for leaf in range(2)
    )
    values = np.array([1.0, 0.0], np.float32)
    return encode_tree(
        Tree(
            prompt,
            segments,
            values,
            values,
            Sampling(1.0, num_tokens, 1, 2, 2),
            Provenance(lease_id, "actor-0", decoded_tokens=2 * num_tokens),
        )
    )


@dataclass
class Answers:
    """A router that keeps what would have gone out."""

    sent: list = field(default_factory=list)

    def send_now(self, peer, message, attachment=()):
        self.sent.append((peer, message, attachment))
        return True

    def take(self):
        sent, self.sent = self.sent, []
        return sent


class Driven:
    """The real server with its real store, turn by turn, on a clock of the test."""

    def __init__(self, folder, **rules):
        self.now = 1000.0
        self.answers = Answers()
        self.store, state = Store.open(
            folder, "run", resume_step=None, segment_bytes=2**20, keeps_trees=True
        )
        self.folder = folder
        self.server = ReplayServer(
            router=self.answers,
            queue=Queue.of(QueueRules(**{**RULES, **rules}), state, now=self.now),
            store=self.store,
            peers=Peers(run_id="run", config_digest="", tokenizer_digest=""),
            prompt=some_prompt,
            limits=replace(LIMITS, max_lost=10**9),
            dead_letters=DeadLetters(folder),
            quarantine=Quarantine(folder / "quarantine", 8),
            clock=lambda: self.now,
        )
        self.numbers = itertools.count(1)

    def turn(self, arrived, *, seconds=0.01):
        """Messages as frames, with their peers. Gives what was answered."""
        self.now += seconds
        self.server._turn(arrived, self.now)
        return self.answers.take()

    def ask(self, peer, message, attachment=()):
        """The answer to one message."""
        number = next(self.numbers)
        sent = self.turn([(peer, [encode(numbered(message, number)), *attachment])])
        return next(m for p, m, _ in sent if p == peer and m.request == number)

    def greet(self, name):
        """A peer of a name."""
        peer = f"{name}:{next(self.numbers)}".encode()
        assert isinstance(self.ask(peer, Hello(name=name, run_id="run")), Ack)
        return peer

    def lease(self, peer):
        lease = self.ask(peer, AskLease(wait_s=1.0))
        assert isinstance(lease, Leased)
        return lease

    def put(self, peer, lease, frames=None):
        frames = frames or tree_frames(lease.lease_id)
        return self.ask(
            peer,
            PutTree(lease_id=lease.lease_id, attempt=lease.attempt, digest=digest_of(frames)),
            frames,
        )

    def train(self, peer, step):
        """What the learner does with a step, up to its publication."""
        lineage = 0
        batch = self.ask(peer, AskBatch(step=step, lineage=lineage, wait_s=1.0))
        assert isinstance(batch, Batch)
        assert isinstance(self.ask(peer, Trained(step=step, lineage=lineage, digest="d")), Ack)
        published = Published(step=step + 1, lineage=lineage, consumed_step=step)
        assert isinstance(self.ask(peer, published), Ack)
        return batch


@pytest.fixture
def driven(tmp_path):
    driven = Driven(tmp_path)
    yield driven
    driven.store.close()


def flood(driven, seed, num_frames, peers):
    """Send invalid frames, from each peer one a turn. Gives how many got which reason."""
    counts = {}
    frames = invalid(seed, tree_frames("000000001"))
    for _ in range(num_frames // len(peers)):
        arrived = [(peer, next(frames)) for peer in peers]
        sent = driven.turn(arrived, seconds=APART_S)
        for _, message, _ in sent:
            reason = message.reason if isinstance(message, Nack) else type(message).__name__
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def rss():
    gc.collect()
    return psutil.Process().memory_info().rss


def check_flood(driven, num_frames):
    peers = [driven.greet(f"guest-{i}") for i in range(PEERS_A_TURN)]
    flood(driven, 1, num_frames // 5, peers)
    before = rss()
    counts = flood(driven, 2, num_frames * 4 // 5, peers)
    grown = rss() - before
    assert grown < 32 * 2**20, f"{grown / 2**20:.0f} MiB more after {num_frames} frames"
    total = sum(counts.values())
    assert total > 0.95 * num_frames * 4 // 5, "next to all were answered"
    assert counts["invalid"] > 0.8 * total
    assert Refusal.SUSPENDED not in counts, "else most were not looked at"
    assert set(counts) <= {*map(str, Refusal), "Ack", "Beating", "NoLease", "Leased"}
    assert len(list((driven.folder / "quarantine").iterdir())) <= 8
    assert_progress(driven)


def assert_progress(driven, step=0):
    """A batch is grown, trained and published, once who asked before has been sent away and given back what it got."""
    driven.turn([], seconds=100.0)
    actor, learner = driven.greet("actor-late"), driven.greet("learner-0")
    open_leases = [
        e for e in driven.server.queue.order.live.values() if e.owner.startswith("guest")
    ]
    for entry in open_leases:
        driven.server.queue.hand_back(entry.lease_id, entry.attempt)
    for _ in range(RULES["prompts_per_batch"]):
        answer = driven.put(actor, driven.lease(actor))
        assert (type(answer), answer.note) == (Ack, "accepted"), answer
    driven.train(learner, step)


def test_a_hundred_thousand_invalid_frames_are_refused_and_leave_nothing_behind(driven):
    check_flood(driven, 100_000)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_invalid_frames_are_refused_and_leave_nothing_behind(driven):
    check_flood(driven, 1_000_000)


def test_an_honest_actor_keeps_its_pace_while_another_sends_three_bad_messages_for_each_tree(
    driven,
):
    honest, learner = driven.greet("actor-0"), driven.greet("learner-0")
    bad = [driven.greet(f"guest-{i}") for i in range(3)]
    frames = invalid(5, tree_frames("000000001"))

    def put(step, *, disturbed):
        """Seconds of the processor in the turn that takes a tree; those of the disk, alike in both, are left out."""
        lease = driven.lease(honest)
        tree = tree_frames(lease.lease_id, step=step, num_tokens=4096)
        number, digest = next(driven.numbers), digest_of(tree)
        message = PutTree(
            request=number, lease_id=lease.lease_id, attempt=lease.attempt, digest=digest
        )
        arrived = [(peer, next(frames)) for peer in bad] if disturbed else []
        begin = time.process_time()
        sent = driven.turn([*arrived, (honest, [encode(message), *tree])])
        seconds = time.process_time() - begin
        (answer,) = (m for p, m, _ in sent if p == honest)
        assert isinstance(answer, Ack), answer
        assert answer.note == "accepted"
        return seconds

    rng = random.Random(1)

    def pace(steps):
        """Of the honest actor beside the bad ones, as a share of its pace alone."""
        times = {True: [], False: []}
        for step in steps:
            # in another order each time: what else the machine does disturbs both alike
            for disturbed in rng.sample([True, False] * 2, 4):
                times[disturbed].append(put(step, disturbed=disturbed))
            driven.train(learner, step)
        quiet, loud = (statistics.quantiles(times[which], n=4)[0] for which in (False, True))
        return quiet / loud

    # a neighbour that comes and goes within one measurement does not spoil three
    paces = [pace(range(40))]
    while paces[-1] < 0.9 and len(paces) < 3:
        paces.append(pace(range(40 * len(paces), 40 * len(paces) + 40)))
    assert paces[-1] >= 0.9, paces


# ------------------------------------------------------------------ captures


def test_a_capture_that_is_played_again_in_any_order_changes_nothing(driven):
    actor, learner = driven.greet("actor-0"), driven.greet("learner-0")
    capture, notes = [], []

    def recorded(peer, message, attachment=()):
        message = numbered(message, next(driven.numbers))
        capture.append((peer, [encode(message), *attachment]))
        (answer,) = (m for _, m, _ in driven.turn([capture[-1]]))
        return answer

    for _ in range(RULES["prompts_per_batch"]):
        lease = recorded(actor, AskLease(wait_s=1.0))
        frames = tree_frames(lease.lease_id)
        put = PutTree(lease_id=lease.lease_id, attempt=lease.attempt, digest=digest_of(frames))
        notes.append(recorded(actor, put, frames).note)
        recorded(actor, GiveUp(lease_id=lease.lease_id, attempt=lease.attempt, reason="late"))
    assert set(notes) == {"accepted"}
    queue = driven.server.queue
    next_step = queue.order.next_step
    stored = {key: e.attempt for key, e in queue.order.live.items()}
    rng = random.Random(3)
    for _ in range(3):
        shuffled = rng.sample(capture, len(capture))
        for _, answer, _ in driven.turn(shuffled):
            if isinstance(answer, Ack):
                assert answer.note in ("duplicate", "")
    assert queue.ledger()["accepted"] == RULES["prompts_per_batch"]
    assert queue.order.next_step == next_step
    assert {key: e.attempt for key, e in queue.order.live.items() if key in stored} == stored
    batch = driven.train(learner, 0)
    assert len(set(batch.lease_ids)) == RULES["prompts_per_batch"]
    for _, answer, _ in driven.turn(rng.sample(capture, len(capture))):
        assert not (isinstance(answer, Ack) and answer.note == "accepted")


def test_another_tree_under_the_same_lease_and_attempt_is_invalid_and_the_first_one_stays(driven):
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    first = tree_frames(lease.lease_id)
    assert driven.put(actor, lease, first).note == "accepted"
    answer = driven.put(actor, lease, tree_frames(lease.lease_id, num_tokens=5))
    assert (type(answer), answer.reason) == (Nack, "invalid")
    assert [bytes(f) for f in driven.store.read(lease.lease_id)] == first
    assert driven.put(actor, lease, first).note == "duplicate"


def test_a_capture_of_an_earlier_process_is_refused_once_a_later_one_has_greeted(driven):
    earlier = driven.greet("actor-0")
    lease = driven.lease(earlier)
    later = driven.greet("actor-0")
    answer = driven.put(earlier, lease)
    assert (type(answer), answer.reason, answer.retry) == (Nack, "fenced", False)
    again = driven.lease(later)
    assert again.lease_id == lease.lease_id
    assert driven.put(later, again).note == "accepted"


# ------------------------------------------------------------------ versions and sizes


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ({"step": 5}, "future_version"),
        ({"lineage": 3}, "future_version"),
        ({"step": 0}, "stale"),
    ],
    ids=["future", "another lineage", "stale"],
)
def test_a_tree_of_the_wrong_weights_is_refused_for_what_it_is_and_the_next_is_taken(
    driven, version, reason
):
    actor, learner = driven.greet("actor-0"), driven.greet("learner-0")
    for step in range(3):
        for _ in range(RULES["prompts_per_batch"]):
            lease = driven.lease(actor)
            assert (
                driven.put(actor, lease, tree_frames(lease.lease_id, step=step)).note == "accepted"
            )
        driven.train(learner, step)
    lease = driven.lease(actor)
    assert lease.least_step == 2
    answer = driven.put(actor, lease, tree_frames(lease.lease_id, **{"step": 3, **version}))
    assert (type(answer), answer.reason, answer.retry) == (Nack, reason, False)
    again = driven.lease(actor)
    assert driven.put(actor, again, tree_frames(again.lease_id, step=3)).note == "accepted"


def test_a_tree_whose_frames_are_together_too_large_is_refused_and_the_next_is_taken(driven):
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    large = tree_frames(lease.lease_id, num_tokens=LIMITS.max_tree_bytes // 16)
    assert max(map(len, large)) < LIMITS.max_tree_bytes < sum(map(len, large))
    answer = driven.put(actor, lease, large)
    assert (type(answer), answer.reason, answer.retry) == (Nack, "oversize", False)
    again = driven.lease(actor)
    assert driven.put(actor, again).note == "accepted"


def send_too_large(endpoint):
    """What a peer sends that does not look at sizes; returns once it was cut, came again and was answered."""
    small = [encode(Hello(request=7, name="guest-0", run_id="run"))]
    with contextlib.closing(zmq.Context.instance().socket(zmq.DEALER)) as careless:
        careless.setsockopt(zmq.LINGER, 0)
        careless.connect(endpoint)
        careless.send_multipart([*small, b"x" * (LIMITS.max_tree_bytes + 1)])
        assert careless.poll(300) == 0, "not a word of it arrived"
        for _ in range(20):
            careless.send_multipart(small)
            if careless.poll(500):
                break
        assert decode(careless.recv(zmq.NOBLOCK)).request == 7


async def test_a_sender_of_a_frame_that_is_too_large_is_cut_and_the_next_tree_is_accepted():
    async with serve_replay(num_batches=1) as (_, endpoint):
        hello = Hello(name="actor-0", run_id="run")
        async with Requester(endpoint, name="actor-0", owner="replay", hello=hello) as actor:
            lease, _ = await actor.ask(AskLease(wait_s=5), timeout_s=10, wait="a lease")
            await asyncio.to_thread(send_too_large, endpoint)
            frames = tree_frames(lease.lease_id)
            put = PutTree(lease_id=lease.lease_id, attempt=1, digest=digest_of(frames))
            answer, _ = await actor.ask(put, frames, timeout_s=10, wait="the ack of a tree")
    assert answer.note == "accepted"


def test_a_peer_of_five_invalid_messages_is_suspended_and_others_are_not(driven):
    bad, good = driven.greet("guest-0"), driven.greet("actor-0")
    for _ in range(5):
        driven.turn([(bad, [b"\xc1"])])
    answer = driven.ask(bad, AskLease(wait_s=1.0))
    assert (type(answer), answer.reason, answer.retry) == (Nack, "suspended", True)
    assert 0 < answer.retry_after_s <= 60
    assert driven.put(good, driven.lease(good)).note == "accepted"
    driven.now += 60
    assert isinstance(driven.ask(bad, AskLease(wait_s=1.0)), Leased)


# ------------------------------------------------------------------ claims


@pytest.mark.parametrize("attempt", [-1, 0, 2, 2**31, 2**63])
def test_a_tree_of_an_attempt_that_never_was_is_refused_and_replay_can_be_opened_again(
    tmp_path, attempt
):
    driven = Driven(tmp_path)
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    frames = tree_frames(lease.lease_id)
    put = PutTree(lease_id=lease.lease_id, attempt=attempt, digest=digest_of(frames))
    answer = driven.ask(actor, put, frames)
    assert (type(answer), answer.reason) == (Nack, "invalid")
    held = lease if driven.server.queue.is_leased(lease.lease_id, 1) else driven.lease(actor)
    assert driven.put(actor, held).note == "accepted"
    driven.store.close()
    again = Driven(tmp_path)
    assert again.store.holds(lease.lease_id)
    again.store.close()


def test_a_commit_that_the_index_cannot_take_leaves_nothing_in_the_log(driven):
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    end = driven.store._log.end
    for attempt, error in ((-1, struct.error), (2**63, OverflowError)):
        with pytest.raises(error):
            driven.store.commit(None, [NewTree(lease.lease_id, attempt, 1, [b"x"])])
        assert driven.store._log.end == end
    assert driven.put(actor, lease).note == "accepted"
    driven.store.close()
    driven.store = Store.open(driven.folder, "run", resume_step=None, segment_bytes=2**20)[0]
    assert driven.store.holds(lease.lease_id)


def test_a_late_word_of_a_lease_that_was_handed_back_is_not_taken_for_the_next_ones(driven):
    one, other = driven.greet("actor-0"), driven.greet("actor-1")
    lost = driven.lease(one)
    driven.now += 6
    driven.ask(one, Beat(leases=[]))
    lease = driven.lease(other)
    assert (lease.lease_id, lease.attempt) == (lost.lease_id, 2)
    assert driven.put(one, lost).note == "accepted"
    late = driven.put(other, lease, tree_frames(lease.lease_id, num_tokens=5))
    assert (type(late), late.note) == (Ack, "duplicate")


def test_requests_without_end_of_one_peer_are_sent_away_oldest_first(driven):
    bad, good = driven.greet("guest-0"), driven.greet("actor-0")
    for _ in range(2 * RULES["prompts_per_batch"]):
        driven.put(good, driven.lease(good))
    asks = [encode(AskLease(request=1000 + i, wait_s=60)) for i in range(300)]
    sent = driven.turn([(bad, [ask]) for ask in asks])
    assert [m.request for _, m, _ in sent] == [*range(1000, 1044)]
    assert all(isinstance(m, NoLease) and not m.final for _, m, _ in sent)
    driven.train(driven.greet("learner-0"), 0)


def test_who_sends_what_is_no_message_is_told_for_which_request(driven):
    actor = driven.greet("actor-0")
    frame = msgspec.msgpack.encode({"type": "AskLease", "request": 77, "wait_s": "long"})
    ((_, answer, _),) = driven.turn([(actor, [frame])])
    assert (answer.request, answer.reason) == (77, "invalid")


# ------------------------------------------------------------------ dead letters


class FullLetters(DeadLetters):
    """No room for a letter."""

    is_full = True

    def add(self, letter):
        if self.is_full:
            raise OSError(errno.ENOSPC, "no space left on device")
        super().add(letter)


def given_up(driven, actor):
    lease = driven.lease(actor)
    answer = driven.ask(actor, GiveUp(lease_id=lease.lease_id, attempt=1, reason="EngineError"))
    assert isinstance(answer, Ack)
    return int(lease.lease_id)


def test_a_dead_letter_without_room_waits_and_keeps_nobody_waiting(tmp_path, capsys):
    driven = Driven(tmp_path, max_attempts=1)
    letters = driven.server._group.letters = FullLetters(tmp_path)
    actor = driven.greet("actor-0")
    lost = [given_up(driven, actor), given_up(driven, actor)]
    assert letters.indexes() == set()
    assert capsys.readouterr().out.count("a dead letter cannot be written") == 1
    (tmp_path / "dead_letters.jsonl").write_text('{"prompt_index": 7, "te')
    letters.is_full = False
    driven.turn([])
    assert letters.indexes() == {*lost}, "behind what is left of a line"
    driven.store.close()


def test_a_letter_that_a_killed_replay_did_not_write_is_written_by_the_next(tmp_path):
    driven = Driven(tmp_path, max_attempts=1)
    driven.server._group.letters = FullLetters(tmp_path)
    lost = given_up(driven, driven.greet("actor-0"))
    driven.store.close()
    again = Driven(tmp_path, max_attempts=1)
    again.turn([])
    assert again.server.dead_letters.indexes() == {lost}
    again.turn([])
    again.store.close()
    once = Driven(tmp_path)
    once.turn([])
    assert len((tmp_path / "dead_letters.jsonl").read_text().splitlines()) == 1
    once.store.close()


# ------------------------------------------------------------------ trees that are too old


def test_an_old_tree_whose_prompt_ends_without_another_one_is_not_kept(tmp_path):
    driven = Driven(tmp_path)
    actor, learner = driven.greet("actor-0"), driven.greet("learner-0")
    for _ in range(8):
        driven.put(actor, driven.lease(actor))
    driven.train(learner, 0)
    driven.store.close()
    again = Driven(tmp_path, max_staleness=0, max_attempts=1)
    actor = again.greet("actor-0")
    lease = again.lease(actor)
    assert again.store.holds(lease.lease_id)
    give_up = GiveUp(lease_id=lease.lease_id, attempt=lease.attempt, reason="EngineError")
    assert isinstance(again.ask(actor, give_up), Ack)
    assert again.server.queue.ledger()["quarantined"] == 1
    assert not again.store.holds(lease.lease_id)
    again.store.close()


def test_deadlines_of_leases_wait_for_a_disk_that_takes_nothing(tmp_path, monkeypatch):
    driven = Driven(tmp_path, lease_timeout_s=10.0)
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    with monkeypatch.context() as patch:
        patch.setattr(driven.store, "commit", _no_room)
        driven.turn([(actor, [encode(AskLease(request=99, wait_s=1.0))])])
        driven.turn([], seconds=100.0)
    driven.turn([])
    driven.turn([], seconds=1.0)
    assert driven.server.queue.is_leased(lease.lease_id, lease.attempt)
    driven.turn([], seconds=20.0)
    assert not driven.server.queue.is_leased(lease.lease_id, lease.attempt)
    driven.store.close()


def test_deadlines_of_leases_wait_for_a_disk_that_is_slow(tmp_path, monkeypatch):
    driven = Driven(tmp_path, lease_timeout_s=10.0)
    actor = driven.greet("actor-0")
    lease = driven.lease(actor)
    commit = driven.store.commit

    def slow(*changes):
        driven.now += 100.0
        commit(*changes)

    with monkeypatch.context() as patch:
        patch.setattr(driven.store, "commit", slow)
        driven.turn([(actor, [encode(AskLease(request=99, wait_s=1.0))])])
    driven.turn([], seconds=1.0)
    assert driven.server.queue.is_leased(lease.lease_id, lease.attempt)
    driven.turn([], seconds=20.0)
    assert not driven.server.queue.is_leased(lease.lease_id, lease.attempt)
    driven.store.close()


def _no_room(*_):
    raise OSError(errno.ENOSPC, "no space left on device")


def test_a_replay_that_is_started_again_knows_how_large_trees_are(tmp_path):
    driven = Driven(tmp_path)
    assert driven.server._budget.num_fitting() == MANY
    actor = driven.greet("actor-0")
    driven.put(actor, driven.lease(actor))
    known = driven.server._budget.num_fitting()
    driven.store.close()
    again = Driven(tmp_path)
    assert again.server._budget.num_fitting() == known < MANY
    again.store.close()
