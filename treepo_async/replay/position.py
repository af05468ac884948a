"""Where the queue stands, in numbers: all that is needed to go on after its process has ended.

A position has no trees: whoever starts from one lets the prompts be grown again whose trees are gone. Its one
invariant is conservation: every prompt ever leased is live, in a batch that is kept, or counted as ended; and since
prompts keep their order for ever, the indexes of the kept batches and then of the live entries only rise.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Self

from treepo_async.errors import DataError
from treepo_async.replay.entry import FINAL, State

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class ConsumedBatch:
    """A batch that the learner has had and may ask for again."""

    step: int
    prompts: tuple[int, ...]
    """Prompt indexes in lease order."""
    is_trained: bool


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """See the module; without arguments it is where a run begins."""

    next_index: int = 0
    """Prompt that is leased next; also the number of prompts ever leased."""
    next_step: int = 0
    """Step whose batch is consumed next."""
    published: int = 0
    num_retired: int = 0
    """Batches that a durable checkpoint covers; those of steps from here to `next_step` are kept."""
    refills: int = 0
    exhausted: bool = False
    live: tuple[int, ...] = ()
    """Prompt indexes in lease order."""
    consumed: tuple[ConsumedBatch, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    """Number of entries that have left the queue, by final state."""
    reasons: Mapping[str, int] = field(default_factory=dict)

    def to_json(self, run_id: str) -> str:
        """As text that `parse` reads back, with the run that wrote it."""
        position = asdict(self)
        return json.dumps({"format": FORMAT_VERSION, "run_id": run_id, "position": position})

    @classmethod
    def parse(cls, text: str) -> tuple[str, Self]:
        """Read what `to_json` wrote. Gives the run that wrote it, and the position.

        Raises:
            DataError: the text is something else, or its numbers contradict each other.
        """
        found = _record(_load(text), ("format", "run_id", "position"), "the file")
        if found["format"] != FORMAT_VERSION:
            raise DataError(f"format is {found['format']!r}, this program reads {FORMAT_VERSION}")
        if not isinstance(found["run_id"], str):
            raise DataError(f"run_id is {found['run_id']!r}, expected text")
        raw = _record(found["position"], tuple(f.name for f in fields(cls)), "position")
        numbers = ("next_index", "next_step", "published", "num_retired", "refills")
        position = cls(
            **{name: _number(raw[name], name) for name in numbers},
            exhausted=_flag(raw["exhausted"], "exhausted"),
            live=_numbers(raw["live"], "live"),
            consumed=tuple(_batch(b) for b in _list(raw["consumed"], "consumed")),
            ended=_counts(raw["ended"], "ended"),
            reasons=_counts(raw["reasons"], "reasons"),
        )
        position.check()
        return found["run_id"], position

    def check(self) -> None:
        """Raise DataError where the numbers contradict each other."""
        steps = [batch.step for batch in self.consumed]
        if steps != list(range(self.num_retired, self.next_step)):
            wanted = f"each from num_retired {self.num_retired} to next_step {self.next_step}"
            raise DataError(f"consumed has the steps {steps}, expected {wanted}")
        if not self.ended.keys() <= set(FINAL):
            raise DataError(f"ended has {sorted(self.ended)}, expected only {[*map(str, FINAL)]}")
        order = [*(index for batch in self.consumed for index in batch.prompts), *self.live]
        if any(a >= b for a, b in pairwise([*order, self.next_index])):
            raise DataError("consumed and live are not in lease order below next_index")
        known = len(order) + sum(self.ended.values())
        if known != self.next_index:
            raise DataError(f"consumed, live and ended are {known} prompts of {self.next_index}")

    def resumed_at(self, step: int) -> "QueuePosition":
        """Where a run begins that goes on from the checkpoint at policy step `step`.

        Batches below it are trained for good; those from it on go back to the front, to be grown and trained again.
        Whether the data has ended is found out anew: there may be more of it now.

        Raises:
            DataError: the batches from `step` on are not kept here, or not reached yet.
        """
        if not self.num_retired <= step <= self.next_step:
            reach = f"policy steps {self.num_retired} to {self.next_step}"
            raise DataError(f"a run can go on from it at {reach}, not at {step}")
        trained = [b for b in self.consumed if b.step < step]
        again = [b for b in self.consumed if b.step >= step]
        ended = Counter(self.ended) + Counter({State.TRAINED: sum(len(b.prompts) for b in trained)})
        return replace(
            self,
            next_step=step,
            published=step,
            num_retired=step,
            refills=0 if again else self.refills,
            exhausted=False,
            live=(*(index for batch in again for index in batch.prompts), *self.live),
            consumed=(),
            ended={str(state): number for state, number in ended.items()},
        )


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error


def _record(value: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where} has {found}, expected {sorted(names)}")
    return value


def _batch(value: Any) -> ConsumedBatch:
    raw = _record(value, tuple(f.name for f in fields(ConsumedBatch)), "consumed")
    return ConsumedBatch(
        step=_number(raw["step"], "consumed.step"),
        prompts=_numbers(raw["prompts"], "consumed.prompts"),
        is_trained=_flag(raw["is_trained"], "consumed.is_trained"),
    )


def _counts(value: Any, name: str) -> dict[str, int]:
    if not isinstance(value, dict):
        raise DataError(f"{name} is {value!r}, expected names with counts")
    return {key: _number(number, f"{name}.{key}") for key, number in value.items()}


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    return tuple(_number(number, name) for number in _list(value, name))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name} is {value!r}, expected a list")
    return value


def _number(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{name} is {value!r}, expected a whole number from 0")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{name} is {value!r}, expected true or false")
    return value
