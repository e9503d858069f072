"""Command that exports a checkpoint to an HF directory that transformers loads.

    python -m checkpoints_tools.export_hf --checkpoint checkpoints/run --out exports/run --format rnd1

Formats: `rnd1` (MoE, the format of the published RND1), `a2d` (any diffusion model), `sdar` (block diffusion without
label shift, in the form that LMDeploy and SGLang run), `dream`, `llada`, `llada_moe`, `diffullama` (these models' own
form, for their code on the hub), `qwen3`, `qwen2`, `llama` (the original autoregressive formats).
The output is read back and compared before it is renamed to --out; an interrupted run is resumed by the same command.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.options import add_streaming_options, check_streaming_options, parse_size
from checkpoints_tools.verify import print_lines, report_into
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.cli import Parser
from megatron_a2d.families.registry import export_formats
from megatron_a2d.terminal.console import entry_point, human
from megatron_a2d.utils.atomic_write import check_new_directory, read_json
from megatron_a2d.utils.printable import print_line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.export_hf", description="Export a checkpoint as a Hugging Face directory."
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint or an iteration of one"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write; must be new")
    parser.add_argument("--format", choices=export_formats(), default="a2d", help="format of the export")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB")
    parser.add_argument("--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="dtype to store")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="JSON of results for the model card's table")
    parser.add_argument(
        "--allow-objective-mismatch",
        action="store_true",
        help="also write a format whose attention the model was not trained with",
    )
    add_streaming_options(parser)
    options = parser.parse_args(argv)
    check_streaming_options(options)
    # Before torch's import, which takes seconds.
    resolve(options.checkpoint, "--checkpoint")
    check_new_directory(options.out, "--out")
    max_shard_bytes = parse_size("--max-shard-size", options.max_shard_size)
    evaluation = read_json(options.evaluation, "the evaluation") if options.evaluation else None

    from megatron_a2d.checkpoint.tensor_rows import DTYPES
    from megatron_a2d.conversion.torch_dist_to_hf import export
    from megatron_a2d.hf import CODE_FILES

    lines: list[str] = []
    done = export(
        options.checkpoint,
        options.out,
        options.format,
        code_files=CODE_FILES.get(options.format, []),
        max_shard_bytes=max_shard_bytes,
        dtype=DTYPES.get(options.dtype),
        verify=not options.no_verify,
        workers=options.workers,
        allow_nonfinite=options.allow_nonfinite,
        evaluation=evaluation,
        allow_objective_mismatch=options.allow_objective_mismatch,
        check=report_into(lines),
    )
    print_line(
        f"{done.directory}: iteration {done.iteration}, {human(done.num_parameters)} parameters, "
        f"{human(done.num_bytes, 'B')}{', verified' if done.comparison else ''}"
    )
    print_lines(lines)


if __name__ == "__main__":
    entry_point(main)
