"""Wall time of work on the learner's device, until the device has done it. Neighbours: `weight_path`, `device_step` and `learner_profile` time by it."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")


def place() -> torch.device:
    """CUDA where it is, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(seconds: dict[str, float], name: str, work: Callable[[], Found]) -> Found:
    """Do a piece of work, note what it took under its name, and give what it gives."""
    wait()
    begin = time.perf_counter()
    found = work()
    wait()
    seconds[name] = time.perf_counter() - begin
    return found
