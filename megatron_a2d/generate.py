"""Complete a prompt, or fill a hole, with an exported diffusion language model (formats a2d and rnd1).

    python -m megatron_a2d.generate --model EXPORT --prompt "def mean(values):" --max-new-tokens 64
    python -m megatron_a2d.generate --model EXPORT --prefix $'def mean(values):\n' \
        --suffix $'\n    return total' --hole-length 24

In a terminal the text is shown while it is denoised; anywhere else only the final text is written to stdout.
Texts are read literally: a line break is written $'..\n..' in the shell.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from megatron_a2d.architecture import read_architecture
from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point
from megatron_a2d.errors import UserError
from megatron_a2d.files import read_json
from megatron_a2d.live_view import LiveView

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM

MODEL_TYPES = ("a2d", "rnd1")
DEFAULT_NEW_TOKENS = 64
DEFAULT_HOLE_LENGTH = 24


class Loaded(NamedTuple):
    """An export, ready to sample from."""

    model: A2DForMaskedLM
    tokenizer: Tokenizer


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    _check(options)
    loaded = load(options.model)
    row = _layout(options, loaded)
    num_steps = options.num_steps or loaded.model.config.num_diffusion_steps
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to lose the text
    _generate(options, loaded, row, num_steps)


def load(directory: str | Path) -> Loaded:
    """The model and tokenizer of an export, on the GPU if there is one. UserError for anything else."""
    directory = Path(directory)
    _check_directory(directory)
    model = _load_model(directory)
    return Loaded(model, _load_tokenizer(directory, model.config.vocab_size))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m megatron_a2d.generate", description=(__doc__ or "").partition("\n")[0])
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--model", required=True, metavar="DIR", help="an export of this project")
    text = parser.add_argument_group("what to write (--prompt, or --prefix and --suffix)")
    text.add_argument("--prompt", metavar="TEXT", help="text to continue", **absent)
    text.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens after the prompt (default: {DEFAULT_NEW_TOKENS})",
        **absent,
    )
    text.add_argument("--prefix", metavar="TEXT", help="text before the hole", **absent)
    text.add_argument("--suffix", metavar="TEXT", help="text after the hole", **absent)
    text.add_argument(
        "--hole-length",
        type=int,
        metavar="N",
        help=f"tokens in the hole (default: {DEFAULT_HOLE_LENGTH})",
        **absent,
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--num-steps",
        type=int,
        metavar="N",
        help="denoising steps (default: the model's num_diffusion_steps)",
        **absent,
    )
    how.add_argument("--temperature", type=float, default=0.1, help="0: always the likeliest token")
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all")
    how.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens of mass P")
    how.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    how.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to write")
    how.add_argument("--no-live", action="store_true", help="print the final text only")
    options = parser.parse_args(argv)
    for name in ("prompt", "prefix", "suffix", "max_new_tokens", "hole_length", "num_steps"):
        if not hasattr(options, name):
            setattr(options, name, None)
    return options


def _check(options: argparse.Namespace) -> None:
    """Everything that can be said without the model."""
    problems = []
    if (options.prompt is None) == (options.prefix is None and options.suffix is None):
        problems.append("--prompt, --prefix: give either --prompt, or --prefix and --suffix")
    elif options.prompt is not None:
        if options.hole_length is not None:
            problems.append(f"--hole-length {options.hole_length}: has no effect with --prompt; use --max-new-tokens")
    else:
        if options.prefix is None or options.suffix is None:
            problems.append("--prefix, --suffix: a hole needs both; use --prompt to continue a text")
        if options.max_new_tokens is not None:
            problems.append(
                f"--max-new-tokens {options.max_new_tokens}: has no effect with --prefix; use --hole-length"
            )
    for flag in ("prompt", "prefix", "suffix"):
        if getattr(options, flag) == "":
            problems.append(f"--{flag} '': is empty; give at least one character")
    for flag in ("max-new-tokens", "hole-length", "num-steps", "num-samples"):
        value = getattr(options, flag.replace("-", "_"))
        if value is not None and value < 1:
            problems.append(f"--{flag} {value}: must be at least 1")
    if not options.temperature >= 0:
        problems.append(f"--temperature {options.temperature}: must be 0 or more")
    if options.top_k < 0:
        problems.append(f"--top-k {options.top_k}: must be 0 (no limit) or more")
    if not 0 < options.top_p <= 1:
        problems.append(f"--top-p {options.top_p}: must be above 0 and at most 1 (no limit)")
    if options.num_samples > 1 and options.temperature == 0:
        problems.append(f"--num-samples {options.num_samples}: all would be equal at --temperature 0; raise it")
    if problems:
        raise UserError(problems)


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"--model {directory}: there is no such directory; give one that export_hf wrote")
    if not (directory / "config.json").exists() and (directory / "latest_checkpointed_iteration.txt").exists():
        raise UserError(
            f"--model {directory}: is a training checkpoint; export it first (python -m checkpoints_tools.export_hf)"
        )
    config_path = directory / "config.json"
    model_type = read_json(config_path, "the model's configuration").get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"--model {directory}: model_type {model_type!r} is not one of this project's diffusion models "
            f"({' or '.join(MODEL_TYPES)}); convert it, train it and export it first"
        )
    architecture = read_architecture(directory)
    mask = architecture.mask_token_id
    if not isinstance(mask, int) or not 0 <= mask < architecture.vocab_size:
        raise UserError(
            f"{config_path}: mask_token_id is {mask!r}, not a token of the model (0 to "
            f"{architecture.vocab_size - 1}); write the id that the model was trained with into the file"
        )


def _load_model(directory: Path) -> A2DForMaskedLM:
    import torch
    import transformers
    from safetensors import SafetensorError

    from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
    from megatron_a2d.hf.modeling_rnd import RND1LM
    from megatron_a2d.runtime.device import device, has_cuda

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_rnd1 = read_json(directory / "config.json", "the model's configuration")["model_type"] == "rnd1"
    try:
        loaded: Any = (RND1LM if is_rnd1 else A2DForMaskedLM).from_pretrained(
            directory, dtype="auto" if has_cuda() else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--model {directory}: cannot be loaded ({reason}); export it again") from error
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise UserError(
                f"--model {directory}: {len(report[kind])} {kind.replace('_', ' ')} ({names}, ...); "
                "its weights and config.json do not belong together, export the model again"
            )
    return model.eval().to(device())


def _load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: the tokenizer is missing; copy it from the model that this one comes from")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path}: the tokenizer cannot be read ({error}); copy it again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"{path}: has token id {largest}, and the model has {vocab_size} tokens; take the model's own tokenizer"
        )
    return tokenizer


def _layout(options: argparse.Namespace, loaded: Loaded) -> list[int]:
    """The row to denoise: the given texts' tokens, and a mask for each token to find."""
    config = loaded.model.config

    def encode(flag: str) -> list[int]:
        tokens = loaded.tokenizer.encode(getattr(options, flag), add_special_tokens=False).ids
        if not tokens:
            raise UserError(f"--{flag}: the tokenizer makes no token of this text; give another one")
        if config.mask_token_id in tokens:
            raise UserError(f"--{flag}: contains the mask token; write the text without it")
        return tokens

    if options.prompt is not None:
        row = encode("prompt") + [config.mask_token_id] * (options.max_new_tokens or DEFAULT_NEW_TOKENS)
        remedy = "--prompt or --max-new-tokens"
    else:
        holes = [config.mask_token_id] * (options.hole_length or DEFAULT_HOLE_LENGTH)
        row = encode("prefix") + holes + encode("suffix")
        remedy = "--prefix, --suffix or --hole-length"
    if len(row) > config.max_position_embeddings:
        raise UserError(
            f"{remedy}: {len(row)} tokens in all, and the model has "
            f"{config.max_position_embeddings} positions; shorten it"
        )
    return row


