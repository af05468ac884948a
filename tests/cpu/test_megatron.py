"""The substitutes for CUDA: nothing where CUDA is, literals and nothing else where it is not."""

import subprocess
import sys

import pytest
import torch

from treepo_async.cpu import megatron

IMPORT = """
import sys
from treepo_async.cpu.megatron import install
compile_before = __import__("torch").compile
assert install() and install()
import pytest
import torch
assert torch.compile is compile_before, "torch.compile is put back"
assert "torch._dynamo" not in sys.modules, "dynamo was imported"
assert torch.cuda.current_device() == torch.device("cpu")
"""


def test_with_cuda_nothing_is_touched(monkeypatch):
    before = dict(vars(torch.cuda)), torch.Tensor.cuda, torch.compile
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert megatron.install.__wrapped__() is False
    monkeypatch.undo()
    assert (dict(vars(torch.cuda)), torch.Tensor.cuda, torch.compile) == before


@pytest.mark.engine
def test_megatron_is_imported_without_the_compiler():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=50)


def test_literals_change_in_nested_code_and_behind_decorators_only():
    def outer(device="cuda"):
        """cuda."""

        def inner():
            return "cuda", "torch.cuda.FloatTensor", "cuda:0", 7

        return inner()

    decorated = torch.no_grad()(outer)
    megatron._retarget_function(decorated)
    assert decorated() == ("cpu", "torch.FloatTensor", "cuda:0", 7)
