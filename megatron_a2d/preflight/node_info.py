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
    """A process's report; it travels as JSON."""

    rank: int
    node: int
    host: str
    versions: dict[str, str]
    num_processes: int  # of this node
    num_gpus: int  # that this process could choose from
    gpu: str = ""  # none
    memory: int = 0  # bytes of the GPU
    memory_free: int = 0
    flops: float = 0.0  # a matrix product's rate, operations a second
    disk_free: int = 0  # bytes at --save
    problems: list[str] = field(default_factory=list)
    # by stage of allreduce_test.py: bytes a second, or why there is no such figure
    speeds: dict[str, float | str] = field(default_factory=dict)


def gather_facts(rank: int) -> Facts:
    """Of this process; the files come later, in `check_files`."""
    facts = Facts(
        rank=rank,
        node=int(os.environ.get("GROUP_RANK", "0")),
        host=socket.gethostname(),
        versions=versions(),
        num_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_gpus=torch.cuda.device_count(),
    )
    if has_cuda() and int(os.environ.get("LOCAL_RANK", "0")) >= facts.num_gpus:
        return facts  # there is none for this process, which judge.py says
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
    """What must be the same everywhere, by name; what is not installed is left out."""
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
    """Of the program itself: nodes may have copies of their own."""
    root = Path(megatron_a2d.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def matrix_rate() -> float:
    """Operations a second of one matrix product, the best of three: a rough figure that finds a throttled GPU."""
    size, dtype = (8192, torch.bfloat16) if has_cuda() else (512, torch.float32)
    matrix = torch.randn(size, size, dtype=dtype, device=device())
    best = np.inf
    for _ in range(4):  # the first one warms up
        begin = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def check_files(facts: Facts, inputs: dict[str, int], save: str | None, probe: str | None) -> None:
    """Compare what the first node sees with what this one does. `inputs`: sizes by path; `probe`: a file in --save."""
    for path, size in inputs.items():
        try:
            mine = Path(path).stat().st_size
        except OSError as error:
            facts.problems.append(f"{path}: cannot be read there ({error.strerror}); mount it on all nodes alike")
            continue
        if mine != size:
            facts.problems.append(f"{path}: has {mine} bytes there and {size} on the first node; make them the same")
    if save and probe:
        if not Path(probe).exists():
            facts.problems.append(f"--save {save}: is another directory there; name one that all nodes share")
        else:
            facts.disk_free = shutil.disk_usage(save).free


def sizes(paths: list[Path]) -> dict[str, int]:
    """By absolute path."""
    return {str(path.absolute()): path.stat().st_size for path in paths}
