"""SGLang's `torch_native` attention with the arithmetic of `suffix_attention` where that applies.

It applies to causal self-attention over everything before, in one number format; anything else (encoders, sliding
windows, a cache in another format) is left to SGLang. Invariant: the numbers are those of `torch_native`.
"""

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from suffix_attention import attend


class SuffixAttention(TorchNativeAttnBackend):
    """The two methods take what SGLang's take."""

    def _run_sdpa_forward_extend(self, *tensors, **options):
        query, output, *cache, seq_lens, _, new_lens, encoder_lens = tensors
        if encoder_lens is not None or not options["causal"] or not applies(query, cache, options):
            return super()._run_sdpa_forward_extend(*tensors, **options)
        return run(query, output, cache, seq_lens, new_lens.tolist(), options)

    def _run_sdpa_forward_decode(self, *tensors, **options):
        query, output, *cache, seq_lens, encoder_lens = tensors
        if encoder_lens is not None or not applies(query, cache, options):
            return super()._run_sdpa_forward_decode(*tensors, **options)
        return run(query, output, cache, seq_lens, [1] * len(seq_lens), options)


def applies(query, cache, options):
    """Whether this is attention over all earlier tokens of a decoder, in one number format."""
    keys, values, *_ = cache
    plain = not options["is_cross_attn"] and options["sliding_window_size"] is None
    return plain and query.dtype == keys.dtype == values.dtype


def run(query, output, cache, seq_lens, num_new, options):
    """Fill `output` for the requests whose slots stand in SGLang's table."""
    keys, values, table, rows = cache
    slots = [table[row, :n] for row, n in zip(rows.tolist(), seq_lens.tolist(), strict=True)]
    wanted = {name: options[name] for name in ("scaling", "enable_gqa")}
    return attend(query, output, keys, values, slots, num_new, **wanted)


def install():
    """Have `torch_native` mean this class, for the server that is about to start."""
    ATTENTION_BACKENDS["torch_native"] = SuffixAttention
