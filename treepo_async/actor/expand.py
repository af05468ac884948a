"""One prompt to one tree: what `tree.growth` asks for, carried out on an engine.

Waits: for the next completion of this tree (the engine client has the deadline of each; `timeout_s` is that of the tree).
Other prompts are never waited for. At the tree's deadline what still runs is ended, and the tree has the leaves that are
whole. So trees with slow paths lose their longest ones: a deadline that many trees meet favours short responses.
"""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol

from treepo_async import chaos
from treepo_async.actor.places import Places
from treepo_async.engine.answer import Completion, Watch
from treepo_async.engine.client import SamplingSettings
from treepo_async.engine.routing import Place
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.tree.growing import Extension, GrowingTree
from treepo_async.tree.growth import Growth, start_growth
from treepo_async.tree.regrow import Trunk
from treepo_async.tree.rules import GrowthRules, PruneRules
from treepo_async.tree.split import temperature_at
from treepo_async.tree.stopping import StopRules, find_stop
from treepo_async.types import ROOT, Prompt, Provenance, Segment, StopReason

NO_TRUNK = Trunk()


class Engine(Protocol):
    """What expansion needs of an engine."""

    async def warm(
        self, prefix: Sequence[int], *, sampling: SamplingSettings, least_step: int = 0
    ) -> Place:
        """See `EngineClient.warm`."""

    async def extend(  # noqa: PLR0913 - see `EngineClient.extend`
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
        watch: Watch | None = None,
        arrived: dict[int, Completion] | None = None,
        home: Place | None = None,
    ) -> list[Completion]:
        """See `EngineClient.extend`."""


@dataclass(frozen=True, slots=True)
class ExpandSettings:
    """How trees are grown, the same for every prompt."""

    growth: GrowthRules
    stops: StopRules
    sampling: SamplingSettings
    prune: PruneRules = field(default_factory=PruneRules)
    stream_tokens: int = 0
    """Requests for more tokens are watched while they run, and ended at their stop; 0: none is."""
    split_temperature_end: float | None = None
    """Of the split at the last step; None: as at the first."""
    num_steps: int = 1
    timeout_s: float = math.inf
    """Of one tree."""

    def growth_at(self, step: int) -> GrowthRules:
        """The rules of a tree that is grown for a policy step."""
        temperature = temperature_at(
            self.growth.split_temperature, self.split_temperature_end, step / self.num_steps
        )
        return replace(self.growth, split_temperature=temperature)


@dataclass
class _Cost:
    """Running totals of one expansion."""

    num_requests: int = 0
    decoded_tokens: int = 0
    wasted_tokens: int = 0
    cached_tokens: int = 0
    prefix_tokens: int = 0
    overhead_s: list[float] = field(default_factory=list)

    def add(self, completion: Completion, num_kept: int) -> None:
        """Count a completion of which `num_kept` tokens go into the tree."""
        self.num_requests += 1
        self.decoded_tokens += len(completion.run)
        self.wasted_tokens += len(completion.run) - num_kept
        self.cached_tokens += completion.cached_tokens
        self.prefix_tokens += completion.prefix_tokens
        self.overhead_s.append(completion.overhead_s)


class _Asked(NamedTuple):
    """A request in the engine."""

    extension: Extension
    arrived: dict[int, Completion]
    """Runs that are back, by number."""


