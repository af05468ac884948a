from dataclasses import fields, is_dataclass, replace
from operator import attrgetter

import pytest

from treepo_async.cluster.plan import sizes
from treepo_async.config.command_line import parse, parse_generation
from treepo_async.config.limits import engine_urls
from treepo_async.config.schema import BUILT_IN, ESTIMATORS, LEAVE_ONE_OUT, Config, knobs
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
        (
            ["learner.leave_one_out=true", "learner.estimator=rloo"],
            "learner.leave_one_out=true does not go with learner.estimator=rloo; give false, or one of treepo,",
        ),
        (["tree.repetition_count=1"], "give 0 (never) or at least 2"),
        (
            ["eval.timeout_s=601", "learner.batch_timeout_s=900"],
            "eval.timeout_s=601 must not be above actor.tree_timeout_s=600, which waits for it",
        ),
        (
            ["engine.start_timeout_s=240", "actor.tree_timeout_s=200", "eval.timeout_s=100"],
            "engine.start_timeout_s=240 must not be above actor.tree_timeout_s=200, which waits for it",
        ),
        (["tree.split=entropy", "tree.growth=eager"], "tree.growth=eager has no rounds"),
        (
            ["prune.min_logprob=-2", "tree.growth=independent"],
            "prune.min_logprob=-2.0 judges paths at boundaries",
        ),
        (["reward.overlong_tokens=71"], "reward.overlong_tokens=71 is more than the 70 tokens"),
        (["prune.probability=1.5"], "prune.probability=1.5 must be at most 1"),
        (["prune.min_logprob=0"], "prune.min_logprob=0.0 would prune every path"),
        (["prune.value=logprob"], "prune.min_value=0.0 would prune every path"),
        (["prune.value=agreement"], "prune.min_value=0.0 must be a share above 0"),
        (["data.instruction=\\${seed}"], "data.instruction=${seed} holds '${'"),
        (["learner=tp4dp"], "learner.layout='tp4dp' is not a layout"),
    ],
)
def test_values_that_do_not_go_together_are_refused(words, named):
    (message,) = refusals(*words)
    assert named in message


@pytest.mark.parametrize("name", ESTIMATORS)
def test_leave_one_out_is_accepted_for_the_estimators_that_take_it(name):
    words = [f"learner.estimator={name}", "learner.leave_one_out=true"]
    if name in LEAVE_ONE_OUT:
        assert parse(words).learner.leave_one_out
    else:
        assert len(refusals(*words)) == 1


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


# ------------------------------------------------------------------ trees of files


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "out is not set"),
        (["out=o.csv", "limit=1"], "out=o.csv must end in .jsonl or .parquet"),
        (["out=o.jsonl"], "data=tiny has no end; give limit=N"),
        (["out=o.jsonl", "limit=0"], "limit=0 must be at least 1"),
        (["out=o.jsonl", "limit=1", "data.epochs=2"], "data.epochs is for training"),
        (["out=o.jsonl", "limit=1", "data.eval_path=e.jsonl"], "data.eval_path is for training"),
        (["out=o.jsonl", "limit=1", "data.trees=t.jsonl"], "data.trees is for training"),
        (["out=o.jsonl", "limit=1", "model=m"], "data=tiny is the built-in task of model=tiny"),
        (
            ["out=o.jsonl", "limit=1", "engine.url=host:1"],
            "engine.url=host:1 is no http://host:port",
        ),
        (["out=o.jsonl", "limit=1", "tree.width=0"], "tree.width=0 must be at least 1"),
    ],
)
def test_a_generation_that_cannot_be_done_is_refused_by_name(words, named):
    with pytest.raises(ConfigError) as caught:
        parse_generation(words)
    assert any(line.startswith(named) for line in str(caught.value).splitlines())


ONE, TWO = "http://127.0.0.1:30000", "https://engine.example:443"


def test_a_run_may_use_servers_that_somebody_else_runs_and_has_as_many_engines():
    config = parse([f"engine.url={ONE}/,{TWO}", "actor.engines=2"])
    assert engine_urls(config.engine) == (ONE, TWO)
    assert sizes(config)[0] == 2
    assert engine_urls(parse([]).engine) == ()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([f"engine.url={ONE},host:1"], "engine.url=host:1 is no http://host:port"),
        ([f"engine.url={ONE},"], "engine.url= is no http://host:port"),
        ([f"engine.url={ONE},{ONE}/"], f"engine.url={ONE},{ONE}/ names a server twice"),
        ([f"engine.url={ONE},{TWO}", "engines=3"], "engines=3 are not the 2 of engine.url"),
        ([f"engine.url={ONE}", "actor.engines=2"], "actor.engines=2 is more than engines=1"),
        (["engine.api_key_file=key"], "engine.api_key_file is the key of the server at engine.url"),
    ],
)
def test_servers_that_cannot_be_used_are_refused_by_name(words, named):
    (message,) = refusals(*words)
    assert message.startswith(named)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "10.0.0.7", "localhost", "127.0.0.1.example.com", "host:1"]
)
def test_a_host_that_others_reach_needs_keys_and_must_be_an_address(host):
    (message,) = refusals(f"cluster.host={host}")
    assert message.startswith(f"cluster.host={host} ")


def test_a_host_with_keys_and_loopback_without_are_accepted():
    assert parse(["cluster.host=10.0.0.7", "cluster.keys_dir=keys"]).cluster.host == "10.0.0.7"
    assert parse(["cluster.host=127.0.0.2"]).cluster.keys_dir is None
    (message,) = refusals("cluster.host=10.0.0.7")
    assert "python launch/keys.py DIR" in message


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["cluster.token_file=t"], "cluster.token_file=t is of an existing Ray cluster"),
        (["cluster.runtime_env=e"], "cluster.runtime_env=e is of an existing Ray cluster"),
        (
            ["cluster.ray_address=ray://h:1"],
            "cluster.ray_address=ray://h:1 is that of Ray's client",
        ),
        (["cluster.ray_address=local"], "cluster.ray_address=local starts no cluster"),
    ],
)
def test_what_is_said_of_a_cluster_needs_one_that_can_be_joined(words, named):
    (message,) = refusals(*words)
    assert message.startswith(named)
    there = ["cluster.ray_address=10.0.0.1:6379", "cluster.token_file=t", "cluster.runtime_env=e"]
    assert parse(there).cluster.ray_address == "10.0.0.1:6379"


@pytest.mark.parametrize(
    "word",
    [
        "data=https://me:hunter2@host/data.jsonl",
        "engine.url=http://hunter2@host:1",
        "engine.url=http://me:hunter2@host:1/path",
        "model=hf://me:hunter2@host/model",
        "run_dir=s3://me:hunter2@bucket/run",
    ],
)
def test_a_password_is_refused_before_it_is_saved_and_not_printed(word):
    for read in (parse, parse_generation):
        if read is parse_generation and word.startswith("run_dir"):
            continue
        with pytest.raises(ConfigError) as caught:
            read([word])
        assert "holds a password" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_a_key_file_is_for_an_engine_of_somebody_else():
    base = ["out=o.jsonl", "limit=1", "engine.api_key_file=key"]
    parse_generation([*base, "engine.url=http://127.0.0.1:1"])
    with pytest.raises(ConfigError, match=r"the key of the server at engine\.url"):
        parse_generation(base)


def test_trees_of_a_file_need_no_data_unless_there_is_an_evaluation():
    parse(["data.trees=t.jsonl", "model=m", "eval.every=0"])
    (message,) = refusals("data.trees=t.jsonl", "model=m")
    assert message.endswith("give data=FILE to evaluate on, or eval.every=0")
