from dataclasses import replace

import pytest

from tests.replay.journal import Journal, comparable
from treepo_async.errors import DataError, RefusedError
from treepo_async.replay.entry import State
from treepo_async.replay.queue import UNHEARD_S, Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.state import Changes


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
    queue.publish(1, 0, 0)
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
    first, second = queue.lease(0, "a"), queue.lease(0, "b")
    assert queue.beat("b", [second.lease_id], 8) == []
    assert queue.expire(now=10.5) == [first]
    assert (first.state, second.state) == (State.WAITING, State.LEASED)
    assert queue.lease(now=11) is first
    assert (first.attempt, first.deadline) == (2, 21)
    assert queue.expire(now=18.5) == [second], "the beat counted from when it came"


def test_a_beat_for_a_lease_that_is_not_out_changes_nothing():
    queue = queue_of(max_staleness=0)
    first, _ = lease_all(queue)
    put(queue, first)
    assert queue.beat("", [first.lease_id, "never"], 5) == [first.lease_id, "never"]
    assert first.state is State.ACCEPTED


def test_a_beat_says_which_leases_are_lost_and_keeps_none_of_another_actors():
    queue = queue_of(max_staleness=0, lease_timeout_s=10)
    lost, kept = queue.lease(0, "a"), queue.lease(0, "a")
    queue.expire(11)
    assert (queue.lease(12, "b"), queue.lease(12, "a")) == (lost, kept)
    assert queue.beat("a", [lost.lease_id, kept.lease_id], 20) == [lost.lease_id]
    assert queue.expire(23) == [lost], "its owner did not beat, whoever else did"
    assert kept.state is State.LEASED


def test_a_lease_that_its_actor_never_speaks_of_goes_to_another_and_costs_no_attempt():
    queue = queue_of(max_staleness=0, lease_timeout_s=1000)
    silent, named = queue.lease(0, "a"), queue.lease(0, "a")
    queue.beat("a", [named.lease_id], UNHEARD_S)
    assert silent.state is State.LEASED, "the answer may be on its way"
    queue.beat("a", [named.lease_id], UNHEARD_S + 1)
    assert (silent.state, silent.tries, silent.failed) == (State.WAITING, 0, ())
    assert named.state is State.LEASED


def test_a_lease_of_an_earlier_process_goes_to_another_at_the_first_beat_that_does_not_name_it():
    rules = {"max_staleness": 0, "lease_timeout_s": 1000}
    before = queue_of(**rules)
    lost, held = before.lease(0, "a"), before.lease(0, "a")
    queue = Queue.of(before.rules, before.state(), now=100.0)
    queue.beat("a", [held.lease_id], 100.5)
    assert queue.is_leased(lost.lease_id, 1), "the answer may be on its way"
    queue.beat("a", [held.lease_id], 101.5)
    assert not queue.is_leased(lost.lease_id, 1)
    assert queue.is_leased(held.lease_id, 1)


def test_no_deadline_goes_on_while_nothing_can_be_taken():
    queue = queue_of(max_staleness=0, lease_timeout_s=10, lease_limit_s=15)
    entry = queue.lease(0, "a")
    queue.postpone(100)
    assert queue.expire(109) == []
    assert queue.expire(111) == [entry]


def test_a_lease_ends_at_its_limit_however_often_its_actor_beats():
    queue = queue_of(max_staleness=0, lease_timeout_s=10, lease_limit_s=30)
    entry = queue.lease(0, "a")
    for now in (8, 16, 24):
        assert queue.beat("a", [entry.lease_id], now) == []
        assert queue.expire(now) == []
    queue.beat("a", [entry.lease_id], 30)
    assert queue.expire(31) == [entry]
    assert queue.reasons == {"lease_too_long": 1}
    assert queue.beat("a", [entry.lease_id], 32) == [entry.lease_id]


def test_the_leases_of_an_actor_that_has_ended_are_taken_back_at_once():
    queue = queue_of(max_staleness=1)
    mine, other, accepted = queue.lease(0, "a"), queue.lease(0, "b"), queue.lease(0, "a")
    put(queue, accepted)
    assert queue.release("a") == [mine]
    assert (mine.state, mine.failed, mine.attempt) == (State.WAITING, ("a",), 1)
    assert (other.state, accepted.state) == (State.LEASED, State.ACCEPTED)
    assert queue.reasons == {"actor_ended": 1}


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


