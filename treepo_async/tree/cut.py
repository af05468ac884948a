"""From what the engine returned to segments: cut at grid multiples and at version boundaries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from treepo_async.types import Float32, Int32, PolicyVersion, Segment, StopReason


class VersionSpan(NamedTuple):
    """Consecutive tokens of a run sampled under one policy version."""

    policy_version: PolicyVersion
    num_tokens: int
    mixed_context: bool = False
    """Whether older weights computed part of the KV cache these tokens were sampled from."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the engine returned for one request."""

    token_ids: Int32
    """[T]"""
    behavior_logprobs: Float32
    """[T]"""
    spans: tuple[VersionSpan, ...]
    """Their lengths sum to T."""

    def __post_init__(self) -> None:
        num_tokens, num_logprobs = len(self.token_ids), len(self.behavior_logprobs)
        num_spanned = sum(s.num_tokens for s in self.spans)
        if not num_tokens == num_logprobs == num_spanned:
            raise ValueError(
                f"a run has {num_tokens} tokens, {num_logprobs} log-probs and version spans over "
                f"{num_spanned} tokens; the three must agree"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    def head(self, num_tokens: int) -> "Run":
        """The first `num_tokens` tokens."""
        spans, left = [], num_tokens
        for span in self.spans:
            if left > 0:
                spans.append(span._replace(num_tokens=min(span.num_tokens, left)))
            left -= span.num_tokens
        return Run(self.token_ids[:num_tokens], self.behavior_logprobs[:num_tokens], tuple(spans))


def cut(
    run: Run,
    *,
    parent: int,
    first_index: int,
    start: int,
    segment_tokens: int,
    stop: StopReason | None,
) -> list[Segment]:
    """Cut a run into segments, each of one level and one policy version.

    Args:
        run: at least one token.
        parent: index of the segment that the run continues, or `ROOT`.
        first_index: index that the first new segment will have in its tree.
        start: response tokens before the run.
        segment_tokens: the grid.
        stop: why the path ended with the run's last token; None if it goes on.

    Returns:
        A chain of segments; only the last one carries `stop`.
    """
    segments: list[Segment] = []
    for begin, end, span in _pieces(run, start, segment_tokens):
        segments.append(
            Segment(
                parent=parent if not segments else first_index + len(segments) - 1,
                level=(start + begin) // segment_tokens,
                token_ids=run.token_ids[begin:end],
                behavior_logprobs=run.behavior_logprobs[begin:end],
                policy_version=span.policy_version,
                stop=stop if end == len(run) else None,
                mixed_context=span.mixed_context,
            )
        )
    return segments


def _pieces(run: Run, start: int, segment_tokens: int) -> Iterator[tuple[int, int, VersionSpan]]:
    """First token, token past the last and version span of each segment, ascending."""
    begin = span_end = 0
    for span in run.spans:
        span_end += span.num_tokens
        while begin < span_end:
            to_grid = segment_tokens - (start + begin) % segment_tokens
            end = min(span_end, begin + to_grid)
            yield begin, end, span
            begin = end
