"""Measurements of bench.scaling at one size, each in a separate process: prints a JSON list of values.

    python -m bench.scaling_jobs NAME SIZE [REPEATS]     # with torchrun where SIZE is a number of processes

Times are CPU seconds: of a step and a save those of the busiest process, else of the whole process.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.cpu_train_step import SHAPES

SAMPLE_LENGTH, DOCUMENT_LENGTH = 64, 1 << 20  # tokens
DENSE, MOE = SHAPES["dense"], SHAPES["moe"]


def main(name: str, size: int, repeats: int = 5) -> None:
    warnings.filterwarnings("ignore")
    values = JOBS[name](size, repeats)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(values), flush=True)


def repeated(run: Callable[[], object], repeats: int, shortest: float = 0.0) -> list[float]:
    """CPU seconds of a run, measured `repeats` times, after one warm-up.

    With `shortest` each value is the mean of as many runs as take so many seconds; not where ranks wait for each other.
    """
    begin = time.process_time()
    run()
    count = max(1, int(shortest / max(1e-6, time.process_time() - begin)))
    values = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(count):
            run()
        values.append((time.process_time() - begin) / count)
    return values


def busiest(values: list[float]) -> list[float]:
    """Of all ranks' values the largest, each."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return list(map(float, found))


def state_and_step(model: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any, Callable[[], None]]:
    """Configuration and training state of a model with random weights on all processes, and its step."""
    import torch

    from bench.train_step_variants import LEARNING_RATE, Batches, model_config_of
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training import data_setup, initialization, train_step

    torch.set_num_threads(1)
    model_config = model_config_of(model)
    config = build(settings | {"lr": LEARNING_RATE, "num_workers": 0})
    process_groups.initialize(config.parallel)
    state = initialization.build_train_state(model_config, config)
    initialization.draw_weights(state, config.data.seed, model_config.initializer_range)
    samples = Batches(settings["micro_batch_size"], settings["seq_length"], model["mask_token_id"])
    batches = data_setup.micro_batches(config, model_config, samples, 1, 0)  # type: ignore[arg-type]

    def step() -> None:
        state.scheduler.step(1)
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        train_step.train_step(state.chunks, state.optimizer, iteration)

    return config, state, step


def step_time(model: dict[str, Any], repeats: int, **settings: Any) -> list[float]:
    """CPU seconds of a step, of the busiest rank."""
    from megatron_a2d.distributed import process_groups

    _, _, step = state_and_step(model, {"seq_length": 256, "micro_batch_size": 2, "global_batch_size": 2} | settings)
    values = busiest(repeated(step, repeats))
    process_groups.finalize()
    return values


def save_time(size: int, repeats: int) -> list[float]:
    """CPU seconds of the busiest rank to write a checkpoint of one model, sharded over `size` data-parallel ranks."""
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training.checkpointing import CheckpointWriter

    root = Path(os.environ["A2D_BENCH_WORK"])  # the same on all ranks
    files = root / "hf"
    files.mkdir(exist_ok=True)
    (files / "config.json").write_text(json.dumps(DENSE))
    settings = {"seq_length": 64, "micro_batch_size": 1, "global_batch_size": size, "use_distributed_optimizer": True}
    config, state, step = state_and_step(DENSE | {"hidden_size": 512}, settings | {"save": str(root / "run")})
    step()

    def save() -> None:
        state.iteration += 1
        CheckpointWriter(state, config, files).finish()

    values = busiest(repeated(save, repeats))
    process_groups.finalize()
    return values


