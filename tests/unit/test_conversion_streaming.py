"""Conversion of large models: in parallel, resumed after any end, bounded in memory, strict about values."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf, export_hf, synthesize
from megatron_a2d.checkpoint import tensor_rows as rows
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.conversion import torch_dist_writer
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.qwen3_shapes import SIZES, hub_config
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.conversion.resumable_output import JOURNAL, resumable_directory
from megatron_a2d.conversion.safetensors_files import plan_shards
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.hf_tensors import assert_bitwise_equal, fuse_experts, tensors_of

ROOT = Path(__file__).parents[2]
NAME = "model.layers.1.self_attn.k_proj.weight"


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def reduced(size: str) -> dict[str, Any]:
    """The row of the table a sixteenth as wide and four layers deep: the same proportions of heads, groups and MLP."""
    config = hub_config(size, vocab_size=512, num_hidden_layers=4, head_dim=16, mask_token_id=511)
    config |= {"bos_token_id": 0, "eos_token_id": 1}
    for key in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if key in config:
            config[key] //= 16
    if "num_experts" in config:
        config["num_experts"] //= 8
    return config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stored", ["per expert", "fused"])
def test_every_qwen3_goes_in_and_out(size: str, stored: str, tmp_path: Path) -> None:
    config = reduced(size)
    if stored == "fused" and "num_experts" not in config:
        pytest.skip("a dense model has no experts")
    write_synthetic(tmp_path / "hf", config, fused=stored == "fused", max_shard_bytes=500_000)
    write_synthetic(tmp_path / "expected", config, max_shard_bytes=10**9)
    if stored == "fused":  # other names, and so other values: the rows of one expert after another
        (tmp_path / "expected" / "model.safetensors").unlink()
        save_file(split_experts(tensors_of(tmp_path / "hf")), tmp_path / "expected" / "model.safetensors")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    convert(tmp_path / "hf", tmp_path / "ckpt", workers=2)
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3", max_shard_bytes=700_000, workers=2)
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))


@pytest.mark.parametrize("limit", [90, 250, 1000, 5000, 10**6])
def test_shards_are_of_about_one_size(limit: int) -> None:
    sizes = {f"t{number}": 5 + (number * 7919) % 89 for number in range(200)} | {"huge": 700, "last": 3}
    shards = plan_shards(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    filled = [sum(sizes[name] for name in shard) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(filled, shards, strict=True))
    if limit >= 5000:  # filling one after the other would leave a small last shard
        assert len(shards) == math.ceil(sum(filled) / limit)
        assert max(filled) - min(filled) < 100


@pytest.mark.parametrize("refusal", ["none", "at the opening", "at the first write"])
def test_files_are_written_with_and_without_the_page_cache(refusal: str, tmp_path: Path, monkeypatch) -> None:
    calls = {"open": os.open, "write": os.write}
    direct: set[int] = set()

    def open_file(path: Path, flags: int, mode: int) -> int:
        if flags & rows._DIRECT and refusal == "at the opening":
            raise OSError(errno.EINVAL, "not here")
        descriptor = calls["open"](
            path, flags & ~rows._DIRECT, mode
        )  # what the test's disk makes of it is not the question
        direct.update({descriptor} if flags & rows._DIRECT else ())
        return descriptor

    def write(descriptor: int, data: memoryview) -> int:
        if descriptor in direct and refusal == "at the first write":
            direct.discard(descriptor)
            raise OSError(errno.EINVAL, "not aligned")
        return calls["write"](descriptor, data[: 1 + len(data) // 2])  # a short write is no error

    monkeypatch.setattr(rows, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "write", write)
    # A flag that the file system refused is still on the descriptor; here none ever was.
    monkeypatch.setattr(rows.StreamedFile, "_use_cache", lambda self: refusal == "at the first write")
    data = bytes(random.Random(0).randbytes(5000))
    with rows.StreamedFile(tmp_path / "file") as file:
        for begin in range(0, len(data), 700):
            file.write(data[begin : begin + 700])
    assert (tmp_path / "file").read_bytes() == data
    assert not (tmp_path / "file").stat().st_mode & 0o111, "weights are no program"


def test_a_write_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), rows.StreamedFile(Path("/dev/full")) as file:
        file.write(b"x" * 5_000_000)
    with pytest.raises(OSError, match="No space"), rows.StreamedFile(Path("/dev/full")) as file:
        file.write(b"x")


def split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts one by one, as on the hub, by a formula that knows nothing of the table."""
    result = {}
    for name, tensor in tensors.items():
        if "gate_up_proj" in name:
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + f"{expert}."
                result |= {f"{prefix}gate_proj.weight": gate.clone(), f"{prefix}up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            for expert, rows in enumerate(tensor):
                result[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = rows.clone()
        else:
            result[name] = tensor
    return result


def test_synthetic_values_are_told_apart_and_do_not_depend_on_shards(tmp_path: Path, capsys) -> None:
    arguments = ["--size", "0.6B", "--num-hidden-layers", "1", "--dtype", "fp16"]  # 330 MB
    synthesize.main([*arguments, "--out", str(tmp_path / "a")])
    synthesize.main([*arguments, "--out", str(tmp_path / "b"), "--max-shard-size", "100MB"])
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert_bitwise_equal(first, second)
    assert first["model.embed_tokens.weight"].shape == (151936, 1024) and "lm_head.weight" not in first
    assert 0.019 < float(first["model.embed_tokens.weight"].float().std()) < 0.021
    key, value = (first[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "kv")
    assert key.dtype == torch.float16 and not torch.equal(key, value)
    with pytest.raises(UserError, match=r"--size 9B: is not a Qwen3 size"):
        synthesize.main(["--size", "9B", "--out", str(tmp_path / "c")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_types_go_through(dtype: torch.dtype, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe", dtype)
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors_of(hf))


def test_layers_may_store_experts_differently(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    original = tensors_of(hf)
    fuse_experts(hf)
    mixed = {
        name: tensor for name, tensor in tensors_of(hf).items() if not name.startswith("model.layers.2.mlp.experts")
    }
    mixed |= {name: tensor for name, tensor in original.items() if name.startswith("model.layers.2.mlp.experts")}
    save_file(mixed, hf / "model.safetensors")
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert_bitwise_equal(tensors_of(tmp_path / "out"), original)


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 200_000)
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    for workers in (1, 3):
        convert(hf, tmp_path / f"ckpt{workers}", workers=workers)
        export(tmp_path / "ckpt1", tmp_path / f"out{workers}", "a2d", max_shard_bytes=300_000, workers=workers)
    assert len(list((tmp_path / "ckpt1" / "release").glob("*.distcp"))) > 4
    assert contents(tmp_path / "ckpt1") == contents(tmp_path / "ckpt3")
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert not check_manifest(tmp_path / "ckpt3" / "release")


def interrupted(command: Callable[[], Any], monkeypatch, after: int) -> None:
    """Run `command`; Ctrl-C comes when it has moved `after` slabs."""
    from megatron_a2d.checkpoint.tensor_rows import OpenFiles

    original, count = OpenFiles.read_tensor, 0

    def read_tensor(self: OpenFiles, *args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OpenFiles, "read_tensor", read_tensor)
        with pytest.raises(KeyboardInterrupt):
            command()


@pytest.mark.parametrize("direction", ["convert", "export"])
def test_an_interrupted_run_is_continued(direction: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 100_000)
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    convert(hf, tmp_path / "ckpt")
    export(tmp_path / "ckpt", tmp_path / "expected", "qwen3", max_shard_bytes=100_000)
    out, expected = tmp_path / "out", tmp_path / ("ckpt" if direction == "convert" else "expected")

    def command() -> None:
        if direction == "convert":
            convert(hf, out, workers=1)
        else:
            export(tmp_path / "ckpt", out, "qwen3", max_shard_bytes=100_000, workers=1)

    interrupted(command, monkeypatch, after=100)
    partial = tmp_path / ".out.partial"
    assert not out.exists()
    complete = [json.loads(line)["file"] for line in (partial / JOURNAL).read_text().splitlines()[1:]]
    assert 2 <= len(complete) < len(list(expected.rglob("*.distcp")) + list(expected.glob("*.safetensors")))
    # What was damaged since is written again, what is whole is not.
    damaged, kept = partial / complete[0], partial / complete[1]
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    before = kept.stat().st_ino
    command()
    assert contents(out) == contents(expected) and not partial.exists()
    assert (out / complete[1]).stat().st_ino == before


def test_another_source_or_option_starts_anew(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 100_000)
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    interrupted(lambda: convert(hf, tmp_path / "out", workers=1), monkeypatch, after=25)
    assert (tmp_path / ".out.partial").exists()
    convert(hf, tmp_path / "out", dtype=torch.bfloat16)
    assert "starting from scratch" in capsys.readouterr().err
    convert(hf, tmp_path / "expected", dtype=torch.bfloat16)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_sigkill_and_the_same_command_again(tmp_path: Path) -> None:
    """Several times, at other moments; in the end the checkpoint is the one of an unbroken run."""
    tokens = {"vocab_size": 20_000, "mask_token_id": 19_999, "eos_token_id": 0}
    write_synthetic(tmp_path / "hf", hub_config("0.6B", num_hidden_layers=2, **tokens))
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_a2d.checkpoint import tensor_rows\n"
        "from megatron_a2d.conversion import torch_dist_writer\n"
        "tensor_rows.SLAB_BYTES, torch_dist_writer.FILE_BYTES = 100_000, 4 << 20\n"
        "from megatron_a2d.conversion.hf_to_torch_dist import convert\nconvert(Path('hf'), Path(sys.argv[1]), workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    subprocess.run([*command, "expected"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    partial, seen = tmp_path / ".out.partial", []
    for wanted in (2, 9):
        process = subprocess.Popen([*command, "out"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while process.poll() is None and len(list(partial.glob("release/*.distcp"))) <= wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(len((partial / JOURNAL).read_text().splitlines()) - 1 if partial.exists() else -1)
        assert not (tmp_path / "out").exists() or seen[-1] == -1
    assert any(count > 0 for count in seen), seen
    subprocess.run([*command, "out"], cwd=tmp_path, env=environment, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_two_processes_do_not_write_one_directory(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", "--out", {}), pytest.raises(UserError, match="another process"):
        with resumable_directory(tmp_path / "out", "--out", {}):
            pass


def test_a_full_disk_keeps_what_is_complete(tmp_path: Path, capsys) -> None:
    with pytest.raises(OSError, match="full"), resumable_directory(tmp_path / "out", "--out", {}) as work:
        (work.directory / "a").write_bytes(b"1234")
        work.record("a", {"crc32": "9be3e0a3"})
        raise OSError(28, "full")
    assert "the disk is full" in " ".join(capsys.readouterr().err.split())
    with resumable_directory(tmp_path / "out", "--out", {}) as work:
        assert list(work.done) == ["a"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense", torch.bfloat16)
    tensors = tensors_of(hf)
    bad = ["model.layers.3.mlp.up_proj.weight", NAME]
    for name in bad:
        tensors[name].view(-1)[77] = value
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError) as caught:
        convert(hf, tmp_path / "out")
    assert [problem.split()[2] for problem in caught.value.problems] == [NAME, bad[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert_hf.main(["--hf-model", str(hf), "--out", str(tmp_path / "ckpt"), "--allow-nonfinite", "--no-verify"])
    with pytest.raises(UserError, match="not finite"):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    arguments = ["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--format", "qwen3"]
    export_hf.main([*arguments, "--allow-nonfinite", "--no-verify"])
    assert_bitwise_equal(tensors_of(tmp_path / "out"), tensors)


def test_all_that_is_wrong_is_listed_together(tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "moe", max_shard_size="300KB")
    files = sorted(hf.glob("*.safetensors"))
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    shutil.copyfile(files[0], hf / "model-extra.safetensors")  # duplicates
    index["weight_map"]["extra"] = "model-extra.safetensors"
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(files[1])
    names = list(tensors)
    tensors.pop(names[0])  # missing
    tensors[names[1]] = tensors[names[1]][:-1].clone()  # mis-shaped
    tensors[names[2]].view(-1)[0] = float("nan")
    tensors["stranger"] = torch.zeros(3)  # unknown
    save_file(tensors, files[1])
    with pytest.raises(UserError) as caught:
        convert(hf, tmp_path / "out")
    text = str(caught.value)
    for name, reason in (
        (names[0], "is missing"), (names[1], "has shape"), (names[2], "not finite"), ("stranger", "is unknown"),
        ("tensor", "is also in"),
    ):  # fmt: skip
        assert any(name in line and reason in line for line in text.splitlines()), (name, reason)


def test_nothing_is_kept_of_a_source_that_is_refused(tmp_path: Path, monkeypatch) -> None:
    """A run that saw a NaN and was then killed must not hand its files to the next one as checked."""
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 100_000)
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    tensors = tensors_of(hf)
    tensors["model.embed_tokens.weight"][0, 0] = float("nan")
    save_file(tensors, hf / "model.safetensors")
    interrupted(lambda: convert(hf, tmp_path / "out", workers=1), monkeypatch, after=30)
    journal = tmp_path / ".out.partial" / JOURNAL
    assert not journal.exists() or len(journal.read_text().splitlines()) == 1
    with pytest.raises(UserError, match=r"embed_tokens.weight has values that are not finite"):
        convert(hf, tmp_path / "out")


def test_what_was_let_pass_is_not_kept_for_a_strict_run(tmp_path: Path, monkeypatch) -> None:
    """--allow-nonfinite, Ctrl-C when all files are written, then the same without the flag."""
    from megatron_a2d.conversion import hf_to_torch_dist as module

    hf = tiny.write_hf(tmp_path / "hf", "dense")
    tensors = tensors_of(hf)
    tensors["model.embed_tokens.weight"][0, 0] = float("nan")
    save_file(tensors, hf / "model.safetensors")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "copy_hf_files", interrupt)
        convert(hf, tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(UserError, match=r"embed_tokens.weight has values that are not finite"):
        convert(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_of_the_last_flush_costs_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    from megatron_a2d.conversion import resumable_output as module

    hf = tiny.write_hf(tmp_path / "hf", "dense")

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "fsync_path", interrupt)
        convert(hf, tmp_path / "out")
    assert len((tmp_path / ".out.partial" / JOURNAL).read_text().splitlines()) == 2
    convert(hf, tmp_path / "out")
    assert "resuming an interrupted run, 1 files are complete" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / JOURNAL).exists()


def test_the_empty_directory_one_stands_in_is_filled(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with resumable_directory(Path(), "--out", {}) as work:
        (work.directory / "a").write_text("x")
    assert contents(tmp_path) == {"out/a": b"x"}


def test_links_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(UserError, match="is a symbolic link"), resumable_directory(tmp_path / name, "--out", {}):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "link"]


@pytest.mark.parametrize("workers", ["0", "-2", "65"])
def test_workers_are_a_number_of_threads(workers: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--workers"):
        convert_hf.main(["--hf-model", "x", "--out", str(tmp_path / "out"), "--workers", workers])


def test_the_first_failure_ends_all_jobs() -> None:
    ended, most = [], 30_000  # steps of a job that is not stopped: a minute

    def slow(advance: Callable[[float], None]) -> None:
        steps = 0
        try:
            while steps < most:
                steps += 1
                advance(1)
                time.sleep(0.002)
        finally:
            ended.append(steps)

    def bad(advance: Callable[[float], None]) -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_jobs([slow, bad, *[slow] * 50], 2, lambda amount: None)
    assert len(ended) <= 3 and max(ended) < most
    assert run_jobs([lambda advance, n=n: n for n in range(9)], 3, lambda amount: None) == list(range(9))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two models, one with half a gigabyte more; the peak of a separate process that converts and exports."""
    peaks = []
    code = (
        "from pathlib import Path\n"
        "from megatron_a2d.conversion.hf_to_torch_dist import convert\nfrom megatron_a2d.conversion.torch_dist_to_hf import export\n"
        "convert(Path('hf'), Path('ckpt'), workers=2)\nexport(Path('ckpt'), Path('out'), 'qwen3', workers=2)\n"
        # Not getrusage: its peak begins with that of the process that started this one.
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    small = {"vocab_size": 8192, "mask_token_id": 8191, "bos_token_id": 0, "eos_token_id": 1}
    for layers in (1, 18):
        write_synthetic(tmp_path / "hf", hub_config("0.6B", num_hidden_layers=layers, **small))
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout) * 1024)
        for name in ("hf", "ckpt", "out"):
            shutil.rmtree(tmp_path / name)
    assert peaks[1] < peaks[0] + 100e6, peaks
    assert max(peaks) < 1.5e9
