"""Command that converts a torch_dist checkpoint of Megatron-LM, Megatron-Bridge or NeMo 2 to one that training loads.

    python -m checkpoints_tools.convert_megatron --megatron /runs/qwen3/iter_0100000 --out checkpoints/qwen3
    python -m checkpoints_tools.convert_megatron --megatron /runs/core --hf-model Qwen/Qwen3-0.6B --out checkpoints/core

The model's settings come from the checkpoint (run_config.yaml, context/model.yaml, or the arguments in common.pt), its
tokenizer too where it has one. --hf-model names a Hugging Face directory for what it lacks: config.json, which must
agree with the settings if there are any, and the tokenizer. Only weights are converted, bit by bit, and padding of the
vocabulary is cut off. The output is read back and compared before it is renamed to --out.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.options import add_conversion_options, check_streaming_options
from checkpoints_tools.verify import print_converted, print_lines, report_into
from megatron_a2d.checkpoint.directory import check_directory
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.hf_download import find_model
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import check_new_directory


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.convert_megatron",
        description="Convert a checkpoint of Megatron-LM, Megatron-Bridge or NeMo 2 to one for training.",
    )
    parser.add_argument(
        "--megatron",
        required=True,
        type=Path,
        metavar="DIR",
        help="a torch_dist checkpoint, an iteration of one, or NeMo 2's directory",
    )
    parser.add_argument(
        "--hf-model", metavar="DIR|HUB_ID", help="the model whose config.json and tokenizer the checkpoint lacks"
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of the embedding that are not padding; default: as recorded"
    )
    add_conversion_options(parser)
    options = parser.parse_args(argv)
    check_streaming_options(options)
    # Before torch's import, which takes seconds.
    check_new_directory(options.out, "--out")
    check_directory(
        options.megatron,
        f"--megatron {options.megatron}",
        "give a torch_dist checkpoint's directory (NeMo 1's .nemo files are not supported)",
    )
    model = find_model(options.hf_model, with_weights=False) if options.hf_model else None

    from megatron_a2d.checkpoint.tensor_rows import DTYPES
    from megatron_a2d.conversion.hf_to_torch_dist import Options
    from megatron_a2d.conversion.megatron_to_torch_dist import convert_megatron

    lines: list[str] = []
    done = convert_megatron(
        options.megatron,
        options.out,
        model.directory if model else None,
        options.mask_token_id,
        options.vocab_size,
        model.hub_id if model else None,
        Options(
            DTYPES.get(options.dtype),
            options.workers,
            options.allow_nonfinite,
            not options.no_verify,
            report_into(lines, with_logits=False),
        ),
    )
    print_converted(done)
    print_lines(lines)


if __name__ == "__main__":
    entry_point(main)
