"""The denoising loop: forward, score, unmask, until nothing is masked. Without `remask` no token is masked again.

Every sequence of the batch follows its own schedule (unmask_schedule.py), so sequences do not influence one
another, and a finished sequence leaves the batch. At equal settings `rnd1` gives the tokens of the published sampler
(RND1, Radical Numerics 2025) when that is deterministic. Differences: the mask token is never predicted, filters leave
entropies finite, a batch may hold sequences of any lengths, forward passes that would unmask nothing are skipped, and a
sequence stops once all holes have ended.

Shapes: B sequences of the batch, S those of them in one forward pass (the unfinished ones), L positions, N candidates
of a forward pass, sequence by sequence from left to right. "Output position" means where the model's output is read:
under the label shift the one before the predicted position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.model_interface import Model, Request, Window
from megatron_a2d.diffusion.rng import INVERSE_GOLDEN_RATIO
from megatron_a2d.diffusion.sampling.batch_state import BatchState, Canvas, Inputs, IsFinal, output_positions, scatter
from megatron_a2d.diffusion.sampling.self_speculation import SelfSpeculation
from megatron_a2d.diffusion.sampling.token_scores import Scores, scorer
from megatron_a2d.diffusion.sampling.unmask_schedule import StepPlan, blocks_of, plan_steps, sizes_of
from megatron_a2d.diffusion.sampling_options import SELF_SPECULATIVE, SamplingOptions

# on_step(step, tokens_BL, unmasked_BL): step counts from 1; `unmasked` are the positions unmasked in it
OnStep = Callable[[int, Tensor, Tensor], None]


class Sampled(NamedTuple):
    """Denoised sequences and their number of forward passes."""

    tokens: Tensor  # [B, L] int64, equal to the canvas outside the holes
    num_forwards: list[int]  # [B] forward passes that each sequence was part of


@torch.no_grad()
def denoise(
    model: Model,
    canvas: Canvas,
    mask_token_id: int,
    options: SamplingOptions,
    *,
    label_shift: bool = True,
    seed: int | Sequence[int] = 0,
    end_token_ids: Sequence[int] = (),
    is_final: IsFinal | None = None,
    on_step: OnStep | None = None,
) -> Sampled:
    """Fill the holes of `canvas`.

    Under `label_shift` the output at position i - 1 predicts position i, so position 0 cannot be a hole. A sequence's
    draws depend on its own seed alone, not on the rest of the batch: `seed` is one seed per sequence, or one number
    from which `row_seed(seed, index)` derives them. `end_token_ids`: a sequence is finished once each of its holes has
    one of them with nothing masked before it; positions still masked are filled with the first of them. `is_final` is
    called with the tokens of a sequence's holes before the first masked position, whenever there are more of them; if
    it returns True, the sequence is finished in the same way. Raises ValueError for a hole at position 0 under the
    shift, for `is_final` without end tokens, and for texts that a self-speculative sampler cannot continue.
    """
    _check(canvas, label_shift)
    if is_final and not end_token_ids:
        raise ValueError("is_final needs end_token_ids: the first of them fills the remaining masked positions")
    kind: type[BatchState] = SelfSpeculation if options.sampler == SELF_SPECULATIVE else Denoising
    state = kind(Inputs(canvas, mask_token_id, options, label_shift, seed, tuple(end_token_ids), is_final))
    while sequences := state.unfinished():
        unmasked_BL = state.advance(model, sequences)
        if on_step is not None:
            on_step(state.step, state.tokens_BL.clone(), unmasked_BL)
    return Sampled(state.tokens_BL, state.num_forwards)


class Denoising(BatchState):
    """Masked diffusion by a schedule: which candidates of its current block each sequence unmasks."""

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        canvas, options = self.canvas, self.options
        batch, length = canvas.tokens.shape
        self.blocks_BL = blocks_of(canvas.editable, options.block_length, options.aligned_blocks)
        self.log_confidence_BL = torch.zeros(batch, length, device=canvas.tokens.device)  # when decided
        self.num_masked = sizes_of(self.blocks_BL)  # masked positions of each sequence, by block
        self.plans = [plan_steps(sizes, options.sampler, options.num_steps) for sizes in self.num_masked]
        self.cursors = [0] * batch  # the next step of each plan
        self.cached_blocks = [-1] * batch

    def advance(self, model: Model, sequences: list[int]) -> Tensor:
        """Run one forward pass over `sequences`; returns the positions that it unmasked, [B, L]."""
        device = self.tokens_BL.device
        steps = [self._advance_cursor(sequence) for sequence in sequences]
        sequences_S = torch.tensor(sequences, device=device)
        blocks_S = torch.tensor([step.block for step in steps], device=device)
        in_block_SL = self.blocks_BL[sequences_S] == blocks_S[:, None]
        if self.options.remask:
            self._remask(sequences, steps)
        candidates_SL = self.masked_BL[sequences_S] & in_block_SL
        needed_SL = output_positions(candidates_SL, self.label_shift)
        window = self._window(sequences, sequences_S, steps, in_block_SL, needed_SL)
        scores = self._predict(model, sequences_S, candidates_SL, needed_SL, window)
        # Each forward pass unmasks at least one position of each sequence.
        required = [
            max(self.num_masked[sequence][step.block] - step.num_left, 1)
            for sequence, step in zip(sequences, steps, strict=True)
        ]
        unmasked_SL = _select(self.options, scores, candidates_SL, torch.tensor(required, device=device))
        if self.options.remask:
            self.log_confidence_BL[sequences_S] = torch.where(
                unmasked_SL,
                scatter(scores.log_confidence.float(), candidates_SL, 0),
                self.log_confidence_BL[sequences_S],
            )
        for sequence, step, count in zip(sequences, steps, unmasked_SL.sum(1).tolist(), strict=True):
            self.num_masked[sequence][step.block] -= count
            self.cursors[sequence] += 1
        return self.unmask(sequences, sequences_S, unmasked_SL, scatter(scores.tokens, candidates_SL, 0))

    def _advance_cursor(self, sequence: int) -> StepPlan:
        """Move the cursor past the steps of blocks that were filled early; returns the step that it then points to."""
        plan, num_masked = self.plans[sequence], self.num_masked[sequence]
        while num_masked[plan[self.cursors[sequence]].block] == 0:
            self.cursors[sequence] += 1
        return plan[self.cursors[sequence]]

    def _remask(self, sequences: list[int], steps: list[StepPlan]) -> None:
        """Mask the least certain of a block's decided tokens again, but in the last step of its plan."""
        for sequence, step in zip(sequences, steps, strict=True):
            decided_L = (self.blocks_BL[sequence] == step.block) & ~self.masked_BL[sequence]
            count = int(self.options.remask * int(decided_L.sum()))
            if step.num_left == 0 or count == 0:
                continue
            confidence_L = self.log_confidence_BL[sequence].masked_fill(~decided_L, torch.inf)
            again = confidence_L.argsort(stable=True)[:count]
            self.masked_BL[sequence, again] = True
            self.tokens_BL[sequence, again] = self.mask_token_id
            self.num_masked[sequence][step.block] += count
            if self.uniforms_BL is not None:  # drawn with the same number, the token would return
                self.uniforms_BL[sequence, again] = (self.uniforms_BL[sequence, again] + INVERSE_GOLDEN_RATIO) % 1

    def _predict(
        self, model: Model, sequences_S: Tensor, candidates_SL: Tensor, needed_SL: Tensor, window: Window | None
    ) -> Scores:
        """Run the model on these sequences and score the candidates, [N].

        The model computes the positions of `window` (all of them if None) and returns the needed output positions.
        Under guidance the batch is doubled: the second half has the given tokens masked and cache slots of its own.
        """
        options = self.options
        tokens_SL, visible_SL = self.tokens_BL[sequences_S], self.canvas.visible[sequences_S]
        if options.cfg_scale:
            given_SL = visible_SL & ~self.canvas.editable[sequences_S]
            tokens_SL = torch.cat([tokens_SL, tokens_SL.masked_fill(given_SL, self.mask_token_id)])
            visible_SL, needed_SL = visible_SL.repeat(2, 1), needed_SL.repeat(2, 1)
            if window:
                slots = torch.cat([window.slots, window.slots + len(self.plans)])
                window = Window(slots, window.active.repeat(2, 1))
        uniforms_N = None if self.uniforms_BL is None else self.uniforms_BL[sequences_S][candidates_SL]
        reduce = scorer(options, self.mask_token_id, uniforms_N)
        return Scores(*model(Request(tokens_SL, visible_SL, needed_SL, window), reduce))

    def _window(
        self, sequences: list[int], sequences_S: Tensor, steps: list[StepPlan], in_block_SL: Tensor, needed_SL: Tensor
    ) -> Window | None:
        """The positions to compute, and a record of what is then cached; None: all, and nothing is.

        For a block diffusion model see `block_window`. For a bidirectional one they are the block (and, for `prefix`,
        everything after it), or the whole sequence if its block is a new one.
        """
        if self.options.cache == "none":
            return None
        if self.options.aligned_blocks:
            length = self.options.block_length
            start_S = in_block_SL.long().argmax(1) // length * length
            positions_L = torch.arange(in_block_SL.shape[1], device=in_block_SL.device)
            # The last position before the block predicts its first one, and attends to nothing of it.
            reads_block_S = (needed_SL & (positions_L >= start_S[:, None])).any(1)
            window = self.block_window(sequences_S, start_S + length * reads_block_S, needed_SL)
            self.num_cached_B[sequences_S] = start_S
            return window
        is_new = [self.cached_blocks[sequence] != step.block for sequence, step in zip(sequences, steps, strict=True)]
        for sequence, step in zip(sequences, steps, strict=True):
            self.cached_blocks[sequence] = step.block
        active_SL = in_block_SL | output_positions(in_block_SL, self.label_shift)
        if self.options.cache == "prefix":
            active_SL = active_SL.long().cumsum(1) > 0
        active_SL |= torch.tensor(is_new, device=in_block_SL.device)[:, None]
        active_SL &= self.canvas.visible[sequences_S]
        return Window(sequences_S, active_SL)


