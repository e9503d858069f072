"""Checkpoints of Megatron-LM, Megatron-Bridge and NeMo 2 in, and ours into megatron.core's GPTModel, bit by bit.

The forms are those that plain megatron-core 0.16.1 and 0.19.2 wrote (tests/fixtures/write_megatron_checkpoints.py).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints_tools import convert_megatron
from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.checkpoint.metadata_index import Box
from megatron_a2d.checkpoint.torch_dist_reader import open_torch_dist
from megatron_a2d.config.settings import build
from megatron_a2d.conversion.megatron_checkpoint import name_in_ours, open_megatron, padded_sizes
from megatron_a2d.conversion.megatron_settings import config_of, read_recorded
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests.fixtures.write_megatron_checkpoints import EXPERTS, MODELS, SIZES, TOKENS, VOCAB_SIZE, value_of
from tests.unpickling import nothing_unpickled

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = ("0_16_1", "0_19_2")
MASK = ["--mask-token-id", "59"]
SIZE = {"nemo": ("--vocab-size", str(VOCAB_SIZE))}  # NeMo records none, and this one has no tokenizer
CONFIG = {"model_type": "qwen3_moe", "vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6, "num_experts": 4}


def source(root: Path, form: str) -> Path:
    """Where the user points: NeMo's directory, the others' with the tracker."""
    return root / "forms" / form


def settings(path: Path) -> Path:
    """The file of a form's settings."""
    return next(path.rglob("run_config.yaml"), path / "context" / "model.yaml")


def convert(path: Path, out: Path, *flags: str) -> Path:
    convert_megatron.main(["--megatron", str(path), "--out", str(out), *MASK, *flags])
    return resolve(out)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for version in VERSIONS:
        found[version] = tmp_path_factory.mktemp(version)
        with tarfile.open(FIXTURES / f"megatron_forms_{version}.tar.xz") as file:
            file.extractall(found[version], filter="data")
    return found