def fail(queue, entry, actor):
    """One attempt of an actor on an entry that waits for it. Whether the prompt is lost."""
    assert queue.may_lease(actor)
    assert queue.lease(0, actor) is entry
    return queue.give_up(entry.lease_id, entry.attempt, "EngineError")


def test_an_actor_that_failed_on_a_prompt_gets_it_again_only_where_all_others_have_failed_too():
    queue = queue_of(max_staleness=0, max_attempts=9)
    queue.actors = frozenset({"a", "b"})
    entry = queue.lease(0, "a")
    queue.give_up(entry.lease_id, 1, "EngineError")
    other = queue.lease(0, "a")
    assert other is not entry
    assert not queue.may_lease("a"), "one is out, and the other is not for it"
    assert not fail(queue, entry, "b")
    assert not fail(queue, entry, "a")
    assert entry.failed == ("a", "b")


def test_a_prompt_waits_for_no_actor_that_has_left():
    queue = queue_of(max_staleness=0)
    queue.actors = frozenset({"a", "b"})
    entry, _ = queue.lease(0, "a"), queue.lease(0, "a")
    queue.give_up(entry.lease_id, 1, "EngineError")
    assert not queue.may_lease("a")
    queue.actors = frozenset({"a"})
    assert queue.may_lease("a")


@pytest.mark.parametrize(
    ("actors", "tries"),
    [
        ("a", "aaa"),
        ("ab", "aba"),
        ("abc", "abc"),
    ],
)
def test_a_prompt_is_quarantined_after_its_last_attempt_by_two_actors_or_the_only_one(
    actors, tries
):
    queue = queue_of(max_attempts=3, max_staleness=0, prompts_per_batch=1)
    queue.actors = frozenset(actors)
    poison = queue.order.new()
    lost = [fail(queue, poison, actor) for actor in tries]
    assert lost == [False] * (len(tries) - 1) + [True]
    assert poison.state is State.QUARANTINED
    assert queue.num_lost == 1


def test_one_actor_alone_cannot_condemn_a_prompt_while_there_is_another():
    queue = queue_of(max_attempts=2, max_staleness=0, prompts_per_batch=1)
    queue.actors = frozenset({"a"})
    poison = queue.order.new()
    assert not fail(queue, poison, "a")
    queue.lease(0, "a")
    queue.actors = frozenset({"a", "b"})
    assert not queue.give_up(poison.lease_id, 2, "EngineError")
    assert fail(queue, poison, "b"), "the second actor ends it"


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
    assert queue.ledger() == {
        "consumed": 2,
        "quarantined": 1,
        "reason/EngineError": 3,
        "reason/too_many_attempts": 1,
    }
    assert put(queue, poison) == "duplicate", "its late tree comes to nothing"


def test_a_lease_that_did_not_reach_its_actor_costs_no_attempt():
    queue = queue_of(max_attempts=1)
    first = queue.lease(0)
    for attempt in range(1, 6):
        queue.hand_back(first.lease_id, attempt)
        assert first.state is State.WAITING
        queue.check_integrity()
        assert queue.lease(0) is first
    assert (first.state, first.tries) == (State.LEASED, 1)
    assert not queue.is_leased(first.lease_id, 1), "whoever had it before speaks of another one"
    assert queue.give_up(first.lease_id, 6, "EngineError")


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
    queue.publish(1, 0, 0)
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
    queue.publish(1, 0, 0)
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
    queue.publish(1, 0, 0)
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
    queue.publish(1, 0, 0)
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
    queue.publish(1, 0, 0)
    assert queue.may_lease()


def test_an_older_publication_never_lowers_the_newest_one():
    queue = queue_of()
    queue.publish(3, 0, 2)
    queue.publish(2, 0, 1)
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
        queue.publish(step + 1, 0, step)
    return queue, batches


def ids_of(entries):
    return [entry.lease_id for entry in entries]


def restored(queue, now=0.0):
    """The queue after its process died, with everything written down."""
    journal = Journal()
    journal.apply(Changes(queue.state().counts, queue.state().rows, (), queue.state().steps))
    return Queue.of(queue.rules, journal.state(), now=now)


def resumed(queue, step):
    return Queue.of(queue.rules, queue.state().resumed_at(step), now=0.0)


