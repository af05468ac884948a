"""The service times of a real run, and what they predict for other runs: `bench.py sim calibrate=RUN predict=RUN,...`.

Learner, publication and loading are read off. Of the engine the proportions are known (`EngineSpeed`: fixed part of a decode
step, part of each request, taking a request in); how fast the machine was is one factor, found so that the simulated run has the
mean step time of the real one. A prediction changes size and rules to those of the other run and keeps every service time, the
distribution of response lengths and the share of trees without spread; its own step time is not looked at. That share is a matter
of learning and not of time, and no simulation knows it: so a second figure takes the other run's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from treepo_async.bench.sim_engine import EngineSpeed
from treepo_async.bench.sim_run import WARM_UP, RealRun
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.bench.sim_world import World
from treepo_async.errors import DataError

SEEDS = (0, 1, 2)
_FACTORS = (0.05, 20.0)
"""Between which the engine's is looked for."""
_HALVINGS = 14


@dataclass(frozen=True, slots=True)
class Prediction:
    """A run, simulated with the service times of another."""

    name: str
    simulated_s: float
    """Mean step time, from the other run alone."""
    informed_s: float
    """The same with the share of trees without spread that this run had."""
    real_s: float

    @property
    def error(self) -> float:
        """Of the first, relative to the real step time."""
        return self.simulated_s / self.real_s - 1

    @property
    def informed_error(self) -> float:
        """Of the second."""
        return self.informed_s / self.real_s - 1


def calibrate(run: RealRun) -> SimSettings:
    """Settings with the service times of a run.

    Raises:
        DataError: no speed of the engine gives its step time.
    """
    base = with_rules(
        SimSettings(
            lengths=run.lengths,
            degenerate=run.degenerate,
            learner=LearnerSpeed(batch_s=0.0, token_s=run.train_s / run.tokens),
            weights=WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s),
        ),
        run,
    )
    factor = _root(lambda f: step_s(scaled(base, f)) - run.step_s, *_FACTORS)
    if factor is None:
        raise DataError(
            f"{run.name}: no engine gives {run.step_s:.3f} s a step; is the learner the limit?"
        )
    return scaled(base, factor)


def predict(settings: SimSettings, run: RealRun) -> Prediction:
    """A run from the service times in `settings`."""
    other = with_rules(settings, run)
    informed = replace(other, degenerate=run.degenerate)
    return Prediction(run.name, step_s(other), step_s(informed), run.step_s)


def with_rules(settings: SimSettings, run: RealRun) -> SimSettings:
    """Size and rules of a run; the service times stay."""
    return replace(
        settings,
        actors=run.actors,
        trees_per_actor=run.trees_per_actor,
        engines=run.engines,
        prompts_per_batch=run.prompts_per_batch,
        max_staleness=run.max_staleness,
        update_mode=run.update_mode,
        num_steps=run.num_steps,
        shape=run.shape,
        engine=replace(settings.engine, max_running=run.max_running),
    )


def step_s(settings: SimSettings) -> float:
    """Mean over the steady steps and over seeds."""
    results = [World(replace(settings, seed=seed)).run() for seed in SEEDS]
    return sum(r.mean_step_s(warm_up=WARM_UP) for r in results) / len(SEEDS)


def scaled(settings: SimSettings, factor: float) -> SimSettings:
    """An engine that takes `factor` times as long for everything."""
    return replace(settings, engine=scaled_engine(settings.engine, factor))


def scaled_engine(speed: EngineSpeed, factor: float) -> EngineSpeed:
    """The same of an engine's speed."""
    return replace(
        speed,
        step_s=speed.step_s * factor,
        token_s=speed.token_s * factor,
        request_s=speed.request_s * factor,
        prefix_token_s=speed.prefix_token_s * factor,
    )


def table(run: RealRun, settings: SimSettings, predictions: Sequence[Prediction]) -> str:
    """Calibration and predictions."""
    speed = settings.engine
    lines = [
        f"calibrated on {run.name}: {run.step_s:.3f} s a step; a decode step takes {1000 * speed.step_s:.2f} ms and "
        f"{1000 * speed.token_s:.3f} ms more a request, taking one in {1000 * speed.request_s:.2f} ms; "
        f"{1e6 * settings.learner.token_s:.1f} us of training a token; {100 * settings.degenerate:.0f} % of the trees dropped",
        "",
        "| run | real s a step | predicted | error | with its own share of dropped trees | error |",
        "|---|---|---|---|---|---|",
    ]
    for p in predictions:
        blind = f"{p.simulated_s:.3f} | {100 * p.error:+.1f} %"
        informed = f"{p.informed_s:.3f} | {100 * p.informed_error:+.1f} %"
        lines.append(f"| {p.name} | {p.real_s:.3f} | {blind} | {informed} |")
    return "\n".join(lines) + "\n"


def _root(rising: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a rising function is 0, between bounds that are factors; None if it is nowhere."""
    if rising(low) > 0 or rising(high) < 0:
        return None
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return float((low * high) ** 0.5)
