"""YaRN in training: transformers' logits in one process, and one process's gradients under every cut of the sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools import convert_hf
from tests.cases import Case
from tests.parity.layouts import CP, PP, TP_SP
from tests.parity.pool import Pool
from tests.parity.test_hf import TOKENS, TOLERANCE, largest_difference, our_logits
from tests.parity.test_layouts import TOLERANCE as LAYOUT_TOLERANCE
from tests.parity.test_layouts import compare
from tests.tiny import hf_model, write_hf

# The second frequency is blended, the others are slowed.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def yarn(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The mixture of experts with YaRN."""
    root = tmp_path_factory.mktemp("yarn")
    write_hf(root / "hf", "moe", rope_scaling=YARN)
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "checkpoint"), "--no-verify"])
    return cases["moe"]._replace(hf=root / "hf", checkpoint=str(root / "checkpoint"))


def hf_logits(**changes: Any) -> torch.Tensor:
    with torch.no_grad():
        mask = torch.ones(3, 1, 48, 48, dtype=torch.bool)
        return hf_model("moe", rope_scaling={**YARN, **changes})(TOKENS, attention_mask=mask, use_cache=False).logits


def test_logits_equal_hugging_face(yarn: Case, pool: Pool) -> None:
    ours = our_logits(pool, yarn, causal=False)
    assert largest_difference(ours, hf_logits()) < TOLERANCE
    wrong: list[dict[str, Any]] = [
        {"factor": 3.9}, {"attention_factor": 1.0}, {"original_max_position_embeddings": 16}, {"truncate": False},
        {"rope_type": "default"},
    ]  # fmt: skip
    for changes in wrong:
        assert largest_difference(ours, hf_logits(**changes)) > 100 * TOLERANCE, changes


def test_layouts_equal_one_process(yarn: Case, pool: Pool, tmp_path: Path) -> None:
    """Positions too: with --reset-position-ids every rank picks its own of the whole sequence's angles."""
    path = str(tmp_path / "reference.pt")
    case = yarn._replace(settings={**yarn.settings, "reset_attention_mask": True, "reset_position_ids": True})
    (result,) = pool.run(
        "train_steps", 1, checkpoint=case.checkpoint, settings=case.settings, num_steps=2, save_reference=path
    )
    reference = {**result, "path": path}
    for ranks, layout in ((2, TP_SP), (2, CP), (4, {**CP, **PP}), (4, {**TP_SP, **CP})):
        differences = compare(pool, case, reference, ranks, layout)
        assert all(value < LAYOUT_TOLERANCE for value in differences.values()), (layout, differences)
