"""The service times of a real run, and what they predict for other runs: `bench.py sim calibrate=RUN predict=RUN,...`.

Learner, publication and loading are read off. Of the engine the proportions are known (`EngineSpeed`: fixed part of a decode
step, part of each request, taking a request in); how fast the machine was is one factor, found so that the simulated run has the
mean step time of the real one. A prediction changes size and rules to those of the other run and keeps every service time, the
distribution of response lengths, and the share of dropped trees by the step of the policy (`sim_drops`); nothing that the other
run measured is looked at. A second figure takes the other run's own shares: what is left of its error is not one of learning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from treepo_async.bench.sim_drops import Drops, fit
from treepo_async.bench.sim_engine import EngineSpeed
from treepo_async.bench.sim_result import SimStep
from treepo_async.bench.sim_run import WARM_UP, RealRun
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.bench.sim_world import World
from treepo_async.errors import DataError

SEEDS = (0, 1, 2)
FAR = 1.3
"""Times the steps of the calibrated run, in its own steps: what lies behind is said to be far."""
_FACTORS = (0.05, 20.0)
"""Between which the engine's is looked for."""
_HALVINGS = 14


@dataclass(frozen=True, slots=True)
class Means:
    """Of the steady steps of a simulated run, over seeds."""

    step_s: float
    degenerate: float
    """Share of the trees that arrived."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A run, simulated with the service times of another."""

    name: str
    simulated: Means
    """From the other run alone."""
    informed: Means
    """With the shares of dropped trees that this run had."""
    real: Means
    reach: float
    """Its last step in those of the calibrated run, over their number."""

    @property
    def error(self) -> float:
        """Of the first, relative to the real step time."""
        return self.simulated.step_s / self.real.step_s - 1

    @property
    def informed_error(self) -> float:
        """Of the second."""
        return self.informed.step_s / self.real.step_s - 1


def calibrate(run: RealRun) -> SimSettings:
    """Settings with the service times of a run.

    Raises:
        DataError: no speed of the engine gives its step time, or no trees arrived.
    """
    base = with_rules(
        SimSettings(
            lengths=run.lengths,
            degenerate=drops(run),
            dropped_size=run.dropped_size,
            learner=LearnerSpeed(batch_s=0.0, token_s=run.train_s / run.tokens),
            weights=WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s),
        ),
        run,
    )
    factor = _root(lambda f: means(scaled(base, f)).step_s - run.step_s, *_FACTORS)
    if factor is None:
        raise DataError(
            f"{run.name}: no engine gives {run.step_s:.3f} s a step; is the learner the limit?"
        )
    return scaled(base, factor)


def predict(settings: SimSettings, run: RealRun) -> Prediction:
    """A run from what was calibrated.

    Raises:
        DataError: it drops trees, and the calibrated run kept all.
    """
    if run.drop_degenerate and not settings.drop_degenerate:
        raise DataError(
            f"{run.name} has replay.drop_degenerate=true, and the calibrated run has false and cannot tell how many are dropped; "
            "calibrate on a run that drops them too"
        )
    other = with_rules(settings, run)
    informed = replace(other, degenerate=drops(run), dropped_size=run.dropped_size)
    return Prediction(
        name=run.name,
        simulated=means(other),
        informed=means(informed),
        real=Means(run.step_s, run.degenerate),
        reach=_reach(settings.degenerate, run),
    )


def drops(run: RealRun) -> Drops:
    """The curve of a run.

    Raises:
        DataError: no trees arrived.
    """
    if not run.drops:
        raise DataError(f"{run.name}: its records have no trees/accepted; is it a run of actors?")
    return fit(run.drops, run.prompts_per_batch)


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
        drop_degenerate=run.drop_degenerate,
        max_refills=run.max_refills,
        num_steps=run.num_steps,
        shape=run.shape,
        engine=replace(settings.engine, max_running=run.max_running),
    )


def means(settings: SimSettings) -> Means:
    """Of simulated runs with several seeds."""
    results = [World(replace(settings, seed=seed)).run() for seed in SEEDS]
    step_s = sum(r.mean_step_s(warm_up=WARM_UP) for r in results) / len(SEEDS)
    return Means(step_s, _share([step for r in results for step in r.steps[WARM_UP:]]))


def _share(steps: Sequence[SimStep]) -> float:
    delivered = sum(step.delivered for step in steps)
    return sum(step.dropped for step in steps) / delivered if delivered else 0.0


def _reach(degenerate: float | Drops, run: RealRun) -> float:
    if not isinstance(degenerate, Drops):
        return 1.0
    return degenerate.place(run.num_steps, run.prompts_per_batch) / degenerate.last


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
        f"{1e6 * settings.learner.token_s:.1f} us of training a token; {100 * run.degenerate:.0f} % of the trees dropped, of "
        f"{settings.dropped_size:.2f} times the size of others",
        "",
        "| run | real s a step | predicted | error | dropped trees | predicted | with its own share of them | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in predictions:
        blind = f"{p.real.step_s:.3f} | {p.simulated.step_s:.3f} | {100 * p.error:+.1f} %"
        shares = f"{100 * p.real.degenerate:.0f} % | {100 * p.simulated.degenerate:.0f} %"
        informed = f"{p.informed.step_s:.3f} | {100 * p.informed_error:+.1f} %"
        lines.append(f"| {p.name} | {blind} | {shares} | {informed} |")
    far = [
        f"{p.name} learns as much as {p.reach:.2f} times the steps of {run.name} teach, more than {FAR}: its dropped trees are guessed"
        for p in predictions
        if p.reach > FAR
    ]
    return "\n".join(lines) + "\n" + "".join(f"\n{line}\n" for line in far)


def _root(rising: Callable[[float], float], low: float, high: float) -> float | None:
    """Where a rising function is 0, between bounds that are factors; None if it is nowhere."""
    if rising(low) > 0 or rising(high) < 0:
        return None
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return float((low * high) ** 0.5)
