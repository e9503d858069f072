"""Shares of a corpus for several machines (--shard 2/7): which pieces each tokenises, and whether all are there.

The corpus is divided into the same pieces (corpus_shards.py) on every machine, and each piece into the same files
wherever it is tokenised. A share is a set of pieces of about equal bytes, so one big file is divided as well as many
small ones, and the token files do not depend on the number of shares.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from data_prep.corpus_shards import Shard
from data_prep.tokenize_shards import Job, ShardResult, Share, key_of, read_result, settings_of
from megatron_a2d.utils.errors import UserError

MOST_SHARES = 100_000
# The flags whose values determine the tokens, by their names in `settings_of`.
_FLAGS = {
    "tokenizer": "--tokenizer", "encoder": "--encoder", "append_eod": "--append-eod", "json_key": "--json-keys",
    "min_tokens": "--min-tokens", "max_tokens": "--max-tokens",
    "limits": "--max-document-megabytes or --max-window-megabytes", "eod_token_id": "end-of-document token",
}  # fmt: skip


def parse_share(given: str) -> Share:
    """ "2/7" is the second of seven shares. UserError for anything else."""
    number, slash, of = given.partition("/")
    if not (slash and all(part.isascii() and part.isdigit() and len(part) <= 6 for part in (number, of))):
        raise UserError(f"--shard {given}: is not of the form I/N; give 1/N on one machine, 2/N on the next, up to N/N")
    share = Share(int(number), int(of))
    if not 1 <= share.number <= share.of <= MOST_SHARES:
        raise UserError(f"--shard {given}: I must lie in 1 .. N, and N in 1 .. {MOST_SHARES:,}; shards count from 1")
    return share


def owners(shards: Sequence[Shard], num_shares: int) -> list[int]:
    """The share (from 1) of each piece: the largest first, each to the share with the fewest bytes so far."""
    filled = [(0, number) for number in range(1, num_shares + 1)]
    owner = [0] * len(shards)
    for piece in sorted(range(len(shards)), key=lambda piece: (-shards[piece].num_bytes, piece)):
        size, number = filled[0]
        owner[piece] = number
        heapq.heapreplace(filled, (size + shards[piece].num_bytes, number))
    return owner


def pieces_of(share: Share, shards: Sequence[Shard]) -> dict[int, Shard]:
    """The pieces of one share, by number."""
    owner = owners(shards, share.of)
    return {number: shard for number, shard in enumerate(shards) if owner[number] == share.number}


def check_any(job: Job) -> None:
    """UserError if no share has been tokenised."""
    if not any(job.directory.glob("*.npz")):
        raise UserError(
            f"--merge-shards: there are no shards in {job.directory}; tokenise them by the same command with --shard "
            "1/N to N/N, or leave the flag out to do all on this machine"
        )


def check_complete(job: Job, shards: Sequence[Shard]) -> None:
    """UserError with a line for each reason why pieces cannot be merged: missing, unreadable, of another tokenizer,
    input or setting, or not of this corpus. Tokens are compared with their checksums by `merge`, as it copies them."""
    found: dict[int, ShardResult | None] = {}  # None: unreadable
    for path in sorted(path for path in job.directory.glob("*.npz") if path.stem.isdecimal()):
        try:
            found[int(path.stem)] = read_result(job, int(path.stem))
        except UserError:
            found[int(path.stem)] = None
    of = next((result.share.of for result in found.values() if result and result.share), 1)
    owner = owners(shards, of)
    problems: dict[tuple[str, int], list[int]] = {}  # reason and share: pieces
    for number, shard in enumerate(shards):
        result = found.get(number) if job.path(number, ".tokens").exists() else None
        if reason := _reason_against(job, shard, result):
            problems.setdefault((reason, owner[number]), []).append(number)
    lines = [
        f"--merge-shards: {len(pieces)} of {len(shards)} pieces {'are' if len(pieces) > 1 else 'is'} {reason} "
        f"(the first: {job.path(pieces[0], '.npz')}); run --shard {number}/{of} again, with the other arguments as here"
        for (reason, number), pieces in sorted(problems.items(), key=lambda problem: problem[0][1])
    ]
    if strangers := sorted(number for number in found if not 0 <= number < len(shards)):
        lines.append(
            f"--merge-shards: {job.path(strangers[0], '.npz')} is of another corpus, this --input has {len(shards)} "
            f"pieces; give the input that was tokenised, or remove {job.directory}"
        )
    if lines:
        raise UserError(lines)


def _reason_against(job: Job, shard: Shard, result: ShardResult | None) -> str:
    """Why a piece cannot be merged; '' if it can."""
    if result is None:
        return "missing or unreadable"
    if result.key != key_of(job, shard):
        mine = settings_of(job)
        other = [name for name in _FLAGS if result.settings.get(name) != mine[name]]
        if len(other) > 1 and "eod_token_id" in other:
            other.remove("eod_token_id")  # a consequence
        return (
            f"made with another {' and '.join(_FLAGS[name] for name in other)}"
            if other
            else "made from another --input"
        )
    if result.counts["invalid"] and not job.skip_invalid:
        return "made with --on-error skip, without invalid documents"
    return ""
