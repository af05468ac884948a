"""Slow references, written apart from the package: what every fast path is measured against.

Random trees for any test come from `random_tree`. The rest re-derives the learner's numbers trajectory by
trajectory with Hugging Face transformers and the textbook form of each formula; nothing here imports the
package beyond its nouns (`treepo_async.types`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
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
    forks_on_grid: bool = False,
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
        forks_on_grid: whether a segment that ends inside a level has one continuation at most, as growing has it.
    """
    segments: list[Segment] = []
    ends: list[int] = []
    while len(segments) < num_segments:
        limit = segment_tokens * max_depth
        taken = {s.parent for s in segments} if forks_on_grid else set()
        parents = [
            ROOT,
            *(
                i
                for i, end in enumerate(ends)
                if end < limit and not (i in taken and end % segment_tokens)
            ),
        ]
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


FAMILIES = ("qwen2", "qwen3", "llama", "llama3.1")
"""What `tiny_model` makes; the last is a llama whose rotary embedding is stretched."""


def tiny_model(
    family: str,
    *,
    tied: bool,
    seed: int = 0,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 4,
) -> Any:
    """A random model of a `FAMILIES` whose biases and norms are not trivial, hidden size 64, 128 tokens; float32."""
    import torch  # here, so that a test that wants a tree alone does not pay for torch
    import transformers

    kind = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family, "Llama")
    special: dict[str, Any] = {}
    if family == "qwen3":
        special["head_dim"] = 24  # unlike hidden_size / num_heads
    if family == "llama3.1":
        # waves of all three kinds within the few features and positions there are
        special["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    config = getattr(transformers, f"{kind}Config")(
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
        **special,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
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


def tiny_qwen2(*, tied: bool, **sizes: Any) -> Any:
    """`tiny_model` of Qwen2."""
    return tiny_model("qwen2", tied=tied, **sizes)


def exact(model: Any) -> Any:
    """The model in float64 throughout; transformers computes norms in float32 whatever the model's dtype."""
    import torch

    model = model.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(len(child.weight), child.variance_epsilon).double()
                norm.weight = child.weight
                setattr(module, name, norm)
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
        advantages: per tree [L], or [L, D] with one a grid level; a NaN leaves its trajectory out.
        clip_low: lower clip distance.
        clip_high: upper clip distance.
        cap: largest importance weight min(exp(proximal - behavior), cap); None for no correction.
        proximal_logprobs: per tree and segment; None for the current policy.
    """
    import torch

    total, num_tokens = 0.0, 0
    for t, (tree, advantages_L) in enumerate(zip(trees, advantages, strict=True)):
        for leaf, row in zip(tree.leaves, advantages_L, strict=True):
            if np.isnan(row if np.ndim(row) == 0 else row[0]):
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
            advantage = row
            if np.ndim(row) == 1:
                level = np.arange(len(response)) // tree.sampling.segment_tokens
                advantage = torch.as_tensor(row[level])
            ratio = (logprobs - proximal).exp()
            bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
            surrogate = torch.minimum(ratio * advantage, bounded * advantage)
            total = total - (weight * surrogate).sum()
            num_tokens += len(response)
    return total / num_tokens


def with_pruning(tree: Tree, rng: np.random.Generator, *, pruned_share: float = 0.2) -> Tree:
    """The same tree as if a pruning rule had judged some paths: chances to go on below 1, and some leaves pruned."""
    chances = rng.choice([1.0, 0.8, 0.5, 0.3], len(tree.segments))
    segments = [
        replace(segment, inclusion=float(chance)) if segment.stop is None else segment
        for segment, chance in zip(tree.segments, chances, strict=True)
    ]
    rewards_L, accuracies_L = tree.rewards_L.copy(), tree.accuracies_L.copy()
    for leaf in np.flatnonzero(rng.random(len(tree.leaves)) < pruned_share):
        i = tree.leaves[leaf]
        segments[i] = replace(segments[i], stop=StopReason.PRUNED)
        rewards_L[leaf] = accuracies_L[leaf] = np.nan
    return replace(tree, segments=tuple(segments), rewards_L=rewards_L, accuracies_L=accuracies_L)


def token_sums(
    tree: Tree, advantages: np.ndarray
) -> dict[tuple[int, int], tuple[float, float, int]]:
    """(P, N, W) of every trained token, token by token of every trajectory, by (segment, place in it).

    Args:
        tree: any.
        advantages: [L] or [L, D]; NaN leaves a trajectory out.
    """
    sums: dict[tuple[int, int], tuple[float, float, int]] = {}
    for leaf, row in zip(tree.leaves, advantages, strict=True):
        path = [(i, t) for i in tree.path(leaf) for t in range(len(tree.segments[i]))]
        for place, token in enumerate(path):
            a = float(row if np.ndim(row) == 0 else row[place // tree.sampling.segment_tokens])
            if not np.isnan(a):
                p, n, w = sums.get(token, (0.0, 0.0, 0))
                sums[token] = (p + max(a, 0.0), n + max(-a, 0.0), w + 1)
    return sums


class SlowEstimators:
    """Every estimator from the tokens of the trajectories: leaves share a level if their tokens up to its end are the same.

    Each method gives the advantage of one scored leaf, or the list of those of its levels, before weights multiply it.
    """

    def __init__(
        self, tree: Tree, *, leave_one_out: bool = False, path_weights: str = "equal"
    ) -> None:
        self.tree, self.leave_one_out = tree, leave_one_out
        self.grid = tree.sampling.segment_tokens
        self.tokens = [
            [(i, t) for i in tree.path(leaf) for t in range(len(tree.segments[i]))]
            for leaf in tree.leaves
        ]
        self.rewards = [float(reward) for reward in tree.rewards_L]
        self.scored = [i for i, reward in enumerate(self.rewards) if not math.isnan(reward)]
        self.weights = [self.weight(leaf, path_weights) for leaf in range(len(self.tokens))]

    def advantages(self, estimator: str) -> np.ndarray:
        """[L] or [L, D], NaN for unscored leaves and behind a leaf's end."""
        num_levels = max(self.depth(leaf) for leaf in range(len(self.tokens)))
        per_level = estimator in ("treerl", "treerpo", "spo")
        result = np.full((len(self.tokens), num_levels if per_level else 1), np.nan)
        for leaf in self.scored:
            values = np.atleast_1d(self.of_leaf(estimator, leaf))
            mean_weight = sum(self.weights[i] for i in self.scored) / len(self.scored)
            result[leaf, : len(values)] = values * self.weights[leaf] / mean_weight
        return result if per_level else result[:, 0]

    def of_leaf(self, estimator: str, leaf: int) -> Any:
        if estimator.startswith("treepo"):
            return self.treepo(leaf, estimator.removeprefix("treepo"))
        return getattr(self, estimator)(leaf)

    def depth(self, leaf: int) -> int:
        return -(-len(self.tokens[leaf]) // self.grid)

    def node(self, leaf: int, level: int) -> tuple[Any, ...]:
        """The tokens of the first `level` levels, which are the node's name."""
        return tuple(self.tokens[leaf][: level * self.grid])

    def group(self, node: tuple[Any, ...]) -> list[int]:
        """Scored leaves whose tokens begin so."""
        return [i for i in self.scored if tuple(self.tokens[i][: len(node)]) == node]

    def inclusion(self, leaf: int, level: int) -> float:
        """Chance to go on behind the segments of one level."""
        on_level = {i for i, _ in self.tokens[leaf][level * self.grid : (level + 1) * self.grid]}
        return math.prod(self.tree.segments[i].inclusion for i in on_level)

    def weight(self, leaf: int, path_weights: str) -> float:
        weight = 1.0
        for level in range(self.depth(leaf)):
            weight /= self.inclusion(leaf, level)
            if path_weights == "unbiased":
                here = self.node(leaf, level)
                weight /= len(
                    {
                        self.node(i, level + 1)
                        for i in range(len(self.tokens))
                        if self.node(i, level) == here
                    }
                )
        return weight

    def mean(self, leaves: Sequence[int], values: Any = None) -> float:
        values = self.rewards if values is None else values
        total = sum(self.weights[i] for i in leaves)
        return sum(self.weights[i] * values[i] for i in leaves) / total

    def baseline(self, leaf: int, group: Sequence[int]) -> float:
        return self.mean([i for i in group if i != leaf] if self.leave_one_out else group)

    def score(self, leaf: int, group: Sequence[int]) -> float:
        if len(group) == 1:
            return self.rewards[leaf] / (1 + 1e-6)
        mean, n = self.mean(group), len(group)
        total = sum(self.weights[i] for i in group)
        squares = sum(self.weights[i] * (self.rewards[i] - mean) ** 2 for i in group)
        std = math.sqrt(squares / total * n / (n - 1))
        return (self.rewards[leaf] - self.baseline(leaf, group)) / (std + 1e-6)

    def treepo(self, leaf: int, variant: str) -> float:
        if self.scored == [leaf]:
            return self.rewards[leaf]
        terms: list[tuple[float, float]] = []
        seen: list[list[int]] = []
        for level in range(self.depth(leaf)):
            group = self.group(self.node(leaf, level))
            equal = len({self.rewards[i] for i in group}) == 1
            rejected = "subgroup_reject" in variant and level > 0 and equal
            known = "dedup_levels" in variant and group in seen
            if len(group) == 1 or rejected or known:
                continue
            seen.append(group)
            size = sum(self.weights[i] for i in group) if "size_weighted" in variant else 1.0
            terms.append((size, self.rewards[leaf] - self.baseline(leaf, group)))
        if "no_root" in variant and len(terms) > 1:
            terms = terms[1:]
        return sum(size * term for size, term in terms) / sum(size for size, _ in terms)

    def grpo(self, leaf: int) -> float:
        return self.score(leaf, self.scored)

    def rloo(self, leaf: int) -> float:
        others = [i for i in self.scored if i != leaf]
        return self.rewards[leaf] - self.mean(others) if others else 0.0

    def tree_grpo(self, leaf: int) -> float:
        if self.scored == [leaf]:
            return 0.0
        return self.score(leaf, self.scored) + self.score(leaf, self.group(self.node(leaf, 1)))

    def treerl(self, leaf: int) -> list[float]:
        centred = {i: self.rloo(i) for i in self.scored}
        nodes = [self.node(leaf, level) for level in range(self.depth(leaf) + 1)]
        value = [self.mean(self.group(node), centred) for node in nodes]
        mean_weight = sum(self.weights[i] for i in self.scored) / len(self.scored)
        below = [sum(self.weights[i] for i in self.group(node)) / mean_weight for node in nodes]
        return [
            (value[k] - value[0] + value[k] - value[k - 1]) / math.sqrt(below[k])
            for k in range(1, len(nodes))
        ]

    def treerpo(self, leaf: int) -> list[float]:
        result = []
        for level in range(self.depth(leaf)):
            siblings = self.children(self.node(leaf, level), level)
            mean = sum(w * v for _, w, v in siblings) / sum(w for _, w, _ in siblings)
            squares = sum(w * (v - mean) ** 2 for _, w, v in siblings)
            std = math.sqrt(squares / sum(w for _, w, _ in siblings))
            (own,) = (v for node, _, v in siblings if node == self.node(leaf, level + 1))
            rounding = 1e-12 * max(abs(self.rewards[i]) for i in self.scored)
            result.append((own - mean) / std if std > rounding else 0.0)
        return result

    def spo(self, leaf: int) -> list[float]:
        value = [self.value(self.node(leaf, k), k) for k in range(self.depth(leaf) + 1)]
        return [after - before for before, after in pairwise(value)]

    def children(self, node: tuple[Any, ...], level: int) -> list[tuple[Any, float, float]]:
        """(node, weight among its siblings, value) of each child with scored leaves."""
        first = {self.node(i, level + 1): i for i in self.group(node)}
        return [
            (child, 1 / self.inclusion(i, level), self.value(child, level + 1))
            for child, i in first.items()
        ]

    def value(self, node: tuple[Any, ...], level: int) -> float:
        """The reward of a leaf, else the weighted mean of the children."""
        ended = [i for i in self.group(node) if self.depth(i) == level]
        if ended:
            (leaf,) = ended
            return self.rewards[leaf]
        children = self.children(node, level)
        return sum(w * v for _, w, v in children) / sum(w for _, w, _ in children)