@dataclass
class Expansion:
    """The expansion of one prompt."""

    prompt: Prompt
    engine: Engine
    settings: ExpandSettings
    growth: Growth
    least_step: int
    num_kept: int = 0
    """Segments of an earlier tree; the engine's cache need not have them."""
    cost: _Cost = field(default_factory=_Cost)
    places: Places = field(default_factory=Places)
    _requests: dict[asyncio.Task[list[Completion]], _Asked] = field(default_factory=dict)

    async def run(self) -> None:
        """Grow to the end, or to the deadline. A failed request cancels the others and is raised.

        Raises:
            DeadlineError: no path had ended at the deadline.
        """
        limit_s = self.settings.timeout_s
        try:
            async with asyncio.timeout(None if math.isinf(limit_s) else limit_s) as limit:
                await self._grow()
        except TimeoutError as error:
            if not limit.expired():
                # an engine's own deadline
                raise
            self._rescue()
            if self.growth.cut_off() == 0:
                raise DeadlineError("a whole leaf of a tree", "the engine", limit_s) from error
        finally:
            for request in self._requests:
                request.cancel()
            await asyncio.gather(*self._requests, return_exceptions=True)

    async def _grow(self) -> None:
        extensions = self.growth.start()
        if len(extensions) > 1:
            self.places.begin(
                await self.engine.warm(
                    self._prefix(ROOT), sampling=self.settings.sampling, least_step=self.least_step
                )
            )
        self._submit(extensions)
        while self._requests:
            await asyncio.wait(self._requests, return_when=asyncio.FIRST_COMPLETED)
            # in the order of submission, which does not depend on the engine
            for request in [r for r in self._requests if r.done()]:
                extension, _ = self._requests.pop(request)
                chaos.point("actor.mid_tree")
                for completion in request.result():
                    self._submit(self._take(extension, completion))

    def _rescue(self) -> None:
        """Take the runs that are back of requests whose others are not; nothing follows them."""
        for extension, arrived in self._requests.values():
            for _, completion in sorted(arrived.items()):
                self._take(extension, completion)

    def _submit(self, extensions: Sequence[Extension]) -> None:
        for extension in extensions:
            arrived: dict[int, Completion] = {}
            request = self.engine.extend(
                self._prefix(extension.parent),
                num_runs=extension.num_runs,
                max_new_tokens=extension.max_new_tokens,
                sampling=self._sampling(extension),
                least_step=self.least_step,
                is_cached=extension.parent >= self.num_kept or extension.num_runs == 1,
                watch=self._watch(extension),
                arrived=arrived,
                home=self.places.of(extension.parent),
            )
            self._requests[asyncio.ensure_future(request)] = _Asked(extension, arrived)

    def _take(self, extension: Extension, completion: Completion) -> list[Extension]:
        """Cut a completion at its stop, and add it to the tree. Gives what follows."""
        run = completion.run
        if len(run) == 0:
            raise EngineError("the engine returned no token")
        stop = find_stop(
            self.settings.stops,
            _response(self.growth.tree, extension.parent),
            run.token_ids.tolist(),
            segment_tokens=self.settings.growth.segment_tokens,
        )
        kept, reason = (len(run), None) if stop is None else stop
        if reason is None and len(run) < extension.max_new_tokens:
            if not self.growth.tree.is_stale(extension.parent, run.spans):
                raise EngineError(
                    f"the engine returned {len(run)} of {extension.max_new_tokens} tokens without a stop"
                )
            reason = StopReason.PRUNED
        self.cost.add(completion, kept)
        first = len(self.growth.tree.segments)
        following = self.growth.add(extension, run.head(kept), reason, entropy=completion.entropy)
        added = range(first, len(self.growth.tree.segments))
        self.places.add(extension.parent, added, completion)
        return following

    def _prefix(self, parent: int) -> list[int]:
        return [*self.prompt.token_ids.tolist(), *_response(self.growth.tree, parent)]

    def _sampling(self, extension: Extension) -> SamplingSettings:
        """With what the entropy needs where forks may follow."""
        sampling = self.settings.sampling
        is_last = extension.max_new_tokens > self.settings.growth.segment_tokens
        return replace(sampling, num_top_logprobs=0) if is_last else sampling

    def _watch(self, extension: Extension) -> Watch | None:
        """Looks for a stop in what long requests have sampled, and at how old it is beside the rest of the tree."""
        settings, segment_tokens = self.settings, self.settings.growth.segment_tokens
        tree, stops = self.growth.tree, settings.stops
        every_tokens = max(settings.stream_tokens, segment_tokens)
        if settings.stream_tokens == 0 or extension.max_new_tokens <= every_tokens:
            return None
        ages = settings.prune.max_staleness is not None
        if stops.boxed_end is None and stops.repetition_count == 0 and not ages:
            # what ends a path then is the engine's own business
            return None
        before = _response(tree, extension.parent)

        def begin() -> Callable[[Sequence[int]], bool]:
            return _Look(stops, before, segment_tokens).is_over

        return Watch(
            every_tokens, begin, partial(tree.is_stale, extension.parent) if ages else None
        )


@dataclass
class _Look:
    """Looks again and again for a stop in the growing tokens of one request."""

    stops: StopRules
    before: Sequence[int]
    """Response tokens of the path that it continues."""
    segment_tokens: int
    _num_seen: int = 0

    def is_over(self, token_ids: Sequence[int]) -> bool:
        """Whether the tokens so far hold a stop that no further token would change."""
        tokens, start = list(token_ids), len(self.before)
        # the last look has seen all that ends before
        begin, self._num_seen = self._num_seen, len(tokens)
        stop = find_stop(
            self.stops,
            [*self.before, *tokens[:begin]],
            tokens[begin:],
            segment_tokens=self.segment_tokens,
        )
        if stop is None:
            return False
        kept, reason = stop
        # an end of sequence right behind a box belongs to it, and may come with the next token
        is_settled = begin + kept < len(tokens) or (start + len(tokens)) % self.segment_tokens == 0
        return reason is not StopReason.BOXED or is_settled


async def expand(
    prompt: Prompt,
    engine: Engine,
    settings: ExpandSettings,
    rng: random.Random,
    *,
    lease_id: str,
    actor: str,
    least_step: int,
    trunk: Trunk = NO_TRUNK,
) -> tuple[tuple[Segment, ...], Provenance]:
    """Grow the tree of a prompt.

    Args:
        prompt: the problem.
        engine: where runs come from.
        settings: how.
        rng: decides forks, fallbacks and prunes.
        lease_id: for the tree's provenance.
        actor: likewise.
        least_step: oldest policy step that may sample.
        trunk: what is kept of an earlier tree of the prompt; none of it is in the costs.

    Returns:
        The segments in creation order, and what growing them cost.

    Raises:
        EngineError, DeadlineError: from the engine; nothing of the tree is kept.
    """
    clock = asyncio.get_running_loop().time
    begin = clock()
    rules = settings.growth_at(least_step)
    growth = start_growth(rules, rng, settings.prune, trunk.segments)
    expansion = Expansion(prompt, engine, settings, growth, least_step, len(trunk.segments))
    await expansion.run()
    tree, cost = growth.tree, expansion.cost
    return tuple(tree.segments), Provenance(
        lease_id=lease_id,
        actor=actor,
        decoded_tokens=cost.decoded_tokens,
        wasted_tokens=cost.wasted_tokens,
        cached_tokens=cost.cached_tokens,
        prefix_tokens=cost.prefix_tokens,
        num_requests=cost.num_requests,
        num_fallbacks=growth.num_fallbacks,
        **expansion.places.costs(),
        num_pruned=tree.num_cut_short(),
        saved_tokens=tree.saved_tokens(),
        grow_s=clock() - begin,
        overhead_s=sum(cost.overhead_s),
        notes=(*trunk.notes, *growth.notes()),
    )


def _response(tree: GrowingTree, parent: int) -> list[int]:
    """Response tokens of the path that ends in `parent`."""
    return [token for i in tree.path(parent) for token in tree.segments[i].token_ids.tolist()]