def test_a_learner_that_goes_back_gets_the_same_trees_in_the_same_order_until_they_are_retired():
    queue, batches = trained_queue(4)
    ledger = queue.ledger()
    for step in range(4):
        assert ids_of(queue.next_batch(step)) == batches[step]
        queue.publish(step + 1, 0, step)
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
    assert queue.state().counts.num_retired == 2
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


def test_a_restored_queue_keeps_what_was_accepted_and_who_holds_what():
    queue, _ = trained_queue(1, max_staleness=2)
    held = queue.lease(0, "a")
    before = queue.ledger()
    queue = restored(queue, now=100)
    assert queue.ledger() == before
    assert before["accepted"] > 0
    assert queue.is_held(held.lease_id, "a")
    assert queue.expire(100 + queue.rules.lease_timeout_s) == [], "it has its time anew"
    assert ids_of(queue.expire(101 + queue.rules.lease_timeout_s)) == [held.lease_id]
    assert queue.lease(200, "b").lease_id == held.lease_id
    queue.check_integrity()


def test_a_restored_queue_stands_where_the_other_stood():
    queue, _ = trained_queue(3, max_refills=1, prompts_per_batch=1, max_staleness=1)
    queue.retire(0)
    first = queue.lease(0)
    assert put(queue, first, oldest_step=3, has_spread=False) == "degenerate"
    queue.end_of_data(queue.lease(0).lease_id)
    again = restored(queue)
    assert again.state() == queue.state()
    assert again.ledger() == queue.ledger()
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


def test_a_tree_of_a_lease_that_was_never_written_down_is_refused_and_the_lease_given_anew():
    queue = queue_of()
    state = queue.state()
    lost = queue.lease(0)
    queue = Queue.of(queue.rules, state, now=0.0)
    with pytest.raises(RefusedError, match="unknown_lease"):
        put(queue, lost)
    queue.give_up(lost.lease_id, 1, "EngineError")
    assert queue.beat("", [lost.lease_id], 5) == [lost.lease_id]
    assert queue.lease(0).prompt_index == lost.prompt_index


def test_a_publication_that_is_told_to_a_restored_queue_trains_its_batch():
    queue = queue_of()
    for entry in lease_all(queue):
        put(queue, entry)
    queue.next_batch(0)
    queue = restored(queue)
    assert queue.ledger() == {"consumed": 2, "accepted": 2}
    queue.publish(1, 0, 0)
    assert queue.ledger() == {"trained": 2, "accepted": 2}


def test_a_lost_batch_and_all_later_ones_return_to_the_front():
    queue, batches = trained_queue(3)
    queue.retire(0)
    queue = restored(queue)
    live = [entry.lease_id for entry in queue.order.live.values()]
    lost = queue.unconsume(1, has_tree=lambda _: False)
    assert ids_of(lost) == [*batches[1], *batches[2]]
    assert list(queue.order.live) == [*batches[1], *batches[2], *live]
    assert queue.ledger() == {
        "trained": 2,
        "waiting": 4,
        "accepted": len(live),
        "reason/batch_lost": 4,
    }
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
    assert (entry.lease_id, entry.attempt, entry.tries) == (batches[0][1], 2, 1)
    put(queue, entry, oldest_step=2)
    assert ids_of(queue.next_batch(0)) == batches[0]
    assert ids_of(queue.next_batch(1)) == batches[1]


def test_a_resumed_queue_gives_the_same_batches_and_leases_no_further_ahead_than_a_new_one_would():
    queue, batches = trained_queue(4, max_staleness=1)
    (held,) = {entry.lease_id for entry in lease_all(queue)[:1]}
    queue = resumed(queue, 1)
    queue.check_integrity()
    assert (queue.published, queue.ledger()["trained"], queue.ledger()["consumed"]) == (1, 2, 6)
    entry = queue.order.live[held]
    assert (entry.state, entry.owner, entry.tries) == (State.WAITING, "", 0)
    assert not queue.may_lease(), "the batches that are given out again come first"
    for step in (1, 2, 3):
        assert ids_of(queue.next_batch(step)) == batches[step]
        assert not queue.may_lease() or step == 3
        queue.publish(step + 1, 1, step)
    assert queue.may_lease()
    assert queue.ledger()["trained"] == 8


