"""How much memory a family of processes takes together."""

import contextlib
import threading

import psutil

EVERY_S = 1.0


class FamilyMemory:
    """Looks at the processes once in a while, in a thread; shared pages count once, each process has its part of them."""

    def __init__(self, family, *, every_s=EVERY_S):
        """Begin.

        Args:
            family: gives the processes there are.
            every_s: between two looks.
        """
        self.most_bytes = 0
        """What the processes took at most, added up at one look."""
        self._family, self._every_s = family, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)
        self._thread.start()

    @property
    def most_gib(self):
        """`most_bytes` in GiB."""
        return self.most_bytes / 2**30

    def end(self):
        """Look no more."""
        self._ended.set()
        self._thread.join(timeout=10)

    def _look(self):
        while not self._ended.wait(self._every_s):
            self.most_bytes = max(self.most_bytes, sum(map(_bytes_of, self._family())))


def _bytes_of(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_full_info().pss
    return 0
