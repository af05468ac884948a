from pathlib import Path

import pytest

from treepo_async.bench.async_arms import settings_of
from treepo_async.bench.async_cells import RUN_KEYS, parse
from treepo_async.bench.async_real import keys_of
from treepo_async.bench.async_rows import Arm
from treepo_async.config.command_line import parse as parse_run
from treepo_async.errors import ConfigError


def test_without_words_every_arm_is_measured_with_three_seeds_on_scripted_processes():
    options = parse([])
    assert (options.backend, options.arms, options.seeds) == ("scripted", tuple(Arm), (0, 1, 2))
    assert options.out == Path("runs/bench-async-scripted")


def test_words_replace_what_they_name():
    options = parse(["backend=real", "arms=sync,async", "seeds=4", "learner.lr=1e-5", "out=x"])
    assert (options.arms, options.seeds, options.out) == ((Arm.SYNC, Arm.ASYNC), (4,), Path("x"))
    assert options.run_keys == (*RUN_KEYS, "learner.lr=1e-5")
    assert parse(["tail=5", "token_ms=0.5"]).scripted.token_ms == 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arm=sync"], "unknown key arm; did you mean arms?"),
        (["arms=synch"], "arms='synch' is unknown; it is one of sync2, sync, "),
        (["backend=fake"], "backend='fake' is unknown"),
        (["seeds=-1"], "seeds='-1' is not a whole number from 0"),
        (["token_ms=nan"], "token_ms='nan' is not a number above 0"),
        (["learner.lr=1"], "learner.lr=1 is a key of a run; backend=scripted has none"),
        (["backend=real", "width=32"], "width=32 is of backend=scripted and sim, real would not"),
        (["steps=30"], "steps=30 is of backend=sim and real, scripted would not heed it; leave"),
        (["backend=sim", "steps=4", "warm_up=4"], "steps=4 leaves nothing after warm_up=4"),
        (["update=drain"], "update='drain' is unknown"),
        (["backend=real", "actor_core=2"], "actor_core='2' is unknown; it is one of 0, 1"),
    ],
)
def test_a_bad_word_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        parse(words)


def test_each_seed_begins_with_another_arm_and_has_all():
    cells = parse(["arms=sync,async", "seeds=0,1,2"]).cells()
    assert [arm for arm, _ in cells[::2]] == [Arm.SYNC, Arm.ASYNC, Arm.SYNC]
    assert sorted(cells) == sorted(
        (arm, seed) for arm in (Arm.SYNC, Arm.ASYNC) for seed in range(3)
    )


def test_words_of_the_command_line_win_over_the_keys_of_every_run():
    words = ["tree.width=32", "replay.prompts_per_batch=16", "tree.max_depth=6", "eval.samples=2"]
    options = parse(["backend=real", *words])
    settings = settings_of(Arm.SYNC, staleness=1, update_mode="retract")
    config = parse_run(
        keys_of(settings, seed=0, steps=9, run_dir=Path("run"), more=options.run_keys)
    )
    assert (config.tree.width, config.replay.prompts_per_batch) == (32, 16)
    assert (config.tree.max_depth, config.eval.samples) == (6, 2)
    assert (config.steps, config.eval.every, config.tree.segment_tokens) == (9, 9, 20)


@pytest.mark.parametrize("arm", Arm)
def test_the_keys_of_an_arm_are_those_of_a_run_and_mean_what_the_arm_says(arm):
    settings = settings_of(arm, staleness=4, update_mode="retract")
    config = parse_run([*RUN_KEYS, *settings.keys(actor_core=1)])
    is_sync = arm in (Arm.SYNC, Arm.SYNC2)
    assert config.replay.max_staleness == (0 if is_sync else 1 if arm is Arm.ONE_STEP else 4)
    lives_on = arm in (Arm.ASYNC_INFLIGHT, Arm.ASYNC_EAGER)
    assert config.engine.update_mode == ("retract" if lives_on else "drain")
    assert config.tree.growth == ("eager" if arm is Arm.ASYNC_EAGER else "barrier")
    if arm is Arm.SYNC2:
        assert (config.engine.cpu_threads, config.learner.cpu_threads) == (2, 2)
        assert (config.engine.cores, config.learner.cores, config.actor.cores) == (None,) * 3
    else:
        assert (config.engine.cores, config.learner.cores, config.actor.cores) == ("0", "1", "1")
        assert (config.engine.cpu_threads, config.learner.cpu_threads) == (1, 1)