@pytest.mark.parametrize("step", [0, 5])
def test_a_run_resumes_only_where_its_batches_are_kept(step):
    queue, _ = trained_queue(4)
    queue.retire(0)
    with pytest.raises(DataError, match=f"from policy steps 1 to 4, not from {step}"):
        resumed(queue, step)


def test_the_entry_beyond_the_data_counts_as_never_leased():
    queue = queue_of()
    lease_all(queue)
    queue = resumed(queue, 0)
    for _ in range(2):
        queue.lease(0)
    late = queue.lease(0)
    queue.end_of_data(late.lease_id)
    assert queue.ledger()["dropped"] == 1, (
        "a shorter data file than before: one was leased after it"
    )
    last = queue.lease(0)
    queue.end_of_data(last.lease_id)
    assert queue.state().counts.next_index == 3
    queue.check_integrity()


def test_a_tree_of_no_policy_of_the_run_is_never_too_old():
    queue = queue_of(max_staleness=0)
    for step in range(3):
        for entry in lease_all(queue):
            assert queue.least_step(entry.lease_id) == step
            assert put(queue, entry, oldest_step=None) == "accepted"
        queue.next_batch(step)
        queue.publish(step + 1, 0, step)


def test_an_entry_that_is_lost_ends_and_counts_in_the_row_that_ends_a_run():
    queue = queue_of()
    first, second, *_ = lease_all(queue)
    queue.lose(first.lease_id, "bad_tree")
    assert (queue.num_lost, queue.reasons) == (1, {"bad_tree": 1})
    put(queue, second)
    assert queue.num_lost == 0
    queue.check_integrity()


# ------------------------------------------------------------------ lineages and results


def in_training(**changes):
    """A queue whose first batch is out."""
    queue = queue_of(**changes)
    for entry in lease_all(queue):
        put(queue, entry)
    queue.next_batch(0)
    queue.steps.begin(0, 0)
    return queue


@pytest.mark.parametrize(
    "act",
    [
        lambda queue: queue.steps.meet(0, 1),
        lambda queue: queue.steps.begin(0, 0),
        lambda queue: queue.end_step(0, 0, "x"),
        lambda queue: queue.publish(1, 0, 0),
    ],
    ids=["meet", "begin_step", "end_step", "publish"],
)
def test_a_lineage_that_was_rolled_back_changes_nothing(act):
    queue = in_training()
    queue.publish(0, 1, -1)
    before = queue.state()
    with pytest.raises(RefusedError, match="lineage 0 was rolled back, lineage 1 goes on"):
        act(queue)
    assert queue.state() == before


def test_results_are_kept_by_lineage_until_the_step_is_retired():
    queue = in_training()
    assert queue.end_step(0, 0, "x") is None
    queue.publish(1, 0, 0)
    queue.steps.begin(0, 1)
    assert queue.steps.results == {0: {0: "x", 1: ""}}
    assert queue.end_step(0, 1, "x") is None
    queue.steps.begin(0, 2)
    assert queue.end_step(0, 2, "y") == "x", "it differs"
    assert restored(queue).steps.results == queue.steps.results == {0: {0: "x", 1: "x", 2: "y"}}
    queue.retire(0)
    assert queue.steps.results == {}


def test_a_result_of_a_step_without_a_batch_is_refused():
    queue = in_training()
    with pytest.raises(RefusedError, match="step 1 has no batch"):
        queue.end_step(1, 0, "x")
    assert queue.steps.results == {0: {0: ""}}


# ------------------------------------------------------------------ trees that are lost or too old


def test_a_lost_tree_is_grown_again_as_if_nobody_had_tried():
    queue = queue_of(max_staleness=0)
    first, second = lease_all(queue)
    put(queue, first)
    put(queue, second)
    queue.next_batch(0)
    queue.unconsume(0, has_tree=lambda lease_id: lease_id != first.lease_id)
    assert (first.state, first.tries, first.oldest_step) == (State.WAITING, 0, None)
    assert queue.next_batch(0) is None
    assert queue.lease(0) is first
    put(queue, first)
    assert queue.next_batch(0) == [first, second]
    assert queue.ledger()["reason/batch_lost"] == 1


def test_a_run_that_is_resumed_counts_lost_prompts_anew():
    queue = queue_of()
    queue.lose(queue.lease(0).lease_id, "bad_tree")
    assert queue.num_lost == 1
    assert resumed(queue, 0).num_lost == 0


