"""What actors use of an engine: extend a prefix by n runs, in tokens, under one policy version each.

Every request is a single completion with its own id of fixed length (SGLang aborts by prefix of the id) and with
the policy version in its cache namespace, so that a request submitted under new weights reads no KV entries of
others. Waits: for the gate (see `gate`; also before an answer counts that names weights newer than those it was
submitted under, as only an open gate says that they are proven) and for each answer (`request_timeout_s`; SGLang
ends it, and a request that outlived it is tried again).
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import numpy as np

from treepo_async.engine.gate import GateClient
from treepo_async.engine.update_mode import UpdateMode, version_spans
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.tree.cut import Run
from treepo_async.types import PolicyVersion

T = TypeVar("T")

MAX_ATTEMPTS = 3
RETRY_S = 0.5
ABORT_TIMEOUT_S = 5.0
WARM_TOKENS = 128
"""From this prefix length on, one request fills the prefix cache before n others fork from it; a shorter prefix is
prefilled n times in less than a round trip."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine returned for one request."""

    run: Run
    prefix_tokens: int
    cached_tokens: int
    overhead_s: float
    """Time of the request outside of the server: HTTP, JSON and both event loops."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How completions are sampled."""

    temperature: float
    stop_token_ids: tuple[int, ...]


class EngineClient:
    """Requests to one engine."""

    def __init__(
        self,
        url: str,
        gate: GateClient,
        session: aiohttp.ClientSession,
        *,
        namespace: str,
        vocab_size: int,
        request_timeout_s: float,
        update_mode: UpdateMode = UpdateMode.DRAIN,
    ) -> None:
        """Prepare.

        Args:
            url: of the SGLang server.
            gate: the host's gate; it must be entered.
            session: HTTP connections.
            namespace: first part of the cache namespace, one a run.
            vocab_size: ids outside of it are refused, as one of them would kill the server.
            request_timeout_s: of one completion.
            update_mode: of the host.
        """
        self._url, self._gate, self._session = url, gate, session
        self._namespace, self._vocab_size = namespace, vocab_size
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self._update_mode = update_mode

    async def extend(
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
    ) -> list[Completion]:
        """Continue a prefix `num_runs` times, each on its own.

        Args:
            prefix: prompt and path so far, [T].
            num_runs: completions wanted.
            max_new_tokens: of each.
            sampling: how.
            least_step: oldest policy step that may sample.
            is_cached: whether the prefix is expected in the engine's cache already.

        Raises:
            EngineError: a token id outside the vocabulary, or no good answer in `MAX_ATTEMPTS`.
            DeadlineError: the gate stayed closed.
        """
        outside = [token for token in prefix if not 0 <= token < self._vocab_size]
        if outside:
            raise EngineError(
                f"token id {outside[0]} is outside the vocabulary of {self._vocab_size}"
            )
        if num_runs > 1 and not is_cached and len(prefix) >= WARM_TOKENS:
            await self._complete(prefix, 0, sampling, least_step)
        return await all_of(
            self._complete(prefix, max_new_tokens, sampling, least_step) for _ in range(num_runs)
        )

    async def _complete(
        self,
        prefix: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int,
    ) -> Completion:
        """One completion; a lost connection or an abort is tried again, under the version of that time.

        When the connection was lost, that is once the host has said that its server is there, so that the time
        until it is, or until there is another host, costs one attempt.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                async with self._gate.passage(least_step) as version:
                    completion = await self._request(prefix, max_new_tokens, sampling, version)
                    await self._check_proven(completion.run, version)
                    return completion
            except DeadlineError:
                raise
            except (aiohttp.ClientError, EngineError, TimeoutError) as error:
                if isinstance(error, aiohttp.ClientError):
                    self._gate.doubt()
                if attempt == MAX_ATTEMPTS:
                    raise EngineError(
                        f"no completion after {attempt} attempts: {error!r}"
                    ) from error
                await asyncio.sleep(RETRY_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _check_proven(self, run: Run, submitted: PolicyVersion) -> None:
        newest = max((span.policy_version for span in run.spans), default=submitted)
        if newest > submitted and not await self._gate.stands_by(newest):
            raise EngineError(f"sampled under {newest}, which its host gave up")

    async def _request(
        self,
        prefix: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingSettings,
        version: PolicyVersion,
    ) -> Completion:
        request_id = uuid.uuid4().hex
        body = {
            "input_ids": list(prefix),
            "rid": request_id,
            "extra_key": f"{self._namespace}.{version}",
            "return_logprob": True,
            "logprob_start_len": -1,
            "sampling_params": {
                "max_new_tokens": max_new_tokens,
                "temperature": sampling.temperature,
                "stop_token_ids": list(sampling.stop_token_ids),
            },
        }
        clock = asyncio.get_running_loop().time
        begin = clock()
        try:
            async with self._session.post(
                f"{self._url}/generate", json=body, timeout=self._timeout
            ) as answer:
                raw = await answer.read()
        except (asyncio.CancelledError, TimeoutError):
            await self._abort(request_id)
            raise
        if answer.status != 200:
            raise EngineError(f"SGLang answered {answer.status}: {raw[:300]!r}")
        try:
            return _completion(json.loads(raw), version, self._update_mode, wall_s=clock() - begin)
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"SGLang's answer cannot be used: {error!r}") from error

    async def _abort(self, request_id: str) -> None:
        """Stop a request in the engine; without this it would decode to its end for nobody."""
        timeout = aiohttp.ClientTimeout(total=ABORT_TIMEOUT_S)
        # a server that cannot be told has nothing to stop, and its error must not hide why this was called
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.post(
                f"{self._url}/abort_request", json={"rid": request_id}, timeout=timeout
            ):
                pass


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of coroutines run together; the first failure cancels the others and is raised itself."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _completion(
    answer: dict[str, Any], version: PolicyVersion, mode: UpdateMode, *, wall_s: float
) -> Completion:
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] == "abort":
        raise EngineError(f"SGLang aborted the request: {meta['finish_reason'].get('message')}")
    spans = version_spans(meta.get("weight_versions", []), version, mode)
    token_ids = np.array(answer["output_ids"], dtype=np.int32)
    logprobs = np.array([row[0] for row in meta["output_token_logprobs"]], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise EngineError("SGLang gave log-probs that are not finite")
    return Completion(
        run=Run(token_ids, logprobs, spans),
        prefix_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        overhead_s=max(0.0, wall_s - meta["e2e_latency"]),
    )
