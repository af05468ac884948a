import hypothesis.strategies as st
from hypothesis import given, settings

from treepo_async.bench.sim_clock import Clock
from treepo_async.bench.sim_replay import ReplaySpeed, SimQueue, SimReplay
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules


def rules(batch, staleness, batches, refills=2):
    return QueueRules(
        prompts_per_batch=batch,
        max_staleness=staleness,
        num_batches=batches,
        lease_timeout_s=1e9,
        max_attempts=1,
        drop_degenerate=True,
        max_refills=refills,
    )


class Pair:
    """The queue of a run and that of the simulator, told the same."""

    def __init__(self, these):
        self.real, self.sim = Queue(these), SimQueue(these)
        self.out = []
        self.num_real = 0

    def lease(self):
        assert self.real.may_lease() == self.sim.may_lease()
        if self.sim.may_lease():
            entry = self.real.lease(0.0)
            number, least = self.sim.lease()
            assert (entry.prompt_index, self.real.least_step(entry.lease_id)) == (number, least)
            self.out.append((entry, number))

    def accept(self, place, has_spread):
        if self.out:
            entry, number = self.out.pop(place % len(self.out))
            said = self.real.accept(
                entry.lease_id,
                entry.attempt,
                oldest_step=None,
                has_spread=has_spread,
                is_scored=True,
            )
            kept = self.sim.accept(number, number, has_spread=has_spread)
            assert kept == (said == "accepted")

    def draw(self):
        real = self.real.next_batch(self.real.order.next_step)
        sim = self.sim.next_batch()
        assert (real is None) == (sim is None)
        if real is not None:
            assert [entry.prompt_index for entry in real] == sim

    def publish(self):
        step = min(self.sim.published + 1, self.sim.next_step)
        self.real.publish(step, 0, step - 1)
        self.sim.published = step


ACTIONS = st.one_of(
    st.just(("lease",)),
    st.just(("draw",)),
    st.just(("publish",)),
    st.tuples(st.just("accept"), st.integers(0, 20), st.integers(0, 3).map(bool)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 6), st.lists(ACTIONS, max_size=120))
def test_the_simulated_queue_admits_accepts_and_draws_as_that_of_a_run(
    batch, staleness, batches, actions
):
    pair = Pair(rules(batch, staleness, batches))
    for name, *arguments in actions:
        getattr(pair, name)(*arguments)
    pair.lease()


def test_the_server_handles_one_message_after_the_other():
    clock = Clock()
    replay = SimReplay(clock, ReplaySpeed(lease_s=1.0), SimQueue(rules(4, 0, 1)))
    granted = []
    for _ in range(2):
        replay.lease(lambda number, least: granted.append((clock.now, number, least)))
    clock.run(lambda: len(granted) == 2)
    assert granted == [(1.0, 0, 0), (2.0, 1, 0)]
    assert replay.busy_s == 2.0


def test_a_lease_that_cannot_be_had_is_granted_after_the_publication_that_admits_it():
    clock = Clock()
    replay = SimReplay(clock, ReplaySpeed(0.0, 0.0, 0.0), SimQueue(rules(1, 0, 2)))
    granted, batches = [], []
    for _ in range(2):
        replay.lease(lambda number, least: granted.append((clock.now, number, least)))
    clock.after(1.0, lambda: replay.put(0, "a", has_spread=True, acknowledged=lambda kept: None))
    clock.after(2.0, lambda: replay.next_batch(batches.append))
    clock.after(3.0, lambda: replay.publish(1))
    clock.run(lambda: len(granted) == 2)
    assert granted == [(0.0, 0, 0), (3.0, 1, 1)]
    assert batches == [["a"]]
