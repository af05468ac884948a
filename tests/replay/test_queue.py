from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from treepo_async.errors import RefusedError
from treepo_async.replay.queue import LIVE, Queue, QueueRules, State

FINAL = (State.TRAINED, State.DROPPED, State.QUARANTINED)


def queue_of(**changes):
    rules = {
        "prompts_per_batch": 2,
        "max_staleness": 1,
        "num_batches": 10,
        "lease_timeout_s": 60.0,
        "max_attempts": 3,
        "drop_degenerate": True,
        "max_refills": 64,
    }
    return Queue(QueueRules(**{**rules, **changes}))


def put(queue, entry, *, oldest_step=0, has_spread=True, is_scored=True, attempt=None):
    return queue.accept(
        entry.lease_id,
        entry.attempt if attempt is None else attempt,
        oldest_step=oldest_step,
        has_spread=has_spread,
        is_scored=is_scored,
    )


def lease_all(queue, now=0.0):
    entries = []
    while queue.may_lease():
        entries.append(queue.lease(now))
    return entries


# ------------------------------------------------------------------ leases


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_admission_lets_as_many_prompts_out_as_staleness_allows(max_staleness):
    queue = queue_of(max_staleness=max_staleness)
    assert len(lease_all(queue)) == (max_staleness + 1) * 2
    queue.publish(1, 0)
    assert len(lease_all(queue)) == 2, "each publication makes room for one batch"


def test_no_prompt_is_leased_beyond_the_last_batch():
    queue = queue_of(num_batches=3, max_staleness=9)
    assert len(lease_all(queue)) == 3 * 2


def test_leases_are_numbered_in_order_and_carry_their_prompt():
    first, second = lease_all(queue_of(max_staleness=0))
    assert (first.lease_id, first.prompt_index, first.attempt) == ("000000000", 0, 1)
    assert (second.lease_id, second.prompt_index) == ("000000001", 1)


def test_least_step_follows_from_the_place_in_the_order():
    queue = queue_of(max_staleness=1)
    queue.published = 2
    entries = lease_all(queue)
    assert [queue.least_step(e.lease_id) for e in entries] == [0, 0, 0, 0, 1, 1, 2, 2]


def test_a_silent_actors_lease_waits_and_goes_to_the_next_who_asks():
    queue = queue_of(max_staleness=0, lease_timeout_s=10)
    first, second = lease_all(queue)
    queue.beat([second.lease_id], now=8)
    assert queue.expire(now=10.5) == [first]
    assert (first.state, second.state) == (State.WAITING, State.LEASED)
    assert queue.lease(now=11) is first
    assert (first.attempt, first.deadline) == (2, 21)
    assert queue.expire(now=18.5) == [second], "the beat counted from when it came"


def test_a_beat_for_a_lease_that_is_not_out_changes_nothing():
    queue = queue_of(max_staleness=0)
    first, _ = lease_all(queue)
    put(queue, first)
    queue.beat([first.lease_id, "never"], now=5)
    assert first.state is State.ACCEPTED


def test_an_actor_that_gives_up_lets_another_try():
    queue = queue_of()
    first = queue.lease(0)
    queue.give_up(first.lease_id, 1, "EngineError")
    assert queue.lease(0) is first
    assert queue.reasons == {"EngineError": 1}


def test_late_words_about_an_older_attempt_change_nothing():
    queue = queue_of(lease_timeout_s=10)
    first = queue.lease(0)
    queue.expire(11)
    queue.lease(12)
    queue.give_up(first.lease_id, 1, "EngineError")
    assert (first.state, first.attempt) == (State.LEASED, 2)


def test_a_prompt_is_quarantined_after_its_last_attempt_and_replaced():
    queue = queue_of(max_attempts=3, max_staleness=0)
    poison, other = lease_all(queue)
    for attempt in (1, 2, 3):
        queue.give_up(poison.lease_id, attempt, "EngineError")
        assert queue.may_lease()
        if attempt < 3:
            assert queue.lease(0) is poison
    assert poison.state is State.QUARANTINED
    replacement = queue.lease(0)
    assert replacement.prompt_index == 2
    for entry in (other, replacement):
        put(queue, entry)
    assert queue.next_batch(0) == [other, replacement]
    assert queue.reasons == {"EngineError": 3, "too_many_attempts": 1}
    assert put(queue, poison) == "duplicate", "its late tree comes to nothing"


