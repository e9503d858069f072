"""What monitoring says of two steps, against Hugging Face's model with torch's AdamW on the same samples.

Nothing of the training's own code is used but the samples: model, losses, gradients by role, updates, routers and noise
are worked out again. tests/parity/test_monitor.py then holds every layout against one process.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case
from tests.parity.parity_jobs import SETTINGS
from tests.parity.pool import Pool
from tests.parity.test_monitor import flat
from tests.tiny import MASK_TOKEN_ID, hf_model, hub_config

# The small batch of the noise scale is the first micro-batch.
STEPS, MICRO_BATCH = 2, 2
BATCH = SETTINGS["global_batch_size"]
_ROLE_OF = (
    ("norm", "norm"), ("mlp.gate.", "router"), ("self_attn", "attention"), ("mlp", "mlp"), ("embed_tokens", "embedding"),
    ("lm_head", "head"),
)  # fmt: skip


def role_of(name: str) -> str:
    """Of a parameter as Hugging Face calls it."""
    return next(role for part, role in _ROLE_OF if part in name)


class Routers:
    """What every router says of the tokens that are forwarded, by layer: [tokens, experts] logits."""

    def __init__(self, model: Any):
        self.logits: dict[int, list[Tensor]] = defaultdict(list)
        self._model = model

    @contextmanager
    def listening(self) -> Iterator[None]:
        hooks = [
            layer.mlp.gate.register_forward_pre_hook(
                lambda module, inputs, number=number: self.logits[number].append(
                    inputs[0].detach().reshape(-1, inputs[0].shape[-1]) @ module.weight.detach().T
                )
            )
            for number, layer in enumerate(self._model.model.layers)
        ]
        yield
        for hook in hooks:
            hook.remove()

    def expected(self, masked_N: Tensor, num_experts: int, top_k: int) -> dict[str, float]:
        found: dict[str, list[float]] = defaultdict(list)
        above, choices = 0.0, 0
        for pieces in self.logits.values():
            probabilities = torch.cat(pieces).double().softmax(-1)
            chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0)
            shares = {}
            for name, kind in (("masked", masked_N), ("unmasked", ~masked_N)):
                shares[name] = chosen[kind].sum(0) / chosen[kind].sum()
                found[f"load_imbalance_{name}"].append(float(shares[name].max()) * num_experts)
                found[f"entropy_{name}"].append(float(torch.special.entr(probabilities[kind]).sum(-1).mean()))
            found["load_tv_distance"].append(float((shares["masked"] - shares["unmasked"]).abs().sum()) / 2)
            served = chosen.sum(0)
            found["num_dead_experts"].append(float((served == 0).sum()))
            for ranks in (2, 4, 8):
                loads = [float(part.sum()) for part in served.chunk(ranks)]
                found[f"rank_imbalance.ep{ranks}"].append(max(loads) * ranks / sum(loads))
            above += float((served - served.mean()).clamp(min=0).sum())
            choices += len(masked_N) * top_k
        values = {name: sum(numbers) / len(numbers) for name, numbers in found.items()}
        values["num_dead_experts"] = sum(found["num_dead_experts"])
        by_layer = {f"by_layer.{name}.{n}": value for name, numbers in found.items() for n, value in enumerate(numbers)}
        return values | by_layer | {"dropped_token_frac": 0.0, "over_mean_load_frac": above / choices}


def expected_values(kind: str, batches: list[Any], learning_rates: list[float]) -> dict[str, float]:
    """By dotted name, of the last of the steps that `batches` hold one after the other."""
    model = hf_model(kind)
    named = dict(model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    factors = {name: SETTINGS["lr_mult"].get(role_of(name), 1.0) for name in named}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "factor": factors[name], "weight_decay": 0.1 if parameter.dim() > 1 else 0.0}
            for name, parameter in named.items()
        ],
        lr=1.0, betas=(0.9, 0.95), eps=SETTINGS["adam_eps"],
    )  # fmt: skip
    averages = torch.zeros(2, dtype=torch.float64)
    totals = torch.zeros(5, dtype=torch.float64)
    buckets = torch.zeros(2, 10, 5, dtype=torch.float64)
    norms: list[float] = []
    values: dict[str, float] = {}
    per_step = BATCH // MICRO_BATCH
    for step, lr in enumerate(learning_rates):
        iteration = batches[step * per_step : (step + 1) * per_step]

        def gradient(part: list[Any]) -> float:
            """Leaves it in the parameters; returns its squared norm."""
            optimizer.zero_grad()
            count = sum(int(batch.num_maskable.sum()) for batch in part)
            for batch in part:
                losses, _ = row_losses(model, batch)
                ((losses * batch.weights).sum() / count).backward()
            return float(sum(parameter.grad.double().square().sum() for parameter in named.values()))

        small = gradient(iteration[:1])
        routers = Routers(model)
        with routers.listening() if kind == "moe" else torch.enable_grad():
            large = gradient(iteration)
        for batch in iteration:
            with torch.no_grad():
                losses, correct = row_losses(model, batch)
            has_loss = batch.weights > 0
            columns = torch.stack(
                [
                    (losses * batch.weights).sum(1), (losses * has_loss).sum(1), has_loss.sum(1),
                    (correct & has_loss).sum(1), batch.num_maskable,
                ], dim=1,
            ).double()  # fmt: skip
            totals += columns.sum(0)
            ratios = has_loss.sum(1) / batch.num_maskable
            for table, places in enumerate((batch.times, ratios)):
                for place, row in zip(places.tolist(), columns, strict=True):
                    buckets[table, min(int(place * 10), 9)] += row
        noise = (small - large) / (1 / MICRO_BATCH - 1 / BATCH)
        signal = (BATCH * large - MICRO_BATCH * small) / (BATCH - MICRO_BATCH)
        averages = 0.9 * averages + 0.1 * torch.tensor([noise, signal], dtype=torch.float64)
        norms.append(math.sqrt(large))
        values = {"tr_sigma": noise, "grad_norm_sq": signal}
        values["grad_noise_scale"] = float(averages[0] / averages[1]) if bool((averages > 0).all()) else math.nan
        values |= by_role("grad_norm_by_role", {name: parameter.grad for name, parameter in named.items()})
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        optimizer.step()
        moved = {name: parameter.detach() - before[name] for name, parameter in named.items()}
        values |= by_role("update_to_weight_ratio", moved, before)
        if kind == "moe":
            masked_N = torch.cat([(batch.tokens == MASK_TOKEN_ID).flatten() for batch in iteration])
            found = routers.expected(masked_N, hub_config(kind)["num_experts"], hub_config(kind)["num_experts_per_tok"])
            values |= {f"moe.{name}": value for name, value in found.items()}
    away = {name: parameter.detach() - start[name] for name, parameter in named.items()}
    values |= by_role("relative_weight_change", away, start)
    values |= {
        "loss": float(totals[0] / totals[4]), "cross_entropy": float(totals[1] / totals[2]),
        "accuracy": float(totals[3] / totals[2]), "mask_ratio": float(totals[2] / totals[4]),
        "grad_norm": sum(norms) / len(norms), "lr": learning_rates[-1], "batch_size": BATCH,
        "consumed_samples": 0, "consumed_tokens": 0,
    }  # fmt: skip
    for name, table, above, below in (("loss_by_t", 0, 0, 4), ("accuracy_by_mask_ratio", 1, 3, 2)):
        values |= {
            f"{name}.{number / 10:.1f}": float(row[above] / row[below])
            for number, row in enumerate(buckets[table])
            if row[below] > 0
        }
    return values


def row_losses(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """[b, s] cross-entropy of every row, and whether its most likely token is the label; everything is seen."""
    length = batch.tokens.size(1)
    mask = torch.ones(len(batch.tokens), 1, length, length, dtype=torch.bool)
    logits = model(batch.tokens, attention_mask=mask, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    return losses, logits.argmax(-1) == batch.labels


def by_role(title: str, tensors: dict[str, Any], below: dict[str, Tensor] | None = None) -> dict[str, float]:
    """Norms of the roles, or their ratios."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, tensor in tensors.items():
        sums[role_of(name)][0] += float(tensor.double().square().sum())
        sums[role_of(name)][1] += float(below[name].double().square().sum()) if below else 0.0
    return {f"{title}.{role}": math.sqrt(a / b) if below else math.sqrt(a) for role, (a, b) in sums.items()}


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        pytest.param("moe", {"moe_grouped_gemm": True}, id="stacked experts"),
        pytest.param("moe", {"moe_grouped_gemm": False}, id="experts one by one", marks=pytest.mark.full),
        pytest.param("dense", {}, id="dense", marks=pytest.mark.full),
    ],
)
def test_every_number_is_what_it_says(kind: str, experts: dict[str, Any], cases: dict[str, Case], pool: Pool) -> None:
    case = cases[kind]
    settings = {**case.settings, **experts, "micro_batch_size": MICRO_BATCH}
    (found,) = pool.run("monitored", 1, checkpoint=case.checkpoint, settings=settings, num_steps=STEPS)
    (batches,) = pool.run(
        "samples", 1, checkpoint=case.checkpoint, settings=settings, num_batches=STEPS * BATCH // MICRO_BATCH
    )
    # Cosine without warm-up, from the peak at iteration 0 to 0 at the last one; the scheduler moves before the step.
    rates = [SETTINGS["lr"] * (1 + math.cos(math.pi * step / SETTINGS["train_iters"])) / 2 for step in (1, 2)]
    expected, seen = expected_values(kind, batches, rates), flat(found)
    assert seen.keys() == expected.keys()
    wrong = {
        name: (seen[name], value)
        for name, value in expected.items()
        if seen[name] != pytest.approx(value, rel=tolerance(name), abs=1e-6, nan_ok=True)
    }
    assert not wrong
    # Control: the numbers of the step before are others.
    before = expected_values(kind, batches, rates[:1])
    for name in (
        "grad_norm_by_role.mlp",
        "update_to_weight_ratio.norm",
        "relative_weight_change.attention",
        "tr_sigma",
    ):
        assert seen[name] != pytest.approx(before[name], rel=tolerance(name)), name


def tolerance(name: str) -> float:
    """Differences of nearly equal sums are known less well."""
    return 1e-3 if name in ("tr_sigma", "grad_norm_sq", "grad_noise_scale") else 2e-5
