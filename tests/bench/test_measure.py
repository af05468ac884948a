import random
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np
import pytest

from tests.fakes import ScriptedEngine
from treepo_async.bench.cells import Arm, Cell, Stop
from treepo_async.bench.measure import check, measure, prompts_of, settings_of
from treepo_async.config.schema import EngineConfig, TreeConfig
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.answer import Completion
from treepo_async.errors import TreeError
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID, SPECIAL_TOKENS, build_tokenizer
from treepo_async.tree.cut import Run

CELL = Cell(
    depth=4,
    segment=3,
    width=8,
    branch=2,
    prompt=6,
    prompts=2,
    layers=2,
    hidden=64,
    running=8,
    stop=Stop.NONE,
)
TOKENIZER = TextTokenizer(build_tokenizer(), frozenset({EOS_TOKEN_ID}))
NO_RUN = Run(np.zeros(0, np.int32), np.zeros(0, np.float32), ())


@dataclass
class NotingEngine(ScriptedEngine):
    """A scripted engine that keeps its completions, those that fill the cache too."""

    completions: list[Completion] = field(default_factory=list)

    async def extend(self, prefix, **options):
        if options["num_runs"] > 1 and not options["is_cached"]:
            self.completions.append(Completion(NO_RUN, len(prefix), 0, 0.0))
        completions = await super().extend(prefix, **options)
        self.completions += completions
        return completions


def endless(prefix, number, is_greedy):
    """Tokens of which every one would end a path in training."""
    return [EOS_TOKEN_ID] * 100


async def measured(arm, cell=CELL, script=endless):
    engine = NotingEngine(script=script)
    return await measure(cell, arm, engine, TOKENIZER, pair=1, place=2), engine


async def test_a_tree_without_stops_decodes_the_closed_form_and_delivers_every_token():
    sample, _ = await measured(Arm.TREE)
    assert (sample.arm, sample.pair, sample.place) == (Arm.TREE, 1, 2)
    assert sample.trajectories == 16
    assert sample.delivered_tokens == 2 * 8 * 4 * 3
    assert sample.decoded_tokens == 2 * 3 * (2 + 4 + 8 + 8)
    assert sample.decoded_per_delivered == CELL.decoded_share


async def test_independent_responses_share_the_prompt_alone():
    sample, engine = await measured(Arm.INDEPENDENT)
    assert sample.decoded_tokens == sample.delivered_tokens == 2 * 8 * 4 * 3
    assert sample.child_requests == 0
    assert {len(request.prefix) for request in engine.requests} == {CELL.prompt}


async def test_children_are_counted_without_the_roots_and_without_their_last_token():
    sample, engine = await measured(Arm.TREE)
    # below two runs from the prompt: four from 9 tokens, then eight to the end from 12
    children = [9] * 4 + [12] * 8
    assert sample.child_requests == 2 * len(children)
    assert sample.child_servable_tokens == 2 * sum(n - 1 for n in children)
    assert sample.child_cached_tokens == sample.child_servable_tokens
    roots = sum(c.prefix_tokens for c in engine.completions if c.prefix_tokens == CELL.prompt)
    assert sample.prefix_tokens == 2 * sum(children) + roots
    assert sample.requests == len(engine.completions)


async def test_what_fills_the_cache_counts_as_submitted_and_computed():
    sample, engine = await measured(Arm.INDEPENDENT)
    assert [len(c.run) for c in engine.completions].count(0) == 2
    assert sample.requests == 2 + 16
    assert sample.prefix_tokens == 18 * CELL.prompt
    assert sample.computed_tokens == sample.prefix_tokens - sample.cached_tokens >= 2 * CELL.prompt


async def test_both_arms_of_a_pair_get_the_same_prompts_and_other_pairs_others():
    engines = [(await measured(arm))[1] for arm in Arm]
    first, second = ({tuple(r.prefix[:6]) for r in engine.requests} for engine in engines)
    assert first == second
    assert len(first) == CELL.prompts
    others = {tuple(p.token_ids.tolist()) for p in prompts_of(CELL, 2, TOKENIZER.vocab_size)}
    assert not first & others


def test_prompts_have_no_special_token():
    prompts = prompts_of(replace(CELL, prompts=50), 1, TOKENIZER.vocab_size)
    tokens = np.concatenate([p.token_ids for p in prompts])
    assert len(SPECIAL_TOKENS) <= tokens.min()
    assert tokens.max() < TOKENIZER.vocab_size


async def test_natural_paths_end_where_training_ends_them():
    cell = replace(CELL, stop=Stop.NATURAL)
    numbers = count()

    def short(prefix, number, is_greedy):
        return random.Random(next(numbers)).choices([EOS_TOKEN_ID, 9, 10, 11], k=20)

    sample, _ = await measured(Arm.TREE, cell, short)
    assert sample.trajectories == 16
    assert sample.delivered_tokens < 2 * 8 * 4 * 3


def test_natural_stops_are_those_of_training_and_otherwise_there_are_none():
    natural = settings_of(replace(CELL, stop=Stop.NATURAL), Arm.TREE, TOKENIZER)
    assert natural.stops.eos_token_ids == {EOS_TOKEN_ID}
    assert natural.stops.boxed_end is not None
    assert natural.stops.repetition_count == TreeConfig().repetition_count
    assert natural.sampling.stop_token_ids == (EOS_TOKEN_ID,)
    assert natural.stream_tokens == EngineConfig().stream_tokens
    never = settings_of(CELL, Arm.TREE, TOKENIZER)
    assert never.stops.eos_token_ids == frozenset()
    assert (never.stops.boxed_end, never.stops.repetition_count) == (None, 0)
    assert never.sampling.stop_token_ids == ()


@pytest.mark.parametrize("name", ["trajectories", "decoded_tokens", "delivered_tokens"])
async def test_a_count_beside_the_closed_form_fails_the_run(name):
    sample, _ = await measured(Arm.TREE)
    check(sample)
    with pytest.raises(TreeError, match=f"arm tree: {name} is .* it must be"):
        check(replace(sample, **{name: getattr(sample, name) - 1}))


async def test_a_tree_that_needs_fallback_to_be_wide_enough_fails_the_run():
    with pytest.raises(TreeError, match="decoded_tokens is 72, it must be 36"):
        await measured(Arm.TREE, replace(CELL, depth=2))