def test_a_lease_that_did_not_reach_its_actor_costs_no_attempt():
    queue = queue_of(max_attempts=1)
    first = queue.lease(0)
    for _ in range(5):
        queue.hand_back(first.lease_id, 1)
        assert first.state is State.WAITING
        queue.check_integrity()
        assert queue.lease(0) is first
    assert (first.state, first.attempt) == (State.LEASED, 1)


def test_only_a_lease_that_is_out_at_that_attempt_is_handed_back():
    queue = queue_of()
    first = queue.lease(0)
    queue.hand_back(first.lease_id, 2)
    queue.hand_back("never", 1)
    assert (first.state, first.attempt) == (State.LEASED, 1)
    put(queue, first)
    queue.hand_back(first.lease_id, 1)
    assert first.state is State.ACCEPTED


# ------------------------------------------------------------------ trees


def test_the_first_tree_of_a_lease_counts_and_later_ones_are_duplicates():
    queue = queue_of(max_staleness=0)
    first, second = lease_all(queue)
    assert put(queue, first) == "accepted"
    assert put(queue, first, has_spread=False) == "duplicate"
    put(queue, second)
    queue.next_batch(0)
    assert put(queue, first) == "duplicate"
    queue.publish(1, 0)
    assert put(queue, first) == "duplicate"
    assert first.state is State.TRAINED


def test_an_older_attempt_may_deliver_while_a_newer_one_runs():
    queue = queue_of(lease_timeout_s=10)
    first = queue.lease(0)
    queue.expire(11)
    assert put(queue, first, attempt=1) == "accepted", "also while nobody works on it"
    second = queue.lease(0)
    queue.expire(11)
    queue.lease(12)
    assert put(queue, second, attempt=1) == "accepted"


def test_a_tree_for_a_lease_never_given_is_refused():
    with pytest.raises(RefusedError, match="never given") as caught:
        queue_of().accept("000000007", 1, oldest_step=0, has_spread=True, is_scored=True)
    assert (caught.value.reason, caught.value.retry) == ("unknown_lease", False)


def stale_queue():
    """A queue whose third lease needs policy step 1."""
    queue = queue_of(max_staleness=0)
    for entry in lease_all(queue):
        put(queue, entry)
    queue.next_batch(0)
    queue.publish(1, 0)
    return queue, queue.lease(0)


def test_a_tree_older_than_its_lease_allows_is_refused_and_the_prompt_waits():
    queue, entry = stale_queue()
    with pytest.raises(RefusedError, match=r"policy step 0, lease 000000002 needs 1") as caught:
        put(queue, entry, oldest_step=0)
    assert caught.value.reason == "stale"
    assert entry.state is State.WAITING
    assert queue.lease(0) is entry
    assert put(queue, entry, oldest_step=1) == "accepted"


def test_a_stale_tree_of_an_older_attempt_leaves_the_running_one_alone():
    queue, entry = stale_queue()
    queue.expire(now=1000)
    queue.lease(1000)
    for _ in range(5):
        with pytest.raises(RefusedError, match="stale"):
            put(queue, entry, oldest_step=0, attempt=1)
    assert (entry.state, entry.attempt) == (State.LEASED, 2)
    assert queue.reasons["stale"] == 0


def test_a_stale_tree_sent_twice_counts_once():
    queue, entry = stale_queue()
    for _ in range(5):
        with pytest.raises(RefusedError, match="stale"):
            put(queue, entry, oldest_step=0, attempt=1)
    assert entry.state is State.WAITING
    assert queue.reasons["stale"] == 1


def test_a_tree_without_any_reward_is_dropped_and_replaced():
    queue = queue_of(max_staleness=0, drop_degenerate=False)
    first, _ = lease_all(queue)
    assert put(queue, first, is_scored=False, has_spread=False) == "reward_error"
    assert first.state is State.DROPPED
    assert queue.lease(0).prompt_index == 2


def test_degenerate_trees_are_replaced_at_once_up_to_max_refills():
    queue = queue_of(max_staleness=0, max_refills=3)
    outcomes = []
    while queue.may_lease():
        outcomes.append(put(queue, queue.lease(0), has_spread=False))
    assert outcomes == ["degenerate"] * 3 + ["accepted"] * 2
    assert queue.next_batch(0) is not None
    queue.publish(1, 0)
    assert put(queue, queue.lease(0), oldest_step=1, has_spread=False) == "degenerate", (
        "refills count anew for the next batch"
    )


