"""How far the weights have moved from where the run began."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_a2d.config import ROLES
from megatron_a2d.runtime.device import device
from megatron_a2d.training.pieces import Piece, over_ranks, squares_by_role


class Drift:
    """|W - W0| / |W0| by role. W0 is what the pieces hold when this is made; it is kept in the host's memory."""

    def __init__(self, pieces: list[Piece]):
        self._pieces = pieces
        self._start = [piece.weight().to("cpu", copy=True) for piece in pieces]

    def measure(self, values: Callable[[int, Piece], Tensor] = lambda _, piece: piece.weight()) -> dict[str, float]:
        """Of `values`, by default what the weights are now. Collective; roles that the model has."""

        def moved(number: int, piece: Piece) -> Tensor:
            return values(number, piece).float() - self._start[number].to(device()).float()

        sums = over_ranks(
            torch.stack(
                [
                    squares_by_role(self._pieces, moved),
                    squares_by_role(self._pieces, lambda number, piece: self._start[number].to(device())),
                ]
            )
        )
        away, size = sums.sqrt().tolist()
        return {role: away[index] / size[index] for index, role in enumerate(ROLES) if size[index] > 0}
