"""What becomes of running requests when weights change, and what that says about the tokens of one answer.

The host changes weights by a mode; the client reads its answers by the same one. Invariant: a token that is not
marked `mixed_context` was sampled from a KV cache computed wholly by the version that its span names.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from treepo_async.errors import EngineError
from treepo_async.tree.cut import VersionSpan
from treepo_async.types import PolicyVersion


class UpdateMode(StrEnum):
    """How weights change under running requests."""

    DRAIN = "drain"
    """Not at all: requests end first, so each is of one version."""
    RETRACT = "retract"
    """They wait, and go on with a KV cache computed again by the new weights."""
    IN_PLACE = "in_place"
    """They go on at once, on the KV cache of the old weights."""


def version_spans(
    said: Sequence[Mapping[str, Any]], submitted: PolicyVersion, mode: UpdateMode | None
) -> tuple[VersionSpan, ...]:
    """The versions of an answer's tokens.

    In `IN_PLACE` whatever was not sampled under the version of its submission is mixed: also a request that was
    sampled under a later version alone, as its prefix may come from the cache of the version in its namespace.

    Args:
        said: SGLang's `weight_versions`: `version`, `start` and `end` of each span, in output tokens.
        submitted: version the request was submitted under.
        mode: of the host; None where weights never change, and the server may call them as it likes.

    Raises:
        EngineError: the spans have gaps, go back, or name a version that the mode does not allow.
        ValueError: a version of another make, e.g. the server's "default".
    """
    if mode is None:
        return _one_span(said, submitted)
    spans: list[VersionSpan] = []
    end, newest = 0, submitted
    for entry in said:
        version = PolicyVersion.parse(entry["version"])
        if entry["start"] != end or version < newest:
            raise EngineError(f"spans {said} of a request under {submitted} do not ascend")
        end, newest = entry["end"], version
        if mode is UpdateMode.DRAIN and version != submitted:
            raise EngineError(f"sampled under {version}, but submitted under {submitted}")
        if end > entry["start"]:
            mixed = mode is UpdateMode.IN_PLACE and version != submitted
            spans.append(VersionSpan(version, end - entry["start"], mixed))
    return tuple(spans)


def _one_span(
    said: Sequence[Mapping[str, Any]], submitted: PolicyVersion
) -> tuple[VersionSpan, ...]:
    """All tokens are of the version of submission, whatever the server calls it."""
    names = {entry["version"] for entry in said}
    if len(names) > 1:
        raise EngineError(f"the weights changed from {' to '.join(sorted(names))} under a request")
    num_tokens = max((entry["end"] for entry in said), default=0)
    return (VersionSpan(submitted, num_tokens),) if num_tokens else ()
