"""The loss as the literature has it: one trajectory after another, one token after another, nothing shared.

Slow, and written apart from the package. `trajectories_of` takes a batch of trees apart, `textbook_loss` adds up; where the log-probs
come from is the caller's affair, so the same loop serves made-up numbers and a whole model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treepo_async.types import NO_LINEAGE, PolicyVersion, Tree


@dataclass
class Trajectory:
    """Numbers of one trajectory's tokens, [T] each."""

    tree: int
    tokens: list[tuple[int, int]]
    """(segment, place in it), which name a token of the tree."""
    theta: Tensor
    """Current log-probs; the gradient flows here."""
    behavior: Tensor
    proximal: Tensor | None
    """Log-probs at the start of the batch."""
    reference: Tensor | None
    entropy: Tensor
    advantage: Tensor
    scale: Tensor
    """What the token counts beside the normalizer."""
    level: list[int]
    lag: list[int | None]
    fresh: list[bool]

    def segments(self) -> list[list[int]]:
        """Places of the tokens of each segment, in order."""
        places = range(len(self.tokens))
        return [list(group) for _, group in groupby(places, key=lambda t: self.tokens[t][0])]


@dataclass
class Textbook:
    """What `textbook_loss` is asked for; the names are those of the learner's keys."""

    loss: str = "ppo"
    anchor: str = "proximal"
    proximal: str = "auto"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    tv_clip: float = 0.2
    normalizer: str | None = "token_mean"
    """None: the scales are all there is."""
    response_limit: int = 16
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: str = "truncated"
    correction_cap: float = 2.0
    correction_floor: float = 0.5
    correct_fresh: bool = False
    masks: tuple[str, ...] = ()
    mask_sigmas: float = 3.0
    mask_lag: float = 0.02
    mask_low: float = 0.8
    mask_high: float = 1.2
    mask_k3: float = 0.01
    mask_veto: float = 1e-4
    mask_m2po: float = 0.04


def trajectories_of(
    trees: Sequence[Tree],
    advantages: Sequence[np.ndarray],
    theta: Callable[[int, int], Tensor],
    *,
    version: PolicyVersion | None = None,
    proximal: Sequence[Sequence[np.ndarray]] | None = None,
    reference: Sequence[Sequence[np.ndarray]] | None = None,
    entropy: Callable[[int, int], Tensor] | None = None,
    scales: Sequence[np.ndarray] | None = None,
) -> list[Trajectory]:
    """The counted trajectories of a batch.

    Args:
        trees: the batch.
        advantages: per tree [L] or [L, D]; NaN leaves a trajectory out.
        theta: (tree, leaf) -> log-probs of the trajectory, [T].
        version: trained from.
        proximal: per tree and segment, at the start of the batch.
        reference: per tree and segment.
        entropy: as `theta`.
        scales: per tree [L] or [L, D].
    """
    found = []
    for t, tree in enumerate(trees):
        for leaf, last in enumerate(tree.leaves):
            row = np.atleast_1d(advantages[t][leaf])
            if np.isnan(row[0]):
                continue
            path = tree.path(last)
            tokens = [(i, k) for i in path for k in range(len(tree.segments[i]))]
            level = [place // tree.sampling.segment_tokens for place in range(len(tokens))]

            def gather(values: Any, path: Any = path) -> Tensor:
                return torch.as_tensor(np.concatenate([values[i] for i in path])).double()

            def on_levels(values: Any, level: Any = level) -> Tensor:
                values = np.atleast_1d(values)
                columns = [k if len(values) > 1 else 0 for k in level]
                return torch.tensor(values[columns], dtype=torch.float64)

            current = theta(t, leaf)
            lags = {i: _lag(tree.segments[i].policy_version, version) for i in path}
            found.append(
                Trajectory(
                    tree=t,
                    tokens=tokens,
                    theta=current,
                    behavior=gather([s.behavior_logprobs for s in tree.segments]),
                    proximal=gather(proximal[t]) if proximal else None,
                    reference=gather(reference[t]) if reference else None,
                    entropy=torch.zeros_like(current) if entropy is None else entropy(t, leaf),
                    advantage=on_levels(row),
                    scale=on_levels(1.0 if scales is None else scales[t][leaf]),
                    level=level,
                    lag=[lags[i] for i, _ in tokens],
                    fresh=[lags[i] == 0 and not tree.segments[i].mixed_context for i, _ in tokens],
                )
            )
    return found


def textbook_loss(trajectories: Sequence[Trajectory], book: Textbook) -> Any:
    """The loss of a batch; call `backward` on it."""
    loss = 0.0
    log_ratios = [_log_ratio(t, book) for t in trajectories]
    norms = _norms(trajectories, book)
    spread, largest = _spread(trajectories, log_ratios), _largest(log_ratios, book.mask_m2po)
    for one, log_ratio, norm in zip(trajectories, log_ratios, norms, strict=True):
        weights = _weights(log_ratio, book)
        for name in book.masks:
            for place in _left_out(name, one, log_ratio, book, spread, largest):
                weights[place] = 0.0
        gains = _gains(one, book)
        for t in range(len(one.tokens)):
            term = -weights[t] * gains[t]
            if book.kl_coef:
                term = term + book.kl_coef * _divergence(one, t, book.kl_estimator)
            term = term - book.entropy_coef * one.entropy[t]
            loss = loss + norm[t] * one.scale[t] * term
    return loss


def effective_sample_size(trajectories: Sequence[Trajectory], book: Textbook) -> float:
    """(sum w)^2 / (n * sum w^2) over all tokens of all trajectories, without masks."""
    weights = [w for t in trajectories for w in _weights(_log_ratio(t, book), book)]
    return sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))


