"""What a run of the rig came to, as pure functions of the lines that its processes wrote: lost, trained twice, other than expected.

A tree is known by its tag, which no two growths share, and by its content, which all growths of a prompt do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Of one run."""

    num_acks: int
    num_steps: int
    num_updates: int
    """Steps that were done again included."""
    lost: list[str]
    """Acknowledged trees that were neither trained nor are stored."""
    twice: list[str]
    """Prompts in more than one step, and steps that are missing."""
    other: list[str]
    """Updates that differ from those of a run without faults."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return not (self.lost or self.twice or self.other)


def judge(
    acks: Sequence[Line],
    trained: Sequence[Line],
    *,
    stored: Mapping[int, int],
    expected: Iterable[tuple[list[str], str]],
) -> Outcome:
    """What a run came to.

    Args:
        acks: what actors were told, in any order.
        trained: updates of the learner, in the order in which they were made.
        stored: digests of the trees that replay has in the end, by prompt index.
        expected: contents and weights of each step of a run without faults.
    """
    # a later lineage takes the place of what it does again
    surviving = {line["step"]: line for line in sorted(trained, key=lambda line: line["lineage"])}
    return Outcome(
        num_acks=len(acks),
        num_steps=len(surviving),
        num_updates=len(trained),
        lost=_lost(acks, trained, stored),
        twice=_twice(surviving),
        other=_other(trained, list(islice(expected, max(surviving, default=-1) + 1))),
    )


def _lost(acks: Sequence[Line], trained: Sequence[Line], stored: Mapping[int, int]) -> list[str]:
    tags: dict[str, set[str]] = {}
    for line in trained:
        for lease, tag in zip(line["leases"], line["tags"], strict=True):
            tags.setdefault(lease, set()).add(tag)
    accepted = [ack for ack in acks if ack["note"] in ("accepted", "duplicate")]
    lost = []
    for ack in accepted:
        lease = ack["lease"]
        if ack["note"] == "duplicate":
            is_there = lease in tags or int(lease) in stored
        elif lease in tags:
            is_there = tags[lease] == {ack["tag"]}
        else:
            is_there = stored.get(int(lease)) == ack["digest"]
        if not is_there:
            lost.append(f"{lease} attempt {ack['attempt']} ({ack['note']})")
    return lost


def _twice(surviving: Mapping[int, Line]) -> list[str]:
    steps: dict[str, list[int]] = {}
    for step, line in surviving.items():
        for lease in line["leases"]:
            steps.setdefault(lease, []).append(step)
    doubled = [f"{lease} in steps {found}" for lease, found in steps.items() if len(found) > 1]
    missing = sorted({*range(max(surviving, default=-1) + 1)} - {*surviving})
    return doubled + [f"step {step} was never made" for step in missing]


def _other(trained: Sequence[Line], expected: Sequence[tuple[list[str], str]]) -> list[str]:
    return [
        f"step {line['step']} in lineage {line['lineage']}"
        for line in trained
        if (line["contents"], line["weights"]) != expected[line["step"]]
    ]
