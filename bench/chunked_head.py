"""Benchmark of LM head and loss at masked positions in chunks, against two simpler implementations.

    python -m bench.chunked_head [--rounds 7] [--out bench/results/masked_head_cpu.json]
    python -m bench.chunked_head --device cuda --out FILE.json

Forward and backward pass of LM head and cross-entropy with Qwen3's vocabulary. Half of the positions are masked, the
mean of a linear schedule.

chunks       masked positions, logits in chunks (model/chunked_cross_entropy.py)
masked rows  masked positions, all logits materialised, megatron.core's vocab_parallel_cross_entropy
all rows     all positions, all logits materialised

The three take turns; on a CPU, peak memory is the increase in a separate process for each.
"""

from __future__ import annotations

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from typing import Any

import torch

from bench.paired import compare, in_process
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError

KINDS = ("chunks", "masked rows", "all rows")
# vocabulary, hidden size, rows
CPU_SIZES, GPU_SIZES, SMALL_SIZES = (151_936, 256, 2_048), (151_936, 4096, 16_384), (2_048, 32, 256)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    add_arguments(parser, rounds=7)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; leave it out")
    sizes = SMALL_SIZES if options.rehearse else GPU_SIZES if options.device == "cuda" else CPU_SIZES
    measure_peak = gpu_peak_bytes if options.device == "cuda" else cpu_peak_bytes
    memory = {kind: measure_peak(kind, sizes) for kind in KINDS}
    synchronise = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    sides = {kind: in_process(head_and_loss(kind, sizes), synchronise) for kind in KINDS}
    compared = compare("LM head and loss", sides, [("chunks", kind) for kind in KINDS[1:]], rounds=options.rounds)
    figures = [Figure(f"peak memory, {kind}", "bytes", [float(peak)]) for kind, peak in memory.items()]
    settings = {"vocabulary": sizes[0], "hidden": sizes[1], "num_rows": sizes[2], "num_masked": sizes[2] // 2}
    write(options.out, "masked_head", [compared], figures, settings)


def head_and_loss(kind: str, sizes: tuple[int, int, int]) -> Callable[[], Any]:
    """One forward and backward pass; on a GPU in bf16, with gradients accumulated in fp32 as in training."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.megatron_compat.device import device, has_cuda
    from megatron_a2d.model.chunked_cross_entropy import _MaskedHead, rows_per_chunk

    process_groups.initialize(build({}).parallel)
    group = parallel_state.get_tensor_model_parallel_group()
    vocabulary, hidden_size, rows = sizes
    dtype = torch.bfloat16 if has_cuda() else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).mul_(0.02).to(device(), dtype).requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    hidden = torch.randn(rows, hidden_size, generator=generator).to(device(), dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator).to(device())
    masked = torch.arange(0, rows, 2, device=device())
    chunk = rows_per_chunk(vocabulary, device().type)

    def run() -> None:
        if kind == "chunks":
            losses, _ = _MaskedHead.apply(hidden[masked], weight, labels[masked], group, chunk)
            losses.sum().backward()
        else:
            chosen = masked if kind == "masked rows" else torch.arange(rows, device=device())
            logits = torch.nn.functional.linear(hidden[chosen], weight).float()
            losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels[chosen])
            (losses * (chosen % 2 == 0)).sum().backward()
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined, arg-type]
        weight.grad = None

    return run


def cpu_peak_bytes(kind: str, sizes: tuple[int, int, int]) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(_resident_growth, (kind, sizes))


def _resident_growth(kind: str, sizes: tuple[int, int, int]) -> int:
    """Growth of the process's largest resident size during one run."""
    run = head_and_loss(kind, sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def gpu_peak_bytes(kind: str, sizes: tuple[int, int, int]) -> int:
    """Peak memory of the second run, since the first one compiles."""
    run = head_and_loss(kind, sizes)
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    entry_point(main)
