"""Import layers: imports run downwards, and the lower layers import neither torch nor megatron."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_a2d"

# From the bottom up. A package may import those of lower layers, and those that stand before it in its own.
LAYERS = (
    ("utils",),
    ("families", "config", "terminal", "diffusion", "hf"),
    ("megatron_compat", "distributed", "data"),
    ("checkpoint", "conversion", "model"),
    ("planner", "verification", "report"),
    ("training",),
    ("inference", "evaluation", "preflight", "study", "rehearsal"),
    ("train", "generate", "evaluate", "plan", "inspect_batch"),
)
ORDER = {package: (number, place) for number, layer in enumerate(LAYERS) for place, package in enumerate(layer)}
# Packages of which neither may import the other, although one lies below: model and data meet in training alone.
APART = {
    ("model", "data"),
    ("diffusion", "terminal"),
    ("hf", "config"),
    ("hf", "families"),
    ("hf", "diffusion"),
    ("conversion", "diffusion"),
}

# Files of fewer than 40 lines, besides __init__ and __main__, and why each is a file.
SHORT_FILES = {
    "launch/eval/local/local_pass_at_1.py": "lm-eval loads it from beside the task's YAML",
    "launch/eval/tasks/pass_at_1.py": "lm-eval loads it from beside the task's YAML",
    "launch/random_model.py": "shared by two scripts",
    "megatron_a2d/config/gpus.py": "a table of data-sheet values, extended with each new GPU",
    "megatron_a2d/diffusion/sampling/early_stop.py": "searched for by name",
    "megatron_a2d/families/diffullama.py": "one file a family",
    "megatron_a2d/hf/configuration_rnd.py": "copied into every exported model",
    "megatron_a2d/hf/configuration_sdar.py": "copied into every exported model",
    "megatron_a2d/hf/modeling_rnd.py": "copied into every exported model",
    "megatron_a2d/model/flops.py": "searched for by name; the planner imports it without torch",
    "megatron_a2d/model/logits_chunks.py": "shared with the planner, which imports no torch",
    "megatron_a2d/training/loss_spikes.py": "searched for by name",
    "megatron_a2d/training/manual_gc.py": "searched for by name: --manual-gc",
    "megatron_a2d/utils/errors.py": "searched for by name",
}


def imports(path: Path) -> set[str]:
    """Dotted names of the project's modules that a file imports, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def violations(path: Path) -> list[str]:
    here = package_of(path)
    if here == "__init__":
        return []
    bad = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "megatron_a2d" or len(parts) < 2 or parts[1] == here or parts[1] not in ORDER:
            continue
        there = parts[1]
        is_entry_point = there in LAYERS[-1]  # nothing imports one
        if ORDER[there] >= ORDER[here] or is_entry_point or (here, there) in APART:
            bad.append(f"{path.relative_to(ROOT)} imports {name}")
    return bad


def test_imports_run_downwards() -> None:
    files = [path for path in PACKAGE.rglob("*.py")]
    assert len(files) > 30
    assert {package_of(path) for path in files} - {"__init__"} == set(ORDER), "a new package needs its layer in LAYERS"
    assert not [line for path in files for line in violations(path)]


