"""`generate` of exported models: the sampler's decisions, padding, the end of a text, refusals."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_a2d.diffusion.model_interface import from_logits
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from tests.unit.qwen3_exports import export_and_load, tokens


@pytest.mark.parametrize("label_shift", [True, False])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_generate_is_the_sampler(kind, label_shift, tmp_path):
    """The method that travels with an export decides as megatron_a2d.diffusion.sampling does."""
    _, ours = export_and_load(kind, tmp_path, label_shift=label_shift)
    canvas = torch.cat([tokens(2, 9), torch.full((2, 13), 96), tokens(2, 4)], dim=1)
    with torch.no_grad():
        model = from_logits(lambda t: ours(t).logits)
        options = SamplingOptions(num_steps=5)
        expected = denoise(model, make_canvas(canvas.tolist(), 96), 96, options, label_shift=label_shift).tokens
    assert torch.equal(ours.generate(canvas, num_steps=5), expected)
    assert not torch.equal(ours.generate(canvas, num_steps=13), expected), "the number of steps must matter"
    assert torch.equal(ours.generate(tokens(), max_new_tokens=0), tokens())
    prompts = tokens(2, 9)
    longer = ours.generate(prompts, max_new_tokens=7, num_steps=3)
    assert torch.equal(longer[:, :9], prompts) and longer.shape == (2, 16) and not (longer == 96).any()


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("padding", [7, None])
def test_generate_pads_behind_the_end_of_a_text(as_list, padding, tmp_path):
    """Of new tokens alone: what a hole in the prompt holds is followed by text that was given."""
    _, ours = export_and_load("dense", tmp_path)
    prompts = torch.cat([tokens(2, 5), torch.full((2, 2), 96), tokens(2, 4)], dim=1)
    ours.config.eos_token_id = None
    free = ours.generate(prompts, max_new_tokens=8, num_steps=4)
    end = int(free[0, 13])  # the third new token of the first row
    ends = [95, end] if as_list else end
    settings = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=padding)
    ours.generation_config = settings if as_list else None
    ours.config.eos_token_id, ours.config.pad_token_id = end, padding
    ended = ours.generate(prompts, max_new_tokens=8, num_steps=4)
    expected = free.clone()
    for row in expected:
        found = torch.isin(row[11:], torch.tensor([95, end] if as_list else end)).nonzero()[:, 0].tolist()
        if found:
            row[11 + found[0] + 1 :] = (95 if as_list else end) if padding is None else padding
    assert torch.equal(ended, expected) and not torch.equal(ended, free)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_generate_rows_of_a_batch_do_not_see_one_another(kind, tmp_path):
    _, ours = export_and_load(kind, tmp_path)
    rows = [tokens(1, 12), tokens(1, 5)]
    padded = torch.cat([rows[0], torch.cat([torch.full((1, 7), 95), rows[1]], dim=1)])
    mask = torch.ones_like(padded)
    mask[1, :7] = 0
    together = ours.generate(padded, attention_mask=mask, max_new_tokens=8, num_steps=4)
    for index, row in enumerate(rows):
        alone = ours.generate(row, max_new_tokens=8, num_steps=4)
        assert torch.equal(together[index, -8:], alone[0, -8:])
    without = ours.generate(padded, max_new_tokens=8, num_steps=4)
    assert not torch.equal(without[1], together[1]), "padding must matter without its mask"


def test_padding_without_its_mask_is_refused(tmp_path):
    """Read as text, it would change what is written; one such token before every row may well be text."""
    _, ours = export_and_load("dense", tmp_path, pad_token_id=5)
    rows = tokens(3, 9).masked_fill(tokens(3, 9) == 5, 6)
    for leading in ((2, 0, 1), (0, 1, 0), (3, 3, 3), (9, 9, 9)):
        padded = rows.clone()
        for row, count in zip(padded, leading, strict=True):
            row[:count] = 5
        for some in (padded, padded[leading.index(max(leading))][None] if max(leading) > 1 else padded):
            with pytest.raises(ValueError, match=r"start with padding \(token 5\) and there is no attention_mask"):
                ours.generate(some, max_new_tokens=2, num_steps=1)
            ours.generate(some, attention_mask=torch.ones_like(some), max_new_tokens=2, num_steps=1)
    rows[:, 0] = 5
    ours.generate(rows, max_new_tokens=2, num_steps=1)
    ours.generate(rows[:1, :1], max_new_tokens=2, num_steps=1)
    rows[:, 4:7] = 5
    ours.generate(rows, max_new_tokens=2, num_steps=1)
    ours.config.pad_token_id = None
    ours.generate(torch.full((2, 3), 5), max_new_tokens=2, num_steps=1)


def test_generate_draws(tmp_path):
    _, ours = export_and_load("dense", tmp_path)

    def draw(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return ours.generate(tokens(), max_new_tokens=10, num_steps=5, generator=generator, **settings)

    assert torch.equal(draw(0, temperature=1.0), draw(0, temperature=1.0))
    assert not torch.equal(draw(0, temperature=1.0), draw(1, temperature=1.0))
    for only_one in ({"top_k": 1}, {"top_p": 1e-6}):  # the most likely token, in the order of the filtered entropies
        assert torch.equal(draw(0, temperature=1.0, **only_one), draw(1, temperature=1.0, **only_one))
    for count, settings in ((3, {"top_k": 3}), (97, {})):
        drawn = ours._log_probabilities(torch.randn(50, 32), 1.0, settings.get("top_k", 0), 1.0)
        assert int((drawn > -torch.inf).sum(1).max()) == min(count, 96), "the mask token is never predicted"


def test_generate_refuses(tmp_path):
    _, ours = export_and_load("dense", tmp_path)
    right = torch.ones(2, 21)
    right[1, -3:] = 0
    for arguments, message in (
        ({"attention_mask": right, "max_new_tokens": 4}, "pad on the left"),
        ({"num_steps": 0}, "num_steps >= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"num_beams": 4}, "no num_beams"),
        ({"attention_mask": torch.ones(2, 5)}, "batch, sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate(tokens(), **arguments)
    with pytest.raises(ValueError, match="no position predicts"):
        ours.generate(torch.full((1, 4), 96))
