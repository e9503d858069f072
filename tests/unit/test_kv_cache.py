"""Keys and values that are kept while a block is filled: exact where they can be, and elsewhere only what they say.

With a single layer a position's keys and values depend on its own token and place alone. What is kept is then what
would be computed, as long as every position is computed anew after its token has changed: caches change nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_a2d.diffusion.model_interface import Request, Window
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel

VOCAB, MASK = 61, 60
ROWS = [
    [4, 9, *[MASK] * 11, 7, 3],
    [5, *[MASK] * 6, 8, *[MASK] * 2, 2, 2],
    [1, 2, 3, *[MASK] * 4],
    [6, *[MASK] * 17],
]  # fmt: skip


def model_of(num_layers: int) -> A2DForMaskedLM:
    """Random weights, large enough that one wrong key changes what is written."""
    config = A2DConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=100.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = A2DForMaskedLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model


class Watched:
    """A model that runs every request twice, as it is asked and without its window; keeps how far they are apart."""

    def __init__(self, num_layers: int):
        model = model_of(num_layers)
        self._asked, self._whole = TransformersModel(model), TransformersModel(model)
        self.distances: list[float] = []
        self.requests: list[Request] = []

    def __call__(self, request: Request, reduce: Any) -> tuple[torch.Tensor, ...]:
        seen: list[torch.Tensor] = []
        self._whole(request._replace(window=None), lambda hidden, head: (seen.append(hidden), ())[1])
        found = self._asked(request, lambda hidden, head: (seen.append(hidden), reduce(hidden, head))[1])
        assert seen[0].shape == seen[1].shape
        self.distances.append(float((seen[0] - seen[1]).abs().max()))
        self.requests.append(request)
        return found


def fill(watched: Watched, rows: list[list[int]], label_shift: bool = True, **options: Any) -> torch.Tensor:
    canvas = make_canvas(rows, MASK)
    how = SamplingOptions(**{"num_steps": 16, "sampler": "threshold", "threshold": 0.5, "block_length": 4} | options)
    return denoise(watched, canvas, MASK, how, label_shift=label_shift, seed=3).tokens


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize(
    ("label_shift", "options"),
    [
        (True, {}),
        (False, {}),
        (True, {"sampler": "rnd1", "block_length": 3}),
        (True, {"cfg_scale": 0.7, "temperature": 1.0}),
    ],
)
def test_caches_of_one_layer_are_exact(cache: str, label_shift: bool, options: dict[str, Any]) -> None:
    """At every forward pass, with rows of all lengths that reach their blocks at different times and leave."""
    plain = fill(Watched(1), ROWS, label_shift, **options)
    watched = Watched(1)
    assert torch.equal(fill(watched, ROWS, label_shift, cache=cache, **options), plain)
    # What earlier texts left in the caches does not matter, whichever rows they were in.
    again = fill(watched, ROWS[::-1][:3], label_shift, cache=cache, **options)
    assert torch.equal(again, fill(Watched(1), ROWS[::-1][:3], label_shift, **options))
    assert max(watched.distances) < 1e-4
    partial = [request for request in watched.requests if not bool(window_of(request).active.all())]
    assert len(partial) > len(watched.requests) / 2, "most passes are over a part of the positions"


def window_of(request: Request) -> Window:
    assert request.window is not None
    return request.window


def test_caches_of_three_layers_are_approximations() -> None:
    """The control: caches are in use, and prefix is nearer to the truth than dual. First passes of blocks are exact."""
    means = {}
    for cache in ("prefix", "dual"):
        watched = Watched(3)
        fill(watched, ROWS[:1], cache=cache)
        whole = [bool(window_of(request).active.all()) for request in watched.requests]
        assert max(d for d, exact in zip(watched.distances, whole, strict=True) if exact) < 1e-4
        later = [d for d, exact in zip(watched.distances, whole, strict=True) if not exact]
        means[cache] = sum(later) / len(later)
    assert 1e-3 < means["prefix"] < means["dual"]


@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_positions_that_are_computed_anew(cache: str, label_shift: bool) -> None:
    """All at the first pass of a block; then the block and the row that predicts its first token; and what follows."""
    row = [4, 9, *[MASK] * 3, 7, *[MASK] * 3, 1, 1]
    watched = Watched(2)
    fill(watched, [row], label_shift, cache=cache, sampler="confidence", num_steps=6, block_length=3)
    assert len(watched.requests) == 6
    if cache == "none":
        assert all(request.window is None for request in watched.requests)
        return
    found = [window_of(request).active[0].nonzero()[:, 0].tolist() for request in watched.requests]
    everything, blocks = list(range(11)), ([2, 3, 4], [6, 7, 8])
    expected = []
    for block in blocks:
        first = block[0] - label_shift
        expected += [everything] + 2 * [list(range(first, 11 if cache == "prefix" else block[-1] + 1))]
    assert found == expected


def test_guidance_keeps_a_cache_for_each_of_its_halves() -> None:
    watched = Watched(1)
    fill(watched, ROWS, cache="dual", cfg_scale=0.7)
    for request in watched.requests:
        slots = window_of(request).slots.tolist()
        rows = slots[: len(slots) // 2]
        assert slots == [*rows, *(row + len(ROWS) for row in rows)] and len(set(slots)) == len(slots)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_no_row_knows_the_batch(cache: str) -> None:
    """Padding is not seen. Where rows compute different numbers of positions, the shorter ones store no more than their
    own; of padding nothing is computed."""
    watched = Watched(3)
    together = fill(watched, ROWS, cache=cache)
    windows = [(request, window_of(request)) for request in watched.requests if cache != "none"]
    assert not any(bool((window.active & ~request.visible).any()) for request, window in windows)
    assert sum(len(set(window.active.sum(1).tolist())) > 1 for _, window in windows) > 3 or cache == "none"
    for number, row in enumerate(ROWS):
        assert fill(Watched(3), [row], cache=cache)[0].tolist() == together[number, : len(row)].tolist()
