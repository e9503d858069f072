"""Llama 3.1's rotary scaling: frequencies of training, streamed verification and exports against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import rotary_angles
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests import tiny

SCALING: dict[str, Any] = tiny.FAMILIES["llama3"]["rope_scaling"]
SCALINGS: dict[str, dict[str, Any]] = {
    "short": SCALING,
    "of Llama 3.1": {**SCALING, "original_max_position_embeddings": 8192},
    "of Llama 3.2": {**SCALING, "factor": 32, "original_max_position_embeddings": 8192},
    "the old spelling": {"type" if key == "rope_type" else key: value for key, value in SCALING.items()},
    "other bounds": {**SCALING, "low_freq_factor": 0.5, "high_freq_factor": 9.0},
    "all is slowed": {**SCALING, "original_max_position_embeddings": 1},
    "nothing is slowed": {**SCALING, "original_max_position_embeddings": 10**9},
}


def model_config(scaling: Any, **changes: Any) -> ModelConfig:
    return model_config_from_hf(tiny.hub_config("llama3", rope_scaling=scaling, **changes), "config.json")


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    from megatron_a2d import megatron_compat
    from megatron_a2d.model.diffusion_lm import rotary_embedding

    megatron_compat.install()
    found = model_config(SCALINGS[name])
    config = tiny.hub_config("llama3", rope_scaling={**SCALINGS[name], "rope_type": "llama3"})
    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    frequencies, temperature = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**known), torch.device("cpu"))
    assert temperature == 1.0
    angles = rotary_embedding(found)(7, packed_seq=True)[6, 0, 0]
    assert torch.allclose(angles, (6 * frequencies).repeat(2), rtol=1e-6, atol=0)
    assert found.rope_scaling is not None
    exported = A2DConfig(
        head_dim=found.head_dim, rope_theta=found.rope_theta, rope_scaling=found.rope_scaling.to_rope_scaling()
    )
    assert torch.allclose(rotary_angles(torch.tensor([[6]]), exported)[0, 0, 0], 6 * frequencies, rtol=1e-6, atol=0)
    streamed = StreamedModel.__new__(StreamedModel)
    streamed._shape = found
    half = found.head_dim // 2
    ours = torch.tensor([streamed._frequency(index / half) for index in range(half)])
    assert torch.allclose(ours, frequencies, rtol=1e-6, atol=0)


def test_the_context_is_that_of_the_file() -> None:
    """Unlike YaRN's factor, 32 times 8,192 is no length that the model was made for."""
    found = model_config({**SCALING, "factor": 32.0, "original_max_position_embeddings": 8192})
    assert found.context_length == found.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({**SCALING, "factor": 0.5}, "factor is below 1"),
        ({**SCALING, "factor": "8"}, "factor is '8', not a positive number"),
        ({key: value for key, value in SCALING.items() if key != "low_freq_factor"}, "low_freq_factor is missing"),
        ({**SCALING, "high_freq_factor": 1.0}, "must exceed low_freq_factor"),
        ({**SCALING, "beta_fast": 32}, "llama3 has no setting 'beta_fast'"),
        ({**SCALING, "original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
        ({**SCALING, "original_max_position_embeddings": 64.5}, "not a whole number"),
    ],
)
def test_bad_scaling_is_one_line(scaling: Any, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        model_config(scaling)
    assert len(refusal.value.problems) == 1 and message in refusal.value.problems[0]


def test_an_export_refuses_half_a_scaling() -> None:
    with pytest.raises(ValueError, match="high_freq_factor"):
        A2DConfig(rope_theta=1e4, rope_scaling={**SCALING, "high_freq_factor": None})
