"""From a data source's name to a stream of tokenised prompts with their answer keys.

`source` is what callers open; `records` reads files, `tokenizer` turns text into tokens. Nothing here imports
torch or transformers.
"""

from treepo_async.data.source import EndOfData, PromptSource, open_source
from treepo_async.data.tokenizer import TextTokenizer

__all__ = ["EndOfData", "PromptSource", "TextTokenizer", "open_source"]
