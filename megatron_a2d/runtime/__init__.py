"""The device switch and everything that depends on megatron.core's version.

`install()` is called before any megatron object is built. On every machine it checks the version and
applies the upstream fixes; without CUDA it also makes megatron.core run on the CPU. `upstream.py` holds what differs
between the supported versions. Importing this room makes megatron.core importable without triton, and
imports no torch.
"""

from __future__ import annotations

import functools

from megatron_a2d.runtime import without_triton

without_triton.install()


@functools.cache
def install() -> None:
    """Make megatron.core fit for this machine. Idempotent."""
    from megatron_a2d.runtime import adam, cpu_backend, upstream
    from megatron_a2d.runtime.device import has_cuda

    upstream.check_version()
    upstream.apply_fixes()
    adam.install()
    if not has_cuda():
        cpu_backend.install()
