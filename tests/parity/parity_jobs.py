"""What the ranks of a layout do: build, load, step, and hold what they have against a reference.

Tensors are compared by their place in the global model, as the checkpoint format knows it: a rank's shard is
held against the same slice of the one-process reference, whatever layout made the shard.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_a2d import megatron_compat
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.checkpoint.placement_file import find_placement
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.distributed import process_groups
from megatron_a2d.training.checkpointing import CheckpointWriter
from megatron_a2d.training.data_setup import micro_batches, open_datasets
from megatron_a2d.training.initialization import build_train_state, initialize_state, load_checkpoint, set_to_mean
from megatron_a2d.training.interval_metrics import IntervalMetrics
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.training.train_step import count_loads, forward_backward, loss_totals, train_step
from megatron_a2d.training.training_diagnostics import Monitor
from megatron_a2d.training.validation import run_validation
from tests.parity.arithmetic import Reversed, small_tiles, split_contractions
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
    relative: bool = False,
    pieces: int = 1,
    reverse: bool = False,
    in_fp32: bool = False,
    in_tiles: bool = False,
) -> dict[str, Any]:
    """Train a few steps; returns losses, gradient norms and the largest differences from `reference`.

    relative: the worst tensor's root mean square difference over its root mean square, instead of the largest absolute
    one. pieces: matrix products sum their contraction in so many pieces. reverse: the samples of a batch backwards.
    in_fp32: what is refused without bf16 is done all the same. in_tiles: masked attention is, like long sequences'.
    """
    config, state, batches = _start(checkpoint, settings, fix_experts, {"bf16": True} if in_fp32 else {})
    if reverse:
        batches = Reversed(batches)
    losses, norms, gradients = [], [], {}
    with split_contractions(pieces), small_tiles() if in_tiles else contextlib.nullcontext():
        for _ in range(num_steps):
            loss, norm, gradients = _step(config, state, batches)
            losses.append(loss)
            norms.append(norm)
    seen = {"gradients": gradients, "parameters": _global_shards(state, lambda parameter: parameter.data)}
    if save_reference:
        whole = {name: _assemble(_of_all_ranks(shards)) for name, shards in seen.items()}
        if dist.get_rank() == 0:
            torch.save(whole, save_reference)
        dist.barrier()
    slots = [
        layer.mlp.router.slots for layer in state.models[0].decoder.layers if state.models[0].config.num_moe_experts
    ]
    result: dict[str, Any] = {"losses": losses, "grad_norms": norms, "orders": [each and each.order for each in slots]}
    if reference:
        expected = torch.load(reference)
        difference = _relative_difference if relative else _difference
        for name, shards in seen.items():
            values = torch.tensor([difference(shard, expected[name]) for shard in shards.values()])
            result[name] = float(values.max()) if len(values) else float("nan")
        result["gradient_distance"] = _distance(gradients, expected["gradients"])
    return result


def monitored(checkpoint: str, settings: dict[str, Any], num_steps: int = 2) -> dict[str, Any]:
    """What monitoring says of the last of a few steps, speed aside."""
    config, state, batches = _start(checkpoint, settings)
    model_config = read_model_config(resolve(checkpoint) / "hf")
    monitor, interval_metrics = Monitor(config, model_config, state), IntervalMetrics(config, model_config)
    monitor.remember_start()
    for _ in range(num_steps):
        state.scheduler.step(1)
        result = train_step(state.chunks, state.optimizer, _one_iteration(batches), monitor)
        interval_metrics.add(result, config.training.global_batch_size)
    values = interval_metrics.read(state) | monitor.read()
    del values["tokens_per_second"]
    return values


def rank_loads(checkpoint: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """Router metrics of a step, and the tokens that this rank's experts got in it, by layer."""
    config, state, batches = _start(checkpoint, settings)
    monitor = Monitor(config, read_model_config(resolve(checkpoint) / "hf"), state)
    monitor.remember_start()
    layers = [layer for model in state.models for layer in model.decoder.layers]
    tokens = [0] * len(layers)
    for number, layer in enumerate(layers):

        def count(_: Any, inputs: tuple[Any, ...], number: int = number) -> None:
            tokens[number] += len(inputs[0])

        layer.mlp.experts.register_forward_pre_hook(count)
    step = _one_iteration(batches)
    with monitor.step(step):
        tokens[:] = [0] * len(layers)  # the monitor's own passes are over
        forward_backward(state.chunks, step, forward_only=False)
    return monitor.read()["moe"], tokens


def samples(checkpoint: str, settings: dict[str, Any], num_batches: int) -> list[Any]:
    """This rank's first micro-batches."""
    _, _, batches = _start(checkpoint, settings)
    return [next(batches) for _ in range(num_batches)]