def _select(options: SamplingOptions, scores: Scores, candidates_SL: Tensor, required_S: Tensor) -> Tensor:
    """The candidates to unmask, at least `required` per sequence, [S, L] bool."""
    entropies_SL = scatter(scores.entropy, candidates_SL, torch.inf)
    if options.sampler in ("rnd1", "entropy"):
        return lowest(entropies_SL, candidates_SL, required_S)
    neg_confidence_SL = scatter(-scores.log_confidence, candidates_SL, torch.inf)
    selected_SL = lowest(neg_confidence_SL, candidates_SL, required_S)
    if options.sampler == "eb":
        selected_SL |= entropy_bounded(neg_confidence_SL, entropies_SL, candidates_SL, options.gamma)
    elif options.sampler == "threshold":
        selected_SL |= candidates_SL & ((-neg_confidence_SL).exp() >= options.threshold)
    return selected_SL


def _check(canvas: Canvas, label_shift: bool) -> None:
    shapes = {tuple(tensor.shape) for tensor in canvas}
    if len(shapes) > 1 or canvas.tokens.dim() != 2 or canvas.editable.dtype != torch.bool:
        raise ValueError("tokens, editable and visible must all be [batch, sequence], and editable boolean")
    if label_shift and canvas.editable[:, 0].any():
        raise ValueError("position 0 is a hole, and under the label shift no position predicts it; put a token there")


