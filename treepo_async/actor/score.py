"""From grown segments to a scored tree: text is made here, for the scorer only."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from treepo_async.scoring.registry import Scorer, reward, score
from treepo_async.types import Prompt, Provenance, Sampling, Segment, Trajectory, Tree, leaves_of


def score_tree(
    prompt: Prompt,
    segments: tuple[Segment, ...],
    provenance: Provenance,
    sampling: Sampling,
    *,
    scorer: Scorer,
    decode: Callable[[Sequence[int]], str],
    correct: float,
    wrong: float,
) -> Tree:
    """Score every leaf; one whose scorer fails gets NaN.

    Args:
        prompt: the problem.
        segments: in creation order.
        provenance: of the tree.
        sampling: of the tree.
        scorer: response and answer to accuracy.
        decode: tokens to text.
        correct: reward of accuracy 1.
        wrong: reward of accuracy 0.
    """
    unscored = Tree(prompt, segments, _none(segments), _none(segments), sampling, provenance)
    accuracies = []
    for leaf in range(len(unscored.leaves)):
        response = decode(Trajectory(unscored, leaf).token_ids.tolist())
        accuracies.append(score(scorer, response, prompt.answer))
    rewards = [reward(accuracy, correct, wrong) for accuracy in accuracies]
    tree = Tree(
        prompt,
        segments,
        np.array(rewards, dtype=np.float32),
        np.array(accuracies, dtype=np.float32),
        sampling,
        provenance,
    )
    tree.check()
    return tree


def shuffled(tree: Tree, rng: random.Random) -> Tree:
    """The tree with its scores permuted among its leaves: the control that has nothing to learn from.

    A leaf gets the reward and the accuracy of one other leaf, or its own, a failed score's NaNs included.
    """
    order = rng.sample(range(len(tree.leaves)), len(tree.leaves))
    return replace(tree, rewards_L=tree.rewards_L[order], accuracies_L=tree.accuracies_L[order])


def _none(segments: tuple[Segment, ...]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.full(len(leaves_of(segments)), np.nan, dtype=np.float32)
