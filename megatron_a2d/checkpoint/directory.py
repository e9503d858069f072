"""The checkpoint directory: its iterations, and the Hugging Face files stored in each.

CKPT/latest_checkpointed_iteration.txt      "release" (converted weights) or the number of an iteration
CKPT/release/ or CKPT/iter_0000100/         .metadata  __*.distcp  common.pt  metadata.json
    hf/                                     config.json (with mask_token_id), generation config, tokenizer
    run.json                                the settings of the run that wrote it; absent in a release
    run_config.yaml                         the model's settings, for Megatron-Bridge (bridge_config.py)
    manifest.json                           size and checksum of every other file (manifest.py)
    expert_placement.json                   optional, not in the manifest (placement_file.py)
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from megatron_a2d.checkpoint.model_files import check_model_files
from megatron_a2d.config.renamed import recorded_settings
from megatron_a2d.utils.atomic_write import read_json, read_text
from megatron_a2d.utils.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF_FILES = "hf"
RUN_CONFIG = "run.json"
LONGEST_FRONT_MATTER = 1 << 16  # characters

# The files of a complete iteration; metadata.json is written last. megatron.core from 0.17 on writes no common.pt.
REQUIRED_FILES = (".metadata", "common.pt", "metadata.json")

HF_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer*.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model",
    "LICENSE*",
)  # fmt: skip


def is_checkpoint(directory: Path) -> bool:
    """True for a training or converted checkpoint, or one of its iterations; False for anything else."""
    return (directory / TRACKER).exists() or directory.name == RELEASE or directory.name.startswith("iter_")


def directory_name(iteration: int) -> str:
    """The name of an iteration's directory inside a checkpoint."""
    return f"iter_{iteration:07d}"


def iteration_of(directory: str | Path) -> int:
    """The iteration whose weights `directory` holds; 0 for a release."""
    name = Path(directory).name
    match = re.fullmatch(r"iter_(\d+)", name)
    if name != RELEASE and not match:
        raise UserError(f"{directory}: is named neither {RELEASE} nor iter_<number>; give an iteration's directory")
    return int(match[1]) if match else 0


def list_iterations(root: str | Path) -> list[int]:
    """The iterations in the checkpoint `root`, complete or not, ascending."""
    root = Path(root)
    names = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    return sorted(iteration_of(name) for name in names if re.fullmatch(r"iter_\d+", name))


def latest_iteration(root: str | Path) -> int | None:
    """The iteration that the tracker of `root` names; None without a tracker, or if it names a release."""
    tracker = Path(root) / TRACKER
    name = _latest(tracker) if tracker.exists() else RELEASE
    return None if name == RELEASE else iteration_of(name)


def check_directory(path: Path, where: str, remedy: str) -> None:
    """UserError, beginning with `where` (a flag and its value), unless `path` is a directory."""
    if not path.is_dir():
        reason = "is not a directory" if path.exists() else "no such directory"
        raise UserError(f"{where}: {'is a file, not a directory' if path.is_file() else reason}; {remedy}")


def check_hf_directory(path: Path, where: str) -> None:
    """UserError, beginning with `where` (a flag and its value), unless `path` is a Hugging Face directory."""
    remedy = "give a Hugging Face directory, such as one that export_hf wrote"
    check_directory(path, where, remedy)
    if not (path / "config.json").exists():
        raise UserError(f"{where}: contains no config.json; {remedy}")


def resolve(path: str | Path, flag: str = "") -> Path:
    """An iteration's directory: `path` itself, or the latest iteration of the checkpoint `path`.

    `flag` is the command-line name of `path`, for error messages.
    """
    path = Path(path)
    where = f"{flag} {path}" if flag else str(path)
    check_directory(path, where, "give a checkpoint, or one of its iterations")
    if (path / TRACKER).exists():
        directory = path / _latest(path / TRACKER)
        if not directory.is_dir():
            raise UserError(
                f"{path / TRACKER}: names {directory.name}, which does not exist; give the directory of an iteration"
            )
    elif path.name == RELEASE or re.fullmatch(r"iter_\d+", path.name):
        directory = path
    else:
        inside = sorted(entry.name for entry in path.iterdir() if re.fullmatch(r"release|iter_\d+", entry.name))
        remedy = f"give {path / inside[-1]}" if inside else "give a directory written by convert_hf or by training"
        raise UserError(f"{where}: contains no {TRACKER}; {remedy}")
    check_model_files(directory)
    check_complete(directory)
    return directory


def check_complete(directory: Path) -> None:
    """UserError unless the directory is a complete iteration in torch_dist format."""
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if missing == ["common.pt"] and "common_backend" not in read_json(directory / "metadata.json", "the format"):
        return  # from megatron.core 0.17 on: the contents of common.pt are a stored object
    if not missing:
        return
    other = None
    if any(path.is_dir() for path in directory.glob("mp_rank_*")):
        other = "mp_rank_*: Megatron-LM's --ckpt-format torch"
    elif "metadata.json" not in missing:
        backend = read_json(directory / "metadata.json", "the format").get("sharded_backend", "torch_dist")
        other = f"metadata.json: {backend!r}" if backend != "torch_dist" else None
    if other:
        raise UserError(
            f"{directory}: is in another format ({other}); only torch_dist is read, convert it with Megatron-LM: "
            "--ckpt-convert-format torch_dist --ckpt-convert-save DIRECTORY"
        )
    if missing == ["common.pt", "metadata.json"]:
        raise UserError(
            f"{directory}: lacks {', '.join(missing)}; it is incomplete, or in another format (Megatron-LM's torch_dcp "
            "or fsdp_dtensor), and only torch_dist is read; use another iteration, or convert it"
        )
    raise UserError(f"{directory}: lacks {', '.join(missing)}; the checkpoint is incomplete, use another iteration")


def read_run_settings(directory: Path) -> dict[str, Any]:
    """The settings of the run that wrote an iteration's `directory`; UserError if they are missing or invalid."""
    path = directory / RUN_CONFIG
    found, wrong = recorded_settings(read_json(path, "the settings of the run that wrote the checkpoint"))
    if wrong:
        raise UserError(f"{path}: has no usable {', '.join(wrong)}; restore the file, or use another iteration")
    return found


def copy_hf_files(source: str | Path, destination: str | Path) -> None:
    """Copy configuration and tokenizer files, never weights, into the existing directory `destination`."""
    check_model_files(Path(source))
    for pattern in HF_PATTERNS:
        for path in sorted(Path(source).glob(pattern)):
            target = Path(destination) / path.name
            if path.is_dir():  # chat_template/ may hold several
                shutil.copytree(path, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target)


def read_license(source: str | Path) -> str | None:
    """The licence that the model card (README.md) in `source` names in its front matter, as the hub spells it."""
    card = Path(source) / "README.md"
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        begin, *lines = file.read(LONGEST_FRONT_MATTER).split("\n")
    if begin != "---" or "---" not in lines:
        return None
    names = [re.fullmatch(r"license: *([\w.-]+) *", line) for line in lines[: lines.index("---")]]
    return next((name[1] for name in names if name), None)


def _latest(tracker: Path) -> str:
    text = read_text(tracker, "the number of the latest iteration", limit=1024).strip()
    if text == RELEASE:
        return RELEASE
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(f"{tracker}: contains {text[:40]!r}, not an iteration; give an iteration's directory instead")
    return directory_name(int(text))
