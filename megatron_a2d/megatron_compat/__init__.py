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

TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def make_triton_optional() -> None:
    """Replace the one module of megatron.core that needs triton; call before megatron.core is imported.

    From 0.17 on `import megatron.core` imports triton for kernels that move expert activations on a GPU, and torch's
    CPU builds come without triton. All other uses of triton are optional. There is no check
    for a GPU here: that would initialise CUDA, which reads its environment variables once, before
    distributed/environment.py has set them.
    """
    if TRITON_KERNELS in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    module = ModuleType(TRITON_KERNELS, "Placeholder for kernels that only run on a GPU.")
    names = {"GLOBAL_BLOCK_SIZE": 1024, "paged_stash_copy_kernel": None, "paged_stash_pop_kernel": None}
    vars(module).update(names)
    sys.modules[TRITON_KERNELS] = module


make_triton_optional()


@functools.cache
def install() -> None:
    """Prepare megatron.core for this machine. Idempotent."""
    from megatron_a2d.megatron_compat import cpu_backend, fused_adam, versions
    from megatron_a2d.megatron_compat.device import has_cuda

    versions.check_version()
    versions.apply_fixes()
    fused_adam.install()
    if not has_cuda():
        cpu_backend.install()
