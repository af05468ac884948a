"""What a piece costs: its tokens, visible pairs and trained tokens, the FLOPs these are, and the seconds these take.

Neighbours: `divide` compares and balances pieces by it; the learner's benchmark measures against it. Pure Python.

FLOPs of forward and backward: a matmul costs two a weight and token, and twice that again backwards; attention costs four a visible
pair, head and channel (scores and mix), and two and a half times that backwards, because scores are computed again there.
The output layer is computed for trained tokens alone. Nothing is counted for norms, rotary embedding and the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from treepo_async.errors import ConfigError
from treepo_async.learner.shape import ModelShape
from treepo_async.types import ROOT, Tree

MATMUL_PASSES = 3.0
"""Forward and backward, in forward passes."""
ATTENTION_PASSES = 3.5
"""The same of attention."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a piece, or several, give to compute."""

    tokens: int = 0
    """Unique ones, prompts included."""
    pairs: int = 0
    """Of a query and a key that it sees."""
    trained: int = 0
    """Trained tokens."""
    nodes: int = 0
    """Runs of tokens without a fork."""

    def __add__(self, other: Self) -> "Load":
        return Load(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.trained + other.trained,
            self.nodes + other.nodes,
        )


def load_of(tree: Tree, leaves: Sequence[int]) -> Load:
    """What the paths of some leaves give to compute, each token once.

    Args:
        tree: any.
        leaves: indices into its `leaves`, at least one.
    """
    chosen = sorted({i for leaf in leaves for i in tree.path(tree.leaves[leaf])})
    num_prompt = len(tree.prompt.token_ids)
    stops, forks = {ROOT: num_prompt}, dict[int, int]()
    pairs = _triangle(num_prompt)
    for i in chosen:
        parent, length = tree.segments[i].parent, len(tree.segments[i])
        pairs += length * stops[parent] + _triangle(length)
        stops[i] = stops[parent] + length
        forks[parent] = forks.get(parent, 0) + 1
    trained = sum(len(tree.segments[i]) for i in chosen)
    return Load(
        tokens=num_prompt + trained,
        pairs=pairs,
        trained=trained,
        nodes=1 + sum(number for number in forks.values() if number > 1),
    )


class Flops(NamedTuple):
    """FLOPs of forward and backward, or what one unit of a load makes of them."""

    matmul: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.matmul + self.attention


def flops(shape: ModelShape, load: Load) -> Flops:
    """FLOPs of forward and backward of a load, if no masked pair is computed."""
    return Flops(
        matmul=load.tokens * _per_token(shape) + load.trained * _per_trained(shape),
        attention=load.pairs * _per_pair(shape),
    )


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a device computes the parts of a model; measured, see `SPEEDS`."""

    matmul: float
    """FLOP/s."""
    attention: float
    """FLOP/s."""
    node_s: float
    """Seconds for each node and layer, on top."""


SPEEDS = {
    "dense": Speed(matmul=8.2e10, attention=4.1e10, node_s=0.0),
    "cascade": Speed(matmul=8.2e10, attention=4.1e10, node_s=5e-5),
    "flex": Speed(matmul=6.7e14, attention=6.7e13, node_s=0.0),
}
"""By the name of an attention backend.

`cascade`: least squares over the processor time of forward and backward of 14 loads (tree and flat packing of 7 trees: 320 to 3700 tokens,
paths of 36 to 1900, segments of 4 to 256; `bench.learner_run` with shape=cpu, best of 4, one thread of an AMD EPYC with AVX-512
on a busy machine), with a constant for each microbatch; worst error 5 %. The cost of a node could not be told from 0, as that backend's calls
take 64 queries whatever the nodes; what stands here is that of one call. `dense` on a CPU is taken to be as fast.
`flex`: least squares over the wall time of 7 loads on one H200 in bfloat16 (17k to 66k tokens, Qwen2.5-0.5B and 1.5B with
recompute=full, whose second forward pass is in the speed; the same command), worst error 14 %; norms and rotary embedding are in it
too. Packing and balance depend on the ratio of the two speeds alone, and where attention is a small part of all, hardly on that.
"""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost as a sum over what a load consists of; by default its tokens."""

    per_token: float = 1.0
    per_pair: float = 0.0
    per_trained: float = 0.0
    per_node: float = 0.0
    keys: int | None = None
    """Keys that every query is computed against, seen or not; None: those it sees."""

    @classmethod
    def of(cls, shape: ModelShape, attention: str, *, microbatch_tokens: int) -> Self:
        """Seconds, by the speed of the device that the attention backend is for.

        Args:
            shape: of the whole model.
            attention: a name in `SPEEDS`.
            microbatch_tokens: of a full microbatch; `dense` computes each query against all of them.

        Raises:
            ConfigError: the backend is unknown.
        """
        speed = SPEEDS.get(attention)
        if speed is None:
            raise ConfigError(
                f"attention {attention!r} is unknown; it is one of {', '.join(SPEEDS)}"
            )
        return cls(
            per_token=_per_token(shape) / speed.matmul,
            per_pair=_per_pair(shape) / speed.attention,
            per_trained=_per_trained(shape) / speed.matmul,
            per_node=shape.num_layers * speed.node_s,
            keys=microbatch_tokens if attention == "dense" else None,
        )

    def cost(self, load: Load) -> float:
        """Of a load."""
        pairs = load.pairs if self.keys is None else load.tokens * self.keys
        return (
            self.per_token * load.tokens
            + self.per_pair * pairs
            + self.per_trained * load.trained
            + self.per_node * load.nodes
        )


def _per_token(shape: ModelShape) -> float:
    heads = shape.num_heads + 2 * shape.num_kv_heads
    projections = (heads + shape.num_heads) * shape.head_dim
    weights = shape.hidden_size * (projections + 3 * shape.intermediate_size)
    return MATMUL_PASSES * 2 * shape.num_layers * weights


def _per_trained(shape: ModelShape) -> float:
    return MATMUL_PASSES * 2 * shape.hidden_size * shape.vocab_size


def _per_pair(shape: ModelShape) -> float:
    return ATTENTION_PASSES * 4 * shape.num_layers * shape.num_heads * shape.head_dim


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
