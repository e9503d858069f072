"""Substitute for Transformer Engine's compiled extension: kernels that compute shapes and return dataless tensors.

The layers are Transformer Engine's own Python (2.12), so what they keep for the backward pass, gather and reduce is
theirs. Its libraries, which need a GPU, are not loaded. Each function has the arguments of the kernel that it
replaces (transformer_engine/pytorch/csrc/extensions); a missing one raises NotImplementedError with its name.
Triton's kernels (the permutation of routed tokens) are launched without effect: their Python makes the tensors.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import math
import os
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_a2d.rehearsal.cuda_names import META
from megatron_a2d.rehearsal.dataless_gpu import one_kernel

RELEASE = "2.12."
# Transformer Engine's own modules: kernels in triton, and exports.
_LEFT_OUT = (
    "transformer_engine.common.triton.permutation", "transformer_engine.pytorch.triton.cross_entropy",
    "transformer_engine.pytorch.triton.pad", "transformer_engine.pytorch.onnx_extensions",
)  # fmt: skip
_PERMUTATION = "transformer_engine.pytorch.triton.permutation"


def find() -> Path | None:
    """The directory that holds Transformer Engine's Python of this release; None where there is none.

    The copy that `make setup` installs for the tests, separate from the other packages, is found too.
    """
    for place in (*sys.path, str(Path(sys.prefix) / "transformer_engine")):
        found = importlib.metadata.distributions(name="transformer-engine", path=[place])
        if any(item.version.startswith(RELEASE) for item in found) and _has_layers(Path(place)):
            return Path(place)
    return None


def _has_layers(directory: Path) -> bool:
    return (directory / "transformer_engine" / "pytorch" / "__init__.py").is_file()


def install(directory: Path) -> None:
    """Make `import transformer_engine` find these kernels, in a process that imports it only afterwards."""
    sys.path.insert(0, str(directory))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # loads no libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    sys.meta_path.insert(0, _Kernels(directory))
    sys.modules["transformer_engine_torch"] = _extension()
    # The package's __init__ imports all of it, and loads the extension: its loader is replaced before.
    parent = ModuleType("transformer_engine")
    parent.__path__ = [str(directory / "transformer_engine")]
    sys.modules["transformer_engine"] = parent
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    del sys.modules["transformer_engine"]
    importlib.import_module("transformer_engine.pytorch")
    # It imports all names of the extension; the others may be requested too.
    importlib.import_module("transformer_engine.pytorch.cpp_extensions").__getattr__ = _missing  # type: ignore[method-assign]
    sys.modules["transformer_engine"].common = common  # type: ignore[attr-defined]


class _Kernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports placeholders instead of modules of kernels and of libraries that are not installed."""

    def __init__(self, directory: Path):
        self._permutation = directory.joinpath(*_PERMUTATION.split(".")).with_suffix(".py")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name == _PERMUTATION or name in _LEFT_OUT or (name == "einops" and _is_missing(name)):
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return ModuleType(spec.name) if spec.name == _PERMUTATION else _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ != _PERMUTATION:
            return
        # torch looks for triton too, and must not find a placeholder.
        own = sys.modules.get("triton")
        sys.modules["triton"] = _Placeholder("triton")
        try:
            exec(compile(self._permutation.read_text(), self._permutation, "exec"), vars(module))
        finally:
            del sys.modules["triton"]
            if own:
                sys.modules["triton"] = own


def _is_missing(name: str) -> bool:
    return importlib.machinery.PathFinder.find_spec(name) is None


