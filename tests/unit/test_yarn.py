"""YaRN: training, streamed verification and exports against transformers, and what a config.json may say of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM, rotary_angles
from megatron_a2d.hf.modeling_rnd import RND1LM
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests import tiny

QWEN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SHORT: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "as Qwen's cards say": QWEN,
    "short": SHORT,
    "the old spelling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64},
    "the length is that of the model": {"rope_type": "yarn", "factor": 2.0},
    "temperature": {**SHORT, "attention_factor": 1.3},
    "mscale": {**SHORT, "mscale": 0.7, "mscale_all_dim": 1.4},
    "mscale alone": {**SHORT, "mscale": 0.7},
    "mscale of zero": {**SHORT, "mscale": 1.0, "mscale_all_dim": 0},
    "other bounds, not rounded": {**SHORT, "beta_fast": 8, "beta_slow": 2, "truncate": False},
    "factor 1": {**SHORT, "factor": 1.0},
    "all is slowed": {**SHORT, "original_max_position_embeddings": 4},
    "nothing is slowed": {**SHORT, "original_max_position_embeddings": 10**9, "beta_fast": 1.5},
}


def model_config(scaling: Any, **changes: Any) -> ModelConfig:
    return model_config_from_hf(tiny.hub_config("dense", rope_scaling=scaling, **changes), "config.json")


def of_transformers(scaling: dict[str, Any]) -> tuple[torch.Tensor, float]:
    config = tiny.hub_config("dense", rope_scaling=dict(scaling))
    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    return ROPE_INIT_FUNCTIONS["yarn"](Qwen3Config(**known), torch.device("cpu"))


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_temperature_are_those_of_transformers(name: str) -> None:
    from megatron_a2d import megatron_compat
    from megatron_a2d.model.diffusion_lm import rotary_embedding

    megatron_compat.install()
    found = model_config(SCALINGS[name])
    frequencies, temperature = of_transformers(SCALINGS[name])
    assert found.rope_scaling and found.rope_scaling.attention_factor == pytest.approx(temperature, rel=1e-12)
    angles = rotary_embedding(found)(7, packed_seq=True)[0][6, 0, 0]
    assert torch.allclose(angles, (6 * frequencies).repeat(2), rtol=1e-6, atol=0)
    config = A2DConfig(
        head_dim=found.head_dim, max_position_embeddings=512, rope_scaling=found.rope_scaling.to_rope_scaling()
    )
    assert config.rope_scaling["attention_factor"] == pytest.approx(temperature, rel=1e-12)
    exported_angles = rotary_angles(torch.tensor([[6]]), config)[0, 0, 0]
    assert torch.allclose(exported_angles, 6 * frequencies, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each family with YaRN of a length that 64 positions exceed, and dense without."""
    root = tmp_path_factory.mktemp("yarn")
    for kind in ("dense", "moe", "qwen2", "llama"):
        tiny.write_hf(root / kind, kind, rope_scaling=SHORT)
    tiny.write_hf(root / "plain", "dense")
    return root


