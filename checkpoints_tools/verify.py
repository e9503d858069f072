"""Prove that two forms of a model are the same: all tensors bit by bit, and on request the logits.

    python -m checkpoints_tools.verify --hf Qwen/Qwen3-0.6B --checkpoint checkpoints/qwen3-0.6b
    python -m checkpoints_tools.verify --checkpoint checkpoints/run --export exports/run
    python -m checkpoints_tools.verify --hf Qwen/Qwen3-0.6B --export exports/qwen3-0.6b --logits

Where the second has another type than the first, the first is cast, and must then agree in every bit.
--logits runs both models in fp32 on the CPU; an export that is bidirectional is compared with the
Hugging Face model under a mask that hides nothing. It runs the Python files of the export.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point, human, progress
from megatron_a2d.errors import UserError
from megatron_a2d.files import read_json

if TYPE_CHECKING:
    import torch

    from megatron_a2d.conversion.sources import Weights

# Sums of a few thousand fp32 products in another order differ by about 1e-6 of the largest logit.
RELATIVE_TOLERANCE = 1e-5
NUM_POSITIONS = 64
AUTOREGRESSIVE = ("qwen3", "qwen3_moe")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m checkpoints_tools.verify", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hf", metavar="DIR|HUB_ID", help="the Hugging Face model that was converted")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint or an iteration of one")
    parser.add_argument("--export", type=Path, metavar="DIR", help="a directory that export_hf wrote")
    parser.add_argument("--logits", action="store_true", help="compare the logits of --hf and --export too")
    options = parser.parse_args(argv)
    if sum(given is not None for given in (options.hf, options.checkpoint, options.export)) != 2:
        raise UserError("--hf, --checkpoint, --export: two of them are compared; give exactly two")
    if options.logits and options.checkpoint:
        raise UserError("--logits: needs --hf and --export, models that transformers can run; export the checkpoint")

    from megatron_a2d.conversion.compare import compare_weights
    from megatron_a2d.conversion.hub import find_model
    from megatron_a2d.conversion.sources import open_checkpoint, open_hf

    hf = find_model(options.hf).directory if options.hf else None
    with ExitStack() as stack:
        opened = [stack.enter_context(open_hf(hf))] if hf else []
        opened += [stack.enter_context(open_checkpoint(options.checkpoint))] if options.checkpoint else []
        opened += [stack.enter_context(open_hf(options.export))] if options.export else []
        first, second = opened
        with progress("comparing", first.num_bytes(), "B") as advance:
            result = compare_weights(first, second, advance)
        rounded = (
            f"; types differ, largest rounding {result.largest_rounding:.3g}"
            if first.dtypes() != second.dtypes()
            else ""
        )
        print(f"{result.num_tensors} tensors, {human(result.num_bytes, 'B')}: bitwise equal{rounded}")
        if options.logits:
            compare_logits(first, second)


def compare_logits(hf: Weights, exported: Weights) -> None:
    """Run both models in fp32 on the same random tokens. UserError if a logit differs."""
    import psutil
    import torch

    needed, free = 2 * 4 * hf.architecture.num_parameters(), psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise UserError(
            f"--logits: two models in fp32 take {human(needed, 'B')}, and {human(free, 'B')} of memory "
            "are free; leave --logits out"
        )
    tokens_BL = torch.randint(
        hf.architecture.vocab_size, (2, NUM_POSITIONS), generator=torch.Generator().manual_seed(0)
    )
    bidirectional = any(_model_type(model.directory) not in AUTOREGRESSIVE for model in (hf, exported))
    expected_BLV, actual_BLV = (_logits(model.directory, tokens_BL, bidirectional) for model in (hf, exported))
    largest = float((actual_BLV - expected_BLV).abs().max())
    scale = max(1.0, float(expected_BLV.abs().max()))
    if not largest <= RELATIVE_TOLERANCE * scale:
        raise UserError(
            f"{exported.directory}: its logits differ from those of {hf.directory} by up to {largest:.3g} "
            f"(largest logit {scale:.3g}); the two are not the same model"
        )
    print(
        f"logits of {tokens_BL.numel()} positions in fp32, {'bidirectional' if bidirectional else 'causal'}: "
        f"largest difference {largest:.3g} (largest logit {scale:.3g})"
    )


def _logits(directory: Path, tokens_BL: torch.Tensor, bidirectional: bool) -> torch.Tensor:
    """Logits [batch, length, vocabulary] in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    autoregressive = _model_type(directory) in AUTOREGRESSIVE
    kind = AutoModelForCausalLM if autoregressive else AutoModelForMaskedLM
    model = kind.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=not autoregressive
    ).eval()
    batch, length = tokens_BL.shape
    see_everything = torch.ones(batch, 1, length, length, dtype=torch.bool)
    with torch.no_grad():
        if autoregressive and bidirectional:
            return model(tokens_BL, attention_mask=see_everything).logits
        return model(tokens_BL).logits


def _model_type(directory: Path) -> str:
    return read_json(directory / "config.json", "the model's configuration")["model_type"]


if __name__ == "__main__":
    entry_point(main)
