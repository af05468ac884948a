"""What a process can spend its time on, and which activity of each role counts as what: the one place that says so.

    learner   one slot, rank 0
    rank      one slot, each rank above 0
    actor     one slot for each tree that may grow at once (`actor.concurrent_trees`)
    engine    one slot, the server as its host sees it
    replay    one slot

A ledger begins when its process is ready: what it takes to start is in no ledger.
"""

from collections.abc import Mapping
from enum import StrEnum

Activities = Mapping[str, "Category"]
"""Each activity of a role, and what it counts as. `other` is where a slot rests."""

OTHER = "other"
GATE = "gate"
"""A slot whose requests all stand at closed gates."""
EVALUATE = "evaluate"
"""Slots that wait while their process evaluates."""


class Category(StrEnum):
    """What time goes into; together they are the whole of it."""

    COMPUTE = "compute"
    WAIT_DATA = "wait_data"
    """For what is worked on: prompts, trees, orders."""
    WAIT_WEIGHTS = "wait_weights"
    """For an engine that may sample: one that changes its weights, has too old ones, or is started again."""
    WAIT_QUEUE = "wait_queue"
    """For replay to take something and say so."""
    SYNC = "sync"
    """Handing weights on, taking them over, or making things safe on disk."""
    EVAL = "eval"
    IDLE = "idle"
    """Nothing to do, or nothing of the others."""


LEARNER: Activities = {
    "wait_batch": Category.WAIT_DATA,
    "train": Category.COMPUTE,
    "ack": Category.WAIT_QUEUE,
    "publish": Category.SYNC,
    "save": Category.SYNC,
    OTHER: Category.IDLE,
}
"""`ack`: replay's answers to Trained, Published and Retired."""

RANK: Activities = {
    "order": Category.COMPUTE,
    "publish": Category.SYNC,
    "wait_order": Category.WAIT_DATA,
    OTHER: Category.IDLE,
}
"""`order`: training or scoring; `publish`: tensors for a publication or a checkpoint; `wait_order`: rank 0 has none."""

ACTOR: Activities = {
    "lease": Category.WAIT_DATA,
    "grow": Category.COMPUTE,
    GATE: Category.WAIT_WEIGHTS,
    "score": Category.COMPUTE,
    "put": Category.WAIT_QUEUE,
    EVALUATE: Category.EVAL,
    "back_off": Category.IDLE,
    OTHER: Category.IDLE,
}
"""`lease`: asked for and not there, be it that the learner is behind; `put`: a tree or a word of its failure is sent."""

ENGINE: Activities = {
    "serve": Category.COMPUTE,
    "update": Category.SYNC,
    EVALUATE: Category.EVAL,
    "restart": Category.IDLE,
    OTHER: Category.IDLE,
}
"""`serve`: there are requests, as of the last sample (four a second); `evaluate`: the same while a version is held to be
evaluated; `update`: the gate is closed for new weights; `other`: open, and no request."""

REPLAY: Activities = {
    "handle": Category.COMPUTE,
    "commit": Category.SYNC,
    OTHER: Category.IDLE,
}
"""`commit`: until all of a turn is on disk and answered."""

KINDS: Mapping[str, Activities] = {
    "learner": LEARNER,
    "rank": RANK,
    "actor": ACTOR,
    "engine": ENGINE,
    "replay": REPLAY,
}
"""By the kind of a process."""

WAITS = (Category.WAIT_DATA, Category.WAIT_WEIGHTS, Category.WAIT_QUEUE, Category.IDLE)
"""What a slot does that could as well grow trees."""