def test_degenerate_trees_are_kept_where_they_shall_not_be_dropped():
    queue = queue_of(drop_degenerate=False)
    assert put(queue, queue.lease(0), has_spread=False) == "accepted"


def test_a_drop_lowers_the_least_step_of_those_behind_it():
    queue = queue_of(max_staleness=1, prompts_per_batch=1)
    queue.published = 2
    first, second, third = (queue.lease(0) for _ in range(3))
    assert queue.least_step(third.lease_id) == 1
    put(queue, first, has_spread=False)
    assert queue.least_step(third.lease_id) == 0
    assert put(queue, third, oldest_step=0) == "accepted"
    put(queue, second)
    assert queue.next_batch(0) == [second]
    assert queue.next_batch(1) == [third]


# ------------------------------------------------------------------ batches


def test_a_batch_is_in_lease_order_and_waits_for_the_first():
    queue = queue_of(max_staleness=1)
    entries = lease_all(queue)
    for entry in reversed(entries[1:]):
        put(queue, entry)
    assert queue.next_batch(0) is None
    assert queue.missing() == "1 of 2 trees are in, 1 being grown, 0 waiting for an actor"
    put(queue, entries[0])
    assert queue.next_batch(0) == entries[:2]
    assert queue.next_batch(1) == entries[2:]


def test_a_batch_asked_for_again_is_the_same():
    queue = queue_of()
    for entry in lease_all(queue):
        put(queue, entry)
    batch = queue.next_batch(0)
    assert queue.next_batch(0) == batch
    assert [e.state for e in batch] == [State.CONSUMED] * 2
    queue.publish(1, 0)
    assert [e.state for e in batch] == [State.TRAINED] * 2


@pytest.mark.parametrize("step", [-1, 1, 7])
def test_a_step_that_is_not_the_next_is_refused(step):
    queue = queue_of(prompts_per_batch=1)
    put(queue, queue.lease(0))
    with pytest.raises(RefusedError, match=f"asked for {step}, next is 0"):
        queue.next_batch(step)
    assert queue.next_batch(0) is not None


def test_at_staleness_zero_nothing_is_leased_between_consumption_and_publication():
    queue = queue_of(max_staleness=0)
    for entry in lease_all(queue):
        put(queue, entry)
    queue.next_batch(0)
    assert not queue.may_lease()
    queue.publish(1, 0)
    assert queue.may_lease()


def test_an_older_publication_never_lowers_the_newest_one():
    queue = queue_of()
    queue.publish(3, 2)
    queue.publish(2, 1)
    assert queue.published == 3


def test_the_end_of_the_data_ends_leases_and_batches():
    queue = queue_of(max_staleness=9)
    entries = [queue.lease(0) for _ in range(4)]
    for entry in entries[:3]:
        put(queue, entry)
    queue.end_of_data(entries[3].lease_id)
    assert not queue.may_lease()
    assert not queue.is_over(), "one full batch is there"
    assert queue.is_finished()
    assert queue.next_batch(0) == entries[:2]
    assert queue.next_batch(1) is None
    assert queue.is_over()


def test_at_the_end_of_the_data_a_tree_that_is_out_is_still_waited_for():
    queue = queue_of(max_staleness=9)
    entries = [queue.lease(0) for _ in range(3)]
    queue.end_of_data(entries[2].lease_id)
    assert not queue.is_over()
    assert not queue.is_finished()
    queue.give_up(entries[0].lease_id, 1, "EngineError")
    assert queue.may_lease(), "a prompt that has been given before can be given again"
    for entry in entries[:2]:
        put(queue, entry)
    assert queue.is_finished()


def test_a_prompt_that_cannot_be_used_is_dropped_and_replaced():
    queue = queue_of(max_staleness=0)
    first, _ = lease_all(queue)
    queue.skip(first.lease_id, "bad_prompt")
    assert queue.lease(0).prompt_index == 2
    assert queue.ledger() == {"dropped": 1, "leased": 2, "reason/bad_prompt": 1}


def test_the_queue_is_finished_once_the_last_batch_is_in():
    queue = queue_of(num_batches=1, max_staleness=5)
    first, second = lease_all(queue)
    put(queue, first)
    assert not queue.is_finished(), "the second may still fail"
    put(queue, second)
    assert queue.is_finished()
    queue.next_batch(0)
    assert queue.is_finished()


