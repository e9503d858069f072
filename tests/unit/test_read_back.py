"""Verification from the output alone: what is written wrong is found without a second look at the source."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.checkpoint.tensor_rows import OpenFiles, RowRange, bytes_of
from megatron_a2d.conversion import hf_to_torch_dist, read_back, torch_dist_to_hf
from megatron_a2d.conversion.compare_weights import compare_weights
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.read_back import ReadBack, ReadRows, RecordedRows
from megatron_a2d.conversion.sources import Weights, as_type, open_checkpoint, open_hf
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.weight_map import WeightBlock
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification import logits_report
from tests import tiny

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    convert(tiny.write_hf(directory / "hf", "moe"), directory / "ckpt")
    return directory


def run(direction: str, models: Path, out: Path, **options) -> None:
    if direction == "convert":
        convert(models / "hf", out, **options)
    else:
        export(models / "ckpt", out, "qwen3", **options)


def damage(direction: str, change: Callable[[bytearray], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`change` the largest file as soon as it is written."""
    module, name = {
        "convert": (hf_to_torch_dist, "write_torch_dist"),
        "export": (torch_dist_to_hf, "write_safetensors"),
    }[direction]
    write = getattr(module, name)

    def write_badly(work, *arguments):
        result = write(work, *arguments)
        path = max(work.directory.rglob("*"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return result

    monkeypatch.setattr(module, name, write_badly)


@pytest.mark.parametrize("direction", ["convert", "export"])
@pytest.mark.parametrize("fault", ["one bit", "exchanged values"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", NORM, "model.layers.1.self_attn.k_proj.weight", "model.layers.3.mlp.gate.weight",
        "model.layers.2.mlp.experts.7.up_proj.weight", "lm_head.weight",
    ],
)  # fmt: skip
def test_damage_is_found(name: str, fault: str, direction: str, models: Path, tmp_path: Path, monkeypatch) -> None:
    """One bit, and the same bytes in another order, as a wrong permutation leaves them."""
    with open_hf(models / "hf") as source:
        stop = source.tensors.shapes[name][0]
        row = bytes(bytes_of(source.tensors.read(RowRange(name, (), stop - 1, stop)).contiguous()))

    def change(data: bytearray) -> None:
        assert data.count(row) == 1
        last = data.index(row) + len(row)
        if fault == "one bit":
            data[last - 4] ^= 1
        else:
            data[last - 8 : last] = data[last - 4 : last] + data[last - 8 : last - 4]

    damage(direction, change, monkeypatch)
    with pytest.raises(UserError, match=rf"tensor {name} differs from .* by up to ") as refusal:
        run(direction, models, tmp_path / "out")
    assert len(refusal.value.problems) == 1 and not list(tmp_path.iterdir())
    run(direction, models, tmp_path / "out", verify=False)  # control: nothing else looks there


def test_parts_in_the_wrong_order_are_found(models: Path, tmp_path: Path, monkeypatch) -> None:
    """Written with up before gate, and V before K before Q; what reads it back has the true map."""
    right = WeightBlock.hf_rows

    def wrong(block: WeightBlock, start: int, stop: int) -> list[RowRange]:
        return right(block, start, stop)[::-1]

    monkeypatch.setattr(WeightBlock, "hf_rows", wrong)
    monkeypatch.setattr("megatron_a2d.conversion.torch_dist_writer.CHUNK_BYTES", 1 << 30)
    with pytest.raises(UserError) as refusal:
        convert(models / "hf", tmp_path / "out")
    assert {"q_proj", "k_proj", "v_proj"} <= {
        line.split(".weight")[0].split(".")[-1] for line in refusal.value.problems
    }


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_the_source_is_read_once(direction: str, models: Path, tmp_path: Path, monkeypatch) -> None:
    """Nor is it held in memory: the output is judged when the source is gone."""
    source = models / ("hf" if direction == "convert" else "ckpt/release")
    files = [path for pattern in ("*.safetensors", "*.distcp") for path in source.glob(pattern)]

    def check(written: ReadBack):
        contents = {path: path.read_bytes() for path in files}
        try:
            for path in files:
                os.truncate(path, 0)
            return written.compare()[0]
        finally:
            for path, content in contents.items():
                path.write_bytes(content)

    run(direction, models, tmp_path / "out", check=check)
    assert (tmp_path / "out").is_dir()


@pytest.fixture
def written(models: Path) -> Iterator[tuple[Weights, Weights]]:
    with open_hf(models / "hf") as source, open_checkpoint(models / "ckpt", from_disk=True) as output:
        yield source, output


def test_what_was_not_read_is_read_again(written: tuple[Weights, Weights]) -> None:
    """An interrupted run wrote it: only the source can tell what it should be."""
    source, output = written
    recorded = RecordedRows(source.tensors)
    name = "model.embed_tokens.weight"
    rows = source.tensors.shapes[name][0]
    recorded.read(RowRange(name, (), 5, 9))
    assert [pair[:2] for pair in recorded.ranges(name)] == [(0, 5), (5, 9), (9, rows)]
    assert [piece is None for _, _, piece in recorded.ranges(name)] == [True, False, True]
    comparison, _ = ReadBack(recorded, source, output, workers=2).compare()
    assert comparison == compare_weights(source, output, lambda amount: None)
    for other in (NORM, "model.layers.2.mlp.experts.3.down_proj.weight"):
        changed = RecordedRows(_OneValueOff(source.tensors, other))
        with pytest.raises(UserError, match=f"tensor {other} differs"):
            ReadBack(changed, source, output).compare()


class _OneValueOff:
    """A source, except for the last value of a tensor."""

    def __init__(self, source, name: str):
        self.shapes, self.dtype, self._source, self._name = source.shapes, source.dtype, source, name

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        rows = self._source.read(row_range)
        if row_range.name == self._name and row_range.stop == self.shapes[self._name][0]:
            rows.view(-1)[-1] += 1
        return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_a_comparison(dtype: torch.dtype, models: Path, tmp_path: Path) -> None:
    done = convert(models / "hf", tmp_path / "out", dtype=dtype)
    with open_hf(models / "hf") as source, open_checkpoint(tmp_path / "out") as output:
        assert done.comparison == compare_weights(source, output, lambda amount: None)
        assert done.comparison.largest_rounding > 0
        cast = as_type(source, dtype)
        recorded = RecordedRows(source.tensors, dtype)
        assert recorded.dtype(NORM) == cast.dtype(NORM)
        assert torch.equal(recorded.read(RowRange(NORM, (), 0, 4)), cast.read(RowRange(NORM, (), 0, 4)))


def test_forward_passes_share_the_pass(written: tuple[Weights, Weights]) -> None:
    """Each sees the rows of the tensors that it asks for, and may leave out others."""
    source, output = written
    names = list(source.tensors.shapes)

    def take(rows: ReadRows, step: int) -> list[torch.Tensor]:
        return [torch.cat([part for _, part in rows(name)]) for name in names[::step]]

    recorded = RecordedRows(source.tensors)
    _, results = ReadBack(recorded, source, output, workers=3).compare(
        [lambda rows: take(rows, 1), lambda rows: take(rows, 7), lambda rows: []]
    )
    for result, step in zip(results, (1, 7), strict=False):
        for name, found in zip(names[::step], result, strict=True):
            stop = source.tensors.shapes[name][0]
            assert torch.equal(found, source.tensors.read(RowRange(name, (), 0, stop)))
    assert results[2] == []


@pytest.mark.parametrize("fault", ["fails", "asks too late"])
def test_a_forward_pass_that_fails_ends_the_run(fault: str, written: tuple[Weights, Weights]) -> None:
    source, output = written
    names = list(source.tensors.shapes)

    def forward(rows: ReadRows) -> None:
        if fault == "fails":
            next(rows(names[3]))
            raise ValueError("asks too late")
        list(rows(names[5]))
        list(rows(names[4]))

    with pytest.raises((ValueError, RuntimeError), match=r"asked for too late|asks too late"):
        ReadBack(RecordedRows(source.tensors), source, output).compare([forward, lambda rows: None])


def test_a_read_that_fails_ends_the_forward_passes(written: tuple[Weights, Weights], monkeypatch) -> None:
    source, output = written
    monkeypatch.setattr(read_back, "_checksum", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ReadBack(RecordedRows(source.tensors), source, output).compare([lambda rows: list(rows(NORM))])


def test_a_large_output_is_read_once_for_all(models: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The report of the shared pass is that of passes one by one, and every row is read once, but for the few that an
    embedding chooses."""
    losses = []
    for limit in (logits_report.DEFAULT_MAX_BYTES, 0):
        monkeypatch.setattr(logits_report, "DEFAULT_MAX_BYTES", limit)
        convert_hf.main(["--hf-model", str(models / "hf"), "--out", str(tmp_path / f"ckpt{limit}")])
        export_hf.main(["--checkpoint", str(tmp_path / f"ckpt{limit}"), "--out", str(tmp_path / f"out{limit}")])
        losses.append([line for line in capsys.readouterr().out.splitlines() if "cross-entropy" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    with open_hf(models / "hf") as source, open_checkpoint(tmp_path / "ckpt0", from_disk=True) as output:
        read = []
        original = output.tensors.read

        def count(row_range: RowRange) -> torch.Tensor:
            if row_range.name != "model.embed_tokens.weight":
                read.append(row_range)
            return original(row_range)

        monkeypatch.setattr(output.tensors, "read", count)
        _, lines = logits_report.report_written(ReadBack(RecordedRows(source.tensors), source, output))
        assert "largest difference 0," in lines[1] and "both streamed" in lines[1]
        assert len(read) == len(set(read)) and {item.name for item in read} == source.tensors.shapes.keys() - {
            "model.embed_tokens.weight"
        }
        expected = logits_report.loss_by_time(output, logits_report.label_shift(output))
        assert lines[2:] == logits_report.loss_lines(*expected, output.model_config.vocab_size)


@pytest.mark.parametrize("support", ["full", "refused at the opening", "refused at the read", "short reads"])
def test_reads_past_the_page_cache(support: str, tmp_path: Path, monkeypatch) -> None:
    values = torch.arange(20_000, dtype=torch.int16)
    (tmp_path / "file").write_bytes(b"x" + values.numpy().tobytes())
    calls = {"open": os.open, "preadv": os.preadv}
    direct: set[int] = set()

    def open_file(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and support == "refused at the opening":
            raise OSError(errno.EINVAL, "not here")
        descriptor = calls["open"](path, flags & ~os.O_DIRECT, *rest)  # what the test's disk makes of it is not asked
        direct.update({descriptor} if flags & os.O_DIRECT else ())
        return descriptor

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            assert offset % 4096 == 0 and len(buffers[0]) % 4096 == 0
            if support == "refused at the read":
                raise OSError(errno.EINVAL, "not aligned")
            if support == "short reads":
                buffers = [buffers[0][: 4096 * (1 + offset % 3)]]
        return calls["preadv"](descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    files = OpenFiles(from_disk=True)
    ranges = [(0, 1), (0, 20_000), (2047, 2048), (5000, 19_999), (19_990, 20_000)]
    for kept in (1, len(ranges)):  # memory is used again once a tensor is gone, not before
        found: deque[torch.Tensor] = deque(maxlen=kept)
        for start, stop in ranges:
            found.append(files.read_tensor(tmp_path / "file", 1 + 2 * start, (stop - start,), torch.int16))
            expected = [values[begin:end] for begin, end in ranges[: ranges.index((start, stop)) + 1]][-kept:]
            assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
    with pytest.raises(UserError, match="ends after byte 40001"):
        files.read_tensor(tmp_path / "file", 1, (20_001,), torch.int16)
    assert bool(direct) == (support != "refused at the opening")
    files.close()
