"""Every message between processes, as frozen msgspec structs in one tagged union.

A request carries a `request` number, its reply carries the same one; a `Gate` is pushed without being asked for.
Frames on a socket: `[message, *attachment]`, the attachment being trees as `codec` encodes them. Requests are
idempotent: a peer that got no answer sends the same request again.
"""

from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec

from treepo_async.errors import WireError

PROTOCOL = 3
MAX_MESSAGE_BYTES = 2**20
"""Of a request without its attachment; no larger one is looked at."""

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
"""A number that is kept: whoever makes one up cannot make it larger than files and index take."""
Name = Annotated[str, msgspec.Meta(max_length=100)]
"""Of a peer."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """Base of all messages."""

    request: int = 0
    """Number of the request this is or answers."""


class Hello(Message, frozen=True):
    """First message of a peer; without it nothing else is taken.

    Refused when it belongs to another run or protocol, was given another config, or has another tokenizer.
    """

    name: Name
    run_id: str
    config_digest: str = ""
    """Of the run's `config.yaml`; see `config.wiring.digest_of`."""
    tokenizer_digest: str = ""
    """Of the model's `tokenizer.json`; empty for a peer without a tokenizer."""
    protocol: int = PROTOCOL


class Beat(Message, frozen=True):
    """An actor lives and still works on these leases. Answered by `Beating`."""

    leases: list[str]


class Beating(Message, frozen=True):
    """Replay lives; `lost` are the named leases that are not the actor's any more: it need not go on with them."""

    lost: list[str]


class AskLease(Message, frozen=True):
    """An actor wants a prompt, and will wait for it."""

    wait_s: float


class Leased(Message, frozen=True):
    """A prompt for an actor, to be answered with one tree.

    The attachment is empty, or a tree of the same prompt that was too old for its batch: what of it is young enough may
    be kept.
    """

    lease_id: str
    attempt: Count
    """Of all leases of the prompt, so that no two share a number."""
    tries: Count
    """Of those that count: it decides forks and fallbacks, so that a tree is grown as if nobody had handed it back."""
    prompt_id: str
    text: str
    answer: str
    token_ids: list[int]
    least_step: Count
    """Policy step below which no segment of the tree may be sampled."""


class NoLease(Message, frozen=True):
    """No prompt now, and why; `final` when there will never be one again."""

    reason: str
    final: bool = False


class PutTree(Message, frozen=True):
    """A scored tree for a lease; the tree is the attachment."""

    lease_id: str
    attempt: Count
    digest: int = 0
    """Of the attachment; see `codec.digest_of`."""


class GiveUp(Message, frozen=True):
    """An actor failed on a lease: let another one try. With the reason `LEFT` it ends, and gives all back that it holds."""

    lease_id: str
    attempt: Count
    reason: str


LEFT = "left"
"""Reason of an actor that ends, whatever lease it names; none of its attempts counts."""


class Ack(Message, frozen=True):
    """Done; for a tree: it is on disk. `note` says what became of it, e.g. `duplicate`."""

    note: str = ""


class Nack(Message, frozen=True):
    """Refused, and whether sending the same again can succeed."""

    reason: str
    """A word of `Refusal`."""
    detail: str
    retry: bool = False
    retry_after_s: float = 0.0


class Refusal(StrEnum):
    """Why a request was refused."""

    HELLO_FIRST = "hello_first"
    """The peer is not known, as replay was started anew: greet, then send again."""
    DISK_FULL = "disk_full"
    SUSPENDED = "suspended"
    """Too much of what the peer sent was invalid."""
    STALE = "stale"
    UNKNOWN_LEASE = "unknown_lease"
    INVALID = "invalid"
    PROTOCOL = "protocol"
    OVERSIZE = "oversize"
    FUTURE_VERSION = "future_version"
    """Sampled under a version that was never published."""
    WRONG_RUN = "wrong_run"
    WRONG_STEP = "wrong_step"
    ROLLED_BACK = "rolled_back"
    """A later lineage has taken the learner's place."""
    FENCED = "fenced"
    """A later process of the same name has taken the peer's place."""


class AskBatch(Message, frozen=True):
    """The learner wants the trees of step `step`, and will wait for them. That it has them is journalled before they go out."""

    step: Count
    lineage: Count
    """Of the weights that they will change."""
    wait_s: float


class Batch(Message, frozen=True):
    """The trees of a step in lease order; the attachment is their frames, `frames_per_tree` each."""

    step: Count
    lease_ids: list[str]
    frames_per_tree: int
    ledger: dict[str, int]
    """How every lease so far stands: see `replay.queue.Queue.ledger`."""
    results: dict[int, str] = {}
    """Digest of the result of each earlier lineage that took this batch; empty where it had none."""


class NoBatch(Message, frozen=True):
    """No batch yet, and what it waits for; `final` when the data has ended."""

    reason: str
    final: bool = False


class Trained(Message, frozen=True):
    """The learner has made the update of a step; sent before its weights are published."""

    step: Count
    lineage: Count
    digest: str
    """Of the result: equal for equal trees, weights and optimizer on the same machine."""


class Published(Message, frozen=True):
    """The learner has published policy step `step`; the trees of `consumed_step` were trained."""

    step: Count
    lineage: Count
    consumed_step: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)]
    """-1: none, the first weights of a run."""


class Retired(Message, frozen=True):
    """The trees of all batches up to and including `step` will not be asked for again: every checkpoint covers them."""

    step: Count


class Join(Message, frozen=True):
    """A client of an engine host: it will obey the gate. Answered by a `Gate`."""

    name: Name
    evaluates: bool = False


