"""`key=value` words of a benchmark's command line. Neighbours: `command` and `learner_cells` have the keys."""

import difflib
from collections.abc import Iterable, Mapping

from treepo_async.errors import ConfigError


def read_words(words: Iterable[str], examples: Mapping[str, str]) -> dict[str, str]:
    """The values that are given, by key.

    Args:
        words: of the command line.
        examples: a value for each key there is.

    Raises:
        ConfigError: an unknown key, or one without a value.
    """
    return dict(_pair(word, examples) for word in words)


def _pair(word: str, examples: Mapping[str, str]) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if key not in examples:
        near = difflib.get_close_matches(key, examples, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(examples)}"
        raise ConfigError(f"{word}: unknown key {key}; {hint}")
    if not (equals and value):
        raise ConfigError(f"{word}: {key} has no value, write e.g. {key}={examples[key]}")
    return key, value
