"""The tree algorithms: how a tree grows, where a run is cut, when a path ends, what a leaf is worth.

Pure: no I/O, no clock, no torch; randomness comes in as a seeded generator.
"""
