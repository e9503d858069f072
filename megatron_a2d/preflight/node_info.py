"""Node report of one process: versions, its GPU, the run's files, free disk space."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import megatron_a2d
from megatron_a2d.megatron_compat.device import device, has_cuda

_PACKAGES = {
    "torch": "torch", "megatron-core": "megatron-core", "Transformer Engine": "transformer-engine", "numpy": "numpy",
}  # fmt: skip


@dataclass
class Facts:
    """Node report of a process; sent as JSON."""

    rank: int
    node: int
    host: str
    versions: dict[str, str]
    num_processes: int  # on this node
    num_gpus: int  # visible to this process
    gpu: str = ""  # empty: none
    memory: int = 0  # bytes of the GPU
    memory_free: int = 0
    flops: float = 0.0  # FLOP/s of a matrix product
    disk_free: int = 0  # bytes at --save
    problems: list[str] = field(default_factory=list)
    # stage of allreduce_test.py -> bytes/s, or an error message
    speeds: dict[str, float | str] = field(default_factory=dict)


def gather_facts(rank: int) -> Facts:
    """Report of this process; `check_files` adds the files later."""
    facts = Facts(
        rank=rank,
        node=int(os.environ.get("GROUP_RANK", "0")),
        host=socket.gethostname(),
        versions=versions(),
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_gpus=torch.cuda.device_count(),
    )
    if has_cuda() and int(os.environ.get("LOCAL_RANK", "0")) >= facts.num_gpus:
        return facts  # no GPU for this process, which diagnose.py reports
    try:
        if has_cuda():
            torch.cuda.set_device(device())
            facts.gpu = torch.cuda.get_device_name()
            facts.memory_free, facts.memory = torch.cuda.mem_get_info()
        facts.flops = matrix_rate()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        facts.problems.append(f"the GPU of rank {rank} does not work ({reason}); leave the node out")
    return facts


def versions() -> dict[str, str]:
    """Versions that must be equal on all nodes, by name, without packages that are not installed."""
    found = {"Python": platform.python_version(), "megatron_a2d": f"{megatron_a2d.__version__} {_source_digest()}"}
    for name, package in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if has_cuda():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            found["driver"] = ".".join(re.findall(r"\d+(?:\.\d+)+", driver.read_text())[:1])
    return found


def _source_digest() -> str:
    """Digest of this program's source: nodes may have separate copies."""
    root = Path(megatron_a2d.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def matrix_rate() -> float:
    """FLOP/s of a matrix product, the best of three: a rough number that reveals a throttled GPU."""
    size, dtype = (8192, torch.bfloat16) if has_cuda() else (512, torch.float32)
    matrix = torch.randn(size, size, dtype=dtype, device=device())
    best = np.inf
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # synchronises
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def check_files(facts: Facts, inputs: dict[str, int], save: str | None, probe: str | None) -> None:
    """Compare this node's files with the first node's. `inputs`: path -> size; `probe`: a file in --save."""
    for path, size in inputs.items():
        try:
            mine = Path(path).stat().st_size
        except OSError as error:
            facts.problems.append(f"{path}: cannot be read there ({error.strerror}); mount it on all nodes")
            continue
        if mine != size:
            facts.problems.append(
                f"{path}: has {mine} bytes there and {size} on the first node; make the files identical"
            )
    if save and probe:
        if not Path(probe).exists():
            facts.problems.append(f"--save {save}: is a different directory there; choose one that all nodes share")
        else:
            facts.disk_free = shutil.disk_usage(save).free


def sizes(paths: list[Path]) -> dict[str, int]:
    """Absolute path -> size in bytes."""
    return {str(path.absolute()): path.stat().st_size for path in paths}
