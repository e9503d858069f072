"""Training and validation samples: corruption, documents and positions of a sample, chosen by the run's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from megatron_a2d.config.block_schedule import block_length_at
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import MakeSample, Samples
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.diffusion.attention_masks import annealing_key_and_threshold
from megatron_a2d.diffusion.block_diffusion import corrupt_blocks
from megatron_a2d.diffusion.corruption import Corrupted, corrupt, next_token, without_loss
from megatron_a2d.diffusion.rng import Noise, random_cut
from megatron_a2d.utils.errors import UserError


class Documents(Protocol):
    """A dataset with document boundaries."""

    def documents(self, sample_index: int, /) -> np.ndarray: ...

    def eod_token_id(self) -> int | None: ...


class Texts(Samples, Documents, Protocol):
    """A dataset of texts with document boundaries."""


class TextPairs:
    """Every text of `texts` twice: `Noise.complementary` gives the second one the first one's complement as a mask."""

    def __init__(self, texts: Texts):
        self._texts = texts

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return self._texts.tokens(sample_index // 2)

    def documents(self, sample_index: int, /) -> np.ndarray:
        return self._texts.documents(sample_index // 2)

    def eod_token_id(self) -> int | None:
        return self._texts.eod_token_id()


def make_sample(
    config: RunConfig, model_config: ModelConfig, dataset: Documents, noise_seed: int, for_training: bool = False
) -> MakeSample:
    """The function that turns a sample's tokens into the objective's inputs, labels and weights.

    `for_training` applies --random-length-prob, --mask-sampling, --complementary-masks, --loss-weighting,
    --ar-loss-weight, the schedule of block lengths and --conversion. Validation does not split samples, uses the
    weights of the likelihood bound, and the converted model's attention.
    """
    data, diffusion = config.data, config.diffusion
    isolated = data.reset_attention_mask
    has_documents = isolated or data.reset_position_ids or diffusion.reset_block_grid
    visible = _end_of_document(dataset) if data.eod_mask_loss else None
    cut_probability = data.random_length_prob if for_training else 0.0
    noise = None
    if diffusion.objective != "ar":
        assert model_config.mask_token_id is not None
        noise = Noise(
            seed=noise_seed,
            mask_token_id=model_config.mask_token_id,
            schedule=diffusion.noise_schedule,
            timestep_sampling=diffusion.timestep_sampling,
            min_timestep=diffusion.min_timestep,
            label_shift=diffusion.label_shift,
            # Validation always masks as the likelihood bound requires, so that runs can be compared.
            mask_sampling=diffusion.mask_sampling if for_training else "bernoulli",
            loss_weighting=diffusion.loss_weighting if for_training else "mdlm",
            cart_p=diffusion.cart_p,
            complementary=diffusion.complementary_masks and for_training,
        )

    skipped = config.skipped
    grafting_iters = config.grafting_iters if for_training else 0
    is_annealed = for_training and diffusion.conversion == "annealing"

    def iteration_of(index: int) -> int:
        """The iteration that trains on the sample: fixed on resume, as the order of the samples is."""
        return config.batch_sizes.iteration_of(skipped.place_of(index))

    def make(tokens: np.ndarray, index: int) -> Corrupted:
        documents = dataset.documents(index) if has_documents else None
        # Of one text's two samples the same, or their masks would not be complements.
        cut_index = index - index % 2 if for_training and diffusion.complementary_masks else index
        cut = random_cut(noise_seed, cut_index, len(tokens), cut_probability) if cut_probability else None
        segments = attention_segments(documents if isolated else None, cut, len(tokens))
        if noise is None:
            sample = next_token(tokens, segments, visible)
        elif grafting_iters and iteration_of(index) < grafting_iters:
            sample = without_loss(tokens, segments)
        elif diffusion.objective == "block":
            length = diffusion.block_length
            if for_training:
                length = _block_length(config, index, iteration_of(index))
            grid = positions_within(attention_segments(documents, cut, len(tokens)))
            sample = corrupt_blocks(
                tokens, index, noise, length, segments, visible,
                causal_context=diffusion.ar_loss_weight > 0,
                ar_loss_weight=diffusion.ar_loss_weight if for_training else 0.0,
                grid_positions_L=grid if diffusion.reset_block_grid else None,
            )  # fmt: skip
        else:
            sample = corrupt(tokens, index, noise, segments, visible)
        if data.reset_position_ids:
            positions = positions_within(attention_segments(documents, cut, len(tokens)))
            repeats = config.input_length // data.seq_length
            sample = sample._replace(positions=None if positions is None else np.tile(positions, repeats))
        if is_annealed:
            place, count = index, diffusion.attention_annealing_samples
            if not count:
                place, count = iteration_of(index), diffusion.attention_annealing_iters
            sample = sample._replace(annealing=annealing_key_and_threshold(noise_seed, index, place, count))
        return sample

    return make


def _block_length(config: RunConfig, index: int, iteration: int) -> int:
    """Tokens per block of a training sample, the same for both samples of a text with complementary masks."""
    diffusion = config.diffusion
    place, schedule = index, diffusion.block_length_schedule_samples
    if schedule and diffusion.complementary_masks:
        place -= index % 2
    elif not schedule:
        place, schedule = iteration, diffusion.block_length_schedule
    return block_length_at(place, schedule, diffusion.block_length)


def find_data_problems(config: RunConfig, files: Sequence[TokenFile]) -> Iterator[str]:
    """Problems of settings that need document boundaries or end-of-document tokens which the data lacks."""
    data = config.data
    flags = {
        "--reset-attention-mask": data.reset_attention_mask,
        "--reset-position-ids": data.reset_position_ids,
        "--eod-mask-loss": data.eod_mask_loss,
        "--reset-block-grid": config.diffusion.reset_block_grid,
    }
    if not (wanted := [name for name, is_set in flags.items() if is_set]):
        return
    one_document = [file for file in files if file.num_documents == 1 and not file.ends_documents()]
    no_end = [file for file in files if not file.ends_documents()] if data.eod_mask_loss else []
    for file in dict.fromkeys([*one_document, *no_end]):
        if file.is_described and file.eod_token_id is not None and len(files) > 1:
            continue  # a single-document source among others
        known = (
            "no end-of-document token is known for it"
            if file.eod_token_id is None
            else (f"it holds no end-of-document token {file.eod_token_id}")
        )
        reason = f"its index has one document and {known}" if file in one_document else known
        yield (
            f"{' and '.join(wanted)}: without effect on {file.prefix}: {reason}; tokenise with --append-eod, or "
            "leave the setting out"
        )


def attention_segments(documents_L: np.ndarray | None, cut: int | None, length: int) -> np.ndarray | None:
    """[L] int64, equal numbers for tokens that attend to one another: documents, split at `cut`; None: all do."""
    if cut is None:
        return documents_L
    after = (np.arange(length) >= cut).astype(np.int64)
    return after if documents_L is None else 2 * documents_L + after


def positions_within(segments_L: np.ndarray | None) -> np.ndarray | None:
    """Positions counted from 0 in each segment, [L] int64; None without segments."""
    if segments_L is None:
        return None
    index = np.arange(len(segments_L))
    begins = np.append(True, segments_L[1:] != segments_L[:-1])
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def _end_of_document(dataset: Documents) -> int:
    token = dataset.eod_token_id()
    if token is None:
        raise UserError(
            "--eod-mask-loss: the tokens' description (PREFIX.json) has no end-of-document token; tokenise with "
            "--append-eod, or leave the flag out"
        )
    return token
