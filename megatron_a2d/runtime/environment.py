"""Environment variables and processor cores of a process, computed from the settings and the GPU.

CUDA, NCCL and torch's allocator read most of them once, when they start. `apply` therefore runs before anything touches
CUDA, and asks the driver (NVML) for the GPU. Nothing is left to the user: what is computed here overrides what was set.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import NamedTuple

from megatron_a2d.config import RunConfig


class Gpu(NamedTuple):
    """The first GPU of this machine; the others are taken to be alike."""

    name: str
    capability: tuple[int, int]  # 8.0 Ampere, 9.0 Hopper, 10.0 Blackwell

    @property
    def nvlink_domain(self) -> int:
        """GPUs that NVLink connects: 72 in the racks with Grace processors, 8 in other servers."""
        return 72 if self.name.removeprefix("NVIDIA ").startswith(("GB200", "GB300")) else 8


def environment(config: RunConfig, gpu: Gpu | None) -> dict[str, str]:
    """The variables of a training process on `gpu`; none without one."""
    if gpu is None:
        return {}
    parallel, performance = config.parallel, config.performance
    values = {
        # Buffers of varying size, such as those of routed tokens, leave no unusable holes.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # Memory of tensors that were sent is free as soon as the sender drops them.
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    }
    if performance.overlap_moe_expert_parallel_comm:
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # its two streams must not queue behind one another
    elif gpu.capability < (10, 0) and max(parallel.tensor_model_parallel_size, parallel.context_parallel_size) > 1:
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels start in the order of the calls: communication first
    if gpu.capability >= (10, 0):
        values["NCCL_NVLS_ENABLE"] = "0"  # NVLink SHARP takes memory that the model needs
    if performance.cuda_graph_impl != "none":
        values["NCCL_GRAPH_REGISTER"] = "0"  # registered buffers and expandable segments fault
    if parallel.moe_token_dispatcher_type == "flex" and performance.moe_flex_dispatcher_backend == "hybridep":
        domain = gpu.nvlink_domain
        values["NVLINK_DOMAIN_SIZE"] = str(domain)
        values["USE_MNNVL"] = "1" if domain > 8 else "0"
        ranks = min(domain, parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
        values["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = str(ranks)
    return values


def own_cores(allowed: Sequence[int], local_rank: int, local_world_size: int) -> list[int]:
    """This process's share of the machine's cores: neighbours, so that a process stays on its side of the machine."""
    cores = sorted(allowed)
    share = len(cores) // local_world_size
    return cores[local_rank * share : (local_rank + 1) * share] if share else cores


def find_gpu() -> Gpu | None:
    """Asked of the driver, without starting CUDA; None on a machine without an NVIDIA GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: nvml.nvmlInit_v2(),
        lambda: nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)),
        lambda: nvml.nvmlDeviceGetName(device, name, len(name)),
        lambda: nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)),
    )
    if any(call() for call in calls):
        return None
    return Gpu(name.value.decode(), (major.value, minor.value))


def as_text(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(values.items())) or "nothing to set without a GPU"


def apply(config: RunConfig) -> dict[str, str]:
    """Set what `environment` says in this process, and bind it to its cores; returns the variables."""
    values = environment(config, gpu := find_gpu())
    os.environ.update(values)
    if gpu is not None and hasattr(os, "sched_setaffinity"):
        rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.sched_setaffinity(0, own_cores(list(os.sched_getaffinity(0)), rank, size))
    return values
