"""Loads of a MoE model's experts on held-out text with its validation masks, as a measurement of a study."""

from __future__ import annotations

from typing import Any

from megatron_a2d.checkpoint.directory import directory_name, iteration_of, list_iterations, resolve
from megatron_a2d.study.load_run import LoadedRun
from megatron_a2d.training.balancing import RunBalancing
from megatron_a2d.training.initialization import load_checkpoint
from megatron_a2d.training.param_shards import over_ranks
from megatron_a2d.training.router_metrics import KINDS
from megatron_a2d.training.validation import run_validation
from megatron_a2d.utils.errors import UserError


def router_loads(loaded: LoadedRun, every_checkpoint: bool = False) -> list[dict[str, Any]]:
    """For the loaded checkpoint, or for each of its run: NELBO, and choices of experts by kind, layer and expert.

    Collective. `choices`: {kind: [layers][experts]}, counts; `entropy`: {kind: [layers]}, nats.
    """
    balancing = loaded.state.balancing
    if balancing is None:
        raise UserError(f"--load {loaded.config.training.load}: is a dense model; this study needs routers")
    assert loaded.config.training.load is not None
    newest = resolve(loaded.config.training.load)
    directories = [newest]
    if every_checkpoint:
        directories = [newest.parent / directory_name(number) for number in list_iterations(newest.parent)]
    results = []
    for directory in directories:
        if len(directories) > 1:
            load_checkpoint(loaded.state, directory, weights_only=True)
        results.append({"iteration": iteration_of(directory), **_loads(loaded, balancing)})
    return results


def _loads(loaded: LoadedRun, balancing: RunBalancing) -> dict[str, Any]:
    routing = balancing.routing
    routing.records_entropy = True
    with routing.counting():
        result = run_validation(loaded.state, loaded.config, loaded.model_config, loaded.valid_data)
    choices_L2E, entropy_L2 = over_ranks(routing.choices.clone()).cpu(), over_ranks(routing.entropies.clone()).cpu()
    tokens_L2 = choices_L2E.sum(-1) / loaded.model_config.num_experts_per_tok
    means_L2 = entropy_L2 / tokens_L2.clamp(min=1)
    return {
        "nelbo": result.nelbo.mean,
        "top_k": loaded.model_config.num_experts_per_tok,
        "choices": {name: choices_L2E[:, kind].tolist() for name, kind in KINDS.items()},
        "entropy": {name: means_L2[:, kind].tolist() for name, kind in KINDS.items()},
    }
