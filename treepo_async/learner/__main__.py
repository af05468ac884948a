"""`python -m treepo_async.learner WIRING`: the learner as a process."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from treepo_async.config.command_line import load
from treepo_async.config.layout import Layout
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.errors import DataError
from treepo_async.learner.groups import close_groups, open_groups
from treepo_async.learner.objective import LossSettings
from treepo_async.learner.optimizer import OptimizerSettings
from treepo_async.learner.step import build_learner
from treepo_async.learner.worker import Worker, WorkerRules
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_blocking_role
from treepo_async.process import free_ports
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import BlockingRequester

GROUP_TIMEOUT_S = 120.0
"""Longest wait of a collective."""

COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of the initial model, tokenizer and all, that belong to the trained one too."""


def main(wiring: Wiring) -> None:
    """Train, and leave the trained model in `<run>/model`."""
    config = load(wiring.config_file)
    torch.set_num_threads(config.learner.cpu_threads)
    layout = Layout.parse(config.learner.layout)
    (port,) = free_ports(1)
    open_groups(layout, rank=0, address=f"127.0.0.1:{port}", timeout_s=GROUP_TIMEOUT_S)
    replay = BlockingRequester(wiring.replay_endpoint, name=wiring.role, owner="replay")
    try:
        worker = _worker(config, wiring, replay)
        hello = Hello(name=wiring.role, run_id=wiring.run_id)
        replay.ask(hello, timeout_s=config.cluster.start_timeout_s, wait="replay to come up")
        emit("ready")
        num_steps = worker.run()
        if num_steps == 0:
            raise DataError(
                "the data ended before one batch was full; lower replay.prompts_per_batch"
            )
        if num_steps < config.steps:
            emit("alarm", alarm="the data has ended", steps=num_steps, wanted=config.steps)
        folder = _save_model(wiring, num_steps)
        emit("done", num_steps=num_steps, model=str(folder))
    finally:
        replay.close()
        close_groups()


def _worker(config: Config, wiring: Wiring, replay: BlockingRequester) -> Worker:
    settings = config.learner
    learner = build_learner(
        Path(wiring.model_dir),
        optimizer=OptimizerSettings(
            learning_rate=settings.lr,
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            beta1=settings.beta1,
            beta2=settings.beta2,
            max_grad_norm=settings.clip_grad,
        ),
        loss=LossSettings(
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            correction=settings.correction,
            correction_cap=settings.correction_cap,
        ),
        microbatch_tokens=settings.microbatch_tokens,
        seed=config.seed,
    )
    return Worker(
        learner,
        replay,
        WeightStore(wiring.weights_dir, keep=config.replay.max_staleness + 3),
        config_file=Path(wiring.model_dir) / "config.json",
        rules=WorkerRules(
            num_steps=config.steps,
            estimator=settings.estimator,
            whiten=settings.whiten,
            eval_every=config.eval.every,
            batch_timeout_s=settings.batch_timeout_s,
            gap_alarm=config.metrics.gap_alarm,
            dtype=getattr(torch, config.model.dtype),
        ),
    )


def _save_model(wiring: Wiring, num_steps: int) -> Path:
    """The last publication with the tokenizer beside it: a Hugging Face folder."""
    folder = Path(wiring.run_dir) / "model"
    folder.mkdir(exist_ok=True)
    for pattern in COPIED:
        for file in Path(wiring.model_dir).glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = wiring.weights_dir / f"0.{num_steps}" / "model.safetensors"
    shutil.copyfile(weights, folder / weights.name)
    return folder


if __name__ == "__main__":
    run_blocking_role(partial(main, Wiring.parse(sys.argv[1])))
