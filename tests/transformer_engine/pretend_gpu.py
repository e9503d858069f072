"""The real Python package of Transformer Engine over the stand-in of its extension, in a process without CUDA.

`install` comes before anything imports transformer_engine or megatron.core, in a process of its own: megatron.core
decides on its import what it has, and the package's wheel without the stand-in cannot be imported at all. The directory
that holds the package is named by A2D_TRANSFORMER_ENGINE (`make test` sets it).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import megatron_a2d.megatron_compat  # noqa: F401  megatron.core imports without triton
from tests.transformer_engine.stand_in.extension import extension_module, modules_left_out

DIRECTORY = os.environ.get("A2D_TRANSFORMER_ENGINE", "")
HOPPER, BLACKWELL = (9, 0), (10, 0)
CUDA = (13, 0)
# What only Transformer Engine sees of the GPU.
_gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="none", total_memory=80 << 30)


def install(directory: str = DIRECTORY) -> None:
    """Make `import transformer_engine` work in this process."""
    if "transformer_engine_torch" in sys.modules:
        return
    sys.path.insert(0, directory)
    _pretend_cuda()
    sys.meta_path[:0] = [_AttentionInFp32(), _LeftOut()]
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # loads no libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    os.environ["NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING"] = "1"  # its random bits cannot be compared
    sys.modules["transformer_engine_torch"] = extension_module(_names_read(Path(directory)), release(directory))
    common = _without_library(Path(directory))
    import transformer_engine.pytorch
    from transformer_engine.pytorch import distributed

    assert transformer_engine.pytorch.__file__.startswith(directory)
    transformer_engine.common = common
    distributed.graph_safe_rng_available = lambda: False
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _name_types_once()


def rehearse(capability: tuple[int, int] = HOPPER) -> None:
    """Make this process choose and compute layers as on that GPU. To be called before megatron.core is imported."""
    install()
    from tests.transformer_engine.engine_jobs import as_on_a_gpu

    as_on_a_gpu(capability)


def use_gpu(capability: tuple[int, int]) -> None:
    """Which GPU the answers are of, from now on in this process."""
    from transformer_engine.pytorch import quantization, utils

    _gpu.major, _gpu.minor = capability
    for module in (utils, quantization):
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def release(directory: str = DIRECTORY) -> str:
    """Transformer Engine's version, as 2.12.0."""
    return next(iter(importlib.metadata.distributions(name="transformer-engine", path=[directory]))).version


def releases() -> str:
    """What is compared here with the local layers."""
    from megatron_a2d.megatron_compat import versions

    return f"Transformer Engine {release()}, megatron-core {versions.release()}"


def _names_read(directory: Path) -> set[str]:
    files = (directory / "transformer_engine/pytorch").rglob("*.py")
    return {name for file in files for name in re.findall(r"\btex\.([A-Za-z]\w*)", file.read_text(encoding="utf-8"))}


def _without_library(directory: Path) -> ModuleType:
    """The package's loader of its extension is replaced before its __init__, which imports everything, is run."""
    parent = ModuleType("transformer_engine")
    parent.__path__ = [str(directory / "transformer_engine")]
    sys.modules["transformer_engine"] = parent
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    del sys.modules["transformer_engine"]
    return common


def _asks_for_itself() -> bool:
    """Whether the caller of the caller is Transformer Engine."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("transformer_engine")


def _pretend_cuda() -> None:
    is_available, is_cuda = torch.cuda.is_available, torch._C.TensorBase.is_cuda  # type: ignore[attr-defined]
    on_cuda = property(lambda self: True if _asks_for_itself() else is_cuda.__get__(self))
    torch.cuda.is_available = lambda: True if _asks_for_itself() else is_available()
    torch.Tensor.is_cuda = torch.nn.Parameter.is_cuda = on_cuda  # type: ignore[assignment, misc]
    torch.cuda.get_device_capability = lambda *_: (_gpu.major, _gpu.minor)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: _gpu  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = torch.version.cuda or ".".join(map(str, CUDA))  # type: ignore[misc]


def _name_types_once() -> None:
    """megatron.core's optimizers sort parameters by the names of CUDA's types, and cpu_backend renames a CPU's."""
    from transformer_engine.pytorch import QuantizedTensor

    names = {torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float32: "Float"}
    QuantizedTensor.type = lambda self, *_, **__: f"torch.cuda.{names[self.dtype]}Tensor"


class _LeftOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports stand-ins in the place of modules whose own imports are not installed."""

    def __init__(self) -> None:
        self._modules = modules_left_out()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name in self._modules else None

    def create_module(self, spec: Any) -> ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


class _AttentionInFp32(importlib.abc.MetaPathFinder):
    """Imports the modules that ask for 16 bits with fp32 added to their lists: results can be compared exactly then."""

    MODULES = tuple(
        f"transformer_engine.pytorch.attention.dot_product_attention.{name}" for name in ("utils", "backends")
    )

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader)
        spec.loader = _WithFp32(spec.loader.name, spec.loader.path)
        return spec


class _WithFp32(importlib.machinery.SourceFileLoader):
    def get_code(self, name: str) -> Any:
        text, found = self.get_source(name) or "", 0
        for types in ("torch.bfloat16, torch.float16", "torch.float16, torch.bfloat16"):
            found += text.count(f"in [{types}")
            text = text.replace(f"in [{types}", f"in [torch.float32, {types}")
        assert found, f"{name}: its list of types is not found"
        return compile(text, self.path, "exec")
