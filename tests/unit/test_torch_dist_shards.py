"""torch_dist checkpoints in shards: ours through megatron.core's loader, chunks of other layouts, extra state."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.tensor_rows import RowRange
from megatron_a2d.checkpoint.torch_dist_reader import open_torch_dist
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.weight_map import WeightMap
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.hf_tensors import assert_bitwise_equal, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Transformer Engine and Apex")


@pytest.fixture
def one_process() -> Iterator[None]:
    if dist.is_initialized():
        pytest.skip("another test holds a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def reference(tensors: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Megatron's tensors of the tiny MoE, by formulas that know nothing of the table. 2 KV groups."""
    result = {}
    for layer in range(num_layers):
        p = f"model.layers.{layer}."
        groups = [tensors[f"{p}self_attn.{n}_proj.weight"].unflatten(0, (2, -1)) for n in "qkv"]
        result[f"qkv.{layer}"] = torch.cat(groups, dim=1).flatten(0, 1)
        result[f"proj.{layer}"] = tensors[p + "self_attn.o_proj.weight"]
        for e in range(8):
            x = f"{p}mlp.experts.{e}."
            result[f"fc1.{layer}.{e}"] = torch.cat([tensors[x + "gate_proj.weight"], tensors[x + "up_proj.weight"]])
            result[f"fc2.{layer}.{e}"] = tensors[x + "down_proj.weight"]
    return result


