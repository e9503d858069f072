"""Dense matrix rates of GPUs, by NVIDIA's data sheets: MFU is measured against them, the planner divides by them."""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Teraflop/s without sparsity."""

    bf16_tflops: float
    fp8_tflops: float | None  # None: it computes nothing in FP8


RATES = {
    "A100": Rates(312, None), "H100": Rates(989, 1979), "H200": Rates(989, 1979), "B200": Rates(2250, 4500),
    "GB200": Rates(2500, 5000),
}  # fmt: skip


def rates_of(name: str) -> Rates | None:
    """Of the GPU that is in `name`, such as NVIDIA H100 80GB HBM3; None where it is none of these."""
    known = [gpu for gpu in RATES if gpu in name]
    return RATES[max(known, key=len)] if known else None  # GB200 is not B200