def _lag(sampled: PolicyVersion, version: PolicyVersion | None) -> int | None:
    if version is None or sampled.lineage == NO_LINEAGE:
        return None
    behind = version.step - sampled.step
    return behind if sampled.lineage == version.lineage else max(1, behind)


def _proximal(one: Trajectory, book: Textbook) -> Tensor:
    now = one.theta.detach()
    if book.proximal == "interpolated":
        shares = [1.0 if lag is None else lag / (lag + 1) for lag in one.lag]
        return one.behavior + torch.tensor(shares, dtype=now.dtype) * (now - one.behavior)
    return now if one.proximal is None or book.proximal == "current" else one.proximal


def _behavior(one: Trajectory, book: Textbook) -> Tensor:
    """Of fresh tokens the proximal policy, which is the same one."""
    proximal = _proximal(one, book)
    as_sampled = [book.correct_fresh or not fresh for fresh in one.fresh]
    return torch.where(torch.tensor(as_sampled), one.behavior, proximal)


def _log_ratio(one: Trajectory, book: Textbook) -> list[float]:
    return (_proximal(one, book) - _behavior(one, book)).tolist()


def _weights(log_ratio: list[float], book: Textbook) -> list[float]:
    ratios = [math.exp(d) for d in log_ratio]
    if book.correction == "none":
        return [1.0 for _ in ratios]
    if book.correction == "truncated":
        return [min(r, book.correction_cap) for r in ratios]
    if book.correction == "icepop":
        return [r if book.correction_floor <= r <= book.correction_cap else 0.0 for r in ratios]
    return ratios


def _norms(trajectories: Sequence[Trajectory], book: Textbook) -> list[list[float]]:
    lengths = [len(t.tokens) for t in trajectories]
    if book.normalizer == "unique_token":
        names = [[(t.tree, token) for token in t.tokens] for t in trajectories]
        mult: dict[Any, int] = {}
        for name in (name for row in names for name in row):
            mult[name] = mult.get(name, 0) + 1
        return [[1 / (mult[name] * len(mult)) for name in row] for row in names]
    each: dict[str | None, Callable[[int], float]] = {
        None: lambda n: 1.0,
        "token_mean": lambda n: 1 / sum(lengths),
        "sequence_mean": lambda n: 1 / (len(lengths) * n),
        "dr_grpo": lambda n: 1 / (len(lengths) * book.response_limit),
    }
    return [[each[book.normalizer](n)] * n for n in lengths]


