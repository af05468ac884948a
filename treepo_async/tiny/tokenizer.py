r"""The tiny model's tokenizer: Qwen2's byte-level tokenizer without merges, and a few whole tokens.

Any text encodes and decodes back, up to Unicode normal form C. The numbers 10..99 and `\boxed{` are single
tokens, so a segment of a few tokens is a step of the task. They are added tokens, not merges: transformers
rebuilds the tokenizer of a Qwen2 model with Qwen2's own splitting rule, which tears digits apart before any
merge, and what stands here must mean the same there.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

EOS_TOKEN = "<|endoftext|>"
EOS_TOKEN_ID = 0
SPECIAL_TOKENS = (EOS_TOKEN, "<|im_start|>", "<|im_end|>")
WHOLE_TOKENS = (*(str(number) for number in range(10, 100)), "\\boxed{")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""The task is a bare completion: a question, a newline, and the model answers."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer() -> Tokenizer:
    """The tokenizer; the same for every seed and recipe."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *WHOLE_TOKENS]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in WHOLE_TOKENS])
    return tokenizer


def save_tokenizer(folder: Path, max_tokens: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into an existing folder.

    Args:
        folder: where to write.
        max_tokens: the model's context length, told to whoever loads the folder.
    """
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "extra_special_tokens": list(SPECIAL_TOKENS[1:]),
        "model_max_length": max_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