def test_files_have_between_40_and_400_lines() -> None:
    folders = ("megatron_a2d", "data_prep", "checkpoints_tools", "launch", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    tests = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert len(tests) > 100 and not {path: length for path, length in (lengths | tests).items() if length > 400}
    short = {path for path, length in lengths.items() if length < 40 and not path.endswith("__.py")}
    assert short == set(SHORT_FILES), "merge it with its neighbour, or give the reason"


def test_no_base_name_twice() -> None:
    """A file is named by its base name alone: in prose, in a traceback, in a search."""
    folders = ("megatron_a2d", "data_prep", "checkpoints_tools", "launch", "bench", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "fixtures" not in path.parts]
    names = Counter(path.name for path in files if path.name not in ("__init__.py", "__main__.py", "conftest.py"))
    assert len(names) > 300 and not [name for name, number in names.items() if number > 1]


def test_six_questions_are_answered_by_four_files_each() -> None:
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## Six questions\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w/]+\.py)`", row) for row in section.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 6 and all(0 < len(row) <= 4 for row in rows)
    assert not [name for row in rows for name in row if not (PACKAGE / name).is_file()]


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upward = PACKAGE / "diffusion" / "rng.py"
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: "from megatron_a2d.training import loop\n")
    assert violations(upward)


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (("utils", "families", "config", "terminal"), {"torch", "numpy", "megatron", "transformers"}),
        (("diffusion", "conversion", "hf"), {"megatron"}),
    ],
)
def test_lower_layers_are_light(modules: tuple[str, ...], forbidden: set[str]) -> None:
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
    """Each worker is a separate process, and torch takes longer to import than a shard to tokenise."""
    code = "import data_prep.tokenize_corpus, data_prep.tokenize_shards, sys; print(*sys.modules)"
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
        ("generate", "--model /nowhere --prompt a", 2, "--model /nowhere: no such directory"),
        ("generate", "--model LICENSE --prompt a", 2, "--model LICENSE: is a file, not a directory"),
        ("generate", "--model docs --prompt a", 2, "--model docs: contains no config.json"),
        ("generate", "--model= --prompt a", 2, "--model '': is empty"),
        ("generate", "--model docs --infill a", 2, "--infill: has no hole"),
        (
            "generate",
            "--model docs --input /nowhere",
            2,
            "--input /nowhere: cannot be read (No such file or directory)",
        ),
        ("generate", "--model docs --input docs", 2, "--input docs: cannot be read (is a directory)"),
        ("generate", "--model docs --prompt a --bf16", 2, "--bf16: needs a checkpoint"),
        ("train", "--load /nowhere --train-data-path x", 2, "--load /nowhere: no such directory"),
        ("train", "--load= --train-data-path x", 2, "--load '': is empty"),
        ("train", "--load docs --save= --train-data-path x", 2, "--save '': is empty"),
        ("train", "--load docs --save LICENSE/run --train-data-path x", 2, "--save LICENSE/run: cannot be written"),
        ("evaluate", "--model x --out y", 2, "nothing to evaluate"),
        ("evaluate", "--model docs --out y --tasks a", 2, "--model docs: contains no config.json"),
        ("plan", "--cluster h100", 2, "--gpus: is missing"),
        ("plan", "--help", 0, "--imbalance"),
    ],
)
def test_what_settings_show_does_not_wait_for_torch(module: str, arguments: str, code: int, words: str) -> None:
    """It takes seconds to import, on a busy machine half a minute."""
    run = "from megatron_a2d.terminal.console import entry_point; entry_point(main.main)"
    if module == "preflight":
        module = "preflight.__main__"
    program = (
        f"import sys, megatron_a2d.{module} as main\ntry: {run}\n"
        "finally: assert not {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("checkpoints_tools.convert_hf", "--hf-model /nowhere --out x", "--hf-model /nowhere: no such directory"),
        ("checkpoints_tools.convert_hf", "--hf-model docs --out x", "--hf-model docs: contains no config.json"),
        ("checkpoints_tools.convert_hf", "--hf-model LICENSE --out x", "--hf-model LICENSE: is a file, not a"),
        ("checkpoints_tools.convert_hf", "--hf-model= --out x", "--hf-model '': is empty"),
        ("checkpoints_tools.convert_hf", "--hf-model docs --out LICENSE/x", "--out LICENSE/x: cannot be written"),
        ("checkpoints_tools.convert_hf", "--hf-model docs --out tests", "--out tests: already exists"),
        ("checkpoints_tools.convert_megatron", "--megatron x --out tests", "--out tests: already exists"),
        ("checkpoints_tools.convert_megatron", "--megatron /nowhere --out x", "--megatron /nowhere: no such directory"),
        ("checkpoints_tools.export_hf", "--checkpoint docs --out x", "--checkpoint docs: contains no latest"),
        ("checkpoints_tools.average", "--checkpoints /nowhere docs --out x", "--checkpoints /nowhere: no such dir"),
        ("checkpoints_tools.average", "--checkpoints LICENSE docs --out x", "--checkpoints LICENSE: is a file, not a"),
        ("checkpoints_tools.inspect", "--checkpoint /dev/null", "--checkpoint /dev/null: is not a directory"),
        ("checkpoints_tools.inspect", "--checkpoint=", "--checkpoint '': is empty"),
        ("checkpoints_tools.inspect", "--hf-model docs", "--hf-model docs: contains no config.json"),
        (
            "checkpoints_tools.place_experts",
            "--checkpoint /nowhere --expert-model-parallel-size 2",
            "--checkpoint /nowhere: no such directory",
        ),
        ("checkpoints_tools.synthesize", "--size 8C --out x", "--size 8C: is not a Qwen3 size"),
        ("checkpoints_tools.synthesize", "--size 8B --out tests", "--out tests: already exists"),
        ("checkpoints_tools.synthesize", "--size 8B --out x --tokenizer /nowhere", "--tokenizer /nowhere: no such"),
        ("checkpoints_tools.verify", "--checkpoint /nowhere --export docs", "--checkpoint /nowhere: no such directory"),
        ("checkpoints_tools.verify", "--hf-model docs --export tests", "--export tests: contains no config.json"),
        ("data_prep.inspect_dataset", "--data-path /nowhere", "/nowhere: there is no nowhere.idx"),
        ("data_prep.mixture_dry_run", "--data-mixture /nowhere", "--data-mixture /nowhere: is missing"),
        (
            "data_prep.tokenize_corpus",
            "--input /nowhere --tokenizer /nowhere --output-prefix x",
            "--tokenizer /nowhere: does not exist",
        ),
        ("data_prep.tokenize_corpus", "--input= --tokenizer x --output-prefix x", "--input '': is empty"),
        ("data_prep.tokenize_corpus", "--input docs --tokenizer= --output-prefix x", "--tokenizer '': is empty"),
        (
            "data_prep.tokenize_corpus",
            "--input x --tokenizer x --output-prefix LICENSE/x",
            "--output-prefix LICENSE/x:",
        ),
        ("megatron_a2d.inspect_batch", "/nowhere", "/nowhere: there is no such file"),
        ("megatron_a2d.inspect_batch", "docs", "docs: cannot be read as a batch (is a directory)"),
        ("megatron_a2d.inspect_batch", "LICENSE", "LICENSE: cannot be read as a batch (it is not an .npz file)"),
    ],
)
def test_what_paths_show_does_not_wait_for_torch(module: str, arguments: str, words: str) -> None:
    run = "from megatron_a2d.terminal.console import entry_point; entry_point(main.main)"
    program = (
        f"import sys, {module} as main\ntry: {run}\nfinally: assert not {{'torch', 'megatron'}} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_extras_are_installed_from_the_clone() -> None:
    """There is no package of this name on the public index."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py"), *ROOT.glob("data_prep/*.py")]
    assert not [path for path in files if re.search(r"install \S*megatron_a2d", path.read_text())]