def mask_rows(checkpoint: str, settings: dict[str, Any]) -> list[tuple[list[float], list[float], list[float]]]:
    """(before, after, mean of all rows) of the mask token's row in each table of this rank that holds it."""
    _, state, _ = _start(checkpoint, settings)
    originals = {name: tensor.clone() for name, tensor in _word_tables(state)}
    set_to_mean(state, MASK_TOKEN_ID)
    found = []
    for name, table in _word_tables(state):
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(originals[name].T.contiguous()).T
        row = MASK_TOKEN_ID - len(table) * parallel_state.get_tensor_model_parallel_rank()
        if 0 <= row < len(table):
            found.append((originals[name][row].tolist(), table[row].tolist(), whole.mean(0).tolist()))
            others = torch.arange(len(table)) != row
            assert torch.equal(table[others], originals[name][others])
    return found


def _word_tables(state: TrainState) -> list[tuple[str, torch.Tensor]]:
    names = ("word_embeddings.weight", "output_layer.weight")
    tied = state.models[0].share_embeddings_and_output_weights
    return [
        (name, parameter.detach())
        for model in state.models
        for name, parameter in model.named_parameters()
        if name.endswith(names if tied else names[:1])
    ]


def validate(checkpoint: str, settings: dict[str, Any]) -> dict[str, float]:
    """One validation on the training data's files."""
    config, state, _ = _start(checkpoint, settings)
    model_config = read_model_config(resolve(checkpoint) / "hf")
    _, valid_data = open_datasets(config, model_config)
    return run_validation(state, config, model_config, valid_data["valid"]).to_dict()


def convert_layout(checkpoint: str, settings: dict[str, Any]) -> None:
    """Load a checkpoint under this layout and save it again with optimizer state, under --save.

    The step that makes the optimizer's state has a learning rate too small to change any weight.
    """
    config, state, batches = _start(checkpoint, settings | {"lr": 1e-30})
    _step(config, state, batches)
    CheckpointWriter(state, config, resolve(checkpoint) / "hf").finish()


def resave(checkpoint: str, settings: dict[str, Any]) -> None:
    """Load model and optimizer of a checkpoint under this layout and save them, unchanged, under --save."""
    config, state, _ = _start(checkpoint, settings)
    load_checkpoint(state, resolve(checkpoint), weights_only=False)
    CheckpointWriter(state, config, resolve(checkpoint) / "hf").finish()


def batch_fingerprints(checkpoint: str, settings: dict[str, Any], num_batches: int) -> list[tuple[int, bytes]]:
    """(first sample index, bytes of everything that the model will see) of this rank's first micro-batches."""
    _, _, batches = _start(checkpoint, settings)
    result = []
    for batch in (next(batches) for _ in range(num_batches)):
        for row, index in enumerate(batch.sample_index.tolist()):
            columns = (batch.tokens[row], batch.labels[row], batch.weights[row], batch.times[row])
            result.append((index, b"".join(column.numpy().tobytes() for column in columns)))
    return result


def _start(
    checkpoint: str, settings: dict[str, Any], fix_experts: bool = True, checked_as: dict[str, Any] | None = None
) -> tuple[RunConfig, TrainState, Any]:
    """`checked_as`: settings that the checks, and they alone, find instead."""
    megatron_compat.install()
    config = build(SETTINGS | settings)
    start = resolve(checkpoint)
    model_config = read_model_config(start / "hf")
    checked = build(SETTINGS | settings | (checked_as or {}))
    problems = find_problems(checked, model_config, dist.get_world_size())
    assert not problems, problems
    process_groups.initialize(config.parallel)
    if not fix_experts:
        from megatron_a2d.training import initialization

        original, initialization.mark_expert_parameters = initialization.mark_expert_parameters, lambda model: None
    state = build_train_state(model_config, config)
    if not fix_experts:
        initialization.mark_expert_parameters = original
    if placement := find_placement(config, model_config, start):
        state.place_experts(placement)
    state.grafting = initialize_state(state, config, model_config, start, weights_only=True)  # type: ignore[attr-defined]
    train_data, _ = open_datasets(config, model_config)
    return config, state, micro_batches(config, model_config, train_data, config.data.seed, 0)


def _one_iteration(batches: Any) -> list[Any]:
    return [next(batches) for _ in range(batches.num_microbatches)]


