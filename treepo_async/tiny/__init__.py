"""The embedded default: a tiny Qwen2 model, its tokenizer and its task, built locally and cached.

`task`, `recipe` and `tokenizer` need no torch; only `model` and `warm_start` import it, and only
`cache.prepare` imports those, when there is something to train.
"""
