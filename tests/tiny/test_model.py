import json
from dataclasses import replace

import pytest
import torch

from treepo_async.tiny.model import TinyQwen2, save_model
from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_transformers_reads_the_folder_as_the_same_model(num_kv_heads, tmp_path):
    from transformers import AutoModelForCausalLM  # here, as it takes seconds to import

    architecture = replace(DEFAULT_ARCHITECTURE, num_kv_heads=num_kv_heads)
    ours = TinyQwen2(architecture, seed=0)
    torch.nn.init.normal_(ours.model.layers[0].self_attn.q_proj.bias)
    save_model(ours, architecture, tmp_path)
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    token_ids = torch.randint(350, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(token_ids).logits
        torch.testing.assert_close(ours.logits(ours.hidden(token_ids)), expected)
        ours.cos, ours.sin = ours.sin, ours.cos
        assert not torch.allclose(ours.logits(ours.hidden(token_ids)), expected, atol=1e-2)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert theirs.config.rope_parameters == {"rope_theta": 300.0, "rope_type": "default"}
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == EOS_TOKEN_ID


def test_the_config_is_the_one_that_transformers_writes(tmp_path):
    from transformers import Qwen2Config

    save_model(TinyQwen2(DEFAULT_ARCHITECTURE, 0), DEFAULT_ARCHITECTURE, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    Qwen2Config.from_pretrained(tmp_path).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    del rewritten["transformers_version"]
    assert written == rewritten


def test_later_tokens_do_not_reach_earlier_ones():
    model = TinyQwen2(DEFAULT_ARCHITECTURE, seed=0)
    token_ids = torch.arange(20)[None]
    changed = token_ids.clone()
    changed[0, 10:] = 0
    torch.testing.assert_close(model.hidden(token_ids)[:, :10], model.hidden(changed)[:, :10])
    assert not torch.equal(model.hidden(token_ids)[:, 10:], model.hidden(changed)[:, 10:])


def test_a_new_model_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first, second = TinyQwen2(DEFAULT_ARCHITECTURE, 3), TinyQwen2(DEFAULT_ARCHITECTURE, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