def sparse_tokens(prefix: Path, num_documents: int, length: int) -> None:
    """A token file of zeros that takes no space: index as ours, tokens as a hole."""
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(2 * num_documents * length)
    with open(f"{prefix}.idx", "wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, num_documents, num_documents + 1))
        index.write(np.full(num_documents, length, "<i4").tobytes())
        index.write((np.arange(num_documents, dtype="<i8") * (2 * length)).tobytes())
        index.write(np.arange(num_documents + 1, dtype="<i8").tobytes())


def start_time(num_documents: int, length: int, repeats: int) -> list[float]:
    """CPU seconds to open a dataset and read its first and last sample."""
    from megatron_a2d.data.packed_dataset import PackedDataset

    with tempfile.TemporaryDirectory(dir=os.environ.get("A2D_BENCH_WORK")) as name:
        sparse_tokens(Path(name, "tokens"), num_documents, length)

        def start() -> None:
            dataset = PackedDataset(Path(name, "tokens"), SAMPLE_LENGTH, scan=False)
            dataset.tokens(0)
            dataset.tokens(num_documents * length // SAMPLE_LENGTH - 1)

        return repeated(start, repeats, shortest=0.05)


def conversion_memory(hidden_size: int, num_layers: int, num_experts: int) -> list[float]:
    """Peak bytes of convert_hf, without verification, on random weights."""
    from bench.process_tree import module, peak_memory
    from megatron_a2d.conversion.random_weights import write_synthetic
    from megatron_a2d.families.qwen3 import hub_config

    with tempfile.TemporaryDirectory(dir=os.environ.get("A2D_BENCH_WORK")) as name:
        shape: dict[str, Any] = dict(
            hidden_size=hidden_size, head_dim=16, moe_intermediate_size=hidden_size, vocab_size=1024,
            mask_token_id=1023, bos_token_id=0, eos_token_id=0, num_hidden_layers=num_layers, num_experts=num_experts,
        )  # fmt: skip
        write_synthetic(Path(name, "hf"), hub_config("30B-A3B", **shape))
        words = module(
            "checkpoints_tools.convert_hf", "--hf-model", f"{name}/hf", "--out", f"{name}/out", "--no-verify"
        )
        return [float(peak_memory(words))]


def search_time(gpus: int) -> list[float]:
    """CPU seconds of the planner's search for Qwen3-30B-A3B's recipe."""
    from megatron_a2d.config.cli import Parser, parse_run
    from megatron_a2d.config.named_models import named_model_config
    from megatron_a2d.planner.cluster import read_cluster
    from megatron_a2d.planner.search import search

    config, _ = parse_run(Parser(), ["--config", "launch/recipes/qwen3_30b_a3b.yaml"])
    assert config.training.model
    model_config, cluster = named_model_config(config.training.model), read_cluster("h100")
    begin = time.process_time()
    search(config, model_config, cluster, gpus)
    return [time.process_time() - begin]


JOBS: dict[str, Callable[[int, int], list[float]]] = {
    "tokens": lambda size, repeats: step_time(MOE, repeats, global_batch_size=size // 256),
    "length": lambda size, repeats: step_time(DENSE, repeats, seq_length=size, micro_batch_size=1, global_batch_size=1),
    "experts": lambda size, repeats: step_time(MOE | {"num_experts": size}, repeats),
    "data parallel": lambda size, repeats: step_time(
        DENSE, repeats, global_batch_size=16, use_distributed_optimizer=True
    ),
    "expert parallel": lambda size, repeats: step_time(
        MOE, repeats, global_batch_size=16, expert_model_parallel_size=size, use_distributed_optimizer=True,
        moe_router_force_load_balancing=True,
    ),
    "samples": lambda size, repeats: start_time(
        max(1, size * SAMPLE_LENGTH // DOCUMENT_LENGTH), min(size * SAMPLE_LENGTH, DOCUMENT_LENGTH), repeats
    ),
    "documents": lambda size, repeats: start_time(size, SAMPLE_LENGTH, repeats),
    "tensors": lambda size, _: conversion_memory(64, size // 393, 128),
    "tensor bytes": lambda size, _: conversion_memory(round((size / 2) ** 0.5), 2, 16),
    "ranks": save_time,
    "gpus": lambda size, _: search_time(size),
}  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
