"""The report of `verify`: comparison of weights, logits per position, masked cross-entropy by t."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d.checkpoint.directory import HF_FILES
from megatron_a2d.checkpoint.tensor_rows import Remapped
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.conversion.compare_weights import Comparison
from megatron_a2d.conversion.hf_config import AUTO_MAPS
from megatron_a2d.conversion.read_back import ReadBack, ReadRows
from megatron_a2d.conversion.sources import Weights
from megatron_a2d.families.registry import autoregressive_types
from megatron_a2d.hf import CODE_FILES
from megatron_a2d.hf.load_hf_model import diffusion_classes, load
from megatron_a2d.terminal.console import human, progress
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer
from megatron_a2d.verification.fp32_rounding import rounding_tolerance
from megatron_a2d.verification.reference_forward import BlockAttention, StreamedModel, has_bf16_products

NUM_POSITIONS = 64
FEW_POSITIONS = 8  # for a large model
AUTOREGRESSIVE = autoregressive_types()
# transformers loads the complete model; by default only one that adds little to the converters' own memory.
DEFAULT_MAX_BYTES = 200_000_000
_MODULE_BYTES = 16_000  # of transformers' objects for a tensor, which outweigh the values of many narrow experts
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES_PER_TIME = 2


def tensors_line(comparison: Comparison, first: Weights, second: Weights) -> str:
    rounded = (
        f"; types differ, largest rounding {comparison.largest_rounding:.3g}"
        if first.dtypes() != second.dtypes()
        else ""
    )
    return f"{comparison.num_tensors} tensors, {human(comparison.num_bytes, 'B')}: bitwise equal{rounded}"


def report_written(read_back: ReadBack) -> tuple[Comparison, list[str]]:
    """Compare an output with its source; returns also the lines on tensors, logits and losses of `verify`.

    A large output is read once for all three. UserError if a tensor or a logit differs.
    """
    first, second = read_back.reference, read_back.candidate
    pair = _pair(first, second)
    if pair.by_transformers:
        comparison, _ = read_back.compare()
        logits = logits_line(first, second)
        losses = loss_by_time(second, label_shift(second))
    else:
        text = _text(pair)

        def logits_of(weights: Weights) -> Callable[[ReadRows], Any]:
            # The source's rows are those of the output, which `compare` accepts only if all bits are the same.
            return lambda rows: StreamedModel(weights, pair.causal, read_rows=rows, visible=text.visible).logits(
                text.tokens
            )

        comparison, (of_source, of_output, losses) = read_back.compare(
            [logits_of(pair.first), logits_of(second), lambda rows: loss_by_time(second, label_shift(second), rows)]
        )
        logits = _streamed_line(pair, text, of_source, of_output)
    lines = [tensors_line(comparison, first, second), logits]
    return comparison, lines + loss_lines(*losses, second.model_config.vocab_size)


def report_tensors(read_back: ReadBack) -> tuple[Comparison, list[str]]:
    """As `report_written`, without logits: for a source that only our own forward pass can run."""
    second = read_back.candidate
    comparison, (losses,) = read_back.compare([lambda rows: loss_by_time(second, label_shift(second), rows)])
    lines = [tensors_line(comparison, read_back.reference, second)]
    return comparison, lines + loss_lines(*losses, second.model_config.vocab_size)


class _Pair(NamedTuple):
    """Two forms of a model, and how their logits are compared."""

    first: Weights  # rounded to the dtypes of the second
    second: Weights
    causal: bool
    by_transformers: bool  # one of the two; else both are streamed
    rounded_to: torch.dtype | None
    reason: str  # why transformers does not run it

    @property
    def hugging_face(self) -> Weights:
        return self.second if is_hugging_face(self.second) else self.first

    @property
    def other(self) -> Weights:
        return self.first if is_hugging_face(self.second) else self.second


def _pair(first: Weights, second: Weights, asked: bool = False) -> _Pair:
    """UserError if transformers is requested (`asked`) and the model does not fit into memory."""
    import psutil

    kinds = {name: second.tensors.dtype(name) for name in first.tensors.shapes}
    rounds = any(first.tensors.dtype(name) != kind for name, kind in kinds.items())
    first = first._replace(tensors=Remapped(first.tensors, first.tensors.shapes, kinds, lambda span: [span]))
    needed, free = 4 * second.model_config.num_parameters(), psutil.virtual_memory().available
    if asked and needed > 0.8 * free:
        raise UserError(
            f"--logits: the model in fp32 takes {human(needed, 'B')}, and {human(free, 'B')} of memory "
            "are free; remove --logits"
        )
    is_mixed = rounds and len(set(kinds.values())) > 1
    hf = second if is_hugging_face(second) else first
    has_class = model_type(hf.directory) in (*AUTOREGRESSIVE, *AUTO_MAPS)
    reason = f"transformers would take {human(needed, 'B')}: verify --logits runs it"
    if is_mixed or not has_class:
        reason = "types are mixed" if is_mixed else "transformers has no class for it"
    causal = all(model_type(_configuration(weights)) in AUTOREGRESSIVE for weights in (first, second))
    is_small = needed + _MODULE_BYTES * len(kinds) <= DEFAULT_MAX_BYTES
    by_transformers = (asked or is_small) and not is_mixed and has_class
    return _Pair(first, second, causal, by_transformers, next(iter(kinds.values())) if rounds else None, reason)


def logits_line(first: Weights, second: Weights, asked: bool = False) -> str:
    """Compare fp32 logits of two forms of a model on random tokens; at least one is an HF directory.

    That one is run by transformers if the model is small or `asked` is set, the other is streamed; for a large model
    both are streamed, at a few positions. If dtypes differ, the first is rounded to those of the second. UserError if
    a logit differs, or if `asked` is set and the model does not fit into memory.
    """
    pair = _pair(first, second, asked)
    if not pair.by_transformers:
        text = _text(pair)
        sides = [_stream(weights, pair.causal, text)[1] for weights in (pair.first, pair.second)]
        return _streamed_line(pair, text, *sides)
    hf, other, text = pair.hugging_face.directory, pair.other, _text(pair)
    expected_BLV = transformers_logits(hf, text.tokens, bidirectional=not pair.causal, rounded_to=pair.rounded_to)
    line = _compared(pair, text, expected_BLV, *_stream(other, pair.causal, text))
    if model_type(hf) in AUTOREGRESSIVE or carries_our_code(hf):
        return line
    return f"{line}; run by our own classes: the directory's Python files or auto_map are not ours and were not run"


def _streamed_line(pair: _Pair, text: _Text, of_first_BLV: torch.Tensor, of_second_BLV: torch.Tensor) -> str:
    sides = of_first_BLV, of_second_BLV
    expected_BLV, actual_BLV = sides[::-1] if pair.hugging_face is pair.second else sides
    return f"{_compared(pair, text, expected_BLV, None, actual_BLV)}; both streamed, {pair.reason}"


def _compared(
    pair: _Pair,
    text: _Text,
    expected_BLV: torch.Tensor,
    streamed: StreamedModel | None,
    actual_BLV: torch.Tensor,
) -> str:
    """A line on logits of `pair.hugging_face`, and of `pair.other` by `streamed`."""
    other, exact_BLV, tolerance = pair.other, actual_BLV, 0.0
    if not torch.equal(expected_BLV, actual_BLV):
        if streamed is None:
            streamed, exact_BLV = _stream(other, pair.causal, text)
        with progress(f"rounding of {other.directory.name}", other.num_bytes(), "B") as advance:
            tolerance = rounding_tolerance(other, text.tokens, streamed, exact_BLV, advance)
    mask = "causal" if pair.causal else "bidirectional" if text.visible is None else "block-causal"
    compared = compare_logits(expected_BLV, actual_BLV, pair.hugging_face.directory, other.directory, tolerance)
    return f"{mask} {compared}"


def _stream(weights: Weights, causal: bool, text: _Text) -> tuple[StreamedModel, torch.Tensor]:
    with progress(f"logits of {weights.directory.name}", weights.num_bytes(), "B") as advance:
        model = StreamedModel(weights, causal, advance, visible=text.visible)
        return model, model.logits(text.tokens)


class _Text(NamedTuple):
    """The tokens on which logits are compared."""

    tokens: torch.Tensor  # [B, L]
    visible: torch.Tensor | None = None  # [L, L], who attends to whom, of a model in blocks


def _text(pair: _Pair) -> _Text:
    """Random tokens; half of the last block of a model in blocks is masked."""
    tokens_BL = random_tokens(pair.second.model_config.vocab_size)
    if not pair.by_transformers:
        tokens_BL = tokens_BL[:1, :FEW_POSITIONS]
    directory = pair.hugging_face.directory
    trained = read_trained(directory)
    if not trained.block_length or model_type(directory) in AUTOREGRESSIVE:
        return _Text(tokens_BL)
    mask, length = int(pair.hugging_face.model_config.mask_token_id or 0), tokens_BL.shape[1]
    begin = (length - 1) // trained.block_length * trained.block_length
    tokens_BL = tokens_BL.masked_fill(tokens_BL == mask, mask - 1 if mask else 1)
    tokens_BL[:, (begin + length) // 2 :] = mask
    attention = BlockAttention.of(length, trained.block_length, trained.ar_loss_weight > 0)
    return _Text(tokens_BL, attention.while_sampling(begin))


def compare_logits(
    expected_BLV: torch.Tensor,
    actual_BLV: torch.Tensor,
    expected_in: Path,
    actual_in: Path,
    tolerance: float,
) -> str:
    """A line on the differences per position; UserError if one exceeds `tolerance`."""
    if not (expected_BLV.isfinite().all() or actual_BLV.isfinite().all()):
        return "logits: not finite on either side, there is nothing to compare"
    per_position = (actual_BLV - expected_BLV).abs().amax(-1).amax(0)
    scale = float(expected_BLV.abs().max())
    largest, position = float(per_position.max()), int(per_position.argmax())
    if not largest <= tolerance:
        bad = int((~(per_position <= tolerance)).sum())
        raise UserError(
            f"{actual_in}: its logits differ from those of {expected_in} by up to {largest:.3g} (largest logit "
            f"{scale:.3g}; rounding in fp32 explains {tolerance:.1g}), at {bad} of {len(per_position)} positions; the "
            "two are not the same model"
        )
    return (
        f"logits of {actual_BLV.shape[0]} x {len(per_position)} positions in fp32: largest difference {largest:.3g}, "
        f"at position {position}; median over positions {float(per_position.median()):.3g} (largest logit {scale:.3g})"
    )


def random_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, NUM_POSITIONS), generator=torch.Generator().manual_seed(0))


def transformers_logits(
    directory: Path, tokens_BL: torch.Tensor, bidirectional: bool, rounded_to: torch.dtype | None = None
) -> torch.Tensor:
    """Logits [B, L, V] in fp32, with the weights unchanged or `rounded_to` another dtype.

    Python files of the directory are run only if they equal ours byte for byte; otherwise our own classes are used.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    autoregressive = model_type(directory) in AUTOREGRESSIVE
    ours = not autoregressive and carries_our_code(directory)
    if autoregressive:
        kind: Any = AutoModelForCausalLM
    elif ours:
        is_causal_lm = "AutoModelForCausalLM" in AUTO_MAPS[model_type(directory)]
        kind = AutoModelForCausalLM if is_causal_lm else AutoModelForMaskedLM
    else:
        kind = diffusion_classes()[model_type(directory)]
    model = load(kind, directory, dtype=torch.float32, trust_remote_code=ours).eval()
    if rounded_to is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(rounded_to).float()
    batch, length = tokens_BL.shape
    full_attention = torch.ones(batch, 1, length, length, dtype=torch.bool)
    with torch.no_grad():
        if autoregressive and bidirectional:
            return model(tokens_BL, attention_mask=full_attention).logits
        return model(tokens_BL).logits


