import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE
from treepo_async.tiny.tokenizer import (
    EOS_TOKEN,
    EOS_TOKEN_ID,
    SPECIAL_TOKENS,
    build_tokenizer,
    save_tokenizer,
)

TOKENIZER = build_tokenizer()
PIECES = ["12", "7", "100", "\\boxed{", "*", "\n\n", "  ", "e\u0301", "don't", *SPECIAL_TOKENS]


@settings(deadline=None)
@given(st.text() | st.text("0123456789+-*=\n\\boxed{}"))
def test_any_text_comes_back_in_normal_form_c(text):
    token_ids = TOKENIZER.encode(text).ids
    back = TOKENIZER.decode(token_ids, skip_special_tokens=False)
    assert back == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", [*(str(number) for number in range(100)), "\\boxed{"])
def test_small_numbers_and_the_box_are_single_tokens(text):
    assert len(TOKENIZER.encode(text).ids) == 1
    assert TOKENIZER.encode(f"={text}\n").tokens[1] == text


def test_ids_fit_the_model_and_the_end_token_is_skipped_when_decoding():
    assert TOKENIZER.get_vocab_size() <= DEFAULT_ARCHITECTURE.vocab_size
    assert TOKENIZER.token_to_id(EOS_TOKEN) == EOS_TOKEN_ID
    assert TOKENIZER.decode(TOKENIZER.encode("33" + "".join(SPECIAL_TOKENS)).ids) == "33"


def test_transformers_reads_the_folder_as_the_same_tokenizer(tmp_path):
    from transformers import AutoTokenizer  # here, as it takes seconds to import

    # the model type makes transformers rebuild the tokenizer in Qwen2's own way
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    save_tokenizer(tmp_path, max_tokens=512)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    @settings(deadline=None)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
    def same(text):
        token_ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert token_ids == TOKENIZER.encode(text).ids
        assert theirs.decode(token_ids) == TOKENIZER.decode(token_ids, skip_special_tokens=False)

    same()
    assert theirs.eos_token_id == EOS_TOKEN_ID
    assert theirs.model_max_length == 512
