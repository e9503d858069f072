"""Families other than Qwen3 in training: transformers' logits in one process, and one process's gradients in layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import convert_hf
from tests.cases import Case
from tests.fixtures.record_public_models import HERE, MODELS, write_recorded
from tests.fixtures.record_public_models import TOKENS as RECORDED_TOKENS
from tests.parity.layouts import CP, DISTRIBUTED, EP, PP, TP, TP_SP
from tests.parity.pool import Pool
from tests.parity.test_hf import TOKENS, TOLERANCE, largest_difference, our_logits
from tests.parity.test_layouts import TOLERANCE as LAYOUT_TOLERANCE
from tests.parity.test_layouts import compare
from tests.tiny import FAMILIES, declare_mask, hf_model, write_hf

# case -> layouts: ranks and settings
LAYOUTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "qwen2": [(2, TP), (4, {**TP_SP, **PP}), (2, DISTRIBUTED), (2, CP)],
    "diffullama": [(2, {**TP_SP})],
    "llama3": [(2, {**TP_SP}), (4, {**CP, **PP})],
    "dream": [(2, {**TP_SP})],
    "llada": [(2, {**TP_SP}), (2, PP)],
    "llada_moe": [(2, EP), (4, {**TP_SP, **EP, **PP}), (2, {**TP_SP, **EP, **DISTRIBUTED})],
    "qwen2_tied": [(4, {**PP, **DISTRIBUTED})],
}


@pytest.fixture(scope="module")
def families(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root, found = tmp_path_factory.mktemp("families"), {}
    for kind in (*FAMILIES, *MODELS):
        write_recorded(root / kind, kind) if kind in MODELS else write_hf(root / kind, kind)
    write_hf(root / "diffullama", "llama", vocab_size=900)
    declare_mask(root / "diffullama")
    for kind in (*FAMILIES, *MODELS, "diffullama"):
        convert_hf.main(["--hf-model", str(root / kind), "--out", str(root / f"{kind}_checkpoint"), "--no-verify"])
        found[kind] = cases["dense"]._replace(hf=root / kind, checkpoint=str(root / f"{kind}_checkpoint"))
    return found


@torch.no_grad()
def hf_logits(kind: str, causal: bool) -> torch.Tensor:
    mask = None if causal else torch.ones(3, 1, 48, 48, dtype=torch.bool)
    return hf_model(kind)(TOKENS, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_equal_hugging_face(kind: str, families: dict[str, Case], pool: Pool) -> None:
    """Causal and bidirectional; each is far from the other."""
    causal, bidirectional = (our_logits(pool, families[kind], causal=causal) for causal in (True, False))
    assert largest_difference(causal, hf_logits(kind, causal=True)) < TOLERANCE
    assert largest_difference(bidirectional, hf_logits(kind, causal=False)) < TOLERANCE
    assert largest_difference(causal, bidirectional) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_public_code(name: str, families: dict[str, Case], pool: Pool) -> None:
    recorded = load_file(HERE / f"{name}.safetensors")
    settings = {**families[name].settings, "objective": "mdlm"}
    ours = pool.run(
        "logits", 1, checkpoint=families[name].checkpoint, settings=settings, tokens=RECORDED_TOKENS
    )[0]  # fmt: skip
    assert largest_difference(ours, recorded["recorded.logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_equal_one_process(kind: str, families: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    case, path = families[kind], str(tmp_path / "reference.pt")
    (result,) = pool.run(
        "train_steps", 1, checkpoint=case.checkpoint, settings=case.settings, num_steps=2, save_reference=path
    )
    for ranks, layout in LAYOUTS[kind]:
        differences = compare(pool, case, {**result, "path": path}, ranks, layout)
        assert all(value < LAYOUT_TOLERANCE for value in differences.values()), (layout, differences)
