"""From the config to what the objective is told; the same on every rank."""

from treepo_async.config.limits import corrects_fresh, mask_names
from treepo_async.config.schema import Config
from treepo_async.learner.loss.mask import MaskRules
from treepo_async.learner.loss.objective import LossSettings


def loss_settings(config: Config) -> LossSettings:
    """What the config says is minimised."""
    learner = config.learner
    return LossSettings(
        loss=learner.loss,
        anchor=learner.anchor,
        proximal=learner.proximal,
        clip_low=learner.clip_low,
        clip_high=learner.clip_high,
        dual_clip=learner.dual_clip,
        tv_clip=learner.tv_clip,
        kl_coef=learner.kl_coef,
        kl_estimator=learner.kl_estimator,
        entropy_coef=learner.entropy_coef,
        correction=learner.correction,
        correction_cap=learner.correction_cap,
        correction_floor=learner.correction_floor,
        correct_fresh=corrects_fresh(config),
        mask=MaskRules(
            names=tuple(mask_names(learner.mask)),
            sigmas=learner.mask_sigmas,
            per_lag=learner.mask_lag,
            low=learner.mask_low,
            high=learner.mask_high,
            k3=learner.mask_k3,
            veto=learner.mask_veto,
        ),
    )
