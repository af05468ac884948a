"""Whether a server that somebody else runs fits: what it is, how much it holds, and whether it may get other weights while it works.

Used by `remote`, for weights that never change, and by `adopted`, for those of a run. Waits: for each answer (the caller's
deadline).
"""

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from treepo_async.errors import EngineError

LEAST_VERSION = (0, 5, 23)
"""Of SGLang: earlier ones do not say under which weights each token was sampled."""
NO_TOKEN = 2**31 - 1
_RANGE = re.compile(r"valid range is \[0, (\d+)\)")

Call = Callable[[str, str, Any], Awaitable[Any]]
"""Method, path and JSON body of a request to the JSON of its answer; raises EngineError without a good one."""


class Identity(NamedTuple):
    """What a server says of its weights."""

    model_path: str
    weight_version: str


async def identify(call: Call) -> Identity:
    """What the server says of its weights.

    Raises:
        EngineError: it does not answer, or as something else.
    """
    found = await call("GET", "/model_info", None)
    if not isinstance(found, dict) or "model_path" not in found:
        raise EngineError("it answers, but not as an SGLang server does")
    if not found.get("is_generation", True):
        raise EngineError(f"{found['model_path']} is no model that generates text")
    return Identity(str(found["model_path"]), str(found.get("weight_version")))


def check_room(info: Mapping[str, Any], context_length: int) -> None:
    """Check version and context.

    Raises:
        EngineError: it is too old, or prompt and response do not fit.
    """
    version = str(info.get("version"))
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if numbers < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise EngineError(f"it is SGLang {version}, {least} or later is needed")
    room = info.get("context_length") or info.get("max_req_input_len")
    if not isinstance(room, int) or room < context_length:
        raise EngineError(
            f"its context is {room} tokens, prompt and response need up to {context_length}; start it "
            "with more, or lower data.max_prompt_tokens, tree.max_depth or engine.context_length"
        )


def check_updates(info: Mapping[str, Any], *, dtype: str, updates_under_load: bool) -> None:
    """Check what the weights of a run need.

    Args:
        info: what `/server_info` said.
        dtype: of the run.
        updates_under_load: whether weights change while requests run or wait.

    Raises:
        EngineError: it was started otherwise.
    """
    found = info.get("dtype")
    if found != dtype:
        raise EngineError(
            f"it computes in {found}, the run in {dtype}; start it with --dtype {dtype}"
        )
    if not updates_under_load:
        return
    for flag in ("enable_priority_scheduling", "disable_overlap_schedule"):
        if not info.get(flag):
            raise EngineError(
                f"it was started without --{flag.replace('_', '-')}, which an engine.update_mode other than drain "
                "needs; give engine.update_mode=drain, or start it so"
            )


async def check_vocabulary(call: Call, vocab_size: int) -> None:
    """Ask for the log-prob of a token that cannot exist: the refusal names the vocabulary's size.

    Raises:
        EngineError: the size is not that of the model.
    """
    body = {
        "rid": uuid.uuid4().hex,
        "input_ids": [0],
        "return_logprob": True,
        "token_ids_logprob": [NO_TOKEN],
        "sampling_params": {"max_new_tokens": 1},
    }
    try:
        await call("POST", "/generate", body)
    except EngineError as error:
        named = _RANGE.search(str(error))
        if named is None:
            raise
    else:
        raise EngineError(f"it takes {NO_TOKEN} for a token id, so its vocabulary is unknown")
    if named[1] != str(vocab_size):
        raise EngineError(
            f"its vocabulary has {named[1]} tokens, that of model.path {vocab_size}; give model= the "
            "model that it serves"
        )
