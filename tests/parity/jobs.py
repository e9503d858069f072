"""What the ranks of a layout do: build, load, step, and hold what they have against a reference.

Tensors are compared by their place in the global model, as the checkpoint format knows it: a rank's shard is
held against the same slice of the one-process reference, whatever layout made the shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_a2d import runtime
from megatron_a2d.architecture import read_architecture
from megatron_a2d.checks import find_problems
from megatron_a2d.config import RunConfig, build
from megatron_a2d.conversion.checkpoint import iteration_of, resolve
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.errors import SaveError
from megatron_a2d.inference.sharded import open_sharded
from megatron_a2d.training import checkpoint, loop, parallel, step
from megatron_a2d.training.checkpoint import load_checkpoint, save_checkpoint
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.resume import find_start
from megatron_a2d.training.setup import TrainState, build_train_state
from megatron_a2d.training.step import _totals, forward_backward
from tests.tiny import MASK_TOKEN_ID

# Large enough to see every part of the update, and an epsilon that keeps Adam from turning the rounding
# noise of near-zero gradients into steps of full size.
SETTINGS: dict[str, Any] = dict(
    seq_length=32, global_batch_size=8, micro_batch_size=1, train_iters=10, lr=1e-2, adam_eps=1e-3,
    lr_mult={"mlp": 0.5, "embedding": 0.25}, num_workers=0, eval_iters=1,
)  # fmt: skip


def train_steps(
    checkpoint: str,
    settings: dict[str, Any],
    num_steps: int = 1,
    save_reference: str | None = None,
    reference: str | None = None,
    fix_experts: bool = True,
) -> dict[str, Any]:
    """Train a few steps; returns losses, gradient norms and the largest differences from `reference`."""
    config, state, batches = _start(checkpoint, settings, fix_experts)
    losses, norms, gradients = [], [], {}
    for _ in range(num_steps):
        loss, norm, gradients = _step(config, state, batches)
        losses.append(loss)
        norms.append(norm)
    seen = {"gradients": gradients, "parameters": _global_shards(state, lambda parameter: parameter.data)}
    if save_reference:
        assert dist.get_world_size() == 1
        torch.save({name: _assemble(shards) for name, shards in seen.items()}, save_reference)
    result: dict[str, Any] = {"losses": losses, "grad_norms": norms}
    if reference:
        expected = torch.load(reference)
        for name, shards in seen.items():
            values = torch.tensor([_difference(shard, expected[name]) for shard in shards.values()])
            result[name] = float(values.max()) if len(values) else float("nan")
    return result


def validate(checkpoint: str, settings: dict[str, Any]) -> dict[str, float]:
    """One validation on the training data's files."""
    config, state, _ = _start(checkpoint, settings)
    architecture = read_architecture(resolve(checkpoint) / "hf")
    _, valid_data = loop.open_datasets(config, architecture)
    assert valid_data is not None
    return loop.run_validation(state, config, architecture, valid_data).to_dict()


def convert_layout(checkpoint: str, settings: dict[str, Any]) -> None:
    """Load a checkpoint under this layout and save it again with optimizer state, under --save.

    The step that makes the optimizer's state has a learning rate too small to change any weight.
    """
    config, state, batches = _start(checkpoint, settings | {"lr": 1e-30})
    _step(config, state, batches)
    save_checkpoint(state, config, resolve(checkpoint) / "hf")


