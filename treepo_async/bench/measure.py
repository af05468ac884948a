"""One arm of one pair: all prompts of a cell grown at once, as an actor grows them, and what that took.

Both arms grow through `actor.expand` on the same engine, from the same prompts, with the same stop rules and response
limit, and deliver `width` trajectories a prompt. Waits: for the prompts' completions (the engine client has the deadline).
"""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from treepo_async.actor.expand import Engine, ExpandSettings, expand
from treepo_async.actor.settings import expand_settings
from treepo_async.bench.cells import Arm, Cell, Stop
from treepo_async.bench.engine import children_processor_s
from treepo_async.bench.samples import Sample
from treepo_async.config.schema import EngineConfig, TreeConfig
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.answer import Completion
from treepo_async.engine.client import all_of
from treepo_async.errors import TreeError
from treepo_async.tiny.tokenizer import SPECIAL_TOKENS
from treepo_async.types import Prompt, Provenance, Segment, leaves_of, path_of

Grown = tuple[tuple[Segment, ...], Provenance]


class NotingEngine(Engine, Protocol):
    """An engine that keeps every completion."""

    completions: list[Completion]


def settings_of(cell: Cell, arm: Arm, tokenizer: TextTokenizer) -> ExpandSettings:
    """How an arm grows. Without stops neither end of sequence, box nor repetition ends a path."""
    natural = cell.stop is Stop.NATURAL
    tree = TreeConfig(
        segment_tokens=cell.segment,
        max_depth=cell.depth,
        width=cell.width,
        branching_factor=cell.branch,
        first_fork_min=cell.branch,
        first_fork_max=cell.branch,
        growth="barrier" if arm is Arm.TREE else "independent",
        stop_boxed=natural,
    )
    if natural:
        return expand_settings(tree, tokenizer, stream_tokens=EngineConfig().stream_tokens)
    settings = expand_settings(tree, tokenizer)
    return replace(
        settings,
        stops=replace(settings.stops, eos_token_ids=frozenset(), repetition_count=0),
        sampling=replace(settings.sampling, stop_token_ids=()),
    )


def prompts_of(cell: Cell, pair: int, vocab_size: int) -> list[Prompt]:
    """Random prompts without special tokens, the same for both arms of a pair."""
    rng = np.random.default_rng([pair, cell.prompt])
    tokens = rng.integers(len(SPECIAL_TOKENS), vocab_size, (cell.prompts, cell.prompt), np.int32)
    return [Prompt(f"{pair}-{i}", token_ids, "", "") for i, token_ids in enumerate(tokens)]


async def measure(
    cell: Cell,
    arm: Arm,
    engine: NotingEngine,
    tokenizer: TextTokenizer,
    *,
    pair: int,
    place: int,
) -> Sample:
    """Grow one arm.

    Args:
        cell: what.
        arm: how.
        engine: with nothing of these prompts in its cache.
        tokenizer: of its model.
        pair: number from 1; decides the prompts.
        place: of the arm in its pair.

    Raises:
        EngineError, DeadlineError: from the engine.
        TreeError: other than the cell's number of trajectories or, at full length, of tokens.
    """
    settings = settings_of(cell, arm, tokenizer)
    prompts = prompts_of(cell, pair, tokenizer.vocab_size)
    began, processor_s = time.monotonic(), children_processor_s()
    trees = await all_of(_grow(prompt, engine, settings) for prompt in prompts)
    took_s, processor_took_s = time.monotonic() - began, children_processor_s() - processor_s
    sample = Sample(
        cell=cell,
        arm=arm,
        pair=pair,
        place=place,
        wall_s=took_s,
        engine_cpu_s=processor_took_s,
        **_counts(cell, trees, engine.completions),
    )
    check(sample)
    return sample


def check(sample: Sample) -> None:
    """Raise TreeError unless the arm delivered what it must, at full length to the token."""
    cell = sample.cell
    expected = {"trajectories": cell.trajectories}
    if cell.stop is Stop.NONE:
        full = cell.trajectories * cell.limit
        expected["delivered_tokens"] = full
        expected["decoded_tokens"] = cell.decoded_tokens if sample.arm is Arm.TREE else full
    for name, wanted in expected.items():
        if (found := getattr(sample, name)) != wanted:
            raise TreeError(f"{cell}, arm {sample.arm}: {name} is {found}, it must be {wanted}")


async def _grow(prompt: Prompt, engine: Engine, settings: ExpandSettings) -> Grown:
    return await expand(
        prompt,
        engine,
        settings,
        random.Random(prompt.id),
        lease_id=prompt.id,
        actor="bench",
        least_step=0,
    )


def _counts(
    cell: Cell, trees: Sequence[Grown], completions: Sequence[Completion]
) -> dict[str, int]:
    """What was requested, decoded and delivered, by name of `Sample`'s fields."""
    children = [c for c in completions if c.prefix_tokens > cell.prompt]
    lengths = [length for segments, _ in trees for length in _lengths(segments)]
    return {
        "trajectories": len(lengths),
        "requests": len(completions),
        "decoded_tokens": sum(provenance.decoded_tokens for _, provenance in trees),
        "delivered_tokens": sum(lengths),
        "prefix_tokens": sum(c.prefix_tokens for c in completions),
        "cached_tokens": sum(c.cached_tokens for c in completions),
        "child_requests": len(children),
        "child_servable_tokens": sum(c.prefix_tokens - 1 for c in children),
        "child_cached_tokens": sum(c.cached_tokens for c in children),
    }


def _lengths(segments: tuple[Segment, ...]) -> list[int]:
    """Response tokens of each trajectory."""
    return [sum(len(segments[i]) for i in path_of(segments, leaf)) for leaf in leaves_of(segments)]
