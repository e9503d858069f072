"""Benchmark of masked attention in tiles, against a dense mask: block diffusion on a CPU.

    python -m bench.block_attention [--rounds 5] [--out bench/results/block_attention_cpu.json]

Forward and backward pass of one layer's attention, 8 heads of 64, blocks of 32, for samples of 512 to 4,096 tokens:
twice as many positions, of whose pairs a quarter is open. The sides take turns; peak memory is the growth of a separate
process during one pass. Ratios are above 1 where tiles are faster.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from bench.paired import compare, in_process
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.diffusion.attention_masks import encoded_mask
from megatron_a2d.model.masked_attention import Mask, dense_mask, sparse_attention
from megatron_a2d.terminal.console import entry_point

BLOCK, HEADS, HEAD_SIZE = 32, 8, 64
LENGTHS, SMALL_LENGTHS = (512, 1024, 2048, 4096), (256,)
KINDS = ("dense mask", "tiles")


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="a short sample alone")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    lengths = SMALL_LENGTHS if options.rehearse else LENGTHS
    figures, compared = [], []
    for length in lengths:
        sides = {kind: in_process(attention(kind, length)) for kind in KINDS}
        name = f"block diffusion, {length:,} tokens"
        compared.append(compare(name, sides, [("dense mask", "tiles")], rounds=options.rounds))
        memory = {kind: peak_bytes(kind, length) for kind in KINDS}
        figures += [Figure(f"peak memory, {length:,} tokens, {kind}", "bytes", [float(memory[kind])]) for kind in KINDS]
        print(f"{name}: peak memory {memory['tiles'] / max(1, memory['dense mask']):.2f} of a dense mask's")
    settings = {"block_length": BLOCK, "num_attention_heads": HEADS, "head_dim": HEAD_SIZE, "lengths": lengths}
    write(options.out, "block_attention", compared, figures, settings)


def attention(kind: str, length: int) -> Callable[[], None]:
    """One forward and backward pass, the mask included that a micro-batch's layers share."""
    starts = torch.arange(length) // BLOCK * BLOCK
    encoded = encoded_mask(None, None, torch.cat([2 * starts, 2 * starts + 1])[None], 2 * length)
    assert encoded is not None
    mask = Mask(encoded, slice(0, 2 * length), causal=False)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2 * length, 1, HEADS, HEAD_SIZE, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(2 * length, 1, HEADS, HEAD_SIZE, generator=generator)

    def run() -> None:
        if kind == "tiles":
            output = sparse_attention(tensors[0], tensors[1], tensors[2], mask, None)
            assert output is not None
        else:
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in tensors)
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(mask))
            output = output.permute(2, 0, 1, 3)
        torch.autograd.grad(output, tensors, gradient)

    return run


def peak_bytes(kind: str, length: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        return workers.apply(_resident_growth, (kind, length))


def _resident_growth(kind: str, length: int) -> int:
    """Growth of the process's resident size during one pass, at its largest; after a short pass."""
    attention(kind, 256)()
    run = attention(kind, length)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size begins anew
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    entry_point(main)
