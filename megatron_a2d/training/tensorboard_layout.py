"""Layout of TensorBoard's Custom Scalars tab: which of a run's curves share a chart, by group."""

from __future__ import annotations

from typing import Any

from megatron_a2d.config.settings import RunConfig

# One category per question, the most asked one first; tags are regular expressions.
LAYOUT = {
    "loss": {
        "loss, and held out": ["Multiline", ["train/loss$", "validation(/[^/]*)?/nelbo$"]],
        "loss by t": ["Multiline", ["train/loss_by_t/"]],
        "accuracy by mask ratio": ["Multiline", ["train/accuracy_by_mask_ratio/"]],
        "loss weighted and unweighted": ["Multiline", ["train/(loss|cross_entropy)$"]],
    },
    "stability": {
        "gradient norm by role": ["Multiline", ["train/grad_norm(_by_role/.*)?$"]],
        "update-to-weight ratio by role": ["Multiline", ["train/update_to_weight_ratio/"]],
        "relative weight change by role": ["Multiline", ["train/relative_weight_change/"]],
        "gradient noise scale, samples": ["Multiline", ["train/grad_noise_scale$"]],
        "learning rate": ["Multiline", ["train/lr$"]],
    },
    "moe": {
        "expert load imbalance, max / mean": ["Multiline", ["train/moe/load_imbalance_(masked|unmasked)$"]],
        "load of the busiest expert-parallel rank over the mean, by ranks": [
            "Multiline",
            ["train/moe/rank_imbalance/"],
        ],
        "dead experts": ["Multiline", ["train/moe/num_dead_experts$"]],
        "entropy of a token's experts, nats": ["Multiline", ["train/moe/entropy_"]],
        "distance between loads of masked and unmasked tokens": ["Multiline", ["train/moe/load_tv_distance$"]],
        "share dropped, and above the mean load": ["Multiline", ["train/moe/(dropped_token|over_mean_load)_frac$"]],
    },
    "throughput": {
        "tokens/s": ["Multiline", ["train/tokens_per_second$"]],
        "MFU": ["Multiline", ["train/mfu$"]],
    },
}


def layout(config: RunConfig) -> dict[str, dict[str, list[Any]]]:
    """LAYOUT, with the charts that only some runs have numbers for."""
    (first, charts), *others = LAYOUT.items()
    charts = dict(charts)
    if config.diffusion.ar_loss_weight:
        charts["diffusion and next-token loss"] = ["Multiline", ["train/(diffusion_loss|ar_loss)$"]]
    if config.grafting_iters:
        charts["error of grafting"] = ["Multiline", ["train/grafting_error$"]]
    return {first: charts, **dict(others)}
