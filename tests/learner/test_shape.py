"""What config.json may say."""

import pytest

from treepo_async.errors import ConfigError
from treepo_async.learner.shape import ModelShape, RopeStretch, check_split

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}


def test_a_published_config_is_read_whichever_transformers_wrote_it():
    old = ModelShape.from_config(QWEN2)
    new = {key: value for key, value in QWEN2.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert ModelShape.from_config(new) == old
    assert (old.head_dim, old.rope_theta, old.tied) == (64, 1000000.0, True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}),
        ("partial_rotary_factor", 0.5),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("num_experts", 60),
        ("hidden_act", "gelu"),
    ],
)
def test_a_feature_the_learner_would_ignore_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=key):
        ModelShape.from_config(QWEN2 | {key: value})


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "LlamaForCausalLM"])
def test_biases_of_attention_are_refused_where_the_family_reads_the_key(family):
    with pytest.raises(ConfigError, match=r"attention_bias is True"):
        ModelShape.from_config(QWEN2 | {"architectures": [family], "attention_bias": True})
    assert ModelShape.from_config(QWEN2 | {"attention_bias": True}).qkv_bias


def test_families_differ_in_biases_and_norms():
    features = {}
    for family in ("Qwen2", "Qwen3", "Llama"):
        shape = ModelShape.from_config(QWEN2 | {"architectures": [f"{family}ForCausalLM"]})
        features[family] = (shape.qkv_bias, shape.qk_norm)
    assert features == {"Qwen2": (True, False), "Qwen3": (False, True), "Llama": (False, False)}


def test_a_head_may_be_of_another_size_than_the_hidden_size_gives():
    assert ModelShape.from_config(QWEN2 | {"head_dim": 128}).head_dim == 128
    assert ModelShape.from_config(QWEN2 | {"head_dim": None}).head_dim == 64


def test_the_stretched_rope_of_llama_is_read_whichever_transformers_wrote_it():
    stretch = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    llama = QWEN2 | {"architectures": ["LlamaForCausalLM"]}
    old = ModelShape.from_config(llama | {"rope_scaling": stretch, "rope_theta": 500000.0})
    new = ModelShape.from_config(llama | {"rope_parameters": stretch | {"rope_theta": 500000.0}})
    assert old == new
    assert old.rope_stretch == RopeStretch(32.0, 1.0, 4.0, 8192)
    del stretch["factor"]
    with pytest.raises(ConfigError, match="no 'factor'"):
        ModelShape.from_config(llama | {"rope_scaling": stretch})


@pytest.mark.parametrize(
    "names", [["MistralForCausalLM"], ["Qwen3MoeForCausalLM"], ["Qwen2MoeForCausalLM"], [], None]
)
def test_another_architecture_is_refused_with_the_supported_ones(names):
    found = names[0] if names else "none"
    with pytest.raises(ConfigError, match=f"'{found}'.*Qwen2ForCausalLM"):
        ModelShape.from_config(QWEN2 | {"architectures": names})


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="intermediate_size"):
        ModelShape.from_config({k: v for k, v in QWEN2.items() if k != "intermediate_size"})


def test_a_layout_that_cuts_a_head_or_a_layer_is_refused():
    shape = ModelShape.from_config(QWEN2)
    check_split(shape, tp=2, pp=4)
    with pytest.raises(ConfigError, match=r"num_attention_heads is 14.*tp=4"):
        check_split(shape, tp=4, pp=1)
    with pytest.raises(ConfigError, match=r"num_hidden_layers is 24.*pp=5"):
        check_split(shape, tp=1, pp=5)


def test_ranks_may_share_key_value_heads_evenly_but_not_otherwise():
    sizes = QWEN2 | {"num_attention_heads": 48, "num_key_value_heads": 2, "head_dim": 64}
    shape = ModelShape.from_config(sizes)
    for tp in (1, 2, 4, 16):
        check_split(shape, tp=tp, pp=1)
    three = ModelShape.from_config(sizes | {"num_key_value_heads": 3})
    with pytest.raises(ConfigError, match=r"num_key_value_heads is 3.*tp=4"):
        check_split(three, tp=4, pp=1)