class Gate(Message, frozen=True):
    """Whether requests may be submitted to the engine, and under which policy version."""

    epoch: int
    """Counts the announcements of a host."""
    is_open: bool
    host: str = ""
    """Another one for each host of an endpoint, whose epochs begin anew."""
    lineage: Count = 0
    step: Count = 0
    evaluate: bool = False
    """Evaluate this version now; the host holds it until `Evaluated` or a deadline."""
    is_down: bool = False
    """The server is being started again, so that a closed gate stays closed for long."""
    num_in_flight: Count = 0
    """Requests that the server runs or keeps waiting, of all clients, a moment ago; as old as the gate where it is pushed."""


class Drained(Message, frozen=True):
    """A client has no request in the engine since the gate of this epoch closed."""

    epoch: int


class Evaluated(Message, frozen=True):
    """The evaluation of policy step `step` is done."""

    step: Count


class AskWeights(Message, frozen=True):
    """An engine host wants weights that are newer than those its engine has, and will wait for them.

    Answered by `WeightsOffer`, or by `NoWeights` after `wait_s`.
    """

    engine: Name
    lineage: Count
    step: Count
    """Of the weights the engine has."""
    refused: list[str] = []
    """Versions that it will not take."""
    evaluates: bool = False
    """Versions marked for evaluation are evaluated there: none is passed over."""
    marked_only: bool = False
    """It wants no others."""
    wait_s: float = 0.0


class WeightsOffer(Message, frozen=True):
    """A version that the learner holds ready; the attachment is its manifest and buckets, see `weights.parcel`."""

    lineage: Count
    step: Count


class NoWeights(Message, frozen=True):
    """Nothing newer, or nothing to send."""


class WeightsGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the ranks of one engine meet the sender of one pipeline stage."""

    name: str
    address: str
    port: int


class TakeWeights(Message, frozen=True):
    """The engine has no request: have every stage send it a version. Answered by `WeightsComing`, once all are told to."""

    engine: Name
    lineage: Count
    step: Count
    server: Name
    """Another one for each start of the server, which has joined no group then."""
    tp: Annotated[int, msgspec.Meta(ge=1, lt=2**10)]
    """Its ranks."""


class WeightsComing(Message, frozen=True):
    """The senders are about to broadcast, one group a stage, in the order of the stages."""

    groups: list[WeightsGroup]
    clock: float
    """The learner's, in seconds, as it answers."""


class WeightsTaken(Message, frozen=True):
    """The engine has the version that it was to be sent and has proven it, or why not."""

    engine: Name
    lineage: Count
    step: Count
    error: str = ""


class AskSend(Message, frozen=True):
    """The sender of a pipeline stage wants something to send, and will wait for it. Answered by `SendWeights` or `NoWeights`."""

    stage: Count
    address: str
    port: int
    """Where its groups meet."""
    done: Count = 0
    """The last order it has begun; it wants a later one."""
    wait_s: float = 0.0


class SendWeights(Message, frozen=True):
    """Broadcast all buckets of a version in a group, which is opened first if it is not yet."""

    order: Count
    """Counts all orders, from 1."""
    engine: Name
    group: str
    ranks: Count
    """Of the group, the sender's included."""
    lineage: Count
    step: Count


class WeightsSent(Message, frozen=True):
    """What became of an order."""

    engine: Name
    group: str
    error: str = ""


AnyMessage = (
    Hello | Beat | Beating | AskLease | Leased | NoLease | PutTree | GiveUp | Ack | Nack
    | AskBatch | Batch | NoBatch | Trained | Published | Retired | Join | Gate | Drained | Evaluated
    | AskWeights | WeightsOffer | NoWeights | TakeWeights | WeightsComing | WeightsTaken | AskSend | SendWeights
    | WeightsSent
)  # fmt: skip

M = TypeVar("M", bound=Message)


class _Numbered(msgspec.Struct, frozen=True):
    """What of a message is read where the rest cannot be."""

    request: int = 0


_encoder = msgspec.msgpack.Encoder()
_number_decoder = msgspec.msgpack.Decoder(_Numbered)
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def numbered(message: M, request: int) -> M:
    """The message as request, or answer to request, `request`."""
    return msgspec.structs.replace(message, request=request)


def without_evaluation(gate: Gate) -> Gate:
    """The same gate, with nothing to evaluate."""
    return msgspec.structs.replace(gate, evaluate=False)


def with_load(gate: Gate, num_in_flight: int) -> Gate:
    """The same gate, with what its server has to do now."""
    return msgspec.structs.replace(gate, num_in_flight=num_in_flight)


def encode(message: Message) -> bytes:
    """The message as one frame."""
    return _encoder.encode(message)


def request_of(frame: bytes) -> int:
    """The number of a request that `decode` refuses, so that its sender can be told; 0 where there is none."""
    if len(frame) > MAX_MESSAGE_BYTES:
        return 0
    try:
        return _number_decoder.decode(frame).request
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0


def decode(frame: bytes, *, max_bytes: int | None = MAX_MESSAGE_BYTES) -> AnyMessage:
    """The message in `frame`.

    Args:
        frame: the first of those that arrived.
        max_bytes: largest one that is looked at; None for an answer, which comes from whom the reader chose to ask.

    Raises:
        WireError: it is none of `AnyMessage`, is too large, or has unknown, missing or mistyped fields.
    """
    if max_bytes is not None and len(frame) > max_bytes:
        raise WireError(f"message: it has {len(frame)} bytes, at most {max_bytes} are read")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"message: {error}") from error
