"""The cache of finished blocks: the logits and the text are those of computing the whole text in every forward pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megatron_a2d.diffusion.block_diffusion import BlockModel
from megatron_a2d.diffusion.model_interface import Request
from megatron_a2d.diffusion.sampling import Sampled, SamplingOptions, denoise, make_canvas
from megatron_a2d.diffusion.sampling.batch_state import BatchState
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.kv_cache_a2d import KeyValueCache
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel

VOCAB, MASK, END = 61, 60, 2
# Prompts that end in a block, at its end and at its first token; holes within the text, and text after them.
ROWS = [
    [4, 9, *[MASK] * 11, 7, 3],
    [5, *[MASK] * 6, 8, *[MASK] * 2, 2, 2],
    [1, 2, 3, 11, 12, 13, 14, 15, *[MASK] * 7],
    [6, *[MASK] * 17],
    [3, 1, 4, 1, 5, 9, 2, 6, 5, *[MASK] * 3],
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def model_of(**changes: Any) -> A2DForMaskedLM:
    """Random weights, large enough that one wrong key changes the text."""
    config = A2DConfig(**dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, max_position_embeddings=64, rope_theta=100.0, mask_token_id=MASK,
    ) | changes)  # fmt: skip
    model = A2DForMaskedLM(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model


class Compared:
    """A model that runs every request as it is asked and without its window; keeps how far the logits are apart."""

    def __init__(self, model: A2DForMaskedLM):
        self._asked, self._whole = TransformersModel(model), TransformersModel(model)
        self.distances: list[float] = []
        self.requests: list[Request] = []

    def __call__(self, request: Request, reduce: Any) -> tuple[torch.Tensor, ...]:
        seen: list[torch.Tensor] = []
        self._whole(request._replace(window=None), lambda hidden, head: (seen.append(head(hidden)), ())[1])
        found = self._asked(request, lambda hidden, head: (seen.append(head(hidden)), reduce(hidden, head))[1])
        self.distances.append(float((seen[0] - seen[1]).abs().max()))
        self.requests.append(request)
        return found

    def computed(self, row: int) -> list[list[int]]:
        """The positions of a row that each of its passes computed."""
        found = []
        for window in (request.window for request in self.requests if request.window is not None):
            found += [window.active[place].nonzero()[:, 0].tolist() for place in (window.slots == row).nonzero()[:, 0]]
        return found


def fill(
    model: Any, rows: list[list[int]], label_shift: bool = True, co_loss: bool = False, ends: tuple[int, ...] = (), **options: Any
) -> Sampled:  # fmt: skip
    how = {"num_steps": 16, "block_length": 4, "aligned_blocks": True, "cache": "prefix"} | options
    block_model = BlockModel(model, MASK, how["block_length"], co_loss)
    canvas = make_canvas(rows, MASK)
    return denoise(
        block_model, canvas, MASK, SamplingOptions(**how), label_shift=label_shift, seed=3, end_token_ids=ends
    )


SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "rnd1"},
    {"sampler": "rnd1", "block_length": 1},
    {"sampler": "confidence", "remask": 0.4, "num_steps": 40, "block_length": 5},
    {"sampler": "threshold", "threshold": 0.3, "temperature": 1.0, "remask": 0.3},
    {"sampler": "eb", "gamma": 2.0, "block_length": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"sampler": "confidence", "block_length": 32},
]


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize(("label_shift", "co_loss"), [(True, False), (False, False), (True, True), (False, True)])
def test_the_cache_changes_nothing(label_shift: bool, co_loss: bool, options: dict[str, Any]) -> None:
    """Logits at every pass, texts and numbers of passes, with rows that reach their blocks at different times."""
    model = model_of()
    compared = Compared(model)
    for rows in (ROWS, ROWS[::-1][:3]):  # what earlier texts left in the cache does not matter
        found = fill(compared, rows, label_shift, co_loss, **options)
        plain = fill(TransformersModel(model), rows, label_shift, co_loss, **options, cache="none")
        assert torch.equal(found.tokens, plain.tokens) and found.num_forwards == plain.num_forwards
    assert max(compared.distances) < 1e-5
    assert all(request.window is not None for request in compared.requests)


@pytest.mark.parametrize("sizes", [{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, {"rope_scaling": YARN}, {"num_key_value_heads": 4}], ids=["moe", "yarn", "mha"])  # fmt: skip
def test_every_architecture(sizes: dict[str, Any]) -> None:
    model = model_of(**sizes)
    compared = Compared(model)
    assert torch.equal(fill(compared, ROWS).tokens, fill(TransformersModel(model), ROWS, cache="none").tokens)
    assert max(compared.distances) < 1e-5


@pytest.mark.parametrize("co_loss", [False, True])
def test_texts_that_end_leave_the_batch(co_loss: bool) -> None:
    model = model_of()
    ends = tuple(range(0, VOCAB - 1, 6))
    found = fill(Compared(model), ROWS, co_loss=co_loss, ends=ends, temperature=1.0)
    plain = fill(TransformersModel(model), ROWS, co_loss=co_loss, ends=ends, temperature=1.0, cache="none")
    assert torch.equal(found.tokens, plain.tokens) and found.num_forwards == plain.num_forwards
    whole = fill(TransformersModel(model), ROWS, co_loss=co_loss, temperature=1.0)
    assert sum(found.num_forwards) < sum(whole.num_forwards)


def test_a_row_does_not_depend_on_the_batch() -> None:
    model = model_of()
    compared = Compared(model)
    together = fill(compared, ROWS)
    assert any(len(set(request.window.active.sum(1).tolist())) > 1 for request in compared.requests)
    assert not any(bool((request.window.active & ~request.visible).any()) for request in compared.requests)
    for number, row in enumerate(ROWS):
        alone = fill(TransformersModel(model), [row])
        assert alone.tokens[0].tolist() == together.tokens[number, : len(row)].tolist()
        assert alone.num_forwards == [together.num_forwards[number]]


@pytest.mark.parametrize("label_shift", [True, False])
def test_positions_that_are_computed(label_shift: bool) -> None:
    """The block; once the block before it, with its final tokens; and while the first token is masked, its predictor."""
    compared = Compared(model_of())
    row = [*range(1, 10), *[MASK] * 6]  # blocks of 4: the prompt ends with the first token of its third block
    fill(compared, [row], label_shift, sampler="confidence", num_steps=6)
    found, length = compared.computed(0), len(row)
    assert len(found) == 6 and found[0] == list(range(12)), "the prompt with its first block"
    assert found[1] == found[2] == [8, 9, 10, 11]
    first, later = found[3], found[4:]
    masked = [bool(request.tokens[0, 12] == MASK) for request in compared.requests[4:]]
    if label_shift and compared.requests[3].needed[0].nonzero()[:, 0].tolist() == [11]:
        assert first == [8, 9, 10, 11]
    else:
        assert first == list(range(8, length))
    for positions, first_is_masked in zip(later, masked, strict=True):
        assert positions == [*([11] if label_shift and first_is_masked else []), 12, 13, 14]


def test_blocks_of_one_token_are_computed_once() -> None:
    """Under the label shift the position before predicts them, as in an autoregressive model with its cache."""
    compared = Compared(model_of())
    fill(compared, [[5, 6, *[MASK] * 6]], block_length=1)
    assert compared.computed(0) == [[0, 1], [2], [3], [4], [5], [6]]


def _stale(self: Any, sequences_S: torch.Tensor, end_S: torch.Tensor, needed_SL: torch.Tensor) -> Any:
    """A finished block keeps the keys and values of its last denoising pass."""
    block = self.options.block_length
    self.num_cached_B[sequences_S] = torch.where(
        self.num_cached_B[sequences_S] > 0, (end_S - 1) // block * block, self.num_cached_B[sequences_S]
    )
    return ORIGINAL["block_window"](self, sequences_S, end_S, needed_SL)


def _all_rows_in_order(self: Any, slots_B: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Rows that have left the batch are not skipped."""
    return ORIGINAL["select"](self, torch.arange(len(slots_B)), *arguments)