def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 96), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def transformers_logits(directory: Path) -> torch.Tensor:
    """Bidirectional, of the class that transformers has for the files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model(tokens(), attention_mask=torch.ones(2, 1, 96, 96, dtype=torch.bool)).logits


FORMATS = {
    "dense": ("a2d", "qwen3"),
    "moe": ("a2d", "qwen3", "rnd1"),
    "qwen2": ("a2d", "qwen2"),
    "llama": ("a2d", "llama"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_streamed_logits_and_those_of_an_export(kind: str, models: Path, tmp_path: Path) -> None:
    expected = transformers_logits(models / kind)
    with open_hf(models / kind) as weights:
        assert (StreamedModel(weights).logits(tokens()) - expected).abs().max() <= 2e-5
        cold = dataclasses.replace(weights.model_config.rope_scaling, attention_factor=1.0)  # type: ignore[type-var]
        for wrong in (None, cold, dataclasses.replace(cold, factor=1.0)):
            other = weights._replace(model_config=dataclasses.replace(weights.model_config, rope_scaling=wrong))
            assert (StreamedModel(other).logits(tokens()) - expected).abs().max() > 1e-2, wrong
    for form in FORMATS[kind]:
        directory = tmp_path / form
        export(models / kind, directory, form)
        if form not in ("a2d", "rnd1"):
            actual = transformers_logits(directory)
        else:
            model = {"a2d": A2DForMaskedLM, "rnd1": RND1LM}[form].from_pretrained(directory, dtype=torch.float32)
            with torch.no_grad():
                actual = model.eval()(tokens()).logits
            model.save_pretrained(tmp_path / "again")
            saved = json.loads((tmp_path / "again" / "config.json").read_text())
            assert "rope_parameters" not in saved and saved["rope_scaling"]["factor"] == 4.0
            model.config.rope_scaling = None
            with torch.no_grad():
                assert (model(tokens()).logits - expected).abs().max() > 1e-2
        assert (actual - expected).abs().max() <= 2e-5, form


def export(hf: Path, directory: Path, form: str) -> None:
    """The export of a converted model."""
    from checkpoints_tools import convert_hf, export_hf

    checkpoint = directory.with_name("checkpoint")
    if not checkpoint.exists():
        convert_hf.main(["--hf-model", str(hf), "--out", str(checkpoint)])
    export_hf.main(["--checkpoint", str(checkpoint), "--out", str(directory), "--format", form])
    config, source = (json.loads((path / "config.json").read_text()) for path in (directory, hf))
    assert config["rope_scaling"] == SHORT and "rope_parameters" not in config
    assert config["rope_theta"] == source["rope_theta"]


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "scaled and not": (
        {"rope_scaling": SHORT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ("rope_scaling", "rope_parameters"),
    ),
    "two factors": (
        {"rope_scaling": SHORT, "rope_parameters": {**SHORT, "factor": 2.0, "rope_theta": 1e6}},
        ("rope_scaling", "rope_parameters"),
    ),
    "two lengths": (
        {"rope_scaling": SHORT, "original_max_position_embeddings": 128},
        ("original_max_position_embeddings", "rope_scaling.original_max_position_embeddings"),
    ),
    "two kinds": ({"rope_scaling": {**SHORT, "type": "linear"}}, ("rope_type", "type")),
    "two bases": (
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ("rope_theta", "rope_parameters.rope_theta"),
    ),
    "a base in the scaling": (
        {"rope_theta": 1e6, "rope_scaling": {**SHORT, "rope_theta": 5e6}},
        ("rope_theta", "rope_scaling.rope_theta"),
    ),
    "a base that transformers loses": (
        {"rope_theta": None, "rope_scaling": SHORT, "rope_parameters": {**SHORT, "rope_theta": 1e6}},
        ("rope_parameters", "rope_scaling"),
    ),
    "experts": ({"num_local_experts": 4}, ("num_experts", "num_local_experts")),
    "types": ({"torch_dtype": "float32", "dtype": "bfloat16"}, ("torch_dtype", "dtype")),
    "part of the head": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    "sliding layers": ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, ("layer_types",)),
    "a layer of its own": ({"per_layer_config": {"0": {"head_dim": 8}}}, ("per_layer_config",)),
    "by layer type": ({"rope_parameters": {"full_attention": SHORT}}, ("rope_parameters",)),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_two_spellings_that_contradict_are_an_error(name: str) -> None:
    changes, named = CONTRADICTIONS[name]
    config = tiny.hub_config("moe", **changes)
    with pytest.raises(UserError) as refusal:
        model_config_from_hf(config, "config.json")
    assert len(refusal.value.problems) == 1
    assert all(key in refusal.value.problems[0] for key in named)
    if name != "by layer type":  # fails otherwise
        own = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        with pytest.raises(ValueError, match=named[0]):
            A2DConfig(**own, mask_token_id=250)


AGREEMENTS: dict[str, dict[str, Any]] = {
    "both": {"rope_scaling": SHORT, "rope_parameters": {**SHORT, "rope_theta": 1000000}},
    "transformers 5": {"rope_theta": None, "rope_scaling": None, "rope_parameters": {**SHORT, "rope_theta": 1e6}},
    "length outside": {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "yarn", "factor": 4, "finetuned": True},
    },
    "factor from the lengths": {
        "max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64, "factor": None},
    },
    "everything twice": {
        "rope_scaling": {**SHORT, "type": "yarn"}, "num_local_experts": 8, "torch_dtype": "torch.bfloat16",
        "dtype": "bfloat16", "layer_types": ["full_attention"] * 4, "partial_rotary_factor": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AGREEMENTS)
def test_spellings_that_agree_are_one_setting(name: str) -> None:
    config = tiny.hub_config("moe", **AGREEMENTS[name])
    found = model_config_from_hf(config, "config.json")
    expected = model_config(SHORT).rope_scaling
    assert (found.rope_scaling, found.rope_theta, found.num_experts) == (expected, 1e6, 8)
    own = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    for key in {"dtype", "torch_dtype"} & set(own):
        own[key] = own[key].removeprefix("torch.")  # transformers takes the short name alone
    config_class = A2DConfig(**own, mask_token_id=250)
    assert model_config_from_hf(config_class.to_dict(), "to_dict").rope_scaling == expected


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({**SHORT, "rope_type": "linear"}, "only 'yarn'"),
        ({**SHORT, "factor": 0.5}, "factor is missing or below 1"),
        ({"rope_type": "yarn"}, "factor is missing or below 1"),
        ({**SHORT, "factor": "4"}, "factor is '4'"),
        ({**SHORT, "factor": math.inf}, "factor is inf"),
        ({**SHORT, "factor": 10**400}, "factor is 1000"),
        ({**SHORT, "attention_factor": 0}, "attention_factor is 0"),
        ({**SHORT, "original_max_position_embeddings": 64.5}, "not a whole number"),
        ({**SHORT, "original_max_position_embeddings": [64]}, "not a positive number"),
        ({**SHORT, "beta_fast": 1, "beta_slow": 32}, "swap them"),
        ({**SHORT, "truncate": 1}, "neither true nor false"),
        ({**SHORT, "mrope_section": [1, 2]}, "no setting 'mrope_section'"),
        ([SHORT], "not one object"),
        (True, "not one object"),
    ],
)
def test_bad_scaling_is_one_line(scaling: Any, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        model_config(scaling)
    assert len(refusal.value.problems) == 1 and message in refusal.value.problems[0]


def test_the_context_is_the_extended_one() -> None:
    """Qwen's cards tell to set `rope_scaling` and leave max_position_embeddings as it is."""
    assert model_config(QWEN, max_position_embeddings=40960).context_length == 131072
    assert model_config(None, max_position_embeddings=40960).context_length == 40960
    assert model_config(SHORT, max_position_embeddings=40960).context_length == 40960


def test_a_plan_of_a_long_context_needs_yarn(tmp_path: Path) -> None:
    from megatron_a2d.config.settings import build
    from megatron_a2d.config.validate import find_problems

    config = build({"seq_length": 131072, "global_batch_size": 8})
    short, long = (model_config(scaling, max_position_embeddings=40960, mask_token_id=250) for scaling in (None, QWEN))
    assert [problem for problem in find_problems(config, short, 8) if "context length is 40960" in problem]
    assert not [problem for problem in find_problems(config, long, 8) if "context length" in problem]