def lowest(costs_BL: Tensor, candidates_BL: Tensor, count_B: Tensor) -> Tensor:
    """The `count` candidates of lowest cost; ties go to the leftmost."""
    return candidates_BL & (_ranks(costs_BL, candidates_BL) < count_B[:, None])


def entropy_bounded(costs_BL: Tensor, entropies_BL: Tensor, candidates_BL: Tensor, gamma: float) -> Tensor:
    """Candidates by rising cost, while (sum of entropies) - (largest entropy) <= gamma nats; at least the first one.

    The bound of Ben-Hamu et al. 2025 on the error of sampling them in parallel, as if independent.
    """
    order_BL = costs_BL.masked_fill(~candidates_BL, torch.inf).argsort(dim=1, stable=True)
    sorted_BL = entropies_BL.masked_fill(~candidates_BL, 0.0).gather(1, order_BL)
    within_BL = sorted_BL.cumsum(1) - sorted_BL.cummax(1).values <= gamma
    within_BL[:, 0] = True
    return candidates_BL & torch.zeros_like(within_BL).scatter(1, order_BL, within_BL)


def _ranks(costs_BL: Tensor, candidates_BL: Tensor) -> Tensor:
    """Rank of each position, 0 for the lowest cost; positions that are not candidates come last."""
    return costs_BL.masked_fill(~candidates_BL, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