def carries_our_code(directory: Path) -> bool:
    """Whether the Python files of an export are exactly those that this version writes, and auto_map lists no others.

    `auto_map` can name code of another repository on the hub, and a file next to ours could be imported: any
    difference means that none of it is run.
    """
    kind = model_type(directory)
    files = {file.name: file.read_bytes() for file in CODE_FILES.get(kind, [])}
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*.py")}
    return (
        bool(files)
        and read_json(directory / "config.json", "the model's configuration").get("auto_map") == AUTO_MAPS[kind]
        and found.keys() == files.keys()
        and all(path.is_file() and path.stat().st_size == len(files[name]) for name, path in found.items())
        and all(path.read_bytes() == files[name] for name, path in found.items())
    )


class LossAtTime(NamedTuple):
    time: float
    num_masked: int
    loss: float  # nats per masked token


def loss_by_time(
    weights: Weights, label_shift: bool = True, read_rows: ReadRows | None = None
) -> tuple[str, list[LossAtTime]]:
    """(name of the text, cross-entropy of masked tokens at each t); [] for a model without a mask token.

    The text is the same at every t, and masks are nested: a token masked at one t is masked at any larger one. Each
    block of a model trained in blocks sees the earlier ones unmasked, as in training. Products with bf16 matrices are
    in bf16 where the processor has them: much faster, and two digits are shown. `read_rows`: as in StreamedModel.
    """
    mask = weights.model_config.mask_token_id
    text, tokens_RL = _sample_text(weights, SAMPLES_PER_TIME)
    if mask is None:
        return text, []
    draws_RL = torch.rand(tokens_RL.shape, generator=torch.Generator().manual_seed(1))
    draws_RL[:, 0] = 1.0  # nothing predicts the first token
    masked_BL = torch.cat([draws_RL < time for time in TIMES])
    tokens_BL = tokens_RL.repeat(len(TIMES), 1)
    noised_BL = tokens_BL.masked_fill(masked_BL, mask)
    rows, positions = masked_BL.nonzero(as_tuple=True)
    outputs, trained = positions - int(label_shift), read_trained(weights.directory)
    show = nullcontext(lambda amount: None) if read_rows else progress("loss by time", weights.num_bytes(), "B")
    with show as advance:
        model = StreamedModel(weights, advance=advance, read_rows=read_rows, in_bf16=has_bf16_products())
        if block := trained.block_length:
            length = tokens_BL.shape[1]
            attention = BlockAttention.of(length, block, trained.ar_loss_weight > 0)
            model.visible, model.positions = attention.while_training(), torch.arange(length).repeat(2)
            noised_BL = torch.cat([noised_BL, tokens_BL], dim=1)
            # Under the label shift a block's first token is predicted by the clean copy of the one before it.
            outputs += length * (outputs // block < positions // block)
        hidden_BLD = model.hidden(noised_BL)
        losses_N = model.cross_entropy(hidden_BLD[rows, outputs], tokens_BL[rows, positions])
    result = []
    for index, time in enumerate(TIMES):
        here = rows // SAMPLES_PER_TIME == index
        result.append(LossAtTime(time, int(here.sum()), float(losses_N[here].mean())))
    return text, result


def loss_lines(text: str, losses: list[LossAtTime], vocab_size: int) -> list[str]:
    """The losses by t as lines of the report, with ln(vocabulary size) for comparison."""
    if not losses:
        return ["masked cross-entropy: not measured, because the model has no mask token"]
    columns = "  ".join(f"{item.loss:.2f} at t={item.time} ({item.num_masked})" for item in losses)
    return [
        f"masked cross-entropy in nats (tokens), {text}: {columns}",
        f"ln(vocabulary size) is {math.log(vocab_size):.2f}: "
        + (
            "no model can do better on random tokens"
            if "random" in text
            else "before conversion training a loss near it is normal at high t only"
        ),
    ]


def model_type(directory: Path) -> str:
    return read_json(directory / "config.json", "the model's configuration")["model_type"]


def is_hugging_face(weights: Weights) -> bool:
    return not (weights.directory / HF_FILES).is_dir()


def label_shift(weights: Weights) -> bool:
    """Whether position i - 1 predicts token i, as recorded by the run or export; true for autoregressive models."""
    return read_trained(weights.directory).label_shift


def _configuration(weights: Weights) -> Path:
    """The directory of the config.json of a checkpoint or HF directory."""
    return weights.directory if is_hugging_face(weights) else weights.directory / HF_FILES


def _sample_text(weights: Weights, num_samples: int) -> tuple[str, torch.Tensor]:
    """(name, tokens [num_samples, NUM_POSITIONS]): text of the manual that comes with Python, or random tokens."""
    vocab_size = weights.model_config.vocab_size
    path = _configuration(weights) / "tokenizer.json"
    if path.exists():
        from pydoc_data.topics import topics

        text = " ".join(re.sub(r"\s+", " ", topics[name]) for name in ("debugger", "formatstrings", "typesmapping"))
        ids = [i for i in read_tokenizer(path, str(path)).encode(text[:20_000]).ids if i < vocab_size]
        if len(ids) >= num_samples * NUM_POSITIONS:
            ids = ids[: num_samples * NUM_POSITIONS]
            return "text of Python's manual", torch.tensor(ids).view(num_samples, NUM_POSITIONS)
    return "random tokens", random_tokens(vocab_size).repeat(num_samples, 1)[:num_samples]
