"""The whole update in float64: packed trees against Hugging Face and the textbook, one trajectory at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.learner.loss.test_objective import settings_of
from tests.learner.shares import share_of
from tests.oracle import exact, random_tree, tiny_qwen2
from tests.textbook import Textbook, textbook_loss, trajectories_of
from treepo_async.config.schema import LOSSES, NORMALIZERS
from treepo_async.learner.packing.pack import pack
from treepo_async.tree.levels import num_levels
from treepo_async.types import PolicyVersion

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

EXACT = 1e-10
VERSION, TEMPERATURE = PolicyVersion(1, 5), 0.75
BOOK = Textbook(
    dual_clip=1.5,
    kl_coef=0.1,
    entropy_coef=0.05,
    correction_cap=1.3,
    masks=("veto_segment",),
    mask_veto=0.3,
)
"""Everything at once; losses without a dual clip do not read it."""


def near(rng, values, spread):
    """Log-probs not far from others; float32, as they travel."""
    return [
        tuple((v + spread * rng.normal(size=len(v))).astype(np.float32) for v in of_tree)
        for of_tree in values
    ]


class Case:
    """A batch with dropped and fractional trajectories, on a model in float64."""

    def __init__(self, folder, *, seed=3, tied=False):
        rng = np.random.default_rng(seed)
        self.trees = [
            random_tree(rng, temperature=TEMPERATURE, nan_share=0.2, forks_on_grid=True)
            for _ in range(3)
        ]
        shapes = [(len(tree.leaves), num_levels(tree)) for tree in self.trees]
        self.advantages = [
            np.where(np.isnan(tree.rewards_L)[:, None], np.nan, rng.normal(size=shape))
            for tree, shape in zip(self.trees, shapes, strict=True)
        ]
        self.scales = [rng.choice([0.25, 1.0], len(tree.leaves)) for tree in self.trees]
        self.model = tiny_qwen2(tied=tied)
        self.model.save_pretrained(folder)
        self.folder, self.model = folder, exact(self.model)
        self.paths = {
            (t, leaf): self.path(t, leaf)
            for t, tree in enumerate(self.trees)
            for leaf in range(len(tree.leaves))
        }
        now = self.by_segment({key: self.run(*key)[0].detach().numpy() for key in self.paths})
        self.trees = [
            replace(
                tree,
                segments=tuple(
                    replace(s, behavior_logprobs=np.minimum(values, 0.0).astype(np.float32))
                    for s, values in zip(tree.segments, of_tree, strict=True)
                ),
            )
            for tree, of_tree in zip(self.trees, near(rng, now, 0.4), strict=True)
        ]
        self.proximal, self.reference = near(rng, now, 0.3), near(rng, now, 0.5)

    def path(self, t, leaf):
        tree = self.trees[t]
        return [tree.segments[i].token_ids for i in tree.path(tree.leaves[leaf])]

    def run(self, t, leaf):
        """Log-probs and entropies of a trajectory under ordinary causal attention, [T] each."""
        prompt = self.trees[t].prompt.token_ids
        ids = torch.as_tensor(np.concatenate([prompt, *self.paths[t, leaf]]).astype(np.int64))
        logits = self.model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        spread = torch.distributions.Categorical(logits=logits / TEMPERATURE)
        return spread.log_prob(ids[len(prompt) :]), spread.entropy()

    def by_segment(self, values):
        found = [[np.empty(0)] * len(tree.segments) for tree in self.trees]
        for (t, leaf), row in values.items():
            tree, rest = self.trees[t], row
            for i in tree.path(tree.leaves[leaf]):
                found[t][i], rest = np.split(rest, [len(tree.segments[i])])
        return found

    def expected(self, book):
        """Loss, and the gradient of every Hugging Face weight."""
        runs = {key: self.run(*key) for key in self.paths}
        trajectories = trajectories_of(
            self.trees,
            self.advantages,
            lambda t, leaf: runs[t, leaf][0],
            version=VERSION,
            proximal=self.proximal,
            reference=self.reference,
            entropy=lambda t, leaf: runs[t, leaf][1],
            scales=self.scales,
        )
        self.model.zero_grad()
        loss = textbook_loss(trajectories, book)
        loss.backward()
        return loss.item(), {name: w.grad for name, w in self.model.named_parameters()}

    def share(self, book, **division):
        """What is trained: weights of the normalizer times those of the trajectories."""
        share = share_of(
            self.trees,
            self.advantages,
            proximal=self.proximal,
            reference=self.reference,
            normalizer=book.normalizer,
            **division,
        )
        weights = [
            w * (scale if w.ndim == 1 else scale[:, None])
            for w, scale in zip(share.weights, self.scales, strict=True)
        ]
        return replace(share, weights=tuple(weights))

    def found(self, book, *, share=None, attention="dense"):
        from treepo_async.learner.build import build_learner
        from treepo_async.learner.model.hf import export
        from treepo_async.learner.optimizer import OptimizerSettings

        learner = build_learner(
            self.folder,
            optimizer=OptimizerSettings(learning_rate=1e-9, max_grad_norm=0.0),
            loss=settings_of(book),
            microbatch_tokens=10**6,
            seed=0,
            dtype=torch.float64,
            attention=attention,
        )
        share = share or self.share(book, budget_tokens=60)
        result = learner.train(share, version=VERSION)
        gradients = export(learner.model, learner.shape, lambda weight: weight.main_grad)
        return result, {name: g.clone() for name, g in gradients}

    def errors(self, book, **how):
        """Relative error of the loss and of the worst gradient, and the result."""
        result, gradients = self.found(book, **how)
        loss, wanted = self.expected(book)
        wanted = {name: wanted[name] for name in gradients}
        worst = max(float((gradients[n] - w).norm() / w.norm()) for n, w in wanted.items())
        return abs(result.loss / loss - 1), worst, result


@pytest.fixture(scope="module", params=["untied", "tied"])
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp("exact"), tied=request.param == "tied")


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_every_gradient_are_those_of_separate_trajectories(case, loss, normalizer):
    book = replace(BOOK, loss=loss, normalizer=normalizer)
    loss_error, gradient_error, result = case.errors(book)
    assert loss_error < EXACT
    assert gradient_error < EXACT
    assert result.num_microbatches > 1
    assert 0 < result.masked_share < 0.9


@pytest.mark.parametrize("attention", ["dense", "cascade"])
def test_so_they_are_with_every_attention_that_a_cpu_has(case, attention):
    errors = case.errors(BOOK, attention=attention)
    assert max(errors[:2]) < EXACT


def test_a_part_of_the_tokens_is_clipped_and_capped(case):
    result, _ = case.found(replace(BOOK, masks=()))
    assert 0.05 < result.clipped_share < 0.95
    assert 0.05 < result.correction_capped_share < 0.95


def test_control_positions_by_packed_index_are_another_model(case, monkeypatch):
    from treepo_async.learner import step

    def pack_by_index(*args):
        return [replace(batch, position_ids=np.arange(batch.num_tokens)) for batch in pack(*args)]

    monkeypatch.setattr(step, "pack", pack_by_index)
    assert case.errors(BOOK)[1] > 1e-2


def test_control_rolled_labels_are_another_loss(case, monkeypatch):
    from treepo_async.learner import step

    def pack_rolled(*args):
        return [replace(batch, target=batch.prev + 1) for batch in pack(*args)]

    monkeypatch.setattr(step, "pack", pack_rolled)
    assert case.errors(BOOK)[1] > 1e-2


def test_control_summed_advantages_are_another_loss(case, monkeypatch):
    from treepo_async.learner import step

    def pack_summed(*args):
        return [
            replace(
                batch,
                positive=np.maximum(batch.positive - batch.negative, 0),
                negative=np.maximum(batch.negative - batch.positive, 0),
            )
            for batch in pack(*args)
        ]

    monkeypatch.setattr(step, "pack", pack_summed)
    assert case.errors(BOOK)[1] > 1e-3


def test_control_a_normalizer_per_microbatch_is_another_loss(case):
    share = case.share(BOOK, budget_tokens=60)
    own = {}
    for pieces in share.microbatches:
        leaves = [(p.tree, leaf) for p in pieces for leaf in p.leaves]
        tokens = sum(share.trees[t].num_tokens_L[leaf] for t, leaf in leaves)
        own |= {key: 1 / (len(share.microbatches) * tokens) for key in leaves}
    weights = [
        np.array([own.get((t, leaf), 0.0) for leaf in range(len(tree.leaves))]) * scale
        for t, (tree, scale) in enumerate(zip(share.trees, case.scales, strict=True))
    ]
    assert case.errors(BOOK, share=replace(share, weights=tuple(weights)))[1] > 1e-3
