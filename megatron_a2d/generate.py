"""Command for generation with a diffusion language model: completion and infilling.

    python -m megatron_a2d.generate --model EXPORT --prompt "def mean(values):" --max-new-tokens 64
    python -m megatron_a2d.generate --model EXPORT --prefix $'def mean(values):\n' \
        --suffix $'\n    return total' --hole-length 24
    python -m megatron_a2d.generate --model EXPORT --infill 'a = <|hole:4|>; b = <|hole:4|>; print(a + b)'
    ... | python -m megatron_a2d.generate --model EXPORT --input - --jsonl > texts.jsonl
    torchrun --nproc-per-node 2 -m megatron_a2d.generate --model CHECKPOINT --expert-model-parallel-size 2 --prompt ...

MODEL is an exported diffusion model, or a training checkpoint, loaded in parallel over the processes of torchrun. A
terminal shows the text while it is denoised; otherwise only the final text is written to stdout. Texts are taken
literally: in the shell write a line break as $'..\n..'.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

from megatron_a2d.config.cli import Parser, add_settings, given_settings
from megatron_a2d.config.settings import flag
from megatron_a2d.diffusion.sampling_options import SamplingOptions, SamplingOptionsError
from megatron_a2d.inference.arguments import (
    LAYOUT,
    LAYOUT_HELP,
    SAMPLING,
    add_sampling_flags,
    check_model,
    close_model,
    load_model,
    sampling_options,
)
from megatron_a2d.inference.prompts import Prompt, completion, infill, read_jsonl, to_row
from megatron_a2d.terminal.console import PlainConsole, entry_point, hide_noise, human
from megatron_a2d.terminal.live_view import LiveView
from megatron_a2d.utils.atomic_write import is_shell_pipe, new_file, regular, write_problems
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line, print_text

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_a2d.diffusion.sampling import OnStep
    from megatron_a2d.inference.loaded_model import LoadedModel

DEFAULT_NEW_TOKENS = 64
DEFAULT_HOLE_LENGTH = 24
MOST_SAMPLES = 1_048_576  # per prompt
_Job = TypeVar("_Job")


def main(argv: list[str] | None = None) -> None:
    options = _parse(argv)
    values = _check(options)
    check_model(options.model, values)
    hide_noise()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # do not fail on a terminal without UTF-8
    loaded = load_model(options.model, values)
    try:
        sampling = sampling_options(options, loaded)
        results = _generate(options, loaded, sampling, _prompts(options, loaded))
        _write(options, loaded, results)
    finally:
        close_model()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m megatron_a2d.generate", description="Continue or infill text with a model.")
    absent: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="an exported model (export_hf), or a training checkpoint"
    )
    text = parser.add_argument_group("input (one of --prompt, --prefix with --suffix, --infill, --input)")
    text.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; may be repeated", **absent)
    whole: dict[str, Any] = {"type": int, "metavar": "N", **absent}
    text.add_argument("--max-new-tokens", help=f"tokens after the prompt (default: {DEFAULT_NEW_TOKENS})", **whole)
    text.add_argument("--prefix", metavar="TEXT", help="text before the hole", **absent)
    text.add_argument("--suffix", metavar="TEXT", help="text after the hole", **absent)
    text.add_argument("--hole-length", help=f"tokens in the hole (default: {DEFAULT_HOLE_LENGTH})", **whole)
    text.add_argument("--infill", metavar="TEXT", help="text with holes, each written <|hole:N|>", **absent)
    text.add_argument(
        "--input",
        metavar="FILE",
        help="file with one prompt, or with --jsonl one per line; -: standard input",
        **absent,
    )
    text.add_argument("--jsonl", action="store_true", help="one JSON object per line, in input and output")
    how = parser.add_argument_group("sampling")
    add_sampling_flags(how)
    how.add_argument("--seed", type=int, default=0, help="the same seed gives the same text at any batch size")
    how.add_argument("--num-samples", type=int, default=1, metavar="N", help="samples per prompt")
    how.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples that are denoised together")
    reserved = "fix the last new token to this one, as in the public RND1 package"
    how.add_argument("--reserve-last", choices=("pad", "eos"), help=reserved, **absent)
    output = parser.add_argument_group("output")
    output.add_argument("--no-live", action="store_true", help="print the final text only")
    output.add_argument("--stats", action="store_true", help="report tokens per forward pass and tokens/s on stderr")
    output.add_argument("--save-html", metavar="FILE", help="HTML page that replays the denoising", **absent)
    add_settings(parser, LAYOUT, LAYOUT_HELP)
    options = parser.parse_args(argv)
    names = ("prompt", "prefix", "suffix", "infill", "input", "max_new_tokens", "hole_length")
    for name in (*names, "reserve_last", "save_html"):
        setattr(options, name, getattr(options, name, None))
    return options


def _check(options: argparse.Namespace) -> dict[str, Any]:
    """Check all that needs no model; returns the layout's settings."""
    problems: list[str] = []
    kinds = [name for name in ("prompt", "prefix", "infill", "input") if getattr(options, name) is not None]
    if options.suffix is not None and options.prefix is None:
        kinds.append("prefix")
    if len(kinds) != 1:
        problems.append("--prompt, --prefix, --infill, --input: give exactly one, --prefix with --suffix")
    elif (options.prefix is None) != (options.suffix is None):
        problems.append("--prefix, --suffix: a hole needs both; use --prompt to continue a text")
    for name, users, instead in (
        ("max_new_tokens", ("prompt", "input"), "--hole-length"),
        ("hole_length", ("prefix", "input"), "--max-new-tokens"),
    ):
        value = getattr(options, name)
        if value is not None and len(kinds) == 1 and kinds[0] not in users:
            problems.append(f"{flag(name)} {value}: has no effect with --{kinds[0]}; use {instead}")
    if options.jsonl and options.input is None:
        problems.append("--jsonl: has no effect without --input; name a file, or - for a pipe")
    if options.hole_length is not None and options.input is not None and not options.jsonl:
        problems.append(f"--hole-length {options.hole_length}: has no effect without --jsonl; use --max-new-tokens")
    for name in ("prompt", "prefix", "suffix", "infill"):
        given = getattr(options, name)
        if "" in (given if isinstance(given, list) else [given]):
            problems.append(f"--{name} '': is empty; give at least one character")
    if options.infill:
        try:
            infill(options.infill, "--infill")
        except UserError as error:
            problems += error.problems
    if options.input is not None:
        problems += _input_problems(options.input)
    for name in ("max_new_tokens", "hole_length", "num_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"{flag(name)} {value}: must be at least 1")
    if options.num_samples > MOST_SAMPLES:
        problems.append(f"--num-samples {options.num_samples}: must be at most {MOST_SAMPLES:,}")
    if options.save_html is not None:
        if Path(options.save_html).is_dir():
            problems.append(f"--save-html {options.save_html}: is a directory; name a file")
        problems += write_problems(Path(options.save_html).parent, f"--save-html {options.save_html}")
    if options.seed < 0:
        problems.append(f"--seed {options.seed}: must not be negative")
    given = {name: getattr(options, name) for name in SAMPLING if hasattr(options, name)}
    if options.num_samples > 1 and (given.get("temperature") == 0 or given.get("greedy")):
        problems.append(f"--num-samples {options.num_samples}: all would be equal; raise --temperature")
    try:
        SamplingOptions(**{"block_length": 1} | given)  # a block diffusion model has its own, known once it is loaded
    except SamplingOptionsError as error:
        problems += error.lines(flag)
    values = given_settings(options, LAYOUT, problems)
    if problems:
        raise UserError(problems)
    return values


def _input_problems(path: str) -> list[str]:
    """Why the file of prompts cannot be read: one line, or none. A pipe shows it only when it is read."""
    if path == "-" or is_shell_pipe(path):
        return []
    try:
        _open(path).close()
    except OSError as error:
        return [f"--input {path}: cannot be read ({error.strerror}); name a file, or - for a pipe"]
    return []


def _pipe(loaded: LoadedModel) -> io.TextIOBase:
    """Stdin; under torchrun rank 0 reads it and broadcasts it to the other ranks."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # as a file is opened
    if "torch.distributed" not in sys.modules:
        return sys.stdin  # type: ignore[return-value]
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sys.stdin  # type: ignore[return-value]
    box = [sys.stdin.buffer.read() if loaded.is_output_rank else None]
    dist.broadcast_object_list(box, src=0)
    return io.TextIOWrapper(io.BytesIO(box[0] or b""), encoding="utf-8", errors="surrogateescape")


def _prompts(options: argparse.Namespace, loaded: LoadedModel) -> Iterator[Prompt]:
    new_tokens = options.max_new_tokens or DEFAULT_NEW_TOKENS
    hole_length = options.hole_length or DEFAULT_HOLE_LENGTH
    if options.prompt is not None:
        yield from (completion(text, new_tokens, "--prompt") for text in options.prompt)
    elif options.infill is not None:
        yield infill(options.infill, "--infill")
    elif options.prefix is not None:
        yield Prompt((options.prefix, hole_length, options.suffix), "--prefix, --suffix")
    else:
        name = "--input (pipe)" if options.input == "-" else f"--input {options.input}"
        try:
            with nullcontext(_pipe(loaded)) if options.input == "-" else _open(options.input) as stream:
                if options.jsonl:
                    yield from read_jsonl(_lines(stream, name), name, new_tokens, hole_length)
                elif text := "".join(_lines(stream, name)):
                    yield completion(text, new_tokens, name)
                else:
                    raise UserError(f"{name}: is empty; give at least one character")
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}); check the path") from None


def _open(path: str) -> IO[str]:
    """A file of prompts, or a shell's pipe (`<(command)`); another pipe would be waited for, a device has no end."""
    opener = None if is_shell_pipe(path) else regular
    return open(path, encoding="utf-8", errors="surrogateescape", opener=opener)


def _lines(stream: Iterable[str], name: str) -> Iterator[str]:
    """The lines of a stream that was opened with surrogateescape; UserError at the first byte that is not UTF-8.

    A strict stream would fail while it reads ahead, before the good lines are given, and not know the byte's place.
    """
    for number, line in enumerate(stream, start=1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = len(line[: error.start].encode())
            raise UserError(f"{name} line {number}: is not UTF-8 (byte {byte}); save it as UTF-8") from None
        yield line


class Result(NamedTuple):
    """A generated text."""

    prompt: Prompt
    sample: int
    text: str
    num_tokens: int  # generated, as shown
    num_forwards: int
    replay: list[list[Any]]


def _generate(
    options: argparse.Namespace, loaded: LoadedModel, sampling: SamplingOptions, prompts: Iterator[Prompt]
) -> Iterator[Result]:
    """Denoise in batches, in the order of the input. A sample's seed depends only on its number in the input."""
    from megatron_a2d.diffusion.sampling import denoise, kept_positions, make_canvas, most_forward_passes, row_seed

    reserve = None
    if options.reserve_last == "eos" and not loaded.end_token_ids:
        raise UserError("--reserve-last eos: no file of the model lists an end-of-text token; give pad")
    if options.reserve_last:
        reserve = loaded.end_token_ids[0] if options.reserve_last == "eos" else loaded.pad_token_id
    jobs = (
        (prompt, sample, _row(prompt, loaded, sampling, reserve))
        for prompt in prompts
        for sample in range(options.num_samples)
    )
    numbered = enumerate(jobs)
    console = PlainConsole()
    shows = console.is_terminal and not options.no_live and not options.jsonl and loaded.is_output_rank
    for batch in _batches(numbered, options.batch_size):
        canvas = make_canvas([row for _, (_, _, row) in batch], loaded.mask_token_id)
        editable = canvas.editable.tolist()
        view = LiveView(
            canvas.tokens.tolist(), editable, most_forward_passes(canvas.editable, sampling),
            lambda ids: loaded.tokenizer.decode(ids, skip_special_tokens=False), console,
        )  # fmt: skip
        with view if shows else nullcontext():
            sampled = denoise(
                loaded.forward, canvas.to(loaded.device), loaded.mask_token_id, sampling,
                label_shift=loaded.label_shift, end_token_ids=loaded.end_token_ids,
                seed=[row_seed(options.seed, number) for number, _ in batch],
                on_step=_recorder(view, shows),
            )  # fmt: skip
        for index, (_, (prompt, sample, row)) in enumerate(batch):
            tokens = sampled.tokens[index].tolist()[: len(row)]
            kept = kept_positions(tokens, editable[index][: len(row)], set(loaded.end_token_ids))
            if shows:
                if len(batch) > 1:
                    console.print(f"=== {prompt.where}, sample {sample + 1} ===")
                console.print(view.text(index, kept, loaded.decode), soft_wrap=True)
            yield Result(
                prompt, sample, loaded.decode([tokens[position] for position in kept]),
                sum(editable[index][position] for position in kept), sampled.num_forwards[index],
                _replay(view, index, kept, loaded) if options.save_html else [],
            )  # fmt: skip


def _row(prompt: Prompt, loaded: LoadedModel, sampling: SamplingOptions, reserve: int | None) -> list[int]:
    """The tokens to denoise. UserError if the sampler cannot fill their holes."""
    row = to_row(prompt, loaded, reserve)
    ends_in_hole = reserve is None and [isinstance(part, int) for part in prompt.parts] == [False, True]
    if sampling.sampler == "self_speculative" and not ends_in_hole:
        raise UserError(
            f"{prompt.where}: --sampler self_speculative writes from left to right, so it continues texts and fills no "
            "other holes (nor those of --reserve-last); give a prompt, or choose another sampler"
        )
    return row


def _batches(jobs: Iterable[_Job], size: int) -> Iterator[list[_Job]]:
    """Batches of `size`. After a bad line the incomplete batch before it is still yielded."""
    batch: list[_Job] = []
    try:
        for job in jobs:
            batch.append(job)
            if len(batch) == size:
                yield batch
                batch = []
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _recorder(view: LiveView, shows: bool) -> OnStep:
    def on_step(step: int, tokens_BL: Tensor, decided_BL: Tensor) -> None:
        (view.update if shows else view.record)(step, tokens_BL.tolist(), decided_BL.tolist())

    return on_step


def _replay(view: LiveView, index: int, kept: list[int], loaded: LoadedModel) -> list[list[Any]]:
    from megatron_a2d.inference.html_replay import replay_row

    tokens, steps = view.tokens[index], view.steps[index]
    return replay_row([tokens[i] for i in kept], [steps[i] for i in kept], loaded.decode)


def _write(options: argparse.Namespace, loaded: LoadedModel, results: Iterator[Result]) -> None:
    """Write texts as they are generated; at the end the HTML page and the statistics."""
    begin = time.perf_counter()
    rows, tokens, forwards, texts = [], 0, 0, 0
    in_terminal = PlainConsole().is_terminal and not options.no_live
    many = options.num_samples > 1 or (options.prompt is not None and len(options.prompt) > 1)
    for number, result in enumerate(results):
        rows.append(result.replay)
        tokens, forwards, texts = tokens + result.num_tokens, forwards + result.num_forwards, texts + 1
        if not loaded.is_output_rank:
            continue
        if options.jsonl:
            record = {
                "text": result.text, "sample": result.sample, "num_tokens": result.num_tokens,
                "num_forwards": result.num_forwards,
            }  # fmt: skip
            print_text(json.dumps(record, ensure_ascii=False))
        elif not in_terminal:
            if many:
                of = options.num_samples * len(options.prompt or [0])
                print_line(f"=== sample {number + 1} of {of} ===")
            print_text(result.text)
    if not texts:
        raise UserError(f"--input {options.input}: holds no prompt; give at least one line")
    if options.save_html and loaded.is_output_rank:
        from megatron_a2d.inference.html_replay import replay_page

        with new_file(options.save_html) as partial:
            title = f"{Path(loaded.name).name}: {_count(texts, 'text')}"
            partial.write_text(replay_page(title, rows), encoding="utf-8")
    if options.stats and loaded.is_output_rank:
        seconds = time.perf_counter() - begin
        print_line(
            f"{_count(texts, 'text')}, {_count(tokens, 'token')} in {_count(forwards, 'forward pass', 'es')} "
            f"(per text): {tokens / max(forwards, 1):.2f} tokens per forward; {seconds:.1f} s, "
            f"{human(tokens / seconds, 'tokens')}/s",
            sys.stderr,
        )


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural if number != 1 else ''}"


if __name__ == "__main__":
    entry_point(main)
