"""README and docs/: every flag, file, link and anchor that they name exists."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from megatron_a2d.config.settings import flag, settings
from megatron_a2d.evaluation.evaluation_options import OPTIONS
from megatron_a2d.inference.arguments import SAMPLING

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which also names what was renamed
CODE = ("megatron_a2d", "checkpoints_tools", "data_prep", "launch", "bench", "tests")
# Of sbatch, srun, docker, enroot, pip, hf, cmake, torchrun, the serving engines, llama.cpp and Megatron-LM.
FOREIGN = """
--array --backend --build --build-arg --ckpt-format --dependency --diffusion-algorithm --diffusion-block-length
--diffusion-eps --diffusion-steps --dllm-algorithm --dllm-algorithm-config --dllm-block-length --editable --file
--gpus-per-node --local-dir --model-path --no-conversation --no-deps --no-load-optim --no-load-rng --nodes
--nproc-per-node --ntasks-per-node --outfile --output --parsable --per-dataset-sequences-path --repo-type --requeue
--signal --tag --target --temp --time --trust-remote-code
"""
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


@cache
def sources() -> dict[str, str]:
    """Path -> text of every source file."""
    paths = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".sbatch")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths if "fixtures" not in path.parts}


@cache
def known_flags() -> set[str]:
    """Flags of every command (`make` calls one that a study composes), and those of `FOREIGN`."""
    own = {flag(name) for name in (*settings(), *OPTIONS, *SAMPLING)}
    texts = [
        FOREIGN,
        (ROOT / "Makefile").read_text(),
        *(text for path, text in sources().items() if not path.startswith("tests/")),
    ]
    return (
        own | {name.replace("--", "--no-", 1) for name in own} | {word for text in texts for word in FLAG.findall(text)}
    )


def unknown_flags(text: str) -> set[str]:
    return set(FLAG.findall(text)) - known_flags()


def missing_files(text: str) -> list[str]:
    """Code, recipes and scripts that no folder of the repository has; those of other projects have their repository."""
    named = re.findall(r"(?<![\w/.*-])((?:[\w-]+/)+[\w-]+\.(?:py|sh|sbatch)|launch/[\w/-]+\.yaml)\b", text)
    return [
        name
        for name in named
        if not (ROOT / name).is_file() and not any(path.endswith("/" + name) for path in sources())
    ]


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links to no file, or to no heading of it."""
    broken = []
    for link, target, anchor in re.findall(r"(\]\(([^)#\s:]*)(?:#([^)\s]*))?\))", text):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    return broken


@cache
def anchors(page: Path) -> list[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


THEIRS = {"lm_eval/defaults.py", "perf_recipes/qwen/b200/qwen3_moe.py", "pipeline_parallel/utils.py"}


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_flags_and_files_exist(page: Path) -> None:
    text = page.read_text()
    assert not unknown_flags(text)
    assert not set(missing_files(text)) - THEIRS - {".gpu/use.sh", "findings/NAME.sh"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text())


def test_what_is_missing_is_found() -> None:
    assert unknown_flags("`--async-save`, `--no-monitor`, `--mc-num 4`, `--a-sync-save`") == {"--a-sync-save"}
    assert missing_files("`launch/train.sh`, `data/dataloader.py`, `data/data_loader.py`, `launch/recipes/x.yaml`") == [
        "data/data_loader.py", "launch/recipes/x.yaml",
    ]  # fmt: skip
    links = "[a](docs/data.md), [b](docs/data.md#samples), [c](docs/date.md), [d](docs/data.md#examples), [e](https://a.b/c)"
    assert broken_links(ROOT / "README.md", links) == ["](docs/date.md)", "](docs/data.md#examples)"]
