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
from treepo_async.replay.entry import LIVE, State
from treepo_async.replay.position import QueuePosition
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules


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


# ------------------------------------------------------------------ going back


def trained_queue(num_trained, **changes):
    """A queue whose first batches are trained and not retired, and their lease ids."""
    queue = queue_of(**changes)
    batches = []
    for step in range(num_trained):
        for entry in lease_all(queue):
            put(queue, entry, oldest_step=step)
        batches.append([entry.lease_id for entry in queue.next_batch(step)])
        queue.publish(step + 1, step)
    return queue, batches


def ids_of(entries):
    return [entry.lease_id for entry in entries]


def restored(queue):
    """The queue after its process died, as far as it had been written."""
    _, position = QueuePosition.parse(queue.position().to_json("run"))
    return Queue.from_position(queue.rules, position)


def test_a_learner_that_goes_back_gets_the_same_trees_in_the_same_order_until_they_are_retired():
    queue, batches = trained_queue(4)
    ledger = queue.ledger()
    for step in range(4):
        assert ids_of(queue.next_batch(step)) == batches[step]
        queue.publish(step + 1, step)
    assert (queue.published, queue.ledger()) == (4, ledger)
    assert ids_of(queue.retire(1)) == [*batches[0], *batches[1]]
    assert queue.ledger() == ledger, "retired ones stay counted"
    with pytest.raises(RefusedError, match="wrong_step: asked for 1, next is 4"):
        queue.next_batch(1)
    assert ids_of(queue.next_batch(2)) == batches[2]


def test_retiring_again_or_beyond_what_is_consumed_does_nothing():
    queue, batches = trained_queue(2)
    assert len(queue.retire(0)) == 2
    assert queue.retire(0) == []
    assert ids_of(queue.retire(99)) == batches[1]
    assert queue.position().num_retired == 2
    queue.check_integrity()


def test_what_has_ended_is_counted_and_not_kept():
    queue, _ = trained_queue(9, num_batches=9, max_staleness=0)
    queue.retire(8)
    assert list(queue.order.kept()) == []
    assert queue.ledger() == {"trained": 18}
    for lease_id in ("000000000", "000000017"):
        assert queue.accept(lease_id, 1, oldest_step=9, has_spread=True, is_scored=True) == (
            "duplicate"
        )
    with pytest.raises(RefusedError, match="unknown_lease"):
        queue.accept("000000018", 1, oldest_step=9, has_spread=True, is_scored=True)


def test_a_restored_queue_hands_out_the_same_leases_in_the_same_order():
    queue, _ = trained_queue(1, max_staleness=2)
    live = [entry.lease_id for entry in queue.order.live.values()]
    states = {entry.state for entry in queue.order.live.values()}
    assert State.ACCEPTED in states
    before = queue.ledger()
    queue = restored(queue)
    assert queue.ledger() == {"trained": 2, "waiting": 4}
    assert sum(before.values()) == 6
    assert [entry.lease_id for entry in lease_all(queue)][:4] == live
    queue.check_integrity()


def test_a_restored_queue_stands_where_the_other_stood():
    queue, _ = trained_queue(3, max_refills=1, prompts_per_batch=1, max_staleness=1)
    queue.retire(0)
    first = queue.lease(0)
    assert put(queue, first, oldest_step=3, has_spread=False) == "degenerate"
    queue.end_of_data(queue.lease(0).lease_id)
    again = restored(queue)
    assert again.position() == queue.position()
    assert again.exhausted
    queue.exhausted = False
    again = restored(queue)
    refill = again.lease(0)
    assert put(again, refill, oldest_step=3, has_spread=False) == "accepted", "its refills are used"


def test_a_batch_that_is_grown_again_may_be_refilled_again():
    queue, batches = trained_queue(1, max_refills=1, max_staleness=0)
    entry = queue.lease(0)
    assert put(queue, entry, oldest_step=1, has_spread=False) == "degenerate"
    queue.unconsume(0, has_tree=lambda _: False)
    entry = queue.lease(0)
    assert entry.lease_id == batches[0][0]
    assert put(queue, entry, oldest_step=1, has_spread=False) == "degenerate"


