import subprocess
import sys

import psutil
import pytest

from tests.fakes import until
from tests.memory import FamilyMemory

HELD_BYTES = 128 * 2**20
HOLDER = f"""
import os, time
held = bytearray(b"x") * {HELD_BYTES}
forked = os.fork()
if forked:
    print(forked, flush=True)
time.sleep(60)
"""


class Family:
    """A process that holds memory, and one forked from it, which shares that."""

    def __init__(self):
        self.first = subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True
        )
        forked = int(self.first.stdout.readline())
        self.processes = [psutil.Process(pid) for pid in (self.first.pid, forked)]
        self.num_looks = 0

    def __call__(self):
        self.num_looks += 1
        return self.processes

    def kill(self):
        for process in self.processes:
            process.kill()
        self.first.communicate(timeout=10)


@pytest.fixture
def family():
    found = Family()
    yield found
    if found.first.returncode is None:
        found.kill()


async def test_what_a_family_took_at_most_counts_shared_pages_once_and_stays_when_it_ends(family):
    memory = FamilyMemory(family, every_s=0.02)
    await until(lambda: family.num_looks > 1)
    family.kill()
    before = family.num_looks
    await until(lambda: family.num_looks > before + 1)
    memory.end()
    assert HELD_BYTES < memory.most_bytes < 1.5 * HELD_BYTES
