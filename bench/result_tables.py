"""Machine description and measured peak rate, for benchmark results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch


def matrix_rate(seconds: float = 1.0) -> float:
    """Measured bf16 GEMM rate of this device in FLOP/s: the best of a few sizes, each for `seconds`."""
    gpu = torch.cuda.is_available()
    best = 0.0
    for size in (4096, 8192, 16384) if gpu else (512,):
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if gpu else "cpu") for _ in range(2))
        for timed in (False, True):
            count, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < (seconds if timed else 0.2):
                for _ in range(10):
                    a @ b
                if gpu:
                    torch.cuda.synchronize()
                count += 10
            elapsed = time.perf_counter() - begin
        best = max(best, 2 * size**3 * count / elapsed)
    return best


def can_compile() -> bool:
    """Whether triton, and so torch.compile, has the C compiler that it needs; otherwise functions run uncompiled."""
    return any(map(shutil.which, ("cc", "gcc", "clang")))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Hardware and versions, without anything that identifies the machine."""
    from megatron_a2d.megatron_compat.versions import release

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": release(),
        "transformers": version_of("transformers"),
        "transformer_engine": version_of("transformer_engine"),
        "cuda": torch.version.cuda,
    }
