"""Conversion by several workers, and resumed after any end: the same files as of one unbroken run."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from xxhash import xxh3_64_hexdigest

from checkpoints_tools import convert_hf
from megatron_a2d.checkpoint import tensor_rows
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.conversion import torch_dist_writer
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.conversion.resumable_output import JOURNAL, resumable_directory
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.families.qwen3 import hub_config
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.unit.hf_tensors import tensors_of


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


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


def test_sigkill_and_the_same_command_again(tmp_path: Path, monkeypatch) -> None:
    """Several times, at other moments; in the end the checkpoint is the one of an unbroken run."""
    monkeypatch.setattr(tensor_rows, "SLAB_BYTES", 100_000)
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 4 << 20)
    tokens = {"vocab_size": 20_000, "mask_token_id": 19_999, "eos_token_id": 0}
    write_synthetic(tmp_path / "hf", hub_config("0.6B", num_hidden_layers=2, **tokens))
    convert(tmp_path / "hf", tmp_path / "expected", workers=2)
    partial, seen = tmp_path / ".out.partial", []
    for wanted in (2, 9):
        # A fork has imported everything: to start python with torch takes longer than the conversion.
        process = multiprocessing.get_context("fork").Process(
            target=convert, args=(tmp_path / "hf", tmp_path / "out"), kwargs={"workers": 2}
        )
        process.start()
        deadline = time.monotonic() + 600
        while process.is_alive() and len(list(partial.glob("release/*.distcp"))) <= wanted:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.join()
        seen.append(len((partial / JOURNAL).read_text().splitlines()) - 1 if partial.exists() else -1)
        assert not (tmp_path / "out").exists() or seen[-1] == -1
    assert any(count > 0 for count in seen), seen
    convert(tmp_path / "hf", tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_two_processes_do_not_write_one_directory(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", "--out", {}), pytest.raises(UserError, match="another process"):
        with resumable_directory(tmp_path / "out", "--out", {}):
            pass


def test_a_full_disk_keeps_what_is_complete(tmp_path: Path, capsys) -> None:
    with pytest.raises(OSError, match="full"), resumable_directory(tmp_path / "out", "--out", {}) as work:
        for name, facts in (
            ("a", {"xxh3": xxh3_64_hexdigest(b"1234")}), ("b", {"crc32": "9be3e0a3"}),
            ("c", {"xxh3": "0" * 16}), ("d", {"crc32": "0" * 8}), ("e", {}),
        ):  # fmt: skip
            (work.directory / name).write_bytes(b"1234")
            work.record(name, facts)
        raise OSError(28, "full")
    assert "the disk is full" in " ".join(capsys.readouterr().err.split())
    with resumable_directory(tmp_path / "out", "--out", {}) as work:
        assert list(work.done) == ["a", "b"]  # CRC-32: journals of earlier versions
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


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
