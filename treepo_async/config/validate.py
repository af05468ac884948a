"""The checks a config must pass before anything heavy is imported. All failures are told at once."""

import math
from collections.abc import Iterator
from operator import attrgetter

from treepo_async.config.layout import Layout
from treepo_async.config.schema import BUILT_IN, Config, knobs
from treepo_async.errors import ConfigError


def validate(config: Config) -> None:
    """Check every value alone and against the others.

    Raises:
        ConfigError: one line for each thing that cannot be run, with the way out.
    """
    failures = [*_check_values(config), *_check_combinations(config)]
    if failures:
        raise ConfigError("\n".join(failures))


def _check_values(config: Config) -> Iterator[str]:
    for key, knob in knobs(Config):
        value, bounds = attrgetter(key)(config), knob.metadata
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} must be a finite number"
        if isinstance(value, str) and "${" in value:
            yield f"{key}={value} holds '${{', which would be read as a reference; write it another way"
        if bounds["choices"] and value not in bounds["choices"]:
            yield f"{key}={value} is not one of {', '.join(bounds['choices'])}"
        if bounds["at_least"] is not None and value < bounds["at_least"]:
            yield f"{key}={value} must be at least {bounds['at_least']}"
        if bounds["above"] is not None and value <= bounds["above"]:
            yield f"{key}={value} must be above {bounds['above']}"


def _check_combinations(config: Config) -> Iterator[str]:
    tree, learner = config.tree, config.learner
    if not tree.first_fork_min <= tree.first_fork_max <= tree.width:
        yield (
            f"tree.first_fork_min={tree.first_fork_min}, tree.first_fork_max={tree.first_fork_max} and "
            f"tree.width={tree.width} must not decrease in this order"
        )
    if tree.repetition_count == 1:
        yield "tree.repetition_count=1 would end every segment; give 0 (never) or at least 2"
    for name in ("clip_low", "beta1", "beta2"):
        if not 0 <= getattr(learner, name) < 1:
            yield f"learner.{name}={getattr(learner, name)} must be at least 0 and below 1"
    if config.reward.correct <= config.reward.wrong:
        yield f"reward.correct={config.reward.correct} must be above reward.wrong={config.reward.wrong}"
    data, model = config.data.path, config.model.path
    if data in BUILT_IN and model != data:
        own = model if model in BUILT_IN else "FILE"
        yield f"data={data} is the built-in task of model={data}; give model={model} its own data={own}"
    yield from _check_deadlines(config)
    yield from _check_layout(learner.layout)


def _check_deadlines(config: Config) -> Iterator[str]:
    """A wait that contains another one must be the longer one."""
    for inner, outer in (
        ("engine.start_timeout_s", "cluster.start_timeout_s"),
        ("eval.timeout_s", "learner.batch_timeout_s"),
    ):
        waits = attrgetter(inner)(config), attrgetter(outer)(config)
        if waits[0] > waits[1]:
            yield f"{inner}={waits[0]:g} must not be above {outer}={waits[1]:g}, which waits for it"


def _check_layout(text: str) -> Iterator[str]:
    try:
        Layout.parse(text)
    except ConfigError as error:
        yield str(error)
