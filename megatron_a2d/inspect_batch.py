"""Command that shows a batch that training has written (not_finite_iter_*.npz, spike_iter_*.npz): its texts and masks.

    python -m megatron_a2d.inspect_batch RUN/spike_iter_0000120.npz                          # in the order of the batch
    python -m megatron_a2d.inspect_batch RUN/spike_iter_0000120.npz --model RUN --ckpt-step 100   # worst samples first

Masked tokens are shown as the text that they hide, in colour and between ⟦ and ⟧. With --model, a checkpoint or an
exported model, also each sample's loss: its weighted cross-entropy over its maskable tokens, in nats/token.
"""

from __future__ import annotations

import itertools
import math
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from megatron_a2d.checkpoint.directory import HF_FILES, directory_name, is_checkpoint, list_iterations, resolve
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.cli import Parser
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.inference.arguments import check_model, close_model, load_model
from megatron_a2d.terminal.console import PlainConsole, entry_point, hide_noise
from megatron_a2d.utils.atomic_write import regular
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import lines_of, print_line

if TYPE_CHECKING:
    import numpy as np

    from megatron_a2d.data.dataloader import Batch

_MASKED = "bold magenta"


class Sample(NamedTuple):
    """A sample of the batch, for display."""

    sample_index: int  # global
    time: float
    tokens: list[int]  # the text, without masks
    masked: list[bool]
    largest_weight: float
    loss: float | None  # nats/token; None: not computed


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m megatron_a2d.inspect_batch",
        description="Show a batch that a run saved after a loss spike or a non-finite gradient.",
    )
    parser.add_argument("file", type=Path, help="an .npz file that a run has written to its --save directory")
    parser.add_argument("--model", type=Path, help="checkpoint or exported model, for each sample's loss")
    parser.add_argument("--ckpt-step", type=int, help="with --model: the iteration of a run instead of its newest one")
    parser.add_argument("--show", type=int, default=4, metavar="N", help="samples whose text is shown")
    options = parser.parse_args(argv)
    if options.show < 0:
        raise UserError(f"--show {options.show}: must not be negative")
    if options.ckpt_step is not None and not options.model:
        raise UserError("--ckpt-step: has no effect without --model, whose iteration it names; add that")
    _check_file(options.file)
    model = _model_directory(options.file, options.model, options.ckpt_step)
    if options.model:
        check_model(str(model), {})
    hide_noise()
    samples, decode = read_samples(options.file, model, computes_losses=options.model is not None)
    show(samples, decode, options.show, PlainConsole(width=None if sys.stdout.isatty() else 120))


