"""What a person should think over before a run starts. Neighbours: `forecast` has the sizes, `forecast_text` prints this last."""

from collections.abc import Iterator

from treepo_async.cluster.forecast import Device, Forecast
from treepo_async.cluster.memory import GIB
from treepo_async.cluster.plan import sizes
from treepo_async.config.limits import context_length

ROOMY = 4
"""Longest paths in a microbatch below which trees are cut, and what their pieces share is computed again."""
COLUMNS = ("weights", "gradients", "optimizer", "reference", "activations", "working", "update")
"""Parts of a rank's memory; names of `RankMemory`."""


def warnings_of(forecast: Forecast, device: Device) -> list[str]:
    """What will go wrong or be slow."""
    return [*_memory_warnings(forecast, device), *_packing_warnings(forecast)]


def _memory_warnings(forecast: Forecast, device: Device) -> Iterator[str]:
    if device.gpu_bytes is None:
        needed = forecast.needed_on_cpu()
        if needed > device.ram_bytes:
            yield (
                f"all processes need about {needed / GIB:.1f} GiB, this machine has {device.ram_bytes / GIB:.1f}"
            )
        return
    worst = max(forecast.ranks(on_gpu=True), key=lambda rank: rank.total)
    if worst.total > device.gpu_bytes:
        largest = max(COLUMNS, key=lambda column: int(getattr(worst, column)))
        yield (
            f"a rank of stage {worst.stage} needs about {worst.total / GIB:.1f} GiB, a GPU has "
            f"{device.gpu_bytes / GIB:g}; most of it is for {largest}: {_way_out(largest)}"
        )
    if sizes(forecast.config)[0]:
        yield from _engine_warnings(forecast, device.gpu_bytes)


def _engine_warnings(forecast: Forecast, gpu_bytes: int) -> Iterator[str]:
    config = forecast.config
    engine, context = forecast.engine(gpu_bytes), context_length(config, forecast.model)
    wanted = config.engine.max_total_tokens or context
    fit = engine.tokens_that_fit(gpu_bytes)
    if fit < wanted:
        what = (
            "one context" if config.engine.max_total_tokens is None else "engine.max_total_tokens"
        )
        yield (
            f"an engine has room for {max(0, fit):,} tokens of KV cache on a GPU of {gpu_bytes / GIB:g} GiB, {what} is "
            f"{wanted:,}; take a larger GPU or a smaller model"
        )


def _packing_warnings(forecast: Forecast) -> Iterator[str]:
    budget, longest = forecast.config.learner.microbatch_tokens, forecast.longest_path
    if longest is None:
        return
    if budget < longest:
        yield (
            f"learner.microbatch_tokens={budget} is less than one path of {longest} tokens, which then makes a microbatch of "
            f"its own; memory is estimated for {longest}"
        )
    if budget < ROOMY * longest and forecast.config.learner.packing != "flat":
        yield (
            f"learner.microbatch_tokens={budget} is less than {ROOMY} x {longest}, the longest path: trees are cut into more "
            "pieces, and what the pieces share is computed in each"
        )


def _way_out(column: str) -> str:
    if column in ("activations", "working"):
        return "lower learner.microbatch_tokens, or give learner.recompute=full, or a larger tp"
    return "give learner.layout a larger tp or pp"
