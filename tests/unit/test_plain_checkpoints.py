"""Checkpoints of plain megatron-core (tests/fixtures/write_plain_checkpoint.py), and that no command unpickles any."""

from __future__ import annotations

import builtins
import io
import pickle
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._weights_only_unpickler
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from checkpoints_tools import average, convert_hf, export_hf, inspect, verify
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.checkpoint.load import load_state
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.utils.errors import UserError
from tests.fixtures.write_plain_checkpoint import ITERATION, values_of
from tests.unpickling import UnpickledError, nothing_unpickled

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = ("0_16_1", "0_19_2")


def unpack(version: str, target: Path) -> Path:
    with tarfile.open(FIXTURES / f"megatron_core_{version}.tar.xz") as file:
        file.extractall(target, filter="data")
    return target / "checkpoint"


def test_the_guard_sees_what_it_should() -> None:
    """Control: each of the ways is caught."""
    blob = io.BytesIO()
    torch.save({"a": 1}, blob)
    for weights_only in (True, False):
        blob.seek(0)
        with nothing_unpickled(), pytest.raises(UnpickledError):
            torch.load(blob, weights_only=weights_only)
    with nothing_unpickled(), pytest.raises(UnpickledError):
        pickle.loads(pickle.dumps(builtins.len))
    with nothing_unpickled(), pytest.raises(UnpickledError):
        FileSystemReader(str(FIXTURES)).read_metadata()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tool_reads_it_and_unpickles_nothing(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = unpack(version, tmp_path)
    hf = tmp_path / "qwen3"
    with nothing_unpickled():
        inspect.main(["--checkpoint", str(checkpoint)])
        assert f"{ITERATION}" in capsys.readouterr().out
        export_hf.main(["--checkpoint", str(checkpoint), "--out", str(hf), "--format", "qwen3"])
        verify.main(["--hf-model", str(hf), "--checkpoint", str(checkpoint)])
        convert_hf.main(["--hf-model", str(hf), "--out", str(tmp_path / "again"), "--mask-token-id", "63"])
        verify.main(["--hf-model", str(hf), "--checkpoint", str(tmp_path / "again")])
        twin = tmp_path / "twin" / "iter_0000012"
        shutil.copytree(checkpoint / "iter_0000012", twin)
        average.main(["--checkpoints", str(checkpoint), str(twin), "--out", str(tmp_path / "mean")])
    tensors = load_file(hf / "model.safetensors")
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    shape = tensors["model.layers.1.self_attn.o_proj.weight"].shape
    assert torch.equal(tensors["model.layers.1.self_attn.o_proj.weight"], values_of(name, shape))
    assert read_common(resolve(checkpoint))["consumed_samples"] == 96


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    from megatron_a2d import megatron_compat

    megatron_compat.install()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_rank_loads_its_part_and_unpickles_nothing(version: str, tmp_path: Path, one_process: None) -> None:
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    directory = resolve(unpack(version, tmp_path))
    key = "decoder.layers.self_attention.linear_proj.weight"

    def shards() -> dict[str, Any]:
        """Halves of columns, of each layer, in another type than the file's."""
        return {
            f"{layer} {half}": ShardedTensor.from_rank_offsets(
                key, torch.zeros(16, 8), (0, layer, 2), (2, half, 2), prepend_axis_num=1
            )
            for layer in range(2)
            for half in range(2)
        }

    with nothing_unpickled():
        loaded = load_state({"model": shards()}, directory)["model"]
        for layer in range(2):
            whole = values_of(f"decoder.layers.{layer}.self_attention.linear_proj.weight", torch.Size((16, 16)))
            assert torch.equal(torch.cat([loaded[f"{layer} 0"], loaded[f"{layer} 1"]], dim=1), whole.float())
        with pytest.raises(UserError, match=r"has the shape \[2, 16, 16\], not \[48, 16, 16\]"):
            wrong = ShardedTensor.from_rank_offsets(key, torch.zeros(48, 16, 16))
            load_state({"x": wrong}, directory)
    stored_object = ShardedObject("decoder.layers.self_attention.linear_qkv._extra_state", None, (1,), (0,))
    with pytest.raises(TypeError, match="only tensors are read"):
        load_state({"x": stored_object}, directory)


def test_a_checkpoint_without_common_values_is_incomplete(tmp_path: Path) -> None:
    """0.16.1's metadata.json promises common.pt; 0.19.2's does not, and the object in its place is read instead."""
    old = unpack("0_16_1", tmp_path / "old")
    (old / "iter_0000012" / "common.pt").unlink()
    with pytest.raises(UserError, match=r"lacks common\.pt; the checkpoint is incomplete"):
        resolve(old)
    converted = unpack("0_19_2", tmp_path / "new")
    (converted / "iter_0000012" / "metadata.json").unlink()
    with pytest.raises(UserError, match="incomplete"):
        resolve(converted)


def test_another_format_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000100" / "mp_rank_00" / "model_optim_rng.pt").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    with pytest.raises(UserError, match=r"another format .*mp_rank.*--ckpt-convert-format torch_dist") as caught:
        resolve(tmp_path)
    assert "incomplete" not in str(caught.value)
    zarr, dcp = tmp_path / "zarr" / "iter_0000001", tmp_path / "dcp" / "iter_0000001"
    for directory, name, content in ((zarr, "metadata.json", '{"sharded_backend": "zarr"}'), (dcp, ".metadata", "")):
        directory.mkdir(parents=True)
        (directory / name).write_text(content)
    with pytest.raises(UserError, match=r"another format \(metadata\.json: 'zarr'\)"):
        resolve(zarr)
    with pytest.raises(UserError, match=r"incomplete, or in another format .*torch_dcp"):
        resolve(dcp)


def test_a_checkpoint_without_the_models_files_says_where_they_go(tmp_path: Path) -> None:
    checkpoint = unpack("0_19_2", tmp_path)
    shutil.rmtree(checkpoint / "iter_0000012" / "hf")
    with (
        pytest.raises(UserError, match=r"iter_0000012/hf: .*create the directory with the model's config\.json"),
        open_checkpoint(checkpoint),
    ):
        pass


def test_the_package_names_no_unpickler() -> None:
    """Not even for its own files: no unpickler is within reach."""
    root = Path(sys.modules["megatron_a2d"].__file__ or "").parent
    for path in [*root.rglob("*.py"), *root.parent.glob("checkpoints_tools/*.py"), *root.parent.glob("data_prep/*.py")]:
        text = path.read_text()
        for word in ("import pickle", "from pickle", "torch.load(", "FileSystemReader", "load_common_state_dict"):
            assert word not in text, f"{path}: {word}"
