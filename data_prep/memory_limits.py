"""Memory limits for reading untrusted files: a few bytes may decompress to any size."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from megatron_a2d.utils.errors import UserError

MEGABYTE = 1_000_000


class Limits(NamedTuple):
    """What a reader holds in memory at most."""

    document_bytes: int  # of a document as its file has it: a line of JSON, a row, a .txt
    window_bytes: int  # how far back the compression of a .zst may refer


# The reference encoder takes 0.15 GB for each megabyte of a document. The window is the zstd tool's own limit.
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
    """Of the flags that `add_limits` has added."""
    for name, least, most in (("max_document_megabytes", 1, 2000), ("max_window_megabytes", 1, 2048)):
        if not least <= getattr(arguments, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must lie in {least} .. {most}")
    return Limits(arguments.max_document_megabytes * MEGABYTE, arguments.max_window_megabytes << 20)
