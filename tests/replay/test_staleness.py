"""The queue between actors that do whatever they like, a learner that dies, and a replay that dies at any point.

What is told to anybody is in the journal before; a replay that dies begins again from there, and what it had not written
never happened. Trees lie in a store that may lose some. The learner is honest; `Replay` is the queue and its journal.
"""

from dataclasses import dataclass, replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.replay.journal import Journal, comparable
from treepo_async.errors import RefusedError
from treepo_async.replay.entry import LIVE, State
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules

ACTORS = ("a", "b", "c")
KEEP = 2
"""Checkpoints that the learner keeps."""
TIMEOUT_S, LIMIT_S = 10.0, 25.0
FOREVER_S = 1e6
WILLING = ACTORS[0]
"""The actor that goes on when all others have ended."""


@dataclass(frozen=True, eq=False)
class Held:
    """A lease as its actor knows it."""

    lease_id: str
    attempt: int
    actor: str
    least_step: int


@dataclass(frozen=True)
class Made:
    """A tree as its actor sends it, once or again."""

    oldest_step: int
    has_spread: bool
    is_scored: bool


class Staleness(RuleBasedStateMachine):
    """See the module."""

    queue_class = Queue
    looseness = 0
    """By how much the queue's bound is wrong."""

    @initialize(
        max_staleness=st.integers(0, 2),
        prompts_per_batch=st.integers(1, 3),
        num_batches=st.integers(1, 8),
        max_attempts=st.integers(1, 3),
        drop_degenerate=st.booleans(),
        max_refills=st.integers(0, 3),
        num_prompts=st.sampled_from([10**9, 12, 4]),
    )
    def begin(self, num_prompts, **rules):
        self.rules = QueueRules(lease_timeout_s=TIMEOUT_S, lease_limit_s=LIMIT_S, **rules)
        self.num_prompts = num_prompts
        self.now = 0.0
        self.journal = Journal()
        self.is_doomed = False
        """Whether replay dies before its next commit."""
        self.alive = frozenset(ACTORS)
        self.held: list[Held] = []
        """Every lease that reached its actor, oldest first."""
        self.made: dict[Held, Made] = {}
        self.trees: dict[str, int] = {}
        """Oldest step of each tree that is in the store."""
        self.ended: dict[State, set[str]] = {
            state: set() for state in (State.TRAINED, State.DROPPED, State.QUARANTINED)
        }
        self.lineage = self.step = 0
        self.in_training = False
        self.num_trained = 0
        """Steps since the learner died last: without any, it dies of the same again."""
        self.checkpoints: list[int] = []
        self.batches: dict[int, list[str]] = {}
        """As the learner got them, of the steps that are not retired."""
        self.first_kept = 0
        """Step of the oldest batch that is not retired."""
        self.last_retired = ""
        self.rebuild()

    # ---------------------------------------------------------------- replay

    def rebuild(self):
        """A replay begins from what is written down."""
        rules = replace(self.rules, max_staleness=self.rules.max_staleness + self.looseness)
        self.queue = self.queue_class.of(rules, self.journal.state(), now=self.now)
        self.queue.actors = self.alive

    def commit(self):
        """Whether it happened: before the commit replay may die."""
        if self.is_doomed:
            self.is_doomed = False
            self.rebuild()
            return False
        self.journal.write(self.queue)
        return True

    @precondition(lambda self: not self.is_doomed)
    @rule()
    def replay_will_die(self):
        self.is_doomed = True

    @rule()
    def replay_dies(self):
        self.is_doomed = True
        self.commit()

    # ---------------------------------------------------------------- actors

    @rule(actor=st.sampled_from(ACTORS))
    def actor_comes(self, actor):
        self.alive |= {actor}
        self.queue.actors = self.alive

    @rule(actor=st.sampled_from(ACTORS))
    def actor_ends(self, actor):
        """Another process of its name greets, or it has been silent for long."""
        self.alive -= {actor}
        self.queue.actors = self.alive
        entries = self.queue.release(actor)
        if self.commit():
            self.note_quarantined(entries)

    @rule(actor=st.sampled_from(ACTORS), most=st.integers(1, 8), bad=st.integers(0, 9))
    def lease(self, actor, most, bad):
        for number in range(most):
            if not self.queue.may_lease(actor):
                return
            self.lease_one(actor, is_bad=number == bad)

    def lease_one(self, actor, *, is_bad=False):
        """The lease, or None where its prompt cannot be used or replay dies."""
        entry = self.queue.lease(self.now, actor)
        least_step = self.queue.least_step(entry.lease_id)
        assert least_step <= self.queue.published, "a tree of it can be sampled at once"
        if entry.prompt_index >= self.num_prompts:
            self.queue.end_of_data(entry.lease_id)
            if self.commit() and entry.state is State.DROPPED:
                self.ended[State.DROPPED].add(entry.lease_id)
            return None
        if is_bad and entry.attempt == 1:
            self.queue.skip(entry.lease_id, "bad_prompt")
            if self.commit():
                self.ended[State.DROPPED].add(entry.lease_id)
            return None
        if not self.commit():
            return None
        self.held.append(Held(entry.lease_id, entry.attempt, actor, least_step))
        return self.held[-1]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lease_did_not_arrive(self, data):
        held = self.draw_held(data)
        self.queue.hand_back(held.lease_id, held.attempt)
        self.commit()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_up(self, data):
        held = self.draw_held(data)
        is_lost = self.queue.give_up(held.lease_id, held.attempt, "EngineError")
        if self.commit() and is_lost:
            self.ended[State.QUARANTINED].add(held.lease_id)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        late=st.integers(0, 2),
        is_honest=st.sampled_from([True, True, True, False]),
        has_spread=st.booleans(),
        is_scored=st.sampled_from([True, True, True, False]),
    )
    def deliver(self, data, late, is_honest, has_spread, is_scored):
        """A tree, again or for the first time; the honest ones keep to their leases."""
        held = self.draw_held(data)
        oldest_step = max(held.least_step if is_honest else 0, self.queue.published - late)
        self.put(held, Made(oldest_step, has_spread, is_scored))

    @rule(data=st.data(), late=st.integers(0, 2), most=st.integers(1, 6))
    def work(self, data, late, most):
        """Good trees of the leases that are out, oldest first."""
        is_out = [h for h in self.held if self.queue.is_leased(h.lease_id, h.attempt)]
        for held in is_out[:most]:
            oldest_step = max(held.least_step, self.queue.published - late)
            self.put(held, Made(oldest_step, has_spread=True, is_scored=True))

    def put(self, held, made):
        made = self.made.setdefault(held, made)
        lease_id, is_honest = held.lease_id, made.oldest_step >= held.least_step
        state = self.state_of(lease_id)
        try:
            outcome = self.queue.accept(
                lease_id,
                held.attempt,
                oldest_step=made.oldest_step,
                has_spread=made.has_spread,
                is_scored=made.is_scored,
            )
        except RefusedError:
            # it is known, since it went out, and so can only be too old
            assert not is_honest, "who keeps to a lease is never too late"
            is_lost = self.state_of(lease_id) is None
            if self.commit() and is_lost:
                self.ended[State.QUARANTINED].add(lease_id)
            return
        is_open = state in (State.WAITING, State.LEASED)
        assert (outcome == "duplicate") == (not is_open)
        if not self.commit():
            return
        if outcome == "accepted":
            self.trees[lease_id] = made.oldest_step
        elif outcome != "duplicate":
            self.ended[State.DROPPED].add(lease_id)

    def draw_held(self, data):
        return data.draw(st.sampled_from(self.held), label="lease")

    def state_of(self, lease_id):
        """Of an entry that is kept; None for all others."""
        entry = self.queue.order.live.get(lease_id)
        kept = {e.lease_id: e.state for step in self.queue.order.consumed.values() for e in step}
        return entry.state if entry is not None else kept.get(lease_id)

    def note_quarantined(self, entries):
        for entry in entries:
            if entry.state is State.QUARANTINED:
                self.ended[State.QUARANTINED].add(entry.lease_id)

    # ---------------------------------------------------------------- time

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds):
        self.now += seconds
        entries = self.queue.expire(self.now)
        if self.commit():
            self.note_quarantined(entries)

    @rule(seconds=st.sampled_from([-3600.0, -5.0, 3600.0]))
    def the_clock_jumps(self, seconds):
        self.now += seconds

    @rule(actor=st.sampled_from(ACTORS), names_all=st.booleans())
    def beat(self, actor, names_all):
        """An actor names all leases that it ever had, or only the newest."""
        named = {h.lease_id for h in self.held if h.actor == actor}
        named = named if names_all else set(sorted(named)[-1:])
        before = {i for i in self.queue.order.live if self.queue.is_held(i, actor)}
        lost = self.queue.beat(actor, sorted(named), self.now)
        assert {*lost} == named - before, "what is not its own is lost"
        self.commit()

    # ---------------------------------------------------------------- learner

    @precondition(lambda self: not self.in_training and self.step < self.rules.num_batches)
    @rule()
    def ask_batch(self):
        self.queue.steps.meet(self.lineage, self.step)
        batch = self.queue.next_batch(self.step)
        if batch is None:
            self.commit()
            return
        lease_ids = [entry.lease_id for entry in batch]
        if not self.trees.keys() >= {*lease_ids}:
            self.grow_again()
            return
        self.queue.steps.begin(self.step, self.lineage)
        if not self.commit():
            return
        self.check_batch(lease_ids)
        self.batches[self.step] = lease_ids
        self.in_training = True

    def check_batch(self, lease_ids):
        assert len(lease_ids) == self.rules.prompts_per_batch
        assert lease_ids == self.batches.get(self.step, lease_ids), "asked again, the same"
        again = [entry.lease_id for entry in self.queue.next_batch(self.step)]
        assert lease_ids == again, "asked again at once, the same"
        before = max(
            (ids[-1] for step, ids in self.batches.items() if step < self.step),
            default=self.last_retired,
        )
        assert [before, *lease_ids] == sorted({before, *lease_ids}), "in lease order, each once"
        for lease_id in lease_ids:
            assert self.trees[lease_id] >= self.step - self.rules.max_staleness, "staleness"

    def grow_again(self):
        lost = self.queue.unconsume(self.step, self.trees.__contains__)
        assert lost
        assert self.queue.next_batch(self.step) is None
        if self.commit():
            self.batches = {step: ids for step, ids in self.batches.items() if step < self.step}

    @precondition(lambda self: self.in_training)
    @rule()
    def train(self):
        """The update, then the publication; either may not arrive, and is then sent again."""
        self.queue.end_step(self.step, self.lineage, f"step {self.step}")
        if not self.commit():
            return
        self.queue.publish(self.step + 1, self.lineage, self.step)
        if not self.commit():
            return
        self.step += 1
        self.num_trained += 1
        self.in_training = False

    @precondition(lambda self: not self.in_training)
    @rule()
    def run_a_step(self):
        if self.step < self.rules.num_batches:
            self.ask_batch()
        if self.in_training:
            self.train()

    @precondition(lambda self: not self.in_training and self.step not in self.checkpoints)
    @rule()
    def save(self):
        self.checkpoints = [*self.checkpoints, self.step][-KEEP:]
        if len(self.checkpoints) < KEEP:
            return
        step = self.checkpoints[0] - 1
        retired = self.queue.retire(step)
        if not self.commit():
            return
        self.first_kept = step + 1
        self.ended[State.TRAINED] |= {entry.lease_id for entry in retired}
        for entry in retired:
            self.trees.pop(entry.lease_id, None)
            self.last_retired = max(self.last_retired, entry.lease_id)
        self.batches = {kept: ids for kept, ids in self.batches.items() if kept > step}

    @rule(
        num_steps=st.integers(1, 3),
        saves=st.booleans(),
        late=st.integers(0, 2),
        actor=st.sampled_from(ACTORS),
    )
    def all_goes_well(self, num_steps, saves, late, actor):
        for _ in range(num_steps):
            self.lease(actor, 10**3, -1)
            for held in [h for h in self.held if self.queue.is_leased(h.lease_id, h.attempt)]:
                oldest_step = max(held.least_step, self.queue.published - late)
                self.put(held, Made(oldest_step, has_spread=True, is_scored=True))
            if not self.in_training:
                self.run_a_step()
            if saves and not self.in_training and self.step not in self.checkpoints:
                self.save()

    @precondition(lambda self: self.num_trained)
    @rule(data=st.data())
    def learner_dies(self, data):
        """It goes back to a checkpoint that it kept: the newest one may be damaged."""
        self.go_back(data)
        self.queue.publish(self.step, self.lineage, self.step - 1)
        self.commit()

    @precondition(lambda self: self.num_trained)
    @rule(data=st.data())
    def the_run_is_resumed(self, data):
        """All processes are new, and nobody knows of a lease."""
        self.go_back(data)
        self.held, self.made, self.is_doomed = [], {}, False
        self.journal = Journal(self.journal.state().resumed_at(self.step))
        self.rebuild()
        assert self.queue.published == self.step

    def go_back(self, data):
        begins = {0, *self.checkpoints} if self.first_kept == 0 else self.checkpoints
        self.step = data.draw(st.sampled_from(sorted(begins)[::-1]), label="checkpoint")
        self.num_trained = 0
        self.checkpoints = [step for step in self.checkpoints if step <= self.step]
        self.in_training = False
        self.lineage += 1

    @precondition(lambda self: self.lineage > 0)
    @rule(step=st.integers(0, 5))
    def an_earlier_learner_speaks(self, step):
        self.queue.steps.meet(self.lineage, self.step)
        if not self.commit():
            return
        before = self.queue.state()
        for act in (
            lambda: self.queue.steps.meet(self.lineage - 1, step),
            lambda: self.queue.publish(step, self.lineage - 1, step - 1),
        ):
            with pytest.raises(RefusedError, match="rolled_back"):
                act()
        assert self.queue.state() == before

    # ---------------------------------------------------------------- the store

    @precondition(lambda self: self.trees)
    @rule(data=st.data())
    def a_tree_is_damaged(self, data):
        """It is found when its batch is asked for."""
        lease_id = data.draw(st.sampled_from(sorted(self.trees)), label="tree")
        del self.trees[lease_id]

    # ---------------------------------------------------------------- always

    @invariant()
    def is_whole(self):
        self.queue.check_integrity()
        assert self.queue.reasons["stale_accepted"] == 0, "admission prevents it"

    @invariant()
    def admission_holds(self):
        """Counted from the rules, not from the queue's own room."""
        counts = self.queue.state().counts
        live = list(self.queue.order.live.values())
        for place, entry in enumerate(live):
            if entry.state is State.LEASED:
                step = counts.next_step + place // self.rules.prompts_per_batch
                assert step - self.rules.max_staleness <= counts.published, "admission"
                assert step < self.rules.num_batches

    @invariant()
    def every_prompt_is_in_one_place(self):
        kept = [row.prompt_index for row in self.queue.state().rows]
        ended = [int(i) for lease_ids in self.ended.values() for i in lease_ids]
        assert sorted(kept + ended) == list(range(self.queue.order.next_index))
        states = {s: n for s, n in self.queue.ledger().items() if not s.startswith("reason/")}
        assert sum(states.values()) == self.queue.order.next_index
        for state in (State.DROPPED, State.QUARANTINED):
            assert states.get(state, 0) == len(self.ended[state])

    @invariant()
    def the_journal_adds_up_to_the_queue(self):
        written, stands = comparable(self.journal.state()), comparable(self.queue.state())
        assert written == stands, "not written down"

    def teardown(self):
        """From wherever this has led, one willing actor and the learner bring the run to its end, batch by batch."""
        if not hasattr(self, "queue"):
            return
        self.is_doomed = False
        self.alive = self.queue.actors = frozenset({WILLING})
        self.now += FOREVER_S
        self.note_quarantined(self.queue.expire(self.now))
        self.commit()
        for _ in range(2 * self.rules.num_batches + 2):
            if self.in_training:
                self.train()
            if self.step == self.rules.num_batches or self.is_out_of_data():
                break
            self.complete_the_next_batch()
        assert self.step == self.rules.num_batches or self.queue.exhausted, "no wedge"
        self.every_prompt_is_in_one_place()
        self.the_journal_adds_up_to_the_queue()
        assert all(entry.state in LIVE for entry in self.queue.order.live.values())

    def complete_the_next_batch(self):
        """Every tree is degenerate: what may be replaced is, and then the batch is trained as it is."""
        room = (self.rules.max_staleness + 1) * self.rules.prompts_per_batch
        # twice: a damaged tree that shows once all are in begins the count of refills anew
        most = 2 * (self.rules.max_refills + room) + 3
        for _ in range(most):
            self.ask_batch()
            if self.in_training or self.is_out_of_data():
                return
            if self.queue.may_lease(WILLING):
                held = self.lease_one(WILLING)
                if held is not None:
                    self.put(held, Made(self.queue.published, has_spread=False, is_scored=True))
            self.is_whole()
        raise AssertionError(f"no batch for step {self.step}: {self.queue.missing()}")

    def is_out_of_data(self):
        return self.queue.is_over() and self.step == self.queue.order.next_step


