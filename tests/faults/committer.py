"""A process that does nothing but commit: `python -m tests.faults.committer FOLDER SEED NUMBER`.

It opens the store of a folder, finds out how far the queue of that seed has come there, and commits on until `NUMBER`. Each
line of its output is one word for a commit: `ack` once it is stored, `no` where the disk refused; it then tries again.
"""

import sys
import time
from itertools import count
from pathlib import Path

from tests.replay.journal import comparable
from tests.replay.life import SEGMENT_BYTES, Life
from treepo_async import chaos
from treepo_async.replay.store import Store

PAUSE_S = 0.01


def main(folder, seed, number):
    store, state = Store.open(Path(folder), "run", resume_step=None, segment_bytes=SEGMENT_BYTES)
    life = Life(seed)
    begun = life.queue.state()
    done = 0 if comparable(begun) == comparable(state) else _done(life, state)
    for at in range(done, number):
        commit = life.commit()
        while not _is_stored(store, commit):
            _say("no", at)
            time.sleep(PAUSE_S)
        _say("ack", at)
        chaos.point("committer.after_ack")
        store.forget(commit.forgotten)


def _done(life, state):
    wanted = comparable(state)
    return next(at for at in count(1) if comparable(life.commit().state) == wanted)


def _say(word, at):
    sys.stdout.write(f"{word} {at}\n")
    sys.stdout.flush()


def _is_stored(store, commit):
    try:
        store.commit(commit.changes, commit.trees)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
