"""What we export gives the trained model's logits, in both lines of transformers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from checkpoints_tools import export_hf
from tests.cases import Case
from tests.parity.pool import Pool
from tests.parity.test_hf import TOKENS, largest_difference, our_logits

TRANSFORMERS4 = os.environ.get("A2D_TRANSFORMERS4", "")
# For each line of input, a directory: the logits of the model there, into a file, whose name is said.
LOAD = """
import sys, torch, transformers
tokens = torch.load(sys.argv[1])
print(transformers.__version__, flush=True)
for number, directory in enumerate(map(str.strip, sys.stdin)):
    model = transformers.AutoModelForMaskedLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    assert "megatron_a2d" not in sys.modules
    with torch.no_grad():
        torch.save(model(tokens).logits, f"logits{number}.pt")
    print(f"logits{number}.pt", flush=True)
"""


@pytest.fixture(scope="module", params=["4.57", "5."])
def their_logits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], torch.Tensor]]:
    """The logits that a line of transformers gives with an export, in one process for all of them, which knows nothing
    of this project: not in its directory, not on its path."""
    if request.param == "4.57" and not TRANSFORMERS4:
        pytest.skip("A2D_TRANSFORMERS4 names no transformers 4.57; `make test` sets it")
    directory = tmp_path_factory.mktemp("transformers")
    torch.save(TOKENS, directory / "tokens.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if request.param == "4.57":
        environment["PYTHONPATH"] = str(Path(TRANSFORMERS4).resolve())
    environment["HF_MODULES_CACHE"] = str(directory / "modules")
    with (directory / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD, "tokens.pt"], cwd=directory, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin and process.stdout

    def answer() -> str:
        assert process.stdout
        said = process.stdout.readline().strip()
        assert said, (directory / "errors").read_text()[-2000:]
        return said

    assert answer().startswith(request.param)

    def logits(export: Path) -> torch.Tensor:
        print(export, file=process.stdin, flush=True)
        return torch.load(directory / answer())

    yield logits
    process.stdin.close()
    assert process.wait() == 0, (directory / "errors").read_text()[-2000:]


@pytest.fixture(scope="module")
def export(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The export of a case in a form, made once for both lines of transformers."""
    root = tmp_path_factory.mktemp("exports")

    @functools.cache
    def made(kind: str, form: str) -> Path:
        out = root / f"{kind}_{form}"
        export_hf.main(["--checkpoint", cases[kind].checkpoint, "--out", str(out), "--format", form])
        return out

    return made


@pytest.fixture(scope="module")
def expected(cases: dict[str, Case], pool: Pool) -> Callable[[str], torch.Tensor]:
    return functools.cache(lambda kind: our_logits(pool, cases[kind], causal=False))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("moe", "rnd1"), ("moe", "a2d"), pytest.param("dense", "a2d", marks=pytest.mark.full), ("dense_tied", "a2d"),
    ],
)  # fmt: skip
def test_export_gives_our_logits(
    kind: str, form: str, their_logits: Callable[[Path], torch.Tensor], export: Callable[[str, str], Path],
    expected: Callable[[str], torch.Tensor],
) -> None:  # fmt: skip
    assert largest_difference(expected(kind), their_logits(export(kind, form))) < 1e-5
