"""What a built-in task is: problems for the prompt stream, demonstrations for the warm start.

`precedence` and `chain` are such tasks, as modules. The invariant: everything is deterministic in its arguments,
and a question belongs to exactly one of the two splits, decided by its own CRC, so that no training problem can be
a held-out one.
"""

import random
import zlib
from dataclasses import dataclass
from typing import Protocol

HELDOUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """A question of one line and its answer, in decimal digits."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A problem of the training split and one worked response, right or wrong."""

    problem: Problem
    response: str


class Task(Protocol):
    """A built-in task."""

    def problem(self, seed: int, index: int, heldout: bool) -> Problem:
        """The problem at `index` of the endless stream `(seed, split)`.

        Args:
            seed: names the stream.
            index: position in it, from 0; any order of access gives the same problems.
            heldout: which split to draw from.
        """
        ...

    def demonstration(
        self, seed: int, index: int, *, p_hurried: float, p_slip: float
    ) -> Demonstration:
        """A worked response to a training problem, of mixed quality so that RL has something to improve.

        Args:
            seed: names the stream.
            index: position in it, from 0.
            p_hurried: chance of the wrong convention where the task has a choice.
            p_slip: chance of an arithmetic slip, per operation.
        """
        ...


def is_heldout(question: str) -> bool:
    """Whether a question belongs to the held-out split; the only rule that decides it."""
    return zlib.crc32(question.encode()) % HELDOUT_ONE_IN == 0


def stream(seed: int, index: int, heldout: bool) -> random.Random:
    """The randomness of one problem."""
    return random.Random(f"{'heldout' if heldout else 'train'}/{seed}/{index}")