def _surrogate(ratio: Tensor, advantage: Tensor, book: Textbook) -> Tensor:
    """PPO's, with a dual clip where the advantage is negative."""
    bounded = ratio.clamp(1 - book.clip_low, 1 + book.clip_high)
    value = torch.minimum(ratio * advantage, bounded * advantage)
    if book.dual_clip is not None and advantage < 0:
        value = torch.maximum(value, book.dual_clip * advantage)
    return value


def _gains(one: Trajectory, book: Textbook) -> list[Tensor]:
    anchored = book.anchor == "behavior" or book.loss == "dppo"
    anchor = _behavior(one, book) if anchored else _proximal(one, book)
    log_ratio, tokens = one.theta - anchor, range(len(one.tokens))
    if book.loss == "gspo":
        return [_surrogate(log_ratio.mean().exp(), one.advantage[t], book) for t in tokens]
    if book.loss == "gspo_segment":
        means = {
            level: torch.stack([log_ratio[t] for t in tokens if one.level[t] == level]).mean()
            for level in set(one.level)
        }
        return [_surrogate(means[one.level[t]].exp(), one.advantage[t], book) for t in tokens]
    return [_gain(one.theta[t], anchor[t], one.advantage[t], book) for t in tokens]


def _gain(theta: Tensor, anchor: Tensor, advantage: Tensor, book: Textbook) -> Tensor:
    ratio = (theta - anchor).exp()
    if book.loss == "reinforce":
        return advantage * theta
    if book.loss == "cispo":
        return ratio.clamp(1 - book.clip_low, 1 + book.clip_high).detach() * advantage * theta
    if book.loss == "dppo":
        change = (theta.exp() - anchor.exp()).item()
        too_far = change > book.tv_clip if advantage > 0 else change < -book.tv_clip
        return 0.0 * ratio if too_far else advantage * ratio
    return _surrogate(ratio, advantage, book)


def _divergence(one: Trajectory, t: int, estimator: str) -> Tensor:
    assert one.reference is not None
    d = one.reference[t] - one.theta[t]
    return {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[estimator]


def _spread(trajectories: Sequence[Trajectory], log_ratios: Sequence[list[float]]) -> float:
    """Standard deviation over all tokens that are not fresh, once for each trajectory; infinite without any."""
    stale = [
        d
        for one, row in zip(trajectories, log_ratios, strict=True)
        for d, fresh in zip(row, one.fresh, strict=True)
        if not fresh
    ]
    return float(np.std(stale)) if stale else math.inf


def _largest(log_ratios: Sequence[list[float]], tau: float) -> float:
    """The largest square that M2PO keeps, dropping the largest until the mean of the rest is at most `tau`."""
    squares = sorted(d * d for row in log_ratios for d in row)
    while squares and sum(squares) / len(squares) > tau:
        top = squares[-1]
        squares = [square for square in squares if square < top]
    return squares[-1] if squares else -1.0


def _left_out(
    name: str,
    one: Trajectory,
    log_ratio: list[float],
    book: Textbook,
    spread: float,
    largest: float,
) -> list[int]:
    """Places of the tokens that a mask leaves out."""
    everywhere = range(len(log_ratio))
    low = [t for t in everywhere if math.exp(log_ratio[t]) < book.mask_veto]
    if name == "m2po":
        # the very product that `_largest` compared: a power may differ in the last bit
        return [t for t in everywhere if log_ratio[t] * log_ratio[t] > largest]
    if name == "veto_token":
        return low
    if name == "veto_subtree":
        first = next((places[0] for places in one.segments() if set(places) & set(low)), None)
        return [] if first is None else list(range(first, len(log_ratio)))
    out: list[int] = []
    for places in one.segments():
        values = [log_ratio[t] for t in places]
        mean = sum(values) / len(values)
        lag = one.lag[places[0]] or 0
        keeps = {
            "geometric": abs(mean)
            <= book.mask_sigmas * spread / math.sqrt(len(values)) + book.mask_lag * lag,
            "window": book.mask_low <= math.exp(mean) <= book.mask_high,
            "k3": sum(math.exp(d) - 1 - d for d in values) / len(values) <= book.mask_k3,
            "veto_segment": not set(places) & set(low),
        }
        if not keeps[name]:
            out += places
    return out
