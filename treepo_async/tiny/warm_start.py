"""The supervised warm start: a few minutes of CPU after which a model answers some of its problems.

Called by `cache.prepare`, which also keeps the result. The same recipe, architecture and seed give the same
weights on the same machine.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy

from treepo_async.tiny.built_in import BuiltIn
from treepo_async.tiny.model import TinyQwen2
from treepo_async.tiny.recipe import Architecture, Recipe
from treepo_async.tiny.task import Task
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID, build_tokenizer

Report = Callable[[int, int, float], None]
"""Called after every step with the step (from 1), the number of steps and the step's loss."""

_NUM_LAST_STEPS = 50
"""Steps over which the final loss is averaged; one batch alone is too noisy to compare."""


@dataclass(frozen=True, slots=True)
class _Example:
    token_ids: list[int]
    num_prompt_tokens: int


def warm_start(
    built_in: BuiltIn, architecture: Architecture, seed: int, report: Report | None
) -> tuple[TinyQwen2, float]:
    """Train a fresh model on demonstrations of a built-in task.

    Returns:
        The model and its final loss in nats per response token.
    """
    recipe = built_in.recipe
    with _threads(recipe.num_threads):
        model = TinyQwen2(architecture, seed)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            weight_decay=recipe.weight_decay,
        )
        batches = _batches(_examples(built_in.task, recipe, seed), recipe, random.Random(seed))
        losses = []
        for step in range(1, recipe.num_steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            losses.append(_step(model, optimizer, next(batches), recipe.max_grad_norm))
            if report is not None:
                report(step, recipe.num_steps, losses[-1])
    return model, fmean(losses[-_NUM_LAST_STEPS:])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up times a cosine from 1 down to the floor, at step 1..num_steps."""
    floor = recipe.min_learning_rate_ratio
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
    warmup = min(1.0, step / recipe.num_warmup_steps)
    return recipe.learning_rate * warmup * (floor + (1 - floor) * cosine)


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _examples(task: Task, recipe: Recipe, seed: int) -> list[_Example]:
    demonstrations = [
        task.demonstration(seed, index, p_hurried=recipe.p_hurried, p_slip=recipe.p_slip)
        for index in range(recipe.num_demonstrations)
    ]
    tokenizer = build_tokenizer()
    prompts = tokenizer.encode_batch([d.problem.question + "\n" for d in demonstrations])
    responses = tokenizer.encode_batch([d.response for d in demonstrations])
    return [
        _Example([*prompt.ids, *response.ids, EOS_TOKEN_ID], len(prompt.ids))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _batches(
    examples: list[_Example], recipe: Recipe, rng: random.Random
) -> Iterator[list[_Example]]:
    """Endless batches of rows of like length, in random order."""
    num_drawn = min(len(examples), recipe.batch_size * recipe.batches_per_bucket)
    while True:
        bucket = sorted(rng.sample(examples, num_drawn), key=lambda e: len(e.token_ids))
        starts = list(range(0, num_drawn, recipe.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield bucket[start : start + recipe.batch_size]


def _collate(batch: list[_Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and the mask of response tokens, both [rows, T]."""
    num_tokens = max(len(e.token_ids) for e in batch)
    token_ids = torch.full((len(batch), num_tokens), EOS_TOKEN_ID)
    is_response = torch.zeros(len(batch), num_tokens, dtype=torch.bool)
    for row, example in enumerate(batch):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        is_response[row, example.num_prompt_tokens : len(example.token_ids)] = True
    return token_ids, is_response


def _step(
    model: TinyQwen2,
    optimizer: torch.optim.Optimizer,
    batch: list[_Example],
    max_grad_norm: float,
) -> float:
    """One update on the response tokens of a batch; returns its loss before the update."""
    token_ids, is_response = _collate(batch)
    # padding stands at the right, where the causal mask already hides it
    hidden = model.hidden(token_ids[:, :-1])
    trained = is_response[:, 1:]
    loss = cross_entropy(model.logits(hidden[trained]), token_ids[:, 1:][trained])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.item()
