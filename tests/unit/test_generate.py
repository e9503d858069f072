"""`python -m megatron_a2d.generate`: text in, text out, and every kind of bad input."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_a2d import generate
from megatron_a2d.diffusion.sampling import kept_positions
from megatron_a2d.hf.kv_cache_a2d import KeyValueCache
from megatron_a2d.terminal.live_view import MASK_BLOCK
from megatron_a2d.utils.errors import UserError
from tests.unit import tiny_exports
from tests.unit.tiny_exports import VOCAB, byte_tokenizer

exports = tiny_exports.exports
ESCAPE = "\x1b["


def run(capsys, directory: Path, *arguments: str) -> str:
    generate.main(["--model", str(directory), *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["a2d", "rnd1"])
def test_completes_a_prompt(kind, exports, capsys):
    prompt = "def mean(values):\n    return "
    arguments = ("--prompt", prompt, "--max-new-tokens", "12", "--temperature", "1")
    text = run(capsys, exports[kind], *arguments)
    assert text.startswith(prompt) and len(text) > len(prompt) + 4
    assert ESCAPE not in text and MASK_BLOCK not in text and "<|" not in text
    assert text == run(capsys, exports[kind], *arguments), "the same seed must give the same text"
    assert text != run(capsys, exports[kind], *arguments, "--seed", "1")
    assert text != run(capsys, exports[kind], *arguments, "--num-steps", "1")


def test_fills_a_hole(exports, capsys):
    prefix, suffix = "def mean(values):\n", "\n    return total\n"
    text = run(capsys, exports["a2d"], "--prefix", prefix, "--suffix", suffix, "--hole-length", "7")
    assert text.startswith(prefix) and text.removesuffix("\n").endswith(suffix)
    assert len(text) > len(prefix) + len(suffix) + 1


def test_samples_differ(exports, capsys):
    text = run(capsys, exports["a2d"], "--prompt", "x = ", "--num-samples", "3", "--temperature", "1")
    samples = re.split(r"=== sample \d of 3 ===\n", text)
    assert samples[0] == "" and len(set(samples[1:])) == 3
    assert all(sample.startswith("x = ") for sample in samples[1:])


def test_text_ends_at_the_end_of_text():
    tokens = [7, 1, 2, 9, 3, 4, 5, 9, 9, 6]
    editable = [False, True, True, True, True, False, True, True, True, False]
    kept = kept_positions(tokens, editable, {9})
    assert kept == [0, 1, 2, 5, 6, 9]
    assert kept_positions(tokens, editable, {8, 2}) == [0, 1, 5, 6, 7, 8, 9]
    assert kept_positions(tokens, editable, set()) == list(range(10))
    assert kept_positions([9, 1], [False, True], {9}) == [0, 1], "the prompt itself does not end the text"


def lines(capsys, export: Path, content: list[object], tmp_path: Path, *arguments: str) -> list[dict]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in content))
    return [json.loads(line) for line in run(capsys, export, "--input", str(path), "--jsonl", *arguments).splitlines()]


JSONL = [
    {"prompt": "def mean(values):", "max_new_tokens": 9},
    {"prefix": "a = [", "suffix": "]", "hole_length": 4},
    {"infill": "x = <|hole:3|>; y = <|hole:5|>\n"},
    {"prompt": "class"},
]


def test_jsonl_gives_the_same_texts_on_any_batch_size(exports, capsys, tmp_path):
    arguments = ("--temperature", "1", "--max-new-tokens", "11", "--num-samples", "2", "--num-steps", "6")
    alone, two, all_ = (
        lines(capsys, exports["a2d"], JSONL, tmp_path, *arguments, "--batch-size", size) for size in "128"
    )
    assert alone == two == all_ and len(alone) == 8
    assert len({record["text"] for record in alone}) == 8 and all(record["num_forwards"] <= 6 for record in alone)
    assert alone[4]["text"].startswith("x = ") and "; y = " in alone[4]["text"] and alone[4]["text"].endswith("\n")
    assert [record["sample"] for record in alone] == [0, 1] * 4
    assert alone != lines(capsys, exports["a2d"], JSONL, tmp_path, *arguments, "--seed", "1")


def test_reads_a_pipe(exports, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"prompt": "x = "}) + "\n\n"))
    text = run(capsys, exports["a2d"], "--input", "-", "--jsonl", "--max-new-tokens", "4", "--num-steps", "2")
    assert json.loads(text)["text"].startswith("x = ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n"))
    assert run(capsys, exports["a2d"], "--input", "-", "--max-new-tokens", "4").startswith("def f(x):\n")
    # UTF-8 whatever the locale.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("café = ".encode()), encoding="ascii"))
    assert run(capsys, exports["a2d"], "--input", "-", "--max-new-tokens", "4").startswith("café = ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="ascii"))
    with pytest.raises(UserError, match=r"^--input \(pipe\) line 1: is not UTF-8 \(byte 3\)"):
        generate.main(["--model", str(exports["a2d"]), "--input", "-"])


def test_statistics(exports, capsys):
    generate.main(
        ["--model", str(exports["a2d"]), "--prompt", "x = ", "--max-new-tokens", "8", "--num-steps", "4", "--stats"]
    )
    found = re.match(
        r"1 text, (\d+) tokens in (\d+) forward passes \(per text\): ([\d.]+) tokens", capsys.readouterr().err
    )
    assert found and int(found[2]) == 4 and float(found[3]) == int(found[1]) / 4


def test_samplers_and_caches_write_texts(exports, capsys):
    texts = set()
    for arguments in (
        ["--sampler", "confidence"], ["--sampler", "eb", "--gamma", "2"], ["--sampler", "threshold", "--threshold", "0.3"],
        ["--block-length", "6"], ["--block-length", "6", "--cache", "prefix"], ["--block-length", "6", "--cache", "dual"],
        ["--cfg-scale", "1"], ["--cfg-scale", "1", "--block-length", "6", "--cache", "dual"],
    ):  # fmt: skip
        texts.add(run(capsys, exports["a2d"], "--prompt", "x = ", "--max-new-tokens", "20", *arguments))
    assert len(texts) >= 5 and all(text.startswith("x = ") for text in texts)


def test_block_models_are_cached_by_default(exports, capsys, monkeypatch):
    """Exactly: the text is that without a cache."""
    passes, select = [], KeyValueCache.select
    monkeypatch.setattr(
        KeyValueCache, "select", lambda self, slots, active, keys: passes.append(keys) or select(self, slots, active, keys)
    )  # fmt: skip
    arguments = ("--prompt", "def mean(values):", "--prompt", "x", "--max-new-tokens", "30", "--num-steps", "12")
    text = run(capsys, exports["block"], *arguments)
    assert len(passes) >= 12 and passes[0] < max(passes)
    assert text == run(capsys, exports["block"], *arguments, "--cache", "prefix")
    passes.clear()
    assert text == run(capsys, exports["block"], *arguments, "--cache", "none") and not passes


def test_self_speculation(exports, capsys):
    """Reports tokens per forward pass; refused without the co-loss it needs, and for holes."""
    arguments = ("--prompt", "def mean(values):", "--max-new-tokens", "20", "--temperature", "0")
    speculative = (*arguments, "--sampler", "self_speculative")
    generate.main(["--model", str(exports["co_loss"]), *speculative, "--stats"])
    text, stats = capsys.readouterr()
    found = re.search(r"(\d+) tokens in (\d+) forward passes \(per text\): [\d.]+ tokens per forward", stats)
    assert found and int(found[2]) <= 40 and text.startswith("def mean(values):")
    assert text != run(capsys, exports["co_loss"], *arguments, "--num-steps", "3")
    assert text == run(capsys, exports["co_loss"], *speculative, "--cache", "none")


BAD_BLOCK_ARGUMENTS = {
    "dual cache": ("block", ["--prompt", "a", "--cache", "dual"], "--cache dual: block diffusion attends to nothing"),
    "guidance": ("block", ["--prompt", "a", "--cfg-scale", "1"], "--cfg-scale 1.0: block diffusion is sampled without"),
    "other blocks": ("block", ["--prompt", "a", "--block-length", "4"], "--block-length 4: the model was trained in bl"),
    "no blocks": ("a2d", ["--prompt", "a", "--sampler", "self_speculative"], "--sampler self_speculative: needs a block"),
    "no co-loss": ("block", ["--prompt", "a", "--sampler", "self_speculative"], "--sampler self_speculative: needs a"),
    "a hole": (
        "co_loss", ["--infill", "a <|hole:4|> b", "--sampler", "self_speculative"], "--infill: --sampler self_specul",
    ),
    "a reserved place": (
        "co_loss", ["--prompt", "a", "--sampler", "self_speculative", "--reserve-last", "pad"], "--reserve-last",
    ),
    "steps": (
        "co_loss", ["--prompt", "a", "--sampler", "self_speculative", "--num-steps", "4"], "--num-steps 4: has no eff",
    ),
    "remasking": (
        "co_loss", ["--prompt", "a", "--sampler", "self_speculative", "--remask", "0.1"], "; leave out --remask and --cfg-scale",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BLOCK_ARGUMENTS)
def test_bad_arguments_of_block_models(case, exports):
    kind, arguments, message = BAD_BLOCK_ARGUMENTS[case]
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports[kind]), *arguments])
    assert message in str(error.value) and len(error.value.problems) == 1


def test_reserves_the_last_place(exports, capsys):
    """--reserve-last changes what the model sees behind the text, and takes one of the new tokens."""
    arguments = ("--prompt", "x = ", "--max-new-tokens", "6", "--num-steps", "2", "--stats")
    generate.main(["--model", str(exports["a2d"]), *arguments])
    plain = capsys.readouterr()
    generate.main(["--model", str(exports["a2d"]), *arguments, "--reserve-last", "eos"])
    reserved = capsys.readouterr()
    assert plain.err.startswith("1 text, 6 tokens in") and reserved.err.startswith("1 text, 5 tokens in")


def test_the_reserved_padding_is_the_models(exports, capsys, tmp_path, monkeypatch):
    """The public package takes pad_token_id of config.json: not token 0, which would be a visible "!" in Qwen3's."""
    rows = []
    original = generate.to_row
    monkeypatch.setattr(generate, "to_row", lambda *a: rows.append(original(*a)) or rows[-1])
    arguments = ("--prompt", "x = ", "--max-new-tokens", "6", "--num-steps", "2", "--reserve-last", "pad")
    end = VOCAB - 2
    for pad, expected in ((7, 7), (end, end), (None, end)):  # none: as an export would have it
        run(capsys, copy_of(exports["a2d"], tmp_path / str(pad), pad_token_id=pad), *arguments)
        assert rows[-1][-1] == expected


