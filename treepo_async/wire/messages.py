"""Every message between processes, as frozen msgspec structs in one tagged union.

A request carries a `request` number, its reply carries the same one; a `Gate` is pushed without being asked for.
Frames on a socket: `[message, *attachment]`, the attachment being trees as `codec` encodes them. Requests are
idempotent: a peer that got no answer sends the same request again.
"""

from typing import TypeVar

import msgspec

from treepo_async.errors import WireError

PROTOCOL = 1


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages."""

    request: int = 0
    """Number of the request this is or answers."""


class Hello(Message, frozen=True):
    """First message of a peer: refused when it belongs to another run or protocol."""

    name: str
    run_id: str
    protocol: int = PROTOCOL


class Beat(Message, frozen=True):
    """An actor lives and still works on these leases."""

    leases: list[str]


class AskLease(Message, frozen=True):
    """An actor wants a prompt, and will wait for it."""

    wait_s: float


class Leased(Message, frozen=True):
    """A prompt for an actor, to be answered with one tree."""

    lease_id: str
    attempt: int
    prompt_id: str
    text: str
    answer: str
    token_ids: list[int]
    least_step: int
    """Policy step below which no segment of the tree may be sampled."""


class NoLease(Message, frozen=True):
    """No prompt now, and why; `final` when there will never be one again."""

    reason: str
    final: bool = False


class PutTree(Message, frozen=True):
    """A scored tree for a lease; the tree is the attachment."""

    lease_id: str
    attempt: int


class GiveUp(Message, frozen=True):
    """An actor failed on a lease: let another one try."""

    lease_id: str
    attempt: int
    reason: str


class Ack(Message, frozen=True):
    """Done; for a tree: it is stored. `note` says what became of it, e.g. `duplicate`."""

    note: str = ""


class Nack(Message, frozen=True):
    """Refused, and whether sending the same again can succeed."""

    reason: str
    detail: str
    retry: bool = False


class AskBatch(Message, frozen=True):
    """The learner wants the trees of step `step`, and will wait for them."""

    step: int
    wait_s: float


class Batch(Message, frozen=True):
    """The trees of a step in lease order; the attachment is their frames, `frames_per_tree` each."""

    step: int
    lease_ids: list[str]
    frames_per_tree: int
    ledger: dict[str, int]
    """How every lease so far stands: see `replay.queue.Queue.ledger`."""


class NoBatch(Message, frozen=True):
    """No batch yet, and what it waits for; `final` when the data has ended."""

    reason: str
    final: bool = False


class Published(Message, frozen=True):
    """The learner has published policy step `step`; the trees of `consumed_step` were trained."""

    step: int
    consumed_step: int


class Retired(Message, frozen=True):
    """The trees of all batches up to and including `step` will not be asked for again."""

    step: int


class Join(Message, frozen=True):
    """A client of an engine host: it will obey the gate. Answered by a `Gate`."""

    name: str
    evaluates: bool = False


class Gate(Message, frozen=True):
    """Whether requests may be submitted to the engine, and under which policy version."""

    epoch: int
    """Counts the announcements of a host."""
    is_open: bool
    host: str = ""
    """Another one for each host of an endpoint, whose epochs begin anew."""
    lineage: int = 0
    step: int = 0
    evaluate: bool = False
    """Evaluate this version now; the host holds it until `Evaluated` or a deadline."""


class Drained(Message, frozen=True):
    """A client has no request in the engine since the gate of this epoch closed."""

    epoch: int


class Evaluated(Message, frozen=True):
    """The evaluation of policy step `step` is done."""

    step: int


AnyMessage = (
    Hello | Beat | AskLease | Leased | NoLease | PutTree | GiveUp | Ack | Nack
    | AskBatch | Batch | NoBatch | Published | Retired | Join | Gate | Drained | Evaluated
)  # fmt: skip

M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def numbered(message: M, request: int) -> M:
    """The message as request, or answer to request, `request`."""
    return msgspec.structs.replace(message, request=request)


def without_evaluation(gate: Gate) -> Gate:
    """The same gate, with nothing to evaluate."""
    return msgspec.structs.replace(gate, evaluate=False)


def encode(message: Message) -> bytes:
    """The message as one frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """The message in `frame`.

    Raises:
        WireError: it is none of `AnyMessage`, or has unknown, missing or mistyped fields.
    """
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"message: {error}") from error
