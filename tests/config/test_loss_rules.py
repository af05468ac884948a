"""What goes together in the loss, and that each refusal names the key and the way out."""

import itertools

import pytest

from treepo_async.config.command_line import parse
from treepo_async.config.limits import needs_proximal
from treepo_async.config.loss_rules import CLIPPED, VTRACE
from treepo_async.config.schema import (
    CORRECTIONS,
    ESTIMATORS,
    KL_ESTIMATORS,
    LOSSES,
    MASKS,
    NORMALIZERS,
    PROXIMALS,
)
from treepo_async.errors import ConfigError

OFFLINE = ["data.trees=t.jsonl", "data=problems.jsonl"]


def words_of(**keys):
    return [f"learner.{key}={value}" for key, value in keys.items()]


def refusals(*words):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("keys", "named", "way_out"),
    [
        (
            {"anchor": "behavior"},
            "learner.correction=truncated would count staleness twice: the ratio of learner.anchor=behavior",
            "give learner.correction=none",
        ),
        ({"loss": "dppo", "correction": "icepop"}, "learner.correction=icepop", "correction=none"),
        ({"loss": "cispo", "anchor": "behavior"}, "learner.correction=truncated", "=none"),
        ({"loss": "gspo", "anchor": "behavior"}, "learner.correction=truncated", "=none"),
        (
            {"loss": "reinforce", "anchor": "behavior", "correction": "none"},
            "learner.anchor=behavior does nothing",
            "give proximal",
        ),
        ({"loss": "cispo", "clip_low": 1.5}, "learner.clip_low=1.5", "at most 1"),
        ({"loss": "ppo", "clip_low": 1}, "learner.clip_low=1.0", "below 1"),
        ({"loss": "cispo", "dual_clip": 3}, "learner.dual_clip=3.0", "leave it out of cispo"),
        ({"loss": "reinforce", "dual_clip": 3}, "learner.dual_clip=3.0", "leave it out"),
        ({"correction_cap": 0.9}, "learner.correction_cap=0.9", "give at least 1"),
        (
            {"correction": "icepop", "correction_floor": 1.2},
            "learner.correction_floor=1.2",
            "give at most 1",
        ),
        (
            {"correction": "icepop", "correction_floor": 1, "correction_cap": 1},
            "learner.correction_floor=1.0",
            "must be below learner.correction_cap=1.0",
        ),
        ({"proximal": "current", "minibatches": 2}, "learner.proximal=current", "give auto"),
        (
            {"anchor": "behavior", "correction": "none", "proximal": "interpolated"},
            "learner.proximal=interpolated is not read",
            "give auto",
        ),
        (
            {"loss": "dppo", "correction": "none", "proximal": "recomputed"},
            "learner.proximal=recomputed is not read",
            "give auto",
        ),
        (
            {"loss": "reinforce", "correction": "none", "proximal": "recomputed", "minibatches": 2},
            "learner.proximal=recomputed is not read",
            "give auto",
        ),
        (
            {"mask": "m2po+window", "proximal": "interpolated"},
            "learner.mask=m2po must know the whole batch",
            "give auto or recomputed",
        ),
        ({"mask": "geometric", "proximal": "current"}, "learner.mask=geometric", "auto"),
        (
            {"value_correction": "vtrace", "proximal": "current"},
            "learner.value_correction=vtrace must know the whole batch",
            "give auto or recomputed",
        ),
        ({"mask": "windo"}, "learner.mask=windo: 'windo' is not one of none, geometric", MASKS[-1]),
        ({"mask": "none+k3"}, "learner.mask=none+k3 joins none and others", "one or the other"),
        ({"mask": "k3+k3"}, "learner.mask=k3+k3 names k3 2 times", "give it once"),
        ({"mask": "window", "mask_low": 1.1}, "learner.mask_low=1.1", "must have 1 between"),
        ({"mask": "window", "mask_high": 0.9}, "learner.mask_high=0.9", "must have 1 between"),
        ({"mask": "veto_token", "mask_veto": 1}, "learner.mask_veto=1.0", "must be below 1"),
        (
            {"value_correction": "vtrace", "estimator": "spo"},
            "learner.value_correction=vtrace does not go with learner.estimator=spo",
            "give none, or one of treepo",
        ),
        (
            {"value_correction": "vtrace", "leave_one_out": "true"},
            "does not go with learner.leave_one_out=true",
            "give false",
        ),
        ({"minibatches": 17}, "learner.minibatches=17", "replay.prompts_per_batch=16"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(keys, named, way_out):
    (message,) = refusals(*words_of(**keys))
    assert named in message
    assert way_out in message


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"proximal": "interpolated"}, "learner.proximal=interpolated goes by the lag"),
        ({"mask": "geometric"}, "learner.mask_lag=0.02 allows for the lag"),
    ],
)
def test_trees_of_a_file_have_no_lag_to_go_by(keys, named):
    parse(words_of(**keys))
    (message,) = refusals(*OFFLINE, *words_of(**keys))
    assert named in message
    parse([*OFFLINE, "learner.mask=geometric", "learner.mask_lag=0"])


