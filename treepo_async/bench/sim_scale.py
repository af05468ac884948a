"""How far a run can grow: 8 to 1,024 actors with engines in proportion, and what becomes the limit first.

Each case scales everything but one part, so that the part's limit shows: the learner, the way of the weights, the one replay
process. Its service times are measured (docs/benchmarks.md); those of GPU engines, a learner of several GPUs and their network are
assumptions that `FIGURES` spells out. docs/simulation.md has the source of each.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from treepo_async.bench.sim_engine import EngineSpeed
from treepo_async.bench.sim_replay import ReplaySpeed
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.bench.sim_trees import LogNormal, TreeShape
from treepo_async.bench.sim_world import World

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
UNIT = 8
"""Actors of an engine."""
WARM_UP = 4
LEAST_STEPS = 6
ENDLESS = 10**6
"""Steps of a run that is left before it ends, so that it generates for later ones throughout."""
TREES = 2048
"""At least so many are trained behind the warm-up where that takes more steps, for the noise of small sizes."""
GPU_ENGINE = EngineSpeed(
    step_s=0.010, token_s=0.00005, request_s=0.0002, prefix_token_s=0.00002, max_running=256
)
LONG = TreeShape(segment_tokens=256, max_depth=16, width=8, prompt_tokens=256)
SHORT = TreeShape(segment_tokens=16, max_depth=16, width=8, prompt_tokens=64)
LEARNER_TOKEN_S = 1 / 20_000
WEIGHTS_BYTES = 15.2e9
LINK_BYTES_S = 12.5e9
FIGURES = {
    "replay: a lease": "93 us, measured: a message of `bench.py queue`, bare arm, 4,096 tokens",
    "replay: a tree": "469 us, measured: processor time, durable arm, 4,096 tokens",
    "replay: a tree of a batch": "100 us, assumed",
    "engine": "10 ms a decode step and 0.05 ms for each of up to 256 requests, assumed: a 7B model on one GPU",
    "learner": "20,000 unique tokens/s for each 8 actors, assumed",
    "weights": "15.2 GB (7B in bfloat16) at 12.5 GB/s to one engine after the other, assumed: 100 Gbit/s",
}
"""Where the numbers come from."""
NAMES = {
    "all": "everything in proportion",
    "learner": "one learner, as for 8 actors",
    "weights": "weights to one engine after the other",
    "replay": "short trees: one replay process",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """A case at a size."""

    case: str
    """One of `NAMES`."""
    actors: int
    engines: int
    step_s: float
    trees_per_s: float
    """Delivered to replay."""
    tokens_per_s: float
    """Trained, of all leaves."""
    share: float
    """Of what the rate of the smallest size would be in proportion."""
    replay_busy: float
    learner_busy: float
    engine_busy: float
    staleness: float
    """Mean."""


def simulate(say: Callable[[str], None], sizes: Sequence[int] = SIZES) -> list[Scale]:
    """Every case at every size."""
    found = list[Scale]()
    for case in NAMES:
        first: Scale | None = None
        for actors in sizes:
            scale = scale_of(case, actors, first)
            first = first or scale
            found.append(scale)
            say(f"{case}: {actors} actors, {scale.tokens_per_s:,.0f} trained tokens/s")
    return found


def settings_of(case: str, actors: int) -> SimSettings:
    """A case at a size."""
    times = actors / UNIT
    is_short = case == "replay"
    learner_s = LEARNER_TOKEN_S if case == "learner" else LEARNER_TOKEN_S / times
    each_s = WEIGHTS_BYTES / LINK_BYTES_S if case == "weights" else 0.0
    return SimSettings(
        actors=actors,
        trees_per_actor=4,
        engines=actors // UNIT,
        prompts_per_batch=2 * actors,
        max_staleness=4,
        num_steps=ENDLESS,
        update_mode="in_place",
        shape=SHORT if is_short else LONG,
        lengths=LogNormal(40 if is_short else 600, 4),
        engine=GPU_ENGINE,
        learner=LearnerSpeed(batch_s=0.0, token_s=learner_s),
        replay=ReplaySpeed(lease_s=93e-6, tree_s=469e-6, batch_tree_s=100e-6),
        weights=WeightsSpeed(publish_s=0.0, send_s=0.0, each_s=each_s, load_s=0.5),
    )


def scale_of(case: str, actors: int, first: Scale | None, steps: int | None = None) -> Scale:
    """Simulate a case at a size; `first` is that of the smallest, `steps` are behind the warm-up."""
    settings = settings_of(case, actors)
    number = steps or max(LEAST_STEPS, TREES // settings.prompts_per_batch)
    result = World(replace(settings, seed=actors)).run(until=WARM_UP + number)
    counted = result.steps[WARM_UP:]
    seconds = result.mean_step_s(warm_up=WARM_UP)
    rate = result.tokens_per_s(warm_up=WARM_UP)
    tokens = sum(step.tokens for step in counted)
    lags = sum(lag * number for step in counted for lag, number in step.lags.items())
    return Scale(
        case=case,
        actors=actors,
        engines=settings.engines,
        step_s=seconds,
        trees_per_s=settings.prompts_per_batch / seconds,
        tokens_per_s=rate,
        share=1.0 if first is None else rate / (first.tokens_per_s * actors / first.actors),
        replay_busy=result.share("replay", "compute"),
        learner_busy=result.share("learner", "compute", "sync"),
        engine_busy=result.share("engine", "compute", "sync"),
        staleness=lags / tokens,
    )


def write(scales: Sequence[Scale], out: Path) -> str:
    """Write `scale.csv`, `scale.md`, `scale.png`. Gives the table."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "scale.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(field.name for field in fields(Scale))
        rows.writerows(astuple(scale) for scale in scales)
    text = table(scales)
    (out / "scale.md").write_text(text)
    draw(out / "scale.png", scales)
    return text


def table(scales: Iterable[Scale]) -> str:
    """One row a case and size."""
    lines = [
        "| case | actors | engines | s a step | trees/s | trained tokens/s | of proportion | replay busy | learner busy "
        "| engines busy | staleness |",
        "|---" * 11 + "|",
    ]
    for s in scales:
        shares = (s.share, s.replay_busy, s.learner_busy, s.engine_busy)
        lines.append(
            f"| {NAMES[s.case]} | {s.actors} | {s.engines} | {s.step_s:.2f} | {s.trees_per_s:,.1f} | {s.tokens_per_s:,.0f} | "
            + " | ".join(f"{100 * share:.0f} %" for share in shares)
            + f" | {s.staleness:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(file: Path, scales: Sequence[Scale]) -> None:
    """Draw the rate over the size, a line a case; the dotted line is in proportion to the smallest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for case, name in NAMES.items():
        own = [s for s in scales if s.case == case]
        if not own:
            continue
        sizes = [s.actors for s in own]
        first = own[0].tokens_per_s / own[0].actors
        line = axes.plot(sizes, [s.tokens_per_s for s in own], marker="o", label=name)
        axes.plot(sizes, [n * first for n in sizes], ":", color=line[0].get_color(), linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("actors (8 to an engine)")
    axes.set_ylabel("trained tokens/s, simulated")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(file)
