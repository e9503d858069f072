"""The module `transformer_engine_torch`, put together from the files beside this one, and what has no counterpart here.

What differs between releases of Transformer Engine lies in release_2_20.py.
"""

from __future__ import annotations

import functools
from collections import Counter
from enum import IntEnum
from types import FunctionType, ModuleType
from typing import Any

from tests.transformer_engine.stand_in import (
    enums,
    fused_attention,
    multi_tensor,
    norms,
    pad_kernel,
    partial_casts,
    permutation_kernels,
    products,
    quantized,
    release_2_20,
    rope_kernels,
    router_kernels,
)

CALLS: Counter[str] = Counter()  # of the kernels, by name
_KERNELS = (
    fused_attention, multi_tensor, norms, partial_casts, products, quantized, rope_kernels, router_kernels,
)  # fmt: skip
# What Transformer Engine asks the extension about the machine: answers of a recent one without user buffers.
_ANSWERS = {
    "get_cublasLt_version": 130000,
    "get_cudnn_version": 91500,
    "get_num_cublas_streams": 4,
    "ubuf_built_with_mpi": False,
    "device_supports_multicast": False,
    "get_stream_priority_range": (0, -1),
}
# Modules of Transformer Engine that import triton and onnxscript, which are not installed.
_LEFT_OUT = {
    "transformer_engine.pytorch.triton.permutation": (permutation_kernels,),
    "transformer_engine.pytorch.triton.cross_entropy": (),
    "transformer_engine.pytorch.triton.pad": (pad_kernel,),
    "transformer_engine.pytorch.triton.mhc": (),  # from 2.20 on, as the next
    "transformer_engine.pytorch.triton.grouped_dbias_dscales": (),
    "transformer_engine.pytorch.onnx_extensions": (),
}


class FP8TensorMeta:
    """Scales and histories of delayed scaling; Transformer Engine's Python sets the fields."""

    scale: Any = None
    scale_inv: Any = None
    amax_history: Any = None


class _UserBuffers:
    def __init__(self, *_: Any, **__: Any):
        raise NotImplementedError("transformer_engine_torch (stand-in) has no user buffers")


def extension_module(names: set[str], release: str) -> ModuleType:
    """names: what the package reads of its extension, for `import *` takes what a module lists; some are never called."""
    newer = (release_2_20,) if tuple(map(int, release.split(".")[:2])) >= (2, 20) else ()
    module = _module("transformer_engine_torch", *_KERNELS, *newer)
    for source in (enums, *newer):
        for name, value in vars(source).items():
            if isinstance(value, type) and issubclass(value, IntEnum) and value is not IntEnum:
                setattr(module, name, value)
    for name, answer in _ANSWERS.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    module.FP8TensorMeta = FP8TensorMeta  # type: ignore[attr-defined]
    for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P"):
        setattr(module, name, _UserBuffers)
    module.__all__ = sorted(names | {name for name in vars(module) if not name.startswith("_")})  # type: ignore[attr-defined]
    return module


def modules_left_out() -> dict[str, ModuleType]:
    """Stand-ins for modules of Transformer Engine's own, by name."""
    return {name: _module(name, *sources) for name, sources in _LEFT_OUT.items()}


def _module(name: str, *sources: ModuleType) -> ModuleType:
    """The public functions of the sources, counted; any other name is a function that raises NotImplementedError."""
    module = ModuleType(name)
    for source in sources:
        for key, value in vars(source).items():
            if isinstance(value, FunctionType) and value.__module__ == source.__name__ and not key.startswith("_"):
                setattr(module, key, _counted(value))

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def raise_by_name(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{name} (stand-in) has no {attribute}")

        return raise_by_name

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


def _counted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return wrapper
