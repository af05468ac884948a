"""The checks a config must pass before anything heavy is imported. All failures are told at once."""

import ipaddress
import math
import re
from collections.abc import Iterator
from operator import attrgetter

from treepo_async.config.cores import parse_cores
from treepo_async.config.layout import Layout
from treepo_async.config.limits import engine_urls, response_limit
from treepo_async.config.loss_rules import check_loss
from treepo_async.config.schema import (
    BUILT_IN,
    LEAVE_ONE_OUT,
    AnyConfig,
    ClusterConfig,
    Config,
    EngineConfig,
    GenerateConfig,
    knobs,
)
from treepo_async.errors import ConfigError

OUT_SUFFIXES = (".jsonl", ".parquet")
_WITH_PASSWORD = re.compile(r"://[^/\s@]*@")
TRAINING_DATA = ("trees", "eval_path", "epochs")
"""Keys of the section `data` that only training has a use for."""


def validate(config: AnyConfig) -> None:
    """Check every value alone and against the others.

    Raises:
        ConfigError: one line for each thing that cannot be run, with the way out.
    """
    passwords = list(_check_passwords(config))
    if passwords:
        # alone, as other failures would print the value
        raise ConfigError("\n".join(passwords))
    own = _check_generation(config) if isinstance(config, GenerateConfig) else _check_run(config)
    failures = [*_check_values(config), *_check_combinations(config), *own]
    if failures:
        raise ConfigError("\n".join(failures))


def _check_passwords(config: AnyConfig) -> Iterator[str]:
    for key, _ in knobs(type(config)):
        value = attrgetter(key)(config)
        if isinstance(value, str) and _WITH_PASSWORD.search(value):
            yield (
                f"{key} holds a password, which would be saved with the config; give the server's key in "
                "engine.api_key_file, or put the data into a local file"
            )


def _check_values(config: AnyConfig) -> Iterator[str]:
    for key, knob in knobs(type(config)):
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


def _check_combinations(config: AnyConfig) -> Iterator[str]:
    tree = config.tree
    yield from _check_cores(config)
    if not tree.first_fork_min <= tree.first_fork_max <= tree.width:
        yield (
            f"tree.first_fork_min={tree.first_fork_min}, tree.first_fork_max={tree.first_fork_max} and "
            f"tree.width={tree.width} must not decrease in this order"
        )
    if tree.repetition_count == 1:
        yield "tree.repetition_count=1 would end every path; give 0 (never) or at least 2"
    if config.reward.correct <= config.reward.wrong:
        yield f"reward.correct={config.reward.correct} must be above reward.wrong={config.reward.wrong}"
    if config.reward.overlong_tokens > response_limit(config):
        yield (
            f"reward.overlong_tokens={config.reward.overlong_tokens} is more than the {response_limit(config)} tokens "
            "of a response"
        )
    if tree.split != "even" and tree.growth != "barrier":
        yield (
            f"tree.split={tree.split} deals out the forks of a round, and tree.growth={tree.growth} has no rounds; "
            "give tree.growth=barrier or tree.split=even"
        )
    yield from _check_pruning(config)


def _check_cores(config: AnyConfig) -> Iterator[str]:
    for key, _ in knobs(type(config)):
        text = attrgetter(key)(config) if key.endswith(".cores") else None
        if text is not None:
            try:
                parse_cores(key, text)
            except ConfigError as error:
                yield str(error)


def _check_pruning(config: AnyConfig) -> Iterator[str]:
    prune, tree = config.prune, config.tree
    judges = [key for key in ("min_logprob", "value") if getattr(prune, key) is not None]
    if judges and tree.growth == "independent":
        yield (
            f"prune.{judges[0]}={getattr(prune, judges[0])} judges paths at boundaries, which "
            "tree.growth=independent has none of; give barrier or eager"
        )
    if prune.probability > 1:
        yield f"prune.probability={prune.probability} must be at most 1"
    if prune.min_logprob is not None and prune.min_logprob >= 0:
        yield f"prune.min_logprob={prune.min_logprob} would prune every path; log-probs are below 0"
    if prune.value == "logprob" and prune.min_value >= 0:
        yield (
            f"prune.min_value={prune.min_value} would prune every path by prune.value=logprob; "
            "log-probs are below 0"
        )
    if prune.value == "agreement" and not 0 < prune.min_value <= 1:
        yield (
            f"prune.min_value={prune.min_value} must be a share above 0 and at most 1 for prune.value=agreement"
        )


