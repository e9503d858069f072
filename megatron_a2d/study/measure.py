"""Measurements of a checkpoint in any layout, which a study reports in addition to the run's log.

    LAUNCHER -m megatron_a2d.study.measure SPEC.json

SPEC: {"settings": all settings, --load the checkpoint; "measures": [{"name", "kind", "options"}]; "out": FILE}. The
study writes it, and reads the JSON object of results by name that this program leaves in `out`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point, hide_noise
from megatron_a2d.utils.atomic_write import read_json, write_json
from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from megatron_a2d.study.load_run import LoadedRun


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m megatron_a2d.study.measure", description="Measure a checkpoint for a study.")
    parser.add_argument("spec", type=Path, help="JSON file: settings, measures, out")
    spec = read_json(parser.parse_args(argv).spec, "the measurements to make")
    hide_noise()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.study.load_run import load_run

    process_groups.check_launch()
    try:
        loaded = load_run(spec["settings"])
        results = {item["name"]: _KINDS[item["kind"]](loaded, **item["options"]) for item in spec["measures"]}
        if process_groups.rank() == 0:
            write_json(spec["out"], results)
    finally:
        process_groups.finalize()


def likelihood(loaded: LoadedRun, block_length: int | None = None) -> dict[str, Any]:
    """NELBO (objective ar: negative log-likelihood), with its table by t. `block_length` replaces the settings'."""
    from megatron_a2d.config.settings import build
    from megatron_a2d.training.validation import run_validation

    config = build({**loaded.config.to_dict(), "block_length": block_length}) if block_length else loaded.config
    result = run_validation(loaded.state, config, loaded.model_config, loaded.valid_data)
    return {**result.to_dict(), **result.tables()}


def cloze(loaded: LoadedRun) -> dict[str, Any]:
    """Cloze test on facts of the training text in held-out text, under causal attention (cloze_eval.py)."""
    from megatron_a2d.study.cloze_eval import Facts
    from megatron_a2d.study.infilling_eval import evaluate, supervise_only

    if loaded.config.diffusion.objective != "ar":
        raise UserError("cloze: needs an autoregressive model; set objective ar")
    facts = Facts(loaded.train_data.files[0], loaded.train_data.eod_token_id())
    result = evaluate(loaded, supervise_only(facts.asked))
    return {"num_facts": len(facts), **result.to_dict()}


def infill(loaded: LoadedRun, hole_length: int = 16) -> dict[str, Any]:
    """Infilling of a hole of `hole_length` tokens per held-out sample, predicted in one pass from both sides."""
    from megatron_a2d.study.infilling_eval import evaluate, holes

    return {"hole_length": hole_length, **evaluate(loaded, holes(loaded, hole_length)).to_dict()}


def drift(loaded: LoadedRun, reference: str) -> dict[str, float]:
    """|W - W0| / |W0| by role; `reference` holds W0."""
    from megatron_a2d.study.load_run import other_weights
    from megatron_a2d.training.param_shards import owned_shards
    from megatron_a2d.training.weight_drift import Drift

    shards = owned_shards(loaded.state)
    now = [shard.weight().clone() for shard in shards]
    with other_weights(loaded, reference):
        return Drift(shards).measure(lambda number, shard: now[number])


def gradients(loaded: LoadedRun, **options: Any) -> dict[str, Any]:
    """Moments of the gradient over independent batches (gradient_moments.py)."""
    from megatron_a2d.study.gradient_moments import gradient_moments

    return gradient_moments(loaded, **options)


def error(loaded: LoadedRun, **options: Any) -> dict[str, Any]:
    """The gradient against fp32 (gradient_error.py)."""
    from megatron_a2d.study.gradient_error import gradient_error

    return gradient_error(loaded, **options)


def loads(loaded: LoadedRun, **options: Any) -> list[dict[str, Any]]:
    """Loads of experts on held-out text, of one checkpoint or of all of a run (router_loads.py)."""
    from megatron_a2d.study.router_loads import router_loads

    return router_loads(loaded, **options)


def generation(loaded: LoadedRun, **options: Any) -> dict[str, Any]:
    """Infilling and continuations in the model's own blocks (generation_eval.py)."""
    from megatron_a2d.study import generation_eval

    return generation_eval.generation(loaded, **options)


_KINDS: dict[str, Callable[..., Any]] = {
    "likelihood": likelihood,
    "cloze": cloze,
    "infill": infill,
    "drift": drift,
    "gradients": gradients,
    "gradient_error": error,
    "loads": loads,
    "generation": generation,
}


if __name__ == "__main__":
    entry_point(main)
