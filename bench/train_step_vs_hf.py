"""Benchmark of our training step on a GPU against Hugging Face's model, torch's AdamW, the same shape and batch.

    python -m bench.train_step_vs_hf --shapes qwen3_8b qwen3_30b_a3b --out FILE.json
    python -m bench.train_step_vs_hf --rehearse --out FILE.json # the same on a CPU, tiny

On a CPU: bench.cpu_train_step. On a GPU, where two models do not fit, the variants run one after another, --rounds
steps each: Transformer Engine and local layers, bf16 and FP8, natural and force-balanced routing. A variant that fails
is recorded with its error, and the next one runs; --out is rewritten after each. All variants of a shape have the same
batch: one that needs more memory splits it into more and smaller micro-batches.

tokens/s   of the step: data, forward, backward, update
TFLOP/s    by the bidirectional formula (model/flops.py), with the positions that reached the LM head
MFU        relative to the bf16 GEMM rate measured on this GPU in this run
layer MFU  MFU of the difference between all layers and half of them, without LM head and embedding. For a shape with
           fewer layers than its model, this is the number that applies to the model
ratios     of tokens/s, to the fastest of Hugging Face's variants and, for FP8, to bf16
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.result_tables import can_compile, machine, matrix_rate
from bench.shapes import SHAPES, Shape, rehearsal
from bench.train_step_variants import Batches, Step, hugging_face_step, model_config_of, our_step, uses_engine
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each, after the warm-up")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models")
    parser.add_argument("--variants", nargs="+", default=None, help="only these variants")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not (options.rehearse or torch.cuda.is_available()):
        raise UserError(
            "bench.train_step_vs_hf: this machine has no CUDA device; use --rehearse, or bench.cpu_train_step"
        )
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: must be at least 1")
    engine = uses_engine(options.rehearse)
    shapes = {name: rehearsal(SHAPES[name]) if options.rehearse else SHAPES[name] for name in options.shapes}
    known = {name for shape in shapes.values() for on_gpu in (True, False) for name in variants(shape, on_gpu, on_gpu)}
    if unknown := [name for name in options.variants or [] if name not in known]:
        raise UserError([f"--variants {name}: is not one of {'; '.join(sorted(known))}" for name in unknown])
    one_by_one(shapes, options.variants, options.rounds, options.out, engine)


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


_FUSED = dict(apply_rope_fusion=True, gradient_accumulation_fusion=True)
_FUSED_EXPERTS = dict(moe_permute_fusion=True, moe_router_fusion=True)


_HUGGING_FACE = "hugging_face"


def variants(shape: Shape, transformer_engine: bool, gpu: bool) -> dict[str, dict[str, Any]]:
    """Variant -> settings, in the order of measurement; for Hugging Face's model, arguments of `hugging_face_step`."""
    experts = _FUSED_EXPERTS if can_compile() else {"moe_router_fusion": True}  # permutation is triton's
    engine = _FUSED | (experts if shape.is_moe else {})
    theirs: dict[str, dict[str, Any]] = {_HUGGING_FACE: {}}
    if shape.is_moe:
        theirs = {f"{_HUGGING_FACE}, {name}": {"experts": name} for name in ("grouped_mm", "eager")}
    result: dict[str, dict[str, Any]] = {}
    if transformer_engine:
        result["bf16"] = engine
        result["fp8"] = engine | {"fp8_recipe": "auto"}
    if gpu:
        result |= theirs
    if shape.is_moe and transformer_engine:
        result["bf16, force-balanced"] = engine | {"moe_router_force_load_balancing": True}
        result["fp8, force-balanced"] = engine | {"fp8_recipe": "auto", "moe_router_force_load_balancing": True}
    result["bf16, portable"] = {"transformer_impl": "local"}
    if shape.is_moe:
        result["bf16, portable, force-balanced"] = {
            "transformer_impl": "local", "moe_router_force_load_balancing": True,
        }  # fmt: skip
    if not gpu:
        result |= theirs
    if transformer_engine:
        result["bf16, unfused"] = {"transformer_impl": "transformer_engine"}
        result["fp8, blockwise"] = engine | {"fp8_recipe": "blockwise"}
    if transformer_engine and gpu:
        result["bf16, graphs"] = engine | {"cuda_graph_impl": "transformer_engine"}
    return result


def one_by_one(shapes: dict[str, Shape], chosen: list[str] | None, rounds: int, out: Path | None, engine: bool) -> None:
    """Measure every variant of every shape; `out` is rewritten after each."""
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import environment

    environment.apply(build({}))  # read at CUDA's initialisation, in the next line
    gpu = torch.cuda.is_available()
    peak = matrix_rate()
    result: dict[str, Any] = {"machine": machine(), "matrix_tflops": peak / 1e12, "rows": []}
    print(f"matrix rate, bf16: {peak / 1e12:.1f} TFLOP/s", flush=True)
    for name, shape in shapes.items():
        known = variants(shape, engine, gpu)
        for variant, settings in known.items():
            if chosen is not None and variant not in chosen:
                continue
            row: dict[str, Any] = {"shape": name, "layers": shape.layers, "variant": variant}
            row |= largest_that_fits(shape, variant, settings, rounds, peak)
            result["rows"].append(row)
            result["ratios"] = ratios(result["rows"])
            if out:
                write_json(out, result)
            free_memory()
            if shape.is_cut and variant in _OF_LAYERS and "error" not in row:
                half = shape._replace(layers=shape.layers // 2, **_sizes(row))
                row |= of_layers(row, largest_that_fits(half, variant, settings, rounds, peak), peak)
                if out:
                    write_json(out, result)
                free_memory()
            print(_line(row), flush=True)
    for shape_name, values in result.get("ratios", {}).items():
        for name, value in values.items():
            print(f"{shape_name:14} {name}: {value:.2f}x", flush=True)
    if out:
        write_json(out, result)


# Variants whose layers are also measured separately: those with targets, and the local layers for comparison.
_OF_LAYERS = ("bf16", "bf16, force-balanced", "bf16, portable")


def _sizes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("micro_batch_size", "num_microbatches")}