def test_trees_that_a_tighter_bound_makes_too_old_are_asked_for_again_at_once():
    queue, _ = trained_queue(2, max_staleness=2)
    stale = ids_of(queue.order.live.values())
    assert {e.state for e in queue.order.live.values()} == {State.ACCEPTED}
    assert {e.oldest_step for e in queue.order.live.values()} == {0, 1}
    journal = Journal(queue.state().resumed_at(2))
    rules = replace(queue.rules, max_staleness=0, num_batches=4)
    queue = Queue.of(rules, journal.state(), now=0.0)
    journal.write(queue)
    assert comparable(journal.state()) == comparable(queue.state())
    assert not queue.is_finished(), "else its actors would leave"
    assert queue.next_batch(2) is None
    assert queue.ledger()["reason/stale_accepted"] == 4
    for step in (2, 3):
        entries = [queue.lease(0), queue.lease(0)]
        assert ids_of(entries) == [stale.pop(0), stale.pop(0)]
        for entry in entries:
            assert queue.least_step(entry.lease_id) == step
            put(queue, entry, oldest_step=step)
        assert queue.next_batch(step) == entries
        queue.publish(step + 1, 1, step)
    assert queue.is_finished()


def test_a_tree_that_is_too_old_for_its_batch_is_not_trained_whatever_let_it_in():
    queue, _ = trained_queue(2, max_staleness=2)
    first, second, *later = queue.order.live.values()
    first.oldest_step, second.oldest_step = 0, None
    queue.rules = replace(queue.rules, max_staleness=1)
    assert queue.next_batch(2) is None
    assert (first.state, second.state) == (State.WAITING, State.ACCEPTED)
    assert {e.state for e in later} == {State.ACCEPTED}, "those of later batches are looked at then"


# ------------------------------------------------------------------ what is written down


def test_nothing_is_written_where_nothing_happened():
    queue = queue_of()
    assert queue.take_changes() is None
    queue.beat("a", ["never"], 5)
    queue.expire(5)
    assert queue.next_batch(0) is None
    assert queue.take_changes() is None
    queue.lease(0)
    assert queue.take_changes() is not None
    assert queue.take_changes() is None


def test_changes_add_up_to_the_state_after_every_act():
    queue, journal = queue_of(max_staleness=2, max_attempts=1, max_refills=1), Journal()
    num_acts = 0

    def same():
        nonlocal num_acts
        journal.write(queue)
        assert comparable(journal.state()) == comparable(queue.state())
        num_acts += 1

    entries = lease_all(queue)
    same()
    put(queue, entries[0], has_spread=False)
    queue.give_up(entries[1].lease_id, 1, "EngineError")
    same()
    for entry in [*entries[2:], *lease_all(queue)]:
        put(queue, entry)
        same()
    for step in range(2):
        queue.next_batch(step)
        queue.steps.begin(step, 0)
        same()
        queue.end_step(step, 0, "x")
        queue.publish(step + 1, 0, step)
        same()
    queue.unconsume(1, has_tree=lambda _: True)
    same()
    queue.retire(0)
    same()
    late = queue.lease(0)
    queue.hand_back(late.lease_id, 1)
    queue.lease(0)
    same()
    newest = queue.lease(0)
    same()
    queue.end_of_data(newest.lease_id)
    same()
    assert num_acts > 12


def test_how_a_prompt_ended_is_written_down_when_it_does():
    queue = queue_of(max_staleness=2, max_attempts=1)
    degenerate, poison, *good = lease_all(queue)
    put(queue, degenerate, has_spread=False)
    queue.give_up(poison.lease_id, 1, "EngineError")
    rows = {row.prompt_index: row for row in queue.take_changes().rows}
    assert (rows[0].state, rows[0].reason) == ("dropped", "degenerate")
    assert (rows[1].state, rows[1].reason) == ("quarantined", "too_many_attempts")
    for entry in good[:2]:
        put(queue, entry)
    queue.next_batch(0)
    assert {row.state for row in queue.take_changes().rows} == {"consumed"}
    queue.retire(0)
    rows = queue.take_changes().rows
    assert [(row.prompt_index, row.state, row.step) for row in rows] == [
        (2, "trained", 0),
        (3, "trained", 0),
    ]
