import contextlib
import time
from dataclasses import dataclass, field

import pytest
import torch

from treepo_async.errors import DeadlineError, WeightsError
from treepo_async.learner.broadcast import StageBroadcast
from treepo_async.learner.broadcast_copy import Copies
from treepo_async.learner.broadcast_group import Meeting
from treepo_async.learner.broadcast_sender import Sender
from treepo_async.types import PolicyVersion
from treepo_async.wire.messages import AskSend, NoWeights, SendWeights

ORDER = SendWeights(order=1, engine="engine-0", group="a", ranks=2, lineage=0, step=1)


class OddError(Exception):
    """What nobody reckoned with."""


@dataclass
class DeskLine:
    """A connection to a desk that gives one order, or fails."""

    fails: bool = False
    reports: list = field(default_factory=list)

    def ask(self, message, *, timeout_s, wait):
        if self.fails:
            raise OddError("at the desk")
        if not isinstance(message, AskSend):
            self.reports.append(message)
            raise DeadlineError(wait, "the desk", timeout_s)
        time.sleep(0.01)
        return (NoWeights() if message.done else ORDER), []

    def close(self):
        pass


class Unreadable(Copies):
    """Copies with a fault in them."""

    @contextlib.contextmanager
    def using(self, version):
        raise OddError("in a copy")
        yield


@contextlib.contextmanager
def sender(copies, line):
    made = Sender(0, copies, Meeting("127.0.0.1"), lambda: line, timeout_s=5.0)
    yield made
    made.close()


def copy(made, copies):
    part = StageBroadcast(copies, is_first_replica=True, sender=made)
    part.copy(PolicyVersion(0, 2), iter([("x", torch.ones(2))]), torch.float32, keep=[])


@pytest.mark.parametrize("where", ["at the desk", "in a copy"])
def test_a_sender_that_has_ended_ends_the_next_publication_with_the_reason(where):
    copies = Unreadable(64)
    with sender(copies, DeskLine(fails=where == "at the desk")) as made:
        deadline = time.monotonic() + 10
        while made._failure is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(WeightsError, match=f"the sender of stage 0 has ended.*{where}"):
            copy(made, copies)
        assert copies._versions == {}


def test_what_an_engine_could_not_be_sent_is_reported_and_ends_nothing():
    line = DeskLine()
    with sender(Copies(64), line) as made:
        deadline = time.monotonic() + 10
        while not line.reports:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        made.check()
    (report,) = line.reports
    assert report.error == "the copy of version 0.1 is gone"