def test_the_ledger_counts_every_entry_once():
    queue = queue_of(max_staleness=1, max_attempts=1)
    first, second, third, fourth = lease_all(queue)
    put(queue, first)
    put(queue, second, has_spread=False)
    queue.give_up(third.lease_id, 1, "DeadlineError")
    assert queue.ledger() == {
        "accepted": 1,
        "dropped": 1,
        "quarantined": 1,
        "leased": 1,
        "reason/degenerate": 1,
        "reason/DeadlineError": 1,
        "reason/too_many_attempts": 1,
    }
    assert fourth.state is State.LEASED


# ------------------------------------------------------------------ any order of events


class AnyOrder(RuleBasedStateMachine):
    """Actors and a learner that do whatever they like; in the end, a willing pair must still finish the run."""

    @initialize(
        max_staleness=st.integers(0, 2),
        prompts_per_batch=st.integers(1, 3),
        num_batches=st.integers(1, 4),
        max_attempts=st.integers(1, 3),
        drop_degenerate=st.booleans(),
        max_refills=st.integers(0, 3),
    )
    def begin(self, **rules):
        self.queue = Queue(QueueRules(lease_timeout_s=10.0, **rules))
        self.rules = self.queue.rules
        self.now = 0.0
        self.step = 0
        """Of the batch that is asked for next."""
        self.in_training = False
        self.given: list[tuple[str, int]] = []
        """Every lease and attempt that went out."""
        self.oldest_step: dict[str, int] = {}
        """Of each accepted tree."""
        self.last_trained = ""
        self.ended: dict[str, State] = {}

    # ---------------------------------------------------------------- actors

    @precondition(lambda self: self.queue.may_lease())
    @rule(fate=st.sampled_from(["given", "given", "given", "bad prompt", "lost on the way"]))
    def lease(self, fate):
        entry = self.queue.lease(self.now)
        is_new = entry.lease_id not in {lease_id for lease_id, _ in self.given}
        assert self.queue.least_step(entry.lease_id) <= self.queue.published, "can be sampled now"
        if fate == "bad prompt" and is_new:
            self.queue.skip(entry.lease_id, "bad_prompt")
        elif fate == "lost on the way":
            self.queue.hand_back(entry.lease_id, entry.attempt)
        else:
            self.given.append((entry.lease_id, entry.attempt))

    @precondition(lambda self: self.queue.may_lease())
    @rule()
    def end_of_data(self):
        entry = self.queue.lease(self.now)
        if entry.attempt == 1 and entry.lease_id not in {lease_id for lease_id, _ in self.given}:
            self.queue.end_of_data(entry.lease_id)
            assert self.queue.exhausted
            assert entry.lease_id not in self.queue.entries
        else:
            self.given.append((entry.lease_id, entry.attempt))

    @precondition(lambda self: self.given)
    @rule(data=st.data(), seconds=st.floats(0, 12))
    def time_passes(self, data, seconds):
        alive = data.draw(st.lists(st.sampled_from(self.given), max_size=4), label="alive")
        self.now += seconds
        beaten = [lease_id for lease_id, _ in alive]
        self.queue.beat(beaten, self.now)
        for entry in self.queue.expire(self.now):
            assert entry.lease_id not in beaten
            assert entry.state in (State.WAITING, State.QUARANTINED)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def give_up(self, data):
        lease_id, attempt = data.draw(st.sampled_from(self.given))
        before = self.queue.entries[lease_id].state
        was_out = self.queue.is_leased(lease_id, attempt)
        self.queue.give_up(lease_id, attempt, "EngineError")
        if not was_out:
            assert self.queue.entries[lease_id].state is before

    @precondition(lambda self: self.given)
    @rule(data=st.data(), age=st.integers(0, 3), has_spread=st.booleans(), is_scored=st.booleans())
    def deliver(self, data, age, has_spread, is_scored):
        lease_id, attempt = data.draw(st.sampled_from(self.given))
        self.put(lease_id, attempt, max(0, self.queue.published - age), has_spread, is_scored)

    @rule(ages=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=6))
    def work(self, ages):
        """Lease what there is, and deliver trees of these ages; None is not ready yet."""
        while self.queue.may_lease():
            entry = self.queue.lease(self.now)
            self.given.append((entry.lease_id, entry.attempt))
        entries = [e for e in self.queue.entries.values() if e.state is State.LEASED]
        for entry, age in zip(entries, ages, strict=False):
            if age is not None:
                oldest_step = max(0, self.queue.published - age)
                self.put(entry.lease_id, entry.attempt, oldest_step, True, True)

    @rule(lease_id=st.sampled_from(["", "999999999", "x"]))
    def deliver_for_no_lease(self, lease_id):
        with pytest.raises(RefusedError, match="unknown_lease"):
            self.queue.accept(lease_id, 1, oldest_step=0, has_spread=True, is_scored=True)

    def put(self, lease_id, attempt, oldest_step, has_spread, is_scored):
        entry = self.queue.entries[lease_id]
        before, runs = entry.state, self.queue.is_leased(lease_id, attempt)
        is_open = before in (State.WAITING, State.LEASED)
        is_stale = is_open and oldest_step < self.queue.least_step(lease_id)
        tree = {"oldest_step": oldest_step, "has_spread": has_spread, "is_scored": is_scored}
        if is_stale:
            with pytest.raises(RefusedError, match="stale"):
                self.queue.accept(lease_id, attempt, **tree)
            assert runs or entry.state is before, "who runs now is left alone"
            return
        outcome = self.queue.accept(lease_id, attempt, **tree)
        assert (outcome == "duplicate") == (not is_open)
        if outcome == "duplicate":
            assert entry.state is before
        elif outcome == "accepted":
            assert is_scored
            assert lease_id not in self.oldest_step, "at most one tree of a lease"
            self.oldest_step[lease_id] = oldest_step
        else:
            assert entry.state is State.DROPPED
            assert outcome == ("reward_error" if not is_scored else "degenerate")

    # ---------------------------------------------------------------- learner

    @precondition(lambda self: not self.in_training and self.step < self.rules.num_batches)
    @rule()
    def ask_batch(self):
        batch = self.queue.next_batch(self.step)
        if batch is None:
            return
        lease_ids = [entry.lease_id for entry in batch]
        assert len(batch) == self.rules.prompts_per_batch
        assert lease_ids == sorted(lease_ids), "lease order"
        assert lease_ids[0] > self.last_trained, "lease order across batches"
        for lease_id in lease_ids:
            assert self.oldest_step[lease_id] >= self.step - self.rules.max_staleness
        assert self.queue.next_batch(self.step) == batch, "asked again"
        self.in_training, self.last_trained = True, lease_ids[-1]

    @precondition(lambda self: not self.in_training and self.step < self.rules.num_batches)
    @rule()
    def train(self):
        self.ask_batch()
        if self.in_training:
            self.publish()

    @precondition(lambda self: self.in_training)
    @rule()
    def publish(self):
        self.queue.publish(self.step + 1, consumed_step=self.step)
        self.step += 1
        self.in_training = False

    # ---------------------------------------------------------------- always

    @invariant()
    def is_whole(self):
        self.queue.check_integrity()

    @invariant()
    def what_has_ended_stays_so(self):
        for lease_id, entry in self.queue.entries.items():
            if entry.state in FINAL:
                assert self.ended.setdefault(lease_id, entry.state) is entry.state
            else:
                assert lease_id not in self.ended

    @invariant()
    def the_ledger_adds_up(self):
        states = Counter(str(e.state) for e in self.queue.entries.values())
        ledger = self.queue.ledger()
        assert {k: n for k, n in ledger.items() if not k.startswith("reason/")} == states
        assert sum(states.values()) == len(self.queue.entries)

    def teardown(self):
        """From wherever this has led, an actor whose trees are all degenerate brings the run to its end."""
        if not hasattr(self, "queue"):
            return
        for _ in range(200):
            if self.in_training:
                self.publish()
            while self.queue.may_lease():
                entry = self.queue.lease(self.now)
                self.given.append((entry.lease_id, entry.attempt))
            for lease_id, entry in list(self.queue.entries.items()):
                if entry.state is State.LEASED:
                    self.put(lease_id, entry.attempt, self.queue.published, False, True)
            if self.step == self.rules.num_batches or self.queue.is_over():
                break
            self.ask_batch()
            self.is_whole()
        assert self.step == self.rules.num_batches or self.queue.exhausted, "no deadlock"
        assert not self.queue.may_lease()
        assert self.queue.is_finished()
        left = [e for e in self.queue.entries.values() if e.state not in FINAL]
        assert all(e.state in LIVE for e in left)
        assert len(left) == 0 or self.queue.exhausted
        trained = [e for e in self.queue.entries.values() if e.state is State.TRAINED]
        assert len(trained) == self.step * self.rules.prompts_per_batch


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
