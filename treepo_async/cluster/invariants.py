"""What must hold of every run, whatever happened to its processes, as pure functions of what was found in its folder.

`verify` reads the folder and asks these. Each function gives one `Verdict`: a name, whether it holds, and the numbers that
say so. None of them looks at a file or a clock.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from treepo_async.replay.entry import FINAL, LIVE, Row, State
from treepo_async.replay.state import Counts, StepRow

SHOWN = 3
"""Examples that a verdict names."""


class Verdict(NamedTuple):
    """What was found about one invariant."""

    name: str
    holds: bool
    text: str

    def line(self) -> str:
        """As it is printed."""
        return f"{'ok' if self.holds else 'FAILED':<7} {self.name:<14} {self.text}"


class Delivery(NamedTuple):
    """A tree that an actor was told is accepted."""

    prompt_index: int
    attempt: int
    digest: int


@dataclass(frozen=True, slots=True)
class Account:
    """What replay wrote down about a run."""

    counts: Counts
    rows: Sequence[Row]
    """Of every prompt ever leased that is still leased or has ended, by prompt index."""
    steps: Sequence[StepRow] = ()
    trees: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Attempt and digest by prompt index, of all trees that are stored."""
    rebuilt_from: Counts | None = None
    """Where the index was rebuilt of a log whose beginning was gone: the counts where that log begins. Of what had ended
    by then there are no rows."""

    @property
    def first_prompt(self) -> int:
        """From which on every prompt has a row."""
        return 0 if self.rebuilt_from is None else self.rebuilt_from.next_index

    @property
    def first_step(self) -> int:
        """From which on every batch has its rows."""
        return 0 if self.rebuilt_from is None else self.rebuilt_from.num_retired

    def needed(self) -> list[Row]:
        """Rows whose trees must be there: accepted, or of a batch that is not retired."""
        return [row for row in self.rows if self._is_needed(row)]

    def _is_needed(self, row: Row) -> bool:
        if row.state == State.ACCEPTED:
            return True
        return row.step is not None and row.step >= self.counts.num_retired


def trees_there(account: Account, damaged: Mapping[int, str]) -> Verdict:
    """Every tree that may still be trained is stored, and reads back as it was written.

    Args:
        account: of the run.
        damaged: what is wrong with a stored tree, by prompt index.
    """
    needed = [row.prompt_index for row in account.needed()]
    missing = [index for index in needed if index not in account.trees]
    broken = [f"{index} ({damaged[index]})" for index in needed if index in damaged]
    text = f"{len(needed)} trees are wanted, {len(needed) - len(missing) - len(broken)} read back"
    if missing:
        text += f"; not stored: {_some(missing)}"
    if broken:
        text += f"; damaged: {_some(broken)}"
    return Verdict("trees", not (missing or broken), text)


def acks_kept(
    account: Account, acked: Collection[Delivery], given_back: Collection[int] = ()
) -> Verdict:
    """Every acknowledged tree is the one that is stored, or its prompt has come to an end.

    Args:
        account: of the run.
        acked: what actors were told.
        given_back: prompts whose tree the log says was let go, being damaged or too old for its batch; they are counted
            apart.
    """
    rows = {row.prompt_index: row for row in account.rows}
    gone = [ack for ack in acked if not _is_kept(account, rows.get(ack.prompt_index), ack)]
    lost = [ack for ack in gone if ack.prompt_index not in given_back]
    told = [ack for ack in gone if ack.prompt_index in given_back]
    text = f"{len(acked)} acknowledged, {len(lost)} lost"
    for name, acks in (("", lost), (f", {len(told)} given back by replay", told)):
        if acks:
            text += f"{name}: {_some([f'{a.prompt_index} attempt {a.attempt}' for a in acks])}"
    return Verdict("acks", not lost, text + _reach(account))


def trained_once(account: Account) -> Verdict:
    """Steps are contiguous and as large as each other, and take the prompts in their order, each into one batch."""
    first = account.first_step
    rows = [row for row in account.rows if row.step is not None and row.step >= first]
    batches = [(step, len(list(batch))) for step, batch in groupby(rows, lambda row: row.step)]
    indexes = Counter(row.prompt_index for row in account.rows)
    twice = [index for index, number in indexes.items() if number > 1]
    wanted = list(range(first, account.counts.next_step))
    wrong = []
    if twice:
        wrong.append(f"prompts with two rows: {_some(twice)}")
    steps = [step for step, _ in batches]
    if steps != wanted:
        wrong.append(f"prompts in their order are of steps {_some(_odd(steps, wanted))}")
    ((usual, _),) = Counter(size for _, size in batches).most_common(1) or [(0, 0)]
    odd = [f"step {step} has {size}" for step, size in batches if size != usual]
    if odd:
        wrong.append(f"batches are of {usual}, but {_some(odd)}")
    text = f"{len(rows)} prompts in {len({*steps})} steps{_reach(account)}"
    return Verdict("once", not wrong, "; ".join([text, *wrong]))


