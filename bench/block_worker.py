"""Worker of bench.block_attention: block diffusion's attention, or training steps, in the packages of any build.

Like step_worker.py, it answers each line on stdin with the times of one run as JSON; first it says how much memory a
run takes. Of the benchmarks, imports only those of the build.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def main(job: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    if job["dense"]:
        import_module("megatron_a2d.model.masked_attention").SHORTEST = sys.maxsize  # type: ignore[attr-defined]
    make: Callable[[dict[str, Any]], Callable[[], None]] = {"attention": attention, "step": step}[job["kind"]]
    if job["kind"] == "attention":
        make({**job, "length": 256})()
    run = make(job)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size begins anew
    before = _resident_bytes("VmRSS")
    run()
    print(json.dumps({"peak_bytes": _resident_bytes("VmHWM") - before}), file=answers, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        used = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(used), file=answers, flush=True)


def attention(job: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward pass of one layer's attention, and the making of the mask that all layers share."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    length, block, heads, head_size = job["length"], job["block_length"], job["heads"], job["head_size"]
    starts = torch.arange(length) // block * block
    levels = torch.cat([2 * starts, 2 * starts + 1])[None]
    config = TransformerConfig(num_layers=1, hidden_size=heads * head_size, num_attention_heads=heads)
    is_older = find_spec("megatron_a2d.model.layers") is not None
    layers = import_module("megatron_a2d.model.layers" if is_older else "megatron_a2d.model.local_layers")
    core = layers.CoreAttention(config, 1, AttnMaskType.no_mask, "self")

    def mask() -> torch.Tensor:
        if is_older:
            return ~import_module("megatron_a2d.diffusion.visibility").by_level(levels, levels)[:, None]
        found: torch.Tensor = import_module("megatron_a2d.diffusion.attention_masks").encoded_mask(
            None, None, levels, 2 * length
        )
        return found

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2 * length, 1, heads, head_size, generator=generator).requires_grad_() for _ in range(3)]
    gradient = torch.randn(2 * length, 1, heads * head_size, generator=generator)

    def run() -> None:
        torch.autograd.grad(core(*tensors, mask()), tensors, gradient)

    return run


def step(job: dict[str, Any]) -> Callable[[], None]:
    """A training step of one sample."""
    variants = import_module(next(name for name in ("bench.train_step_variants", "bench.steps") if find_spec(name)))
    batches = variants.Batches(1, job["length"], job["model"]["mask_token_id"], 1)
    settings = {"objective": "block", "block_length": job["block_length"]}
    run: Callable[[], None] = variants.our_step(job["model"], batches, settings).run
    return run


def _resident_bytes(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
