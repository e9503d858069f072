"""What a run or a conversion wrote down and somebody else changed: run.json, log.jsonl, tokenizer.json, a model card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import verify
from megatron_a2d.checkpoint.directory import read_license, read_run_settings, resolve
from megatron_a2d.checkpoint.training_facts import Trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.renamed import recorded_settings
from megatron_a2d.config.settings import RunConfig, settings
from megatron_a2d.conversion.end_tokens import EndTokens
from megatron_a2d.conversion.hf_config import Exported
from megatron_a2d.conversion.model_card import RECIPE, Origin, model_card
from megatron_a2d.report.plots import draw_run, read_log
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer
from tests.tiny import write_tokenizer

NO_SETTING: list[Any] = ["x\n# forged", [1], {"a": "b"}, True, -1.5, 2**70]


def test_what_a_run_writes_is_read() -> None:
    values = json.loads(json.dumps(RunConfig().to_dict()))
    assert recorded_settings(values) == (values, [])
    assert recorded_settings({"of_another_version": object(), "lr": 1}) == ({"lr": 1}, [])


@pytest.mark.parametrize("name", ["lr", "seq_length", "bf16", "objective", "lr_mult", "recompute_modules", "save"])
def test_no_setting_has_any_type_but_its_own(name: str, tmp_path: Path) -> None:
    kind = settings()[name].kind
    good = (
        {float: (int, float), int: (int,), bool: (bool,), str: (str,)}.get(kind, ()) if isinstance(kind, type) else ()
    )
    for value in NO_SETTING:
        if type(value) in good:
            continue
        assert recorded_settings({name: value, "min_lr": 0.5}) == ({"min_lr": 0.5}, [name])
        (tmp_path / "run.json").write_text(json.dumps({name: value if value != 2**70 else [value // 2**70]}))
        with pytest.raises(UserError, match=rf"run\.json: has no usable {name}"):
            read_run_settings(tmp_path)


MODEL = Exported(
    ModelConfig(2, 8, 2, 2, 4, 16, 64, 32, 1e-6, 1e4, False), {}, {}, "bfloat16", Trained("mdlm"), EndTokens((), None)
)


def card(settings: dict[str, Any], consumed_samples: Any = 24) -> str:
    return model_card("a2d", MODEL, Origin(3, consumed_samples, settings))


def test_a_card_takes_no_text_from_a_run() -> None:
    evil = "8 |\n\n# Licence\n[free](http://x) <script>"
    text = card(dict.fromkeys([*RECIPE, "lr_mult", "train_data_path"], evil))
    assert "Licence\n[free]" not in text and "script" not in text and "http" not in text
    assert all(f"| {name} | not recorded |" in text for name in RECIPE)
    assert text.count("# Licence") == 1 and "## Data\n\nNot recorded." in text
    assert "Training: 3 iterations." in text


def test_a_card_shows_what_a_run_recorded() -> None:
    run = RunConfig().to_dict() | {"train_data_path": "/disk/of/somebody/code-v1.2", "lr_mult": {"mlp": 0.1}}
    text = card(json.loads(json.dumps(run)))
    assert "not recorded |" not in text and "| objective | mdlm |" in text and "| seq_length | 4096 |" in text
    assert "| code-v1.2 | all |" in text and "somebody" not in text
    assert "24 samples of 4096 tokens (98304 tokens seen)" in text


@pytest.mark.parametrize("samples", ["# 1", [1], -5, True, None])
def test_a_card_counts_only_counts(samples: Any) -> None:
    assert "Training: 3 iterations." in card({"seq_length": 8}, consumed_samples=samples)


def test_names_of_measures_stay_in_their_cell() -> None:
    text = model_card("a2d", MODEL, Origin(0, None, {}), {"held | out\n# forged": {"[x](http://y)": 0.5}})
    assert r"| held \| out\\n# forged / \[x\](http://y) | 0.5 |" in text


def test_front_matter_is_found_and_takes_no_time(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("---\ntags:\n- x\nlicense: mit\n---\n# A\nlicense: gpl\n")
    assert read_license(tmp_path) == "mit"
    for text in ("---\n" + "license: a b\n" * 20_000, "---\n" + "x\n" * 44_000, "# A\nlicense: mit\n---\n", "---"):
        readme.write_text(text)
        begin = time.process_time()
        assert read_license(tmp_path) is None
        assert time.process_time() - begin < 0.5


RECORD = {"kind": "train", "iteration": 1, "loss": 2.0}
BAD_RECORDS = [
    "[]", "null", "{}", '"x"', "[" * 100_000, "9" * 5000, '{"kind": [], "iteration": 1}', '{"kind": "train"}',
    '{"kind": "train", "iteration": "1"}', '{"kind": "train", "iteration": 1e400}', '{"kind": "train", "iteration": {}}',
    '{"kind": "train", "iteration": 1, "source": ["a"]}', '{"kind": "train", "iteration": 99999999999999999999}',
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_line_of_a_log_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(RECORD)}\n{line}\n{json.dumps(RECORD)}\n")
    with pytest.raises(UserError, match="line 2 is not a log record"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(RECORD)}\n{line}\n")
    assert read_log(tmp_path) == [RECORD]  # the last line of a run that was killed


def test_a_log_with_numbers_of_other_types_is_drawn(tmp_path: Path) -> None:
    run = tmp_path / r"$\frac$ [x]"
    run.mkdir()
    records: list[dict[str, Any]] = [
        {"kind": "start", "iteration": 0, "settings": "none"},
        RECORD,
        {
            "kind": "train",
            "iteration": 2,
            "loss": "high",
            "accuracy": [1],
            "loss_by_t": {"²": 1, "0.5": None, "$a$": 2},
        },
        {"kind": "train", "iteration": 3, "loss": {"a": {"b": 1}}, "router": 5, "grad_norm": True},
        {"kind": "validation", "iteration": 2, "nelbo": 1.0},
        {"kind": "validation", "iteration": 3, "nelbo": 1.0, "nelbo_standard_error": -1.0, "source": "$x"},
        {"kind": "validation", "iteration": 3, "nelbo": 1.0, "nelbo_standard_error": 0.1, "source": "$y$"},
    ]
    lines = [*map(json.dumps, records), '{"kind": "train", "iteration": 4, "loss": NaN}']
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert draw_run(run, tmp_path / "a.png").stat().st_size > 10_000


def tokenizer_with(directory: Path, **changes: Any) -> Path:
    directory.mkdir()
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


PANICS = {
    "while it is read": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "while it encodes": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_tokenizer_that_panics_is_one_line(
    changes: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tokenizer_with(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        read_tokenizer(path, f"--tokenizer {path}")
    assert capfd.readouterr().err == ""
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"model": 1}', "\0", '{"version": "9"}'])
def test_a_tokenizer_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match="cannot be read") as end:
        read_tokenizer(path, str(path))
    assert len(end.value.problems) == 1


def test_an_honest_tokenizer_is_read_and_an_interruption_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tokenizer_with(tmp_path / "hf")
    assert read_tokenizer(path, "x").get_vocab_size() > 0
    monkeypatch.setattr("megatron_a2d.utils.tokenizer._try", lambda tokenizer: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_tokenizer(path, "x")


def test_reading_a_tokenizer_needs_no_torch() -> None:
    code = "import megatron_a2d.utils.tokenizer, sys; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("kind", ["rnd1", "a2d", "qwen3"])
def test_a_cards_lines_run_and_ask_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5 asks whether to run code for a tokenizer that has none, unless it is set not to."""
    from checkpoints_tools import convert_hf, export_hf
    from tests.tiny import write_hf

    write_hf(tmp_path / "hf", "moe")
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt"), "--no-verify"])
    export = tmp_path / "export"
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(export), "--format", kind, "--no-verify"])
    lines = (export / "README.md").read_text().split("```python\n")[1].split("```")[0]
    asked: list[str] = []

    def ask(question: str = "") -> str:
        asked.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", ask)
    names: dict[str, Any] = {}
    exec(lines.replace("DIRECTORY", str(export)).replace("=64", "=4"), names)
    assert not asked and names["tokenizer"]("abc").input_ids
    assert kind == "qwen3" or capsys.readouterr().out, "a text is printed"


def test_a_tracker_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "latest_checkpointed_iteration.txt")
    with pytest.raises(UserError, match="not a regular file"):
        resolve(tmp_path)


def test_an_empty_name_of_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hf-model '': is empty; give a path"):
        verify.main(["--hf-model", "", "--export", str(tmp_path)])
