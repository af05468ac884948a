"""Actor and learner of the queue's benchmark, in one thread: leases are taken first, so that delivering alone is timed.

The socket is a `wire.bare.Line`, which speaks the protocol's messages but neither resends nor awaits: the actors' own `Requester`
costs more than what is measured (`queue_actors` uses it). Answers are read while the clock runs, and looked at after it.
Waits: for answers of replay, which ends each wait (deadline `wire.bare.PATIENCE_S`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice

from treepo_async.bench.queue_trees import Deliveries
from treepo_async.errors import TreepoError
from treepo_async.wire.bare import PATIENCE_S, Line
from treepo_async.wire.messages import (
    Ack,
    AskBatch,
    AskLease,
    Batch,
    Hello,
    Leased,
    Message,
    Published,
    Retired,
    Trained,
    decode,
    encode,
    numbered,
)

Put = Sequence[bytes]
LOOK_S = 0.1
"""Between two looks at a process that starts."""
MOST_OUT = 64
"""Deliveries without an answer where nothing else limits them: a connection holds as many answers, and those beyond are lost
(`wire.options.MAX_ANSWERS`)."""
ASKED_AT_ONCE = 16
"""Leases of all actors."""


class QueueClient:
    """Connections of some actors and of a learner to a replay process.

    The actors take turns, and replay answers each in the order of its requests, so that the next answer is known to come
    from the actor whose turn it was first.
    """

    def __init__(self, endpoint: str, *, run_id: str, batch_size: int, peers: int = 1) -> None:
        """Connect so many actors, and a learner, without a greeting."""
        self._run_id, self._batch_size = run_id, batch_size
        self._names = [f"bench-{i}" for i in range(peers)]
        self._actors = [Line(endpoint, name=name) for name in self._names]
        self._learner = Line(endpoint, name="learner")
        self._number = 0
        self._step = 0

    def is_heard(self, lives: Callable[[], bool]) -> bool:
        """Wait until something listens at the other end; False once it does not live."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and lives():
            if self._learner.is_open(LOOK_S):
                return True
        return False

    def greet(self) -> None:
        """Make all known to replay."""
        peers = [*zip(self._names, self._actors, strict=True), ("learner", self._learner)]
        for name, line in peers:
            self._ask(line, Hello(name=name, run_id=self._run_id))

    def lease(self, number: int, trees: Deliveries) -> list[Put]:
        """Deliveries for so many leases, ready to be sent."""
        puts: list[Put] = []
        while len(puts) < number:
            lines = list(islice(cycle(self._actors), min(ASKED_AT_ONCE, number - len(puts))))
            for line in lines:
                line.send([encode(numbered(AskLease(wait_s=PATIENCE_S), self._next()))])
            for line in lines:
                leased = decode(line.receive()[0])
                if not isinstance(leased, Leased):
                    raise TreepoError(f"asked for a lease, replay answered {leased}")
                puts.append(trees.frames_of(leased.lease_id, leased.attempt, self._next()))
        return puts

    def push(self, puts: Iterable[Put], window: int) -> float:
        """Deliver, each actor with at most `window` unanswered at once. Gives the seconds until the last answer.

        Raises:
            TreepoError: something was not accepted.
        """
        answers, out, lines = [], deque[Line](), cycle(self._actors)
        most = window * len(self._actors)
        began = time.perf_counter()
        for put in puts:
            if len(out) == most:
                answers.append(out.popleft().receive())
            out.append(next(lines))
            out[-1].send(put)
        answers.extend(line.receive() for line in out)
        seconds = time.perf_counter() - began
        for frames in answers:
            _check_accepted(frames)
        return seconds

    def push_at(self, puts: Sequence[Put], due: Sequence[float]) -> list[float]:
        """One actor delivers each at its time, answered or not. Gives seconds from due time to answer.

        Args:
            puts: what to deliver.
            due: when, in seconds from the start.

        Raises:
            TreepoError: something was not accepted.
        """
        answers: list[list[bytes]] = []
        done: list[float] = []
        began = time.perf_counter()
        for number, (put, at) in enumerate(zip(puts, due, strict=True)):
            self._take_until(began + at, answers, done)
            self._take_all(number - MOST_OUT, answers, done)
            self._actors[0].send(put)
        self._take_all(len(puts), answers, done)
        for frames in answers:
            _check_accepted(frames)
        # replay answers one peer in the order of its requests
        return [end - began - at for end, at in zip(done, due, strict=True)]

    def draw(self, number: int) -> None:
        """Be a learner that takes so many trees, trains, and keeps a checkpoint of every step."""
        for _ in range(number // self._batch_size):
            self.try_draw(PATIENCE_S)

    def try_draw(self, wait_s: float) -> bool:
        """Draw one batch. Whether there was one in time."""
        step = self._step
        found, _ = self._ask(self._learner, AskBatch(step=step, lineage=0, wait_s=wait_s))
        if not isinstance(found, Batch):
            return False
        for told in (
            Trained(step=step, lineage=0, digest=str(step)),
            Published(step=step + 1, lineage=0, consumed_step=step),
            Retired(step=step),
        ):
            self._ask(self._learner, told)
        self._step += 1
        return True

    def close(self) -> None:
        """Disconnect."""
        for line in self._actors:
            line.close()
        self._learner.close()

    def _take_until(self, until: float, answers: list[list[bytes]], done: list[float]) -> None:
        """Take what comes until then."""
        while True:
            frames = self._actors[0].receive_until(until - time.perf_counter())
            if frames is not None:
                done.append(time.perf_counter())
                answers.append(frames)
            elif time.perf_counter() >= until:
                return

    def _take_all(self, number: int, answers: list[list[bytes]], done: list[float]) -> None:
        """Wait until there are so many answers."""
        while len(answers) < number:
            answers.append(self._actors[0].receive())
            done.append(time.perf_counter())

    def _ask(self, line: Line, message: Message) -> tuple[Message, list[bytes]]:
        line.send([encode(numbered(message, self._next()))])
        head, *attachment = line.receive()
        return decode(head), attachment

    def _next(self) -> int:
        self._number += 1
        return self._number


def _check_accepted(frames: Sequence[bytes]) -> None:
    answer = decode(frames[0])
    if not (isinstance(answer, Ack) and answer.note == "accepted"):
        raise TreepoError(f"a tree of the benchmark was answered by {answer}")