def test_megatron_loads_a_converted_checkpoint(tmp_path: Path, one_process: None) -> None:
    """All layers and experts are requested in the shards of tensor-parallel size 2."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    hf = tiny.write_hf(tmp_path / "hf", "moe", torch.bfloat16)
    convert(hf, tmp_path / "ckpt")
    expected = reference(tensors_of(hf), num_layers=4)
    experts = "decoder.layers.mlp.experts.experts."
    # name -> key, axis that is cut, pieces
    cuts = {
        "qkv": ("decoder.layers.self_attention.linear_qkv", 0, 2),
        "proj": ("decoder.layers.self_attention.linear_proj", 1, 2),
        "fc1": (experts + "linear_fc1", 0, 4),
        "fc2": (experts + "linear_fc2", 1, 2),
    }
    state: dict[str, Any] = {}
    for name, tensor in expected.items():
        kind, *lead = name.split(".")
        key, axis, pieces = cuts[kind]
        counts = (4, 8)[: len(lead)]
        offsets = [(i, int(index), count) for i, (index, count) in enumerate(zip(lead, counts, strict=True))]
        for piece, part in enumerate(tensor.chunk(pieces, dim=axis)):
            state[f"{name}|{piece}"] = ShardedTensor.from_rank_offsets(
                key + ".weight",
                torch.full_like(part, float("nan")).contiguous(),
                *offsets,
                (len(lead) + axis, piece, pieces),
                prepend_axis_num=len(lead),
            )
        index = tuple(map(int, lead))
        state[f"{name}|extra"] = ShardedObject(f"{key}._extra_state", None, counts, index)
    loaded = dist_checkpointing.load(state, str(resolve(tmp_path / "ckpt")))
    for name, tensor in expected.items():
        _, axis, pieces = cuts[name.partition(".")[0]]
        assert torch.equal(torch.cat([loaded[f"{name}|{piece}"] for piece in range(pieces)], dim=axis), tensor), name
        assert loaded[f"{name}|extra"] is None
    assert loaded["iteration"] == 0


class Shards(SavePlanner):
    """Saves given boxes: (key, offsets, tensor with its leading axes, global shape)."""

    def __init__(self, boxes: list[tuple[str, tuple[int, ...], torch.Tensor, tuple[int, ...]]]):
        self.boxes = {MetadataIndex(key, offsets): (data, shape) for key, offsets, data, shape in boxes}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        ChunkStorageMetadata(torch.Size(index.offset or ()), data.shape),
                        TensorProperties(dtype=data.dtype),
                        torch.Size(shape),
                    ),
                )
                for index, (data, shape) in self.boxes.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.boxes[write_item.index][0]


def save_boxes(directory: Path, boxes: list) -> None:
    directory.mkdir(parents=True)
    dcp.save({}, storage_writer=dcp.FileSystemWriter(directory), planner=Shards(boxes), no_dist=True)
    torch.save({"iteration": 7, "consumed_samples": 56}, directory / "common.pt")
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def boxes_of(release: Path, tensor_parallel: int) -> list:
    """The weights of a converted checkpoint, cut as tensor parallelism (of experts too) cuts them."""
    columns = ("linear_proj.weight", "linear_fc2.weight")
    whole = ("layernorm", "layer_norm", "router")
    boxes = []
    with open_checkpoint(release) as weights, open_torch_dist(release) as stored:
        for block in weights.map.blocks():
            matrix = stored.read(RowRange(block.key, block.lead, 0, block.num_rows))
            shape = stored.shapes[block.key]
            axis = 1 if block.key.endswith(columns) else 0
            pieces = tensor_parallel * (2 if "linear_fc1.weight" in block.key else 1)
            pieces = 1 if any(word in block.key for word in whole) else pieces
            position = 0
            for part in matrix.chunk(pieces, dim=axis):
                offsets = [0] * matrix.ndim
                offsets[axis] = position
                position += part.shape[axis]
                data = part.contiguous().reshape((*(1 for _ in block.lead), *part.shape))
                boxes.append((block.key, (*block.lead, *offsets), data, shape))
    return boxes


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("tensor_parallel", [2, 4])
def test_sharded_chunks_are_put_together(kind: str, tensor_parallel: int, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ckpt")
    release = tmp_path / "ckpt" / "release"
    boxes = boxes_of(release, tensor_parallel)
    # What else a trained checkpoint holds.
    boxes.append(("optimizer.state.exp_avg.output_layer.weight", (0,), torch.zeros(8), (8,)))
    save_boxes(tmp_path / "trained" / "iter_0000007", boxes)
    shutil.copytree(release / HF_FILES, tmp_path / "trained" / "iter_0000007" / HF_FILES)
    export(tmp_path / "trained" / "iter_0000007", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(hf))


def test_missing_overlapping_and_unknown_chunks_are_refused(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    convert(hf, tmp_path / "ckpt")
    release = tmp_path / "ckpt" / "release"
    boxes = boxes_of(release, 2)
    victim = next(i for i, box in enumerate(boxes) if box[0].endswith("linear_fc2.weight"))
    key, offsets, data, shape = boxes[victim]
    shifted = (*offsets[:-1], offsets[-1] + 1)
    cases = {
        "elements stored": boxes[:victim] + boxes[victim + 1 :],
        "stored twice": [*boxes, (key, shifted, data, shape)],
        "tensor surplus .* is unknown": [*boxes, ("surplus", (0,), torch.zeros(3), (3,))],
        "final_layernorm.weight is missing": [box for box in boxes if "final_layernorm" not in box[0]],
        "has shape": [
            box if box[0] != "decoder.final_layernorm.weight" else (*box[:2], box[2][:32], (32,)) for box in boxes
        ],
    }
    for number, (message, bad) in enumerate(cases.items()):
        directory = tmp_path / f"case{number}" / "iter_0000007"
        save_boxes(directory, bad)
        shutil.copytree(release / HF_FILES, directory / HF_FILES)
        with pytest.raises(UserError, match=message):
            export(directory, tmp_path / "out", "qwen3")
        assert not (tmp_path / "out").exists()


def test_extra_state_is_listed_for_every_layer_and_expert() -> None:
    model_config = model_config_from_hf(tiny.hub_config("moe"), "config.json")
    keys = list(WeightMap(model_config).extra_state_keys())
    assert len(keys) == len(set(keys)) == 4 + 4 + 2 * 4 * 8 + 1
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_3_4" in keys
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_2.7_4.8" in keys
    assert "output_layer._extra_state/shard_0_1" in keys
