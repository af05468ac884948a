"""Qwen2, the architecture of the tiny model and of the paper."""

from sglang.srt.models.qwen2 import EntryClass

__all__ = ["EntryClass"]