@pytest.fixture(scope="module")
def converted(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(version, form) -> the release directory that nothing was unpickled for."""
    root = tmp_path_factory.mktemp("converted")
    with nothing_unpickled():
        return {
            (version, form): convert(source(forms[version], form), root / f"{version}_{form}", *SIZE.get(form, ()))
            for version in VERSIONS
            for form in MODELS
        }


@pytest.fixture
def bridge(forms: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of Bridge's form, to be damaged."""
    return Path(shutil.copytree(source(forms["0_16_1"], "bridge"), tmp_path / "bridge"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the model's settings in a YAML file."""
    content = yaml.safe_load(path.read_text())
    change(content["model" if "model" in content else "config"])
    path.write_text(yaml.safe_dump(content))


def every_weight(form: str) -> Iterator[tuple[str, tuple[int, ...], str, torch.Size]]:
    """(our tensor, index into its leading axes, GPTModel's own name of the parameter, its shape), written out."""
    heads, width, hidden = SIZES["kv_channels"], SIZES["ffn_hidden_size"], SIZES["hidden_size"]
    rows = heads * (SIZES["num_attention_heads"] + 2)
    yield "embedding.word_embeddings.weight", (), "embedding.word_embeddings.weight", torch.Size((64, hidden))
    yield "decoder.final_layernorm.weight", (), "decoder.final_layernorm.weight", torch.Size((hidden,))
    if form != "lm":
        yield "output_layer.weight", (), "output_layer.weight", torch.Size((64, hidden))
    is_moe = form.startswith("bridge")
    parts = {
        "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight", (hidden,)),
        "self_attention.linear_qkv.weight": ("self_attention.linear_qkv.weight", (rows, hidden)),
        "self_attention.linear_proj.weight": ("self_attention.linear_proj.weight", (hidden, 2 * heads)),
        "pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight": (
            "pre_mlp_layernorm.weight",
            (hidden,),
        ),
    }
    if form == "nemo":
        parts["self_attention.linear_qkv.bias"] = ("self_attention.linear_qkv.bias", (rows,))
    else:
        parts |= {f"self_attention.{name}_layernorm.weight": (f"self_attention.{name}_layernorm.weight", (heads,)) for name in "qk"}  # fmt: skip
    if is_moe:
        parts["mlp.router.weight"] = ("mlp.router.weight", (4, hidden))
        width = EXPERTS["moe_ffn_hidden_size"]
    shapes = {"linear_fc1.weight": (2 * width, hidden), "linear_fc2.weight": (hidden, width)}
    for layer in range(SIZES["num_layers"]):
        for ours, (name, shape) in parts.items():
            yield f"decoder.layers.{ours}", (layer,), f"decoder.layers.{layer}.{name}", torch.Size(shape)
        for name, shape in shapes.items():
            if not is_moe:
                yield f"decoder.layers.mlp.{name}", (layer,), f"decoder.layers.{layer}.mlp.{name}", torch.Size(shape)
                continue
            for expert in range(4):
                own = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{name}"
                yield f"decoder.layers.mlp.experts.experts.{name}", (layer, expert), own, torch.Size(shape)


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_weight_is_the_one_that_was_written(
    version: str, form: str, converted: dict[tuple[str, str], Path]
) -> None:
    with open_torch_dist(converted[version, form]) as stored:
        seen = set()
        for key, lead, name, shape in every_weight(form):
            whole = stored.shapes[key]
            box = Box((*lead, *(0 for _ in whole[len(lead) :])), (*(i + 1 for i in lead), *whole[len(lead) :]))
            expected = value_of(name, shape)[:VOCAB_SIZE] if shape[0] == 64 else value_of(name, shape)
            assert torch.equal(stored.read_box(key, box)[(0,) * len(lead)], expected), (key, lead)
            seen.add(key)
        assert seen == set(stored.shapes)


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("version", VERSIONS)
def test_logits_are_those_of_its_gpt_model(
    version: str, form: str, forms: dict[str, Path], converted: dict[tuple[str, str], Path]
) -> None:
    expected = load_file(forms[version] / "forms" / f"{form}.safetensors")["logits"]
    with open_checkpoint(converted[version, form]) as weights:
        found = StreamedModel(weights, causal=True).logits(TOKENS)
        assert (found - expected).abs().amax(-1).max() < 1e-5 < 100 * expected.abs().max()
        # Control: another architecture of the same tensors.
        if form.startswith("bridge"):
            other = weights._replace(model_config=dataclasses.replace(weights.model_config, norm_topk_prob=False))
            assert (StreamedModel(other, causal=True).logits(TOKENS) - expected).abs().max() > 1e-3


def test_settings_as_the_programs_themselves_write_them(tmp_path: Path) -> None:
    """run_config.yaml by Megatron-Bridge 067f987 (its GPTModelProvider and serialiser, of a Qwen3-MoE), and `args` by
    Megatron-LM d98e8a6 (its parser and torch.save, of a tied Qwen3 with vocabulary 60 and TP 2), run on a CPU."""
    with tarfile.open(FIXTURES / "megatron_settings_2026_08.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    common = {"hidden_size": 16, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "rms_norm_eps": 1e-6}
    expected = {
        "bridge": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        "lm": {"model_type": "qwen3", "tie_word_embeddings": True},
    }
    for program, values in expected.items():
        recorded = read_recorded(tmp_path / program)
        assert recorded is not None and recorded.get("vocab_size") == 60
        found = config_of(recorded, 60, "bfloat16")
        assert {name: found[name] for name in common | values} == common | values
        assert padded_sizes(60, recorded) == {60, 64}


def test_padding_of_a_layout_that_was_not_recorded() -> None:
    assert 152576 in padded_sizes(151936, None), "TP 8"
    assert 151936 not in padded_sizes(32000, None), "another model's vocabulary"


def test_both_ways_of_storing_give_the_same_files(converted: dict[tuple[str, str], Path]) -> None:
    for version in VERSIONS:
        one, all_ = converted[version, "bridge_one"], converted[version, "bridge"]
        assert sorted(path.name for path in one.glob("*.distcp")) == ["__0_0.distcp"]
        assert (one / "__0_0.distcp").read_bytes() == (all_ / "__0_0.distcp").read_bytes()


def test_settings_become_a_config_json(converted: dict[tuple[str, str], Path]) -> None:
    found = {form: read_json(converted["0_19_2", form] / "hf" / "config.json", "it") for form in MODELS}
    assert {form: config["model_type"] for form, config in found.items()} == {
        "lm": "qwen3", "bridge": "qwen3_moe", "bridge_one": "qwen3_moe", "nemo": "qwen2",
    }  # fmt: skip
    assert found["bridge"] == found["bridge_one"]
    assert found["lm"]["tie_word_embeddings"] and found["lm"]["rms_norm_eps"] == 1e-6
    assert all(config["vocab_size"] == VOCAB_SIZE and config["mask_token_id"] == 59 for config in found.values())
    assert found["bridge"]["norm_topk_prob"] and found["bridge"]["moe_intermediate_size"] == 20


@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        ("module.embedding.word_embeddings.weight", "embedding.word_embeddings.weight"),
        ("decoder.layers.11.input_layernorm.weight", "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"),
        *(
            (f"decoder.layers.{name}", "decoder.layers.mlp.experts.experts.linear_fc1.weight")
            for name in (
                "mlp.experts.experts.linear_fc1.weight",
                "7.mlp.experts.experts.linear_fc1.weight",
                "7.mlp.experts.experts.12.linear_fc1.weight_w",
                "mlp.experts.local_experts.12.linear_fc1.weight",
                "7.mlp.experts.linear_fc1.weight12",
            )
        ),
    ],
)
def test_names(stored: str, ours: str) -> None:
    assert name_in_ours(stored, is_moe=True) == ours


def test_a_dense_models_norm_has_the_name_of_its_linear_layer() -> None:
    fused = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert name_in_ours("decoder.layers.pre_mlp_layernorm.weight", is_moe=False) == fused
    assert name_in_ours(fused, is_moe=False) == fused


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a tensor is missing": (lambda a: a.update(num_layers=3), r"has shape \[2, .*but .*run_config\.yaml asks for \[3"),
    "another model": (lambda a: a.update(num_moe_experts=None), "unknown; only models of supported families"),
    "no norms": (lambda a: a.update(qk_layernorm=False), "none of Qwen3, Qwen3-MoE, Qwen2.5 and Llama"),
    "tied": (lambda a: a.update(share_embeddings_and_output_weights=True), "has a separate LM head, but .* ties it"),
    "another activation": (lambda a: a.update(activation_func={"_target_": "torch.nn.functional.gelu"}), "only silu"),
    "a shared expert": (
        lambda a: a.update(moe_shared_expert_intermediate_size=8),
        "moe_shared_expert_intermediate_size is '8', and only None or 0 is supported",
    ),
    "dense layers": (lambda a: a.update(moe_layer_freq=[0, 1]), r"moe_layer_freq is \[0, 1\]: some layers"),
    "another router": (
        lambda a: a.update(moe_router_load_balancing_type=["sinkhorn"]),
        "moe_router_load_balancing_type is sinkhorn",
    ),
    "LayerNorm": (lambda a: a.pop("normalization"), "normalization is 'LayerNorm', and only 'RMSNorm'"),
    "no size": (lambda a: a.pop("hidden_size"), "hidden_size is None, not a count"),
    "a text": (lambda a: a.update(rotary_base="x"), "rope_theta"),
    "positions of another kind": (lambda a: a.update(rope_scaling={"rope_type": "yarn"}), "rope_scaling is .*yarn"),
    "a vocabulary of nothing": (lambda a: a.update(vocab_size=0), "the size of its vocabulary is 0, not a count"),
    "another vocabulary": (lambda a: a.update(vocab_size=20), "64 rows, which is not the vocabulary of 20"),
    "too few rows": (lambda a: a.update(vocab_size=65), "64 rows, too few for the vocabulary of 65"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_is_one_line_and_nothing_is_written(case: str, bridge: Path, tmp_path: Path) -> None:
    change, message = WRONG[case]
    edit(settings(bridge), change)
    with pytest.raises(UserError, match=message):
        convert(bridge, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bridge"]


def test_a_config_json_must_agree_with_the_settings(bridge: Path, tmp_path: Path) -> None:
    """--hf-model gives what the checkpoint lacks, and is checked against what it has."""
    with open_megatron(bridge) as model:
        config = model.config
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(UserError, match=r"rope_theta is 10000\.0, but 500000\.0"):
        convert(bridge, tmp_path / "out", "--hf-model", str(hf))
    settings(bridge).unlink()
    with pytest.raises(UserError, match=r"stored no settings of the model .*--hf-model"):
        convert(bridge, tmp_path / "out")
    release = convert(bridge, tmp_path / "out", "--hf-model", str(hf), "--vocab-size", "62")
    assert read_json(release / "hf" / "config.json", "it")["vocab_size"] == 62


def test_other_formats_are_called_by_name(bridge: Path, tmp_path: Path) -> None:
    old = tmp_path / "old" / "iter_0000100" / "mp_rank_00_000"
    old.mkdir(parents=True)
    (old / "model_optim_rng.pt").touch()
    with pytest.raises(UserError, match=r"another format .*mp_rank.*--ckpt-convert-format torch_dist"):
        convert(tmp_path / "old", tmp_path / "out")
    archive = tmp_path / "model.nemo"
    archive.touch()
    with pytest.raises(UserError, match=r"NeMo 1's \.nemo files"):
        convert(archive, tmp_path / "out")
    (tmp_path / "bridge-unfinished").touch()
    with pytest.raises(UserError, match="is incomplete"):
        convert(bridge, tmp_path / "out")


def test_the_tokenizer_beside_the_tensors_says_the_vocabulary(forms: dict[str, Path], tmp_path: Path) -> None:
    """NeMo records no size here; the mask token needs a row that no token has, and there is padding."""
    nemo = Path(shutil.copytree(source(forms["0_19_2"], "nemo"), tmp_path / "nemo"))
    tokenizer = nemo / "context" / "nemo_tokenizer"
    tokenizer.mkdir()
    tokens = {"model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(58)}, "merges": []}, "added_tokens": []}
    (tokenizer / "tokenizer.json").write_text(json.dumps(tokens))
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "t3"}')
    flags = ["--megatron", str(nemo), "--out", str(tmp_path / "out"), "--no-verify"]
    with pytest.raises(UserError, match=r"uses all 58 ids .*keep a row of the padding for it: --vocab-size 59"):
        convert_megatron.main(flags)
    convert_megatron.main([*flags, "--vocab-size", "59"])
    hf = resolve(tmp_path / "out") / "hf"
    config = read_json(hf / "config.json", "it")
    assert (config["vocab_size"], config["mask_token_id"], config["eos_token_id"]) == (59, 58, 3)
    assert (hf / "tokenizer.json").exists()
    # A config.json without a tokenizer does not hide the checkpoint's own.
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert_megatron.main([*flags[:3], str(tmp_path / "again"), "--no-verify", "--hf-model", str(tmp_path / "hf")])
    assert (resolve(tmp_path / "again") / "hf" / "tokenizer.json").exists()
    (tokenizer / "tokenizer.json").write_text(json.dumps(tokens | {"model": {"vocab": {"a": 0, "b": 20}}}))
    with pytest.raises(UserError, match="64 rows, which is not the vocabulary of 21 with Megatron's padding"):
        convert_megatron.main([*flags[:3], str(tmp_path / "other")])


def test_the_mask_token_of_a_diffusion_model_stays(bridge: Path, tmp_path: Path) -> None:
    """That of --hf-model, as in convert_hf."""
    with open_megatron(bridge) as model:
        config = model.config
    trained = {"model_type": "rnd1", "architectures": ["RND1"], "mask_token_id": 57}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | trained))
    with pytest.raises(UserError, match=r"--mask-token-id 59: .* was trained with 57"):
        convert(bridge, tmp_path / "out", "--hf-model", str(tmp_path / "hf"))
    assert not (tmp_path / "out").exists()


def test_a_diffusion_model_of_ours_is_not_converted_again(
    converted: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(converted["0_19_2", "lm"], tmp_path / "iter_0000010"))
    (run / "run.json").write_text(json.dumps(build({}).to_dict()))
    with pytest.raises(UserError, match="is a diffusion model's checkpoint of this project"):
        convert(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["bridge", "nemo"])
def test_a_tokenizer_is_the_checkpoints_own(form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    """No link to files elsewhere, which would be copied."""
    path = Path(shutil.copytree(source(forms["0_16_1"], form), tmp_path / form))
    place = settings(path).with_name("tokenizer" if form == "bridge" else "nemo_tokenizer")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "tokenizer.json").write_text("{}")
    place.symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"tokenizer: is a link to .*outside the directory"):
        convert(path, tmp_path / "out", *SIZE.get(form, ()))
    assert not (tmp_path / "out").exists()
