"""What a job of the stand-alone actor came to, from its files alone: whether each prompt ended once, and each line is whole."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from treepo_async.actor.output import beside
from treepo_async.errors import DataError
from treepo_async.wire.tree_file import TreeFile

OUTCOMES = ("skipped", "failed")
"""Of prompts without a tree."""


@dataclass(frozen=True)
class Audit:
    """Of one job."""

    num_trees: int
    endings: Counter[str]
    """How many prompts of each of `OUTCOMES`."""
    wrong: list[str]
    """Lines that do not parse, and prompts that did not end exactly once."""


def audit(out: Path, prompt_ids: Iterable[str], *, vocab_size: int) -> Audit:
    """Look at a job that has ended.

    Args:
        out: its trees, as lines or as a table; prompts without one are beside it.
        prompt_ids: of all its prompts, each once.
        vocab_size: of its model; other token ids are wrong.
    """
    wrong: list[str] = []
    trees = _trees(out, vocab_size, wrong)
    endings = _endings(beside(out, "failed.jsonl"), wrong)
    counts = Counter([*trees, *(prompt_id for prompt_id, _ in endings)])
    wanted = list(prompt_ids)
    wrong += [
        f"{prompt_id} ended {counts[prompt_id]} times"
        for prompt_id in wanted
        if counts[prompt_id] != 1
    ]
    wrong += [
        f"{prompt_id} is no prompt of the job" for prompt_id in sorted(counts.keys() - {*wanted})
    ]
    return Audit(len(trees), Counter(outcome for _, outcome in endings), wrong)


def _trees(out: Path, vocab_size: int, wrong: list[str]) -> list[str]:
    """Prompt ids of the trees that are whole."""
    ids = []
    try:
        file = TreeFile(out, vocab_size=vocab_size)
    except DataError as error:
        wrong.append(str(error))
        return []
    for index in range(len(file)):
        try:
            ids.append(file.tree(index).prompt.id)
        except DataError as error:
            wrong.append(str(error))
    return ids


def _endings(file: Path, wrong: list[str]) -> list[tuple[str, str]]:
    """Prompt id and outcome of each line; the actor passes over those that do not parse, and this does not."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), start=1):
        try:
            found.append(_ending(line))
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"{file} line {number}: {error!r}")
    return found


def _ending(line: bytes) -> tuple[str, str]:
    ending = json.loads(line)
    prompt_id, outcome, reason = (str(ending[key]) for key in ("prompt_id", "outcome", "reason"))
    if outcome not in OUTCOMES or not reason:
        raise ValueError(f"outcome {outcome!r} for reason {reason!r}")
    return prompt_id, outcome
