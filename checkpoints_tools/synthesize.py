"""Command that writes an HF model with random weights in the shape of any published model, for tests and benchmarks.

    python -m checkpoints_tools.synthesize --size 30B-A3B --num-hidden-layers 4 --out /tmp/qwen3-30b-a3b-4-layers

Matrices have their true shapes at any depth. With --fused, the experts of a layer are stored as one tensor.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.options import parse_size
from megatron_a2d.checkpoint.directory import check_directory
from megatron_a2d.config.cli import Parser
from megatron_a2d.families.qwen3 import SIZES, hub_config
from megatron_a2d.families.registry import published_config, with_layers
from megatron_a2d.terminal.console import entry_point, human
from megatron_a2d.utils.atomic_write import check_new_directory
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m checkpoints_tools.synthesize",
        description="Write a model with random weights, for tests and benchmarks.",
    )
    parser.add_argument(
        "--size", required=True, metavar=f"{'|'.join(SIZES)}|NAME", help="a Qwen3's size, or a published model's name"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write; must be new")
    parser.add_argument("--num-hidden-layers", type=int, metavar="N", help="number of layers, instead of the model's")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype to store")
    parser.add_argument("--fused", action="store_true", help="store all experts of a layer in one tensor")
    parser.add_argument("--max-shard-size", default="4GB", metavar="SIZE", help="largest weight file, such as 500MB")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="directory whose tokenizer is copied")
    options = parser.parse_args(argv)
    # Before torch's import, which takes seconds.
    config = published_config(options.size) or hub_config(options.size)
    if options.num_hidden_layers is not None:
        if options.num_hidden_layers < 1:
            raise UserError(f"--num-hidden-layers {options.num_hidden_layers}: must be at least 1")
        config = with_layers(config, options.num_hidden_layers)
    max_shard_bytes = parse_size("--max-shard-size", options.max_shard_size)
    check_new_directory(options.out, "--out")
    if options.tokenizer:
        check_directory(options.tokenizer, f"--tokenizer {options.tokenizer}", "give a directory with tokenizer files")

    from megatron_a2d.checkpoint.tensor_rows import DTYPES
    from megatron_a2d.conversion.random_weights import write_synthetic

    size = write_synthetic(
        options.out, config, DTYPES[options.dtype], options.fused, max_shard_bytes, options.tokenizer
    )
    print_line(f"{options.out}: {human(size, 'B')} of random {options.dtype} weights")


if __name__ == "__main__":
    entry_point(main)
