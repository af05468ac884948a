"""One prompt to one tree: the rounds of `tree.growth` carried out on an engine.

Waits: at the end of each round for all its completions (the engine client has the deadline). Other prompts are
never waited for.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treepo_async.engine.client import Completion, SamplingSettings, all_of
from treepo_async.errors import EngineError
from treepo_async.tree.growth import Extension, Growth, GrowthRules
from treepo_async.tree.stopping import StopRules, find_stop
from treepo_async.types import ROOT, Prompt, Provenance, Segment


class Engine(Protocol):
    """What expansion needs of an engine."""

    async def extend(
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
    ) -> list[Completion]:
        """See `EngineClient.extend`."""


@dataclass(frozen=True, slots=True)
class ExpandSettings:
    """How trees are grown, the same for every prompt."""

    growth: GrowthRules
    stops: StopRules
    sampling: SamplingSettings


@dataclass
class _Cost:
    """Running totals of one expansion."""

    num_requests: int = 0
    decoded_tokens: int = 0
    wasted_tokens: int = 0
    cached_tokens: int = 0
    prefix_tokens: int = 0
    overhead_s: list[float] = field(default_factory=list)


async def expand(
    prompt: Prompt,
    engine: Engine,
    settings: ExpandSettings,
    rng: random.Random,
    *,
    lease_id: str,
    actor: str,
    least_step: int,
) -> tuple[tuple[Segment, ...], Provenance]:
    """Grow the tree of a prompt.

    Args:
        prompt: the problem.
        engine: where runs come from.
        settings: how.
        rng: decides forks and fallbacks.
        lease_id: for the tree's provenance.
        actor: likewise.
        least_step: oldest policy step that may sample.

    Returns:
        The segments in creation order, and what growing them cost.

    Raises:
        EngineError, DeadlineError: from the engine; nothing of the tree is kept.
    """
    clock = asyncio.get_running_loop().time
    begin, growth, cost = clock(), Growth(settings.growth, rng), _Cost()
    while extensions := growth.plan():
        rounds = await all_of(
            _extend(prompt, growth, extension, engine, settings, least_step)
            for extension in extensions
        )
        for extension, completions in zip(extensions, rounds, strict=True):
            for completion in completions:
                _record(growth, extension, completion, settings, cost)
    return tuple(growth.segments), Provenance(
        lease_id=lease_id,
        actor=actor,
        decoded_tokens=cost.decoded_tokens,
        wasted_tokens=cost.wasted_tokens,
        cached_tokens=cost.cached_tokens,
        prefix_tokens=cost.prefix_tokens,
        num_requests=cost.num_requests,
        num_fallbacks=growth.num_fallbacks,
        grow_s=clock() - begin,
        overhead_s=sum(cost.overhead_s),
        notes=growth.notes(),
    )


async def _extend(
    prompt: Prompt,
    growth: Growth,
    extension: Extension,
    engine: Engine,
    settings: ExpandSettings,
    least_step: int,
) -> list[Completion]:
    return await engine.extend(
        [*prompt.token_ids.tolist(), *_response(growth, extension.parent)],
        num_runs=extension.num_runs,
        max_new_tokens=extension.max_new_tokens,
        sampling=settings.sampling,
        least_step=least_step,
        is_cached=extension.parent != ROOT,
    )


def _record(
    growth: Growth,
    extension: Extension,
    completion: Completion,
    settings: ExpandSettings,
    cost: _Cost,
) -> None:
    """Cut a completion at its stop and add it to the tree."""
    run = completion.run
    if len(run) == 0:
        raise EngineError("the engine returned no token")
    stop = find_stop(
        settings.stops,
        _response(growth, extension.parent),
        run.token_ids.tolist(),
        start=extension.start,
        segment_tokens=settings.growth.segment_tokens,
    )
    kept, reason = (len(run), None) if stop is None else stop
    if reason is None and len(run) < extension.max_new_tokens:
        raise EngineError(
            f"the engine returned {len(run)} of {extension.max_new_tokens} tokens without a stop"
        )
    growth.add(extension, run.head(kept), reason)
    cost.num_requests += 1
    cost.decoded_tokens += len(run)
    cost.wasted_tokens += len(run) - kept
    cost.cached_tokens += completion.cached_tokens
    cost.prefix_tokens += completion.prefix_tokens
    cost.overhead_s.append(completion.overhead_s)


def _response(growth: Growth, parent: int) -> list[int]:
    """Response tokens of the path that ends in `parent`."""
    return [token for i in growth.path(parent) for token in growth.segments[i].token_ids.tolist()]