def _step(config: RunConfig, state: TrainState, batches: Any) -> tuple[float, float, dict[str, ShardedTensor]]:
    state.scheduler.step(1)
    batch = _one_iteration(batches)
    grafting = state.grafting  # type: ignore[attr-defined]
    with grafting.step(state):
        count_loads(state.chunks, state.optimizer, batch)
        zero_gradients(state.chunks, state.optimizer)
        totals = loss_totals(forward_backward(state.chunks, batch, forward_only=False))
    totals[0] += grafting.take_error()
    dist.all_reduce(totals)
    # The distributed optimizer leaves each rank its own part of the gradients alone.
    whole = not config.parallel.use_distributed_optimizer
    gradients = _global_shards(state, _gradient) if whole else {}
    norm = update_parameters(state.optimizer)
    if state.balancing:
        with grafting.step(state):
            state.balancing.end_step(has_updated=True)
    state.gather_parameters()
    state.iteration += 1
    return float(totals[0] / totals[4]), norm, gradients


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


def _global_shards(state: TrainState, what: Any) -> dict[str, ShardedTensor]:
    """This rank's shards of the global tensors, with `what(parameter)` in the place of the parameter."""
    sharded = []
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for model in state.models:
        originals = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        for module, name, parameter in originals:
            # Not parameter.data: a gradient of another type there would break the next backward pass.
            stand_in = torch.nn.Parameter(what(parameter).detach().clone(), requires_grad=False)
            stand_in.__dict__.update(parameter.__dict__)
            module._parameters[name] = stand_in
        sharded.append(model.sharded_state_dict(metadata=metadata))
        apply_factories(sharded[-1])
        for module, name, parameter in originals:
            module._parameters[name] = parameter
    shards = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    return {f"{shard.key} {shard.global_offset}": shard for shard in shards}


def _of_all_ranks(shards: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shards)
    return {name: shard for of_rank in gathered for name, shard in of_rank.items()}


def _assemble(shards: dict[str, ShardedTensor]) -> dict[str, torch.Tensor]:
    full: dict[str, torch.Tensor] = {}
    for shard in shards.values():
        tensor = full.setdefault(shard.key, torch.full(shard.global_shape, float("nan"), dtype=shard.data.dtype))
        tensor[shard.global_slice()] = shard.data.reshape(tensor[shard.global_slice()].shape)
    assert not any(tensor.isnan().any() for tensor in full.values()), "the reference has holes"
    return full


def _difference(shard: ShardedTensor, expected: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference from the same slice of the reference."""
    piece = expected[shard.key][shard.global_slice()]
    return float((shard.data.reshape(piece.shape) - piece).abs().max())


def _distance(shards: dict[str, ShardedTensor], expected: dict[str, torch.Tensor]) -> float:
    """|g - g'| / |g'| over all of this rank's shards together."""
    squares = torch.zeros(2, dtype=torch.float64)
    for shard in shards.values():
        piece = expected[shard.key][shard.global_slice()].double()
        squares += torch.stack([(shard.data.reshape(piece.shape) - piece).square().sum(), piece.square().sum()])
    return float((squares[0] / squares[1]).sqrt())


def _relative_difference(shard: ShardedTensor, expected: dict[str, torch.Tensor]) -> float:
    """Root mean square difference from the same slice of the reference, over the root mean square of the whole tensor."""
    whole = expected[shard.key].double()
    piece = whole[shard.global_slice()]
    difference = shard.data.reshape(piece.shape).double() - piece
    if not whole.any():  # the gradient of a frozen parameter
        return float(difference.abs().max())
    return float(difference.square().mean().sqrt() / whole.square().mean().sqrt())


def bytes_of_a_start(checkpoint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this process reads to load the weights, by the training's load and by megatron.core's own, and whether
    both give the same."""
    from megatron.core import dist_checkpointing

    from megatron_a2d.training import initialization

    megatron_compat.install()
    config = build(SETTINGS | {"global_batch_size": 8} | settings)
    start = resolve(checkpoint)
    model_config = read_model_config(start / "hf")
    process_groups.initialize(config.parallel)
    state = build_train_state(model_config, config)
    counts, values = [], []
    training_load = initialization.load_state
    for load in (training_load, lambda wanted, directory: dist_checkpointing.load(wanted, str(directory))):
        for parameter in (parameter for model in state.models for parameter in model.parameters()):
            parameter.data.fill_(float("nan"))
        initialization.load_state = load
        before = _bytes_read()
        try:
            load_checkpoint(state, start, weights_only=True)
        finally:
            initialization.load_state = training_load
        counts.append(_bytes_read() - before)
        values.append([parameter.detach().clone() for model in state.models for parameter in model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    return {"read": counts[0], "plain_read": counts[1], "same": same}


def _bytes_read() -> int:
    """By read calls of this process, whether they reached the disk or the page cache."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
