"""How SGLang is started where there is no CUDA device: its command and its environment.

SGLang is a tree of processes and its source is left alone, so whatever it needs has to travel by
inheritance: switches of its own, and the folder `site/` at the front of `PYTHONPATH`. The engine
host merges the answers into the command and the environment of the server that it starts.

Invariant: where CUDA is present the server is SGLang's own, with nothing of this package in it.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

SITE = Path(__file__).parent / "site"

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_NVIDIA_DEVICE = Path("/dev/nvidiactl")


def cuda_present() -> bool:
    """Tell whether this machine has a CUDA device, without importing torch.

    An empty or negative `CUDA_VISIBLE_DEVICES` hides every device, for CUDA and therefore here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return False
    return _NVIDIA_DEVICE.exists() or shutil.which("nvidia-smi") is not None


def server_command(cuda: bool | None = None) -> list[str]:
    """Return the command that starts an SGLang server; its flags are to be appended.

    Without CUDA the server forks its children, which spares two of three imports of SGLang. The
    command needs the variables of `environment` for the same machine.

    Args:
        cuda: whether the server will have a CUDA device; None asks the machine.
    """
    has_cuda = cuda_present() if cuda is None else cuda
    return [sys.executable, "-m", "sglang.launch_server" if has_cuda else "forked_sglang"]


def environment(
    cuda: bool | None = None,
    *,
    offline: bool = False,
    inherited: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the variables to add to the environment of an SGLang server.

    Args:
        cuda: whether the server will have a CUDA device; None asks the machine.
        offline: also keep the Hugging Face libraries off the network.
        inherited: the environment to build on; None is this process's own. What it says of
            `OMP_NUM_THREADS` and of SGLang's model package wins over the defaults here, and its
            `PYTHONPATH` is kept behind `site/`.

    Returns:
        Variables by name; with CUDA only what `offline` asked for.
    """
    base = os.environ if inherited is None else inherited
    added = dict(_OFFLINE) if offline else {}
    if cuda_present() if cuda is None else cuda:
        return added
    defaults = {"OMP_NUM_THREADS": "1", "SGLANG_EXTERNAL_MODEL_PACKAGE": "sglang_text_models"}
    return added | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": _with_site_first(base.get("PYTHONPATH", "")),
        **{name: base.get(name, value) for name, value in defaults.items()},
    }


def _with_site_first(python_path: str) -> str:
    """Put the folder first, once; empty entries go, as they would mean the working directory."""
    others = [entry for entry in python_path.split(os.pathsep) if entry and entry != str(SITE)]
    return os.pathsep.join([str(SITE), *others])