def logits(checkpoint: str, settings: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """Full logits [b, s, V] of a one-process model."""
    _, state, _ = _start(checkpoint, settings)
    with torch.no_grad():
        return state.models[0](tokens).float()


def sample(checkpoint: str, layout: dict[str, Any], options: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    """Fill the holes of `rows` with a sharded model."""
    runtime.install()
    opened = open_sharded(checkpoint, layout)
    canvas = make_canvas([[MASK_TOKEN_ID if token < 0 else token for token in row] for row in rows], MASK_TOKEN_ID)
    sampled = denoise(opened.run, canvas, opened.mask_token_id, SamplingOptions(**options), seed=3)
    return {"tokens": sampled.tokens.tolist(), "num_forwards": sampled.num_forwards}


def batch_fingerprints(checkpoint: str, settings: dict[str, Any], num_batches: int) -> list[tuple[int, bytes]]:
    """(first sample index, bytes of everything that the model will see) of this rank's first micro-batches."""
    _, _, batches = _start(checkpoint, settings)
    result = []
    for batch in (next(batches) for _ in range(num_batches)):
        for row, index in enumerate(batch.sample_index.tolist()):
            columns = (batch.tokens[row], batch.labels[row], batch.weights[row], batch.times[row])
            result.append((index, b"".join(column.numpy().tobytes() for column in columns)))
    return result


def _start(checkpoint: str, settings: dict[str, Any], fix_experts: bool = True) -> tuple[RunConfig, TrainState, Any]:
    runtime.install()
    config = build(SETTINGS | settings)
    start = resolve(checkpoint)
    architecture = read_architecture(start / "hf")
    problems = find_problems(config, architecture, dist.get_world_size())
    assert not problems, problems
    parallel.initialize(config.parallel)
    if not fix_experts:
        from megatron_a2d.training import setup

        original, setup.mark_expert_parameters = setup.mark_expert_parameters, lambda model: None
    state = build_train_state(architecture, config)
    if not fix_experts:
        setup.mark_expert_parameters = original
    load_checkpoint(state, start, weights_only=True)
    train_data, _ = loop.open_datasets(config, architecture)
    return config, state, loop.micro_batches(config, architecture, train_data, config.data.seed, 0)


def _step(config: RunConfig, state: TrainState, batches: Any) -> tuple[float, float, dict[str, ShardedTensor]]:
    state.scheduler.step(1)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    shape = (config.training.micro_batch_size, config.data.seq_length)
    totals = _totals(forward_backward(state.chunks, batches, batches.num_microbatches, shape, forward_only=False))
    dist.all_reduce(totals)
    # The distributed optimizer leaves each rank its own part of the gradients alone.
    whole = not config.parallel.use_distributed_optimizer
    gradients = _global_shards(state, lambda parameter: parameter.main_grad) if whole else {}
    norm = update_parameters(state.optimizer)
    if config.parallel.overlap_param_gather:
        for chunk in state.chunks:
            chunk.start_param_sync(force_sync=True)
    return float(totals[0] / totals[4]), norm, gradients


def _global_shards(state: TrainState, what: Any) -> dict[str, ShardedTensor]:
    """This rank's shards of the global tensors, with `what(parameter)` in the place of the parameter."""
    sharded = []
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for model in state.models:
        originals = {name: parameter.data for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = what(parameter).detach().clone()
        sharded.append(model.sharded_state_dict(metadata=metadata))
        apply_factories(sharded[-1])
        for name, parameter in model.named_parameters():
            parameter.data = originals[name]
    shards = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    return {f"{shard.key} {shard.global_offset}": shard for shard in shards}


def _assemble(shards: dict[str, ShardedTensor]) -> dict[str, torch.Tensor]:
    full: dict[str, torch.Tensor] = {}
    for shard in shards.values():
        tensor = full.setdefault(shard.key, torch.full(shard.global_shape, float("nan")))
        tensor[shard.global_slice()] = shard.data.reshape(tensor[shard.global_slice()].shape)
    assert not any(tensor.isnan().any() for tensor in full.values()), "the reference has holes"
    return full


def _difference(shard: ShardedTensor, expected: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference from the same slice of the reference."""
    piece = expected[shard.key][shard.global_slice()]
    return float((shard.data.reshape(piece.shape) - piece).abs().max())


def run(
    settings: dict[str, Any],
    stop_at: int | None = None,
    poison: tuple[int, ...] = (),
    signal_at: tuple[int, int, int] | None = None,
    unwritable: str | None = None,
) -> dict[str, Any]:
    """The training loop itself.

    stop_at: end after that step as if the process had been stopped there. poison: steps of this process in which the
    last rank's loss is not a number. signal_at: (step, rank, signal) sent in the middle of a step. unwritable: a
    directory in the place of this file keeps every checkpoint from being written.
    """
    runtime.install()
    config = build(SETTINGS | settings)
    parallel.initialize(config.parallel)
    start, weights_only = parallel.from_first_rank(find_start(config) if dist.get_rank() == 0 else None)
    architecture = read_architecture(start / "hf")
    losses: list[float] = []
    make_room = checkpoint._make_room
    if unwritable:
        checkpoint._make_room = lambda root, partial: (make_room(root, partial), (partial / unwritable).mkdir())
    original = loop.train_step

    def train_step(*arguments: Any) -> Any:
        if len(losses) == stop_at:
            raise _StoppedError
        number = len(losses) + 1
        if signal_at and signal_at[:2] == (number, dist.get_rank()):
            os.kill(os.getpid(), signal_at[2])
        with _poisoned(number in poison and dist.get_rank() == dist.get_world_size() - 1):
            result = original(*arguments)
        totals = result.totals.clone()
        dist.all_reduce(totals)
        losses.append(float(totals[0] / totals[4]))
        return result

    loop.train_step = train_step
    try:
        state, exit_code = loop.train(config, architecture, start, weights_only)
    except SaveError as error:
        return {"losses": losses, "error": str(error)}
    except _StoppedError:
        return {"losses": losses, "start": 0 if weights_only else iteration_of(start)}
    finally:
        loop.train_step = original
        checkpoint._make_room = make_room
    weights, moments = hashlib.sha256(), hashlib.sha256()
    for parameter in (parameter for model in state.models for parameter in model.parameters()):
        weights.update(parameter.detach().numpy().tobytes())
    for optimizer in state.optimizer.chained_optimizers:
        for group in optimizer.param_groups:
            moments.update(repr((group["lr"], group["step"], group["weight_decay"])).encode())
            for parameter in group["params"]:
                for name, value in sorted(optimizer.optimizer.state[parameter].items()):
                    moments.update(name.encode() + value.numpy().tobytes())
    return {
        "losses": losses,
        "start": 0 if weights_only else iteration_of(start),
        "iteration": state.iteration,
        "exit_code": exit_code,
        "weights": weights.hexdigest(),
        "optimizer": moments.hexdigest(),
    }


@contextlib.contextmanager
def _poisoned(active: bool) -> Iterator[None]:
    """Every loss of this process is not a number."""
    original = step._loss

    def poisoned(*arguments: Any) -> Any:
        loss, *rest = original(*arguments)
        return loss * float("nan"), *rest

    step._loss = poisoned if active else original
    try:
        yield
    finally:
        step._loss = original


class _StoppedError(Exception):
    """Stands for the end of the process."""
