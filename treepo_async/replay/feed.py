"""Trees from a file in the place of actors: every lease that admission allows is answered at once, by the next tree.

The queue is the one that actors feed, so batches, refills of degenerate trees, journal and resume are the same. Nothing
here is stale: the trees were sampled by weights of no version of this run, they say so (`NO_LINEAGE`), and what the
learner knows of their policy is their log-probs. Waits for nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from treepo_async.errors import DataError
from treepo_async.replay.entry import Entry
from treepo_async.replay.queue import Queue
from treepo_async.replay.report import report_facts
from treepo_async.replay.store import NewTree
from treepo_async.types import NO_LINEAGE, PolicyVersion, Provenance, Tree
from treepo_async.wire.codec import digest_of, encode_tree
from treepo_async.wire.facts import facts_of

ACTOR = "file"
"""In the place of an actor's name, in events."""


class Trees(Protocol):
    """Trees by number; see `wire.tree_file.TreeFile`."""

    def __len__(self) -> int: ...

    def tree(self, index: int) -> Tree:
        """The tree at an index, from 0; raises DataError for one that cannot be used."""


@dataclass
class TreeFeed:
    """See the module."""

    trees: Trees
    epochs: int
    """Passes over the trees."""
    max_tokens: int
    """Of prompt and response: the model's positions."""
    queue: Queue
    keep: Callable[[NewTree], None]
    """Takes an accepted tree."""

    def fill(self, now: float, has_room: Callable[[], bool]) -> Iterator[tuple[str, str]]:
        """Answer all leases there are, while there is room. Gives those whose tree cannot be used or scored, and why."""
        while self.queue.may_lease() and has_room():
            entry = self.queue.lease(now)
            if entry.prompt_index >= self.epochs * len(self.trees):
                self.queue.end_of_data(entry.lease_id)
                continue
            try:
                outcome = self._accept(entry)
            except DataError as error:
                self.queue.lose(entry.lease_id, "bad_tree")
                yield entry.lease_id, str(error)
            else:
                if outcome == "reward_error":
                    yield entry.lease_id, outcome

    def _accept(self, entry: Entry) -> str:
        """Raises DataError where the tree cannot be used."""
        index = entry.prompt_index % len(self.trees)
        tree = adopted(self.trees.tree(index), entry.lease_id)
        check_length(tree, self.max_tokens)
        # what growing it cost was paid by somebody else
        free = replace(tree, provenance=Provenance(entry.lease_id, ACTOR))
        facts = facts_of(encode_tree(free), vocab_size=None)
        outcome = self.queue.accept(
            entry.lease_id,
            entry.attempt,
            oldest_step=None,
            has_spread=facts.has_spread,
            is_scored=facts.is_scored,
        )
        if outcome == "accepted":
            frames = encode_tree(tree)
            self.keep(NewTree(entry.lease_id, entry.attempt, digest_of(frames), frames))
        report_facts(facts, outcome)
        return outcome


def adopted(tree: Tree, lease_id: str) -> Tree:
    """The tree as one of this run: of a lease of its own, sampled by none of its versions."""
    version = PolicyVersion(NO_LINEAGE, 0)
    return replace(
        tree,
        segments=tuple(replace(segment, policy_version=version) for segment in tree.segments),
        provenance=replace(tree.provenance, lease_id=lease_id),
    )


def check_length(tree: Tree, max_tokens: int) -> None:
    """Raise DataError for a tree that is longer than the model can be trained on."""
    longest = len(tree.prompt.token_ids) + int(tree.num_tokens_L.max())
    if longest > max_tokens:
        raise DataError(
            f"{tree.prompt.id}: prompt and response have {longest} tokens, the model has {max_tokens} positions"
        )