BAD_JSONL = {
    "no json": ("{'prompt': 1}", "line 2: is not JSON"),
    "no object": ("[1]", "line 2: is not an object"),
    "unknown key": ('{"prompts": "a"}', "did you mean prompt?"),
    "empty": ('{"prompt": ""}', "line 2: prompt must be a non-empty string"),
    "two kinds": ('{"prompt": "a", "infill": "b"}', "exactly one"),
    "no suffix": ('{"prefix": "a"}', "needs a suffix"),
    "length zero": ('{"infill": "a <|hole:0|>"}', "a hole of length 0"),
    "no length": ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0"),
    "too long": ('{"prompt": "a", "max_new_tokens": 400}', "200 positions"),
    "hole first": ('{"infill": "<|hole:2|> a"}', "begins with a hole"),
    "no effect": ('{"prompt": "a", "suffix": "b"}', "suffix has no effect with prompt"),
    "surrogate": ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    "endless number": ('{"prompt": "a", "max_new_tokens": ' + "9" * 5000 + "}", "line 2: is not JSON"),
    "endless nesting": ("[" * 100_000, "line 2: is not JSON"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl(case, exports, tmp_path, capsys):
    line, message = BAD_JSONL[case]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "good", "max_new_tokens": 2}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports["a2d"]), "--input", str(tmp_path / "prompts.jsonl"), "--jsonl"])
    assert message in str(error.value)
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 2, "what came before is written"


