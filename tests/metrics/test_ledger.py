import pytest

from treepo_async.metrics.ledger import TimeLedger


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


def test_the_activities_and_the_rest_sum_to_the_wall_time():
    clock = FakeClock()
    ledger = TimeLedger(clock)
    clock.passes(0.5)
    with ledger("wait"):
        clock.passes(3)
    with ledger("train"):
        clock.passes(2)
    clock.passes(0.25)
    with ledger("wait"):
        clock.passes(1)
    seconds = ledger.close()
    assert seconds == {"wait": 4, "train": 2, "other": 0.75, "wall": 6.75}
    wall = seconds.pop("wall")
    assert sum(seconds.values()) == wall


def test_each_interval_starts_from_nothing_where_the_last_one_ended():
    clock = FakeClock()
    ledger = TimeLedger(clock)
    with ledger("train"):
        clock.passes(2)
    ledger.close()
    clock.passes(1)
    assert ledger.close() == {"other": 1, "wall": 1}


def test_an_activity_that_fails_is_counted_too():
    clock = FakeClock()
    ledger = TimeLedger(clock)

    def train():
        with ledger("train"):
            clock.passes(2)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert ledger.close()["train"] == 2
