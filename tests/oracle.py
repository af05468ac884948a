"""Slow references, written apart from the package: what every fast path is measured against.

Random trees for any test come from `random_tree`. The rest re-derives the learner's numbers trajectory by
trajectory with Hugging Face transformers and the textbook form of each formula; nothing here imports the
package beyond its nouns (`treepo_async.types`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)

VERSIONS = (PolicyVersion(0, 3), PolicyVersion(0, 4), PolicyVersion(1, 5))


def random_tree(
    rng: np.random.Generator,
    *,
    num_segments: int = 12,
    prompt_tokens: int = 5,
    segment_tokens: int = 4,
    max_depth: int = 4,
    vocab_size: int = 128,
    versions: Sequence[PolicyVersion] = VERSIONS,
    mixed_share: float = 0.25,
    nan_share: float = 0.0,
    temperature: float = 1.0,
) -> Tree:
    """Grow a tree of arbitrary shape that satisfies `Tree.check`.

    Segments hang on randomly chosen earlier ones, so their creation order is not depth-first; some end in the
    middle of a grid level and are continued there under another policy version. Rewards are 0 or 1 by chance.

    Args:
        rng: the only source of randomness.
        num_segments: segments wanted; fewer where every path has reached the length limit.
        prompt_tokens: longest prompt; its length is drawn from 1 to this.
        segment_tokens: the grid.
        max_depth: grid levels of a path.
        vocab_size: token ids are drawn from 1 to one less than this.
        versions: policy versions the segments are drawn from.
        mixed_share: share of segments flagged `mixed_context`.
        nan_share: share of leaves whose scoring failed.
        temperature: recorded as the sampling temperature.
    """
    segments: list[Segment] = []
    ends: list[int] = []
    while len(segments) < num_segments:
        limit = segment_tokens * max_depth
        parents = [ROOT, *(i for i, end in enumerate(ends) if end < limit)]
        parent = int(rng.choice(parents))
        start = 0 if parent == ROOT else ends[parent]
        room = segment_tokens - start % segment_tokens
        num_tokens = room if rng.random() < 0.6 else int(rng.integers(1, room + 1))
        segments.append(
            Segment(
                parent=parent,
                level=start // segment_tokens,
                token_ids=rng.integers(1, vocab_size, num_tokens, dtype=np.int32),
                behavior_logprobs=-rng.exponential(2.0, num_tokens).astype(np.float32),
                policy_version=versions[int(rng.integers(len(versions)))],
                mixed_context=bool(rng.random() < mixed_share),
            )
        )
        ends.append(start + num_tokens)
    parents_taken = {segment.parent for segment in segments}
    leaves = [i for i in range(len(segments)) if i not in parents_taken]
    for i in leaves:
        full = ends[i] == segment_tokens * max_depth
        segments[i] = replace(segments[i], stop=StopReason.LENGTH if full else StopReason.EOS)
    rewards_L = rng.integers(0, 2, len(leaves)).astype(np.float32)
    rewards_L[rng.random(len(leaves)) < nan_share] = np.nan
    tree = Tree(
        prompt=Prompt(
            id=f"prompt-{int(rng.integers(1_000_000))}",
            token_ids=rng.integers(
                1, vocab_size, int(rng.integers(1, prompt_tokens + 1)), dtype=np.int32
            ),
            text="a problem",
            answer="7",
        ),
        segments=tuple(segments),
        rewards_L=rewards_L,
        accuracies_L=rewards_L.copy(),
        sampling=Sampling(temperature, segment_tokens, max_depth, len(leaves), 2),
        provenance=Provenance(lease_id=f"lease-{int(rng.integers(1_000_000))}", actor="actor-0"),
    )
    tree.check()
    return tree


def visible_by_ancestors(tree: Tree) -> np.ndarray:
    """The attention mask of one tree from the definition: a token sees itself and what precedes it on its path.

    Returns:
        bool [T, T], prompt first, then segments depth first with siblings in creation order.
    """
    token_of: list[tuple[int, int]] = [(ROOT, i) for i in range(len(tree.prompt.token_ids))]

    def descend(parent: int) -> None:
        for i, segment in enumerate(tree.segments):
            if segment.parent == parent:
                token_of.extend((i, offset) for offset in range(len(segment)))
                descend(i)

    descend(ROOT)
    sees = np.zeros((len(token_of), len(token_of)), bool)
    for q, (query_segment, query_offset) in enumerate(token_of):
        ancestors = {ROOT, *tree.path(query_segment)} - {query_segment}
        for k, (key_segment, key_offset) in enumerate(token_of):
            sees[q, k] = key_segment in ancestors or (
                key_segment == query_segment and key_offset <= query_offset
            )
    return sees


def tiny_qwen2(
    *,
    tied: bool,
    seed: int = 0,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 4,
) -> Any:
    """A random Qwen2 whose biases and norms are not trivial, hidden size 64, 128 tokens; float32."""
    import torch  # here, so that a test that wants a tree alone does not pay for torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.2 * noise)
            else:
                weight.copy_(noise * (0.2 if "embed" in name or "lm_head" in name else 0.125))
    return model


def sequence_logprobs(model: Any, token_ids: Any, temperature: float = 1.0) -> Any:
    """Log-prob of each token after the first, one sequence alone under ordinary causal attention, [T - 1]."""
    import torch

    ids = torch.as_tensor(np.asarray(token_ids, np.int64))
    logits = model(ids[None], use_cache=False).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def segment_logprobs(model: Any, tree: Tree) -> list[np.ndarray]:
    """Log-probs of the tokens of each segment at the tree's temperature, from one of the paths through it, [T] each."""
    found: list[np.ndarray] = [np.empty(0)] * len(tree.segments)
    for leaf in tree.leaves:
        path = tree.path(leaf)
        token_ids = [tree.prompt.token_ids, *(tree.segments[i].token_ids for i in path)]
        logprobs = sequence_logprobs(model, np.concatenate(token_ids), tree.sampling.temperature)
        values = logprobs.detach().numpy()[len(tree.prompt.token_ids) - 1 :]
        for i in path:
            found[i], values = np.split(values, [len(tree.segments[i])])
    return found