def test_a_tree_that_was_grown_before_the_restart_is_accepted_whatever_its_attempt():
    queue = queue_of(max_staleness=0, max_attempts=3)
    first, second = lease_all(queue)
    queue.give_up(first.lease_id, 1, "EngineError")
    assert queue.lease(0).attempt == 2
    queue = restored(queue)
    assert put(queue, first, attempt=2) == "accepted"
    assert put(queue, second) == "accepted"
    queue.check_integrity()
    assert ids_of(queue.next_batch(0)) == [first.lease_id, second.lease_id]


def test_a_tree_of_a_lease_given_after_the_last_position_is_refused_and_the_lease_given_anew():
    queue = queue_of()
    position = queue.position()
    lost = queue.lease(0)
    queue = Queue.from_position(queue.rules, position)
    with pytest.raises(RefusedError, match="unknown_lease"):
        put(queue, lost)
    queue.give_up(lost.lease_id, 1, "EngineError")
    queue.beat([lost.lease_id], 5)
    assert queue.lease(0).prompt_index == lost.prompt_index


def test_a_publication_that_is_told_to_a_restored_queue_trains_its_batch():
    queue = queue_of()
    for entry in lease_all(queue):
        put(queue, entry)
    queue.next_batch(0)
    queue = restored(queue)
    assert queue.ledger() == {"consumed": 2, "waiting": 2}
    queue.publish(1, 0)
    assert queue.ledger() == {"trained": 2, "waiting": 2}


def test_a_lost_batch_and_all_later_ones_return_to_the_front():
    queue, batches = trained_queue(3)
    queue.retire(0)
    queue = restored(queue)
    live = [entry.lease_id for entry in queue.order.live.values()]
    lost = queue.unconsume(1, has_tree=lambda _: False)
    assert ids_of(lost) == [*batches[1], *batches[2]]
    assert list(queue.order.live) == [*batches[1], *batches[2], *live]
    assert queue.ledger() == {"trained": 2, "waiting": 4 + len(live)}
    queue.check_integrity()
    for entry in lease_all(queue)[:2]:
        put(queue, entry, oldest_step=queue.published)
    assert ids_of(queue.next_batch(1)) == batches[1]
    assert queue.next_batch(2) is None


def test_a_later_batch_whose_trees_are_still_there_needs_no_actor():
    queue, batches = trained_queue(2)
    lost = queue.unconsume(0, has_tree=lambda lease_id: lease_id != batches[0][1])
    assert ids_of(lost) == [batches[0][1]]
    entry = queue.lease(0)
    assert (entry.lease_id, entry.attempt) == (batches[0][1], 1)
    put(queue, entry, oldest_step=2)
    assert ids_of(queue.next_batch(0)) == batches[0]
    assert ids_of(queue.next_batch(1)) == batches[1]


def test_a_resumed_queue_leases_no_further_ahead_than_a_new_one_would():
    queue, _ = trained_queue(4, max_staleness=1)
    lease_all(queue)
    queue = Queue.from_position(queue.rules, queue.position().resumed_at(1))
    assert (queue.published, queue.ledger()["trained"]) == (1, 2)
    assert ids_of(lease_all(queue)) == [f"{i:09d}" for i in (2, 3, 4, 5)]
    assert queue.ledger()["waiting"] > 0
    queue.check_integrity()


def test_the_entry_beyond_the_data_counts_as_never_leased():
    queue = queue_of()
    lease_all(queue)
    queue = restored(queue)
    for _ in range(2):
        queue.lease(0)
    late = queue.lease(0)
    queue.end_of_data(late.lease_id)
    assert queue.ledger()["dropped"] == 1, (
        "a shorter data file than before: one was leased after it"
    )
    last = queue.lease(0)
    queue.end_of_data(last.lease_id)
    assert queue.position().next_index == 3
    queue.check_integrity()


