"""What a run needs of memory, from sizes alone: of every pipeline stage of the learner, and of an engine. Pure; imports no torch.

The learner's activations follow the accounting of Korthikanti et al. 2022 (arXiv 2205.05198, section 4): what each operation of a
layer saves for its backward pass, added up. The terms are those that autograd saves in this learner's Megatron layers, so
they differ from that paper's: attention keeps no probabilities, the MLP is gated, nothing is dropped out. Axis letters: `T` tokens of a
microbatch, `h` hidden, `q` and `k` features of all queries and of all keys on a rank, `f` features of the MLP on a rank, `b` bytes of
a number, `L` layers of a stage.

Neighbours: `forecast` asks, `learner.shape` has the sizes. Not counted: the allocator's fragments, buffers of collectives,
Megatron's gradient buckets beyond one gradient a parameter, and what an attention backend saves beside queries, keys, values,
its output and one number a head.
"""

from dataclasses import dataclass
from typing import Self

from treepo_async.config.layout import Layout
from treepo_async.learner.shape import ModelShape

GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = 4
TOKEN_BYTES = 12
"""Of a token's id or position, and of where its subtree ends."""
MOMENTS = 2
"""Numbers that AdamW keeps at every parameter, in float32."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the learner does at once, and how."""

    layout: Layout
    dtype: str
    """A name in `ITEM_BYTES`."""
    tokens: int
    """T: most tokens of a microbatch."""
    recompute: str
    """As `learner.recompute`."""
    head_tokens: int
    """Rows of logits in memory at once."""
    sequence_parallel: bool = True
    dense_mask: bool = False
    """Whether attention builds a mask of T x T."""
    on_gpu: bool = True
    """On CUDA norms are one kernel, which saves its input, and AdamW updates all parameters at once, which takes a float32
    number each; on CPU norms save float32 copies too, and parameters are updated one by one."""
    entropy_gradient: bool = False
    with_reference: bool = False
    """Whether a frozen copy of the weights is kept."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    num_parameters: int
    weights: int
    gradients: int
    optimizer: int
    """Moments and, with bfloat16, master weights."""
    reference: int
    activations: int
    """Saved for the backward pass, of all microbatches that are in flight at once."""
    working: int
    """What comes and goes: a layer that is computed again, its gradients, the logits of a chunk."""
    update: int
    """What the optimizer takes besides while it updates, when there are no activations."""

    @property
    def total(self) -> int:
        """Most of it at once."""
        held = self.weights + self.gradients + self.optimizer + self.reference
        return held + max(self.activations + self.working, self.update)

    @classmethod
    def of(cls, shape: ModelShape, work: Work, stage: int) -> Self:
        """Estimate a rank of a stage."""
        number = rank_parameters(shape, work.layout, stage)
        item = ITEM_BYTES[work.dtype]
        masters = 0 if item == FLOAT32 else 1
        in_flight = work.layout.pp - stage
        saved = saved_of_stage(shape, work, stage)
        return cls(
            stage=stage,
            num_parameters=number,
            weights=number * item,
            gradients=number * FLOAT32,
            optimizer=number * FLOAT32 * (MOMENTS + masters),
            reference=number * item if work.with_reference else 0,
            activations=saved * in_flight,
            working=_working(shape, work, stage),
            update=number * FLOAT32 if work.on_gpu else 0,
        )


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model, a tied output layer counted once."""
    one = Layout()
    return rank_parameters(shape, one, 0)


def rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters of a rank of a pipeline stage.

    With a tied output layer and several stages, first and last stage both hold the embedding.
    """
    embedding = shape.vocab_size * shape.hidden_size // layout.tp
    number = shape.num_layers // layout.pp * _layer_parameters(shape, layout.tp)
    if stage == 0:
        number += embedding
    if stage == layout.pp - 1:
        number += shape.hidden_size
        if not (shape.tied and layout.pp == 1):
            number += embedding
    return number


def _layer_parameters(shape: ModelShape, tp: int) -> int:
    hidden, head = shape.hidden_size, shape.head_dim
    queries, values = shape.num_heads * head, 2 * shape.num_kv_heads * head
    split = (queries + values) * (hidden + shape.qkv_bias) + queries * hidden
    split += 3 * shape.intermediate_size * hidden
    return split // tp + 2 * hidden + (2 * head if shape.qk_norm else 0)


def saved_of_stage(shape: ModelShape, work: Work, stage: int) -> int:
    """Bytes that one microbatch leaves on a stage for its backward pass: its ids, its layers, and the head's part."""
    layers = shape.num_layers // work.layout.pp
    saved = work.tokens * TOKEN_BYTES + layers * _saved_of_layer(shape, work, work.recompute)
    if work.recompute == "full":
        # layers that are computed again keep the rotary angles that they share
        saved += work.tokens * shape.head_dim * FLOAT32
    if stage == work.layout.pp - 1:
        saved += _saved_of_head(shape, work)
    return saved


