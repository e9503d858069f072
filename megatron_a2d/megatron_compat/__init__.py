"""The device switch and everything that depends on megatron.core's version.

`install()` is called before any megatron object is built. On every machine it checks the version and
applies the upstream fixes; without CUDA it also makes megatron.core run on the CPU. `versions.py` holds what differs
between the supported versions. Importing this room makes megatron.core importable without triton, and
imports no torch.
"""

from __future__ import annotations

import functools

from megatron_a2d.megatron_compat import without_triton

without_triton.install()


@functools.cache
def install() -> None:
    """Make megatron.core fit for this machine. Idempotent."""
    from megatron_a2d.megatron_compat import cpu_backend, fused_adam, versions
    from megatron_a2d.megatron_compat.device import has_cuda

    versions.check_version()
    versions.apply_fixes()
    fused_adam.install()
    if not has_cuda():
        cpu_backend.install()
