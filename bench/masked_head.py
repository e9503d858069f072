"""Head and loss on the masked rows alone, against head and loss on all rows.

    python -m bench.masked_head [--rounds 5] [--out bench/results/masked_head_cpu.json]

Forward and backward of the vocabulary projection and the cross-entropy, at Qwen3's vocabulary. Half of the rows are
masked, the mean of a linear schedule. Times are taken in turns; peak memory is that of a process of its own
for each, above what it held before.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.report import machine
from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point
from megatron_a2d.files import write_json

VOCABULARY, HIDDEN, ROWS = 151_936, 256, 2_048


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs after one warm-up")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    pool = multiprocessing.get_context("spawn")
    with pool.Pool(1, maxtasksperchild=1) as workers:
        memory = {kind: workers.apply(peak_bytes, (kind,)) for kind in ("masked rows", "all rows")}
    masked, full = head_and_loss("masked rows"), head_and_loss("all rows")
    times = [(seconds(masked), seconds(full)) for _ in range(options.rounds + 1)][1:]
    time_ratio = statistics.median(a / b for a, b in times)
    memory_ratio = memory["masked rows"] / memory["all rows"]
    for kind, column in zip(memory, zip(*times, strict=True), strict=True):
        print(f"{kind:12} {statistics.median(column):.3f} s   peak {memory[kind] / 1e6:.0f} MB")
    print(f"{'ratio':12} {time_ratio:.2f}          {memory_ratio:.2f}")
    if options.out:
        sizes = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "rows": ROWS, "masked": ROWS // 2}
        ratios = {"time_ratio": time_ratio, "memory_ratio": memory_ratio}
        write_json(options.out, {"machine": machine(), **sizes, **ratios, "seconds": times, "peak_bytes": memory})


def head_and_loss(kind: str) -> Callable[[], Any]:
    """One forward and backward: the projection by torch's linear, the cross-entropy that the model uses."""
    from megatron.core import tensor_parallel

    from megatron_a2d.config import build
    from megatron_a2d.training import parallel

    parallel.initialize(build({}).parallel)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).mul_(0.02).requires_grad_()
    weight.grad = torch.zeros_like(weight)  # training accumulates into a buffer that is there already
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    has_loss = torch.arange(ROWS) % 2 == 0

    def run() -> None:
        rows = has_loss if kind == "masked rows" else torch.ones_like(has_loss)
        logits_NV = torch.nn.functional.linear(hidden[rows], weight).float()
        losses_N = tensor_parallel.vocab_parallel_cross_entropy(logits_NV, labels[rows])
        (losses_N * has_loss[rows]).sum().backward()

    return run


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def peak_bytes(kind: str) -> int:
    """Growth of the process's largest resident size during one run."""
    run = head_and_loss(kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    entry_point(main)
