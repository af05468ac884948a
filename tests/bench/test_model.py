import json

import pytest
from safetensors import safe_open

from treepo_async.bench.cells import Stop
from treepo_async.bench.model import MAX_CONTEXT, architecture_of, cache_bytes_per_token, prepare
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_the_config_is_a_float32_qwen2_of_the_size_that_was_asked_for(tmp_path):
    config = config_of(prepare(tmp_path, 3, 128, Stop.NATURAL))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "float32"
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 128)
    assert config["intermediate_size"] == 688
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 1)
    assert (config["vocab_size"], config["max_position_embeddings"]) == (384, MAX_CONTEXT)


@pytest.mark.parametrize("stop", Stop)
def test_without_stops_the_model_names_no_end_of_sequence(stop, tmp_path):
    folder = prepare(tmp_path, 2, 64, stop)
    expected = EOS_TOKEN_ID if stop is Stop.NATURAL else None
    for name in ("config.json", "generation_config.json"):
        assert config_of(folder, name)["eos_token_id"] == expected
    assert TextTokenizer.load(folder).vocab_size <= 384


def test_the_weights_are_the_same_every_time(tmp_path):
    folders = [prepare(tmp_path / name, 2, 64, Stop.NONE) for name in ("a", "b")]
    assert folders[0].name == folders[1].name
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second
    with safe_open(folders[0] / "model.safetensors", "np") as tensors:
        assert tensors.get_tensor("model.layers.1.mlp.up_proj.weight").std() > 0


def test_a_folder_that_is_there_is_used_again(tmp_path):
    folder = prepare(tmp_path, 2, 64, Stop.NONE)
    mark = folder / "mark"
    mark.touch()
    assert prepare(tmp_path, 2, 64, Stop.NONE) == folder
    assert mark.exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads"), [(64, 4, 1), (256, 4, 1), (512, 8, 1), (2048, 32, 4)]
)
def test_heads_have_64_dimensions_and_share_keys_by_eight(hidden, heads, kv_heads):
    architecture = architecture_of(2, hidden)
    assert (architecture.num_heads, architecture.num_kv_heads) == (heads, kv_heads)


def test_an_entry_of_the_cache_holds_keys_and_values_of_every_layer():
    assert cache_bytes_per_token(8, 512) == 2 * 8 * 64 * 4
