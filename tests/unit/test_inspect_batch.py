"""`python -m megatron_a2d.inspect_batch`: the texts of a written batch, its masks, and each sample's loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d import inspect_batch
from megatron_a2d.checkpoint.directory import HF_FILES
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.config.settings import build
from megatron_a2d.data.dataloader import Batch, make_batch, write_batch
from megatron_a2d.data.diffusion_samples import make_sample
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.diffusion.loss import sample_sums
from megatron_a2d.evaluation.heldout_nelbo import token_losses
from megatron_a2d.inference.arguments import close_model, load_model
from megatron_a2d.terminal.console import PlainConsole
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer
from tests import tiny
from tests.unit.test_training_facts import base, trained  # noqa: F401  (base is a fixture)

KINDS: dict[str, dict[str, Any]] = {
    "shifted": {},
    "unshifted": {"label_shift": False},
    "blocks": {"objective": "block", "block_length": 8},
    "documents": {"reset_attention_mask": True},
    "ar": {"objective": "ar"},
}
INDICES = (5, 6, 7)


def written(root: Path, settings: dict[str, Any]) -> tuple[Path, Batch, list[np.ndarray], Any]:
    """A file with three samples in a run's directory; the batch, its texts and the tokenizer."""
    hf_files = root / "iter_0000010" / HF_FILES
    tiny.write_tokens(root / "text", 12, 120, seed=3)
    dataset = PackedDataset(root / "text", 32, seed=1)
    make = make_sample(
        build({"seq_length": 32, **settings}), read_model_config(hf_files), dataset, 0, for_training=True
    )
    batch = make_batch(dataset, make, INDICES[0], len(INDICES))
    write_batch(root / "spike_iter_0000012.npz", batch)
    texts = [dataset.tokens(index) for index in INDICES]
    return root / "spike_iter_0000012.npz", batch, texts, read_tokenizer(hf_files / "tokenizer.json", "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_and_its_masks(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """Without a model: the tokenizer is that of the run; ⟦ and ⟧ stand where the model saw masks."""
    file, batch, texts, tokenizer = written(trained(base, tmp_path / "run", KINDS[kind]), KINDS[kind])
    inspect_batch.main([str(file), "--show", "2"])
    shown = capsys.readouterr().out
    heads = re.findall(r"^sample (\d+)  t ([\d.]+)  masked ([\d.]+)%  largest weight ([\d.]+)$", shown, re.MULTILINE)
    assert [int(head[0]) for head in heads] == list(INDICES)
    assert [float(head[1]) for head in heads] == pytest.approx(batch.times.tolist(), abs=1e-4)
    parts = re.split(r"^sample .*\n", shown, flags=re.MULTILINE)[1:]
    assert parts[2] == "", "only two texts are shown"
    masked = 0
    for row, (part, tokens) in enumerate(zip(parts[:2], texts, strict=False)):
        assert re.sub("[⟦⟧]", "", part) == tokenizer.decode(tokens, skip_special_tokens=False) + "\n"
        hidden = batch.tokens[row, :32].numpy() != tokens
        for run in re.findall("⟦(.*?)⟧", part, re.DOTALL):
            masked += len(run)
        pieces = tokenizer.decode(tokens[hidden], skip_special_tokens=False)
        assert "".join(re.findall("⟦(.*?)⟧", part, re.DOTALL)) == pieces
        assert float(heads[row][2]) == pytest.approx(100 * hidden.mean(), abs=0.06)
    assert (masked > 0) == (kind != "ar")


@pytest.mark.parametrize("kind", KINDS)
def test_each_samples_loss(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    """As held-out evaluation computes the whole batch; the worst sample first."""
    run = trained(base, tmp_path / "run", KINDS[kind])
    file, batch, _, _ = written(run, KINDS[kind])
    inspect_batch.main([str(file), "--model", str(run), "--ckpt-step", "10", "--show", "0"])
    shown = capsys.readouterr().out
    found = {int(index): float(loss) for index, loss in re.findall(r"^sample (\d+) .* loss ([\d.]+) nats", shown, re.M)}
    loaded = load_model(str(run), {}, "ar" if kind == "ar" else "mdlm")
    try:
        needed = batch.weights > 0
        losses, correct = token_losses(loaded, batch, needed)
        sums = sample_sums(losses, batch.weights[needed], correct, needed.nonzero()[:, 0], len(INDICES))
        expected = (sums[0] / batch.num_maskable).tolist()
    finally:
        close_model()
    assert found == pytest.approx(dict(zip(INDICES, expected, strict=True)), rel=1e-4, abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True) and min(expected) > 0


def test_the_order_of_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not finite comes first, then the highest loss."""
    losses = (2.0, float("nan"), 3.0, float("inf"))
    samples = [inspect_batch.Sample(index, 0.5, [1], [False], 1.0, loss) for index, loss in enumerate(losses)]
    inspect_batch.show(samples, str, 0, PlainConsole(width=120))
    assert re.findall(r"sample (\d)", capsys.readouterr().out) == ["1", "3", "2", "0"]


def test_masks_are_coloured(capsys: pytest.CaptureFixture[str]) -> None:
    sample = inspect_batch.Sample(0, 0.5, [1, 2, 3], [False, True, False], 1.0, None)
    inspect_batch.show([sample], lambda ids: "-".join(map(str, ids)), 1, PlainConsole(width=120, force_terminal=True))
    assert "1\x1b[1;35m⟦2⟧\x1b[0m3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (None, "there is no such file"),
        (b"not a zip", "cannot be read as a batch \\(it is not an .npz file\\)"),
        (b"", "cannot be read as a batch \\(it is not an .npz file\\)"),
        ({"labels": None}, "is not a batch of this model \\(it has no labels\\)"),
        ({"tokens": np.zeros((3, 31), np.int64)}, "have different shapes"),
        ({"times": np.zeros(2, np.float32)}, "different numbers of samples"),
        ({"tokens": np.zeros((3, 32))}, "have the wrong types"),
        ({"tokens": np.full((3, 32), 999)}, "token ids outside the vocabulary of 256"),
        ({"labels": np.full((3, 32), -1)}, "token ids outside the vocabulary"),
        ({"times": np.array([{}] * 3)}, "cannot be read as a batch"),
    ],
)  # fmt: skip
def test_files_that_hold_no_batch(change: Any, problem: str, base: Path, tmp_path: Path) -> None:  # noqa: F811
    file, batch, _, _ = written(trained(base, tmp_path / "run", {}), {})
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    else:
        fields = {name: value.numpy() for name, value in batch._asdict().items() if value is not None} | change
        np.savez(file, **{name: value for name, value in fields.items() if value is not None})
    with pytest.raises(UserError, match=problem):
        inspect_batch.main([str(file)])