def moved_never(moves: Sequence[tuple[int, int, int]], num_lost: int) -> Verdict:
    """No prompt went from one batch to another, as the log tells it.

    Args:
        moves: (prompt index, step, later step) of those that did.
        num_lost: trees lost with a batch, whose prompts and all behind them may move.
    """
    shown = [f"{index} from {old} to {late}" for index, old, late in moves]
    text = f"{len(moves)} prompts changed their batch"
    if shown:
        text += f": {_some(shown)}" + (f"; {num_lost} trees of batches were lost" * (num_lost > 0))
    return Verdict("batches", not moves or num_lost > 0, text)


def results_repeat(steps: Sequence[StepRow]) -> Verdict:
    """A step that was done again, by a later lineage, came out the same."""
    found: dict[int, dict[int, str]] = {}
    for lineage, step, digest in steps:
        if digest:
            found.setdefault(step, {})[lineage] = digest
    again = {step: results for step, results in found.items() if len(results) > 1}
    other = [step for step, results in again.items() if len(set(results.values())) > 1]
    text = f"{len(found)} steps, {len(again)} done again, {len(other)} with another result"
    if other:
        text += f": {_some([_results(step, again[step]) for step in other])}"
    return Verdict("results", not other, text)


def conserved(account: Account) -> Verdict:
    """Every prompt that was issued is trained, dropped, quarantined or pending, and there is no other one."""
    counts = account.counts
    states = Counter(row.state for row in account.rows)
    pending = sum(states[state] for state in (*LIVE, State.CONSUMED))
    trained, dropped, quarantined = (states[state] for state in FINAL)
    first, before = account.first_prompt, account.rebuilt_from or Counts()
    wrong = []
    indexes = [row.prompt_index for row in account.rows if row.prompt_index >= first]
    if indexes != list(range(first, counts.next_index)):
        wrong.append(f"rows are not those of prompts {first}..{counts.next_index - 1}")
    ended = {
        State.TRAINED: sum(_is_retired(row, counts) for row in account.rows),
        State.DROPPED: dropped,
        State.QUARANTINED: quarantined,
    }
    wrong += [
        f"{number} rows are {state}, {counts.ended.get(state, 0)} are counted"
        for state, number in ended.items()
        # of what had ended before the account begins, rows may be missing
        if not 0 <= counts.ended.get(state, 0) - number <= before.ended.get(state, 0)
    ]
    reasons = Counter(row.reason for row in account.rows if row.reason)
    why = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    without_row = counts.next_index - len(account.rows) if first else 0
    text = (
        f"{counts.next_index} issued = {trained} trained + {dropped + quarantined} ended otherwise"
        f"{f' ({why})' if why else ''} + {pending} pending"
        f"{f' + {without_row} without a row' if first else ''}{_reach(account)}"
    )
    return Verdict("prompts", not wrong, "; ".join([text, *wrong]))


def fresh_told(records: Sequence[Mapping[str, Any]], max_staleness: int) -> Verdict:
    """No step was told to have been trained on older trees than the bound that it was told with.

    Args:
        records: of steps.
        max_staleness: the bound of records that have none.
    """
    told = [
        (record["step"], record["staleness/max"], record.get("staleness/bound", max_staleness))
        for record in records
        if record.get("staleness/max") is not None
    ]
    late = [step for step, age, bound in told if age > bound]
    ages, bounds = [age for _, age, _ in told], {bound for *_, bound in told} or {max_staleness}
    shown = "/".join(str(bound) for bound in sorted(bounds))
    text = f"at most {max(ages, default=0)} of {shown} in {len(told)} records"
    if late:
        text += f"; beyond it at steps {_some(late)}"
    return Verdict("staleness", not late, text)


def fresh_found(
    ages: Mapping[int, int], max_staleness: int, bounds: Mapping[int, int] | None = None
) -> Verdict:
    """No stored tree is older than its batch allows.

    Args:
        ages: steps between the oldest segment and the batch, by prompt index.
        max_staleness: the bound.
        bounds: by prompt index, where the batch was trained under another one.
    """
    own = bounds or {}
    late = [
        f"{index} is {age} old"
        for index, age in ages.items()
        if age > own.get(index, max_staleness)
    ]
    text = f"at most {max(ages.values(), default=0)} of {max_staleness} in {len(ages)} stored trees"
    if late:
        text += f"; {_some(late)}"
    return Verdict("ages", not late, text)


