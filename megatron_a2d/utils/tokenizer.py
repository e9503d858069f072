"""Reader of untrusted tokenizer.json files.

The tokenizers library is written in Rust; an unexpected file makes it panic, which raises a BaseException that is not
an Exception and prints a report to stderr.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(path: Path, where: str) -> Tokenizer:
    """The tokenizer in the file `path`, tested on a few letters; its UserErrors start with `where`."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"{where}: is not a file; copy it from the model that it belongs to")
    with _without_stderr():
        try:
            tokenizer = Tokenizer.from_file(str(path))
            _try(tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            reason = str(error)[:300]
            raise UserError(f"{where}: the tokenizer cannot be read ({reason}); copy it again") from None
    return tokenizer


def _try(tokenizer: Tokenizer) -> None:
    """Provoke a panic now. Ordinary exceptions are fine: a tiny vocabulary cannot encode everything."""
    try:
        ids = tokenizer.encode("a b\n", add_special_tokens=False).ids
        tokenizer.decode(ids)
    except Exception:
        return


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what libraries write to file descriptor 2."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
