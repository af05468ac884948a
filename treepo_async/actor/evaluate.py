"""Held-out accuracy of a pinned policy version: sampled, best of k, greedy; outside of leases and training.

The engine host holds the version from the moment it opens the gate with `evaluate` until `Evaluated`. Waits: for
such a gate (the host), for completions (the engine client has the deadline), for scores (see `scoring.pool`),
`timeout_s` for one evaluation.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean

from treepo_async.actor.expand import Engine, ExpandSettings
from treepo_async.engine.client import all_of
from treepo_async.engine.gate import GateClient
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.metrics.categories import Category
from treepo_async.metrics.events import emit
from treepo_async.metrics.spans import span
from treepo_async.scoring.async_scorer import AsyncScorer
from treepo_async.tree.cut import Run
from treepo_async.tree.stopping import find_stop
from treepo_async.types import PolicyVersion, Prompt


class Evaluator:
    """Evaluates the versions that the gate marks for it, one after the other."""

    def __init__(
        self,
        engine: Engine,
        gate: GateClient,
        problems: Sequence[Prompt],
        settings: ExpandSettings,
        *,
        scorer: AsyncScorer,
        num_samples: int,
        timeout_s: float,
        booked: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Prepare.

        Args:
            engine: the actor's own client.
            gate: brings the versions.
            problems: the held-out set.
            settings: of the trees; responses have their temperature, limit and stops.
            scorer: of the actor, shared with its trees.
            num_samples: responses sampled for each problem, beside the greedy one.
            timeout_s: of one evaluation.
            booked: books the time of an evaluation.
        """
        self._engine, self._gate, self._problems = engine, gate, problems
        self._settings, self._scorer = settings, scorer
        self._num_samples, self._timeout_s = num_samples, timeout_s
        self._booked = booked

    async def run(self) -> None:
        """Evaluate for ever."""
        while True:
            version = await self._gate.to_evaluate.get()
            try:
                with (
                    self._booked(),
                    span("evaluate", Category.EVAL, track="evaluation", version=str(version)),
                ):
                    async with asyncio.timeout(self._timeout_s):
                        await self._evaluate(version)
            except (EngineError, DeadlineError, TimeoutError) as error:
                emit("alarm", alarm="evaluation failed", version=str(version), detail=repr(error))
            await self._gate.evaluated(version)
            emit("evaluated", step=version.step)

    async def _evaluate(self, version: PolicyVersion) -> None:
        begin = time.monotonic()
        temperature = self._settings.sampling.temperature
        sampled, greedy = await all_of(
            (
                self._accuracies(version, temperature, self._num_samples),
                self._accuracies(version, 0.0, 1),
            )
        )
        best = {"pass_at_k": fmean(max(each) for each in sampled)} if self._num_samples > 1 else {}
        emit(
            "eval",
            version=str(version),
            step=version.step,
            num_problems=len(self._problems),
            num_samples=self._num_samples,
            sampled_accuracy=fmean(accuracy for each in sampled for accuracy in each),
            **best,
            greedy_accuracy=fmean(accuracy for each in greedy for accuracy in each),
            seconds=time.monotonic() - begin,
        )

    async def _accuracies(
        self, version: PolicyVersion, temperature: float, num_samples: int
    ) -> list[list[float]]:
        """Of each problem, the accuracies of its samples."""
        return await all_of(
            self._problem_accuracies(problem, version, temperature, num_samples)
            for problem in self._problems
        )

    async def _problem_accuracies(
        self, problem: Prompt, version: PolicyVersion, temperature: float, num_samples: int
    ) -> list[float]:
        completions = await self._engine.extend(
            problem.token_ids.tolist(),
            num_runs=num_samples,
            max_new_tokens=self._settings.growth.limit,
            sampling=replace(self._settings.sampling, temperature=temperature, num_top_logprobs=0),
            least_step=version.step,
            is_cached=False,
        )
        return await all_of(
            self._accuracy(problem, completion.run, version) for completion in completions
        )

    async def _accuracy(self, problem: Prompt, run: Run, version: PolicyVersion) -> float:
        if any(span.policy_version != version for span in run.spans):
            raise EngineError(f"policy {version} was replaced while it was evaluated")
        stops, tokens = self._settings.stops, run.token_ids.tolist()
        segment_tokens = self._settings.growth.segment_tokens
        stop = find_stop(stops, [], tokens, segment_tokens=segment_tokens)
        kept = len(tokens) if stop is None else stop[0]
        response = stops.decode(tokens[:kept])
        (accuracy,) = await self._scorer.score([response], problem.answer)
        # a failed score counts as wrong here: an evaluation may not lose problems
        return 0.0 if math.isnan(accuracy) else accuracy
