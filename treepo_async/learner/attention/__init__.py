"""Attention over a packed forest: one plan a microbatch, one backend a device."""
