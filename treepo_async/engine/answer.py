"""What an engine's answer to one request means: tokens, log-probs, versions, cache counts.

Read whole, or from a stream whose tokens are watched as they come. Waits: for the next event of a stream (the request's
own deadline, which its caller sets).
"""

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from treepo_async.engine.routing import Move
from treepo_async.engine.update_mode import UpdateMode, version_spans
from treepo_async.errors import EngineError
from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.types import PolicyVersion


class NotFiniteError(EngineError):
    """Log-probs that are not finite: nothing that the engine says can be trusted."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine returned for one request."""

    run: Run
    prefix_tokens: int
    cached_tokens: int
    overhead_s: float
    """Time of the request outside of the server: HTTP, JSON and both event loops."""
    entropy: float | None = None
    """Of the distribution of the last token, in nats, from its most likely tokens; None if not asked for."""
    submitted: PolicyVersion | None = None
    """Under which the request was submitted, and its prefix computed or found."""
    engine: str = ""
    """Name of the engine, where there are several."""
    move: Move = Move.HOME
    """How it was chosen."""
    warmed_tokens: int = 0
    """Prefix tokens that a request before this one computed for it."""


class Watch(NamedTuple):
    """Looks at the tokens of running requests and ends them."""

    every_tokens: int
    """Between two looks, the first of which is at the first token."""
    begin: Callable[[], Callable[[Sequence[int]], bool]]
    """Gives, for each request anew, what says whether its tokens so far need no continuation."""
    is_outdated: Callable[[Sequence[VersionSpan]], bool] | None = None
    """Whether tokens of these versions, those of a request so far, are too old to go on; None: they never are."""


async def read_stream(
    chunks: AsyncIterator[bytes],
    watch: Watch,
    abort: Callable[[], Awaitable[None]],
    spans: Callable[[Mapping[str, Any]], Sequence[VersionSpan]],
) -> tuple[dict[str, Any], bool]:
    """The last answer of a stream of server-sent events, each of which holds all tokens so far.

    Args:
        chunks: bytes as they come.
        watch: looks at the newest answer.
        abort: ends the request once the watch says so; the stream is read to its end all the same.
        spans: the versions of an answer's tokens.

    Returns:
        The answer, and whether the request was aborted here.

    Raises:
        EngineError: the stream ended without its end mark, or of `spans`.
        ValueError: an event is no JSON.
    """
    buffer, newest, is_over, needs_no_more = b"", b"{}", False, watch.begin()

    def is_enough(answer: Mapping[str, Any]) -> bool:
        if needs_no_more(answer["output_ids"]):
            return True
        # one that is ended before its first token would be no run
        return bool(answer["output_ids"] and watch.is_outdated and watch.is_outdated(spans(answer)))

    async for chunk in chunks:
        *events, buffer = (buffer + chunk).split(b"\n\n")
        payloads = [event.removeprefix(b"data: ") for event in events]
        if b"[DONE]" in payloads:
            return json.loads(payloads[-2] if len(payloads) > 1 else newest), is_over
        if payloads:
            newest = payloads[-1]
            if not is_over and is_enough(json.loads(newest)):
                is_over = True
                await abort()
    raise EngineError("the stream ended early")


def completion_of(
    answer: Mapping[str, Any],
    version: PolicyVersion,
    mode: UpdateMode | None,
    *,
    wall_s: float,
    aborted_prefix: int | None = None,
) -> Completion:
    """Read an answer.

    Args:
        answer: SGLang's JSON.
        version: under which the request was submitted.
        mode: of updates, see `version_spans`.
        wall_s: of the request.
        aborted_prefix: tokens of the prefix, where its abort was wanted: a request that is aborted while it waits, as
            one does whose KV cache was taken from it, does not say them.

    Raises:
        EngineError: it was aborted by somebody else, or says what cannot be.
        NotFiniteError: of log-probs that are not.
        LookupError, TypeError, ValueError: it has another form.
    """
    meta = answer["meta_info"]
    if aborted_prefix is not None:
        meta = {"prompt_tokens": aborted_prefix, "cached_tokens": 0, "e2e_latency": wall_s, **meta}
    elif meta["finish_reason"]["type"] == "abort":
        raise EngineError(f"SGLang aborted the request: {meta['finish_reason'].get('message')}")
    # asked for no token, SGLang often tells the log-prob of one that it then leaves out, if others run beside it
    rows = meta["output_token_logprobs"] if answer["output_ids"] else []
    logprobs = np.array([row[0] for row in rows], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise NotFiniteError("SGLang gave log-probs that are not finite")
    top = meta.get("output_top_logprobs")
    return Completion(
        run=Run(
            np.array(answer["output_ids"], dtype=np.int32),
            logprobs,
            spans_of(answer, version, mode),
        ),
        prefix_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        overhead_s=max(0.0, wall_s - meta["e2e_latency"]),
        entropy=entropy_of([row[0] for row in top[-1]]) if top else None,
        submitted=version,
    )


def spans_of(
    answer: Mapping[str, Any], version: PolicyVersion, mode: UpdateMode | None
) -> tuple[VersionSpan, ...]:
    """The versions of an answer's tokens, see `version_spans`."""
    return version_spans(answer["meta_info"].get("weight_versions", []), version, mode)


def entropy_of(top_logprobs: Sequence[float]) -> float:
    """Entropy in nats from the log-probs of the most likely tokens, all others taken as one: a lower bound."""
    rest = 1.0 - sum(math.exp(x) for x in top_logprobs)
    named = -sum(math.exp(x) * x for x in top_logprobs)
    return named - (rest * math.log(rest) if rest > 0 else 0.0)
