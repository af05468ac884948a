"""Start-up hook of SGLang's processes without CUDA; Python imports it by its name.

torchvision is not installed: its wheels are built for CUDA and break every import of transformers
beside a CPU build of torch. SGLang imports it for image models all the same, as it imports its
configurations. Just before that it gets a placeholder, which transformers, having been asked
whether torchvision is there, does not take for the real one. A process that never imports SGLang
pays one object on `sys.meta_path`.

Invariants: an installed torchvision is left alone, and whatever `sitecustomize` this one hides on
the path still runs.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType


class Absent:
    """A name of torchvision that can be imported; using it says what is missing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"{name}: torchvision is not installed")


class Placeholder(ModuleType):
    """A module from which every name can be imported."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()


class PlaceVision:
    """Finds no module, ever; acts once, when SGLang's configurations are about to be imported."""

    trigger = "sglang.srt.configs"
    modules = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")

    def find_spec(self, name, path=None, target=None):
        """Place the torchvision placeholder if this is the trigger; never find anything."""
        if name == self.trigger:
            sys.meta_path.remove(self)
            if find_spec("torchvision") is None:
                place_vision()


def place_vision():
    """Let SGLang import torchvision, after transformers has noted for good that it is absent."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    for name in PlaceVision.modules:
        module = Placeholder(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def run_hidden_sitecustomize():
    """Run the next `sitecustomize` on the path, if there is one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


sys.meta_path.insert(0, PlaceVision())
run_hidden_sitecustomize()
