"""What the other objectives and conversions make of a sample: weights, random attention entries, drawn weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.diffusion.attention_masks import annealed, annealing_key_and_threshold
from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.loss_weighting import context
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.model.grafted_attention import relative_errors
from megatron_a2d.training.initialization import _fill, normals
from tests.unit.test_training import QWEN3_8B, QWEN3_30B_A3B

LENGTH = 48


def published_context(visible_L: np.ndarray, p: float) -> np.ndarray:
    """Dream's sum, written out."""
    length = len(visible_L)
    return np.array([
        sum(0.5 * p * (1 - p) ** (abs(i - j) - 1) for j in range(length) if j != i and visible_L[j])
        for i in range(length)
    ])  # fmt: skip


@pytest.mark.parametrize("p", [0.8, 0.1, 1.0])
def test_context_is_the_published_sum(p: float) -> None:
    visible = np.random.default_rng(0).random(LENGTH) < 0.4
    assert np.abs(context(visible, p) - published_context(visible, p)).max() < 1e-9
    documents = np.repeat([0, 1, 2], [5, 30, 13])
    alone = np.concatenate([published_context(part, p) for part in np.split(visible, [5, 35])])
    assert np.abs(context(visible, p, documents) - alone).max() < 1e-9
    assert np.abs(alone - published_context(visible, p)).max() > 1e-3


