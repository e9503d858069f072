"""`generate` and `evaluate` as commands on a tiny random model of each family, from its directory and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import convert_hf
from megatron_a2d import evaluate, generate
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.fixtures.record_public_models import MODELS, write_recorded
from tests.unit.local_evaluation import LOCAL

DIFFUSION = (*MODELS, "diffullama")
AUTOREGRESSIVE = ("qwen2", "llama", "llama3")
# What each writes at temperature 0 under the settings of its own sampler.
SAMPLERS = {"dream": "entropy", "llada": "confidence", "llada_moe": "confidence", "diffullama": "rnd1"}


TASKS = ("local_rolling", "local_choice", "local_exact")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """name -> its directory as on the hub, and the checkpoint that convert_hf makes of it."""
    root, found = tmp_path_factory.mktemp("families"), {}
    for name in (*DIFFUSION, *AUTOREGRESSIVE):
        if name in MODELS:
            write_recorded(root / name, name)
        else:
            tiny.write_hf(root / name, "llama" if name == "diffullama" else name, num_hidden_layers=2)
        if name == "diffullama":
            config = json.loads((root / name / "config.json").read_text())
            more = {"objective": "mdlm", "mask_token_id": tiny.MASK_TOKEN_ID}
            (root / name / "config.json").write_text(json.dumps(config | more))
        checkpoint = root / f"{name}_checkpoint"
        convert_hf.main(["--hf-model", str(root / name), "--out", str(checkpoint), "--no-verify"])
        found[name] = (root / name, checkpoint)
    return found


def text_of(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: str) -> str:
    capsys.readouterr()
    prompt = ("--prompt", "def mean(values):\n    return ", "--max-new-tokens", "12", "--num-steps", "12")
    generate.main(["--model", str(directory), *prompt, "--temperature", "0", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", DIFFUSION)
def test_generate(name: str, models: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    """The same text from the directory and from the checkpoint: shift, mask and end tokens are the model's own."""
    texts = [text_of(capsys, directory, "--sampler", SAMPLERS[name]) for directory in models[name]]
    assert texts[0] == texts[1] and texts[0].startswith("def mean(values):\n    return ")
    assert len(texts[0]) > len("def mean(values):\n    return ") + 4 and "<|" not in texts[0]


def results(directory: Path, out: Path, tasks: tuple[str, ...], *arguments: str) -> dict[str, Any]:
    local = ("--include-path", str(LOCAL / "local"), "--tasks", *tasks, "--limit", "1")
    evaluate.main(["--model", str(directory), "--out", str(out), *local, *arguments])
    return json.loads((out / "results.json").read_text())["tasks"]


@pytest.mark.parametrize("name", DIFFUSION)
def test_evaluate(name: str, models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    one, other = (results(path, tmp_path / path.name, TASKS, "--mc-num", "4") for path in models[name])
    assert one["local_rolling"]["bits_per_byte,none"] > 1
    assert other["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        one["local_rolling"]["bits_per_byte,none"], rel=1e-4
    )
    assert {task: one[task] for task in ("local_choice", "local_exact")} == {
        task: other[task] for task in ("local_choice", "local_exact")
    }


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_autoregressive_ones(name: str, models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A checkpoint writes no texts: it is told under which format transformers would."""
    likelihoods, (hf, checkpoint) = TASKS[:2], models[name]
    one = results(hf, tmp_path / "hf", TASKS, "--objective", "ar")
    other = results(checkpoint, tmp_path / "checkpoint", likelihoods, "--objective", "ar")
    assert other["local_rolling"]["bits_per_byte,none"] == pytest.approx(
        one["local_rolling"]["bits_per_byte,none"], rel=1e-4
    )
    assert one["local_choice"] == other["local_choice"] and "exact_match,none" in one["local_exact"]
    with pytest.raises(UserError, match=f"needs an HF model; run .*export_hf --format {name.removesuffix('3')} first"):
        results(checkpoint, tmp_path / "texts", TASKS[2:], "--objective", "ar")