def same_account(index: Account, log: Account) -> Verdict:
    """The index says what the log says."""
    wrong = []
    if index.counts != log.counts:
        wrong.append(f"counts: {index.counts.to_json()}, the log has {log.counts.to_json()}")
    tables: list[tuple[str, Mapping[Any, Any], Mapping[Any, Any]]] = [
        ("rows", _keyed(index.rows), _keyed(log.rows)),
        ("trees", index.trees, log.trees),
        ("steps", {step[:2]: step for step in index.steps}, {step[:2]: step for step in log.steps}),
    ]
    for name, mine, other in tables:
        # the log may have lost what is retired, with the files that held it
        odd = [key for key, value in other.items() if mine.get(key) != value]
        wrong += [f"{name} that differ: {_some(odd)}"] * bool(odd)
    text = f"{len(log.rows)} rows, {len(log.trees)} trees and {len(log.steps)} steps of the log"
    return Verdict("index", not wrong, "; ".join([text, *wrong]))


def log_whole(num_records: int, num_bytes: int, damage: Sequence[str]) -> Verdict:
    """Every record of the log is whole; a torn end is none, as nothing of it was acknowledged."""
    text = f"{num_records:,} records, {num_bytes:,} bytes"
    return Verdict("log", not damage, text + (f"; damaged: {_some(damage)}" if damage else ""))


def folders_whole(name: str, damage: Mapping[str, str]) -> Verdict:
    """Every folder, of a checkpoint or a publication, is as its manifest says.

    Args:
        name: of the verdict.
        damage: what is wrong with a folder, empty for nothing, by its name.
    """
    broken = [text for text in damage.values() if text]
    text = f"{len(damage) - len(broken)} of {len(damage)} whole ({', '.join(damage) or 'none'})"
    return Verdict(name, not broken, "; ".join([text, *broken[:SHOWN]]))


def letters_kept(account: Account, letters: Sequence[Mapping[str, Any]]) -> Verdict:
    """Every prompt that was given up is in the file for a person to look at."""
    written = {letter.get("prompt_index"): letter for letter in letters}
    given_up = [row for row in account.rows if row.state == State.QUARANTINED]
    missing = [row.prompt_index for row in given_up if row.prompt_index not in written]
    text = f"{len(given_up)} prompts given up, {len(given_up) - len(missing)} written down"
    known = [
        f"{row.prompt_index} ({written[row.prompt_index].get('reason')})"
        for row in given_up
        if row.prompt_index in written
    ]
    if known:
        text += f": {_some(known)}"
    if missing:
        text += f"; missing: {_some(missing)}"
    return Verdict("dead letters", not missing, text)


def steps_told(records: Sequence[Mapping[str, Any]]) -> Verdict:
    """Within each lineage the records of steps follow each other; what a killed driver did not hear of lies between two."""
    steps = [(record["learner/lineage"], record["step"]) for record in records]
    wrong = [
        f"{lineage}.{step} after {before[0]}.{before[1]}"
        for before, (lineage, step) in pairwise(steps)
        if lineage < before[0] or (lineage == before[0] and step != before[1] + 1)
    ]
    covered = {step for _, step in steps}
    untold = sorted(set(range(1, max(covered, default=0) + 1)) - covered)
    lineages = sorted({lineage for lineage, _ in steps})
    text = f"{len(steps)} steps told, in {len(lineages)} lineages, up to {max(covered, default=0)}"
    if untold:
        text += f"; {len(untold)} untold: {_some(untold)}"
    if wrong:
        text += f"; out of order: {_some(wrong)}"
    return Verdict("metrics", not wrong, text)


def _is_kept(account: Account, row: Row | None, ack: Delivery) -> bool:
    if row is None:
        # its row may have gone with the beginning of the log
        return ack.prompt_index < account.first_prompt
    if row.state in (State.DROPPED, State.QUARANTINED) or _is_retired(row, account.counts):
        return True
    return account.trees.get(ack.prompt_index) == (ack.attempt, ack.digest)


def _is_retired(row: Row, counts: Counts) -> bool:
    return row.step is not None and row.step < counts.num_retired


def _reach(account: Account) -> str:
    """From where on the account speaks, where that is not the beginning."""
    if account.rebuilt_from is None:
        return ""
    return f" (rows from prompt {account.first_prompt} on; the index was rebuilt)"


def _keyed(rows: Sequence[Row]) -> dict[int, Row]:
    return {row.prompt_index: row for row in rows}


def _odd(found: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    """Where two sequences first part, and what follows."""
    same = next(
        (i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(wanted)),
    )
    return [*found[same:]] or [f"none after {same - 1}, expected up to {len(wanted) - 1}"]


def _results(step: int, results: Mapping[int, str]) -> str:
    each = ", ".join(f"{digest[:8]} in lineage {lineage}" for lineage, digest in results.items())
    return f"step {step} is {each}"


def _some(values: Collection[Any]) -> str:
    """A few of them, and how many more there are."""
    shown = ", ".join(str(value) for value in list(values)[:SHOWN])
    return shown + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
