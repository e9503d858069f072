"""Likelihood bounds of a masked diffusion model: exact by enumeration (tiny lengths), and by Monte Carlo.

The NELBO averages, over all masks, the cross-entropy of what is hidden:

    sum over masks M of  c(|M|) * sum over i in M of -log p(x_i | x outside M)
    c(k) = 1 / (1 - eps) * integral from eps to 1 of  m'(t)/m(t) * m(t)^k * (1 - m(t))^(n - k) dt

with n maskable tokens and eps = `Noise.min_timestep` (times are drawn from [eps, 1]). For the linear schedule and eps -> 0,
c(k) = (k - 1)! (n - k)! / n!, the any-order autoregressive likelihood (Ou et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.loss import Estimate, mean_estimate
from megatron_a2d.diffusion.rng import Noise

LogitsFn = Callable[[Tensor], Tensor]  # tokens [b, L] -> logits [b, L, V]


@torch.no_grad()
def exact_nelbo(logits_fn: LogitsFn, tokens_L: np.ndarray, noise: Noise, batch_size: int = 256) -> float:
    """NELBO of one sample in nats a maskable token, over all 2^n masks: for tests and tiny lengths."""
    first = int(noise.label_shift)
    num_maskable = len(tokens_L) - first
    masks = np.array(list(product([False, True], repeat=num_maskable)))[1:]  # the empty mask costs nothing
    coefficients = np.array([0.0] + [_mask_coefficient(k, num_maskable, noise) for k in range(1, num_maskable + 1)])
    total = 0.0
    for start in range(0, len(masks), batch_size):
        chunk = masks[start : start + batch_size]
        masked = np.concatenate([np.zeros((len(chunk), first), dtype=bool), chunk], axis=1)
        inputs_BL = torch.from_numpy(np.where(masked, noise.mask_token_id, tokens_L))
        losses_BL = _token_losses(logits_fn(inputs_BL), torch.from_numpy(tokens_L), noise.label_shift)
        losses_B = (losses_BL * torch.from_numpy(masked)).sum(1)
        total += float((losses_B * torch.from_numpy(coefficients[chunk.sum(1)])).sum())
    return total / num_maskable


@torch.no_grad()
def monte_carlo_nelbo(
    logits_fn: LogitsFn, tokens_L: np.ndarray, noise: Noise, num_draws: int, batch_size: int = 256
) -> Estimate:
    """The same by `num_draws` corruptions of the sample, through the very code that training uses."""
    estimates = []
    for start in range(0, num_draws, batch_size):
        draws = [corrupt(tokens_L, index, noise) for index in range(start, min(start + batch_size, num_draws))]
        logits_BLV = logits_fn(torch.from_numpy(np.stack([draw.tokens for draw in draws])))
        labels_BL = torch.from_numpy(np.stack([draw.labels for draw in draws]))
        losses_BL = torch.nn.functional.cross_entropy(logits_BLV.double().transpose(1, 2), labels_BL, reduction="none")
        weights_BL = torch.from_numpy(np.stack([draw.weights for draw in draws]))
        estimates.append((losses_BL * weights_BL).sum(1) / draws[0].num_maskable)
    return mean_estimate(torch.cat(estimates))


def _mask_coefficient(num_masked: int, num_maskable: int, noise: Noise) -> float:
    # Gauss-Legendre with 200 points: exact for the linear schedule's polynomials, converged for the cosine's.
    nodes, quadrature = np.polynomial.legendre.leggauss(200)
    times = noise.min_timestep + (1 - noise.min_timestep) * (nodes + 1) / 2
    probability = np.array([noise.functions.mask_probability(t) for t in times])
    weight = np.array([noise.functions.weight(t) for t in times])
    density = weight * probability**num_masked * (1 - probability) ** (num_maskable - num_masked)
    return float((quadrature * density).sum() / 2)


def _token_losses(logits_BLV: Tensor, tokens_L: Tensor, label_shift: bool) -> Tensor:
    """Cross-entropy of every token, [b, L] float64; under the label shift token 0 has none (0)."""
    logprobs = logits_BLV.double().log_softmax(-1)
    if label_shift:
        losses = -logprobs[:, :-1].gather(-1, tokens_L[1:].expand(len(logprobs), -1)[..., None])[..., 0]
        return torch.nn.functional.pad(losses, (1, 0))
    return -logprobs.gather(-1, tokens_L.expand(len(logprobs), -1)[..., None])[..., 0]
