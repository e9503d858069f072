"""Device selection: CUDA if available, else the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from megatron_a2d.config.gpus import rates_of


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's device; under torchrun one GPU each, by LOCAL_RANK."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else torch.device("cpu")


def compute_capability() -> tuple[int, int] | None:
    """(9, 0) for Hopper, (10, 0) for Blackwell; None on a CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else None


def cuda_version() -> tuple[int, int] | None:
    """The CUDA version that torch was built for, (12, 9); None without CUDA."""
    version = torch.version.cuda
    return (int(version.split(".")[0]), int(version.split(".")[1])) if version else None


def send(tensor: Tensor) -> Tensor:
    """Copy a host tensor to this process's device; asynchronous on a GPU."""
    if tensor.is_cuda or not has_cuda():
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def communication_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


def peak_flops() -> float | None:
    """The GPU's dense bf16 peak in FLOP/s, for MFU; None on a CPU or an unknown GPU."""
    rates = rates_of(torch.cuda.get_device_name()) if has_cuda() else None
    return rates.bf16_tflops * 1e12 if rates else None
