"""Environment of a process: its rank as set by torchrun, and the variables and CPU affinity that it sets itself.

CUDA, NCCL and torch's allocator read most variables once, at initialisation. `apply` therefore runs before CUDA is
initialised, and queries the GPU through the driver (NVML). The values computed here override those that were set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.errors import UserError


def world_size() -> int:
    """Number of processes that torchrun (or Slurm through it) started; 1 without it."""
    return _set_by_torchrun("WORLD_SIZE", 1)


def rank() -> int:
    """Global rank of this process; 0 without torchrun."""
    return _set_by_torchrun("RANK", 0)


def _set_by_torchrun(name: str, otherwise: int) -> int:
    value = os.environ.get(name, str(otherwise))
    if not value.isdecimal():
        raise UserError(f"{name}={value}: this environment variable, which torchrun sets, is not a number; unset it")
    return int(value)


def check_launch() -> None:
    """UserError if Slurm started several processes that would each run alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS {tasks}: srun started this process {tasks} times without a RANK, and each would run alone; "
            "let torchrun start them: `srun --ntasks-per-node 1 launch/node.sh -m megatron_a2d.train ...`"
        )


class Gpu(NamedTuple):
    """The first GPU of this machine; the others are assumed to be the same."""

    name: str
    capability: tuple[int, int]  # 8.0 Ampere, 9.0 Hopper, 10.0 Blackwell

    @property
    def nvlink_domain(self) -> int:
        """GPUs connected by NVLink: 72 in GB200 NVL72 racks, 8 in other servers."""
        return 72 if self.name.removeprefix("NVIDIA ").startswith(("GB200", "GB300")) else 8


