"""What a benchmark ran on: processor, memory, versions, commit, command line, date."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from treepo_async.cpu.environment import cuda_present, environment

PACKAGES = ("sglang", "torch", "megatron-core", "transformers", "numpy", "aiohttp")
_REPOSITORY = Path(__file__).resolve().parents[2]


def note(file: Path, **more: object) -> None:
    """Append this process's environment, and more, to a JSON list, one entry for each time a benchmark was started."""
    entries = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*entries, describe() | more], indent=2) + "\n")


def describe() -> dict[str, object]:
    """This machine, this code and this command."""
    threads = environment(inherited=os.environ).get("OMP_NUM_THREADS")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "code": code_digest(),
        "is_modified": bool(_git("status", "--porcelain")),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg(),
        "cuda": cuda_present(),
        "engine_threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def code_digest() -> str:
    """Of every source file of this package: the same code, committed or not, has the same."""
    found = hashlib.blake2b(digest_size=6)
    for file in sorted((_REPOSITORY / "treepo_async").rglob("*.py")):
        found.update(f"{file.relative_to(_REPOSITORY)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def _version(package: str) -> str | None:
    """None where it is not installed: a benchmark needs only some of them."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Its answer; None outside of a checkout."""
    command = ["git", "-C", str(_REPOSITORY), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