def _saved_of_layer(shape: ModelShape, work: Work, recompute: str) -> int:
    """Bytes that one microbatch leaves in one layer.

    Without recompute, with s = tp under sequence parallelism, else 1:
    two norms (input, one number a token), the input of the two column-parallel layers: T h b / s each;
    the output of the qkv layer T (q + 2k) b, rotated queries and keys T (q + k) b, cosines and sines T 4 D b;
    attention T q b and one number a head; the gated MLP T 5f b: both halves, the second one again (Megatron adds an offset to it),
    the gate's activation, the product. With fewer query groups than ranks every rank gathers the qkv of all ranks, and a view of it
    stays: T (H + 2G) D b, for its own q + 2k. `selective` leaves out the mask and the number a head, `full` all but the layer's input.
    """
    item, tokens, tp = ITEM_BYTES[work.dtype], work.tokens, work.layout.tp
    shared = tokens // (tp if work.sequence_parallel else 1)
    hidden, head = shape.hidden_size, shape.head_dim
    if recompute == "full":
        return shared * hidden * item
    queries, keys = shape.num_heads * head // tp, max(1, shape.num_kv_heads // tp) * head
    saved = 2 * (_saved_of_norm(work, shared, hidden) + shared * hidden * item)
    qkv = queries + 2 * keys
    if shape.num_kv_heads < tp:
        qkv = (shape.num_heads + 2 * shape.num_kv_heads) * head
    # rotated queries and keys, cosines and sines, attention's output
    saved += tokens * (qkv + 2 * queries + keys + 4 * head) * item
    saved += tokens * 5 * (shape.intermediate_size // tp) * item
    if shape.qk_norm:
        rows = tokens * (queries + keys) // head
        saved += _saved_of_norm(work, rows, head)
    if recompute == "none":
        saved += tokens * (queries // head) * FLOAT32
        saved += tokens * tokens * item if work.dense_mask else 0
    return saved


def _saved_of_norm(work: Work, rows: int, size: int) -> int:
    """A fused norm saves its input; the composed one its input and the normed rows, both in float32."""
    numbers = ITEM_BYTES[work.dtype] if work.on_gpu else 2 * FLOAT32
    return rows * size * numbers + rows * FLOAT32


def _saved_of_head(shape: ModelShape, work: Work) -> int:
    """The last norm, and the row of each trained token; all tokens are taken for trained."""
    item, tokens = ITEM_BYTES[work.dtype], work.tokens
    shared = tokens // (work.layout.tp if work.sequence_parallel else 1)
    return _saved_of_norm(work, shared, shape.hidden_size) + tokens * shape.hidden_size * item


def _working(shape: ModelShape, work: Work, stage: int) -> int:
    """The larger of what a layer and what the head needs besides while their backward pass runs."""
    item, tp = ITEM_BYTES[work.dtype], work.layout.tp
    hidden, ffn = shape.hidden_size, shape.intermediate_size // tp
    # gradients inside the MLP and of two hidden states that are not divided
    layer = work.tokens * (5 * ffn + 2 * hidden) * item + 2 * hidden * ffn * item
    if work.recompute == "full":
        layer += _saved_of_layer(shape, work, "none")
    elif work.recompute == "selective" and work.dense_mask:
        layer += work.tokens * work.tokens * item
    return max(layer, head_bytes(shape, work)) if stage == work.layout.pp - 1 else layer


def head_bytes(shape: ModelShape, work: Work) -> int:
    """Bytes of the logits of one chunk in its backward pass, with the gradient of the output layer's weight.

    head_tokens x vocabulary / tp: log-probs and their gradient in float32, the gradient once more in the model's dtype, and
    with an entropy bonus two more copies in float32.
    """
    item, own = ITEM_BYTES[work.dtype], shape.vocab_size // work.layout.tp
    copies = 2 * FLOAT32 + item + (2 * FLOAT32 if work.entropy_gradient else 0)
    rows = min(work.head_tokens, work.tokens)
    return rows * own * copies + own * shape.hidden_size * item


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes of one engine on each of its devices."""

    weights: int
    kv_bytes_per_token: int
    reserved: int
    """Left to SGLang for its activations, graphs and workspaces."""

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        *,
        dtype: str,
        prefill_chunk_tokens: int,
        device_bytes: int,
        tp: int = 1,
    ) -> Self:
        """Estimate an engine; what it reserves is what SGLang 0.5 leaves out of its static memory by default.

        Args:
            shape: of the model.
            dtype: of weights and KV cache.
            prefill_chunk_tokens: of one forward pass.
            device_bytes: memory of a device.
            tp: devices, which divide weights and heads; one of fewer key heads than devices is on several.
        """
        item = ITEM_BYTES[dtype]
        reserved = GIB * 5 // 8 + prefill_chunk_tokens * 3 * 2**19
        if device_bytes > 60 * GIB:
            reserved = max(reserved, 10 * GIB)
        return cls(
            weights=model_parameters(shape) * item // tp,
            kv_bytes_per_token=(
                2 * shape.num_layers * max(1, shape.num_kv_heads // tp) * shape.head_dim * item
            ),
            reserved=reserved,
        )

    def tokens_that_fit(self, device_bytes: int) -> int:
        """Tokens of KV cache beside weights and reserve; 0 or less when there is no room."""
        return (device_bytes - self.weights - self.reserved) // self.kv_bytes_per_token
