"""The rooms of the house: imports run strictly downwards, and the lower floors stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_a2d"

LEVELS = {
    "errors": 0, "exit_codes": 0, "printable": 0, "parsing": 0, "tokenizer": 0, "files": 0, "partials": 0, "console": 0, "architecture": 0, "rotary": 0, "config": 0, "checks": 0, "performance": 0, "gpus": 0, "precision": 0, "cli": 0,
    "diffusion": 1, "conversion": 1, "hf": 1,
    "runtime": 2, "model": 2, "data": 2,
    "training": 3, "study": 3, "verification": 3, "inference": 3, "evaluation": 3,
    "live_view": 3, "replay_page": 3, "planner": 3, "train": 4, "generate": 4, "evaluate": 4, "plan": 4, "preflight": 4,
}  # fmt: skip
STRANGERS = {("diffusion", "conversion"), ("diffusion", "hf"), ("conversion", "diffusion"), ("hf", "diffusion"), ("hf", "conversion"), ("conversion", "hf"),
             ("model", "data"), ("data", "model")}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names of the project's modules that a file imports, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path) -> list[str]:
    here = room(path)
    if here == "__init__":
        return []
    bad = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "megatron_a2d" or len(parts) < 2 or parts[1] == here or parts[1] not in LEVELS:
            continue
        there = parts[1]
        downwards = LEVELS[there] <= LEVELS[here] and not (LEVELS[there] == LEVELS[here] == 4)
        if not downwards or (here, there) in STRANGERS:
            bad.append(f"{path.relative_to(ROOT)} imports {name}")
    return bad


def test_imports_run_downwards() -> None:
    files = [path for path in PACKAGE.rglob("*.py")]
    assert len(files) > 30
    assert {room(path) for path in files} - {"__init__"} <= set(LEVELS), "a new room needs its floor in LEVELS"
    assert not [line for path in files for line in violations(path)]


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upward = PACKAGE / "diffusion" / "noise.py"
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "from megatron_a2d.training import loop\n")
    assert violations(upward)


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (
            (
                "errors",
                "exit_codes",
                "printable",
                "parsing",
                "tokenizer",
                "files",
                "partials",
                "console",
                "architecture",
                "rotary",
                "config",
                "checks",
                "performance",
                "gpus",
                "precision",
                "cli",
            ),
            {"torch", "numpy", "megatron", "transformers"},
        ),
        (("diffusion", "conversion", "hf"), {"megatron"}),
    ],
)
def test_lower_floors_are_light(modules: tuple[str, ...], forbidden: set[str]) -> None:
    """Seen in a fresh interpreter: what these modules, all files of them, pull in."""
    names = []
    for module in modules:
        path = PACKAGE / module
        files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        names += [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not forbidden & {name.split(".")[0] for name in loaded.split()}


def test_tokenising_does_not_wait_for_torch() -> None:
    """Each worker is a process of its own, and torch takes longer to import than a piece to tokenise."""
    code = "import data_prep.tokenize_corpus, data_prep.pieces, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "megatron", "transformers"} & set(loaded.split())


@pytest.mark.parametrize(
    ("module", "arguments", "code", "words"),
    [
        ("train", "--lrr 1", 2, "--lrr: unknown argument"),
        ("train", "--seq-length 64 --lr -1", 2, "--lr -1.0: must be positive"),
        (
            "train",
            "--model Qwen/Qwen3-8B --dry-run --settings-only --world-size 8 --cluster h100",
            2,
            "GiB, the run needs",
        ),
        ("train", "--help", 0, "--global-batch-size"),
        ("preflight", "--settings-only --config /nowhere", 2, "--config /nowhere: "),
        ("generate", "--model x --prompt a --max-new-tokens 0", 2, "--max-new-tokens 0: must be at least 1"),
        ("evaluate", "--model x --out y", 2, "there is nothing to evaluate"),
        ("plan", "--cluster h100", 2, "--gpus: is missing"),
        ("plan", "--help", 0, "--imbalance"),
    ],
)
def test_what_settings_show_does_not_wait_for_torch(module: str, arguments: str, code: int, words: str) -> None:
    """It takes seconds to import, on a busy machine half a minute."""
    run = "from megatron_a2d.console import entry_point; entry_point(main.main)"
    if module == "preflight":
        module = "preflight.__main__"
    program = (
        f"import sys, megatron_a2d.{module} as main\ntry: {run}\n"
        "finally: assert not {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


def test_extras_are_installed_from_the_clone() -> None:
    """There is no package of this name on the public index."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py"), *ROOT.glob("data_prep/*.py")]
    assert not [path for path in files if re.search(r"install \S*megatron_a2d", path.read_text())]
