"""Memory limits for reading untrusted files: a few bytes may decompress to any size."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from megatron_a2d.utils.errors import UserError

MEGABYTE = 1_000_000


class Limits(NamedTuple):
    """Upper bounds on what a reader holds in memory."""

    document_bytes: int  # of one uncompressed document: a line of JSON, a parquet row, a .txt file
    window_bytes: int  # of a .zst: how far back its compressed data may refer


# The reference encoder needs 0.15 GB per megabyte of a document. The window is the zstd tool's own default limit.
DEFAULT_LIMITS = Limits(document_bytes=16 * MEGABYTE, window_bytes=1 << 27)


def add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-document-megabytes", type=int, default=DEFAULT_LIMITS.document_bytes // MEGABYTE,
        help="longest line of JSON, row or .txt, uncompressed; longer ones count as invalid",
    )  # fmt: skip
    parser.add_argument(
        "--max-window-megabytes", type=int, default=DEFAULT_LIMITS.window_bytes >> 20, metavar="MIB",
        help="largest window of a .zst in MiB: raise it for files of zstd --long or --ultra",
    )  # fmt: skip


def read_limits(arguments: argparse.Namespace) -> Limits:
    """The limits from the flags that `add_limits` has added."""
    for name, least, most in (("max_document_megabytes", 1, 2000), ("max_window_megabytes", 1, 2048)):
        if not least <= getattr(arguments, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must lie in {least} .. {most}")
    return Limits(arguments.max_document_megabytes * MEGABYTE, arguments.max_window_megabytes << 20)