def test_all_failures_of_the_loss_are_told_at_once():
    found = refusals(
        *words_of(anchor="behavior", mask="k3+k3+bad", mask_veto=2, loss="dppo", dual_clip=2)
    )
    assert len(found) == 4


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"loss": "ppo", "dual_clip": 3, "minibatches": 4},
        {"loss": "cispo", "clip_low": 1, "clip_high": 4},
        {"loss": "cispo", "anchor": "behavior", "correction": "none", "clip_low": 1},
        {"loss": "dppo", "correction": "none"},
        {"loss": "dppo", "correction": "none", "mask": "m2po", "minibatches": 2},
        {"loss": "gspo", "mask": "veto_subtree"},
        {"loss": "gspo_segment", "anchor": "behavior", "correction": "none", "minibatches": 2},
        {"loss": "reinforce", "correction": "importance"},
        {"loss": "reinforce", "correction": "none", "minibatches": 2, "proximal": "current"},
        {"proximal": "interpolated", "minibatches": 4, "correction": "importance"},
        {"proximal": "recomputed", "mask": "geometric+veto_segment", "correction": "icepop"},
        {"value_correction": "vtrace", "estimator": "grpo"},
        {"kl_coef": 0.1, "entropy_coef": 0.01, "normalizer": "unique_token"},
        {"mask": "window", "mask_low": 0.99, "mask_high": 1.01, "correction": "none"},
    ],
)
def test_what_goes_together_is_accepted(keys):
    parse(words_of(**keys))


def test_every_choice_can_be_had_with_something():
    bare = {"correction": "none"}
    for loss, normalizer in itertools.product(LOSSES, NORMALIZERS):
        parse(words_of(loss=loss, normalizer=normalizer, **bare))
    for choice in CORRECTIONS:
        parse(words_of(correction=choice))
    for choice in MASKS:
        parse(words_of(mask=choice))
    for choice in PROXIMALS:
        parse(words_of(proximal=choice))
    for choice in KL_ESTIMATORS:
        parse(words_of(kl_coef=0.1, kl_estimator=choice))
    for choice in CLIPPED:
        parse(words_of(loss=choice, dual_clip=3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_are_corrected_for_the_estimators_that_take_it(estimator):
    words = words_of(estimator=estimator, value_correction="vtrace")
    if estimator in VTRACE:
        assert parse(words).learner.value_correction == "vtrace"
    else:
        assert len(refusals(*words)) == 1


@pytest.mark.parametrize(
    ("keys", "needs"),
    [
        ({}, False),
        ({"minibatches": 2}, True),
        ({"minibatches": 2, "proximal": "interpolated"}, False),
        ({"minibatches": 2, "loss": "reinforce", "correction": "none"}, False),
        ({"minibatches": 2, "loss": "reinforce"}, True),
        ({"minibatches": 2, "loss": "dppo", "correction": "none"}, True),
        ({"mask": "k3+veto_token"}, False),
        ({"mask": "k3+m2po"}, True),
        ({"mask": "geometric"}, True),
        ({"value_correction": "vtrace"}, True),
        ({"proximal": "recomputed"}, True),
    ],
)
def test_a_pass_at_the_start_of_a_batch_is_made_where_something_reads_it(keys, needs):
    assert needs_proximal(parse(words_of(**keys))) == needs
