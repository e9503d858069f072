"""CPU backend: makes megatron.core run on machines without CUDA.

megatron.core names the device "cuda" throughout. Each function below neutralises one such assumption and
has its own test. Nothing here is active on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._device
from torch import Tensor

CPU = torch.device("cpu")


def install() -> None:
    assert not torch.cuda.is_available()
    _redirect_factories()
    _redirect_moves()
    _neutralise_cuda_module()
    _use_cpu_generator()
    _never_compile()
    _accept_cpu_split_sizes()
    _clip_gradients_without_cuda()
    _accept_cpu_parameters()


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def _redirect_factories() -> None:
    """torch.zeros(..., device="cuda") and the like make CPU tensors; pinned memory needs CUDA, so it is dropped."""

    def redirected(factory: Any) -> Any:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        wrapper.redirected_to_cpu = True  # type: ignore[attr-defined]
        return wrapper

    # Contexts like `with torch.device("meta")` identify the factories by this list, which is cached on first use: with
    # the wrappers in it they would have no effect, and transformers would load buffers without values.
    torch.utils._device._device_constructors()
    names = (
        "tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint",
        "zeros_like", "ones_like", "empty_like",
    )  # fmt: skip
    for name in names:
        if not hasattr(getattr(torch, name), "redirected_to_cpu"):
            setattr(torch, name, redirected(getattr(torch, name)))


def _redirect_moves() -> None:
    """Make `.cuda()` and `.to("cuda")` no-ops."""
    original = torch.Tensor.to
    if hasattr(original, "redirected_to_cpu"):
        return

    @functools.wraps(original)
    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    to.redirected_to_cpu = True  # type: ignore[attr-defined]
    torch.Tensor.to = to  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[assignment, method-assign]


class _NoStream:
    """Stands in for CUDA streams and events: on a CPU all work is complete when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _NoStream:
        return self

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing


def _neutralise_cuda_module() -> None:
    """Replace functions of torch.cuda: the current device is the CPU, streams and memory counters are no-ops."""
    stream = _NoStream()

    def do_nothing() -> Any:
        # A separate function per name: torch.compile keeps rules per function, and cannot handle one with two names.
        return lambda *args, **kwargs: None

    replacements: dict[str, Any] = {
        "current_device": lambda: CPU,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": _NoStream,
        "memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
        "memory_stats": lambda *args, **kwargs: {},
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "synchronize": do_nothing(),
        "empty_cache": do_nothing(),
        "set_device": do_nothing(),
        "ipc_collect": do_nothing(),
        "reset_peak_memory_stats": do_nothing(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    # NVTX ranges of NVIDIA's profiler.
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = do_nothing()


def _use_cpu_generator() -> None:
    """Make the tensor-parallel RNG state tracker use the CPU's generator."""
    from megatron.core.tensor_parallel import random

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):
        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    random.CudaRNGStatesTracker = CpuRNGStatesTracker
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _never_compile() -> None:
    """Disable megatron.core's compilation of small functions, which costs half a minute at the first step on a CPU.

    Without triton it compiles none of those (`compile_nothing_without_triton`), and setting this imports the compiler.
    """
    if importlib.util.find_spec("triton") is not None or "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("force_eager")


def _accept_cpu_split_sizes() -> None:
    """Make the all-to-all dispatcher convert its split sizes to numpy arrays, as it does for CUDA tensors only."""
    from megatron.core.transformer.moe import token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _clip_gradients_without_cuda() -> None:
    """Replace gradient clipping, which requires CUDA tensors and a fused scaling kernel."""
    from megatron.core.optimizer import clip_grads, optimizer

    def clip(
        parameters: Tensor | list[Tensor],
        max_norm: float,
        total_norm: float,
        use_decoupled_grad: bool = False,
    ) -> None:
        attribute = "decoupled_grad" if use_decoupled_grad else "grad"
        everything = [parameters] if isinstance(parameters, Tensor) else parameters
        gradients = [getattr(p, attribute).detach() for p in everything if getattr(p, attribute, None) is not None]
        coefficient = max_norm / (total_norm + 1.0e-6)
        if coefficient < 1.0 and gradients:
            torch._foreach_mul_(gradients, coefficient)

    optimizer.clip_grad_by_total_norm_fp32 = clip
    clip_grads.clip_grad_by_total_norm_fp32 = clip


def _accept_cpu_parameters() -> None:
    """Make the optimizers accept CPU parameters: they sort them by type name, and only know "torch.cuda.*Tensor".

    Only inside their constructors do CPU types have CUDA names.
    """
    from megatron.core.optimizer import distrib_optimizer, optimizer

    original_type = torch.Tensor.type

    def cuda_named_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    def under_cuda_names(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            torch.Tensor.type = cuda_named_type  # type: ignore[assignment, method-assign]
            try:
                return function(*args, **kwargs)
            finally:
                torch.Tensor.type = original_type  # type: ignore[method-assign]

        return wrapper

    for cls in (
        distrib_optimizer.DistributedOptimizer,
        optimizer.Float16OptimizerWithFloat16Params,
        optimizer.FP32Optimizer,
    ):
        cls.__init__ = under_cuda_names(cls.__init__)
