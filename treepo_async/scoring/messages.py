"""What `child` and `worker` say to each other over a socket: JSON objects behind their length in four bytes.

The worker runs a user's code, so nothing that it sends is trusted: `child` bounds the length before it reads, and JSON
makes nothing but numbers and texts. Nothing heavy is imported here, so that a worker starts fast.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

from treepo_async.errors import WireError

LENGTH = struct.Struct("!I")

MAX_REPLY_BYTES = 2**16
"""Of a message from a worker; a detail is cut far below it."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A message as bytes; lone surrogates in its texts survive."""
    body = json.dumps(message).encode("ascii")
    return LENGTH.pack(len(body)) + body


def unpack(body: bytes) -> dict[str, Any]:
    """The message in the bytes behind a length.

    Raises:
        WireError: they are no JSON object.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a scoring message is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"a scoring message is a {type(message).__name__}, not an object")
    return message
