"""Loads of a MoE model's experts on held-out text with its validation masks, as a measurement of a study."""

from __future__ import annotations

from typing import Any

from megatron_a2d.checkpoint.directory import directory_name, iteration_of, list_iterations, resolve
from megatron_a2d.study.load_run import LoadedRun
from megatron_a2d.training.initialization import load_checkpoint
from megatron_a2d.training.router_metrics import KINDS, RouterCounts
from megatron_a2d.training.validation import run_validation
from megatron_a2d.utils.errors import UserError


def router_loads(loaded: LoadedRun, every_checkpoint: bool = False) -> list[dict[str, Any]]:
    """For the loaded checkpoint, or for each of its run: NELBO, and choices of experts by kind, layer and expert.

    Collective. `choices`: {kind: [layers][experts]}, counts; `entropy`: {kind: [layers]}, nats.
    """
    if not loaded.model_config.is_moe:
        raise UserError(f"--load {loaded.config.training.load}: is a dense model; this study needs routers")
    assert loaded.config.training.load is not None
    newest = resolve(loaded.config.training.load)
    directories = [newest]
    if every_checkpoint:
        directories = [newest.parent / directory_name(number) for number in list_iterations(newest.parent)]
    routers = RouterCounts(loaded.state.models, loaded.model_config.mask_token_id)
    results = []
    for directory in directories:
        if directory != newest or len(directories) > 1:
            load_checkpoint(loaded.state, directory, weights_only=True)
        results.append({"iteration": iteration_of(directory), **_loads(loaded, routers)})
    return results


def _loads(loaded: LoadedRun, routers: RouterCounts) -> dict[str, Any]:
    with routers.counting():
        result = run_validation(loaded.state, loaded.config, loaded.model_config, loaded.valid_data)
    metrics, choices_L2E = routers.read(), routers.choices()
    return {
        "nelbo": result.nelbo.mean,
        "top_k": loaded.model_config.num_experts_per_tok,
        "choices": {name: choices_L2E[:, kind].long().tolist() for name, kind in KINDS.items()},
        "entropy": {name: metrics["by_layer"][f"entropy_{name}"] for name in KINDS},
    }
