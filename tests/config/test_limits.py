import pytest

from treepo_async.config.command_line import parse
from treepo_async.config.limits import SPARE_TOKENS, context_length, prompt_limit, response_limit
from treepo_async.errors import ConfigError

TREE = ("tree.segment_tokens=10", "tree.max_depth=7")


def model(positions):
    return {"max_position_embeddings": positions}


@pytest.mark.parametrize(("words", "limit"), [((), 70), (("tree.max_response_tokens=55",), 55)])
def test_the_response_limit_is_depth_or_the_wanted_length(words, limit):
    assert response_limit(parse([*TREE, *words])) == limit
    assert response_limit(parse([*TREE, "tree.max_response_tokens=99"])) == 70


def test_a_large_model_gets_the_context_that_prompt_and_response_need():
    config = parse([*TREE, "data.max_prompt_tokens=100"])
    assert context_length(config, model(4096)) == 170 + SPARE_TOKENS
    assert prompt_limit(config, model(4096)) == 100


def test_a_small_model_shortens_the_prompts():
    config = parse([*TREE, "data.max_prompt_tokens=100"])
    assert context_length(config, model(128)) == 128
    assert prompt_limit(config, model(128)) == 128 - 70 - SPARE_TOKENS


@pytest.mark.parametrize("wanted", [90, 128, 500])
def test_prompt_and_response_always_fit_the_context(wanted):
    config = parse([*TREE, f"engine.context_length={wanted}"])
    assert context_length(config, model(1000)) == wanted
    prompt = prompt_limit(config, model(1000))
    assert 1 <= prompt <= config.data.max_prompt_tokens
    assert prompt + response_limit(config) + SPARE_TOKENS <= wanted


def test_more_context_than_the_model_has_is_refused():
    config = parse([*TREE, "engine.context_length=129"])
    with pytest.raises(ConfigError, match=r"engine\.context_length=129 is above the model's 128"):
        context_length(config, model(128))


def test_a_context_without_room_for_a_prompt_is_refused():
    config, full = parse(TREE), 70 + SPARE_TOKENS
    assert prompt_limit(config, model(full + 1)) == 1
    with pytest.raises(ConfigError, match=f"no room for a prompt in {full} tokens of context"):
        prompt_limit(config, model(full))


def test_a_cache_too_small_for_one_context_is_refused():
    config = parse([*TREE, "engine.context_length=100", "engine.max_total_tokens=99"])
    with pytest.raises(ConfigError, match=r"engine\.max_total_tokens=99 cannot hold .* 100 tokens"):
        context_length(config, model(128))
