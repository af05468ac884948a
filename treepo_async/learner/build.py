"""Learners, put together: from a Hugging Face folder, or with random weights. Neighbours: `rank` and the benchmarks call it.

Nothing here is drawn at random but by `seed`, and no file is read but by `build_learner`.
"""

import json
from collections.abc import Callable
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

from treepo_async.errors import ConfigError
from treepo_async.learner.attention.plan import alignment
from treepo_async.learner.groups import seed_ranks
from treepo_async.learner.loss.objective import LossSettings, Objective
from treepo_async.learner.mcore import parallel_state
from treepo_async.learner.model.gpt import ModelSettings, build_frozen, build_model
from treepo_async.learner.model.hf import Read, dummy, load
from treepo_async.learner.optimizer import Optimizer, OptimizerSettings, master
from treepo_async.learner.shape import ModelShape
from treepo_async.learner.step import Learner

MakeOptimizer = Callable[[Any], Optimizer]
"""Model -> what updates it."""
DEFAULT_OPTIMIZER = partial(Optimizer, settings=OptimizerSettings())


def build_learner(
    model_dir: Path,
    *,
    optimizer: OptimizerSettings,
    loss: LossSettings,
    microbatch_tokens: int,
    seed: int,
    with_reference: bool = False,
    **computed: Any,
) -> Learner:
    """Build a learner from a Hugging Face model directory; needs opened process groups.

    Args:
        model_dir: has config.json and safetensors.
        optimizer: what an update does.
        loss: what it minimises.
        microbatch_tokens: most packed tokens of a microbatch; a single trajectory that is longer gets one of its own.
        seed: of every random generator.
        with_reference: whether to keep the model as it is in `model_dir` beside the one that is trained, frozen.
        computed: fields of `ModelSettings`; `with_entropy_gradient` follows from the loss.

    Raises:
        ConfigError: the directory is incomplete, or the model or the correction is not supported.
    """
    # here, because a machine that only measures has no safetensors
    from treepo_async.learner.model.hf_files import open_checkpoint

    path = model_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a Hugging Face model directory")
    shape = ModelShape.from_config(json.loads(path.read_text()))
    seed_ranks(seed)
    read = open_checkpoint(model_dir)
    make = partial(Optimizer, settings=optimizer)
    return _assemble(shape, read, make, loss, microbatch_tokens, with_reference, computed)


def build_dummy(
    shape: ModelShape,
    *,
    make_optimizer: MakeOptimizer = DEFAULT_OPTIMIZER,
    loss: LossSettings | None = None,
    microbatch_tokens: int = 4096,
    seed: int = 0,
    with_reference: bool = False,
    **computed: Any,
) -> Learner:
    """`build_learner` with the random weights of `hf.dummy`, for measuring; no file is read.

    Args:
        shape: of the model.
        make_optimizer: model -> what updates it, or leaves it as it is.
        loss: None: the defaults.
        microbatch_tokens: see `build_learner`.
        seed: of the weights too.
        with_reference: see `build_learner`.
        computed: fields of `ModelSettings`; `with_entropy_gradient` follows from the loss.
    """
    seed_ranks(seed)
    return _assemble(
        shape,
        dummy(shape, seed),
        make_optimizer,
        loss or LossSettings(),
        microbatch_tokens,
        with_reference,
        computed,
    )


def _assemble(
    shape: ModelShape,
    read: Read,
    make_optimizer: MakeOptimizer,
    loss: LossSettings,
    microbatch_tokens: int,
    with_reference: bool,
    computed: dict[str, Any],
) -> Learner:
    objective = Objective(loss)
    settings = ModelSettings(**computed, with_entropy_gradient=loss.entropy_coef > 0)
    model = build_model(shape, settings)
    optimizer = make_optimizer(model)
    load(model, shape, read, master)
    optimizer.round_master()
    reference = None
    if with_reference:
        reference = build_frozen(shape, settings).eval()
        load(reference, shape, read)
    return Learner(
        model,
        shape,
        optimizer,
        objective,
        microbatch_tokens,
        align=_align(settings),
        reference=reference,
    )


def _align(settings: ModelSettings) -> int:
    """What packed lengths must be multiples of."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return lcm(tp if settings.sequence_parallel else 1, alignment(settings.attention))
