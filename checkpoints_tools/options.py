"""Flags shared by the checkpoint commands, and the parser of sizes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.utils.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=DEFAULT_WORKERS,
        metavar="N",
        help="threads",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN and infinite values")


def add_streaming_options(parser: Parser) -> None:
    """Add the flags of commands that stream a model from one format to another."""
    add_workers(parser)
    parser.add_argument("--no-verify", action="store_true", help="skip the verification of the result")


def add_conversion_options(parser: Parser) -> None:
    """Add the flags of commands that write a checkpoint from another project's model."""
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the checkpoint to write; must be new")
    parser.add_argument(
        "--mask-token-id",
        type=int,
        metavar="ID",
        help="id of the mask token; default: the first id that the tokenizer does not use",
    )
    parser.add_argument("--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="dtype to store")
    add_streaming_options(parser)


def check_streaming_options(options: argparse.Namespace) -> None:
    if not 1 <= options.workers <= 64:
        raise UserError(f"--workers {options.workers}: must be 1 to 64")


def parse_size(flag: str, text: str) -> int:
    """'5GB', '500 MB', '1000' -> bytes (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), flags=re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"{flag} {text}: is not a size; give a number and KB, MB, GB or TB, such as 5GB")
    return size
