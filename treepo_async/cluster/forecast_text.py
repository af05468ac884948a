"""What a dry run says beside the plan: what a step is made of, and what it needs of memory. Neighbours: `forecast`, `forecast_warnings`."""

from collections.abc import Iterator

from treepo_async.cluster.forecast import Device, Forecast
from treepo_async.cluster.forecast_warnings import COLUMNS, warnings_of
from treepo_async.cluster.memory import GIB, model_parameters
from treepo_async.cluster.plan import sizes
from treepo_async.config.limits import context_length, prompt_limit, response_limit


def describe(forecast: Forecast, device: Device) -> str:
    """The text of a dry run, warnings last."""
    rows = [
        *_step(forecast),
        *_memory(forecast, device),
        *(("warning", text) for text in warnings_of(forecast, device)),
    ]
    return "\n".join(f"  {name:<8} {text}" for name, text in rows)


def held(forecast: Forecast, device: Device) -> list[str]:
    """What a rank of each stage holds, then what a GPU of an engine holds, for a table of places."""
    ranks = forecast.ranks(on_gpu=device.gpu_bytes is not None)
    of = "" if device.gpu_bytes is None else f" of {device.gpu_bytes / GIB:g}"
    engine = forecast.engine(device.gpu_bytes or device.ram_bytes)
    if device.gpu_bytes is None:
        cache = (forecast.config.engine.max_total_tokens or 0) * engine.kv_bytes_per_token
        return [f"{rank.total / GIB:.1f} GiB" for rank in ranks] + [
            f"{(engine.weights + cache) / GIB:.1f} GiB"
        ]
    fit = max(0, engine.tokens_that_fit(device.gpu_bytes))
    return [f"{rank.total / GIB:.1f}{of} GiB each" for rank in ranks] + [
        f"weights {engine.weights / GIB:.1f}{of} GiB each, {fit:,} tokens of KV cache"
    ]


def _step(forecast: Forecast) -> Iterator[tuple[str, str]]:
    config, replay, learner = forecast.config, forecast.config.replay, forecast.config.learner
    prompts, width = replay.prompts_per_batch, config.tree.width
    updates = learner.minibatches
    yield (
        "update",
        f"{_count(updates, 'update')} a step of {prompts / updates:g} trees, dealt to "
        f"{_count(forecast.layout.dp, 'replica')}; loss {learner.loss}, {learner.normalizer}, mask {learner.mask}, "
        f"correction {learner.correction}",
    )
    longest = forecast.longest_path
    if longest is None:
        yield "lengths", f"as {config.data.trees} has them"
    else:
        response, prompt = response_limit(config), prompt_limit(config, forecast.model)
        most = prompts * (prompt + width * response)
        yield (
            "lengths",
            f"prompts up to {prompt} tokens, responses up to {response}, paths up to {longest}; "
            f"a step at most {most:,} tokens",
        )
    ratio = "" if longest is None else f" = {learner.microbatch_tokens / longest:.1f} longest paths"
    yield (
        "packing",
        f"{learner.microbatch_tokens} tokens a microbatch{ratio}, recompute {learner.recompute}, "
        f"logits of {learner.head_tokens} tokens at once",
    )
    if longest is not None:
        ahead = (replay.max_staleness + 1) * prompts
        at_once = config.actors * config.actor.concurrent_trees
        yield (
            "ahead",
            f"at most {ahead} trees begun and not trained = (staleness {replay.max_staleness} + 1) x {prompts}; "
            f"actors grow {at_once} at once",
        )


def _memory(forecast: Forecast, device: Device) -> Iterator[tuple[str, str]]:
    shape, config = forecast.shape, forecast.config
    num_engines, _ = sizes(config)
    on_gpu = device.gpu_bytes is not None
    where = "CPU" if device.gpu_bytes is None else f"GPUs of {device.gpu_bytes / GIB:g} GiB"
    yield (
        "memory",
        f"estimate in GiB for {where}: {_short(model_parameters(shape))} parameters, {config.model.dtype}",
    )
    ranks = forecast.ranks(on_gpu=on_gpu)
    yield (
        "",
        f"{'a rank of stage':<16}" + "".join(f"{column:>12}" for column in (*COLUMNS, "total")),
    )
    for rank in ranks:
        cells = "".join(f"{getattr(rank, column) / GIB:12.2f}" for column in (*COLUMNS, "total"))
        yield "", f"{_stage_name(rank.stage, len(ranks)):<16}{cells}"
    if num_engines:
        yield "", _engine_text(forecast, device)
    if device.gpu_bytes is None:
        parts = ", ".join(f"{name} {number / GIB:.1f}" for name, number in forecast.processes())
        total = forecast.needed_on_cpu() / GIB
        yield "", f"all processes {total:.1f} of {device.ram_bytes / GIB:.1f}: {parts}"
    else:
        number, engine_gpus = forecast.layout.world_size, num_engines * config.engine.tp
        yield "", f"{number + engine_gpus} GPUs: {number} for ranks, {engine_gpus} for engines"


def _engine_text(forecast: Forecast, device: Device) -> str:
    engine = forecast.engine(device.gpu_bytes or device.ram_bytes)
    pool, context = (
        forecast.config.engine.max_total_tokens,
        context_length(forecast.config, forecast.model),
    )
    text = f"an engine: weights {engine.weights / GIB:.2f}, KV cache {engine.kv_bytes_per_token / 1024:g} KiB a token"
    if device.gpu_bytes is not None:
        fit = max(0, engine.tokens_that_fit(device.gpu_bytes))
        text += (
            f"; beside {engine.reserved / GIB:.1f} for SGLang {fit:,} tokens fit = {fit // context:,} contexts of "
            f"{context}"
        )
    if pool is not None:
        text += f"; asked for {pool:,} tokens = {pool * engine.kv_bytes_per_token / GIB:.2f}, {pool // context} contexts of {context}"
    return text


def _stage_name(stage: int, num_stages: int) -> str:
    ends = [
        *(["embedding"] if stage == 0 else []),
        *(["head"] if stage == num_stages - 1 else []),
    ]
    return f"{stage}" + (f" ({', '.join(ends)})" if ends else "")


def _short(number: int) -> str:
    """A number with three or four digits, e.g. 7.616B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
