"""Command that shows the content of a checkpoint or HF directory: sizes and norms by role, iteration, recipe.

python -m checkpoints_tools.inspect --checkpoint checkpoints/run
python -m checkpoints_tools.inspect --hf-model exports/run --no-norms
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megatron_a2d.checkpoint.directory import check_hf_directory, resolve
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import PlainConsole, entry_point, human, progress
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from megatron_a2d.config.model_config import ModelConfig
    from megatron_a2d.conversion.weight_summary import RoleSummary


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.inspect", description="Show what a checkpoint or export contains."
    )
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint or an iteration of one")
    parser.add_argument("--hf-model", type=Path, metavar="DIR", help="a Hugging Face directory, such as an export")
    parser.add_argument("--no-norms", action="store_true", help="sizes and types only, without reading values")
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.hf_model is None):
        raise UserError("--checkpoint, --hf-model: give exactly one")
    # Before torch's import, which takes seconds.
    if options.checkpoint:
        resolve(options.checkpoint, "--checkpoint")
    else:
        check_hf_directory(options.hf_model, f"--hf-model {options.hf_model}")

    from megatron_a2d.conversion.sources import open_checkpoint, open_hf
    from megatron_a2d.conversion.weight_summary import summarise

    opened = (
        open_checkpoint(options.checkpoint, allow_expert_bias=True) if options.checkpoint else open_hf(options.hf_model)
    )
    with opened as weights:
        if options.no_norms:
            roles = summarise(weights, None)
        else:
            with progress("reading", weights.num_bytes(), "B") as advance:
                roles = summarise(weights, advance, min(4, os.cpu_count() or 1))
        facts = {"directory": str(weights.directory), **shape_facts(weights.model_config)}
        if options.checkpoint:
            facts |= training_facts(weights.directory)
    # A pipe has no width, and must not get a table cut to eighty columns.
    output = PlainConsole(width=None if os.isatty(1) else 140)
    output.print(facts_table(facts))
    output.print(roles_table(roles))


def shape_facts(a: ModelConfig) -> dict[str, str]:
    kind = f"{a.num_experts} experts, {a.num_experts_per_tok} per token" if a.is_moe else "dense"
    return {
        "model": f"{a.num_layers} layers of {a.hidden_size}, {kind}, vocabulary {a.vocab_size}"
        + (", head tied" if a.tie_word_embeddings else ""),
        "parameters": f"{human(a.num_parameters())}, {human(a.num_active_parameters())} active",
        "mask token": str(a.mask_token_id),
    }


def training_facts(directory: Path) -> dict[str, str]:
    """Iteration, tokens and recipe from the directory of an iteration."""
    from megatron_a2d.checkpoint.directory import RUN_CONFIG, iteration_of
    from megatron_a2d.checkpoint.torch_dist_reader import read_common
    from megatron_a2d.config.renamed import recorded_settings
    from megatron_a2d.conversion.model_card import Origin, recipe_rows

    run = directory / RUN_CONFIG
    settings: dict[str, Any] = read_json(run, "the run's configuration") if run.exists() else {}
    common = read_common(directory)
    origin = Origin(iteration_of(directory), common.get("consumed_samples"), settings)
    facts = {"iteration": str(origin.iteration)}
    if common.get("averaged_iterations"):
        facts["mean of iterations"] = ", ".join(map(str, common["averaged_iterations"]))
    facts["tokens seen"] = "not recorded" if origin.num_tokens is None else human(origin.num_tokens)
    good, wrong = recorded_settings(settings)
    rows = recipe_rows(good, wrong) + [("lr_mult", str(value)) for name, value in good.items() if name == "lr_mult"]
    facts["recipe"] = ", ".join(f"{name} {value}" for name, value in rows) or "none"
    return facts


def facts_table(facts: dict[str, str]) -> Table:
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def roles_table(roles: list[RoleSummary]) -> Table:
    table = Table()
    for name in ("role", "tensors", "parameters", "size", "type", "norm", "rms", "largest", "not finite"):
        table.add_column(name, justify="left" if name in ("role", "type") else "right")
    for item in roles:
        values = [item.norm, item.root_mean_square, item.largest]
        table.add_row(
            item.role,
            str(item.num_tensors),
            human(item.num_parameters),
            human(item.num_bytes, "B"),
            " ".join(item.dtypes),
            *("" if value is None else f"{value:.4g}" for value in values),
            str(item.num_not_finite or "") if item.norm is not None else "",
        )
    return table


if __name__ == "__main__":
    entry_point(main)
