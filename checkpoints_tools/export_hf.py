"""Write a checkpoint as a Hugging Face directory that transformers loads.

    python -m checkpoints_tools.export_hf --checkpoint checkpoints/run --out exports/run --format rnd1

Formats: `rnd1` (mixture of experts; the form of the published RND1), `a2d` (any model; bidirectional),
`qwen3` (any model; the autoregressive form that it came from).
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point, human
from megatron_a2d.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m checkpoints_tools.export_hf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint or an iteration of one"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the directory to write; must be new")
    parser.add_argument("--format", choices=("rnd1", "a2d", "qwen3"), default="a2d", help="form of the export")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB")
    parser.add_argument("--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="type to store")
    parser.add_argument("--no-verify", action="store_true", help="do not read the export back to compare it")
    options = parser.parse_args(argv)
    max_shard_bytes = parse_size("--max-shard-size", options.max_shard_size)

    from megatron_a2d.conversion.export import export
    from megatron_a2d.conversion.rows import DTYPES
    from megatron_a2d.hf import TRAVELLING

    done = export(
        options.checkpoint,
        options.out,
        options.format,
        travelling=TRAVELLING.get(options.format, []),
        max_shard_bytes=max_shard_bytes,
        dtype=DTYPES.get(options.dtype),
        verify=not options.no_verify,
    )
    print(
        f"{done.directory}: iteration {done.iteration}, {human(done.num_parameters)} parameters, "
        f"{human(done.num_bytes, 'B')}{', verified' if done.verified else ''}"
    )


def parse_size(flag: str, text: str) -> int:
    """'5GB', '500 MB', '1000' -> bytes (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), flags=re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"{flag} {text}: is no size; write a number and KB, MB, GB or TB, such as 5GB")
    return size


if __name__ == "__main__":
    entry_point(main)
