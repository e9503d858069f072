"""Measurements of a checkpoint, under any layout: what a study knows of a run beside its log.

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
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import read_json, write_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.log_filters import hide_noise

if TYPE_CHECKING:
    from megatron_a2d.study.load_run import OpenedRun


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="megatron_a2d.study.measure", description="Measure a checkpoint as a study asks.")
    parser.add_argument("spec", type=Path, help="JSON file: settings, measures, out")
    spec = read_json(parser.parse_args(argv).spec, "the measurements to make")
    hide_noise()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.study.load_run import open_run

    process_groups.check_launch()
    try:
        opened = open_run(spec["settings"])
        results = {item["name"]: _KINDS[item["kind"]](opened, **item["options"]) for item in spec["measures"]}
        if process_groups.rank() == 0:
            write_json(spec["out"], results)
    finally:
        process_groups.finalize()


def likelihood(opened: OpenedRun) -> dict[str, Any]:
    """NELBO (objective ar: negative log-likelihood), with its table by time."""
    from megatron_a2d.training.validation import run_validation

    result = run_validation(opened.state, opened.config, opened.architecture, opened.valid_data)
    return {**result.to_dict(), **result.tables()}


def cloze(opened: OpenedRun) -> dict[str, Any]:
    """Facts of the training text, asked in held-out text under the causal mask (cloze_eval.py)."""
    from megatron_a2d.study.cloze_eval import Facts
    from megatron_a2d.study.infilling_eval import asked_rows, judge

    if opened.config.diffusion.objective != "ar":
        raise UserError("cloze: is asked of the autoregressive model; give objective ar")
    facts = Facts(opened.train_data.files[0], opened.train_data.eod_token_id())
    result = judge(opened, asked_rows(facts.asked))
    return {"num_facts": len(facts), **result.to_dict()}


def infill(opened: OpenedRun, hole_length: int = 16) -> dict[str, Any]:
    """A hole of `hole_length` tokens in each held-out sample, all of it predicted at once from both sides."""
    from megatron_a2d.study.infilling_eval import holes, judge

    return {"hole_length": hole_length, **judge(opened, holes(opened, hole_length)).to_dict()}


def drift(opened: OpenedRun, reference: str) -> dict[str, float]:
    """|W - W0| / |W0| by role; `reference` holds W0."""
    from megatron_a2d.checkpoint.directory import resolve
    from megatron_a2d.training.checkpointing import load_checkpoint
    from megatron_a2d.training.monitor import Drift
    from megatron_a2d.training.param_shards import owned_pieces

    pieces = owned_pieces(opened.state)
    now = [piece.weight().clone() for piece in pieces]
    load_checkpoint(opened.state, resolve(reference), weights_only=True)
    moved = Drift(pieces).measure(lambda number, piece: now[number])
    assert opened.config.training.load is not None
    load_checkpoint(opened.state, resolve(opened.config.training.load), weights_only=True)
    return moved


def gradients(opened: OpenedRun, **options: Any) -> dict[str, Any]:
    """Moments of the gradient over independent batches (gradient_noise.py)."""
    from megatron_a2d.study.gradient_noise import gradient_moments

    return gradient_moments(opened, **options)


_KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "likelihood": likelihood,
    "cloze": cloze,
    "infill": infill,
    "drift": drift,
    "gradients": gradients,
}


if __name__ == "__main__":
    entry_point(main)
