"""GPUs by NVIDIA's data sheets: dense matrix rates (MFU is measured against them, the planner divides by them), and the
compute capability, which says what they can compute in."""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Teraflop/s without sparsity."""

    bf16_tflops: float
    fp8_tflops: float | None  # None: it computes nothing in FP8
    compute_capability: float


RATES = {
    "A100": Rates(312, None, 8.0), "H100": Rates(989, 1979, 9.0), "H200": Rates(989, 1979, 9.0),
    "H100 PCIe": Rates(756, 1513, 9.0), "H100 NVL": Rates(835, 1671, 9.0), "H200 NVL": Rates(835, 1671, 9.0),
    "B200": Rates(2250, 4500, 10.0), "GB200": Rates(2500, 5000, 10.0),
}  # fmt: skip


def rates_of(name: str) -> Rates | None:
    """Of the GPU that is in `name`, such as NVIDIA H100 80GB HBM3; None where it is none of these."""
    known = [gpu for gpu in RATES if gpu in name]
    return RATES[max(known, key=len)] if known else None  # GB200 is not B200
