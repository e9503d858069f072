"""The state of a batch while its holes are filled: tokens, masks, random numbers, caches, and which texts have ended.

Shapes: B sequences of the batch, S those of them in one forward pass, L positions, N predicted positions of a forward
pass, sequence by sequence from left to right. "Output position" means where the model's output is read: under the label
shift the one before the predicted position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.model_interface import Model, Window
from megatron_a2d.diffusion.sampling.early_stop import after_eos
from megatron_a2d.diffusion.sampling.token_scores import position_uniforms
from megatron_a2d.diffusion.sampling_options import SamplingOptions

# is_final(sequence, tokens): whether a text that begins with these tokens is truncated within them
IsFinal = Callable[[int, list[int]], bool]


class Canvas(NamedTuple):
    """A batch to denoise, all [B, L]."""

    tokens: Tensor  # int64; masks in the holes, padding at the right
    editable: Tensor  # bool, True in the holes
    visible: Tensor  # bool, False at the padding

    def to(self, device: torch.device) -> Canvas:
        return Canvas(*(tensor.to(device) for tensor in self))


def make_canvas(sequences: Sequence[Sequence[int]], mask_token_id: int, pad_token_id: int = 0) -> Canvas:
    """Stack sequences of tokens, padded at the right; every mask token is a hole.

    The published package has one padding token after the holes: append it to reproduce its output.
    """
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    tokens_BL = torch.full(shape, pad_token_id, dtype=torch.long)
    visible_BL = torch.zeros(shape, dtype=torch.bool)
    for index, sequence in enumerate(sequences):
        tokens_BL[index, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        visible_BL[index, : len(sequence)] = True
    return Canvas(tokens_BL, visible_BL & (tokens_BL == mask_token_id), visible_BL)


class Inputs(NamedTuple):
    """What a batch is sampled from: the arguments of `denoise`."""

    canvas: Canvas
    mask_token_id: int
    options: SamplingOptions
    label_shift: bool
    seed: int | Sequence[int]
    end_token_ids: tuple[int, ...]
    is_final: IsFinal | None


class BatchState(ABC):
    """Tokens of the batch and what is still masked; a way of sampling adds which positions a forward pass unmasks."""

    def __init__(self, inputs: Inputs):
        canvas, self.mask_token_id, options, self.label_shift, seed, self.end_token_ids, self.is_final = inputs
        self.canvas, self.options = canvas, options
        batch, length = canvas.tokens.shape
        self.tokens_BL = canvas.tokens.masked_fill(canvas.editable, self.mask_token_id)
        self.masked_BL = canvas.editable.clone()
        self.uniforms_BL: Tensor | None = None
        if not options.takes_likeliest:
            self.uniforms_BL = position_uniforms(seed, batch, length).to(canvas.tokens.device)
        # Block diffusion: the positions before this one have final keys and values in the cache.
        self.num_cached_B = torch.zeros(batch, dtype=torch.long, device=canvas.tokens.device)
        self.num_forwards = [0] * batch
        self.num_written = [0] * batch  # unmasked positions before each sequence's first masked one
        self.step = 0

    @abstractmethod
    def advance(self, model: Model, sequences: list[int]) -> Tensor:
        """Run one forward pass over `sequences`; returns the positions that it unmasked, [B, L]."""

    def unfinished(self) -> list[int]:
        sequences: list[int] = self.masked_BL.any(1).nonzero()[:, 0].tolist()
        return sequences

    def block_window(self, sequences_S: Tensor, end_S: Tensor, needed_SL: Tensor) -> Window:
        """The positions that a block diffusion model computes; `end` is where each sequence's current block ends.

        They are the block, what is not cached of the text before it, and the needed output positions.
        """
        positions_L = torch.arange(needed_SL.shape[1], device=needed_SL.device)
        active_SL = (positions_L >= self.num_cached_B[sequences_S, None]) & (positions_L < end_S[:, None])
        return Window(sequences_S, (active_SL | needed_SL) & self.canvas.visible[sequences_S])

    def unmask(self, sequences: list[int], sequences_S: Tensor, unmasked_SL: Tensor, tokens_SL: Tensor) -> Tensor:
        """Write the tokens of these positions, and end the forward pass; returns the positions filled in it, [B, L]."""
        unmasked_BL = torch.zeros_like(self.masked_BL)
        unmasked_BL[sequences_S] = unmasked_SL
        self.tokens_BL[sequences_S] = torch.where(unmasked_SL, tokens_SL, self.tokens_BL[sequences_S])
        self.masked_BL &= ~unmasked_BL
        for sequence in sequences:
            self.num_forwards[sequence] += 1
        self.step += 1
        return unmasked_BL | self._finish_ended()

    def _finish_ended(self) -> Tensor:
        """Fill the remaining masks of sequences whose text has ended; returns the positions filled, [B, L]."""
        if not self.end_token_ids:
            return torch.zeros_like(self.masked_BL)
        unused_BL = after_eos(self.tokens_BL, self.masked_BL, self.canvas.editable, self.end_token_ids)
        if self.is_final is not None:
            for sequence in self._call_is_final(self.is_final):
                unused_BL[sequence] = self.masked_BL[sequence]
        finished_B = ~(self.masked_BL & ~unused_BL).any(1)
        filled_BL = unused_BL & finished_B[:, None]
        self.tokens_BL.masked_fill_(filled_BL, self.end_token_ids[0])
        self.masked_BL &= ~filled_BL
        return filled_BL

    def _call_is_final(self, is_final: IsFinal) -> list[int]:
        """The sequences for which `is_final` returns True; records how many tokens it has seen of each."""
        written_BL = self.canvas.editable & (self.masked_BL.cumsum(1) == 0)
        final = []
        for sequence in self.unfinished():
            written = self.tokens_BL[sequence][written_BL[sequence]].tolist()
            if len(written) > self.num_written[sequence] and is_final(sequence, written):
                final.append(sequence)
            self.num_written[sequence] = len(written)
        return final


def output_positions(predicted_SL: Tensor, label_shift: bool) -> Tensor:
    """The positions of the model's output that predict these positions, [S, L] bool."""
    if not label_shift:
        return predicted_SL
    return torch.nn.functional.pad(predicted_SL[:, 1:], (0, 1))


def scatter(values_N: Tensor, predicted_SL: Tensor, elsewhere: float) -> Tensor:
    """Values of the predicted positions at their places, [S, L], and `elsewhere` at all others."""
    scattered_SL = torch.full(predicted_SL.shape, elsewhere, dtype=values_N.dtype, device=values_N.device)
    scattered_SL[predicted_SL] = values_N
    return scattered_SL
