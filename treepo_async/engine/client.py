"""What actors use of an engine: extend a prefix by n runs, in tokens, under one policy version each.

Every request is a single completion with its own id of fixed length (SGLang aborts by prefix of the id) and with
the policy version in its cache namespace, so that a request submitted under new weights reads no KV entries of
others. Waits: for the gate (see `gate`; also before an answer counts that names weights newer than those it was
submitted under, as only an open gate says that they are proven) and for each answer (`request_timeout_s`; SGLang
ends it, and a request that outlived it is tried again).

A request whose connection was lost twice may be what the server dies of: its last attempt is made while this client has no
other request in the engine, so that it takes no further one with it.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import aiohttp

from treepo_async.engine.answer import (
    Completion,
    NotFiniteError,
    Watch,
    completion_of,
    read_stream,
    spans_of,
)
from treepo_async.engine.gate import EngineGate
from treepo_async.engine.routing import Place
from treepo_async.engine.turns import Turns
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import ClosedError, DeadlineError, EngineError
from treepo_async.tree.cut import Run
from treepo_async.types import PolicyVersion

T = TypeVar("T")

MAX_ATTEMPTS = 3
MAX_LOST_TOGETHER = 2
"""Connections that a request may lose beside others."""
RETRY_S = 0.5
ABORT_TIMEOUT_S = 5.0
WARM_TOKENS = 128
"""From this prefix length on, one request fills the prefix cache before n others fork from it; a shorter prefix is
prefilled n times in less than a round trip."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How completions are sampled."""

    temperature: float
    stop_token_ids: tuple[int, ...]
    num_top_logprobs: int = 0
    """Most likely tokens that are reported at every place, for the entropy of the last one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion that is wanted."""

    prefix: Sequence[int]
    """Prompt and path so far, [T]."""
    max_new_tokens: int
    sampling: SamplingSettings
    least_step: int = 0
    watch: Watch | None = None

    def body(self) -> dict[str, Any]:
        """A request as SGLang wants it, without its id and its cache namespace."""
        params: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.sampling.temperature,
            "stop_token_ids": list(self.sampling.stop_token_ids),
        }
        body: dict[str, Any] = {
            "input_ids": list(self.prefix),
            "return_logprob": True,
            "logprob_start_len": -1,
            "sampling_params": params,
        }
        if self.sampling.num_top_logprobs:
            body["top_logprobs_num"] = self.sampling.num_top_logprobs
        if self.watch is not None:
            body["stream"] = True
            params["stream_interval"] = self.watch.every_tokens
        return body


@dataclass(slots=True)
class Trouble:
    """What has befallen one completion so far."""

    num_failed: int = 0
    """Attempts, lost connections among them."""
    num_lost: int = 0
    """Connections."""

    @property
    def needs_solitude(self) -> bool:
        """Whether the server may have died of it."""
        return self.num_lost >= MAX_LOST_TOGETHER


async def attempts(
    attempt: Callable[[Ask, Trouble], Awaitable[Completion]], ask: Ask
) -> Completion:
    """One completion; a lost connection or an abort is tried again, under the version of that time.

    When the connection was lost, that is once the host has said that its server is there, so that the time
    until it is, or until there is another host, costs one attempt.

    Raises:
        EngineError: no good answer in `MAX_ATTEMPTS`.
        NotFiniteError, DeadlineError: of an attempt, which is not tried again.
    """
    trouble = Trouble()
    while True:
        try:
            return await attempt(ask, trouble)
        except (DeadlineError, NotFiniteError):
            raise
        except (aiohttp.ClientError, EngineError, TimeoutError) as error:
            trouble.num_failed += 1
            trouble.num_lost += isinstance(error, aiohttp.ClientError)
            if trouble.num_failed == MAX_ATTEMPTS:
                raise EngineError(
                    f"no completion after {trouble.num_failed} attempts: {error!r}"
                ) from error
            await asyncio.sleep(RETRY_S)