# ------------------------------------------------------------------ any order of events


class AnyOrder(RuleBasedStateMachine):
    """Actors and a learner that do whatever they like, and processes that die.

    In the end, a willing pair must still finish the run.
    """

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
        """Of each tree that is in the spool."""
        self.batches: dict[int, list[str]] = {}
        """That the learner got, by step."""
        self.ended: set[str] = set()
        """Dropped or quarantined."""
        self.num_leased = 0
        self.at_checkpoint: dict[int, tuple[str, set[str]]] = {}
        self.save()

    def save(self):
        """What is on disk: the position, and beside it what the test itself knows at that moment."""
        self.saved = self.queue.position().to_json("run"), set(self.ended)

    def load(self, saved, step=None):
        text, self.ended = saved[0], set(saved[1])
        _, position = QueuePosition.parse(text)
        self.queue = Queue.from_position(
            self.rules, position if step is None else position.resumed_at(step)
        )
        self.num_leased = position.next_index
        self.oldest_step = {}

    def state(self, lease_id):
        """Of an entry that is kept; None for all others."""
        kept = {entry.lease_id: entry.state for entry in self.queue.order.kept()}
        return kept.get(lease_id)

    # ---------------------------------------------------------------- actors

    def take(self):
        """A lease, counted."""
        known = {entry.lease_id for entry in self.queue.order.kept()}
        entry = self.queue.lease(self.now)
        self.num_leased += entry.lease_id not in known
        return entry, entry.lease_id not in known

    @precondition(lambda self: self.queue.may_lease())
    @rule(fate=st.sampled_from(["given", "given", "given", "bad prompt", "lost on the way"]))
    def lease(self, fate):
        entry, is_new = self.take()
        assert self.queue.least_step(entry.lease_id) <= self.queue.published, "can be sampled now"
        if fate == "bad prompt" and is_new:
            self.queue.skip(entry.lease_id, "bad_prompt")
            self.ended.add(entry.lease_id)
        elif fate == "lost on the way":
            self.queue.hand_back(entry.lease_id, entry.attempt)
        else:
            self.given.append((entry.lease_id, entry.attempt))

    @precondition(lambda self: self.queue.may_lease())
    @rule()
    def end_of_data(self):
        entry, is_new = self.take()
        if is_new:
            self.queue.end_of_data(entry.lease_id)
            self.num_leased -= 1
            assert self.queue.exhausted
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
            if entry.state is State.QUARANTINED:
                self.ended.add(entry.lease_id)

    @precondition(lambda self: self.given)
    @rule(data=st.data())
    def give_up(self, data):
        lease_id, attempt = data.draw(st.sampled_from(self.given))
        before = self.state(lease_id)
        was_out = self.queue.is_leased(lease_id, attempt)
        is_lost = self.queue.give_up(lease_id, attempt, "EngineError")
        if is_lost:
            self.ended.add(lease_id)
        expected = before if not was_out else None if is_lost else State.WAITING
        assert self.state(lease_id) is expected

    @precondition(lambda self: self.given)
    @rule(data=st.data(), age=st.integers(0, 3), has_spread=st.booleans(), is_scored=st.booleans())
    def deliver(self, data, age, has_spread, is_scored):
        lease_id, attempt = data.draw(st.sampled_from(self.given))
        self.put(lease_id, attempt, max(0, self.queue.published - age), has_spread, is_scored)

    @rule(ages=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=6))
    def work(self, ages):
        """Lease what there is, and deliver trees of these ages; None is not ready yet."""
        while self.queue.may_lease():
            entry, _ = self.take()
            self.given.append((entry.lease_id, entry.attempt))
        entries = [e for e in self.queue.order.live.values() if e.state is State.LEASED]
        for entry, age in zip(entries, ages, strict=False):
            if age is not None:
                oldest_step = max(0, self.queue.published - age)
                self.put(entry.lease_id, entry.attempt, oldest_step, True, True)

    @rule(lease_id=st.sampled_from(["", "999999999", "x", "0", "٠٠٠٠٠٠٠٠٠", "9" * 5000]))
    def deliver_for_no_lease(self, lease_id):
        with pytest.raises(RefusedError, match="unknown_lease"):
            self.queue.accept(lease_id, 1, oldest_step=0, has_spread=True, is_scored=True)

    def put(self, lease_id, attempt, oldest_step, has_spread, is_scored):
        tree = {"oldest_step": oldest_step, "has_spread": has_spread, "is_scored": is_scored}
        before, runs = self.state(lease_id), self.queue.is_leased(lease_id, attempt)
        if int(lease_id) >= self.num_leased:
            with pytest.raises(RefusedError, match="unknown_lease"):
                self.queue.accept(lease_id, attempt, **tree)
            return
        is_open = before in (State.WAITING, State.LEASED)
        if is_open and oldest_step < self.queue.least_step(lease_id):
            with pytest.raises(RefusedError, match="stale"):
                self.queue.accept(lease_id, attempt, **tree)
            assert runs or self.state(lease_id) is before, "who runs now is left alone"
            if self.state(lease_id) is None:
                self.ended.add(lease_id)
            return
        outcome = self.queue.accept(lease_id, attempt, **tree)
        assert (outcome == "duplicate") == (not is_open)
        if outcome == "duplicate":
            assert self.state(lease_id) is before
        elif outcome == "accepted":
            assert is_scored
            assert lease_id not in self.oldest_step, "at most one tree of a lease"
            self.oldest_step[lease_id] = oldest_step
        else:
            self.ended.add(lease_id)
            assert self.state(lease_id) is None
            assert outcome == ("reward_error" if not is_scored else "degenerate")

    # ---------------------------------------------------------------- learner

    @precondition(lambda self: not self.in_training and self.step < self.rules.num_batches)
    @rule()
    def ask_batch(self):
        batch = self.queue.next_batch(self.step)
        if batch is None:
            return
        lease_ids = ids_of(batch)
        self.save()
        if not self.oldest_step.keys() >= set(lease_ids):
            self.grow_again()
            return
        assert lease_ids == self.batches.get(self.step, lease_ids), "asked again"
        self.batches[self.step] = lease_ids
        assert len(batch) == self.rules.prompts_per_batch
        before = self.batches[self.step - 1][-1:] if self.step else []
        assert [*before, *lease_ids] == sorted([*before, *lease_ids]), "lease order across batches"
        for lease_id in lease_ids:
            assert self.oldest_step[lease_id] >= self.step - self.rules.max_staleness
        assert ids_of(self.queue.next_batch(self.step)) == lease_ids, "asked again at once"
        self.in_training = True

    def grow_again(self):
        lost = self.queue.unconsume(self.step, has_tree=self.oldest_step.__contains__)
        assert lost
        assert {entry.lease_id for entry in lost}.isdisjoint(self.oldest_step)
        assert self.queue.next_batch(self.step) is None
        self.batches = {step: ids for step, ids in self.batches.items() if step < self.step}
        self.save()

    @precondition(lambda self: not self.in_training and self.step < self.rules.num_batches)
    @rule()
    def train(self):
        self.ask_batch()
        if self.in_training:
            self.publish()

    @precondition(lambda self: self.in_training)
    @rule()
    def publish(self):
        newest = self.queue.published
        self.queue.publish(self.step + 1, consumed_step=self.step)
        assert self.queue.published == max(newest, self.step + 1)
        self.step += 1
        self.in_training = False
        self.save()
        self.at_checkpoint[self.step] = self.saved

    @precondition(lambda self: not self.in_training and self.step in self.at_checkpoint)
    @rule()
    def retire(self):
        retired = self.queue.retire(self.step - 1)
        for entry in retired:
            self.oldest_step.pop(entry.lease_id, None)
        self.batches.pop(self.step - 2, None)
        self.at_checkpoint = {s: p for s, p in self.at_checkpoint.items() if s >= self.step}
        self.save()

    @rule(data=st.data())
    def learner_goes_back(self, data):
        retired = self.queue.position().num_retired
        self.step = data.draw(st.integers(min(retired, self.step), self.step), label="step")
        self.in_training = False
        # it goes back to its newest checkpoint
        self.at_checkpoint = {s: p for s, p in self.at_checkpoint.items() if s <= self.step}

    # ---------------------------------------------------------------- death

    @rule()
    def replay_dies(self):
        """Everything since the last position is forgotten, and all trees; actors and learner know nothing of it."""
        self.load(self.saved)

    @precondition(lambda self: self.at_checkpoint)
    @rule(data=st.data())
    def the_run_is_resumed(self, data):
        step = data.draw(st.sampled_from(sorted(self.at_checkpoint)), label="step")
        self.load(self.at_checkpoint[step], step)
        self.step, self.in_training, self.given = step, False, []
        self.batches = {s: ids for s, ids in self.batches.items() if s < step}
        # it is the newest checkpoint that is whole
        self.at_checkpoint = {s: p for s, p in self.at_checkpoint.items() if s <= step}
        assert self.queue.published == step
        self.save()

    # ---------------------------------------------------------------- always

    @invariant()
    def is_whole(self):
        self.queue.check_integrity()

    @invariant()
    def every_prompt_that_was_leased_is_in_the_ledger_once(self):
        states = {k: n for k, n in self.queue.ledger().items() if not k.startswith("reason/")}
        assert sum(states.values()) == self.num_leased
        assert states.keys() <= {str(state) for state in State}
        assert states.get("dropped", 0) + states.get("quarantined", 0) == len(self.ended)
        kept = [entry.lease_id for entry in self.queue.order.kept()]
        assert kept == sorted(set(kept)), "once, and in lease order"
        assert self.ended.isdisjoint(kept), "what has been dropped stays so"

    def teardown(self):
        """From wherever this has led, an actor whose trees are all degenerate brings the run to its end."""
        if not hasattr(self, "queue"):
            return
        for _ in range(200):
            if self.in_training:
                self.publish()
            while self.queue.may_lease():
                entry, _ = self.take()
                self.given.append((entry.lease_id, entry.attempt))
            for lease_id, entry in list(self.queue.order.live.items()):
                if entry.state is State.LEASED:
                    self.put(lease_id, entry.attempt, self.queue.published, False, True)
            if self.step == self.rules.num_batches or self.is_at_the_end_of_data():
                break
            self.ask_batch()
            self.is_whole()
        assert self.step == self.rules.num_batches or self.queue.exhausted, "no deadlock"
        assert not self.queue.may_lease()
        assert self.queue.is_finished()
        left = list(self.queue.order.live.values())
        assert all(entry.state in LIVE for entry in left)
        assert len(left) == 0 or self.queue.exhausted
        trained = self.queue.ledger().get("trained", 0)
        assert trained == self.step * self.rules.prompts_per_batch
        self.every_prompt_that_was_leased_is_in_the_ledger_once()

    def is_at_the_end_of_data(self):
        return self.queue.is_over() and self.step == self.queue.position().next_step


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_a_tree_of_no_policy_of_the_run_is_never_too_old():
    queue = queue_of(max_staleness=0)
    for step in range(3):
        for entry in lease_all(queue):
            assert queue.least_step(entry.lease_id) == step
            assert put(queue, entry, oldest_step=None) == "accepted"
        queue.next_batch(step)
        queue.publish(step + 1, step)


def test_an_entry_that_is_lost_ends_and_counts_in_the_row_that_ends_a_run():
    queue = queue_of()
    first, second, *_ = lease_all(queue)
    queue.lose(first.lease_id, "bad_tree")
    assert (queue.num_lost, queue.reasons) == (1, {"bad_tree": 1})
    put(queue, second)
    assert queue.num_lost == 0
    queue.check_integrity()
