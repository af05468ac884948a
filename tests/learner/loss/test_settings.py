from dataclasses import fields

from treepo_async.config.command_line import parse
from treepo_async.config.schema import Config
from treepo_async.learner.loss.mask import MaskRules
from treepo_async.learner.loss.objective import LossSettings
from treepo_async.learner.loss.settings import loss_settings


def test_the_defaults_of_the_config_are_those_of_the_loss():
    assert loss_settings(Config()) == LossSettings()


def test_every_setting_comes_from_the_key_of_its_name():
    words = {
        "loss": "gspo",
        "proximal": "recomputed",
        "clip_low": 0.1,
        "clip_high": 0.4,
        "dual_clip": 4.0,
        "tv_clip": 0.3,
        "kl_coef": 0.5,
        "kl_estimator": "k2",
        "entropy_coef": 0.25,
        "correction": "icepop",
        "correction_cap": 3.0,
        "correction_floor": 0.25,
        "correct_fresh": True,
    }
    config = parse([f"learner.{key}={value}" for key, value in words.items()])
    found = loss_settings(config)
    assert {name: getattr(found, name) for name in words} == words
    named = {f.name for f in fields(LossSettings)}
    assert named - words.keys() == {"anchor", "mask"}
    behavior = parse(["learner.anchor=behavior", "learner.correction=none"])
    assert loss_settings(behavior).anchor == "behavior"


def test_masks_have_their_names_and_numbers():
    config = parse(
        [
            "learner.mask=window + veto_subtree",
            "learner.mask_sigmas=2",
            "learner.mask_lag=0.5",
            "learner.mask_low=0.7",
            "learner.mask_high=1.4",
            "learner.mask_k3=0.5",
            "learner.mask_veto=0.01",
        ]
    )
    assert loss_settings(config).mask == MaskRules(
        ("window", "veto_subtree"), 2.0, 0.5, 0.7, 1.4, 0.5, 0.01
    )


def test_fresh_tokens_are_corrected_by_default_with_bfloat16_alone():
    assert not loss_settings(parse([])).correct_fresh
    assert loss_settings(parse(["model.dtype=bfloat16"])).correct_fresh
    assert not loss_settings(
        parse(["model.dtype=bfloat16", "learner.correct_fresh=false"])
    ).correct_fresh
