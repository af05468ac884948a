"""The digest of a step: equal for equal trees, weights and optimizer, on the same machine and in the same layout.

Loss and gradient norm of an update follow from the weights before it and from the batch, to the last bit; what the optimizer
makes of the gradient follows from its settings, which count too. So two steps with one digest began with the same weights,
trained on the same trees and ended with the same weights, where the steps before did. Pure.
"""

import hashlib
import struct
from collections.abc import Sequence

from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.optimizer import OptimizerSettings

DIGEST_BYTES = 16


def digest_of(
    step: int,
    lease_ids: Sequence[str],
    updates: Sequence[StepResult],
    optimizer: OptimizerSettings,
) -> str:
    """Hexadecimal blake2b of a step.

    Args:
        step: its number.
        lease_ids: of its trees, in their order.
        updates: what each of its updates did; the exact bits of loss, gradient norm and learning rate count.
        optimizer: what it makes of a gradient; its learning rate and warm-up count only as those of the updates.
    """
    found = hashlib.blake2b(struct.pack("<q", step), digest_size=DIGEST_BYTES)
    for lease_id in lease_ids:
        found.update(f"{lease_id}\n".encode())
    for update in updates:
        found.update(struct.pack("<3d", update.loss, update.grad_norm, update.learning_rate))
    applied = (
        optimizer.weight_decay,
        optimizer.beta1,
        optimizer.beta2,
        optimizer.epsilon,
        optimizer.max_grad_norm,
    )
    found.update(struct.pack("<5d", *applied))
    return found.hexdigest()
