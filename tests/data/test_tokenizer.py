import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError
from treepo_async.tiny.tokenizer import save_tokenizer

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
    {% if message.role == 'user' %}
      {{ {'<b>': message.content} | tojson }}
    {% endif %}
    {% generation %}{{ eos_token }}{% endgeneration %}
    {%- break %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tmp_path, max_tokens=512)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 0}))
    return tmp_path


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_encode_and_render_give_what_transformers_gives(folder):
    from transformers import AutoTokenizer  # here, as it takes seconds to import

    (folder / "chat_template.jinja").write_text(CHATML)
    theirs, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer.load(folder)

    @settings(deadline=None)
    @given(
        st.text() | st.sampled_from(["1+5*7", "<|im_end|>", "{{ 3 }}", "a\n<b>'\"", "\\boxed{12}"])
    )
    def same(text):
        rendered = theirs.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert ours.render(text) == rendered
        expected = theirs(rendered, add_special_tokens=False)["input_ids"]
        assert ours.encode(rendered).tolist() == expected
        assert ours.decode(np.array(expected)) == theirs.decode(expected, skip_special_tokens=True)

    same()
    assert "<|im_start|>assistant" in ours.render("x")


def test_encoding_adds_no_special_token_and_decoding_shows_none(folder):
    tokenizer = TextTokenizer.load(folder)
    token_ids = tokenizer.encode("1+12")
    assert token_ids.dtype == np.int32
    assert token_ids.shape == (3,)
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(np.append(token_ids, 0)) == "1+12"
    assert tokenizer.vocab_size == 350


def test_a_files_own_padding_and_truncation_are_switched_off(folder):
    edit(
        folder / "tokenizer.json",
        truncation={"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert len(TextTokenizer.load(folder).encode("1+2+3")) == 5


def test_end_of_sequence_ids_come_from_all_three_configs(folder):
    edit(folder / "generation_config.json", eos_token_id=[1, 7])
    edit(folder / "config.json", eos_token_id=5)
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    assert TextTokenizer.load(folder).eos_token_ids == {1, 7, 5, 2}
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    assert TextTokenizer.load(folder).eos_token_ids == frozenset()


def test_the_default_of_several_templates_is_taken_and_a_file_of_its_own_wins(folder):
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "D {{ messages[0].content }}"},
    ]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert TextTokenizer.load(folder).render("x") == "D x"
    (folder / "chat_template.jinja").write_text("F {{ messages[0].content }}")
    assert TextTokenizer.load(folder).render("x") == "F x"


def test_without_a_template_the_question_stands_alone_as_it_does_with_the_tiny_one(folder):
    assert TextTokenizer.load(folder).render("1+2") == "1+2\n"
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert TextTokenizer.load(folder).render("1+2") == "1+2\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users') }}", "refuses a single user message: no users"),
        ("{{ messages.append(1) }}", "refuses a single user message"),
        ("{{ ''.__class__.__mro__ }}", "refuses a single user message"),
        ("{% if %}", "not valid jinja"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_and_stays_in_its_sandbox(
    folder, template, message
):
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ConfigError, match=message):
        TextTokenizer.load(folder).render("x")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=rf"{tmp_path} has no tokenizer.json; give the folder"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_damaged_file_is_refused_by_name(folder, name):
    (folder / name).write_text("{")
    with pytest.raises(ConfigError, match=f"{name} is not JSON"):
        TextTokenizer.load(folder)
    (folder / name).write_text("[]")
    with pytest.raises(ConfigError, match=f"{name} holds a list"):
        TextTokenizer.load(folder)