class _Placeholder(ModuleType):
    """A module whose names are all kernels that do nothing, but for the arithmetic that callers need."""

    __path__ = ()  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"cdiv": lambda a, b: -(-a // b), "next_power_of_2": lambda n: 1 << (n - 1).bit_length()}
        return known.get(name, _Launch())


class _Launch:
    """A kernel: kernel[grid](...) does nothing; as a decorator it leaves what it decorates."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Name(int):
    """A member of one of the extension's enumerations."""

    name: str


class _Names:
    """An enumeration, whose members are made and numbered when they are first named."""

    def __getattr__(self, member: str) -> Any:
        if member.startswith("__"):
            raise AttributeError(member)
        value = _Name(len(vars(self)))
        value.name = member
        setattr(self, member, value)
        return value


class _Class:
    def __init__(self, *_: Any, **__: Any):
        raise NotImplementedError("user buffers are not rehearsed")


_ENUMERATIONS = (
    "DType", "FP8FwdTensors", "FP8BwdTensors", "NVTE_Bias_Type", "NVTE_Mask_Type", "NVTE_Softmax_Type",
    "NVTE_Fused_Attn_Backend", "NVTE_QKV_Format", "NVTE_QKV_Layout", "CommOverlapType", "CommOverlapAlgo",
    "Float8BlockScaleTensorFormat",
)  # fmt: skip
_ANSWERS = {
    "get_cublasLt_version": 130000, "get_cudnn_version": 91500, "get_num_cublas_streams": 4,
    "ubuf_built_with_mpi": False, "device_supports_multicast": False, "get_stream_priority_range": (0, -1),
}  # fmt: skip


def _extension() -> ModuleType:
    module = ModuleType("transformer_engine_torch")
    for name in _ENUMERATIONS:
        setattr(module, name, _Names())
    for name, answer in _ANSWERS.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    for name in ("FP8TensorMeta", "CommOverlapHelper", "CommOverlap", "CommOverlapP2P"):
        setattr(module, name, type(name, (_Class,), {}))
    for name, value in list(globals().items()):
        if isinstance(value, FunctionType) and not name.startswith("_") and name not in ("install", "find"):
            setattr(module, name, _kernel(value))

    module.__all__ = [name for name in vars(module) if not name.startswith("_")]  # type: ignore[attr-defined]
    module.__getattr__ = _missing  # type: ignore[method-assign]
    return module


def _missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def raise_by_name(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"Transformer Engine's {name} is not rehearsed")

    return raise_by_name


def _kernel(function: Any) -> Any:
    def launch(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():  # shapes alone: quick without CudaNames
            return one_kernel(function, *args, **kwargs)

    launch.__name__ = function.__name__
    return launch


def _torch(dtype: Any, otherwise: torch.dtype) -> torch.dtype:
    """torch's type for one of the extension's, or for torch's own."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or otherwise
    return getattr(torch, {"kByte": "uint8", "kBFloat16": "bfloat16"}.get(dtype.name, dtype.name[1:].lower()))


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=META)


# Products.


def generic_gemm(
    A: Tensor, transA: bool, B: Tensor, transB: bool, D: Tensor | None, quantizer: Any, output_dtype: Any, bias: Any,
    bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, *_: Any, **__: Any,
) -> list[Any]:  # fmt: skip
    """[output, gradient of the bias, GELU's input, extra output]."""
    last = math.prod(A.shape[:-1]) if transA else A.shape[-1]
    shape = (B.shape[-1], last) if transB else (*B.shape[:-1], last)
    inner = (A.shape[-1] if transA else math.prod(A.shape[:-1]), math.prod(B.shape[:-1]) if transB else B.shape[-1])
    if inner[0] != inner[1]:
        raise RuntimeError(f"a product of {tuple(A.shape)} and {tuple(B.shape)}: {inner[0]} is not {inner[1]}")
    if D is not None and tuple(D.shape) != tuple(shape):
        raise RuntimeError(f"a product's output has {tuple(D.shape)}, not {tuple(shape)}")
    return [_empty(shape, _torch(output_dtype, A.dtype)) if D is None else D, None, None, None]


def te_general_grouped_gemm(
    A: list[Tensor], transa: bool, B: list[Tensor], transb: bool, D: list[Tensor] | None, D_type: Any,
    m_splits: list[int], bias: list[Tensor], *_: Any, **__: Any,
) -> list[Tensor]:  # fmt: skip
    """The biases; the products are written to `D`."""
    if not all(isinstance(size, int) for size in m_splits or []):
        raise RuntimeError("a grouped product needs its sizes as numbers on the host")
    return bias


# Norms and rotary embedding.


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, *_: Any
) -> list[Any]:
    """[normed, None, reciprocal of the root mean square]."""
    normed = _empty(input.shape, _torch(otype, input.dtype)) if ln_out is None else ln_out
    return [normed, None, _empty([math.prod(input.shape[:-1])], torch.float32)]


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, *_: Any) -> list[Tensor]:
    return [_empty(x.shape, x.dtype), _empty(gamma.shape, gamma.dtype)]


def fused_rope_forward(input: Tensor, *_: Any) -> Tensor:
    return _empty(input.shape, input.dtype)


def fused_rope_backward(gradient: Tensor, *_: Any) -> Tensor:
    return _empty(gradient.shape, gradient.dtype)


# Attention.


def get_fused_attn_backend(*_: Any) -> Any:
    return sys.modules["transformer_engine_torch"].NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any,
    bottom_right_diagonal: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor, V: Tensor, *_: Any,
) -> list[Tensor]:  # fmt: skip
    """[output, log-sum-exp, random state]."""
    output = _empty((*Q.shape[:-1], V.size(-1)), Q.dtype)
    is_packed = Q.dim() == 3
    rows = (Q.size(0), Q.size(1), 1) if is_packed else (cu_seqlens_q.numel() - 1, Q.size(-2), max_seqlen_q, 1)
    return [output, _empty(rows, torch.float32), _empty([2], torch.int64)] if is_training else [output]


def fused_attn_bwd(*args: Any) -> list[Any]:
    q, k, v = (argument for argument in args[14:17])
    return [*(_empty(tensor.shape, tensor.dtype) for tensor in (q, k, v)), None, None]


# Router.


def fused_topk_with_score_function_fwd(logits: Tensor, topk: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, the choice, and what the backward pass reads; [tokens, experts] each."""
    return _empty(logits.shape, logits.dtype), _empty(logits.shape, torch.bool), _empty(logits.shape, logits.dtype)


def fused_topk_with_score_function_bwd(
    num_tokens: int, num_experts: int, routing_map: Tensor, intermediate_output: Tensor, *_: Any
) -> Tensor:
    return _empty(intermediate_output.shape, intermediate_output.dtype)


# Many tensors at once.


def multi_tensor_scale(*_: Any) -> None:
    pass


def multi_tensor_adam(*_: Any) -> None:
    pass


def multi_tensor_adam_param_remainder(*_: Any) -> None:
    pass


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    return _empty([1], torch.float32), _empty([len(tensor_lists[0]) if per_tensor else 0], torch.float32)
