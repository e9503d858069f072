"""Text that a study's model generates from held-out text: infilled holes, and continuations at several speeds.

A continuation is judged by generative perplexity, the loss that a reference gives it: the autoregressive checkpoint
that the study began with. That is low for repetitive text too, so the entropy of a text's tokens is reported with it.
Positions to unmask are chosen by entropy, before tokens are drawn at temperature 1 (sampler rnd1): with one token per
forward pass that does not favour likely tokens.

Shapes: B texts, L positions, n of them generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_a2d.diffusion.block_diffusion import BlockModel
from megatron_a2d.diffusion.model_interface import Model, Request
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.evaluation.loglikelihood import label_losses
from megatron_a2d.inference.parallel_model import ParallelModel
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.study.infilling_eval import holes
from megatron_a2d.study.load_run import LoadedRun, other_weights
from megatron_a2d.training.data_setup import VALIDATION_SEED

HOLE_LENGTH = 16


@dataclass(frozen=True)
class Generator:
    """A block diffusion model and how it samples; a block as long as the text is full attention."""

    model: Model  # runs the attention levels of a request
    mask_token_id: int
    label_shift: bool
    block_length: int
    causal_context: bool = False

    def fill(self, canvas_BL: np.ndarray, num_steps: int, temperature: float) -> tuple[Tensor, float]:
        """The texts [B, L] with their masks filled, and the mean number of forward passes."""
        options = SamplingOptions(
            sampler="rnd1", num_steps=num_steps, temperature=temperature, block_length=self.block_length,
            aligned_blocks=True,
        )  # fmt: skip
        canvas = make_canvas(canvas_BL.tolist(), self.mask_token_id).to(device())
        blocks = BlockModel(self.model, self.mask_token_id, self.block_length, self.causal_context)
        seed = VALIDATION_SEED
        done = denoise(blocks, canvas, self.mask_token_id, options, label_shift=self.label_shift, seed=seed)
        return done.tokens, sum(done.num_forwards) / len(done.num_forwards)

    def infilling_accuracy(self, texts_BL: np.ndarray, masked_BL: np.ndarray) -> float:
        """The share of masked tokens that the most likely tokens, one per forward pass, restore."""
        canvas_BL = np.where(masked_BL, self.mask_token_id, texts_BL)
        filled_BL, _ = self.fill(canvas_BL, num_steps=int(masked_BL.sum(1).max()), temperature=0.0)
        return float((filled_BL.cpu().numpy() == texts_BL)[masked_BL].mean())

    def continuations(self, texts_BL: np.ndarray, tokens_per_pass: Sequence[int]) -> list[tuple[float, Tensor]]:
        """The second halves of the texts, generated at each speed: (tokens per forward pass, texts [B, L]).

        The speed differs from the one asked for where a block is shorter.
        """
        length = texts_BL.shape[1]
        canvas_BL = texts_BL.copy()
        canvas_BL[:, length // 2 :] = self.mask_token_id
        num_new = length - length // 2
        made = []
        for count in tokens_per_pass:
            filled_BL, num_forwards = self.fill(canvas_BL, num_steps=-(-num_new // count), temperature=1.0)
            made.append((num_new / num_forwards, filled_BL))
        return made


@torch.no_grad()
def causal_loss(model: Model, texts_BL: Tensor) -> float:
    """Next-token cross-entropy of the texts' second halves under causal attention, nats/token."""
    length = texts_BL.size(1)
    positions_BL = torch.arange(length, device=texts_BL.device).expand_as(texts_BL)
    needed_BL = (positions_BL >= length // 2 - 1) & (positions_BL < length - 1)
    labels_N1 = texts_BL[:, length // 2 :].reshape(-1, 1)
    # Finished blocks of one token each.
    request = Request(texts_BL, torch.ones_like(needed_BL), needed_BL, levels=2 * positions_BL + 1)
    losses_N1, _ = model(request, partial(label_losses, labels_NC=labels_N1))
    return float(losses_N1.double().mean())


def token_entropy(texts_BL: Tensor) -> float:
    """Mean over texts of the entropy of the tokens in their second halves, nats; 0 for one token repeated."""
    entropies = []
    for text_n in texts_BL[:, texts_BL.size(1) // 2 :].cpu().numpy():
        _, counts = np.unique(text_n, return_counts=True)
        shares = counts / counts.sum()
        entropies.append(float(-(shares * np.log(shares)).sum()))
    return float(np.mean(entropies))


def generation(
    loaded: LoadedRun, reference: str, tokens_per_pass: Sequence[int], num_texts: int, num_holes: int
) -> dict[str, Any]:
    """Infilling of `num_holes` texts, continuations of `num_texts` judged by the checkpoint `reference`. Collective.

    Returns {"infill_accuracy" (nan without holes), "text": {"nll", "entropy"} of the held-out text itself,
    "courses": [{"tokens_per_pass", "nll", "entropy"}]}; nll in nats/token.
    """
    diffusion, mask = loaded.config.diffusion, loaded.model_config.mask_token_id
    assert mask is not None and diffusion.objective == "block"
    loaded.state.gather_parameters()
    (network,) = loaded.state.models
    network.eval()
    model = ParallelModel(network, loaded.config)
    generator = Generator(model, mask, diffusion.label_shift, diffusion.block_length, diffusion.ar_loss_weight > 0)
    available = loaded.valid_data.num_samples
    texts_BL = np.stack([loaded.valid_data.tokens(index) for index in range(min(num_texts, available))])
    accuracy = float("nan")
    if num_holes:
        length = min(HOLE_LENGTH, loaded.config.data.seq_length // 2)
        make = holes(loaded, length)
        whole_BL = np.stack([loaded.valid_data.tokens(index) for index in range(min(num_holes, available))])
        holed_BL = np.stack([make(tokens, index).tokens for index, tokens in enumerate(whole_BL)])
        accuracy = generator.infilling_accuracy(whole_BL, holed_BL == mask)
    made = generator.continuations(texts_BL, tokens_per_pass)

    def judged(made_BL: Tensor) -> dict[str, float]:
        return {"nll": causal_loss(model, made_BL), "entropy": token_entropy(made_BL)}

    with other_weights(loaded, reference):
        text = judged(torch.from_numpy(texts_BL).to(device()))
        courses = [{"tokens_per_pass": speed, **judged(made_BL)} for speed, made_BL in made]
    network.train()
    return {"infill_accuracy": accuracy, "text": text, "courses": courses}
