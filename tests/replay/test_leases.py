"""Who gets a lease at the start of a run, when its actors come one after another."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from treepo_async.replay.askers import Asker, Askers
from treepo_async.replay.leases import KEPT_S, Leases
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.types import Prompt
from treepo_async.wire.messages import AskLease

NUM_ACTORS, PER_ACTOR, NUM_PROMPTS = 8, 4, 32
RULES = QueueRules(
    prompts_per_batch=NUM_PROMPTS,
    max_staleness=0,
    num_batches=1,
    lease_timeout_s=1e9,
    max_attempts=3,
    drop_degenerate=True,
    max_refills=64,
    lease_limit_s=1e9,
)


@dataclass
class Answers:
    """Notes who got a lease."""

    peers: list[bytes] = field(default_factory=list)

    def answer(self, peer, lease, frames, *, unsent):
        self.peers.append(peer)


class NoOldTrees:
    def holds(self, lease_id):
        return False


class Names:
    def name_of(self, peer):
        return peer.decode()


def prompt(index):
    return Prompt(f"prompt-{index}", np.array([5], np.int32), "text", "1")


@dataclass
class Handing:
    """Leases as actors ask for them; whoever gets none waits."""

    num_actors: int = NUM_ACTORS
    now: float = 0.0

    def __post_init__(self):
        self.answers, self.askers, self._asked = Answers(), Askers(), 0
        self.queue = Queue(RULES)
        self.leases = Leases(
            self.queue, NoOldTrees(), self.answers, self.askers, Names(), prompt, self.num_actors
        )

    def ask(self, actor, times, kind="actor"):
        for _ in range(times):
            self._asked += 1
            peer = f"{kind}-{actor}".encode()
            self.askers.add(Asker(peer, self._asked, AskLease(wait_s=5.0), deadline=1e9))
        self.leases.hand_out(self.now, lambda: NUM_PROMPTS)

    def had(self, actor):
        return self.answers.peers.count(f"actor-{actor}".encode())


def test_actors_that_come_first_leave_those_that_come_late_their_share():
    handing = Handing()
    for actor in range(NUM_ACTORS):
        handing.ask(actor, 8)
        assert handing.had(actor) == PER_ACTOR
    assert len(handing.answers.peers) == NUM_PROMPTS


def test_once_all_actors_have_had_a_lease_one_may_hold_what_the_others_do_not_want():
    handing = Handing(num_actors=2)
    handing.ask(0, NUM_PROMPTS)
    assert handing.had(0) == NUM_PROMPTS // 2
    handing.ask(1, 1)
    assert (handing.had(0), handing.had(1)) == (NUM_PROMPTS - 1, 1)


def test_the_share_of_an_actor_that_never_comes_goes_to_the_others_after_a_while():
    handing = Handing()
    handing.ask(0, NUM_PROMPTS)
    handing.now = KEPT_S
    handing.ask(0, 0)
    assert handing.had(0) == PER_ACTOR
    handing.now = KEPT_S + 0.1
    handing.ask(0, 0)
    assert handing.had(0) == NUM_PROMPTS


def test_a_guest_is_none_of_those_that_the_shares_wait_for():
    handing = Handing(num_actors=2)
    handing.ask(0, 1)
    handing.ask(0, 1, kind="guest")
    handing.ask(0, NUM_PROMPTS)
    assert handing.had(0) == NUM_PROMPTS // 2


@pytest.mark.parametrize("num_actors", [0, 1])
def test_a_run_of_one_actor_keeps_no_shares(num_actors):
    handing = Handing(num_actors=num_actors)
    handing.ask(0, NUM_PROMPTS)
    assert handing.had(0) == NUM_PROMPTS


def test_of_more_actors_than_prompts_each_may_hold_one():
    handing = Handing(num_actors=2 * NUM_PROMPTS)
    for actor in range(NUM_PROMPTS + 1):
        handing.ask(actor, 2)
    assert [handing.had(actor) for actor in range(NUM_PROMPTS + 1)] == [1] * NUM_PROMPTS + [0]