class RoomForOneMore(Queue):
    """Admission lets one prompt too many out."""

    def room(self):
        return super().room() + 1


class SilentLoss(Queue):
    """A lease that is given up is not written down."""

    def give_up(self, lease_id, attempt, reason):
        is_lost = super().give_up(lease_id, attempt, reason)
        self.order.take_touched()
        return is_lost


class NoEndOfRefills(Queue):
    """Degenerate trees are replaced without end."""

    def accept(self, *args, **tree):
        self._refills = 0
        return super().accept(*args, **tree)


class OtherOrder(Queue):
    """Asked again, a batch is in another order."""

    def next_batch(self, step):
        is_known = step in self.order.consumed
        batch = super().next_batch(step)
        return batch[::-1] if batch and is_known else batch


def machine_of(**changes):
    """The same machine around a queue that is wrong."""
    return type("Wrong", (Staleness,), changes)


FEW = settings(max_examples=120, stateful_step_count=50, deadline=None, derandomize=True)
MANY = settings(FEW, max_examples=1000, stateful_step_count=80)


def test_nothing_too_old_is_trained_nothing_is_lost_and_nothing_waits_for_ever():
    run_state_machine_as_test(Staleness, settings=FEW)


@pytest.mark.slow
def test_nothing_too_old_is_trained_in_many_more_histories():
    run_state_machine_as_test(Staleness, settings=MANY)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"looseness": 1}, "staleness|admission"),
        ({"queue_class": RoomForOneMore}, "sampled at once|admission"),
        ({"queue_class": SilentLoss}, "not written down"),
        ({"queue_class": NoEndOfRefills}, "no batch for step"),
        ({"queue_class": OtherOrder}, "the same|in lease order"),
    ],
    ids=["bound", "room", "journal", "refills", "order"],
)
def test_a_queue_that_is_wrong_is_found_out(wrong, found):
    once = settings(FEW, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError, match=found):
        run_state_machine_as_test(machine_of(**wrong), settings=once)


def test_the_bound_alone_is_found_out_where_trees_are_trained():
    class Blind(Staleness):
        looseness = 1
        admission_holds = None

    with pytest.raises(AssertionError, match="staleness"):
        run_state_machine_as_test(Blind, settings=settings(FEW, phases=[Phase.generate]))
