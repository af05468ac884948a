"""Which versions are the same weights under another name.

A learner that begins again takes a lineage of its own, and the trees that wait for it were sampled under the names that
earlier lineages gave to the weights it has again:

    lineage l begins from (m, k)        (l, s) is (m, s) for every s <= k
    a step repeated to the bit          (l, s) is (m, s) and their results are equal: (l, s + 1) is (m, s + 1)

Without this a tree of the very weights that train on it would count as sampled by others and be corrected, and a run that was
interrupted would end at other weights than one that was not. Neighbours: `start` has it made, `supply` renames the trees
of each batch, the worker tells it results. Pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from treepo_async.types import PolicyVersion, Tree


@dataclass
class Ancestry:
    """What is known of the names of one lineage's weights."""

    lineage: int
    """That trains."""
    origins: Mapping[int, PolicyVersion] = field(default_factory=dict)
    """The version that each lineage began from, its own too; of a lower lineage, but for the first."""
    equal: dict[int, int] = field(default_factory=dict)
    """Another lineage: last step at which its weights are those of this one."""

    @classmethod
    def of(
        cls, lineage: int, origins: Mapping[int, PolicyVersion], inherited: Mapping[int, int]
    ) -> Self:
        """What a lineage knows as it begins.

        Args:
            lineage: that begins.
            origins: of all lineages.
            inherited: `equal` of the lineage it began from, at that version.
        """
        origin = origins.get(lineage)
        if origin is None or origin.lineage == lineage:
            return cls(lineage, origins)
        equal = {other: min(step, origin.step) for other, step in inherited.items()}
        return cls(lineage, origins, {**equal, origin.lineage: origin.step})

    def canonical(self, version: PolicyVersion) -> PolicyVersion:
        """The name that a version's weights have in this lineage; the version itself where they have none."""
        found = version
        while (origin := self.origins.get(found.lineage)) is not None:
            if found.step > origin.step or origin.lineage >= found.lineage:
                break
            found = PolicyVersion(origin.lineage, found.step)
        is_equal = found.step <= self.equal.get(found.lineage, -1)
        return PolicyVersion(self.lineage, found.step) if is_equal else version

    def repeated(self, step: int, digest: str, results: Mapping[int, str]) -> list[int]:
        """A step is done. Gives the lineages that had the same weights before it and have not any more.

        Args:
            step: that was done.
            digest: of its result.
            results: digest that each lineage had at this step; empty where its result is not known.
        """
        before, differing = PolicyVersion(self.lineage, step), []
        for lineage, found in results.items():
            if lineage == self.lineage or not found:
                continue
            if self.canonical(PolicyVersion(lineage, step)) != before:
                continue
            if found == digest:
                self.equal[lineage] = step + 1
            else:
                differing.append(lineage)
        return differing

    def rename(self, trees: Iterable[Tree]) -> list[Tree]:
        """Trees whose segments bear the names of this lineage wherever their weights have one."""
        return [self._rename(tree) for tree in trees]

    def _rename(self, tree: Tree) -> Tree:
        versions = {segment.policy_version for segment in tree.segments}
        names = {version: self.canonical(version) for version in versions}
        if all(version == name for version, name in names.items()):
            return tree
        segments = tuple(replace(s, policy_version=names[s.policy_version]) for s in tree.segments)
        return replace(tree, segments=segments)
