"""Short runs on one GPU, for the tests; also `torchrun -m tests.gpu.gpu_train JSON` on several, for their layouts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

REHEARSAL = os.environ.get("A2D_REHEARSE") == "1" and not torch.cuda.is_available()

SETTINGS: dict[str, Any] = dict(
    seq_length=128, global_batch_size=8, micro_batch_size=4, train_iters=1000, lr=1e-3, num_workers=0, bf16=True,
)  # fmt: skip
_SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512
)
# Kind and sizes. All experts for every token: where the router chooses, a last bit decides, and nothing bounds what follows.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", _SIZES),
    "dense_tied": ("dense_tied", _SIZES),
    "moe": ("moe", {**_SIZES, "moe_intermediate_size": 128, "num_experts_per_tok": 8}),
}


class Model(NamedTuple):
    checkpoint: str
    settings: dict[str, Any]


def write_models(root: Path) -> dict[str, Model]:
    """dense, dense_tied and moe, converted from Hugging Face's form, and tokens that can be learnt."""
    from checkpoints_tools import convert_hf
    from tests.tiny import write_hf, write_tokens

    for name, documents in (("train", 400), ("valid", 40)):
        write_tokens(root / name, documents, 250, seed=len(name))
    settings = SETTINGS | {"train_data_path": str(root / "train"), "valid_data_path": str(root / "valid")}
    models = {}
    for kind, (_, sizes) in MODELS.items():
        write_hf(root / kind, kind, gate_scale=0.02, **sizes)  # rounding would decide between experts otherwise
        convert_hf.main(["--hf-model", str(root / kind), "--out", str(root / f"{kind}_checkpoint")])
        models[kind] = Model(str(root / f"{kind}_checkpoint"), settings)
    return models


class Run(NamedTuple):
    losses: list[float]
    grad_norms: list[float]


def train(model: Model, steps: int, save: Path | None = None, **changes: Any) -> Run:
    """Train from the model's checkpoint; with `save`, write a checkpoint with the optimizer's state there."""
    from bench.train_step_vs_hf import free_memory
    from megatron_a2d.checkpoint.directory import iteration_of, resolve
    from megatron_a2d.config.model_config import read_model_config
    from megatron_a2d.config.settings import build
    from megatron_a2d.config.validate import find_problems
    from megatron_a2d.distributed import environment, process_groups
    from megatron_a2d.training import cuda_graphs, data_setup, initialization, train_step
    from megatron_a2d.training.checkpointing import CheckpointWriter
    from megatron_a2d.training.initialization import load_checkpoint

    settings = model.settings | changes | ({"save": str(save)} if save else {})
    config = build(settings)
    start = resolve(model.checkpoint)
    model_config = read_model_config(start / "hf")
    environment.apply(config)
    assert not (problems := find_problems(config, model_config, process_groups.world_size())), problems
    free_memory()  # of the run before, and its process groups
    process_groups.initialize(config.parallel, replays_graphs=config.performance.cuda_graph_impl != "none")
    state = initialization.build_train_state(model_config, config)
    load_checkpoint(state, start, weights_only=iteration_of(start) == 0)
    data, _ = data_setup.open_datasets(config, model_config)
    graphs = cuda_graphs.CudaGraphs(state, config)
    losses, norms = [], []
    with data_setup.micro_batches(config, model_config, data, config.data.seed, state.consumed_samples) as batches:
        for _ in range(steps):
            state.scheduler.step(1)
            graphs.before_step()
            result = train_step.train_step(
                state.chunks, state.optimizer, [next(batches) for _ in range(batches.num_microbatches)]
            )
            totals = result.totals.clone()
            dist.all_reduce(totals)
            losses.append(float(totals[0] / totals[4]))
            norms.append(result.grad_norm)
            state.iteration += 1
            state.consumed_samples += config.training.global_batch_size
    if save:
        CheckpointWriter(state, config, start / "hf").finish()
    return Run(losses, norms)


def main() -> None:
    """One rank of a layout: prints what it saw, as JSON, from rank 0."""
    task = json.loads(sys.argv[1])
    if REHEARSAL:
        from tests.transformer_engine.pretend_gpu import rehearse

        rehearse()
    from megatron_a2d.distributed import process_groups

    run = train(Model(task["checkpoint"], task["settings"]), task["steps"], **task["changes"])
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(run._asdict()), flush=True)
    process_groups.finalize()


if __name__ == "__main__":
    main()
