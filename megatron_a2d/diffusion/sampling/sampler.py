"""The loop: forward, score, decide, until nothing is masked. Nothing that was decided is masked again.

Each row follows a plan of its own (unmask_schedule.py), so rows of a batch do not influence one another, and a
finished row leaves the batch. At equal settings `rnd1` gives the tokens of the published sampler (RND1, Radical
Numerics 2025) when that is deterministic; what differs: the mask token is never predicted, filters leave entropies
finite, a batch may hold rows of any lengths, forwards that would decide nothing are skipped, and a text that has
ended is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_a2d.diffusion.model_interface import Model, Request, Window
from megatron_a2d.diffusion.sampling.early_stop import after_eos
from megatron_a2d.diffusion.sampling.token_scores import Scores, position_uniforms, scorer
from megatron_a2d.diffusion.sampling.unmask_schedule import Turn, blocks_of, sizes_of, turns
from megatron_a2d.diffusion.sampling_options import SamplingOptions

# on_step(step, tokens_BL, decided_BL): step counts from 1, `decided` are the positions decided in it
OnStep = Callable[[int, Tensor, Tensor], None]
# is_final(row, tokens): whether a text that begins with these tokens is cut within them
IsFinal = Callable[[int, list[int]], bool]


class Sampled(NamedTuple):
    """Filled holes, and what they took."""

    tokens: Tensor  # [B, L] int64, equal to the canvas outside the holes
    num_forwards: list[int]  # [B] forward passes that each row was part of


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

    Under `label_shift` row i - 1 of the model's output predicts position i, so position 0 cannot be a hole. A row's
    draws depend on its own seed only, not on the batch around it: give one seed a row, or one number from which
    `row_seed(seed, row)` makes them. `end_token_ids`: a row whose holes all have ended with one of them is left, and
    what is masked behind it is filled with the first of them. `is_final` is asked of what a row's holes hold before
    their first masked position, when that has grown; where it says yes, the row is left likewise. Raises ValueError for
    a hole at position 0 under the shift, and for `is_final` without end tokens.
    """
    _check(canvas, label_shift)
    if is_final and not end_token_ids:
        raise ValueError("is_final needs end_token_ids: the first of them fills what is left")
    state = _State(canvas, mask_token_id, options, seed, tuple(end_token_ids), is_final)
    while rows := state.unfinished():
        decided_BL = state.advance(model, rows, label_shift)
        if on_step is not None:
            on_step(state.step, state.tokens_BL.clone(), decided_BL)
    return Sampled(state.tokens_BL, state.num_forwards)


