from dataclasses import fields, is_dataclass, replace
from operator import attrgetter

import pytest

from treepo_async.config.command_line import parse
from treepo_async.config.schema import BUILT_IN, Config, knobs
from treepo_async.config.validate import validate
from treepo_async.errors import ConfigError

BOUNDED = [
    (key, knob)
    for key, knob in knobs(Config)
    if knob.metadata["at_least"] is not None or knob.metadata["above"] is not None
]
CHOICES = [(key, knob) for key, knob in knobs(Config) if knob.metadata["choices"]]
FLOATS = [key for key, knob in knobs(Config) if knob.type is float]


def refusals(*words):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    return str(caught.value).splitlines()


def test_the_defaults_can_be_run():
    validate(Config())


def test_every_section_is_documented_and_has_knobs():
    sections = [f for f in fields(Config) if is_dataclass(f.type)]
    assert len(sections) > 5
    assert all(f.type.__doc__ and list(knobs(f.type)) for f in sections)


@pytest.mark.parametrize(("key", "knob"), BOUNDED, ids=[key for key, _ in BOUNDED])
def test_a_value_below_its_bound_is_refused_by_name(key, knob):
    at_least, above = knob.metadata["at_least"], knob.metadata["above"]
    value = at_least - 1 if above is None else above
    bound = f"above {above}" if at_least is None else f"at least {at_least}"
    found = refusals(f"{key}={value}")
    assert any(line.startswith(f"{key}={value}") and line.endswith(bound) for line in found)


@pytest.mark.parametrize(("key", "knob"), CHOICES, ids=[key for key, _ in CHOICES])
def test_a_value_that_is_no_choice_is_refused_with_the_choices(key, knob):
    (message,) = refusals(f"{key}=other")
    assert message == f"{key}=other is not one of {', '.join(knob.metadata['choices'])}"


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    assert f"{key}={value} must be a finite number" in refusals(f"{key}={value}")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tree.first_fork_min=3"], "tree.first_fork_min=3, tree.first_fork_max=2 and"),
        (["tree.width=1"], "tree.width=1 must not decrease in this order"),
        (["learner.clip_low=1"], "learner.clip_low=1.0 must be at least 0 and below 1"),
        (["learner.clip_low=-0.1"], "learner.clip_low=-0.1 must be at least 0"),
        (["learner.beta1=1"], "learner.beta1=1.0 must be at least 0 and below 1"),
        (["learner.beta2=-1"], "learner.beta2=-1.0 must be at least 0 and below 1"),
        (["reward.wrong=1"], "reward.correct=1.0 must be above reward.wrong=1.0"),
        (["model=some/model"], "give model=some/model its own data=FILE"),
        (
            ["model=tiny-precedence"],
            "data=tiny is the built-in task of model=tiny; give model=tiny-precedence its own data=tiny-precedence",
        ),
        (
            ["data=tiny-precedence"],
            "data=tiny-precedence is the built-in task of model=tiny-precedence",
        ),
        (["tree.repetition_count=1"], "give 0 (never) or at least 2"),
        (["data.instruction=\\${seed}"], "data.instruction=${seed} holds '${'"),
        (["learner=tp4dp"], "learner.layout='tp4dp' is not a layout"),
    ],
)
def test_values_that_do_not_go_together_are_refused(words, named):
    (message,) = refusals(*words)
    assert named in message


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_model_and_its_task_go_together(name):
    assert parse([f"model={name}", f"data={name}"]).data.path == name


def test_own_data_may_be_learned_by_the_tiny_model():
    assert parse(["data=train.jsonl"]).model.path == "tiny"


def test_all_failures_are_told_at_once():
    found = refusals(
        "steps=0",
        "learner.lr=0",
        "tree.fallback=never",
        "tree.first_fork_max=99",
        "reward.correct=-5",
        "learner=pp0",
    )
    for key in ("steps=0", "learner.lr=0", "tree.fallback", "tree.first_fork_max=99", "pp0"):
        assert any(key in line for line in found)
    assert len(found) == 6


def test_values_set_in_code_are_checked_too():
    config = Config(steps=0)
    config.tree = replace(config.tree, temperature=0.0)
    with pytest.raises(ConfigError, match=r"steps=0.*\n.*tree\.temperature=0\.0"):
        validate(config)
    assert attrgetter("tree.temperature")(Config()) > 0
