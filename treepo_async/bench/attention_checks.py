"""What a backend of tree attention must show on a machine: that it is exact, and that its memory grows with the tokens.

Neighbours: `attention` is the command; `learner.attention.plan` has the backends. Needs torch and numpy alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from treepo_async.bench.forests import random_end, regular_end
from treepo_async.bench.peak import peak_bytes
from treepo_async.learner.attention.dense import DensePlan
from treepo_async.learner.attention.plan import Plan, resolve

ALLOWED = 4.0
"""How many times the error of dense attention in the same precision a backend may have."""
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative errors that are always allowed: dense attention may by chance be nearer."""
GROWTH = 1.25
"""How many times faster than the tokens memory may grow; quadratic memory grows as many times faster as the tokens do."""
GRADIENTS = ("output", "query gradient", "key gradient", "value gradient")


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, key-value heads and their dimension."""

    queries: int
    keys: int
    dim: int


@dataclass(frozen=True, slots=True)
class Exactness:
    """The largest errors of one forest, each relative to the largest value, or to 1 where all are smaller."""

    tokens: int
    longest_segment: int
    heads: str
    dtype: str
    quantity: str
    error: float
    dense_error: float
    """Of dense attention in the same precision."""
    passed: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """One forward and backward pass."""

    tokens: int
    pairs: int
    """Visible ones."""
    peak_mib: float
    """Above what the inputs take."""
    bytes_per_token: float
    first_s: float
    """The first pass of this length, compilation included."""
    forward_s: float
    backward_s: float
    teraflops: float
    """Of visible pairs, forward and backward, a second."""


def exactness(
    build: Callable[[Tensor], Plan],
    *,
    device: str,
    heads: Heads,
    dtype: torch.dtype,
    tokens: Sequence[int],
    segments: Sequence[int],
    seed: int = 0,
) -> Iterator[Exactness]:
    """Compare a backend with dense attention in float64.

    Args:
        build: from `attention.plan.planner`.
        device: to compute on.
        heads: of queries, keys and values.
        dtype: of the backend.
        tokens: T of each forest.
        segments: longest segment of each.
        seed: of everything random.
    """
    for num_tokens in tokens:
        for longest in segments:
            rng = np.random.default_rng([seed, num_tokens, longest])
            end = torch.from_numpy(random_end(rng, num_tokens, longest=longest)).to(device)
            inputs = _inputs(num_tokens, heads, dtype, device)
            expected = _pass(DensePlan(end), [t.double() for t in inputs])
            dense = _errors(_pass(DensePlan(end), inputs), expected)
            found = _errors(_pass(build(end), inputs), expected)
            for quantity, error, dense_error in zip(GRADIENTS, found, dense, strict=True):
                yield Exactness(
                    num_tokens,
                    longest,
                    f"{heads.queries}/{heads.keys} x {heads.dim}",
                    str(dtype).removeprefix("torch."),
                    quantity,
                    error,
                    dense_error,
                    passed=error <= max(ALLOWED * dense_error, FLOOR[dtype]),
                )


def memory(
    build: Callable[[Tensor], Plan],
    *,
    align: int,
    device: str,
    heads: Heads,
    dtype: torch.dtype,
    tokens: Sequence[int],
) -> Iterator[Memory]:
    """Measure a tree of 16 trajectories that forks at every second level, at growing numbers of tokens.

    Args:
        build: from `attention.plan.planner`.
        align: what the tokens are made a multiple of.
        device: to compute on.
        heads: of queries, keys and values.
        dtype: of the backend.
        tokens: T at most, ascending.
    """
    for most in tokens:
        segment = most // 44  # tokens: a prompt of two segments, and 42 segments on 7 levels
        end = regular_end(prompt=2 * segment, segment=segment, depth=7, forks=(0, 2, 4, 6))
        aligned = len(end) // align * align
        end = np.minimum(end[:aligned], aligned).astype(np.int32)
        pairs = int((end - np.arange(aligned, dtype=np.int64)).sum())
        place = torch.from_numpy(end).to(device)
        inputs = _inputs(aligned, heads, dtype, device)
        begin = time.perf_counter()
        _pass(build(place), inputs)
        _wait(device)
        first_s = time.perf_counter() - begin
        # not of the first pass: compilation takes memory of its own
        peak = peak_bytes(partial(_planned, build, place, inputs))
        forward_s, backward_s = _seconds(build(place), inputs, device)
        flops = 3.5 * 4 * pairs * heads.queries * heads.dim
        yield Memory(
            aligned,
            pairs,
            peak_mib=peak / 2**20,
            bytes_per_token=peak / aligned,
            first_s=first_s,
            forward_s=forward_s,
            backward_s=backward_s,
            teraflops=flops / (forward_s + backward_s) / 1e12,
        )


def grows_linearly(rows: Sequence[Memory], smallest: int) -> bool:
    """Whether memory a token stays where it is from the smallest judged number of tokens to the largest.

    Fewer than two lengths to judge, or a peak of nothing, is no answer and does not pass.

    Args:
        rows: by ascending tokens.
        smallest: tokens from which growth is judged.
    """
    judged = [row.bytes_per_token for row in rows if row.tokens >= smallest]
    return len(judged) > 1 and min(judged) > 0 and judged[-1] <= GROWTH * judged[0]


def describe(backend: str, device: str) -> dict[str, str]:
    """What was checked, and on what."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"backend": resolve(backend), "device": name, "torch": torch.__version__}


def _inputs(num_tokens: int, heads: Heads, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Query, key and value, [1, heads, T, D] as Megatron's axes make them."""
    generator = torch.Generator(device).manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, 1, number, heads.dim, generator=generator, device=device)
        .to(dtype)
        .permute(1, 2, 0, 3)
        for number in (heads.queries, heads.keys, heads.keys)
    ]


def _pass(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, and gradients of a fixed weighted sum of it."""
    query, key, value = leaves = [t.detach().requires_grad_() for t in inputs]
    out = plan(query, key, value, query.shape[-1] ** -0.5)
    weight = torch.linspace(-1.0, 1.0, out.shape[2], device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, weight[None, None, :, None].expand_as(out))
    return [out.detach(), *grads]


def _planned(build: Callable[[Tensor], Plan], end: Tensor, inputs: Sequence[Tensor]) -> None:
    """A pass with the plan made for it."""
    _pass(build(end), inputs)


def _errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [
        ((f.double() - e).abs().max() / e.abs().max().clamp_min(1.0)).item()
        for f, e in zip(found, expected, strict=True)
    ]


def _seconds(plan: Plan, inputs: Sequence[Tensor], device: str) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    query, key, value = leaves = [t.detach().requires_grad_() for t in inputs]
    _wait(device)
    begin = time.perf_counter()
    out = plan(query, key, value, query.shape[-1] ** -0.5)
    _wait(device)
    middle = time.perf_counter()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    _wait(device)
    return middle - begin, time.perf_counter() - middle


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
