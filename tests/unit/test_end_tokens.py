"""Which tokens end a text, wherever it is asked: of exports and checkpoints, in sampling and in the harness."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.encoders import open_encoder
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.utils.errors import UserError
from tests import tiny

CHAT = {"eos_token_id": [tiny.TURN_END, tiny.END_OF_TEXT]}


def directory(path: Path, config: Any, generation: Any, eos_token: Any = "<|im_end|>", document: str = "") -> Path:
    """A Hugging Face directory without weights. `document` renames <|endoftext|>."""
    path.mkdir()
    tiny.write_tokenizer(path)
    if document:
        text = (path / "tokenizer.json").read_text()
        (path / "tokenizer.json").write_text(text.replace("<|endoftext|>", document))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    (path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "options", "ids", "document"),
    [
        (2, CHAT, {}, (2, 0), 0),  # Qwen3's chat models
        (2, None, {}, (2, 0), 0),  # the data's token alone says it
        (0, None, {}, (0,), 0),  # -Base
        (2, {"eos_token_id": 1}, {}, (2, 1, 0), 0),
        ([2, 1], {"eos_token_id": []}, {}, (2, 1, 0), 0),
        (None, CHAT, {}, (2, 0), 0),
        (None, {}, {}, (0,), 0),
        # Without <|endoftext|>, data_prep ends documents with the tokenizer's eos_token.
        (1, None, {"document": "<pad>"}, (1, 2), 2),
        (1, None, {"document": "<pad>", "eos_token": {"content": "<|im_end|>"}}, (1, 2), 2),
        (1, None, {"document": "<pad>", "eos_token": None}, (1,), 1),
        (None, None, {"document": "<pad>", "eos_token": "unknown"}, (), None),
    ],
)
def test_three_places_name_them(config, generation, options, ids, document, tmp_path) -> None:
    found = directory(tmp_path / "hf", config, generation, **options)
    assert read_end_tokens(found, tiny.VOCAB_SIZE) == (ids, document)
    if options.get("eos_token", "") not in (None, "unknown"):
        assert open_encoder(found, append_eod=True, workers=1).eod_token_id == document


@pytest.mark.parametrize("value", ["<|im_end|>", [2, "0"], True, 256, -1, [[2]], 2.0, {"id": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_token_is_an_error(name: str, value: Any, tmp_path: Path) -> None:
    values: dict[str, Any] = {"config.json": 2, "generation_config.json": 2} | {name: value}
    found = directory(tmp_path / "hf", values["config.json"], {"eos_token_id": values["generation_config.json"]})
    with pytest.raises(UserError, match=rf"{name}: eos_token_id is .* is not a token of the model \(0 to 255\)"):
        read_end_tokens(found, tiny.VOCAB_SIZE)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chat model as it came, its checkpoint, and an export in each form."""
    root = tmp_path_factory.mktemp("chat")
    tiny.write_hf(root / "hf", "moe")
    convert(root / "hf", root / "checkpoint")
    for form in ("a2d", "rnd1", "qwen3"):
        export(root / "checkpoint", root / form, form)  # type: ignore[arg-type]
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("form", ["a2d", "rnd1", "qwen3"])
def test_exports_keep_the_list(form: str, chat: dict[str, Path]) -> None:
    assert json.loads((chat[form] / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert read_end_tokens(chat[form], tiny.VOCAB_SIZE) == read_end_tokens(chat["hf"], tiny.VOCAB_SIZE) == ((2, 0), 0)


def test_an_export_lists_what_only_the_data_says(chat: dict[str, Path], tmp_path: Path) -> None:
    hf = tiny.write_hf(tmp_path / "hf", "dense")
    (hf / "generation_config.json").unlink()
    convert(hf, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", "a2d")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def loaded_models(chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Each form, loaded as generate and evaluate do; weights and process groups are left out."""
    from megatron_a2d.inference import hf_model as exports
    from megatron_a2d.inference import parallel_model

    monkeypatch.setattr(exports, "_load", lambda *a: SimpleNamespace(device="cpu"))
    for name in ("load_weights", "ParallelModel"):
        monkeypatch.setattr(parallel_model, name, lambda *a: None)
    monkeypatch.setattr(parallel_model.process_groups, "initialize", lambda *a: None)
    monkeypatch.setattr(parallel_model.dist, "get_rank", lambda: 0)
    loaded: dict[str, Any] = {form: exports.load_hf_model(chat[form]) for form in ("a2d", "rnd1")}
    loaded |= {form: exports.load_hf_model(chat[form], "ar") for form in ("hf", "qwen3")}
    return loaded | {"checkpoint": parallel_model.load_parallel_model(chat["checkpoint"], {})}


def test_sampling_and_the_harness_hear_of_all(chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_a2d.evaluation.harness import HarnessModel

    for form, loaded in loaded_models(chat, monkeypatch).items():
        assert (loaded.end_token_ids, loaded.document_token_id) == ((2, 0), 0), form
        assert HarnessModel(loaded, None, None, 1, 1, None, None).eot_token_id == 0, form  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["a2d", "rnd1", "checkpoint"])
def test_a_text_ends_at_the_end_token_of_generation_config(
    form: str, chat: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model made to write a, b, <|endoftext|>, c, c, c writes "ab": from generate, and from the harness."""
    from contextlib import nullcontext

    from lm_eval.api.instance import Instance

    from megatron_a2d import generate
    from megatron_a2d.diffusion.model_interface import from_logits
    from megatron_a2d.diffusion.sampling import SamplingOptions
    from megatron_a2d.evaluation.harness import HarnessModel
    from megatron_a2d.evaluation.response_cache import ResponseCache

    loaded = loaded_models(chat, monkeypatch)[form]
    a, b, c = (loaded.encode(text)[0] for text in "abc")
    script = torch.tensor(
        [a, b, tiny.END_OF_TEXT, c, c, c, c]
    )  # output i predicts token i + 1; the prompt is one token

    def logits(tokens_BL: torch.Tensor) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(script[: tokens_BL.size(1)], tiny.VOCAB_SIZE)
        return 20.0 * one_hot.expand(len(tokens_BL), -1, -1)

    made = dataclasses.replace(loaded, forward=from_logits(logits), device=torch.device("cpu"))
    monkeypatch.setattr(generate, "load_model", lambda *a: made)
    monkeypatch.setattr(generate, "close_model", lambda: None)
    generate.main(
        ["--model", str(chat[form]), "--prompt", "t", "--max-new-tokens", "6", "--num-steps", "6", "--no-live"]
    )
    assert capsys.readouterr().out == "tab\n"
    harness = HarnessModel(
        made, None, SamplingOptions(num_steps=6), 6, 1, ResponseCache(None, None), lambda *a: nullcontext(lambda n: None)  # type: ignore[arg-type]
    )  # fmt: skip
    assert harness.generate_until([Instance("g", {}, ("t", {"until": []}), 0)]) == ["ab"]
