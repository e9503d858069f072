"""Bad input ends at once, with one clear line a problem and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import convert_hf
from megatron_a2d import train
from megatron_a2d.checkpoint.manifest import write_manifest
from megatron_a2d.utils.atomic_write import hold_directory
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_hf, write_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that a run needs."""
    root = tmp_path_factory.mktemp("good")
    for kind in ("dense", "moe"):
        write_hf(root / kind, kind)
        convert_hf.main(["--hf-model", str(root / kind), "--out", str(root / f"{kind}_checkpoint")])
    write_tokens(root / "tokens", 40, 250, seed=0)
    write_tokens(root / "foreign", 40, 5000, seed=0)
    return root


def arguments(root: Path, **changes: Any) -> list[str]:
    """A dry run that is in order, with some settings changed (None removes one)."""
    settings: dict[str, Any] = {
        "load": root / "moe_checkpoint", "train-data-path": root / "tokens", "valid-data-path": root / "tokens",
        "seq-length": 32, "global-batch-size": 8,
    }  # fmt: skip
    settings |= {key.replace("_", "-"): value for key, value in changes.items()}
    flags = [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    return [*flags, "--dry-run"]


def test_a_good_run_passes(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*arguments(good, expert_model_parallel_size=4), "--world-size", "8"])
    shown = capsys.readouterr().out
    assert "8 processes = TP 1 x PP 1 x CP 1 x DP 8, experts EP 4 x ETP 1" in shown and "256 tokens" in shown


def test_another_model_than_the_recipes_is_refused(good: Path) -> None:
    with pytest.raises(UserError) as end:
        train.main(arguments(good, model="Qwen/Qwen3-30B-A3B-Base"))
    assert "--model Qwen/Qwen3-30B-A3B-Base: has num_layers 48, the checkpoint 4" in "\n".join(end.value.problems)
    train.main(arguments(good, model=good / "moe"))


def test_what_does_not_fit_is_refused_before_it_is_queued(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(arguments(good, cluster="h100"))
    assert "of 79.1: weights" in capsys.readouterr().out
    small = good / "small.yaml"
    large = (ROOT / "launch" / "clusters" / "h100.yaml").read_text()
    small.write_text(large.replace("memory_gib: 79.1", "memory_gib: 2.0"))
    with pytest.raises(UserError, match=r"has 2\.0 GiB, the run needs"):
        train.main(arguments(good, cluster=small))


def drop_idx(root: Path) -> dict[str, Any]:
    shutil.copy(root / "tokens.bin", root / "alone.bin")
    return {"train_data_path": root / "alone"}


def empty_pair(root: Path) -> dict[str, Any]:
    for suffix in (".bin", ".idx"):
        (root / f"empty{suffix}").touch()
    return {"train_data_path": root / "empty"}


def damaged(root: Path, change: Callable[[Path], None], intact: bool = True) -> dict[str, Any]:
    """A copy of the checkpoint with something wrong inside; `intact`: its files are as their manifest says."""
    copy = root / f"damaged_{change.__name__}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root / "moe_checkpoint", copy)
    change(copy / "release")
    if intact:
        write_manifest(copy / "release")
    return {"load": copy}


def other_model_config(directory: Path) -> None:
    path = directory / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 128}))


def mask_outside(directory: Path) -> None:
    path = directory / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 99999}))


def mask_is_a_word(directory: Path) -> None:
    path = directory / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token_id": 5}))


def no_config(directory: Path) -> None:
    (directory / "hf" / "config.json").unlink()


def not_qwen(directory: Path) -> None:
    (directory / "hf" / "config.json").write_text(json.dumps({"model_type": "bert"}))


def dense_weights(directory: Path) -> None:
    shutil.copy(directory.parents[1] / "dense_checkpoint" / "release" / ".metadata", directory / ".metadata")


def no_metadata(directory: Path) -> None:
    (directory / ".metadata").unlink()


def no_tokenizer(directory: Path) -> None:
    (directory / "hf" / "tokenizer.json").unlink()


def flipped_bit(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)


