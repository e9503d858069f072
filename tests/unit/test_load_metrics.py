"""Dead experts, the busiest expert-parallel rank, and the warning about masked tokens on the same experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_a2d.config.settings import build
from megatron_a2d.training.load_metrics import PATIENCE, CrowdingDetector, load_metrics
from megatron_a2d.training.logger import RunLog

ROOT = Path(__file__).resolve().parents[2]


def test_dead_experts_and_the_busiest_rank() -> None:
    # Two layers of four experts; unmasked tokens first. The second expert of layer 1 serves no kind of token.
    choices_L2E = torch.tensor([[[4, 0, 1, 1], [4, 0, 2, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    values, by_layer = load_metrics(choices_L2E, choices_L2E.sum(1))
    assert values["num_dead_experts"] == 1 and by_layer["num_dead_experts"] == [1, 0]
    assert by_layer["rank_imbalance"] == {
        "ep2": [pytest.approx(8 / 6), 1.0],
        "ep4": [pytest.approx(8 / 3), 1.0],
    }
    assert values["rank_imbalance"]["ep2"] == pytest.approx((8 / 6 + 1) / 2)
    # Ranks hold the experts 0 1 | 2 3 in order; 0 3 | 1 2 as they are placed here.
    placed, _ = load_metrics(choices_L2E, choices_L2E.sum(1)[:, [1, 2, 0, 3]])
    assert placed["rank_imbalance"]["ep2"] == pytest.approx((9 / 6 + 1) / 2)
    assert placed["rank_imbalance"]["ep4"] == values["rank_imbalance"]["ep4"]


@pytest.mark.parametrize(("num_experts", "sizes"), [(6, [2, 6]), (12, [2, 4, 12]), (7, [7]), (8, [2, 4, 8])])
def test_ranks_that_divide_the_experts(num_experts: int, sizes: list[int]) -> None:
    choices_L2E = torch.ones(1, 2, num_experts)
    values, _ = load_metrics(choices_L2E, choices_L2E.sum(1))
    assert values["rank_imbalance"] == {f"ep{size}": 1.0 for size in sizes}


def test_a_layer_without_choices_is_even() -> None:
    """A step whose routers did not run, as under a skipped batch, divides by nothing."""
    values, _ = load_metrics(torch.zeros(1, 2, 4), torch.zeros(1, 4))
    assert values["rank_imbalance"] == {"ep2": 1.0, "ep4": 1.0} and values["num_dead_experts"] == 4


def _metrics(imbalance: float) -> dict[str, Any]:
    return {"load_imbalance_masked": imbalance, "by_layer": {"load_imbalance_masked": [imbalance, imbalance + 0.4]}}


@pytest.mark.parametrize(("num_experts", "top_k", "even"), [(8, 2, 4), (128, 8, 16)])
def test_crowding_is_reported_once_an_episode(num_experts: int, top_k: int, even: int) -> None:
    detector = CrowdingDetector(num_experts, top_k)
    low, high = _metrics(0.69 * even), _metrics(0.71 * even)

    def reports(course: list[dict[str, Any]]) -> list[str]:
        return [warning for metrics in course if (warning := detector.check(metrics))]

    assert reports([high] * (PATIENCE - 1) + [low]) == []  # not for long
    [warning] = reports([high] * 3 * PATIENCE)
    assert "serves 71% of the masked tokens" in warning and "in layer 2" in warning
    assert reports([low, high] * PATIENCE) == []  # the same episode
    assert reports([low] * PATIENCE) == []
    assert len(reports([high] * PATIENCE)) == 1


def test_no_warning_without_masked_tokens_or_experts() -> None:
    unmasked = {"load_imbalance_unmasked": 9.0, "by_layer": {}}
    assert not any(CrowdingDetector(8, 2).check(unmasked) for _ in range(3 * PATIENCE))
    assert not any(CrowdingDetector(0, 0).check(None) for _ in range(3 * PATIENCE))


def test_a_warning_is_a_line_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(build({"save": str(tmp_path), "log_interval": 1}), 0, enabled=True)
    log.crowding(7, "warning: the busiest expert serves 51%")
    log.close()
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (record["kind"], record["iteration"]) == ("crowding", 7) and "51%" in record["warning"]
    assert "iteration 7: warning: the busiest expert serves 51%" in capsys.readouterr().err


def test_targets_of_a_balanced_conversion() -> None:
    """Two experts that only masked tokens take: balanced over kinds, in order on the same rank of four."""
    from bench.expert_balance import WITH, WITHOUT, figures, verdicts

    unmasked, masked = [0, 0, 3, 3, 3, 3, 3, 3], [9, 9, 0, 0, 0, 0, 0, 0]
    loads_BL2E = np.tile(np.array([[unmasked, masked]]), (32, 1, 1, 1))
    found = figures(loads_BL2E, 5.0, 0.1)
    assert found.num_dead == 0 and found.interval == pytest.approx(0.196)
    assert found.in_order == pytest.approx({2: 24 / 18, 4: 2.0, 8: 2.0})
    assert found.placed == pytest.approx({2: 1.0, 4: 12 / 9, 8: 2.0}) == found.worst_layer
    dead = figures(loads_BL2E * np.array([[1], [0]]), 5.3, 0.1)  # without masked tokens
    assert dead.num_dead == 2
    lines = verdicts({WITHOUT: found, WITH: found._replace(nelbo=5.2)})
    assert [line.rpartition(": ")[2] for line in lines] == ["met", "missed", "missed", "met", "missed"]
    assert "EP 2: 1.00, target <= 1.05: met" in lines and "NELBO: +0.200, target <= 0.196: missed" in lines


def test_table_of_a_balanced_conversion() -> None:
    """From a result file, whose keys are text."""
    from bench.expert_balance import WITH, WITHOUT, block, figures

    loads_BL2E = np.ones((32, 1, 2, 8))
    stored = {name: json.loads(json.dumps(figures(loads_BL2E, 5.0, 0.1)._asdict())) for name in (WITHOUT, WITH)}
    assert f"| {WITH} | 5.000 ± 0.196 | 0 | 1.00 | 1.00 (1.00) |" in block(stored)