@pytest.mark.parametrize("weights", ["mdlm", "uniform", "cart"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weights_are_one_on_average(weights: str, schedule: str) -> None:
    """Over many samples a maskable token in the middle of a sample weighs one: losses are in nats a token."""
    noise = Noise(3, 255, schedule, label_shift=False, loss_weighting=weights)
    total = sum(corrupt(np.zeros(256, dtype=np.int64), index, noise).weights[32:-32] for index in range(4000))
    assert float(total.mean()) / 4000 == pytest.approx(1, abs=0.02)


def test_weights_differ_where_they_should() -> None:
    samples = {
        name: corrupt(np.zeros(LENGTH, dtype=np.int64), 5, Noise(3, 255, loss_weighting=name))
        for name in ("mdlm", "uniform", "cart")
    }
    for sample in samples.values():
        assert np.array_equal(sample.tokens, samples["mdlm"].tokens)
    assert len(set(samples["uniform"].weights.tolist())) == 2 and len(set(samples["cart"].weights.tolist())) > 5
    assert max(samples["uniform"].weights) == pytest.approx(2, rel=2e-3)


def mask_of(index: int, iteration: int, queries: torch.Tensor, steps: int = 10, seed: int = 1) -> torch.Tensor:
    annealing = annealing_key_and_threshold(seed, index, iteration, steps)
    assert annealing is not None
    return annealed(torch.from_numpy(annealing)[None], queries, LENGTH)[0]


def test_random_entries_are_a_function_of_seed_sample_query_key() -> None:
    """Any part of the queries sees what all see; other samples and seeds see other entries; golden values hold."""
    everyone = torch.arange(LENGTH)
    whole = mask_of(7, 3, everyone)
    for part in everyone.split(16):
        assert torch.equal(mask_of(7, 3, part), whole[part])
    batch = torch.from_numpy(np.stack([annealing_key_and_threshold(1, index, 3, 10) for index in (6, 7)]))
    assert torch.equal(annealed(batch, everyone, LENGTH)[1], whole)
    assert torch.equal(annealed(batch, everyone, 20)[1], whole[:, :20])
    assert not torch.equal(mask_of(8, 3, everyone), whole) and not torch.equal(mask_of(7, 3, everyone, seed=2), whole)
    queries = torch.tensor([0, 9])
    open_QK = annealed(torch.tensor([[-12345, 1 << 52]]), queries, 24)[0]
    expected = [[k <= q or splitmix64(-12345, (q << 32) + k) >> 63 == 0 for k in range(24)] for q in queries.tolist()]
    assert open_QK.tolist() == expected


def splitmix64(key: int, count: int) -> int:
    """As published, in integers: older runs resume with the same masks only if this never changes."""
    z = (key + count * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_entries_open_as_the_ratio_rises() -> None:
    everyone = torch.arange(LENGTH)
    past = torch.ones(LENGTH, LENGTH).tril().bool()
    before = past
    for iteration in range(9):
        masks = torch.stack([mask_of(index, iteration, everyone) for index in range(50)])
        assert bool(masks[:, past].all())
        ratio = float(masks[:, ~past].float().mean())
        assert ratio == pytest.approx((iteration + 1) / 10, abs=0.01)
        assert bool((masks[0] | ~before).all())
        before = masks[0]
    for row in (0, 20):  # no query, and no distance, is preferred
        opened = torch.stack([mask_of(index, 4, everyone)[row, row + 1 :] for index in range(2000)]).float().mean(0)
        assert float((opened - 0.5).abs().max()) < 0.06
    assert annealing_key_and_threshold(1, 7, 9, 10) is None and annealing_key_and_threshold(1, 7, 100, 10) is None


def problems(**settings: object) -> str:
    return "\n".join(find_problems(build({"train_data_path": "x", **settings}), None, 1))


def test_settings_without_effect_are_refused() -> None:
    assert "--attention-annealing-iters 0: --conversion annealing needs" in problems(conversion="annealing")
    assert "has no effect without --conversion annealing" in problems(attention_annealing_iters=5)
    assert "has no effect without --loss-weighting cart" in problems(cart_p=0.5)
    assert "--cart-p 0" in problems(loss_weighting="cart", cart_p=0)
    assert "--conversion annealing: has no effect with --objective ar" in problems(
        objective="ar", conversion="annealing", attention_annealing_iters=5
    )
    assert "--finetune" in problems(conversion="random", finetune=True)
    frozen = dict.fromkeys(("attention", "mlp", "router", "norm", "embedding", "head"), 0.0)
    assert "freezes every role" in problems(lr_mult=frozen)
    for masked in (
        {"conversion": "annealing", "attention_annealing_iters": 5}, {"conversion": "grafting", "grafting_iters": 2},
        {"objective": "block", "block_length": 4},
    ):  # fmt: skip
        for layers in ("auto", "local", "transformer_engine"):
            assert problems(**masked, transformer_impl=layers) == ""
    for good in (
        {"conversion": "annealing", "attention_annealing_iters": 5}, {"loss_weighting": "cart", "cart_p": 0.5},
        {"objective": "ar", "conversion": "random"}, {"lr_mult": {**frozen, "norm": 0.1}},
    ):  # fmt: skip
        assert problems(**good) == ""


def test_drawn_weights_do_not_depend_on_the_piece() -> None:
    whole = normals(1, "decoder.layers.mlp.linear_fc1.weight", 0, 200_001)
    for start, count in ((0, 1), (1, 6), (37, 1000), (199_998, 3)):
        assert np.array_equal(
            normals(1, "decoder.layers.mlp.linear_fc1.weight", start, count), whole[start : start + count]
        )
    assert abs(whole.mean()) < 0.01 and abs(whole.std() - 1) < 0.01 and abs((whole**4).mean() - 3) < 0.1
    for other in (
        normals(2, "decoder.layers.mlp.linear_fc1.weight", 0, 1000),
        normals(1, "output_layer.weight", 0, 1000),
    ):
        assert abs(np.corrcoef(other, whole[:1000])[0, 1]) < 0.15
    assert abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) < 0.01


def test_a_shard_is_filled_as_its_place_in_the_whole_tensor() -> None:
    """A slice of columns of one of several layers, as tensor parallelism cuts it."""

    def filled(rows: slice, columns: slice) -> torch.Tensor:
        data = torch.full((6, 8), float("nan"))[rows, columns].contiguous()
        offset = (2, rows.start, columns.start)
        fragments = (4, 6 // data.shape[0], 8 // data.shape[1])
        _fill(
            ShardedTensor("w", data, data.dtype, tuple(data.shape), (4, 6, 8), offset, fragments, prepend_axis_num=1),
            5,
            1.0,
        )
        return data

    whole = filled(slice(0, 6), slice(0, 8))
    assert torch.equal(whole.flatten(), torch.from_numpy(normals(5, "w", 2 * 48, 48)))
    assert torch.equal(filled(slice(3, 6), slice(0, 8)), whole[3:])
    assert torch.equal(filled(slice(0, 6), slice(4, 8)), whole[:, 4:])
    assert torch.equal(filled(slice(3, 6), slice(4, 8)), whole[3:, 4:])


def test_relative_errors() -> None:
    old = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    assert relative_errors(old, old).abs().max() == 0
    assert torch.allclose(relative_errors(torch.zeros_like(old), old), torch.ones(5, 2))
    assert torch.allclose(relative_errors(1.5 * old, old), torch.full((5, 2), 0.25))
    assert bool(relative_errors(old, torch.zeros_like(old)).isfinite().all())


def test_masked_tokens_without_a_weight_are_still_masked() -> None:
    """CART, nearly all masked: what is far from all that is visible counts nothing, and is no visible token."""
    noise = Noise(seed=3, mask_token_id=99, loss_weighting="cart")
    some = False
    for index in range(200):
        sample = corrupt(np.zeros(128, dtype=np.int64), index, noise)
        ((time, num_maskable, num_masked),) = sample.noise_segments
        assert (time, num_maskable, num_masked) == (sample.time, 127, (sample.tokens == 99).sum())
        some |= num_masked > (sample.weights > 0).sum() > 0
    assert some


def test_freezing_all_that_a_model_has() -> None:
    everything = dict.fromkeys(("attention", "mlp", "norm", "embedding"), 0.0)
    shapes = {
        ("router",): replace(QWEN3_30B_A3B, tie_word_embeddings=True),
        ("head",): QWEN3_8B,
        (): replace(QWEN3_8B, tie_word_embeddings=True),
    }
    for more, model_config in shapes.items():
        frozen = everything | dict.fromkeys(more, 0.0)
        for factors, refused in ((frozen, True), (frozen | {"norm": 0.1}, False)):
            config = build({"train_data_path": "x", "lr_mult": factors})
            found = [problem for problem in find_problems(config, model_config, 1) if "freezes" in problem]
            assert len(found) == refused, (factors, found)
