"""`.metadata` written without torch.distributed.checkpoint is what torch would have written."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from megatron_a2d.checkpoint.metadata_index import Chunk, Index, Location, StoredTensor, read_index
from megatron_a2d.checkpoint.metadata_writer import write_index

INDEX = Index(
    tensors={
        "a.weight": StoredTensor(
            torch.bfloat16,
            (2, 300, 70_000),
            [
                Chunk((0, 0, 0), (1, 300, 70_000), Location("__0_0.distcp", 448, 42_000_999)),
                Chunk((1, 0, 0), (1, 300, 70_000), Location("__0_1.distcp", 5 << 31, 42_000_999)),
            ],
        ),
        "ä.norm": StoredTensor(torch.float32, (7,), [Chunk((0,), (7,), Location("__0_1.distcp", (1 << 31) - 1, 300))]),
    },
    objects={"a._extra_state/shard_0_1": Location("__0_0.distcp", 0, 448)},
)


def expected() -> dcp.Metadata:
    """The same built of torch's classes."""
    kinds: dict = {name: dcp.BytesStorageMetadata() for name in INDEX.objects}
    places = {dcp.MetadataIndex(name): filesystem._StorageInfo(*location) for name, location in INDEX.objects.items()}
    for name, tensor in INDEX.tensors.items():
        chunks = [
            dcp.ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks
        ]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        kinds[name] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            key = dcp.MetadataIndex(name, chunk.offsets, number)
            places[key] = filesystem._StorageInfo(*chunk.location)
    return dcp.Metadata(kinds, None, places, dcp.StorageMeta(), filesystem.CURRENT_DCP_VERSION)


def test_torch_reads_what_it_would_have_written(tmp_path: Path) -> None:
    write_index(tmp_path, INDEX)
    found, right = pickle.loads((tmp_path / ".metadata").read_bytes()), expected()
    assert found == right
    assert found.version == right.version and type(found.storage_meta) is dcp.StorageMeta
    for ours, theirs in zip(found.storage_data, right.storage_data, strict=True):  # `index` is not compared by ==
        assert vars(ours) == vars(theirs) and type(ours.offset) is type(theirs.offset)
    # What a pickle of torch's holds, attribute by attribute: pickled again, the two are the same bytes.
    assert pickle.dumps(pickle.loads(pickle.dumps(right))) == pickle.dumps(pickle.loads(pickle.dumps(found)))


def test_ours_reads_it_too(tmp_path: Path) -> None:
    write_index(tmp_path, INDEX)
    assert read_index(tmp_path) == INDEX


def test_converters_start_without_the_planner() -> None:
    """It takes as long to import as torch itself."""
    code = (
        "import sys, megatron_a2d.conversion.hf_to_torch_dist, megatron_a2d.conversion.torch_dist_to_hf\n"
        "print([name for name in ('torch.distributed.checkpoint', 'sympy', 'megatron.core', 'transformers')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
