"""AdamW with linear warm-up, through Megatron's optimizer and scheduler.

Neighbour: `step` calls `update` once per batch.

Invariants: biases and norms are not decayed; Megatron keeps that, and the learning rate, in its scheduler, so no update runs
without a scheduler step before it. The weights of a bfloat16 model are its float32 master weights, rounded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo  # torch's AdamW imports it when it is made: once here, not again in every rank that is forked
from torch import Tensor, nn

from treepo_async.learner.mcore import (
    OptimizerConfig,
    OptimizerParamScheduler,
    get_megatron_optimizer,
)


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """What an update does; the learning rate is constant after the warm-up."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Update k of the first `warmup_steps` runs at `k / warmup_steps` of the learning rate, k from 1."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""


MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps at every parameter."""


def master(weight: nn.Parameter) -> Tensor:
    """What the optimizer updates in a parameter's place: float32 master weights of a bfloat16 one, else the parameter itself."""
    return getattr(weight, "main_param", weight)


class Optimizer:
    """AdamW and its schedule over the parameters of one model."""

    def __init__(self, model: Any, settings: OptimizerSettings) -> None:
        """Build; a bfloat16 model is given master weights that are still unset.

        Args:
            model: from `build_model`.
            settings: what an update does.
        """
        self.model = model
        self.adam = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.learning_rate,
                min_lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                adam_eps=settings.epsilon,
                clip_grad=settings.max_grad_norm,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
            ),
            [model],
        )
        self.scheduler = OptimizerParamScheduler(
            self.adam,
            init_lr=0.0,
            max_lr=settings.learning_rate,
            min_lr=0.0,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=settings.warmup_steps + 1,
            lr_decay_style="constant",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    @property
    def num_updates(self) -> int:
        """Updates made so far; a skipped one does not count."""
        return self.scheduler.num_steps

    @property
    def learning_rate(self) -> float:
        """Of the last update; before the first, of the scheduler's step 0."""
        return float(self.adam.param_groups[0]["lr"])

    def moment(self, name: str) -> Callable[[nn.Parameter], Tensor]:
        """Parameter -> one of its `MOMENTS`, zero before the first update."""
        return lambda weight: self._state(weight)[name]

    def restore_count(self, num_updates: int) -> None:
        """Go on as if `num_updates` updates had been made; the moments are restored by whoever has them."""
        self.scheduler.num_steps = num_updates
        self.scheduler.step(0)
        for group in self.adam.param_groups:
            # where Transformer Engine's Adam counts; torch's counts at each weight
            group["step"] = num_updates
            for weight in group["params"]:
                self._state(weight)["step"].fill_(num_updates)

    def round_master(self) -> None:
        """Give the model its master weights, rounded; after these were filled from elsewhere."""
        for weight in self.model.parameters():
            if (kept := master(weight)) is not weight:
                weight.data.copy_(kept.data)

    def zero_grad(self) -> None:
        """Forget the gradients of the last batch."""
        self.adam.zero_grad()

    def update(self, *, finite_loss: bool) -> tuple[float, bool]:
        """Clip and apply the finished gradients, unless the loss or the gradient norm is not finite.

        Args:
            finite_loss: whether the loss they come from is finite on every rank.

        Returns:
            The global gradient norm before clipping, and whether the update was skipped.
        """
        self.adam.prepare_grads()
        grad_norm = float(self.adam.get_grad_norm())
        if not (finite_loss and math.isfinite(grad_norm)):
            return grad_norm, True
        self.scheduler.step(1)
        self.adam.step()
        return grad_norm, False

    def _state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """What torch's AdamW keeps at a parameter, made as it makes it."""
        (adam,) = self.adam.chained_optimizers
        kept = master(weight)
        state: dict[str, Tensor] = adam.optimizer.state[kept]
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(kept.data) for name in MOMENTS}
        return state