def test_a_file_that_is_no_text(exports, tmp_path, capsys):
    """The line and its byte, also far behind what was read ahead; what came before is written."""
    (tmp_path / "binary").write_bytes(b"fine\ncaf\xc3\xa9 \xff\n")
    lines = [b'{"prompt": "a", "max_new_tokens": 2}', *[b""] * 20_000, b'{"prompt": "\xe9"}']
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(lines))
    for name, flags, place in (
        ("binary", (), "line 2: is not UTF-8 (byte 6)"),
        ("prompts.jsonl", ("--jsonl",), "line 20002: is not UTF-8 (byte 12)"),
    ):
        with pytest.raises(UserError) as error:
            generate.main(["--model", str(exports["a2d"]), "--input", str(tmp_path / name), *flags])
        assert str(error.value) == f"--input {tmp_path / name} {place}; save it as UTF-8"
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 2


@pytest.mark.parametrize("name", ["absent", "directory", "pipe"])
def test_prompts_are_looked_for_before_the_model_is_loaded(name, exports, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_model", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports["a2d"]), "--input", str(tmp_path / name)])
    assert str(error.value).startswith(f"--input {tmp_path / name}: cannot be read (")
    assert str(error.value).count(name) == 1 + (name != "absent") and "Errno" not in str(error.value)


BAD_ARGUMENTS = {
    "neither": ([], "give exactly one, --prefix with --suffix"),
    "both": (["--prompt", "a", "--prefix", "b"], "give exactly one, --prefix with --suffix"),
    "no suffix": (["--prefix", "a"], "needs both"),
    "empty prompt": (["--prompt", ""], "--prompt '': is empty"),
    "empty suffix": (["--prefix", "a", "--suffix", ""], "--suffix '': is empty"),
    "hole of length zero": (["--prefix", "a", "--suffix", "b", "--hole-length", "0"], "--hole-length 0"),
    "no new tokens": (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    "hole length with a prompt": (["--prompt", "a", "--hole-length", "3"], "no effect"),
    "new tokens with a hole": (["--prefix", "a", "--suffix", "b", "--max-new-tokens", "3"], "no effect"),
    "a device": (["--input", "/dev/zero"], "is not a regular file"),
    "no steps": (["--prompt", "a", "--num-steps", "0"], "--num-steps 0"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "--temperature -1"),
    "temperature nan": (["--prompt", "a", "--temperature", "nan"], "--temperature nan"),
    "top p": (["--prompt", "a", "--top-p", "0"], "--top-p 0"),
    "top k": (["--prompt", "a", "--top-k", "-2"], "--top-k -2"),
    "equal samples": (["--prompt", "a", "--num-samples", "2", "--temperature", "0"], "all would be equal"),
    "samples without end": (["--prompt", "a", "--num-samples", "1000000000"], "at most 1,048,576"),
    "too long": (["--prompt", "ab", "--max-new-tokens", "199"], "200 positions"),
    "hole of length zero in a text": (["--infill", "a <|hole:0|> b"], "a hole of length 0"),
    "no hole": (["--infill", "a b"], "has no hole"),
    "hole first": (["--infill", "<|hole:3|> b"], "begins with a hole"),
    "jsonl alone": (["--prompt", "a", "--jsonl"], "--jsonl: has no effect"),
    "no file": (["--input", "/nowhere/prompts"], "cannot be read"),
    "cache without blocks": (["--prompt", "a", "--cache", "dual"], "without blocks; set --block-length"),
    "steps of Dream's schedule": (
        ["--prompt", "a", "--sampler", "entropy", "--num-steps", "65537"],
        "must be at most 65536 with --sampler entropy",
    ),
    "gamma without eb": (["--prompt", "a", "--gamma", "1"], "--gamma 1.0: has no effect"),
    "layout of an export": (["--prompt", "a", "--bf16"], "--bf16: needs a checkpoint"),
    "no sampler": (["--prompt", "a", "--sampler", "best"], "invalid choice"),
    "mask token": (["--prompt", "a <|mask|> b"], "contains the mask token"),
    "endless hole": (["--infill", "a <|hole:99999999999|> b"], "not of the form <|hole:16|>"),
    "long hole": (["--infill", "a <|hole:999999999|> b"], "200 positions"),
    "hole without a number": (["--infill", "a <|hole:2|> <|hole:|> b"], "not of the form <|hole:16|>"),
    "endless completion": (["--prompt", "a", "--max-new-tokens", "99999999999"], "200 positions"),
    "surrogate": (["--prompt", "a\udc80"], "not valid UTF-8"),
    "temperature that overflows": (["--prompt", "a", "--temperature", "1e-38"], "--temperature 1e-38: must be 0, or"),
    "guidance that overflows": (["--prompt", "a", "--cfg-scale", "1e38"], "--cfg-scale 1e+38: must be 0 (none) to"),
    "page that is a directory": (["--prompt", "a", "--save-html", "/tmp"], "--save-html /tmp: is a directory"),
    "unknown flag": (["--prompt", "a", "--num-step", "3"], "--num-steps"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, exports):
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports["a2d"]), *arguments])
    assert message in str(error.value)


