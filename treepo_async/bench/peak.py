"""Most memory that a piece of work takes: of PyTorch's allocator with CUDA, else of this process.

Without CUDA the kernel keeps a process's peak, and starts it anew where `/proc/self/clear_refs` may be written. Where it may not,
a thread looks at the size while the work runs: torch lets it, but a peak between two looks is missed. Neighbours:
`learner_run` and `attention_checks` ask.
"""

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

CLEAR = Path("/proc/self/clear_refs")
LOOK_EVERY_S = 0.001


def peak_bytes(work: Callable[[], object], *, clear: Path = CLEAR) -> int:
    """Most memory above that before the work.

    Args:
        work: is run once.
        clear: the kernel's file that starts the peak anew.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    with suppress(OSError, AttributeError):
        # what was freed by earlier runs would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
    before = _of_process("VmRSS")
    return max(0, _peak(work, clear) - before)


def _peak(work: Callable[[], object], clear: Path) -> int:
    try:
        clear.write_text("5")
    except OSError:
        return _watched(work)
    work()
    return _of_process("VmHWM")


def _watched(work: Callable[[], object]) -> int:
    """The largest size of the process that was seen while the work ran; the thread ends with the work."""
    seen = [_of_process("VmRSS")]
    is_done = threading.Event()

    def look() -> None:
        while not is_done.wait(LOOK_EVERY_S):
            seen.append(max(seen.pop(), _of_process("VmRSS")))

    thread = threading.Thread(target=look, name="peak", daemon=True)
    thread.start()
    try:
        work()
    finally:
        is_done.set()
        thread.join()
    return seen[0]


def _of_process(key: str) -> int:
    """A size from /proc/self/status, in bytes; 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else 0
