"""The packed model's output: only trained tokens reach the output layer, a chunk at a time, on one rank and on several."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import Ranks
from tests.oracle import exact, random_tree, tiny_model
from treepo_async.config.layout import Layout
from treepo_async.learner.packing.pack import pack
from treepo_async.learner.packing.piece import Piece

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

SIZES = {"num_heads": 8, "num_kv_heads": 2}
"""Fewer key-value heads than four tensor-parallel ranks."""


def microbatch(align):
    """Two trees, padding, and weights for a loss of log-probs and entropies."""
    rng = np.random.default_rng(8)
    trees = [random_tree(rng, temperature=0.7), random_tree(rng, temperature=1.3)]
    ones = [np.ones(len(tree.leaves)) for tree in trees]
    pieces = [Piece(i, tuple(range(len(tree.leaves)))) for i, tree in enumerate(trees)]
    (batch,) = pack(trees, ones, ones, [pieces], align)
    return batch, torch.from_numpy(rng.normal(size=(2, batch.num_trained_tokens)))


def edges_of(batch, dtype=torch.float64):
    from treepo_async.learner.packing.edges import Edges

    return Edges.of(batch, torch.device("cpu"), dtype=dtype)


def run(model, batch, edges):
    return model(
        input_ids=torch.from_numpy(batch.input_ids)[None],
        position_ids=torch.from_numpy(batch.position_ids)[None],
        attention_mask=torch.from_numpy(batch.end)[None, None, None],
        edges=edges,
    )


def build(theirs, **settings):
    from tests.learner.test_families import ours

    return ours(theirs, dtype=torch.float64, with_entropy_gradient=True, **settings)


def gradients_of(model):
    return {name: weight.main_grad.clone() for name, weight in model.named_parameters()}


def count_rows(model):
    """Rows of each call of the output layer, as a list that grows."""
    rows = []
    model.module.output_layer.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    return rows


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("head_tokens", [1, 7])
def test_chunks_give_what_the_whole_gives_and_see_each_token_once_a_pass(head_tokens, tied):
    theirs, (batch, weights) = tiny_model("qwen2", tied=tied), microbatch(1)
    outputs, gradients, num_tokens = [], [], batch.num_trained_tokens
    for size in (num_tokens, head_tokens):
        model = build(theirs, head_tokens=size)
        rows, output = count_rows(model), run(model, batch, edges_of(batch))
        assert max(rows) <= size
        assert sum(rows) == num_tokens < batch.num_tokens
        (output * weights).sum().backward()
        is_chunked = size < num_tokens
        assert sum(rows) == num_tokens * (1 + is_chunked)
        assert max(rows) <= size
        outputs.append(output)
        gradients.append(gradients_of(model))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=0, atol=1e-12)
        assert float(gradient.abs().max()) > 1e-3


@pytest.mark.usefixtures("groups")
def test_without_gradients_nothing_is_computed_twice():
    batch, _ = microbatch(1)
    model = build(tiny_model("qwen2", tied=False), head_tokens=5)
    rows = count_rows(model)
    with torch.no_grad():
        run(model, batch, edges_of(batch))
    assert sum(rows) == batch.num_trained_tokens


@pytest.mark.usefixtures("groups")
def test_a_microbatch_without_trained_tokens_has_a_gradient_of_zero():
    from treepo_async.learner.packing.pack import empty_batch

    model, batch = build(tiny_model("qwen2", tied=False)), empty_batch(4)
    output = run(model, batch, edges_of(batch))
    assert output.shape == (2, 0)
    output.sum().backward()
    assert all(not gradient.any() for gradient in gradients_of(model).values())


@pytest.mark.usefixtures("groups")
def test_megatron_makes_no_rotary_table_and_the_frequencies_stay_exact():
    from tests.learner.test_families import ours

    theirs = tiny_model("qwen2", tied=False)
    model = ours(theirs, dtype=torch.bfloat16).module.module
    assert not hasattr(model, "rotary_pos_emb")
    assert model.inverse_frequency.dtype is torch.float32


@dataclass(frozen=True)
class Case:
    """A whole family of splits of one model."""

    layout: Layout
    family: str
    tied: bool
    folder: Path
    sequence_parallel: bool = True
    spoil: str = ""

    @property
    def name(self):
        kind = "tied" if self.tied else "untied"
        how = "sp" if self.sequence_parallel else "whole"
        return f"{self.layout}-{self.family}-{kind}-{how}{self.spoil}"


def cases(folder):
    for layout in map(Layout.parse, ("tp2", "tp4")):
        for family in ("qwen2", "qwen3"):
            yield Case(layout, family, False, folder)
            yield Case(layout, family, True, folder, sequence_parallel=False)
    yield Case(Layout.parse("tp2"), "qwen2", True, folder)
    yield Case(Layout.parse("tp2"), "qwen2", False, folder, spoil="-gradient-not-added-up")


def output_and_gradients(case):
    """What each rank does; rank 0 writes."""
    from tests.learner.test_families import shape_of
    from treepo_async.learner.mcore import finalize_model_grads, tensor_parallel
    from treepo_async.learner.model.hf import export

    theirs = tiny_model(case.family, tied=case.tied, **SIZES)
    model = build(theirs, sequence_parallel=case.sequence_parallel, head_tokens=7)
    batch, weights = microbatch(case.layout.tp)
    if case.spoil:
        gather = tensor_parallel.gather_from_sequence_parallel_region
        tensor_parallel.gather_from_sequence_parallel_region = lambda hidden: gather(hidden, False)
    output = run(model, batch, edges_of(batch))
    if case.spoil:
        tensor_parallel.gather_from_sequence_parallel_region = gather
    (output * weights).sum().backward()
    finalize_model_grads([model])
    gradients = dict(export(model, shape_of(theirs), lambda weight: weight.main_grad))
    if gradients:
        written = {name: gradient.clone() for name, gradient in gradients.items()}
        save_file(written | {"output": output.detach()}, case.folder / f"{case.name}.safetensors")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Folder with what each case wrote."""
    folder = tmp_path_factory.mktemp("split")
    Ranks(output_and_gradients, list(cases(folder)), deadline_s=100).wait()
    return folder


def reference(case):
    """Hugging Face's values and gradients, each trained token from a path through it."""
    from tests.learner.model.test_head import expected

    theirs = exact(tiny_model(case.family, tied=case.tied, **SIZES))
    batch, weights = microbatch(1)
    edges = edges_of(batch)
    seen = np.tril(np.arange(len(batch.end))[:, None] < batch.end[None, :])
    rows = []
    for q in batch.prev.tolist():
        path = torch.from_numpy(batch.input_ids[np.flatnonzero(seen[q])])
        rows.append(theirs(path[None], use_cache=False).logits[0, -1])
    output = expected(torch.stack(rows), edges.label, edges.temperature)
    (output * weights).sum().backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    return gradients | {"output": output.detach()}


@pytest.mark.parametrize("case", [c for c in cases(Path()) if not c.spoil], ids=lambda c: c.name)
def test_ranks_together_give_hugging_faces_values_and_gradients_in_float64(split, case):
    found, wanted = load_file(split / f"{case.name}.safetensors"), reference(case)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-9), name


def test_control_a_gradient_that_is_not_added_up_over_ranks_is_another(split):
    (case,) = (c for c in cases(Path()) if c.spoil)
    found, wanted = load_file(split / f"{case.name}.safetensors"), reference(case)
    assert torch.allclose(found["output"], wanted["output"], rtol=0, atol=1e-9)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[name], wanted[name], rtol=0, atol=1e-2)
