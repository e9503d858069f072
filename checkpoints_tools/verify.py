"""Command that verifies that two forms of a model are the same: all tensors bitwise, logits by position.

    python -m checkpoints_tools.verify --hf-model Qwen/Qwen3-0.6B --checkpoint checkpoints/qwen3-0.6b
    python -m checkpoints_tools.verify --checkpoint checkpoints/run --export exports/run
    python -m checkpoints_tools.verify --hf-model Qwen/Qwen3-0.6B --export exports/qwen3-0.6b --logits

If the dtypes differ, the first is cast to the second's and must then agree in every bit. Logits are computed by
transformers for one side and by a streamed forward pass for the other, in fp32 on the CPU; bidirectional models are
compared under full attention. transformers needs the model in memory, so large models use it only with --logits. Python
files of a directory are run only if they equal ours byte for byte; otherwise our own classes are used. The last lines
show the masked cross-entropy by t.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_a2d.checkpoint.directory import check_hf_directory, resolve
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.hf_download import find_model
from megatron_a2d.terminal.console import entry_point, human, progress
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line

if TYPE_CHECKING:
    from megatron_a2d.conversion.compare_weights import Comparison
    from megatron_a2d.conversion.hf_to_torch_dist import Converted
    from megatron_a2d.conversion.read_back import Check, ReadBack
    from megatron_a2d.conversion.sources import Weights


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.verify",
        description="Verify that two forms of a model are equal. Give two of --hf-model, --checkpoint and --export.",
    )
    parser.add_argument("--hf-model", metavar="DIR|HUB_ID", help="the Hugging Face model that was converted")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint or an iteration of one")
    parser.add_argument("--export", type=Path, metavar="DIR", help="a directory that export_hf wrote")
    parser.add_argument("--logits", action="store_true", help="compare logits of models of any size")
    options = parser.parse_args(argv)
    if sum(given is not None for given in (options.hf_model, options.checkpoint, options.export)) != 2:
        raise UserError("--hf-model, --checkpoint, --export: two of them are compared; give exactly two")
    # Before torch's import, which takes seconds.
    if options.checkpoint:
        resolve(options.checkpoint, "--checkpoint")
    if options.export:
        check_hf_directory(options.export, f"--export {options.export}")
    hf = None if options.hf_model is None else find_model(options.hf_model).directory

    from megatron_a2d.conversion.compare_weights import compare_weights
    from megatron_a2d.conversion.sources import open_checkpoint, open_hf
    from megatron_a2d.conversion.workers import DEFAULT_WORKERS

    with ExitStack() as stack:
        opened = [stack.enter_context(open_hf(hf))] if hf else []
        opened += [stack.enter_context(open_checkpoint(options.checkpoint))] if options.checkpoint else []
        opened += [stack.enter_context(open_hf(options.export))] if options.export else []
        if problems := diffusion_differences(opened[0], opened[1]):
            raise UserError(problems)
        with progress("comparing", opened[0].num_bytes(), "B") as advance:
            comparison = compare_weights(opened[0], opened[1], advance, DEFAULT_WORKERS)
        print_lines(compared_lines(comparison, opened[0], opened[1], options.logits))
        print_losses(opened[1])


def diffusion_differences(first: Weights, second: Weights) -> list[str]:
    """Differences that neither tensors nor logits show: mask token and label shift."""
    from megatron_a2d.verification.logits_report import label_shift

    masks = first.model_config.mask_token_id, second.model_config.mask_token_id
    if None in masks:  # one of them is autoregressive
        return []
    facts = {"mask_token_id": masks, "label_shift": (label_shift(first), label_shift(second))}
    return [
        f"{second.directory}: {name} is {theirs}, but {ours} in {first.directory}; these are not the same model"
        for name, (ours, theirs) in facts.items()
        if ours != theirs
    ]


def print_converted(done: Converted) -> None:
    """What was written, and what a user should know about it."""
    types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in done.dtypes))
    print_line(
        f"{done.directory}: {human(done.model_config.num_parameters())} parameters, "
        f"{human(done.num_bytes, 'B')} of {types}, "
        f"vocabulary {done.model_config.vocab_size}, mask token {done.mask_token_id}"
    )
    if done.mask_text is not None:
        print_line(
            f"note: its mask token is {done.mask_text!r}, a token of text: texts that contain it can be neither "
            "trained on nor given as prompts"
        )
    if done.aux_loss_coeff is not None:
        print_line(
            f"note: router_aux_loss_coef {done.aux_loss_coeff.source:g} of its config.json equals --moe-aux-loss-coeff "
            f"{done.aux_loss_coeff.ours:.3g} if all layers route alike; otherwise no coefficient does "
            "(docs/hyperparameters.md)"
        )


def report_into(lines: list[str], with_logits: bool = True) -> Check:
    """A verification of a written model that appends its report to `lines`."""

    def check(read_back: ReadBack) -> Comparison:
        from megatron_a2d.verification.logits_report import report_tensors, report_written

        comparison, report = (report_written if with_logits else report_tensors)(read_back)
        lines.extend(report)
        return comparison

    return check


def compared_lines(comparison: Comparison, first: Weights, second: Weights, logits: bool = False) -> list[str]:
    """The lines on compared tensors and logits of `first` and `second` (source or checkpoint, checkpoint or export).

    Raises UserError if the logits differ.
    """
    from megatron_a2d.verification import logits_report

    return [logits_report.tensors_line(comparison, first, second), logits_report.logits_line(first, second, logits)]


def print_losses(model: Weights) -> None:
    """Print the masked cross-entropy by t."""
    from megatron_a2d.verification import logits_report

    text, losses = logits_report.loss_by_time(model, logits_report.label_shift(model))
    print_lines(logits_report.loss_lines(text, losses, model.model_config.vocab_size))


def print_lines(lines: list[str]) -> None:
    for line in lines:
        print_line(line)


if __name__ == "__main__":
    entry_point(main)