async def run_all(
    complete: Callable[[Ask], Awaitable[Completion]],
    ask: Ask,
    num_runs: int,
    *,
    is_cached: bool,
    arrived: dict[int, Completion] | None,
) -> list[Completion]:
    """As many completions of one ask; where its prefix is long and not cached, one request computes it before.

    Args:
        complete: makes one.
        ask: what is wanted.
        num_runs: how often.
        is_cached: whether the prefix is expected in the engine's cache.
        arrived: takes each, by its number, as soon as it is back.
    """
    warmed_tokens = 0
    if num_runs > 1 and not is_cached and len(ask.prefix) >= WARM_TOKENS:
        warm = await complete(replace(ask, max_new_tokens=0, watch=None))
        warmed_tokens = warm.prefix_tokens - warm.cached_tokens
    back: dict[int, Completion] = {} if arrived is None else arrived

    async def run(number: int) -> None:
        completion = await complete(ask)
        back[number] = replace(completion, warmed_tokens=0 if number else warmed_tokens)

    await all_of(run(number) for number in range(num_runs))
    return [back[number] for number in range(num_runs)]


class EngineClient:
    """Requests to one engine."""

    def __init__(
        self,
        url: str,
        gate: EngineGate,
        session: aiohttp.ClientSession,
        *,
        namespace: str,
        vocab_size: int,
        request_timeout_s: float,
        update_mode: UpdateMode | None = UpdateMode.DRAIN,
    ) -> None:
        """Prepare.

        Args:
            url: of the SGLang server.
            gate: the host's, which must be entered, or a fixed one.
            session: HTTP connections.
            namespace: first part of the cache namespace, one a run.
            vocab_size: ids outside of it are refused, as one of them would kill the server.
            request_timeout_s: of one completion.
            update_mode: of the host; None where weights never change.
        """
        self._url, self._gate, self._session = url, gate, session
        self._namespace, self._vocab_size = namespace, vocab_size
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self._update_mode = update_mode
        self._turns = Turns()

    async def extend(  # noqa: PLR0913 - a request has these parts, and expansion knows them all
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
        watch: Watch | None = None,
        arrived: dict[int, Completion] | None = None,
        home: Place | None = None,
    ) -> list[Completion]:
        """Continue a prefix `num_runs` times, each on its own.

        Args:
            prefix: prompt and path so far, [T].
            num_runs: completions wanted.
            max_new_tokens: of each.
            sampling: how.
            least_step: oldest policy step that may sample.
            is_cached: whether the prefix is expected in the engine's cache already.
            watch: looks at each run while it is sampled, and may end it.
            arrived: takes each run, by its number, as soon as it is back: what there is where the call is cancelled.
            home: where the prefix is; of one engine only the version counts.

        Raises:
            EngineError: a token id outside the vocabulary, or no good answer in `MAX_ATTEMPTS`.
            NotFiniteError: log-probs that are not, which is not tried again.
            DeadlineError: the gate stayed closed.
        """
        ask = Ask(prefix, max_new_tokens, sampling, least_step, watch)
        self.check(ask)

        async def complete(wanted: Ask) -> Completion:
            return await attempts(self._attempt, wanted)

        return await run_all(
            complete,
            ask,
            num_runs,
            is_cached=is_cached and not self.has_lost(home),
            arrived=arrived,
        )

    async def warm(
        self, prefix: Sequence[int], *, sampling: SamplingSettings, least_step: int = 0
    ) -> Place:
        """Put a prefix that several runs will continue into the cache, if it is long enough to be worth a request.

        Gives the place, which has no name for a single engine.

        Raises:
            EngineError, DeadlineError: as `extend`.
        """
        ask = Ask(prefix, 0, sampling, least_step)
        self.check(ask)
        if len(prefix) >= WARM_TOKENS:
            await attempts(self._attempt, ask)
        return Place("")

    def has_lost(self, home: Place | None) -> bool:
        """Whether a prefix that was computed under the version of `home` is of no use any more, or soon will not be."""
        if home is None or home.version is None:
            return False
        status = self._gate.status()
        # behind a closed gate the weights are about to change
        return home.version != status.version or not status.is_open

    def check(self, ask: Ask) -> None:
        """Refuse what would kill the server.

        Raises:
            EngineError: a token id is outside of the vocabulary.
        """
        outside = [token for token in ask.prefix if not 0 <= token < self._vocab_size]
        if outside:
            raise EngineError(
                f"token id {outside[0]} is outside the vocabulary of {self._vocab_size}"
            )

    async def attempt(
        self, ask: Ask, *, alone: bool, patience_s: float | None = None
    ) -> Completion:
        """One try at one completion, under the version of its time.

        Args:
            ask: what is wanted.
            alone: while this client has no other request in the engine.
            patience_s: how long to wait for the gate; None: as long as the gate itself does.

        Raises:
            ClosedError: the gate did not open, so nothing was sent.
            aiohttp.ClientError: the connection was lost.
            EngineError, TimeoutError: there was no good answer; in particular none of proven weights, with patience.
            DeadlineError: none of proven weights, without.
        """
        turn = self._turns.alone if alone else self._turns.shared
        async with turn(), self._gate.passage(ask.least_step, patience_s=patience_s) as version:
            completion = await self._request(ask.body(), version, ask.watch)
            await self._check_proven(completion.run, version, patience_s)
            return completion

    def doubt(self) -> None:
        """A connection was lost: let no request pass until the host has said that its server is there."""
        self._gate.doubt()

    async def _attempt(self, ask: Ask, trouble: Trouble) -> Completion:
        try:
            return await self.attempt(ask, alone=trouble.needs_solitude)
        except aiohttp.ClientError:
            self.doubt()
            raise

    async def _check_proven(
        self, run: Run, submitted: PolicyVersion, patience_s: float | None
    ) -> None:
        newest = max((span.policy_version for span in run.spans), default=submitted)
        if newest <= submitted:
            return
        try:
            is_proven = await self._gate.stands_by(newest, patience_s=patience_s)
        except ClosedError as error:
            if patience_s is None:
                raise
            # not a closed gate: the request was sent, and another engine must make it again
            raise EngineError(
                f"sampled under {newest}, which its host did not prove: {error}"
            ) from error
        if not is_proven:
            raise EngineError(f"sampled under {newest}, which its host gave up")

    async def _request(
        self, body: dict[str, Any], version: PolicyVersion, watch: Watch | None
    ) -> Completion:
        request_id = uuid.uuid4().hex
        body |= {"rid": request_id, "extra_key": f"{self._namespace}.{version}"}
        clock = asyncio.get_running_loop().time
        begin, was_aborted = clock(), False
        try:
            async with self._session.post(
                f"{self._url}/generate", json=body, timeout=self._timeout
            ) as answer:
                if answer.status != 200:
                    raw = await answer.read()
                    raise EngineError(f"SGLang answered {answer.status}: {raw[:300]!r}")
                if watch is None:
                    said = json.loads(await answer.read())
                else:
                    abort = partial(self._abort, request_id)
                    spans = partial(spans_of, version=version, mode=self._update_mode)
                    chunks = answer.content.iter_any()
                    said, was_aborted = await read_stream(chunks, watch, abort, spans)
            wall_s = clock() - begin
            return completion_of(
                said,
                version,
                self._update_mode,
                wall_s=wall_s,
                aborted_prefix=len(body["input_ids"]) if was_aborted else None,
            )
        except (asyncio.CancelledError, TimeoutError):
            await self._abort(request_id)
            raise
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
    """Results of coroutines run together; the first failure cancels the others and is raised itself.

    Each is cancelled once, so that what it does on its way out, as telling the engine, is not cut off.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            # `gather` has cancelled them if it was cancelled, and then waits for the first alone
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
