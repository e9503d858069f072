"""One switch: CUDA where there is one, else the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def has_cuda() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """This process's device; under torchrun one GPU each, by LOCAL_RANK."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_cuda() else torch.device("cpu")


def compute_capability() -> tuple[int, int] | None:
    """(9, 0) for Hopper, (10, 0) for Blackwell; None on a CPU."""
    return torch.cuda.get_device_capability() if has_cuda() else None


def send(tensor: Tensor) -> Tensor:
    """A tensor of the host on this process's device; on a GPU without waiting for what that does at the moment."""
    if tensor.is_cuda or not has_cuda():
        return tensor
    return tensor.pin_memory().to(device(), non_blocking=True)


def communication_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


# Dense bfloat16 matrix rate by NVIDIA's data sheets, operations a second.
_PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops() -> float | None:
    """The GPU's dense bf16 peak, for MFU; None on a CPU or an unknown GPU."""
    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for key, rate in _PEAK_FLOPS.items() if key in name), None)
