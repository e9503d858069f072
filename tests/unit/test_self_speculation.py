"""Self-speculative decoding: the text of autoregressive decoding, token for token, in fewer forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from megatron_a2d.diffusion.model_interface import from_logits
from megatron_a2d.diffusion.sampling import Sampled, SamplingOptions, denoise, make_canvas, most_forward_passes
from megatron_a2d.diffusion.sampling.batch_state import BatchState
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel
from tests.unit.test_block_cache import MASK, VOCAB, Compared, fill, model_of

PROMPTS = [[4, 9, 1], [5, 6, 7, 8], [1, 2, 3, 11, 12, 13, 14, 15, 16], [6]]
NEW = [13, 12, 6, 1]
ROWS = [[*prompt, *[MASK] * new] for prompt, new in zip(PROMPTS, NEW, strict=True)]


@pytest.fixture(scope="module")
def model() -> A2DForMaskedLM:
    """Attention is strong, so that a token depends on all before it more than on the last: many drafts are right."""
    model = model_of()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def greedy(model: A2DForMaskedLM) -> list[list[int]]:
    """What transformers' own Qwen3 writes with these weights, as in an export of the format qwen3."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "max_position_embeddings",
    )  # fmt: skip
    config = transformers.Qwen3Config(
        **{name: getattr(model.config, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    causal = transformers.Qwen3ForCausalLM(config).eval()
    causal.load_state_dict(model.state_dict())
    texts = []
    for prompt, new in zip(PROMPTS, NEW, strict=True):
        given = torch.tensor([prompt])
        texts.append(
            causal.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, suppress_tokens=[MASK]
            )[0].tolist()
        )  # fmt: skip
    return texts


def speculate(model: Any, rows: list[list[int]] = ROWS, label_shift: bool = True, **options: Any) -> Sampled:
    return fill(model, rows, label_shift, co_loss=True, sampler="self_speculative", **options)


def texts(sampled: Sampled, rows: list[list[int]] = ROWS) -> list[list[int]]:
    return [tokens[: len(row)] for tokens, row in zip(sampled.tokens.tolist(), rows, strict=True)]


@pytest.mark.parametrize("block_length", [1, 3, 4, 32])
@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize("cache", ["prefix", "none"])
def test_the_text_is_the_autoregressive_one(
    cache: str, label_shift: bool, block_length: int, model: A2DForMaskedLM, greedy: list[list[int]]
) -> None:
    """With and without a cache, with texts in different states together; and logits as without a cache."""
    compared = Compared(model)
    found = speculate(compared, label_shift=label_shift, block_length=block_length, cache=cache)
    assert texts(found) == greedy
    assert max(compared.distances) < 1e-5
    limit = most_forward_passes(make_canvas(ROWS, MASK).editable, SamplingOptions("self_speculative"))
    assert max(found.num_forwards) <= limit == 26
    for number, row in enumerate(ROWS):
        alone = speculate(TransformersModel(model), [row], label_shift, block_length=block_length, cache=cache)
        assert texts(alone, [row]) == [greedy[number]] and alone.num_forwards == [found.num_forwards[number]]


def test_drafts_that_agree_save_forward_passes(model: A2DForMaskedLM, greedy: list[list[int]]) -> None:
    found = speculate(TransformersModel(model), block_length=8)
    assert texts(found) == greedy and found.num_forwards[0] < 0.7 * NEW[0]
    drafted = fill(TransformersModel(model), ROWS, co_loss=True, block_length=8, num_steps=1)
    assert texts(drafted) != greedy, "the drafts alone are another text"


@pytest.mark.parametrize("label_shift", [True, False])
def test_drawn_texts_are_the_autoregressive_ones(label_shift: bool, model: A2DForMaskedLM) -> None:
    """Blocks of one token under the label shift are autoregressive; the random numbers are those of the positions."""
    how = {"temperature": 1.0, "top_k": 30}
    one_by_one = fill(TransformersModel(model), ROWS, co_loss=True, block_length=1, **how)
    assert one_by_one.num_forwards == NEW
    found = speculate(TransformersModel(model), label_shift=label_shift, **how)
    assert torch.equal(found.tokens, one_by_one.tokens)
    assert not torch.equal(found.tokens, speculate(TransformersModel(model), label_shift=label_shift).tokens)


def test_texts_end_where_autoregressive_ones_do(model: A2DForMaskedLM, greedy: list[list[int]]) -> None:
    end = greedy[0][len(PROMPTS[0]) + 5]
    found = speculate(TransformersModel(model), ends=(end,))
    for row, prompt, text in zip(texts(found), PROMPTS, greedy, strict=True):
        stop = text.index(end, len(prompt)) if end in text[len(prompt) :] else len(text)
        assert row[:stop] == text[:stop] and row[stop : stop + 1] == text[stop : stop + 1]
    assert found.num_forwards[0] < speculate(TransformersModel(model)).num_forwards[0]


def planted(is_right: Callable[[int], bool], label_shift: bool) -> Any:
    """A model whose causal pass computes a chain of tokens, and whose drafts follow it where `is_right`(position).

    Blocks of 4. Under the label shift a block's first token is drafted by the finished position before it: rightly.
    """

    def logits(tokens_BL: torch.Tensor) -> torch.Tensor:
        logits_BLV = torch.zeros(*tokens_BL.shape, VOCAB)
        for row, tokens in enumerate(tokens_BL.tolist()):
            exact = tokens[0]
            for place in range(1, len(tokens)):
                exact = (3 * (exact if tokens[place - 1] == MASK else tokens[place - 1]) + 1) % 50
                follows_finished = label_shift and place % 4 == 0
                if tokens[place] == MASK:
                    drafted = exact if is_right(place) or follows_finished else (exact + 1) % 50
                    logits_BLV[row, place - label_shift, drafted] = 9.0
                if tokens[place - 1] != MASK and (tokens[place] != MASK or place % 4 == 0 or not label_shift):
                    logits_BLV[row, place - 1, exact] = 9.0
        return logits_BLV

    return from_logits(logits)


@pytest.mark.parametrize(
    ("is_right", "label_shift", "num_forwards"),
    [
        (lambda place: True, True, 6),  # of the second and third block one token is the bonus of the block before
        (lambda place: True, False, 6),
        (lambda place: False, True, 15),  # 4 and 5, 6, and 7 without a draft: 2 + 2 + 1 passes a block
        (lambda place: False, False, 21),  # each token with a draft, but for the last one of a block
        (lambda place: place % 4 < 2, False, 9),
    ],
)
def test_tokens_per_forward_pass(is_right: Callable[[int], bool], label_shift: bool, num_forwards: int) -> None:
    rows = [[7, 7, 7, 7, *[MASK] * 12]]
    options = SamplingOptions("self_speculative", block_length=4, aligned_blocks=True)
    found = denoise(planted(is_right, label_shift), make_canvas(rows, MASK), MASK, options, label_shift=label_shift)
    expected = [7, 7, 7, 7]
    for _ in range(12):
        expected.append((3 * expected[-1] + 1) % 50)
    assert found.tokens[0].tolist() == expected
    assert found.num_forwards == [num_forwards]


def test_a_stale_cache_is_noticed(
    model: A2DForMaskedLM, greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: keys and values of rejected drafts that stay in the cache give another text."""
    original = BatchState.block_window

    def stale(self: Any, sequences_S: torch.Tensor, *arguments: Any) -> Any:
        self.num_cached_B[sequences_S] += 2
        return original(self, sequences_S, *arguments)

    monkeypatch.setattr(BatchState, "block_window", stale)
    assert texts(speculate(TransformersModel(model))) != greedy


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ([5, MASK, 6], {"block_length": 4, "aligned_blocks": True}, "continues texts"),
        ([MASK, 6], {"block_length": 4, "aligned_blocks": True}, "continues texts"),
        ([5, MASK], {}, "needs a block diffusion model"),
    ],
)
def test_what_cannot_be_continued(row: list[int], options: dict[str, Any], message: str) -> None:
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, VOCAB))
    with pytest.raises(ValueError, match=message):
        denoise(
            model, make_canvas([row], MASK), MASK, SamplingOptions("self_speculative", **options), label_shift=False
        )