@pytest.mark.parametrize("content", [b"", bytes(range(256)), None])
def test_what_is_no_batch_is_no_fault_of_the_model(content: bytes | None, tmp_path: Path) -> None:
    """There is none here, and none is asked for."""
    file = tmp_path / "file.npz"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}: cannot be read as a batch"):
        inspect_batch.main([str(file)])


def test_flags_without_effect(base: Path, tmp_path: Path) -> None:  # noqa: F811
    file, *_ = written(trained(base, tmp_path / "run", {}), {})
    file.rename(alone := tmp_path / "alone.npz")
    for arguments, problem in (
        ([str(alone)], "--model: is missing; .* holds no checkpoint"),
        ([str(alone), "--ckpt-step", "10"], "--ckpt-step: has no effect without --model"),
        (
            [str(alone), "--model", str(tmp_path / "run"), "--ckpt-step", "11"],
            "^--model .*iter_0000011: no such directory",
        ),
        ([str(alone), "--model", str(alone)], "^--model .*alone.npz: is a file, not a directory"),
        ([str(alone), "--model", str(tmp_path)], f"^--model {tmp_path}: contains no config.json"),
        ([str(alone), "--show", "-1"], "--show -1: must not be negative"),
    ):
        with pytest.raises(UserError, match=problem):
            inspect_batch.main(arguments)
