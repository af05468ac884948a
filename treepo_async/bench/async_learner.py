"""The learner of a scripted run: it takes real batches by the real protocol, and sleeps for as long as training would take.

    AskBatch -> trees decoded and checked (`learner.supply`) -> asleep -> Trained -> publication -> Published -> Retired

A publication is an empty folder named as the policy step. Waits: for a batch and for replay's answers (`PATIENCE_S`).
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treepo_async.bench.async_script import RUN_ID, Script
from treepo_async.learner.ancestry import Ancestry
from treepo_async.learner.supply import Supply
from treepo_async.metrics.events import emit
from treepo_async.types import ROOT, Tree
from treepo_async.wire.messages import AnyMessage, Hello, Message, Published, Retired, Trained
from treepo_async.wire.sockets import BlockingRequester

PATIENCE_S = 120.0


class TimedLearner:
    """Trains until the time of its script is over."""

    def __init__(self, script: Script, publications: Path, replay: BlockingRequester) -> None:
        """Prepare; `publications` is the folder in which engines look."""
        self._script, self._publications, self._replay = script, publications, replay
        self._supply = Supply(
            self._ask,
            lambda: None,
            Ancestry(lineage=0),
            max_staleness=script.max_staleness,
            batch_timeout_s=PATIENCE_S,
        )

    def run(self) -> None:
        """Tell of every step in an event; `at` is the machine's monotonic clock."""
        step, ends = 0, float("inf")
        while time.monotonic() < ends:
            self._step(step)
            step += 1
            if step == self._script.warm_up:
                ends = time.monotonic() + self._script.seconds

    def _step(self, step: int) -> None:
        asked = time.monotonic()
        batch = self._supply.next(step)
        assert batch is not None, "the prompts have no end"
        got = time.monotonic()
        unique = sum(tree.num_tokens for tree in batch.trees)
        # what reading the trees took is part of the step
        time.sleep(unique * self._script.train_token_s)
        trained = time.monotonic()
        self._ask(Trained(step=step, lineage=0, digest=str(step)))
        noted = time.monotonic()
        time.sleep(self._script.publish_s)
        (self._publications / str(step + 1)).mkdir()
        published = time.monotonic()
        self._ask(Published(step=step + 1, lineage=0, consumed_step=step))
        self._ask(Retired(step=step))
        self._supply.retire(step)
        done = time.monotonic()
        emit(
            "step",
            at=done,
            step=step + 1,
            wait_batch=got - asked,
            train=trained - got,
            publish=published - noted,
            ack=done - published + noted - trained,
            unique_tokens=unique,
            lags=lag_tokens(batch.trees, step),
        )

    def _ask(self, message: Message) -> tuple[AnyMessage, list[bytes]]:
        wait = f"an answer to {type(message).__name__}"
        return self._replay.ask(message, timeout_s=PATIENCE_S, wait=wait)


def learn(script: Script, publications: Path) -> None:
    """Be the learner."""
    hello = Hello(name="learner", run_id=RUN_ID)
    replay = BlockingRequester(script.replay_endpoint, name="learner", owner="replay", hello=hello)
    try:
        replay.ask(hello, timeout_s=PATIENCE_S, wait="replay to come up")
        TimedLearner(script, publications, replay).run()
    finally:
        replay.close()


def lag_tokens(trees: Sequence[Tree], step: int) -> dict[int, int]:
    """Trajectory tokens by the publications between sampling and step `step`."""
    found: Counter[int] = Counter()
    for tree in trees:
        count_S = np.zeros(len(tree.segments), np.int64)
        for leaf in np.array(tree.leaves)[tree.is_whole_L]:
            count_S[leaf] = 1
        for i in reversed(range(len(tree.segments))):
            segment = tree.segments[i]
            if segment.parent != ROOT:
                count_S[segment.parent] += count_S[i]
            found[step - segment.policy_version.step] += int(count_S[i]) * len(segment)
    return dict(found)