def of_layers(whole: dict[str, Any], half: dict[str, Any], peak: float) -> dict[str, Any]:
    """Results of the layers alone, from a row and the row with half of the layers and the same batch."""
    if "error" in half or _sizes(half) != _sizes(whole):
        return {"half": half}
    tokens = whole["micro_batch_size"] * whole["num_microbatches"] * whole["seq_length"]
    longer = statistics.median(whole["seconds"]) - statistics.median(half["seconds"])
    if longer <= 0:  # times of a rehearsal are arbitrary
        return {"half": half}
    operations = tokens * (whole["flops_per_token"] - half["flops_per_token"])
    return {"half": half, "layer_tflops": operations / longer / 1e12, "layer_mfu": operations / longer / peak}


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ratios by shape and variant: tokens/s over Hugging Face's fastest variant, and FP8 over bf16.

    Their router cannot be force-balanced, so variants that are have no ratio to theirs.
    """
    speed = {(row["shape"], row["variant"]): row["tokens_per_second"] for row in rows if "error" not in row}
    found: dict[str, dict[str, float]] = {}
    for shape, variant in speed:
        theirs = [value for (s, v), value in speed.items() if s == shape and v.startswith(_HUGGING_FACE)]
        ours, own = speed[shape, variant], found.setdefault(shape, {})
        if theirs and not variant.startswith(_HUGGING_FACE) and "balanced" not in variant:
            own[f"{variant} over {_HUGGING_FACE}"] = ours / max(theirs)
        plain = variant.replace("fp8", "bf16").removesuffix(", blockwise")
        if variant.startswith("fp8") and (shape, plain) in speed:
            own[f"{variant} over {plain}"] = ours / speed[shape, plain]
    return found


def largest_that_fits(shape: Shape, variant: str, settings: dict[str, Any], rounds: int, peak: float) -> dict[str, Any]:
    """`measure` with the shape's micro-batches, or, if memory does not suffice, with more and smaller ones.

    Any other failure is returned as "error", so that the other variants are still measured.
    """
    size, count = shape.micro_batch_size, shape.num_microbatches
    while True:
        try:
            smaller = shape._replace(micro_batch_size=size, num_microbatches=count)
            return measure(smaller, variant, settings, rounds, peak)
        except torch.OutOfMemoryError as problem:
            error = f"out of memory at a micro-batch of {size}: {_one_line(problem)}"
        except Exception as problem:
            traceback.print_exc()
            return {"error": _one_line(problem)}
        free_memory()  # the exception, whose frames hold the model, has been released here
        if size == 1:
            return {"error": error}
        size, count = size // 2, count * 2


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:500] or type(problem).__name__


def measure(shape: Shape, variant: str, settings: dict[str, Any], rounds: int, peak: float) -> dict[str, Any]:
    """Build one variant, run its steps, and return their speed."""
    from megatron_a2d.model.flops import train_flops_per_token

    model = shape.config()
    batches = Batches(shape.micro_batch_size, shape.seq_length, model["mask_token_id"], shape.num_microbatches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step: Step
    if variant.startswith(_HUGGING_FACE):
        step = hugging_face_step(model, batches, device, bf16=True, **settings)
    else:
        step = our_step(model, batches, {"bf16": True, **settings})
    # Warm-up: autotuning, compilation, and graph capture, which happens after the third step.
    warm_up = [seconds(step.run) for _ in range(6 if "cuda_graph_impl" in settings else 3)]
    times = [seconds(step.run) for _ in range(rounds)]
    tokens_per_second = batches.global_batch_size * shape.seq_length / statistics.median(times)
    flops = train_flops_per_token(model_config_of(model), shape.seq_length, head_fraction=step.head_fraction())
    return {
        "settings": settings,
        "micro_batch_size": shape.micro_batch_size,
        "num_microbatches": shape.num_microbatches,
        "seq_length": shape.seq_length,
        "seconds": times,
        "warm_up_seconds": warm_up,
        "tokens_per_second": tokens_per_second,
        "head_fraction": step.head_fraction(),
        "flops_per_token": flops,
        "tflops": tokens_per_second * flops / 1e12,
        "mfu": tokens_per_second * flops / peak,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def free_memory() -> None:
    """Free the previous variant. megatron's DistributedDataParallel is kept alive by its autograd hooks.

    Its process groups are destroyed as well: each has a thread that is never entirely idle.
    """
    from megatron.core.distributed import DistributedDataParallel

    from megatron_a2d.distributed import process_groups

    process_groups.finalize()
    for item in gc.get_objects():
        if issubclass(type(item), DistributedDataParallel):  # isinstance() asks what a weak proxy stands for
            item.grad_accs.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    head = f"{row['shape']:14} {row['variant']:30}"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    memory = row["peak_memory_gb"]
    layers = f" (layers {row['layer_mfu']:6.1%})" if "layer_mfu" in row else ""
    rate = f"{row['tokens_per_second']:9.0f} tokens/s {row['tflops']:7.1f} TFLOP/s  MFU {row['mfu']:6.1%}{layers}"
    return f"{head} {rate}" + (f"  {memory:.1f} GB" if memory else "")


if __name__ == "__main__":
    entry_point(main)