def _check_file(file: Path) -> None:
    """UserError unless `file` is an .npz, before anything is asked about the model."""
    try:
        with open(file, "rb", opener=regular) as stream, zipfile.ZipFile(stream):
            return
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file; give one that a run has written") from None
    except (OSError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not an .npz file"
        raise UserError(f"{file}: cannot be read as a batch ({reason}); give a file that a run has written") from None


def _model_directory(file: Path, model: Path | None, iteration: int | None) -> Path:
    """The model whose tokenizer made the batch: the given one, or the newest checkpoint of the run that wrote it."""
    if model is None:
        if not list_iterations(file.parent):
            raise UserError(f"--model: is missing; {file.parent} holds no checkpoint whose tokenizer could be used")
        return file.parent
    return model / directory_name(iteration) if iteration is not None else model


def read_samples(file: Path, model: Path, computes_losses: bool) -> tuple[list[Sample], Callable[[list[int]], str]]:
    """The samples of the batch, and the tokenizer's decoder. `computes_losses`: load the model itself."""
    from megatron_a2d.inference.loaded_model import load_tokenizer

    hf_files = resolve(model) / HF_FILES if is_checkpoint(model) else model
    model_config = read_model_config(hf_files)
    tokenizer = load_tokenizer(hf_files, model_config.vocab_size)
    batch = read_batch(file, model_config.vocab_size)
    losses: Sequence[float | None] = [None] * len(batch.tokens)
    if computes_losses:
        losses = _losses(batch, str(model))
    mask = -1 if model_config.mask_token_id is None else model_config.mask_token_id
    tokens_BL, masked_BL = original_text(batch, mask)
    samples = [
        Sample(int(index), float(time), tokens, masked, float(weight), loss)
        for index, time, tokens, masked, weight, loss in zip(
            batch.sample_index, batch.times, tokens_BL.tolist(), masked_BL.tolist(), batch.weights.amax(1), losses,
            strict=True,
        )
    ]  # fmt: skip
    return samples, lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def read_batch(file: Path, vocab_size: int) -> Batch:
    """The batch in a file of `data.dataloader.write_batch`; UserError if it holds none of this model's vocabulary."""
    import numpy as np
    import torch

    from megatron_a2d.data.dataloader import Batch

    try:
        with np.load(file, allow_pickle=False) as stored:
            fields = {name: stored[name] for name in Batch._fields if name in stored}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{file}: cannot be read as a batch ({reason}); give a file that a run has written") from None
    if problem := _damage(fields, vocab_size):
        raise UserError(f"{file}: is not a batch of this model ({problem}); give a file that a run has written")
    return Batch(**{name: torch.from_numpy(value) for name, value in fields.items()})


def _damage(fields: dict[str, np.ndarray], vocab_size: int) -> str:
    """What is wrong with a batch's arrays, or ''."""
    two = ("tokens", "labels", "weights")
    one = ("times", "sample_index", "num_maskable")
    if missing := [name for name in (*two, *one) if name not in fields]:
        return f"it has no {', '.join(missing)}"
    shape = fields["tokens"].shape
    if len(shape) != 2 or 0 in shape or any(fields[name].shape != shape for name in two):
        return "tokens, labels and weights have different shapes"
    if any(fields[name].shape != shape[:1] for name in one) or any(len(value) != shape[0] for value in fields.values()):
        return "its arrays have different numbers of samples"
    whole = ("tokens", "labels", "sample_index", "num_maskable")
    if any(fields[name].dtype.kind != ("i" if name in whole else "f") for name in (*two, *one)):
        return "its arrays have the wrong types"
    if any(int(fields[name].min()) < 0 or int(fields[name].max()) >= vocab_size for name in ("tokens", "labels")):
        return f"it has token ids outside the vocabulary of {vocab_size}"
    return ""


def original_text(batch: Batch, mask_token_id: int) -> tuple[Any, Any]:
    """Token ids without masks [b, L] int64, and where they are masked [b, L] bool."""
    tokens_BL, labels_BL = batch.tokens, batch.labels
    if batch.levels is not None:  # block diffusion: the noised copy, then the clean one
        length = tokens_BL.size(1) // 2
        return tokens_BL[:, length:], tokens_BL[:, :length] == mask_token_id
    masked_BL = tokens_BL == mask_token_id
    is_shifted = bool((tokens_BL[:, 1:] == labels_BL[:, :-1])[~masked_BL[:, 1:]].all())
    text_BL = labels_BL.roll(1, dims=1) if is_shifted else labels_BL
    return tokens_BL.where(~masked_BL, text_BL), masked_BL


def _losses(batch: Batch, model: str) -> list[float]:
    """Each sample's weighted cross-entropy over its number of maskable tokens; nan for a sample without loss."""
    from megatron_a2d.evaluation.heldout_nelbo import token_losses

    trained = read_trained(resolve(model) if is_checkpoint(Path(model)) else model).objective
    objective = trained or ("ar" if batch.noise_segments is None else "mdlm")
    if batch.annealing is not None:
        print_line("losses are those under full attention; the batch was trained under an annealed mask", sys.stderr)
    loaded = load_model(model, {}, "ar" if objective == "ar" else "mdlm")
    try:
        found = []
        for number in range(len(batch.tokens)):
            rows = type(batch)._make(None if tensor is None else tensor[number : number + 1] for tensor in batch)
            needed_1L = rows.weights > 0
            losses_N, _ = token_losses(loaded, rows, needed_1L)
            count = int(rows.num_maskable)
            found.append(float((losses_N * rows.weights[needed_1L]).sum()) / count if count else math.nan)
        return found
    finally:
        close_model()


def show(samples: list[Sample], decode: Callable[[list[int]], str], count: int, console: PlainConsole) -> None:
    """Print a line for each sample, those with the highest loss first, and the text of the first `count` ones."""
    if any(sample.loss is not None for sample in samples):  # what is not finite comes first
        samples = sorted(
            samples, key=lambda sample: -(sample.loss or 0) if math.isfinite(sample.loss or 0) else -math.inf
        )
    for number, sample in enumerate(samples):
        loss = "" if sample.loss is None else f"  loss {sample.loss:.4f} nats/token"
        share = sum(sample.masked) / len(sample.masked)
        console.print(
            f"sample {sample.sample_index}  t {sample.time:.4f}  masked {share:.1%}  "
            f"largest weight {sample.largest_weight:.4g}{loss}"
        )
        if number < count:
            console.print(_coloured(sample, decode), soft_wrap=True)


def _coloured(sample: Sample, decode: Callable[[list[int]], str]) -> Text:
    text = Text()
    pairs = zip(sample.tokens, sample.masked, strict=True)
    for is_masked, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        shown = lines_of(decode([token for token, _ in run]))
        text.append(f"⟦{shown}⟧" if is_masked else shown, _MASKED if is_masked else "")
    return text


if __name__ == "__main__":
    entry_point(main)
