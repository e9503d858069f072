"""GPU data sheet values: dense peak FLOP/s, which MFU and the planner are based on, and compute capability.

Blackwell: NVIDIA's HGX B200 and GB200 NVL72 data sheets, whose sparse rates are halved (FP4: 18 and 20 PFLOP/s a GPU).
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Peak TFLOP/s without sparsity."""

    bf16_tflops: float
    fp8_tflops: float | None  # None: no FP8 support
    fp4_tflops: float | None  # None: no FP4 support
    compute_capability: float


RATES = {
    "A100": Rates(312, None, None, 8.0), "H100": Rates(989, 1979, None, 9.0), "H200": Rates(989, 1979, None, 9.0),
    "H100 PCIe": Rates(756, 1513, None, 9.0), "H100 NVL": Rates(835, 1671, None, 9.0),
    "H200 NVL": Rates(835, 1671, None, 9.0), "B200": Rates(2250, 4500, 9000, 10.0),
    "GB200": Rates(2500, 5000, 10000, 10.0),
}  # fmt: skip


def rates_of(name: str) -> Rates | None:
    """Rates of the GPU in `name`, such as NVIDIA H100 80GB HBM3; None for an unknown GPU."""
    known = [gpu for gpu in RATES if gpu in name]
    return RATES[max(known, key=len)] if known else None  # GB200 is not B200