CASES: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("nothing to start from", lambda root: {"load": None}, "--load: is missing"),
    ("checkpoint is missing", lambda root: {"load": root / "nowhere"}, "nowhere: no such directory"),
    ("checkpoint is a file", lambda root: {"load": root / "tokens.bin"}, "tokens.bin: is a file, not a directory"),
    ("checkpoint is a HF directory", lambda root: {"load": root / "moe"}, "latest_checkpointed_iteration"),
    ("other architecture", lambda root: damaged(root, other_model_config), "embedding"),
    ("dense weights, MoE config", lambda root: damaged(root, dense_weights), "mlp"),
    ("mask outside the embedding", lambda root: damaged(root, mask_outside), "not a token id"),
    ("mask is an ordinary token", lambda root: damaged(root, mask_is_a_word), "which text uses"),
    ("no config", lambda root: damaged(root, no_config), "config"),
    ("not Qwen", lambda root: damaged(root, not_qwen), "bert"),
    ("no metadata", lambda root: damaged(root, no_metadata), "incomplete"),
    ("file is gone", lambda root: damaged(root, no_tokenizer, intact=False), "tokenizer.json: is missing"),
    ("bit is flipped", lambda root: damaged(root, flipped_bit, intact=False), "__0_0.distcp: is damaged"),
    ("no such iteration", lambda root: {"ckpt_step": 3}, "contains no iteration"),
    ("no data given", lambda root: {"train_data_path": None}, "--train-data-path: is missing"),
    ("data are missing", lambda root: {"train_data_path": root / "none"}, "none"),
    (".bin without .idx", drop_idx, "alone.idx is missing"),
    ("empty files", empty_pair, "is empty"),
    ("foreign token ids", lambda root: {"train_data_path": root / "foreign"}, "the model's vocabulary has 256"),
    ("validation too small", lambda root: {"global_batch_size": 4096, "micro_batch_size": 1}, "--valid-data-path"),
    ("samples too long", lambda root: {"seq_length": 513}, "context length is 512"),
    ("layout", lambda root: {"tensor_model_parallel_size": 2}, "does not divide the 1 processes"),
]  # fmt: skip


UNWRITABLE = {
    "file": "is not a directory",
    "file/run": "is not a directory",
    "/proc/run": "/proc",
    "loop": "is not a directory",
    "loop/run": "is not a directory",
    "nowhere/run": "is not a directory",  # the target of a link
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_run_that_cannot_be_saved(name: str, good: Path, tmp_path: Path) -> None:
    """The dry run says so too, in the words of --save, and makes nothing."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "target")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        train.main(arguments(good, save=tmp_path / name))
    (problem,) = error.value.problems
    assert problem.startswith(f"--save {tmp_path / name}: cannot be written") and UNWRITABLE[name] in problem
    with pytest.raises(UserError, match=f"^--save {tmp_path / name}: cannot be written"):
        hold_directory(tmp_path / name, "--save")
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_can_be_saved_makes_nothing_yet(good: Path, tmp_path: Path) -> None:
    train.main(arguments(good, save=tmp_path / "new" / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_train_refuses(make: Callable[[Path], dict[str, Any]], message: str, good: Path) -> None:
    with pytest.raises(UserError) as error:
        train.main(arguments(good, **make(good)))
    assert any(message in problem for problem in error.value.problems), error.value.problems
    assert all("\n" not in problem for problem in error.value.problems)


def test_exit_code_and_message(good: Path) -> None:
    """As a user sees it: no traceback, exit code 2, and nothing under --save."""
    command = [
        sys.executable,
        "-m",
        "megatron_a2d.train",
        *arguments(good, seq_length=513, save=good / "run", weight_decay=-1),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2 and all(line.startswith("error: --") for line in lines), result.stderr
    assert not (good / "run").exists()


def test_launcher_finds_it_before_it_starts(good: Path) -> None:
    """launch/train.sh checks first, and ends with the checks' exit code; torchrun's own would be 1, with a traceback."""
    command = [ROOT / "launch" / "train.sh", *arguments(good, expert_model_parallel_size=3)[:-1]]
    environment = {"BIN": str(Path(sys.executable).parent), "NPROC": "2", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: --expert-model-parallel-size 3")]
    assert result.returncode == 2 and len(lines) == len(set(lines)) == 2, "the layout's and the model's, each once"
    assert "Traceback" not in result.stderr