def _check_run(config: Config) -> Iterator[str]:
    learner = config.learner
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(learner, name) < 1:
            yield f"learner.{name}={getattr(learner, name)} must be at least 0 and below 1"
    if learner.leave_one_out and learner.estimator not in LEAVE_ONE_OUT:
        yield (
            f"learner.leave_one_out=true does not go with learner.estimator={learner.estimator}; give false, or "
            f"one of {', '.join(LEAVE_ONE_OUT)}"
        )
    yield from check_loss(config)
    if config.data.trees is None:
        yield from _check_built_in(config)
    elif config.eval.every and list(_check_built_in(config)):
        yield (
            f"data={config.data.path} is the built-in task of another model than model={config.model.path}; give "
            "data=FILE to evaluate on, or eval.every=0"
        )
    yield from _check_engines(config)
    yield from _check_deadlines(config)
    yield from _check_layout(learner.layout)
    yield from _check_host(config.cluster)
    yield from _check_cluster(config)


def _check_engines(config: Config) -> Iterator[str]:
    """How many there are, and who runs them."""
    yield from _check_url(config.engine)
    urls = engine_urls(config.engine)
    if urls and config.engines not in (1, len(urls)):
        yield f"engines={config.engines} are not the {len(urls)} of engine.url={config.engine.url}; leave engines out"
    number = len(urls) or config.engines
    if config.actor.engines is not None and config.actor.engines > number:
        yield f"actor.engines={config.actor.engines} is more than engines={number}"


def _check_generation(config: GenerateConfig) -> Iterator[str]:
    if config.out is None:
        yield "out is not set; name the file of the trees, e.g. out=trees.jsonl"
    elif not config.out.endswith(OUT_SUFFIXES):
        yield f"out={config.out} must end in {' or '.join(OUT_SUFFIXES)}"
    if config.data.path in BUILT_IN and config.limit is None:
        yield f"data={config.data.path} has no end; give limit=N"
    for name in TRAINING_DATA:
        if getattr(config.data, name) is not None:
            yield f"data.{name} is for training; here every record of data is taken once, leave it out"
    yield from _check_built_in(config)
    yield from _check_url(config.engine)


def _check_built_in(config: AnyConfig) -> Iterator[str]:
    data, model = config.data.path, config.model.path
    if data in BUILT_IN and model != data:
        own = model if model in BUILT_IN else "FILE"
        yield f"data={data} is the built-in task of model={data}; give model={model} its own data={own}"


def _check_url(engine: EngineConfig) -> Iterator[str]:
    urls = engine_urls(engine)
    for url in urls:
        if not re.fullmatch(r"https?://[^/\s,]+", url):
            yield f"engine.url={url} is no http://host:port of a running SGLang server"
    if len(set(urls)) < len(urls):
        yield f"engine.url={engine.url} names a server twice"
    if engine.api_key_file is not None and not urls:
        yield "engine.api_key_file is the key of the server at engine.url; give that too, or leave it out"


def _check_host(cluster: ClusterConfig) -> Iterator[str]:
    """Sockets that other machines reach need keys."""
    try:
        address = ipaddress.IPv4Address(cluster.host)
    except ValueError:
        yield f"cluster.host={cluster.host} is no IPv4 address of this machine, like 10.0.0.7"
        return
    if address.is_unspecified:
        yield f"cluster.host={cluster.host} is where to bind, and no address to connect to; name one of this machine"
    elif not address.is_loopback and cluster.keys_dir is None:
        yield (
            f"cluster.host={cluster.host} is open to other machines and needs cluster.keys_dir; make one with: "
            "python launch/keys.py DIR"
        )


def _check_cluster(config: Config) -> Iterator[str]:
    """What is said of a Ray cluster needs one."""
    cluster = config.cluster
    address = cluster.ray_address
    if address is not None and address.startswith("ray://"):
        yield (
            f"cluster.ray_address={address} is that of Ray's client, through which roles cannot be placed; start the "
            "driver on a node of the cluster with cluster.ray_address=auto, or give the head's host:port"
        )
    if address == "local":
        yield "cluster.ray_address=local starts no cluster of its own here; leave it out, which does"
    for key in ("token_file", "runtime_env"):
        if getattr(cluster, key) is not None and cluster.ray_address is None:
            yield (
                f"cluster.{key}={getattr(cluster, key)} is of an existing Ray cluster; give cluster.ray_address, or "
                "leave it out"
            )


def _check_deadlines(config: Config) -> Iterator[str]:
    """A wait that contains another one must be the longer one."""
    for inner, outer in (
        ("engine.start_timeout_s", "cluster.start_timeout_s"),
        ("engine.start_timeout_s", "actor.tree_timeout_s"),
        ("eval.timeout_s", "actor.tree_timeout_s"),
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
