"""megatron.core on machines without triton.

From 0.17 on `import megatron.core` imports triton, for one module of kernels that move the activations of experts on a
GPU. torch's builds for the CPU bring no triton. Where there is none, that one module is stood in for: whatever else
asks for triton finds none, and does without. (Not asked is whether there is a GPU: that would start CUDA, which reads
its environment variables then, before environment.py has set them.)
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def install() -> None:
    """To be called before megatron.core is imported: the rooms that use it import `runtime` in their __init__."""
    if KERNELS in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    module = ModuleType(KERNELS, "Stands for kernels that only a GPU runs.")
    names = {"GLOBAL_BLOCK_SIZE": 1024, "paged_stash_copy_kernel": None, "paged_stash_pop_kernel": None}
    vars(module).update(names)
    sys.modules[KERNELS] = module
