"""tokenizer.json, which may come from anyone, as the library's object.

The library is written in Rust. What it did not foresee in a file is a panic: an exception that is no `Exception`, after
a report on stderr of its own.
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
    """The tokenizer in the file `path`, tried on a few letters; `where` begins the UserError when it cannot be used."""
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"{where}: is no file; copy it from the model that it belongs to")
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
    """Let a panic come now. An exception is no fault yet: a vocabulary of four letters knows no others."""
    try:
        ids = tokenizer.encode("a b\n", add_special_tokens=False).ids
        tokenizer.decode(ids)
    except Exception:
        return


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing that a library writes to the descriptor itself is seen."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
