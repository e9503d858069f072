"""Command that converts an HF model of a supported family to a checkpoint that training loads in any layout.

    python -m checkpoints_tools.convert_hf --hf-model Qwen/Qwen3-30B-A3B-Base --out checkpoints/qwen3-30b-a3b

Only weights are converted, and no value changes unless --dtype is given. The model is streamed: memory does not grow
with its size. The output is read back and compared bitwise before it is renamed to --out, and a short report shows the
model's loss by t. An interrupted run is resumed by the same command.
"""

from __future__ import annotations

from checkpoints_tools.options import add_conversion_options, check_streaming_options
from checkpoints_tools.verify import print_converted, print_lines, report_into
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.hf_download import find_model
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import check_new_directory


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.convert_hf",
        description="Convert a Hugging Face model to a checkpoint for training.",
    )
    parser.add_argument("--hf-model", required=True, metavar="DIR|HUB_ID", help="the model to convert")
    add_conversion_options(parser)
    options = parser.parse_args(argv)
    check_streaming_options(options)
    # Before torch's import, which takes seconds.
    check_new_directory(options.out, "--out")
    model = find_model(options.hf_model)

    from megatron_a2d.checkpoint.tensor_rows import DTYPES
    from megatron_a2d.conversion.hf_to_torch_dist import convert

    lines: list[str] = []
    done = convert(
        model.directory,
        options.out,
        options.mask_token_id,
        DTYPES.get(options.dtype),
        model.hub_id,
        workers=options.workers,
        allow_nonfinite=options.allow_nonfinite,
        verify=not options.no_verify,
        check=report_into(lines),
    )
    print_converted(done)
    print_lines(lines)


if __name__ == "__main__":
    entry_point(main)
