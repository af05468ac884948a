"""Which backend computes tree attention, and its plan for each microbatch.

A backend turns `end`, the whole mask of a microbatch, into a plan, once; every layer then calls the plan. Neighbours:
`dense`, `cascade` and `flex` are the backends, `module` brings a plan into Megatron's layers,
`pack` makes `end`. Imports no Megatron.

Invariant: query `q` sees key `k` exactly when `k <= q < end[k]`. Attention heads share the mask, so tensor-parallel ranks with
some of the heads each need the same `end` and nothing else; so does sequence parallelism, which gathers the tokens before attention.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from treepo_async.config.schema import ATTENTIONS
from treepo_async.errors import ConfigError
from treepo_async.learner.attention.cascade import CascadePlan
from treepo_async.learner.attention.dense import DensePlan
from treepo_async.learner.attention.flex import TILE, FlexPlan

AUTO, DENSE, CASCADE, FLEX = ATTENTIONS
_PLANNERS: dict[str, Callable[[Tensor], "Plan"]] = {
    DENSE: DensePlan,
    CASCADE: CascadePlan,
    FLEX: FlexPlan,
}

KEPT_PLANS = 4
"""Fewest microbatches whose plans are kept."""


class Plan(Protocol):
    """Attention over one forest."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend.

        Args:
            query: [1, heads, T, D].
            key: [1, key-value heads, T, D]; their number divides the heads.
            value: as `key`.
            scale: of the scores.

        Returns:
            [1, heads, T, D].
        """
        ...


def resolve(backend: str) -> str:
    """The backend that a choice means on this machine.

    Raises:
        ConfigError: there is no such backend, or not on this machine.
    """
    if backend not in ATTENTIONS:
        raise ConfigError(
            f"learner.attention={backend!r} is unknown; it is one of {', '.join(ATTENTIONS)}"
        )
    on_cuda = torch.cuda.is_available()
    if backend == AUTO:
        return FLEX if on_cuda else CASCADE
    if backend == FLEX and not on_cuda:
        raise ConfigError(
            "learner.attention=flex needs CUDA: PyTorch has no backward pass of it on a CPU; "
            "take auto, cascade or dense"
        )
    if backend == CASCADE and on_cuda:
        raise ConfigError(
            "learner.attention=cascade computes on a CPU, and the model is on CUDA; take auto, flex or dense"
        )
    return backend


def alignment(backend: str) -> int:
    """What the tokens of a microbatch should be a multiple of; see `resolve` for errors."""
    return TILE if resolve(backend) == FLEX else 1


def kept_plans(num_stages: int) -> int:
    """Microbatches whose plans are kept: a stage runs at most the forward of `num_stages` others before it recomputes one."""
    return max(KEPT_PLANS, num_stages + 1)


def planner(backend: str) -> Callable[[Tensor], Plan]:
    """What makes a plan of `end`, int32 [T] on the model's device; see `resolve` for errors."""
    return _PLANNERS[resolve(backend)]


@dataclass(frozen=True, slots=True)
class _Kept:
    end: Tensor
    version: int
    plan: Plan


class PlanCache:
    """The newest plans of a model, so that its layers share one a microbatch.

    Layers are given `end` as a tensor, but not always the same object: recomputation unpacks a saved one. So a plan belongs
    to memory: where it lies, how long it is, and how often it was written to. An entry keeps its tensor, so no other can come to
    lie there while the entry lives; a copy of a cache compares with its own copies of the tensors. Nothing waits for the device.
    """

    def __init__(self, build: Callable[[Tensor], Plan], capacity: int = KEPT_PLANS) -> None:
        """Begin empty.

        Args:
            build: from `planner`.
            capacity: plans that are kept; one that is not is built again.
        """
        self.build = build
        self.capacity = capacity
        self._kept: deque[_Kept] = deque(maxlen=capacity)

    def of(self, end: Tensor) -> Plan:
        """The plan of `end`, int32 [T]."""
        place = (end.data_ptr(), len(end), end._version)
        for kept in self._kept:
            if (kept.end.data_ptr(), len(kept.end), kept.version) == place:
                return kept.plan
        plan = self.build(end)
        self._kept.append(_Kept(end, end._version, plan))
        return plan
