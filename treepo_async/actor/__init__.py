"""Actors: lease a prompt, grow its tree in the engine, score the leaves, put the tree into replay."""
