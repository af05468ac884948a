import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import MODEL
from tests.learner.ranks import Ranks
from treepo_async.cluster.memory import (
    GIB,
    EngineMemory,
    RankMemory,
    Work,
    head_bytes,
    model_parameters,
    rank_parameters,
    saved_of_stage,
)
from treepo_async.cluster.model_files import SHIPPED_DIR
from treepo_async.config.layout import Layout
from treepo_async.learner.shape import ModelShape

QWEN2 = ModelShape.from_config(MODEL | {"num_key_value_heads": 2, "tie_word_embeddings": False})
T = 64
"""Tokens of the microbatch that is measured."""
LAYOUTS = ("tp1", "tp2", "pp2", "tp2pp2", "tp4")
SAVED = [
    (layout, dtype, recompute)
    for layout in ("tp1", "tp2", "pp2", "tp4")
    for dtype in ("float32", "bfloat16")
    for recompute in ("none", "selective", "full")
]


def shape_of(name):
    return ModelShape.from_config(json.loads((SHIPPED_DIR / name / "config.json").read_text()))


@pytest.mark.parametrize(
    ("name", "number"),
    [("Qwen/Qwen2.5-7B", 7_615_616_512), ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768)],
)
def test_the_shipped_models_have_their_known_numbers_of_parameters(name, number):
    assert model_parameters(shape_of(name)) == number


def hf_config(family, **sizes):
    import transformers

    return getattr(transformers, f"{family}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        architectures=[f"{family}ForCausalLM"],
        **sizes,
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Llama", {})],
    ids=["qwen2", "qwen3", "llama"],
)
def test_a_model_has_as_many_parameters_as_transformers_builds(family, sizes, tied):
    import torch
    import transformers

    config = hf_config(family, tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    shape = ModelShape.from_config(config.to_dict())
    assert model_parameters(shape) == model.num_parameters()
    assert model_parameters(replace(shape, tied=not tied)) != model.num_parameters()


@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    tied=st.booleans(),
    qk_norm=st.booleans(),
)
def test_ranks_have_the_model_and_what_is_kept_more_than_once(tp, pp, tied, qk_norm):
    shape = replace(QWEN2, tied=tied, qk_norm=qk_norm)
    layout = Layout(tp=tp, pp=pp)
    norms = shape.num_layers * (2 * shape.hidden_size + 2 * shape.head_dim * qk_norm)
    copies = (tp - 1) * (norms + shape.hidden_size)
    copies += shape.vocab_size * shape.hidden_size if tied and pp > 1 else 0
    total = sum(tp * rank_parameters(shape, layout, stage) for stage in range(pp))
    assert total == model_parameters(shape) + copies


def test_a_rank_holds_18_bytes_a_parameter_in_bfloat16_and_16_in_float32():
    for dtype, each in (("bfloat16", (2, 4, 12)), ("float32", (4, 4, 8))):
        work = Work(Layout(), dtype, T, "none", 16)
        rank = RankMemory.of(QWEN2, work, 0)
        number = rank.num_parameters
        assert (rank.weights, rank.gradients, rank.optimizer) == tuple(number * n for n in each)
        assert rank.reference == 0
        assert RankMemory.of(QWEN2, replace(work, with_reference=True), 0).reference == rank.weights


@pytest.mark.parametrize(
    ("tokens", "on_gpu", "peak_is_update"), [(8, True, True), (T, True, False), (8, False, False)]
)
def test_the_peak_is_that_of_a_microbatch_or_on_a_gpu_that_of_the_update(
    tokens, on_gpu, peak_is_update
):
    rank = RankMemory.of(QWEN2, Work(Layout(), "bfloat16", tokens, "none", 16, on_gpu=on_gpu), 0)
    held = rank.weights + rank.gradients + rank.optimizer
    passing = rank.activations + rank.working
    assert rank.update == (4 * rank.num_parameters if on_gpu else 0)
    assert rank.total == held + (rank.update if peak_is_update else passing)
    assert (rank.update > passing) is peak_is_update


def test_earlier_stages_keep_the_activations_of_more_microbatches():
    work = Work(Layout(pp=2), "bfloat16", T, "full", 16)
    first, last = (RankMemory.of(QWEN2, work, stage) for stage in range(2))
    assert first.activations == 2 * saved_of_stage(QWEN2, work, 0)
    assert last.activations == saved_of_stage(QWEN2, work, 1)


def test_recompute_sequence_parallelism_and_smaller_chunks_save_memory():
    work = Work(Layout(tp=2), "bfloat16", T, "none", 16, dense_mask=True)
    saved = [
        saved_of_stage(QWEN2, replace(work, recompute=name), 0)
        for name in ("none", "selective", "full")
    ]
    assert saved[0] > saved[1] > saved[2]
    assert saved_of_stage(QWEN2, replace(work, sequence_parallel=False), 0) > saved[0]
    assert saved_of_stage(QWEN2, replace(work, dense_mask=False), 0) < saved[0]
    assert head_bytes(QWEN2, replace(work, head_tokens=8)) < head_bytes(QWEN2, work)
    assert head_bytes(QWEN2, work) < head_bytes(QWEN2, replace(work, entropy_gradient=True))