class _State:
    """The batch while it is denoised. R: the rows that a forward pass works on."""

    def __init__(
        self,
        canvas: Canvas,
        mask_token_id: int,
        options: SamplingOptions,
        seed: int | Sequence[int],
        end_token_ids: tuple[int, ...],
        is_final: IsFinal | None,
    ):
        self.canvas, self.mask_token_id, self.options, self.end_token_ids, self.is_final = (
            canvas, mask_token_id, options, end_token_ids, is_final,
        )  # fmt: skip
        batch, length = canvas.tokens.shape
        self.tokens_BL = canvas.tokens.masked_fill(canvas.editable, mask_token_id)
        self.masked_BL = canvas.editable.clone()
        self.blocks_BL = blocks_of(canvas.editable, options.block_length, options.aligned_blocks)
        self.uniforms_BL: Tensor | None = None
        if not options.takes_likeliest:
            self.uniforms_BL = position_uniforms(seed, batch, length).to(canvas.tokens.device)
        # Masked positions of each row, by block.
        self.left = sizes_of(self.blocks_BL)
        self.plans = [turns(sizes, options.sampler, options.num_steps) for sizes in self.left]
        self.cursors = [0] * batch
        self.cached_blocks = [-1] * batch
        self.num_forwards = [0] * batch
        self.num_written = [0] * batch  # decided positions before each row's first masked one
        self.step = 0

    def unfinished(self) -> list[int]:
        return [row for row, left in enumerate(self.left) if any(left)]

    def advance(self, model: Model, rows: list[int], label_shift: bool) -> Tensor:
        """One forward pass of `rows`; returns the positions that it decided, [B, L]."""
        device = self.tokens_BL.device
        now = [self._turn(row) for row in rows]
        rows_R, blocks_R = (torch.tensor(values, device=device) for values in (rows, [turn.block for turn in now]))
        in_block_RL = self.blocks_BL[rows_R] == blocks_R[:, None]
        considered_RL = self.masked_BL[rows_R] & in_block_RL
        scores = self._predict(model, rows, now, in_block_RL, considered_RL, label_shift)
        # Each forward decides at least one position of each row.
        required = [max(self.left[row][turn.block] - turn.num_left, 1) for row, turn in zip(rows, now, strict=True)]
        decided_RL = _decide(self.options, scores, considered_RL, torch.tensor(required, device=device))
        predicted_RL = _spread(scores.tokens, considered_RL, 0)
        decided_BL = torch.zeros_like(self.masked_BL)
        decided_BL[rows_R] = decided_RL
        self.tokens_BL[rows_R] = torch.where(decided_RL, predicted_RL, self.tokens_BL[rows_R])
        self.masked_BL &= ~decided_BL
        for row, turn, count in zip(rows, now, decided_RL.sum(1).tolist(), strict=True):
            self.left[row][turn.block] -= count
            self.cursors[row] += 1
            self.num_forwards[row] += 1
        self.step += 1
        return decided_BL | self._leave_ended_rows()

    def _turn(self, row: int) -> Turn:
        """The row's next turn; those of blocks that were filled early are passed over."""
        plan, left = self.plans[row], self.left[row]
        while left[plan[self.cursors[row]].block] == 0:
            self.cursors[row] += 1
        return plan[self.cursors[row]]

    def _predict(
        self,
        model: Model,
        rows: list[int],
        now: list[Turn],
        in_block_RL: Tensor,
        considered_RL: Tensor,
        label_shift: bool,
    ) -> Scores:
        options = self.options
        rows_R = torch.tensor(rows, device=self.tokens_BL.device)
        tokens_RL, visible_RL = self.tokens_BL[rows_R], self.canvas.visible[rows_R]
        needed_RL = _rows_of(considered_RL, label_shift)
        window = None
        if options.cache != "none":
            fresh = [self.cached_blocks[row] != turn.block for row, turn in zip(rows, now, strict=True)]
            for row, turn in zip(rows, now, strict=True):
                self.cached_blocks[row] = turn.block
            active_RL = in_block_RL | _rows_of(in_block_RL, label_shift)
            if options.cache == "prefix":
                active_RL = active_RL.long().cumsum(1) > 0
            active_RL = (active_RL | torch.tensor(fresh, device=rows_R.device)[:, None]) & visible_RL
            window = Window(rows_R, active_RL)
        if options.guidance:
            given_RL = visible_RL & ~self.canvas.editable[rows_R]
            tokens_RL = torch.cat([tokens_RL, tokens_RL.masked_fill(given_RL, self.mask_token_id)])
            visible_RL, needed_RL = visible_RL.repeat(2, 1), needed_RL.repeat(2, 1)
            if window:
                slots = torch.cat([window.slots, window.slots + len(self.plans)])
                window = Window(slots, window.active.repeat(2, 1))
        uniforms_N = None if self.uniforms_BL is None else self.uniforms_BL[rows_R][considered_RL]
        reduce = scorer(options, self.mask_token_id, uniforms_N)
        return Scores(*model(Request(tokens_RL, visible_RL, needed_RL, window), reduce))

    def _leave_ended_rows(self) -> Tensor:
        """Fill what no text can show in rows that have nothing else left; returns those positions, [B, L]."""
        if not self.end_token_ids:
            return torch.zeros_like(self.masked_BL)
        lost_BL = after_eos(self.tokens_BL, self.masked_BL, self.canvas.editable, self.end_token_ids)
        if self.is_final is not None:
            for row in self._final_rows(self.is_final):
                lost_BL[row] = self.masked_BL[row]
        done_B = ~(self.masked_BL & ~lost_BL).any(1)
        filled_BL = lost_BL & done_B[:, None]
        self.tokens_BL.masked_fill_(filled_BL, self.end_token_ids[0])
        self.masked_BL &= ~filled_BL
        for row in done_B.nonzero()[:, 0].tolist():
            self.left[row] = [0] * len(self.left[row])
        return filled_BL

    def _final_rows(self, is_final: IsFinal) -> list[int]:
        written_BL = self.canvas.editable & (self.masked_BL.cumsum(1) == 0)
        final = []
        for row in self.unfinished():
            written = self.tokens_BL[row][written_BL[row]].tolist()
            if len(written) > self.num_written[row] and is_final(row, written):
                final.append(row)
            self.num_written[row] = len(written)
        return final


