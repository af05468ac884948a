"""What a GPU is checked by, where a CPU can show it: what passes and, above all, what does not."""

import math

import numpy as np
import pytest

from treepo_async.bench import weight_path
from treepo_async.bench.cells import Stop
from treepo_async.bench.device_step import ALLOWED, compare
from treepo_async.bench.learner_profile import WAITING, Kernel, by_kind, kind_of
from treepo_async.bench.learner_shapes import SHAPES, find_shape
from treepo_async.bench.published import hf_config, prepare_published, published_cache_bytes
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError
from treepo_async.learner.shape import ModelShape

RIGHT = {
    "device": "cuda:0",
    "groups": "nccl",
    "attention": "flex",
    "losses": [0.5, -0.25],
    "gradient_norms": [20.0, 10.0],
    "logprobs": [-5.0, -6.0, -7.0],
}


def passed(dtype="float32", **wrong):
    return {row["quantity"]: row["passed"] for row in compare(dtype, RIGHT | wrong, RIGHT)}


def test_numbers_that_agree_to_rounding_pass():
    assert passed(losses=[0.5 + 1e-7, -0.25]) == dict.fromkeys(
        ("losses", "gradient_norms", "logprobs"), True
    )


@pytest.mark.parametrize("dtype", ALLOWED)
def test_each_number_that_is_off_is_named(dtype):
    off = 2 * ALLOWED[dtype]
    assert not passed(dtype, losses=[0.5, -0.25 + off])["losses"]
    assert not passed(dtype, logprobs=[-5.0, -6.0 - off, -7.0])["logprobs"]
    # of gradient norms it is the share that counts
    assert not passed(dtype, gradient_norms=[20.0, 10.0 * (1 + off)])["gradient_norms"]
    assert passed(dtype, gradient_norms=[20.0 + ALLOWED[dtype], 10.0])["gradient_norms"]


@pytest.mark.parametrize("losses", [[0.5, math.nan], [0.5], []])
def test_nan_and_missing_updates_are_no_agreement(losses):
    assert not passed(losses=losses)["losses"]


def test_kernels_are_put_under_kinds_and_the_rest_of_the_time_is_waiting():
    kernels = [
        Kernel("triton_tem_fused_flex_attention_backward_1", 2.0, 24),
        Kernel("nvjet_sm90_tst_320x128", 3.0, 8),
        Kernel("void at::native::elementwise_kernel<mul>", 1.0, 5),
        Kernel("sm90_xmma_gemm", 0.5, 1),
        Kernel("ncclDevKernel", 0.25, 1),
    ]
    found = by_kind(kernels, 8.0)
    assert found == {
        "matrix products": 3.5,
        "attention": 2.0,
        "elementwise": 1.0,
        "other": 0.25,
        WAITING: 1.25,
    }
    assert next(iter(found)) == "matrix products"
    assert by_kind(kernels, 1.0)[WAITING] == 0.0
    assert kind_of("Memcpy DtoD (Device -> Device)") == "copies"


@pytest.mark.parametrize("name", SHAPES)
def test_the_config_of_a_published_size_is_read_back_as_that_size(name):
    assert ModelShape.from_config(hf_config(find_shape(name))) == find_shape(name)


def test_a_published_model_has_a_config_and_a_tokenizer_and_ends_nothing_by_itself(tmp_path):
    folder = prepare_published(tmp_path, "qwen2.5-7b", Stop.NONE)
    assert TextTokenizer.load(folder).vocab_size <= 384
    assert not list(folder.glob("*.safetensors"))
    assert '"eos_token_id": null' in (folder / "config.json").read_text()
    # 28 layers of keys and values of 4 heads of 128 in bfloat16
    assert published_cache_bytes("qwen2.5-7b") == 2 * 28 * 4 * 128 * 2


def test_a_publication_has_the_bytes_of_the_checkpoint_without_a_tied_head():
    shape = find_shape("qwen2.5-0.5b")
    assert weight_path.num_bytes(shape, "bfloat16") == 988_065_536
    assert weight_path.num_bytes(shape, "float32") == 2 * 988_065_536
    assert "lm_head.weight" in weight_path.expected_tensors(find_shape("qwen2.5-7b"), "bfloat16")


def test_stages_are_medians_over_rounds():
    rounds = [{"a": 1.0, "b": 5.0}, {"a": 9.0, "b": 4.0}, {"a": 2.0, "b": 6.0}]
    assert weight_path.medians(rounds) == {"a": 2.0, "b": 5.0}
    table = weight_path.lines({"stages": {"a": 2.0}, "bytes": 4 * 10**9, "passed": False, "rounds": 3})  # fmt: skip
    assert "| a | 2.0000 | 2.00 |" in table
    assert "CAME BACK DIFFERENT" in table[-1]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dtype=float16", "dtype=float16 is unknown; it is one of float32, bfloat16"),
        ("rounds=0", "rounds=0 is not a whole number from 1"),
        ("shapes=cpu", "unknown key shapes; did you mean shape?"),
    ],
)
def test_wrong_words_of_the_weights_path_are_named(word, message):
    with pytest.raises(ConfigError) as caught:
        weight_path.parse([word])
    assert message in str(caught.value)


@pytest.mark.engine
@pytest.mark.usefixtures("groups")
def test_a_publication_comes_back_bit_for_bit_and_a_damaged_one_is_told(tmp_path, monkeypatch):
    shape = find_shape("1x64")
    found = weight_path.measure(shape, "bfloat16", 1, tmp_path)
    assert found["passed"]
    assert found["stages"]["publish, verify, load"] >= found["stages"]["publish"]
    assert not list(tmp_path.iterdir())
    load = weight_path._load

    def damaged(file):
        tensors = load(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
        return tensors

    monkeypatch.setattr(weight_path, "_load", damaged)
    assert not weight_path.measure(shape, "bfloat16", 1, tmp_path)["passed"]
