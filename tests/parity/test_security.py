"""A checkpoint is data: a pickle that would run code, in each file that training reads, does not run.

The manifest is written anew each time, as whoever made the checkpoint would.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_a2d.config import build
from megatron_a2d.conversion.manifest import write_manifest
from megatron_a2d.conversion.torch_dist_reader import check_pickles
from megatron_a2d.errors import UserError
from megatron_a2d.train import _check
from tests.parity.conftest import copy_of
from tests.parity.jobs import SETTINGS
from tests.parity.pool import Pool


class Evil:
    """Its pickle makes a directory when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved(value: Any) -> bytes:
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


def put_into_metadata(directory: Path, evil: Evil) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = evil
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_common(directory: Path, evil: Evil) -> None:
    common = torch.load(directory / "common.pt", weights_only=True)
    torch.save({**common, "args": evil}, directory / "common.pt")


def append(directory: Path, evil: Evil, metadata: Metadata, name: str) -> None:
    """The stored item `name` now lies at the end of its file, and is `evil`."""
    index, info = next((index, info) for index, info in metadata.storage_data.items() if index.fqn == name)
    blob, path = saved(evil), directory / info.relative_path
    info.offset, info.length = path.stat().st_size, len(blob)
    with path.open("ab") as file:
        file.write(blob)
    metadata.storage_data[index] = info
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_bytes(directory: Path, evil: Evil) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    name = next(name for name, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata))
    append(directory, evil, metadata, name)


def put_into_disguised_bytes(directory: Path, evil: Evil) -> None:
    """The item poses as a tensor by an attribute; torch goes by its type."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    name, item = next(
        (name, item) for name, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)
    )
    item.chunks = []
    append(directory, evil, metadata, name)


def put_into_run_json(directory: Path, evil: Evil) -> None:
    (directory / "run.json").write_bytes(pickle.dumps(evil))


PLACES = [
    (put_into_metadata, r"\.metadata: is refused: it wants to load posix\.mkdir"),
    (put_into_common, r"common\.pt: cannot be read"),
    (put_into_bytes, r"\.distcp: .* is refused"),
    (put_into_disguised_bytes, r"\.distcp: .* is refused"),
    (put_into_run_json, r"run\.json: .* cannot be read|run\.json: .* not valid JSON"),
]  # fmt: skip


def test_an_honest_checkpoint_passes(trained: dict[str, Any]) -> None:
    """Model and optimizer, trained: everything in it is on the allow-lists."""
    check_pickles(Path(trained["settings"]["save"]) / "iter_0000004")
    assert _check(build(SETTINGS | trained["settings"]), 2).start.directory.name == "iter_0000004"


CASES = [
    (put, message, how)
    for put, message in PLACES
    for how in ("resume", "finetune", "release")
    if (put, how) != (put_into_run_json, "release")
]  # a release has none


@pytest.mark.parametrize(("put", "message", "how"), CASES, ids=[f"{put.__name__}-{how}" for put, _, how in CASES])
def test_a_hostile_pickle_does_not_run(
    put: Callable[[Path, Evil], None], message: str, how: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    settings = copy_of(trained, tmp_path)
    directory = tmp_path / "run" / "iter_0000004"
    put(directory, Evil(tmp_path / "owned"))
    write_manifest(directory)
    if how == "finetune":
        settings |= {"load": str(directory), "save": str(tmp_path / "new"), "finetune": True}
    if how == "release":
        directory = directory.rename(tmp_path / "release")
        settings |= {"load": str(directory), "save": None}
    if how == "finetune" and put is put_into_run_json:  # not read at all
        _check(build(SETTINGS | settings), 2)
    else:
        with pytest.raises(UserError, match=message):
            _check(build(SETTINGS | settings), 2)
    assert not (tmp_path / "owned").exists()


def test_a_hostile_tensor_does_not_run(trained: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """A tensor's chunk is first read by torch itself, with its own allow-list: the load fails, and nothing ran."""
    settings = copy_of(trained, tmp_path)
    directory = tmp_path / "run" / "iter_0000004"
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    append(directory, Evil(tmp_path / "owned"), metadata, "decoder.layers.mlp.router.weight")
    write_manifest(directory)
    with pytest.raises(RuntimeError, match="mkdir"):
        pool.run("run", 2, settings={**settings, "train_iters": 5})
    assert not (tmp_path / "owned").exists()


def test_the_pickles_would_have_run(trained: dict[str, Any], tmp_path: Path) -> None:
    """Controls: what torch and megatron.core do with them when nobody looked before."""
    directory = Path(copy_of(trained, tmp_path)["save"]) / "iter_0000004"
    put_into_metadata(directory, Evil(tmp_path / "by_metadata"))
    FileSystemReader(str(directory)).read_metadata()
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item: Any = SimpleNamespace(dest_index=MetadataIndex("x"))
    planner.load_bytes(item, io.BytesIO(saved(Evil(tmp_path / "by_bytes"))))
    torch.load(io.BytesIO(saved(Evil(tmp_path / "by_common"))), weights_only=False)
    assert all((tmp_path / name).is_dir() for name in ("by_metadata", "by_bytes", "by_common"))
