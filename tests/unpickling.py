"""Closes every way to unpickle, for tests of what takes a checkpoint."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._weights_only_unpickler
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader


class UnpickledError(AssertionError):
    pass


@contextlib.contextmanager
def nothing_unpickled() -> Iterator[None]:
    """Whatever would unpickle raises: torch's loads, restricted or not, its readers and planners, and pickle's own."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise UnpickledError("something was unpickled")

    class Refused:
        """What stands for a class: modules that are imported meanwhile may derive others from it."""

        __init__ = refuse

    owners: list[tuple[Any, str]] = [
        (torch, "load"), (torch.serialization, "load"), (torch.serialization, "_load"),
        (torch.serialization, "_legacy_load"), (torch._weights_only_unpickler, "load"),
        (torch._weights_only_unpickler, "Unpickler"), (FileSystemReader, "read_metadata"), (FileSystemReader, "read_data"),
        (DefaultLoadPlanner, "load_bytes"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"),
        (pickle, "_load"), (pickle, "_loads"), (pickle, "_Unpickler"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in owners:
            patch.setattr(owner, name, Refused if isinstance(getattr(owner, name), type) else refuse)
        yield
