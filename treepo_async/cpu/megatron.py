"""What lets Megatron-Core 0.16.1 train a dense GPT on CPU with gloo; nothing happens where CUDA is present.

Megatron names CUDA in three ways: it asks `torch.cuda` for the current device, moves tensors with `.cuda()`, and writes
the literal device `"cuda"` into its functions. `install` gives each the meaning it has on a
machine whose only device is the CPU. Neighbour: `treepo_async.learner.mcore` calls it before the first Megatron import.

Invariant: with CUDA present neither torch nor Megatron is touched.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

import torch

LITERAL_MODULES = (
    "megatron.core.pipeline_parallel.schedules",  # the token counter of a schedule
    "megatron.core.optimizer.optimizer",  # the loss scale; the types of weights that get master weights
    "megatron.core.optimizer.clip_grads",  # the overflow buffer of the gradient norm; the clip's type check
    "megatron.core.utils",  # the norm that stands in for apex's multi-tensor kernel
)
"""Megatron modules with device literals on the path of dense training with tp, pp and dp."""

MODULES = ("models.gpt.gpt_layer_specs", "distributed", "optimizer", "pipeline_parallel")
"""The parts of `megatron.core` a learner imports; together they import every `@jit_fuser`."""

LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


@cache
def install() -> bool:
    """Make Megatron-Core usable without CUDA, once per process.

    Returns:
        Whether anything was changed: False where CUDA is present.
    """
    if torch.cuda.is_available():
        return False
    _retarget_torch()
    _import_without_compile()
    for name in LITERAL_MODULES:
        _retarget_literals(name)
    _ignore_generators()
    return True


def _retarget_torch() -> None:
    cpu = torch.device("cpu")
    # distributed/param_and_grad_buffer.py and ~60 others: `device=torch.cuda.current_device()`
    torch.cuda.current_device = lambda: cpu
    # pipeline_parallel/p2p_communication.py waits for the stream between stages
    torch.cuda.synchronize = lambda device=None: None
    # models/common/language_module/language_module.py: tied embeddings of the last pipeline stage
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _import_without_compile() -> None:
    """Import Megatron while `@jit_fuser` (jit.py: `torch.compile`) decorates nothing.

    The decoration alone imports dynamo and inductor, seconds and 100 MiB per process, for kernels that are CUDA's. The
    warnings silenced here say that apex and Transformer Engine are missing, which need CUDA too.
    """
    compile_function = torch.compile
    torch.compile = _keep
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in MODULES:
                import_module(f"megatron.core.{name}")
    finally:
        torch.compile = compile_function


def _ignore_generators() -> None:
    """Let dropout of probability 0 and recomputed activations do without CUDA's random states.

    They draw nothing, and models with dropout are refused.
    """
    random: Any = import_module("megatron.core.tensor_parallel.random")
    random.CudaRNGStatesTracker.fork = lambda self, *names: nullcontext()
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *args, **kwargs: None


def _keep(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _keep if function is None else function


def _retarget_literals(module_name: str) -> None:
    """Rewrite `LITERALS` in the constants of every function of a module; torch itself stays as it is."""
    module = import_module(module_name)
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module_name:
            continue
        for member in vars(value).values() if isinstance(value, type) else (value,):
            _retarget_function(member)


def _retarget_function(member: Any) -> None:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    while isinstance(function, FunctionType):
        function.__code__ = _retargeted_code(function.__code__)
        # through decorators such as torch.no_grad
        function = getattr(function, "__wrapped__", None)


def _retargeted_code(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple(_retargeted(constant) for constant in code.co_consts))


def _retargeted(constant: object) -> object:
    if isinstance(constant, CodeType):
        return _retargeted_code(constant)
    if isinstance(constant, tuple):
        return tuple(_retargeted(item) for item in constant)
    return LITERALS.get(constant, constant) if isinstance(constant, str) else constant