def environment(config: RunConfig, gpu: Gpu | None) -> dict[str, str]:
    """Environment variables of a training process on `gpu`; empty without one."""
    if gpu is None:
        return {}
    parallel, performance = config.parallel, config.performance
    values = {
        # Avoids fragmentation by buffers of varying size, such as those of routed tokens.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # The memory of sent tensors is free as soon as the sender drops them.
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    }
    if performance.overlap_moe_expert_parallel_comm:
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # the two streams must not serialise
    elif gpu.capability < (10, 0) and max(parallel.tensor_model_parallel_size, parallel.context_parallel_size) > 1:
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # kernels start in the order of launch: communication first
    if _communicates_beside_norms(config):
        # Norms leave multiprocessors to concurrent communication (NVIDIA's recipes: 20 of 132 or 148).
        values["NVTE_FWD_LAYERNORM_SM_MARGIN"] = values["NVTE_BWD_LAYERNORM_SM_MARGIN"] = "20"
    if gpu.capability >= (10, 0):
        values["NCCL_NVLS_ENABLE"] = "0"  # NVLink SHARP needs memory that the model can use
        if performance.fp8_recipe in ("auto", "mxfp8"):
            # Norms whose output is MXFP8 (NVIDIA's recipe for B200: "marginal").
            values["NVTE_NORM_FWD_USE_CUDNN"] = values["NVTE_NORM_BWD_USE_CUDNN"] = "1"
    if performance.use_transformer_engine_op_fuser:
        values["NVTE_CUTEDSL_FUSED_GROUPED_MLP"] = (
            "1"  # megatron.core requires it for SwiGLU experts of fusible operations
        )
    if performance.cuda_graph_impl != "none":
        values["NCCL_GRAPH_REGISTER"] = "0"  # registered buffers fault with expandable segments
    if parallel.moe_token_dispatcher_type == "flex" and performance.moe_flex_dispatcher_backend != "deepep":
        domain = gpu.nvlink_domain
        values["NVLINK_DOMAIN_SIZE"] = str(domain)
        values["USE_MNNVL"] = "1" if domain > 8 else "0"
        ranks = min(domain, parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
        values["NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"] = str(ranks)
        if gpu.capability >= (10, 0):
            values["NUM_OF_TOKENS_PER_CHUNK_COMBINE_API"] = "128"  # as in all of NVIDIA's recipes for Blackwell
    return values


def _communicates_beside_norms(config: RunConfig) -> bool:
    parallel, performance = config.parallel, config.performance
    if config.training.transformer_impl == "local":
        return False  # the variables are Transformer Engine's
    return (
        parallel.overlap_grad_reduce
        or parallel.overlap_param_gather
        or performance.overlap_moe_expert_parallel_comm
        or parallel.virtual_pipeline_size is not None
    )


def own_cores(
    allowed: Collection[int],
    near: Sequence[Collection[int]],
    local_rank: int,
    first_thread: Mapping[int, int] | None = None,
) -> list[int]:
    """Cores of this process: its share of the cores near its GPU, divided among the processes near the same cores.

    `near[r]`: the cores on the NUMA node of rank r's GPU; empty if unknown, in which case nothing is bound.
    `first_thread`: logical core -> first logical core on the same physical one; these are kept together.
    """
    mine = frozenset(near[local_rank])
    sharers = [rank for rank, cores in enumerate(near) if frozenset(cores) == mine]
    order = first_thread or {}
    cores = sorted(mine & set(allowed), key=lambda core: (order.get(core, core), core))
    if not cores:
        return sorted(allowed)
    share, place = len(cores) // len(sharers), sharers.index(local_rank)
    return sorted(cores[place * share : (place + 1) * share] if share else cores)


def find_near_cores(num_gpus: int) -> list[list[int]]:
    """The cores on the NUMA node of each of this machine's first GPUs, in the order of CUDA_VISIBLE_DEVICES.

    From the driver and the kernel (local_cpulist of the GPU's PCI device); empty where either does not provide it.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible or [str(number) for number in range(num_gpus)]
    return [_near_cores(names[number]) if number < len(names) else [] for number in range(num_gpus)]


def _near_cores(gpu: str) -> list[int]:
    """`gpu`: its index or its UUID."""
    nvml = _nvml()
    device, pci = ctypes.c_void_p(), _PciInfo()
    if nvml is None:
        return []
    if gpu.isdecimal():
        code = nvml.nvmlDeviceGetHandleByIndex_v2(int(gpu), ctypes.byref(device))
    else:
        code = nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device))
    if code or nvml.nvmlDeviceGetPciInfo_v3(device, ctypes.byref(pci)):
        return []
    name = f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"
    try:
        return parse_cpu_list(Path(f"/sys/bus/pci/devices/{name}/local_cpulist").read_text())
    except (OSError, ValueError):
        return []


def parse_cpu_list(text: str) -> list[int]:
    """The cores of a list in the kernel's notation: 0-55,112-167."""
    cores: list[int] = []
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _first_threads(cores: Collection[int]) -> dict[int, int]:
    known = {}
    for core in cores:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        with contextlib.suppress(OSError, ValueError):
            known[core] = min(parse_cpu_list(path.read_text()), default=core)
    return known


class _PciInfo(ctypes.Structure):
    """NVML's nvmlPciInfo_t."""

    _fields_ = (
        ("bus_id_legacy", ctypes.c_char * 16), ("domain", ctypes.c_uint), ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint), ("device_id", ctypes.c_uint), ("subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    )  # fmt: skip


def _nvml() -> ctypes.CDLL | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


def find_gpu() -> Gpu | None:
    """The first GPU, queried through the driver without initialising CUDA; None without an NVIDIA GPU."""
    nvml = _nvml()
    if nvml is None:
        return None
    device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)),
        lambda: nvml.nvmlDeviceGetName(device, name, len(name)),
        lambda: nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)),
    )
    if any(call() for call in calls):
        return None
    return Gpu(name.value.decode(), (major.value, minor.value))


def as_text(values: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(values.items())) or "nothing to set without a GPU"


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors. It would return large blocks to the kernel, which fills them with
    zeros when they are allocated again, one page at a time: up to 8% of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_TRIM_THRESHOLD, _LARGEST_INT)
        # Older versions refuse more than 32 MiB.
        set_option(_M_MMAP_THRESHOLD, _LARGEST_INT) or set_option(_M_MMAP_THRESHOLD, 2**25)


# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_INT = 2**31 - 1


def apply(config: RunConfig) -> dict[str, str]:
    """Set the variables of `environment` in this process, and bind it to its cores; returns the variables."""
    values = environment(config, gpu := find_gpu())
    os.environ.update(values)
    if gpu is None:
        keep_freed_memory()
    if gpu is not None and hasattr(os, "sched_setaffinity"):
        local_rank, size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, own_cores(allowed, find_near_cores(size), local_rank, _first_threads(allowed)))
    return values
