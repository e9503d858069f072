"""Dead experts, the busiest expert-parallel rank, and the warning about masked tokens on the same experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_a2d.training.load_metrics import PATIENCE, CrowdingDetector, load_metrics


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
    low, high = _metrics(0.49 * even), _metrics(0.51 * even)

    def reports(course: list[dict[str, Any]]) -> list[str]:
        return [warning for metrics in course if (warning := detector.check(metrics))]

    assert reports([high] * (PATIENCE - 1) + [low]) == []  # not for long
    [warning] = reports([high] * 3 * PATIENCE)
    assert "serves 51% of the masked tokens" in warning and "in layer 2" in warning
    assert reports([low, high] * PATIENCE) == []  # the same episode
    assert reports([low] * PATIENCE) == []
    assert len(reports([high] * PATIENCE)) == 1


def test_no_warning_without_masked_tokens_or_experts() -> None:
    unmasked = {"load_imbalance_unmasked": 9.0, "by_layer": {}}
    assert not any(CrowdingDetector(8, 2).check(unmasked) for _ in range(3 * PATIENCE))
    assert not any(CrowdingDetector(0, 0).check(None) for _ in range(3 * PATIENCE))
