from dataclasses import replace

import pytest
import torch

from treepo_async.config.schema import TINY
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE, Recipe
from treepo_async.tiny.warm_start import learning_rate, warm_start


def short(name, **changes):
    recipe = {
        "num_steps": 60,
        "num_warmup_steps": 10,
        "batch_size": 8,
        "num_demonstrations": 64,
        "num_threads": 1,
    }
    built_in = BUILT_INS[name]
    return replace(built_in, recipe=replace(built_in.recipe, **{**recipe, **changes}))


def test_the_learning_rate_rises_and_then_falls_to_its_floor():
    recipe = Recipe(num_steps=1500, p_hurried=0.5, p_slip=0.0)
    rates = [learning_rate(step, recipe) for step in range(1, 1501)]
    assert rates[0] == pytest.approx(3e-3 / 50, rel=1e-4)
    assert max(rates) == pytest.approx(3e-3, rel=1e-2)
    assert rates[749] == pytest.approx(3e-3 * (0.05 + 0.95 / 2))
    assert rates[-1] == pytest.approx(3e-3 * 0.05)


@pytest.mark.parametrize("name", BUILT_INS)
def test_a_few_steps_bring_the_loss_down(name):
    losses = []
    built_in = short(name)
    _, final = warm_start(
        built_in, DEFAULT_ARCHITECTURE, 0, lambda step, n, loss: losses.append(loss)
    )
    assert losses[0] == pytest.approx(6.0, abs=0.3)
    assert losses[-1] < 2.5
    assert final == pytest.approx(sum(losses[-50:]) / 50)


def test_the_number_of_threads_is_put_back():
    before, during = torch.get_num_threads(), []
    built_in = short(TINY, num_steps=1, num_threads=before + 1)
    warm_start(built_in, DEFAULT_ARCHITECTURE, 0, lambda *_: during.append(torch.get_num_threads()))
    assert during == [before + 1]
    assert torch.get_num_threads() == before
