"""From a response and an answer key to a reward: boxes, exact and mathematical answers, a user's own scorers.

Pure functions over text, except for `pool` and what it consists of (`child`, `worker`, `messages`): the processes
in which scorers run that may hang, crash or do as they like.
"""
