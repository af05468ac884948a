"""From a response and an answer key to a reward: boxes, exact answers, scorers by name.

Pure functions over text; the one exception is a user's own scorer, whose faults `registry.score` contains.
"""
