"""Checkpoints, recipes and data are data: a pickle that would run code, in each file that we read, does not run.

A checkpoint's manifest is written anew each time, as whoever made the checkpoint would.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d import generate, train
from megatron_a2d.checkpoint.manifest import write_manifest
from megatron_a2d.checkpoint.torch_dist_reader import check_pickles
from megatron_a2d.config.settings import build
from megatron_a2d.training.startup_checks import check_run
from megatron_a2d.utils.errors import UserError
from tests.cases import Case, copy_of
from tests.parity.parity_jobs import SETTINGS
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
    assert check_run(build(SETTINGS | trained["settings"]), 2).start.directory.name == "iter_0000004"


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
    with pytest.raises(UserError, match=message):
        check_run(build(SETTINGS | settings), 2)
    assert not (tmp_path / "owned").exists()


# (the file, what reads it); a pickle takes the whole file's place.
READ_BY_TRAINING = [
    "run/iter_0000004/metadata.json", "run/iter_0000004/manifest.json", "run/iter_0000004/run.json",
    "run/iter_0000004/.metadata", "run/iter_0000004/common.pt", "run/iter_0000004/__0_0.distcp",
    "run/iter_0000004/hf/config.json", "run/iter_0000004/hf/tokenizer.json",
    "run/latest_checkpointed_iteration.txt", "tokens.bin", "tokens.idx",
]  # fmt: skip
READ_BY_CONVERSION = ["config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin"]


@pytest.mark.parametrize("name", READ_BY_TRAINING)
def test_no_file_of_a_run_is_unpickled(name: str, trained: dict[str, Any], tmp_path: Path) -> None:
    settings = copy_of(trained, tmp_path, train_data_path=str(tmp_path / "tokens"))
    for suffix in (".bin", ".idx"):
        shutil.copy(trained["settings"]["train_data_path"] + suffix, tmp_path / f"tokens{suffix}")
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    if "iter_" in name and not name.endswith("manifest.json"):
        write_manifest(tmp_path / "run" / "iter_0000004")
    settings["ckpt_step"] = None if name.endswith(".txt") else 4
    # A run resumes without its tracker file (tests/unit/test_log_after_faults.py).
    with contextlib.nullcontext() if name.endswith(".txt") else pytest.raises(UserError):
        check_run(build(SETTINGS | settings), 2)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", READ_BY_CONVERSION)
def test_no_file_of_a_download_is_unpickled(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    shutil.copytree(cases["moe"].hf, tmp_path / "hf")
    if name == "pytorch_model.bin":  # torch would unpickle it
        (tmp_path / "hf" / "model.safetensors").unlink()
    (tmp_path / "hf" / name).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(UserError):
        convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()


def test_a_recipe_is_data(tmp_path: Path) -> None:
    """YAML's own way to call a function, with a control that it would have."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"lr: !!python/object/apply:os.mkdir ['{tmp_path / 'owned'}']\n")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        train.main(["--config", str(recipe), "--dry-run"])
    assert not (tmp_path / "owned").exists()
    yaml.unsafe_load(recipe.read_text())
    assert (tmp_path / "owned").exists()


def test_an_export_brings_no_code(cases: dict[str, Case], tmp_path: Path) -> None:
    """The modelling files that lie in an export are for others: ours are taken, theirs are never imported."""
    out = tmp_path / "export"
    export_hf.main(["--checkpoint", cases["moe"].checkpoint, "--out", str(out), "--format", "a2d"])
    for code in out.glob("*.py"):
        code.write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\n")
    generate.main(["--model", str(out), "--prompt", "the", "--max-new-tokens", "4", "--num-steps", "2"])
    assert not (tmp_path / "owned").exists()


def test_a_hostile_tensor_does_not_run(trained: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """A tensor's chunk is read when the model is loaded: the load fails, and nothing ran."""
    settings = copy_of(trained, tmp_path)
    directory = tmp_path / "run" / "iter_0000004"
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    append(directory, Evil(tmp_path / "owned"), metadata, "decoder.layers.mlp.router.weight")
    write_manifest(directory)
    with pytest.raises(RuntimeError, match=r"the chunk of decoder.layers.mlp.router.weight is refused"):
        pool.run("run", 2, settings={**settings, "train_iters": 5})
    assert not (tmp_path / "owned").exists()


def test_no_command_unpickles(trained: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    """A run that resumes, one that takes weights only, and a checkpoint that writes text, with
    every way to unpickle closed (tests/unit/test_plain_checkpoints.py has the tools)."""
    settings = SETTINGS | copy_of(trained, tmp_path, train_iters=5, expert_model_parallel_size=1)
    recipe, run = tmp_path / "recipe.yaml", str(tmp_path / "run")
    recipe.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    pool.run("guarded", 1, module="megatron_a2d.train", arguments=["--config", str(recipe)])
    assert (tmp_path / "run" / "iter_0000005").is_dir()
    new = ["--config", str(recipe), "--load", run, "--finetune", "--save", str(tmp_path / "new"), "--train-iters", "1"]
    pool.run("guarded", 1, module="megatron_a2d.train", arguments=new)
    assert (tmp_path / "new" / "iter_0000001").is_dir()
    text = ["--model", run, "--prompt", "a", "--max-new-tokens", "2", "--num-steps", "2", "--no-live"]
    pool.run("guarded", 1, module="megatron_a2d.generate", arguments=text)


def test_the_pickles_would_have_run(trained: dict[str, Any], tmp_path: Path) -> None:
    """Controls: what torch and megatron.core do with them without our checks."""
    directory = Path(copy_of(trained, tmp_path)["save"]) / "iter_0000004"
    put_into_metadata(directory, Evil(tmp_path / "by_metadata"))
    FileSystemReader(str(directory)).read_metadata()
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item: Any = SimpleNamespace(dest_index=MetadataIndex("x"))
    planner.load_bytes(item, io.BytesIO(saved(Evil(tmp_path / "by_bytes"))))
    torch.load(io.BytesIO(saved(Evil(tmp_path / "by_common"))), weights_only=False)
    assert all((tmp_path / name).is_dir() for name in ("by_metadata", "by_bytes", "by_common"))