def _decide(options: SamplingOptions, scores: Scores, considered_RL: Tensor, required_R: Tensor) -> Tensor:
    """The positions to decide, at least `required` of each row."""
    entropies_RL = _spread(scores.entropy, considered_RL, torch.inf)
    if options.sampler == "rnd1":
        return lowest(entropies_RL, considered_RL, required_R)
    doubts_RL = _spread(-scores.log_confidence, considered_RL, torch.inf)
    decided_RL = lowest(doubts_RL, considered_RL, required_R)
    if options.sampler == "eb":
        decided_RL |= entropy_bounded(doubts_RL, entropies_RL, considered_RL, options.gamma)
    elif options.sampler == "threshold":
        decided_RL |= considered_RL & ((-doubts_RL).exp() >= options.threshold)
    return decided_RL


def _rows_of(positions_RL: Tensor, label_shift: bool) -> Tensor:
    """The rows of the model's output that predict these positions."""
    if not label_shift:
        return positions_RL
    return torch.nn.functional.pad(positions_RL[:, 1:], (0, 1))


def _spread(values_N: Tensor, considered_RL: Tensor, elsewhere: float) -> Tensor:
    spread_RL = torch.full(considered_RL.shape, elsewhere, dtype=values_N.dtype, device=values_N.device)
    spread_RL[considered_RL] = values_N
    return spread_RL


def _check(canvas: Canvas, label_shift: bool) -> None:
    shapes = {tuple(tensor.shape) for tensor in canvas}
    if len(shapes) > 1 or canvas.tokens.dim() != 2 or canvas.editable.dtype != torch.bool:
        raise ValueError("tokens, editable and visible must all be [batch, sequence], and editable boolean")
    if label_shift and canvas.editable[:, 0].any():
        raise ValueError("position 0 is a hole, and under the label shift nothing predicts it; put a token there")


class Canvas(NamedTuple):
    """A batch to denoise, all [B, L]."""

    tokens: Tensor  # int64; masks in the holes, padding at the right
    editable: Tensor  # bool, True in the holes
    visible: Tensor  # bool, False at the padding

    def to(self, device: torch.device) -> Canvas:
        return Canvas(*(tensor.to(device) for tensor in self))


def make_canvas(rows: Sequence[Sequence[int]], mask_token_id: int, pad_token_id: int = 0) -> Canvas:
    """Stack rows of tokens, padded at the right; every mask token in a row is a hole.

    The published package leaves one more token, padding, after the holes: to reproduce its output, append it.
    """
    shape = (len(rows), max(len(row) for row in rows))
    tokens_BL = torch.full(shape, pad_token_id, dtype=torch.long)
    visible_BL = torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        visible_BL[index, : len(row)] = True
    return Canvas(tokens_BL, visible_BL & (tokens_BL == mask_token_id), visible_BL)


def lowest(costs_BL: Tensor, considered_BL: Tensor, count_B: Tensor) -> Tensor:
    """The `count` considered positions of lowest cost, the leftmost of equals."""
    return considered_BL & (_ranks(costs_BL, considered_BL) < count_B[:, None])


def entropy_bounded(costs_BL: Tensor, entropies_BL: Tensor, considered_BL: Tensor, gamma: float) -> Tensor:
    """By rising cost, while (sum of entropies) - (largest of them) <= gamma nats; always the first one.

    The bound of Ben-Hamu et al. 2025 on what deciding them together, as if independent, can cost.
    """
    order_BL = costs_BL.masked_fill(~considered_BL, torch.inf).argsort(dim=1, stable=True)
    sorted_BL = entropies_BL.masked_fill(~considered_BL, 0.0).gather(1, order_BL)
    within_BL = sorted_BL.cumsum(1) - sorted_BL.cummax(1).values <= gamma
    within_BL[:, 0] = True
    return considered_BL & torch.zeros_like(within_BL).scatter(1, order_BL, within_BL)


def _ranks(costs_BL: Tensor, considered_BL: Tensor) -> Tensor:
    """0 for the lowest cost; positions that are not considered come last."""
    return costs_BL.masked_fill(~considered_BL, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
