"""Attention of new tokens to themselves and to a cached past, request by request, on the CPU.

Beside it SGLang's own (`torch_native`) does too much in two places. Where a request goes on behind a cached prefix, it
fills the queries up with as many rows as the prefix has tokens and computes attention for all of them: a path that goes
on behind a fork has one new token and a long past, and costs as much as decoding some ten tokens. And it gathers keys
and values with an index in brackets, which takes three times as long as `index_select`.

Letters: N new tokens of a request, T tokens of its past and the new ones, H query heads, K key and value heads, D their
dimensions.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(query, output, keys, values, slots, num_new, **options):
    """Fill `output` for a batch.

    Args:
        query: new tokens of all requests one after the other, [sum of N, H, D].
        output: likewise.
        keys: the cache, [slots, K, D].
        values: likewise.
        slots: of each request's tokens in the cache, one [T] for each.
        num_new: N of each request.
        options: see `attend_one`.
    """
    start = 0
    for slots_T, n in zip(slots, num_new, strict=True):
        end = start + n
        key, value = keys.index_select(0, slots_T), values.index_select(0, slots_T)
        output[start:end] = attend_one(query[start:end], key, value, **options)
        start = end
    return output


def attend_one(query, key, value, *, scaling, enable_gqa):
    """Causal attention of the last tokens of one sequence.

    Args:
        query: [N, H, D], of its last tokens.
        key: [T, K, D].
        value: [T, K, D].
        scaling: of the products; None is 1 / sqrt(D).
        enable_gqa: whether K is less than H.

    Returns:
        [N, H, D].
    """
    num_new, num_tokens = len(query), len(key)
    mask = None
    if 1 < num_new < num_tokens:
        mask = torch.ones(num_new, num_tokens, dtype=torch.bool).tril(num_tokens - num_new)
    mixed = scaled_dot_product_attention(
        *(part.movedim(0, 1).unsqueeze(0) for part in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None and num_new > 1,
        scale=scaling,
        enable_gqa=enable_gqa,
    )
    return mixed.squeeze(0).movedim(1, 0)
