"""Held-out accuracy of a pinned policy version, sampled and greedy, outside of leases and training.

The engine host holds the version from the moment it opens the gate with `evaluate` until `Evaluated`. Waits: for
such a gate (the host), for completions (the engine client has the deadline), `timeout_s` for one evaluation.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from treepo_async.actor.expand import Engine, ExpandSettings
from treepo_async.engine.client import all_of
from treepo_async.engine.gate import GateClient
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.metrics.events import emit
from treepo_async.scoring.registry import Scorer, score
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
        scorer: Scorer,
        timeout_s: float,
    ) -> None:
        """Prepare.

        Args:
            engine: the actor's own client.
            gate: brings the versions.
            problems: the held-out set.
            settings: of the trees; responses have their temperature, limit and stops.
            scorer: response and answer to accuracy.
            timeout_s: of one evaluation.
        """
        self._engine, self._gate, self._problems = engine, gate, problems
        self._settings, self._scorer, self._timeout_s = settings, scorer, timeout_s

    async def run(self) -> None:
        """Evaluate for ever."""
        while True:
            version = await self._gate.to_evaluate.get()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._evaluate(version)
            except (EngineError, DeadlineError, TimeoutError) as error:
                emit("alarm", alarm="evaluation failed", version=str(version), detail=repr(error))
            await self._gate.evaluated(version)
            emit("evaluated", step=version.step)

    async def _evaluate(self, version: PolicyVersion) -> None:
        begin = time.monotonic()
        sampled, greedy = await all_of(
            self._accuracies(temperature, version)
            for temperature in (self._settings.sampling.temperature, 0.0)
        )
        emit(
            "eval",
            version=str(version),
            step=version.step,
            num_problems=len(self._problems),
            sampled_accuracy=_mean(sampled),
            greedy_accuracy=_mean(greedy),
            seconds=time.monotonic() - begin,
        )

    async def _accuracies(self, temperature: float, version: PolicyVersion) -> list[float]:
        return await all_of(
            self._accuracy(problem, temperature, version) for problem in self._problems
        )

    async def _accuracy(self, problem: Prompt, temperature: float, version: PolicyVersion) -> float:
        growth, stops = self._settings.growth, self._settings.stops
        (completion,) = await self._engine.extend(
            problem.token_ids.tolist(),
            num_runs=1,
            max_new_tokens=growth.limit,
            sampling=replace(self._settings.sampling, temperature=temperature),
            least_step=version.step,
        )
        if any(span.policy_version != version for span in completion.run.spans):
            raise EngineError(f"policy {version} was replaced while it was evaluated")
        tokens = completion.run.token_ids.tolist()
        stop = find_stop(stops, [], tokens, start=0, segment_tokens=growth.segment_tokens)
        kept = len(tokens) if stop is None else stop[0]
        # in a thread: a user's scorer may be slow, and the gate must be answered meanwhile
        response = stops.decode(tokens[:kept])
        return await asyncio.to_thread(score, self._scorer, response, problem.answer)


def _mean(accuracies: Sequence[float]) -> float:
    """A failed score counts as wrong here: an evaluation may not lose problems."""
    return sum(a for a in accuracies if a == a) / len(accuracies)
