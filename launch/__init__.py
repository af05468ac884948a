"""Thin entry points: parse, import, call."""
