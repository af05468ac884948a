"""Text to token ids and back, and the chat template, without transformers.

Reads a Hugging Face model folder. The invariant, checked against transformers by a test: `encode` and
`render` give what `AutoTokenizer` gives for the same folder.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer

from treepo_async.errors import ConfigError
from treepo_async.types import Int32


class TextTokenizer:
    """The tokenizer of a model folder.

    Attributes:
        eos_token_ids: every id that ends a response, from the generation, model and tokenizer configs.
        vocab_size: one more than the largest id that the tokenizer produces; a model may have more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = None if chat_template is None else _compile(chat_template)
        self._special_tokens = dict(special_tokens or {})
        self.eos_token_ids = eos_token_ids
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, model_dir: Path) -> Self:
        """Read `tokenizer.json` and, where present, the configs and the chat template beside it.

        Raises:
            ConfigError: `tokenizer.json` is missing, or a file is not JSON.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{model_dir} has no tokenizer.json; give the folder of a Hugging Face model with a fast "
                "tokenizer, or write one with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        _read_json(path)  # a broken file has no exception type of its own in the library below
        tokenizer = Tokenizer.from_file(str(path))
        # a file may ask for padding or truncation, which belong to batches of equal length
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _read_json(model_dir / "tokenizer_config.json")
        special_tokens = _special_tokens(config)
        eos_token_ids = _eos_token_ids(model_dir, tokenizer, special_tokens.get("eos_token"))
        return cls(tokenizer, eos_token_ids, _chat_template(model_dir, config), special_tokens)

    def encode(self, text: str) -> Int32:
        """Token ids of a text, [T]; no special token is added, those written in the text are recognised."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of token ids [T], without special tokens."""
        return str(self._tokenizer.decode(list(map(int, token_ids)), skip_special_tokens=True))

    def render(self, question: str) -> str:
        """The prompt text of a question asked by a user; without a chat template, question and newline.

        Raises:
            ConfigError: the template refuses a single user message.
        """
        if self._template is None:
            return question + "\n"
        try:
            return self._template.render(
                messages=[{"role": "user", "content": question}],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"the model's chat template refuses a single user message: {error}"
            ) from error


class _GenerationBlock(Extension):
    """Renders `{% generation %}` blocks, which mark text for training, as their content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(chat_template: str) -> jinja2.Template:
    """Compile as transformers does in `chat_template_utils`; the template comes with the model, hence the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the model's chat template is not valid jinja: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object; copy it again")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on, each written as text or as an object with its text."""
    found = {}
    for key, value in config.items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
    return found


def _eos_token_ids(model_dir: Path, tokenizer: Tokenizer, eos_token: str | None) -> frozenset[int]:
    token_ids = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(model_dir / name).get("eos_token_id")
        token_ids |= set(value if isinstance(value, list) else [value])
    if eos_token is not None:
        token_ids.add(tokenizer.token_to_id(eos_token))
    return frozenset(token_ids - {None})


def _chat_template(model_dir: Path, config: dict[str, Any]) -> str | None:
    """The template of the folder; a file of its own wins over the config, as in transformers."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
