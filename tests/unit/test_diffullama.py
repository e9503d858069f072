"""DiffuLLaMA: a Llama by config.json and tensors, told apart by the mask token that its tokenizer declares, a token of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import model_config_from_hf, read_model_config
from megatron_a2d.families.diffullama import DIFFULLAMA, MASK_TOKEN, MASK_TOKEN_ID
from megatron_a2d.families.llama import LLAMA
from megatron_a2d.families.registry import kind_of, published_config, read_config
from megatron_a2d.inference.hf_model import load_hf_model
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.cases import as_trained
from tests.unit.hf_tensors import assert_bitwise_equal, tensors_of
from tests.unit.model_damage import edit_config

TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(2))
SIZES = {"vocab_size": 900, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose tokenizer has the token of DiffuLLaMA's mask, in its vocabulary of text."""
    directory = tiny.write_hf(tmp_path_factory.mktemp("diffullama") / "llama", "llama", **SIZES)
    tiny.declare_mask(directory)
    (directory / "special_tokens_map.json").unlink()
    return directory


@pytest.fixture(scope="module")
def diffullama(llama: Path) -> Path:
    """The same as published: the tokenizer's files declare the mask, config.json says nothing."""
    directory = llama.with_name("hf")
    shutil.copytree(llama, directory)
    tiny.declare_mask(directory)
    return directory


def test_its_tokenizer_tells_it_from_a_llama(llama: Path, diffullama: Path) -> None:
    families = [kind_of(read_config(path), "config.json").family for path in (llama, diffullama)]
    assert families == [LLAMA, DIFFULLAMA]
    assert (llama / "config.json").read_bytes() == (diffullama / "config.json").read_bytes()
    assert read_trained(llama).objective is None and read_model_config(llama).mask_token_id is None
    trained = read_trained(diffullama)
    assert (trained.objective, trained.label_shift) == ("mdlm", True)
    assert read_model_config(diffullama).mask_token_id == MASK_TOKEN_ID


def test_the_published_one() -> None:
    config = published_config("diffusionfamily/diffullama")
    assert config is not None and kind_of(config, "").family is DIFFULLAMA
    found = model_config_from_hf(config, "")
    assert (found.num_parameters(), found.mask_token_id) == (6_738_415_616, 811)


def test_in_and_out(diffullama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors bit by bit and config.json key by key, with a note on the mask token; read back from its own form."""
    convert_hf.main(["--hf-model", str(diffullama), "--out", str(tmp_path / "ckpt")])
    printed = capsys.readouterr().out
    assert f"mask token {MASK_TOKEN_ID}" in printed and f"note: its mask token is {MASK_TOKEN!r}, a token of" in printed
    out = tmp_path / "out"
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(out), "--format", "diffullama"])
    assert_bitwise_equal(tensors_of(out), tensors_of(diffullama))
    source, config = (json.loads((path / "config.json").read_text()) for path in (diffullama, out))
    assert config == source | {"objective": "mdlm", "mask_token_id": MASK_TOKEN_ID}
    assert json.loads((out / "tokenizer_config.json").read_text())["mask_token"] == MASK_TOKEN
    assert read_trained(out) == read_trained(tmp_path / "ckpt" / "release") == read_trained(diffullama)
    with pytest.raises(
        UserError, match=r"--format llama: the model was trained for masked diffusion .*use --format a2d"
    ):
        export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "ar"), "--format", "llama"])


def test_its_logits_are_a_llamas_without_the_causal_mask(diffullama: Path) -> None:
    """That is what its own code computes: transformers' Llama, whose mask it replaces by one of zeros."""
    loaded = load_hf_model(diffullama)
    assert (loaded.mask_token_id, loaded.label_shift, loaded.objective) == (MASK_TOKEN_ID, True, "mdlm")
    reference = tiny.hf_model("llama", **SIZES)
    with torch.no_grad():
        ours = loaded.forward.model(TOKENS).logits  # type: ignore[attr-defined]
        theirs = reference(TOKENS, attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool), use_cache=False).logits
        causal = reference(TOKENS, use_cache=False).logits
    assert (ours - theirs).abs().max() <= 1e-5 and (ours - causal).abs().max() > 0.1


def test_a_llama_is_not_taken_for_one(llama: Path, diffullama: Path) -> None:
    with pytest.raises(UserError, match=r'if it is DiffuLLaMA, .*write "objective": "mdlm" into its config.json'):
        load_hf_model(llama)
    with pytest.raises(UserError, match="remove --objective ar"):
        load_hf_model(diffullama, "ar")
    assert load_hf_model(llama, "ar").objective == "ar"


def test_config_json_can_say_it(llama: Path, tmp_path: Path) -> None:
    """For a copy whose tokenizer is Llama's; its mask token is still known, and no other is taken."""
    shutil.copytree(llama, tmp_path / "hf")
    edit_config(tmp_path / "hf", objective="mdlm")
    loaded = load_hf_model(tmp_path / "hf")
    assert (loaded.mask_token_id, loaded.label_shift) == (MASK_TOKEN_ID, True)
    with pytest.raises(UserError, match=f"--mask-token-id 5: .* was trained with {MASK_TOKEN_ID}"):
        convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "no"), "--mask-token-id", "5"])
    edit_config(tmp_path / "hf", mask_token_id=100)
    with pytest.raises(UserError, match=r"mask_token_id 100: is the token .* which text uses"):
        convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "no")])


def test_a_llama_trained_here_leaves_as_one(llama: Path, tmp_path: Path) -> None:
    """With the mask token that it was converted with, and the facts that the form does not imply."""
    convert_hf.main(["--hf-model", str(llama), "--out", str(tmp_path / "ckpt")])
    run = as_trained(tmp_path / "ckpt", tmp_path / "run", {"noise_schedule": "cosine"})
    export_hf.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--format", "diffullama"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mask_token_id"], config["objective"], config["noise_schedule"]) == (250, "mdlm", "cosine")
    assert kind_of(config, "").family is DIFFULLAMA
    assert load_hf_model(tmp_path / "out").noise_schedule == "cosine"
