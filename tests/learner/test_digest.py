import math
from dataclasses import replace

import pytest

from tests.learner.test_worker import DONE
from treepo_async.learner.digest import digest_of
from treepo_async.learner.optimizer import OptimizerSettings

ADAM = OptimizerSettings()
LEASES = ["000000002", "000000003"]


def test_the_same_step_has_the_same_digest_whatever_else_was_measured():
    other = replace(DONE, num_microbatches=7, entropy=2.0)
    assert digest_of(3, LEASES, [DONE], ADAM) == digest_of(3, LEASES, [other], ADAM)


@pytest.mark.parametrize(
    ("step", "leases", "updates"),
    [
        (4, LEASES, [DONE]),
        (3, LEASES[::-1], [DONE]),
        (3, LEASES[:1], [DONE]),
        (3, LEASES, [replace(DONE, loss=math.nextafter(DONE.loss, 1))]),
        (3, LEASES, [replace(DONE, grad_norm=math.nextafter(DONE.grad_norm, 0))]),
        (3, LEASES, [replace(DONE, loss=math.nan)]),
        (3, LEASES, [replace(DONE, learning_rate=2e-4)]),
        (3, LEASES, [DONE, DONE]),
        (3, LEASES, []),
    ],
)
def test_another_step_tree_order_or_last_bit_has_another_digest(step, leases, updates):
    assert digest_of(step, leases, updates, ADAM) != digest_of(3, LEASES, [DONE], ADAM)


@pytest.mark.parametrize("name", ["weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"])
def test_an_update_that_applies_the_gradient_otherwise_has_another_digest(name):
    changed = replace(ADAM, **{name: getattr(ADAM, name) / 2})
    assert digest_of(3, LEASES, [DONE], changed) != digest_of(3, LEASES, [DONE], ADAM)


def test_what_only_decides_later_learning_rates_is_no_part_of_the_digest():
    changed = replace(ADAM, learning_rate=1.0, warmup_steps=7)
    assert digest_of(3, LEASES, [DONE], changed) == digest_of(3, LEASES, [DONE], ADAM)
