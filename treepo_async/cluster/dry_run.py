"""A run up to its plan, without its model's weights, a GPU or the network: what `launch/run.py --dry-run` prints.

Neighbours: `plan` and `forecast_text` make the text; `prepare` does the same for a run that goes on from there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treepo_async.cluster import forecast_text, placement_text
from treepo_async.cluster.forecast import DEFAULT_GPU_GIB, Forecast, choose_device, ram_bytes
from treepo_async.cluster.model_files import find_files, has_tokenizer
from treepo_async.cluster.placement import parse_nodes, place
from treepo_async.cluster.plan import demand_of, describe, make_plan, shorten
from treepo_async.cluster.prepare import choose_run_dir, read_model_config, try_inputs
from treepo_async.cluster.resume import find_resume_version
from treepo_async.config.limits import check_engine_tp
from treepo_async.config.schema import BUILT_IN, Config
from treepo_async.cpu.environment import cuda_present
from treepo_async.data.records import is_file, read_records
from treepo_async.scoring.async_scorer import try_scorer
from treepo_async.types import Prompt

NODES = "--nodes=4x8 (nodes x GPUs)"


def dry_run(
    config: Config,
    *,
    gpu_gib: float | None,
    report: Callable[[int, int, float], None],
    nodes: str | None = None,
) -> str:
    """The plan of a run, its sizes and warnings, as text. No cluster is asked anything, also where `cluster.ray_address` names one.

    Args:
        config: of the run.
        nodes: of the cluster, as `parse_nodes` reads them, to show who would be where; None: that is not shown.
        gpu_gib: memory of a GPU; None: see `choose_device`.
        report: see `prepare_model`; only a built-in model that is not cached takes long.

    Raises:
        ConfigError, DataError: naming the key, and what would do.
    """
    model_dir = find_files(
        config.model.path,
        cache_dir=Path(config.cache_dir),
        seed=config.seed,
        report=report,
        shipped=True,
    )
    model = read_model_config(model_dir)
    forecast = Forecast.of(config, model)
    prompt = look_at_inputs(config, model_dir, model)
    run_dir = choose_run_dir(config.run_dir)
    version = find_resume_version(run_dir, config.steps)
    step = None if version is None else version.step
    plan = make_plan(config, run_dir=run_dir, model_dir=model_dir, resume_step=step)
    there = None if nodes is None else parse_nodes(nodes)
    if gpu_gib is None and there is not None and any(node.gpus for node in there):
        gpu_gib = DEFAULT_GPU_GIB
    device = choose_device(
        gpu_gib,
        has_cuda=cuda_present(),
        needed=forecast.needed_on_cpu(),
        ram_bytes=ram_bytes(),
    )
    if there is None and config.engine.url is None and demand_of(config).engines:
        on_gpus = device.gpu_bytes is not None
        check_engine_tp(
            config.engine.tp,
            on_gpus=on_gpus,
            otherwise=", or plan for GPUs of a size: --gpu-gib=80",
        )
    parts = [describe(config, plan, prompt), forecast_text.describe(forecast, device)]
    if there is not None:
        demand, memory = demand_of(config), forecast_text.held(forecast, device)
        parts.append(placement_text.describe(place(demand, there), demand, memory))
    elif config.cluster.ray_address is not None:
        parts.append(
            f"  nodes    {config.cluster.ray_address} is not asked; describe them: {NODES}"
        )
    return "\n".join(parts)


def look_at_inputs(config: Config, model_dir: Path, model: Mapping[str, Any]) -> Prompt | str:
    """Open what can be opened here. Gives a prompt, or why there is none to show.

    A dataset of the hub is left alone; of a file the records are read also without a tokenizer.

    Raises:
        ConfigError, DataError: as `try_inputs`.
    """
    data = config.data
    try_scorer(config.reward.scorer)
    is_here = data.path in BUILT_IN or is_file(data.path)
    if data.trees is None and not is_here:
        return f"not shown: {data.path} is a dataset of the hub, which is not loaded here"
    if has_tokenizer(model_dir):
        return try_inputs(config, model_dir, model)
    if data.trees is not None:
        return "not shown: the trees are not looked at without the model's tokenizer"
    records = read_records(data.path, data.prompt_field, data.answer_field)
    return f"{shorten(records.records[0].question)!r} (no tokenizer here), first of {len(records.records)}"