def trajectory_loss(
    model: Any,
    trees: Sequence[Tree],
    advantages: Sequence[np.ndarray],
    *,
    clip_low: float,
    clip_high: float,
    cap: float | None,
    proximal_logprobs: Sequence[Sequence[np.ndarray]] | None = None,
) -> Any:
    """The textbook clipped loss, one trajectory after another, divided by all their tokens; call `backward` on it.

    Args:
        model: a transformers causal language model.
        trees: the batch.
        advantages: per tree [L]; a NaN leaves its trajectory out.
        clip_low: lower clip distance.
        clip_high: upper clip distance.
        cap: largest importance weight min(exp(proximal - behavior), cap); None for no correction.
        proximal_logprobs: per tree and segment; None for the current policy.
    """
    import torch

    total, num_tokens = 0.0, 0
    for t, (tree, advantages_L) in enumerate(zip(trees, advantages, strict=True)):
        for leaf, advantage in zip(tree.leaves, advantages_L, strict=True):
            if np.isnan(advantage):
                continue
            path = tree.path(leaf)
            response = np.concatenate([tree.segments[i].token_ids for i in path])
            token_ids = np.concatenate([tree.prompt.token_ids, response])
            logprobs = sequence_logprobs(model, token_ids, tree.sampling.temperature)
            logprobs = logprobs[-len(response) :]
            behavior = np.concatenate([tree.segments[i].behavior_logprobs for i in path])
            if proximal_logprobs is None:
                proximal = logprobs.detach()
            else:
                proximal = torch.as_tensor(np.concatenate([proximal_logprobs[t][i] for i in path]))
            weight = 1.0
            if cap is not None:
                weight = (proximal - torch.as_tensor(behavior)).exp().clamp(max=cap)
            ratio = (logprobs - proximal).exp()
            bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
            surrogate = torch.minimum(ratio * advantage, bounded * advantage)
            total = total - (weight * surrogate).sum()
            num_tokens += len(response)
    return total / num_tokens