def test_a_cache_without_blocks_is_one_problem(exports):
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports["a2d"]), "--prompt", "a", "--cache", "dual"])
    assert len(error.value.problems) == 1


def test_all_problems_are_reported_together(exports):
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(exports["a2d"]), "--prompt", "", "--num-steps", "0", "--top-k", "-1"])
    assert len(error.value.problems) == 3


def copy_of(export: Path, directory: Path, **changes: object) -> Path:
    """A copy of an export with some keys of its config.json changed (None: removed)."""
    directory.mkdir(exist_ok=True)
    for file in export.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        generate.main(["--model", str(directory), "--prompt", "a"])
    return str(error.value)


def test_bad_models(exports, tmp_path):
    export = exports["a2d"]
    assert "no such directory" in refusal(tmp_path / "absent")
    assert "config.json" in refusal(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert "names release, which does not exist" in refusal(tmp_path)
    assert "'qwen3'" in refusal(copy_of(export, tmp_path / "ar", model_type="qwen3"))
    assert "mask_token_id is None" in refusal(copy_of(export, tmp_path / "mask", mask_token_id=None))
    assert "mask_token_id is 300" in refusal(copy_of(export, tmp_path / "range", mask_token_id=VOCAB))
    assert "hidden_act" in refusal(copy_of(export, tmp_path / "act", hidden_act="gelu"))
    assert "layers.2.input_layernorm.weight is missing" in refusal(
        copy_of(export, tmp_path / "deep", num_hidden_layers=3)
    )
    assert "layers.1.input_layernorm.weight [32] is unknown" in refusal(
        copy_of(export, tmp_path / "flat", num_hidden_layers=1)
    )
    assert "but config.json asks for [48, 32]" in refusal(copy_of(export, tmp_path / "wide", intermediate_size=48))

    broken = copy_of(export, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes()[:1000])
    assert "truncated or not a safetensors file" in refusal(broken)
    (broken / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in refusal(broken)

    used = copy_of(export, tmp_path / "used", mask_token_id=20)
    assert "mask_token_id is 20, which the tokenizer uses" in refusal(used)
    without = copy_of(export, tmp_path / "tokenizer")
    (without / "tokenizer.json").write_text("{}")
    assert "tokenizer cannot be read" in refusal(without)
    (without / "tokenizer.json").unlink()
    assert "tokenizer is missing" in refusal(without)


def test_tokenizer_of_another_model(exports, tmp_path):
    other = copy_of(exports["a2d"], tmp_path / "other")
    larger = byte_tokenizer()
    larger.add_tokens(["one more"])
    larger.save(str(other / "tokenizer.json"))
    assert "has token id 300" in refusal(other)


def test_exit_code_without_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "megatron_a2d.generate",
        "--model",
        str(tmp_path / "absent"),
        "--prompt",
        "a",
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: --model") and process.stderr.count("\n") == 1