def test_an_engine_of_7b_keeps_56_kib_a_token():
    engine = EngineMemory.of(
        shape_of("Qwen/Qwen2.5-7B"),
        dtype="bfloat16",
        prefill_chunk_tokens=8192,
        device_bytes=80 * GIB,
    )
    assert engine.kv_bytes_per_token == 56 * 1024
    assert engine.weights == 2 * 7_615_616_512
    fit = engine.tokens_that_fit(80 * GIB)
    used = engine.weights + engine.reserved + fit * engine.kv_bytes_per_token
    assert 80 * GIB - engine.kv_bytes_per_token < used <= 80 * GIB
    assert engine.tokens_that_fit(16 * GIB) < 0


@dataclass(frozen=True)
class Case:
    """A layout in which every rank counts what it has."""

    layout: Layout
    folder: Path


def measure(case):
    """What each rank does: count its parameters, and the bytes that one forward pass saves."""
    import torch
    import torch.distributed as dist

    from treepo_async.learner.mcore import parallel_state
    from treepo_async.learner.model.gpt import ModelSettings, build_model

    stage = parallel_state.get_pipeline_model_parallel_rank()
    found = {}
    for shape_name, shape in SHAPES.items():
        model = build_model(shape, ModelSettings(attention="dense"))
        found[f"parameters {shape_name}"] = sum(p.numel() for p in model.parameters())
    for layout, dtype, recompute in SAVED:
        if layout != str(case.layout):
            continue
        settings = ModelSettings(
            dtype=getattr(torch, dtype), recompute=recompute, attention="dense", head_tokens=16
        )
        found[f"saved {dtype} {recompute}"] = saved_by(
            build_model(QWEN2, settings), stage, QWEN2, getattr(torch, dtype)
        )
    name = f"{case.layout}-{stage}-{parallel_state.get_tensor_model_parallel_rank()}"
    (case.folder / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()


def saved_by(model, stage, shape, dtype):
    """Bytes of the distinct storages that autograd saves in a forward pass, weights left out."""
    import numpy as np
    import torch

    from treepo_async.learner.mcore import parallel_state

    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # the tensor is kept alive, so that no address is used twice
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    if stage > 0:
        tp = parallel_state.get_tensor_model_parallel_world_size()
        rows = T // tp
        hidden = torch.zeros(rows, 1, shape.hidden_size, dtype=dtype, requires_grad=True)
        unwrapped = model
        while not hasattr(unwrapped, "set_input_tensor"):
            unwrapped = unwrapped.module
        unwrapped.set_input_tensor(hidden)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            input_ids=torch.from_numpy(np.arange(T) % shape.vocab_size)[None],
            position_ids=torch.arange(T)[None],
            attention_mask=torch.full((1, 1, 1, T), T, dtype=torch.int32),
            edges=every_token() if parallel_state.is_pipeline_last_stage() else None,
        )
    return sum(size for size, _ in seen.values())


def every_token():
    """All tokens but the first are trained; nothing else of `Edges` is read by the model."""
    from dataclasses import fields

    import torch

    from treepo_async.learner.packing.edges import Edges

    values = dict.fromkeys(field.name for field in fields(Edges))
    values["prev"] = torch.arange(T - 1)
    values["label"] = torch.zeros(T - 1, dtype=torch.int64)
    values["temperature"] = torch.ones(T - 1)
    return Edges(**values)


SHAPES = {
    "untied": QWEN2,
    "tied": replace(QWEN2, tied=True),
    "qwen3": replace(QWEN2, qkv_bias=False, qk_norm=True, head_dim=32),
    "llama": replace(QWEN2, qkv_bias=False),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    cases = [Case(Layout.parse(layout), folder) for layout in LAYOUTS]
    Ranks(measure, cases, deadline_s=120).wait()
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.engine
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("text", LAYOUTS)
def test_every_rank_has_as_many_parameters_as_megatron_gives_it(measured, text, name):
    layout = Layout.parse(text)
    for stage in range(layout.pp):
        expected = rank_parameters(SHAPES[name], layout, stage)
        for rank in range(layout.tp):
            assert measured[f"{text}-{stage}-{rank}"][f"parameters {name}"] == expected


@pytest.mark.engine
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("text", "dtype", "recompute"), SAVED)
def test_the_estimate_of_activations_is_within_5_percent_of_what_autograd_saves(
    measured, text, dtype, recompute
):
    layout = Layout.parse(text)
    work = Work(layout, dtype, T, recompute, 16, dense_mask=True, on_gpu=False)
    for stage in range(layout.pp):
        found = measured[f"{text}-{stage}-0"][f"saved {dtype} {recompute}"]
        assert saved_of_stage(QWEN2, work, stage) == pytest.approx(found, rel=0.05)
        other = {"none": "full", "selective": "full", "full": "none"}[recompute]
        wrong = saved_of_stage(QWEN2, replace(work, recompute=other), stage)
        assert wrong != pytest.approx(found, rel=0.05)
