import random
from dataclasses import replace

import numpy as np

from tests.fakes import ScriptedEngine, ascii_settings, numbered_prompt, scoring_by
from treepo_async.actor.expand import expand
from treepo_async.actor.grow import Grower
from treepo_async.tree.regrow import Trunk, kept_trunk
from treepo_async.types import ROOT, PolicyVersion, Segment, StopReason

PROMPT = numbered_prompt(0)
OLD, NEW = PolicyVersion(0, 4), PolicyVersion(0, 5)


def grower(engine, **rules):
    scoring = scoring_by(lambda response, _: float(len(response) % 2))
    return Grower("actor-0", engine, ascii_settings(**rules), scoring, seed=0)


async def old_tree():
    """Sampled at step 4, but for the last branch of the prompt and what hangs on it."""
    engine = ScriptedEngine(seed=6, eos_rate=0.02, version=OLD)
    tree = await grower(engine).grow(PROMPT, lease_id="lease")
    young = {max(i for i, s in enumerate(tree.segments) if s.parent == ROOT)}
    for i, segment in enumerate(tree.segments):
        young |= {i} if segment.parent in young else set()
    segments = [
        replace(s, policy_version=NEW) if i in young else s for i, s in enumerate(tree.segments)
    ]
    return replace(tree, segments=tuple(segments))


async def test_a_regrown_tree_costs_what_is_sampled_now_and_says_what_was_kept():
    old, engine = await old_tree(), ScriptedEngine(seed=7)
    tree = await grower(engine).grow(
        PROMPT, lease_id="lease", attempt=2, least_step=5, old_tree=old
    )
    tree.check()
    assert len(tree.leaves) == 6
    assert {s.policy_version for s in tree.segments} == {NEW}
    kept = kept_trunk(old.segments, 5)
    assert 0 < len(kept) < len(old.segments)
    assert tree.segments[: len(kept)] == kept
    num_kept, cost = sum(map(len, kept)), tree.provenance
    assert cost.decoded_tokens == sum(map(len, engine.runs))
    assert cost.decoded_tokens == tree.num_tokens - num_kept + cost.wasted_tokens
    assert cost.notes == (f"regrown: {num_kept} of {old.num_tokens} tokens kept",)
    assert np.isfinite(tree.rewards_L).all(), "kept leaves are scored as all others"


async def test_a_tree_that_is_whole_and_young_enough_asks_nothing_of_the_engine():
    old = await grower(ScriptedEngine(seed=6, version=OLD)).grow(PROMPT, lease_id="lease")
    engine = ScriptedEngine(seed=8)
    tree = await grower(engine).grow(PROMPT, lease_id="lease", least_step=4, old_tree=old)
    assert tree.segments == old.segments
    np.testing.assert_array_equal(tree.rewards_L, old.rewards_L)
    assert (engine.requests, engine.warmed) == ([], [])
    assert tree.provenance.decoded_tokens == tree.provenance.num_requests == 0


async def test_a_tree_of_other_settings_is_not_kept():
    old = await grower(ScriptedEngine(seed=6, version=OLD)).grow(PROMPT, lease_id="lease")
    engines = [ScriptedEngine(seed=8), ScriptedEngine(seed=8)]
    settings = {"lease_id": "lease", "least_step": 4}
    tree = await grower(engines[0], width=7).grow(PROMPT, **settings, old_tree=old)
    usual = await grower(engines[1], width=7).grow(PROMPT, **settings)
    assert [s.token_ids.tolist() for s in tree.segments] == [
        s.token_ids.tolist() for s in usual.segments
    ]
    assert tree.provenance.notes == (f"regrown: 0 of {old.num_tokens} tokens kept",)


async def test_a_kept_path_is_new_to_the_cache_when_it_forks():
    ids, logprobs = np.arange(65, 69, dtype=np.int32), np.full(4, -1, np.float32)
    inner = Segment(ROOT, 0, ids, logprobs, NEW)
    trunk = Trunk((inner, Segment(0, 1, ids, logprobs, NEW, StopReason.EOS)), 8)
    settings = ascii_settings(first_fork_min=1, first_fork_max=1)
    forks = []
    for seed in range(8):
        engine = ScriptedEngine(seed=seed, eos_rate=0.0)
        await expand(
            PROMPT,
            engine,
            settings,
            random.Random(seed),
            lease_id="lease",
            actor="a",
            least_step=5,
            trunk=trunk,
        )
        forks += [r for r in engine.requests[:1] if len(r.prefix) > len(PROMPT.token_ids)]
    assert forks
    assert all(fork.num_runs > 1 and not fork.is_cached for fork in forks)