def _no_mask(self: Any, *arguments: Any) -> torch.Tensor:
    """Everything in the cache is attended to."""
    self.visible = None
    return ORIGINAL["attend"](self, *arguments)


ORIGINAL = {
    "block_window": BatchState.block_window, "select": KeyValueCache.select, "attend": KeyValueCache.attend,
}  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [(BatchState, "block_window", _stale), (KeyValueCache, "select", _all_rows_in_order), (KeyValueCache, "attend", _no_mask)],
)  # fmt: skip
def test_a_broken_cache_is_noticed(owner: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all these tests: far larger differences, and another text."""
    model = model_of()
    plain = fill(TransformersModel(model), ROWS, cache="none")
    monkeypatch.setattr(owner, name, broken)
    compared = Compared(model)
    assert not torch.equal(fill(compared, ROWS).tokens, plain.tokens)
    assert max(compared.distances) > 0.1


@pytest.mark.parametrize(("label_shift", "weight"), [(True, 0.0), (False, 0.0), (True, 0.5), (False, 0.5)])
def test_generate_of_an_export_caches_exactly(
    label_shift: bool, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts padded on the left, with holes in them, and with none."""
    model = model_of(block_length=4, label_shift=label_shift, ar_loss_weight=weight)
    computed: list[int] = []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward",
        lambda self, input_ids, *a, **k: computed.append(input_ids.numel()) or forward(self, input_ids, *a, **k),
    )  # fmt: skip
    prompts = [[4, 9, MASK, 3, 5, 1, 7], [5, 8], [1, 2, 3, 11, 12, 13, 14, 15]]
    widest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (widest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for given, steps in itertools.product(
        ({"input_ids": tokens, "attention_mask": mask}, {"input_ids": tokens[2:]}), (5, 30)
    ):
        computed.clear()
        cached = model.generate(**given, max_new_tokens=13, num_steps=steps)
        few, num_passes = sum(computed), len(computed)
        computed.clear()
        whole = model.generate(**given, max_new_tokens=13, num_steps=steps, use_cache=False)
        assert torch.equal(cached, whole) and not (cached[:, widest:] == MASK).any()
        assert num_passes == len(computed) and few < 0.5 * sum(computed)


@pytest.mark.parametrize("block_length", [0, 4])
def test_generate_of_an_export_stops_at_the_end_of_text(block_length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nothing before it is masked: the rest would be padding."""
    model, passes = model_of(block_length=block_length), []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, *a, **k: passes.append(a[0].numel()) or forward(self, *a, **k)
    )  # fmt: skip
    prompts = torch.tensor([[4, 9, 1], [5, 8, 7]])
    free = model.generate(prompts, max_new_tokens=12, num_steps=12)
    computed, end = sum(passes), int(free[0, 8])
    passes.clear()
    model.config.eos_token_id, model.config.pad_token_id = end, 0
    found = model.generate(prompts, max_new_tokens=12, num_steps=12)
    for row, whole in zip(found.tolist(), free.tolist(), strict=True):
        stop = whole.index(end, 3) + 1 if end in whole[3:] else len(whole)
        assert row == whole[:stop] + [0] * (len(whole) - stop)
    assert sum(passes) < computed or not block_length
