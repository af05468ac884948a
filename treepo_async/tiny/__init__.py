"""The embedded default: tiny Qwen2 models, their tokenizer and their tasks, built locally and cached.

`built_in` names the tasks. It, the tasks, `recipe` and `tokenizer` need no torch; only `model` and `warm_start`
import it, and only `cache.prepare` imports those, when there is something to train.
"""
