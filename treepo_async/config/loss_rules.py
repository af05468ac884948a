"""Which losses, corrections, masks and values go together: each rule one line, with the way out.

Neighbour: `validate` tells them with all others. The formulas are in `docs/corrections.md`.
"""

from collections import Counter
from collections.abc import Iterator

from treepo_async.config.limits import NEEDS_PROXIMAL, is_anchored, mask_names, reads_proximal
from treepo_async.config.schema import LEAVE_ONE_OUT, MASKS, Config, LearnerConfig

CLIPPED = ("ppo", "gspo", "gspo_segment")
"""Losses that a dual clip is defined for."""
VTRACE = LEAVE_ONE_OUT
"""Estimators that compare with means, which can weigh each leaf by how likely its path has become."""


def check_loss(config: Config) -> Iterator[str]:
    """Everything about the loss that cannot be run or would do nothing."""
    learner = config.learner
    yield from _check_ratio(learner)
    yield from _check_correction(learner)
    yield from _check_proximal(learner)
    yield from _check_masks(learner)
    yield from _check_values(learner)
    if config.data.trees is not None:
        yield from _check_offline(learner)
    prompts = config.replay.prompts_per_batch
    if learner.minibatches > prompts:
        yield (
            f"learner.minibatches={learner.minibatches} is more than the trees of a batch, "
            f"replay.prompts_per_batch={prompts}"
        )


def _check_ratio(learner: LearnerConfig) -> Iterator[str]:
    if learner.loss == "cispo" and not 0 <= learner.clip_low <= 1:
        yield (
            f"learner.clip_low={learner.clip_low} must be at least 0 and, with learner.loss=cispo, at most 1, which is "
            "no lower bound"
        )
    if learner.loss != "cispo" and not 0 <= learner.clip_low < 1:
        yield f"learner.clip_low={learner.clip_low} must be at least 0 and below 1"
    if learner.dual_clip is not None and learner.loss not in CLIPPED:
        yield (
            f"learner.dual_clip={learner.dual_clip} is for learner.loss={', '.join(CLIPPED)}; leave it out of "
            f"{learner.loss}"
        )
    if learner.anchor == "behavior" and learner.loss == "reinforce":
        yield (
            "learner.anchor=behavior does nothing: learner.loss=reinforce has no ratio; give proximal, and correct "
            "with learner.correction"
        )


def _check_correction(learner: LearnerConfig) -> Iterator[str]:
    name, floor, cap = learner.correction, learner.correction_floor, learner.correction_cap
    if is_anchored(learner) and name != "none":
        cause = "loss=dppo" if learner.loss == "dppo" else "anchor=behavior"
        yield (
            f"learner.correction={name} would count staleness twice: the ratio of learner.{cause} is the "
            "importance weight already; give learner.correction=none"
        )
    if name in ("truncated", "icepop") and cap < 1:
        yield (
            f"learner.correction_cap={cap} would also weigh down tokens of an unchanged policy; give at least 1"
        )
    if name == "icepop" and floor > 1:
        yield (
            f"learner.correction_floor={floor} would leave out tokens of an unchanged policy; give at most 1"
        )
    if name == "icepop" and floor >= cap:
        yield f"learner.correction_floor={floor} must be below learner.correction_cap={cap}"


def _check_proximal(learner: LearnerConfig) -> Iterator[str]:
    proximal, many = learner.proximal, learner.minibatches > 1
    if proximal == "current" and many and learner.loss != "reinforce":
        yield (
            f"learner.proximal=current with learner.minibatches={learner.minibatches} moves the centre of "
            f"learner.loss={learner.loss} along with the weights; give auto, recomputed or interpolated"
        )
    idle = not reads_proximal(learner) and not (many and is_anchored(learner))
    if proximal in ("recomputed", "interpolated") and idle:
        yield (
            f"learner.proximal={proximal} is not read by learner.loss={learner.loss} with "
            f"learner.anchor={learner.anchor}, no correction and no mask; give auto"
        )
    if proximal in ("current", "interpolated"):
        wanting = [f"mask={name}" for name in mask_names(learner.mask) if name in NEEDS_PROXIMAL]
        if learner.value_correction != "none":
            wanting.append(f"value_correction={learner.value_correction}")
        for what in wanting:
            yield (
                f"learner.{what} must know the whole batch before its first update, and "
                f"learner.proximal={proximal} does not; give auto or recomputed"
            )


def _check_masks(learner: LearnerConfig) -> Iterator[str]:
    names = mask_names(learner.mask)
    for name in dict.fromkeys(names):
        if name == "none":
            yield f"learner.mask={learner.mask} joins none and others; give one or the other"
        elif name not in MASKS:
            yield f"learner.mask={learner.mask}: {name!r} is not one of none, {', '.join(MASKS)}"
    for name, count in Counter(names).items():
        if count > 1:
            yield f"learner.mask={learner.mask} names {name} {count} times; give it once"
    low, high = learner.mask_low, learner.mask_high
    if "window" in names and not (low <= 1 <= high and low < high):
        yield (
            f"learner.mask_low={low} and learner.mask_high={high} must have 1 between them, the ratio of an "
            "unchanged policy"
        )
    if any(name.startswith("veto") for name in names) and learner.mask_veto >= 1:
        yield (
            f"learner.mask_veto={learner.mask_veto} must be below 1, the ratio of an unchanged policy"
        )


def _check_values(learner: LearnerConfig) -> Iterator[str]:
    if learner.value_correction == "none":
        return
    if learner.estimator not in VTRACE:
        yield (
            f"learner.value_correction={learner.value_correction} does not go with "
            f"learner.estimator={learner.estimator}; give none, or one of {', '.join(VTRACE)}"
        )
    if learner.leave_one_out:
        yield (
            f"learner.value_correction={learner.value_correction} does not go with learner.leave_one_out=true, "
            "whose means need one weight a trajectory; give false"
        )


def _check_offline(learner: LearnerConfig) -> Iterator[str]:
    """Trees of a file have no lag."""
    if learner.proximal == "interpolated":
        yield (
            "learner.proximal=interpolated goes by the lag of a token, and the trees of data.trees have none; "
            "give auto, or recomputed"
        )
    if "geometric" in mask_names(learner.mask) and learner.mask_lag > 0:
        yield (
            f"learner.mask_lag={learner.mask_lag} allows for the lag of a segment, and the trees of data.trees have "
            "none; give 0"
        )
