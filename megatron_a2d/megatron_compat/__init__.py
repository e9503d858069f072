"""Compatibility with megatron.core: device selection, and everything that depends on its version.

`install()` is called before any megatron object is built. On every machine it checks the version and applies the fixes
of versions.py, which handles the differences between the supported versions; without CUDA it also makes megatron.core
run on the CPU. Importing this package makes megatron.core importable without triton, and imports no torch.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"
MUON_KERNELS = "emerging_optimizers.triton_kernels"
FUSER = "megatron.core.jit"


def make_triton_optional() -> None:
    """Replace the modules of megatron.core and emerging-optimizers that need triton; call before either is imported.

    From 0.17 on `import megatron.core` imports triton for kernels that move expert activations on a GPU, and torch's
    CPU builds come without triton. All other uses of triton are optional. emerging-optimizers 0.3.0 imports it too, for
    a product that is off by default; megatron.core takes that for a package that is not installed. There is no check
    for a GPU here: that would initialise CUDA, which reads its environment variables once, before
    distributed/environment.py has set them.
    """
    if TRITON_KERNELS in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    names = {"GLOBAL_BLOCK_SIZE": 1024, "paged_stash_copy_kernel": None, "paged_stash_pop_kernel": None}
    _replace(TRITON_KERNELS, "Placeholder for kernels that only run on a GPU.", names)
    _replace(MUON_KERNELS, "Placeholder for kernels that only run on a GPU.", {"HAS_TRITON_340": False})


def compile_nothing_without_triton() -> None:
    """Replace megatron.core's choice of a compiler for small functions; call before megatron.core is imported.

    It is torch's, which compiles nothing for a GPU without triton, and whose import takes as long as all of torch's.
    """
    if FUSER in sys.modules or importlib.util.find_spec("triton") is not None:
        return

    def as_it_is(function: Any) -> Any:
        return function

    def do_nothing() -> None:
        pass

    names = {"jit_fuser": as_it_is, "noop_decorator": as_it_is}
    _replace(FUSER, "Placeholder for the choice of a compiler.", names)
    vars(sys.modules[FUSER]).update(enable_jit_fuser=do_nothing, disable_jit_fuser=do_nothing)


def _replace(module: str, doc: str, names: dict[str, Any]) -> None:
    replacement = ModuleType(module, doc)
    vars(replacement).update(names)
    sys.modules[module] = replacement


make_triton_optional()
compile_nothing_without_triton()


@functools.cache
def install() -> None:
    """Prepare megatron.core for this machine. Idempotent."""
    from megatron_a2d.megatron_compat import cpu_backend, fused_adam, optimizer_chain, versions
    from megatron_a2d.megatron_compat.device import has_cuda

    versions.check_version()
    versions.apply_fixes()
    fused_adam.install()
    optimizer_chain.install()
    if not has_cuda():
        cpu_backend.install()
