"""`python launch/run.py [config=NAME|FILE] [key=value ...] [--dry-run [--gpu-gib=80] [--nodes=4x8]]`: train.

`--help` lists every key. Nothing heavy is imported before the command line has been checked. A dry run prints the plan and what it
needs of memory, and with `--nodes` who would run where; of the model it needs config.json alone, and neither a GPU nor the network.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from treepo_async.cluster.resume import (
    clear_for_resume,
    find_resume_version,
    parse_resumed,
    take_lineage,
)
from treepo_async.config.command_line import describe
from treepo_async.config.run_lock import held
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError, DataError, RoleError

if TYPE_CHECKING:
    from treepo_async.cluster.plan import Plan

EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_STOPPED = 1, 2, 130
DRY_RUN, GPU_GIB, NODES = "--dry-run", "--gpu-gib=", "--nodes="


def main(words: list[str]) -> int:
    """Run, and say how it ended. Gives the exit code."""
    if "--help" in words or "-h" in words:
        print(describe())
        return 0
    try:
        config = parse_resumed([word for word in words if not _is_flag(word)])
        if DRY_RUN in words:
            return plan_only(config, words)
        _refuse_what_if(words)
        return train(config)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        print("stopped before the run began", file=sys.stderr)
        return EXIT_STOPPED


def _is_flag(word: str) -> bool:
    """Whether it is one of ours; `--dry-run=true` is none, and refused like any key that nobody knows."""
    return word == DRY_RUN or word.startswith((GPU_GIB, NODES))


def _refuse_what_if(words: list[str]) -> None:
    for flag in (GPU_GIB, NODES):
        if _value_of(flag, words) is not None:
            raise ConfigError(f"{flag}... is for {DRY_RUN}; leave it out, or add {DRY_RUN}")


def _value_of(flag: str, words: list[str]) -> str | None:
    """Of a flag, as it was given last."""
    given = [word.removeprefix(flag) for word in words if word.startswith(flag)]
    return given[-1] if given else None


def plan_only(config: Config, words: list[str]) -> int:
    """Print the plan, what it needs of memory, and warnings. Gives the exit code."""
    from treepo_async.cluster.dry_run import dry_run
    from treepo_async.cluster.forecast import parse_gpu_gib

    asked = _value_of(GPU_GIB, words)
    gpu_gib = None if asked is None else parse_gpu_gib(asked)
    with progress_bar("warm start of the tiny model") as report:
        print(dry_run(config, gpu_gib=gpu_gib, report=report, nodes=_value_of(NODES, words)))
    return 0


def train(config: Config) -> int:
    """Prepare and print the plan, then carry it out. Gives the exit code."""
    from treepo_async.cluster.plan import describe as describe_plan
    from treepo_async.cluster.plan import make_plan
    from treepo_async.cluster.prepare import (
        choose_run_dir,
        make_run_dir,
        prepare_model,
        read_model_config,
        try_inputs,
    )
    from treepo_async.cluster.ray_cluster import reap_killed_runs

    with progress_bar("warm start of the tiny model") as report:
        model_dir = prepare_model(
            config.model.path, cache_dir=Path(config.cache_dir), seed=config.seed, report=report
        )
    model = read_model_config(model_dir)
    prompt = try_inputs(config, model_dir, model)
    run_dir = choose_run_dir(config.run_dir)
    with held(run_dir):
        # a killed driver's processes may still write into the folder
        reap_killed_runs(Path(config.cache_dir) / "running")
        lineage = take_lineage(run_dir)
        version = find_resume_version(run_dir, config.steps)
        step = None if version is None else version.step
        plan = make_plan(
            config, run_dir=run_dir, model_dir=model_dir, lineage=lineage, resume_step=step
        )
        print(describe_plan(config, plan, prompt), flush=True)
        clear_for_resume(run_dir)
        make_run_dir(run_dir, config, model)
        return carry_out(config, plan)


def say(line: str) -> None:
    """Print a line; a console that takes none, as a file on a full disk, ends no run."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def carry_out(config: Config, plan: "Plan") -> int:
    """Run the plan, and say how it ended. Gives the exit code."""
    from treepo_async.cluster.run import run
    from treepo_async.cluster.supervise import StoppedError

    metrics = plan.run_dir / "metrics.jsonl"
    again = f"go on with: python launch/run.py run_dir={plan.run_dir}"
    try:
        trained = run(config, plan, say=say)
    except RoleError as error:
        print(
            f"error: {error}\n{error.tail}\nlogs: {plan.run_dir / 'logs'}\n{again}", file=sys.stderr
        )
        return EXIT_FAILED
    except StoppedError:
        print(f"stopped; metrics: {metrics}; {again}")
        return EXIT_STOPPED
    print(f"done; model: {trained}; metrics: {metrics}")
    return 0


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar on standard error that appears with the first report of (step, steps, loss)."""
    bars: list[Any] = []

    def report(step: int, num_steps: int, loss: float) -> None:
        if not bars:
            from tqdm import tqdm

            # in a log every update of the bar stays
            pause_s = 0.1 if sys.stderr.isatty() else 10.0
            bars.append(tqdm(total=num_steps, desc=title, unit="step", mininterval=pause_s))
        bars[0].update(step - bars[0].n)
        bars[0].set_postfix(loss=f"{loss:.3f}", refresh=False)

    yield report
    for bar in bars:
        bar.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
