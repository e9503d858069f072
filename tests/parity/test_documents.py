"""Documents that are packed into one sample and isolated give what each gives alone; and what cuts a sample in two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.parity.pool import Pool

LENGTHS = (5, 1, 11, 15)
TOKENS = torch.randint(3, 250, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand(2, -1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)


def alone(pool: Pool, case: Case) -> torch.Tensor:
    parts = [
        pool.run("logits", 1, checkpoint=case.checkpoint, settings=case.settings, tokens=part)[0]
        for part in TOKENS.split(LENGTHS, dim=1)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_isolated_documents_are_documents_alone(kind: str, cases: dict[str, Case], pool: Pool) -> None:
    """With continuous positions and with those reset per document; without document masking the result differs."""
    case = cases[kind]
    expected = alone(pool, case)

    def difference(**inputs: Any) -> float:
        arguments = {"checkpoint": case.checkpoint, "settings": case.settings, "tokens": TOKENS, **inputs}
        return float((pool.run("logits", 1, **arguments)[0] - expected).abs().max())

    assert difference(documents=DOCUMENTS) < 1e-4
    assert difference(documents=DOCUMENTS, positions=POSITIONS) < 1e-4
    assert difference() > 0.1 and difference(positions=POSITIONS) > 0.1
    moved = DOCUMENTS.roll(1, dims=1)
    assert difference(documents=moved) > 0.1


def test_packed_sequences_are_documents_alone(cases: dict[str, Case], pool: Pool) -> None:
    """The form that Transformer Engine takes, wired through megatron's layers, with a plain attention in its place."""
    case = cases["dense"]
    arguments = {"checkpoint": case.checkpoint, "settings": case.settings, "packed": True}
    expected = alone(pool, case)
    for row in range(2):
        one = pool.run("logits", 1, tokens=TOKENS[row : row + 1], documents=DOCUMENTS[row : row + 1], **arguments)[0]
        assert float((one - expected[row : row + 1]).abs().max()) < 1e-4
    whole = pool.run("logits", 1, tokens=TOKENS[:1], **arguments)[0]
    plain = pool.run("logits", 1, checkpoint=case.checkpoint, settings=case.settings, tokens=TOKENS[:1])[0]
    assert float((whole - plain).abs().max()) < 1e-4 < float((whole - expected[:1]).abs().max())


MIXED: dict[str, Any] = {"random_length_prob": 0.5, "reset_position_ids": True, "reset_attention_mask": True}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (2, {"context_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "micro_batch_size": 4}),
]


@pytest.mark.parametrize("settings", [MIXED, {"random_length_prob": 0.5}, {"reset_position_ids": True}], ids=str)
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS, ids=lambda value: str(value))
def test_every_layout_agrees(
    settings: dict[str, Any], ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool
) -> None:
    case = cases["moe"]
    settings = {**case.settings, **settings}
    one = pool.run("train_steps", 1, checkpoint=case.checkpoint, settings=settings, num_steps=2)[0]
    many = pool.run("train_steps", ranks, checkpoint=case.checkpoint, settings={**settings, **layout}, num_steps=2)
    plain = pool.run("train_steps", 1, checkpoint=case.checkpoint, settings=case.settings, num_steps=2)[0]
    for name in ("losses", "grad_norms"):
        assert many[0][name] == pytest.approx(one[name], rel=1e-5)
    assert one["grad_norms"] != pytest.approx(plain["grad_norms"], rel=1e-4)


def test_a_mixture_resumes_bit_for_bit(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Two sources, cut samples, reset positions, unmasked end-of-document tokens: all follow from consumed_samples."""
    case = cases["moe"]
    train, valid = case.settings["train_data_path"], case.settings["valid_data_path"]
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        f"sources:\n  a: {{train_path: {train}, valid_path: {valid}, weight: 2}}\n"
        f"  b: {{train_path: {valid}, valid_path: {train}, weight: 1}}\n"
    )
    settings = {
        **MIXED, "data_mixture": str(mixture), "load": case.checkpoint, "train_iters": 4, "save_interval": 2,
        "log_interval": 1, "eval_interval": 4, "num_workers": 1,
    }  # fmt: skip
    unbroken = pool.run("run", 2, settings={**settings, "save": str(tmp_path / "unbroken")})
    stopped = str(tmp_path / "stopped")
    pool.run("run", 2, settings={**settings, "save": stopped}, stop_at=2)
    resumed = pool.run("run", 2, settings={**settings, "save": stopped})
    for one, other in zip(unbroken, resumed, strict=True):
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
    lines = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert [line["source"] for line in validations] == ["a", "b", "a", "b"]
    assert validations[0]["nelbo"] != validations[1]["nelbo"]