def _generate(options: argparse.Namespace, loaded: Loaded, row: list[int], num_steps: int) -> None:
    from megatron_a2d.diffusion.sampling import denoise, make_canvas

    model, config = loaded.model, loaded.model.config
    canvas = make_canvas([row] * options.num_samples, config.mask_token_id)
    console = Console(highlight=False, markup=False)
    view = LiveView(
        canvas.tokens.tolist(), canvas.editable.tolist(), num_steps,
        lambda ids: loaded.tokenizer.decode(ids, skip_special_tokens=False), console,
    )  # fmt: skip
    live = console.is_terminal and not options.no_live

    def sample(on_step: Any) -> list[list[int]]:
        return denoise(
            lambda tokens_BL: model(tokens_BL).logits,
            canvas.tokens.to(model.device), canvas.editable.to(model.device), config.mask_token_id, num_steps,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            label_shift=config.label_shift, seed=options.seed, on_step=on_step,
        ).tolist()  # fmt: skip

    if live:
        with view:
            rows = sample(lambda step, tokens, decided: view.update(step, tokens.tolist(), decided.tolist()))
    else:
        rows = sample(None)
    for index, tokens in enumerate(rows):
        if len(rows) > 1:
            print(f"=== sample {index + 1} of {len(rows)} ===")
        kept = kept_positions(tokens, canvas.editable[index].tolist(), config.eos_token_id)
        if live:
            console.print(view.text(index, kept, loaded.tokenizer.decode), soft_wrap=True)
        else:
            print(loaded.tokenizer.decode([tokens[position] for position in kept]))


def kept_positions(tokens: list[int], editable: list[bool], eos_token_id: int | list[int] | None) -> list[int]:
    """All positions but those of a hole from its first end-of-text token on."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    kept = []
    has_ended = False
    for position, (token, hole) in enumerate(zip(tokens, editable, strict=True)):
        has_ended = hole and (has_ended or token in ends)
        if not has_ended:
            kept.append(position)
    return kept


if __name__ == "__main__":
    entry_point(main)
