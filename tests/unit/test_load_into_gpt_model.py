"""Our checkpoints in megatron.core's own GPTModel, by its own loader: names, values, logits; and what Bridge asks for.

The weights are those of tests/fixtures/write_megatron_checkpoints.py; layers are megatron.core's local ones, since
Transformer Engine's need a GPU. Their norms in front of experts have a name that no other layers have: see below.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException

from checkpoints_tools import convert_megatron
from megatron_a2d.checkpoint.bridge_config import run_config, write_run_config
from megatron_a2d.checkpoint.directory import TRACKER, resolve
from megatron_a2d.checkpoint.tensor_rows import RowRange
from megatron_a2d.checkpoint.torch_dist_reader import open_torch_dist
from megatron_a2d.config.model_config import model_config_from_hf, read_model_config
from megatron_a2d.conversion.megatron_settings import config_of, read_recorded
from tests import tiny
from tests.fixtures.write_megatron_checkpoints import VOCAB_SIZE, build, logits_of, value_of

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "megatron_forms_0_19_2.tar.xz"
FORMS = ("lm", "bridge", "nemo")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our checkpoint of each form, and under forms/ what it was converted from."""
    root = tmp_path_factory.mktemp("ours")
    with tarfile.open(ARCHIVE) as file:
        file.extractall(root, filter="data")
    for form in FORMS:
        paths = ["--megatron", str(root / "forms" / form), "--out", str(root / form)]
        convert_megatron.main([*paths, "--mask-token-id", "59", "--vocab-size", str(VOCAB_SIZE), "--no-verify"])
    return root


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # First, as in the other tests' processes: those that forbid unpickling could not import it after megatron.core's.
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM  # noqa: F401

    from megatron_a2d import megatron_compat

    megatron_compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def load(model: Any, directory: Path) -> None:
    """As Megatron-LM and Bridge do it."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory))
    model.load_state_dict(loaded["model"])


def local_layers(form: str) -> Any:
    """megatron.core's local layers; a norm in front of experts under the name that Transformer Engine's layers use."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    is_moe = form == "bridge"
    spec = get_gpt_layer_local_spec(4 if is_moe else None, qk_layernorm=form != "nemo", normalization="RMSNorm")
    if is_moe:
        names = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {
            name: stored for name, stored in names.items() if name != "pre_mlp_layernorm."
        }
    return spec


@pytest.mark.parametrize("form", FORMS)
def test_gpt_model_loads_them_bitwise_and_computes_its_logits(form: str, ours: Path, one_process: None) -> None:
    model = build(form, local_layers(form))
    load(model, resolve(ours / form))
    for name, parameter in model.named_parameters():
        rows = VOCAB_SIZE if parameter.shape[0] == 64 else None
        assert torch.equal(parameter.data[:rows], value_of(name, parameter.shape)[:rows]), name
    expected = load_file(ours / "forms" / f"{form}.safetensors")["logits"]
    found = logits_of(model)
    assert (found - expected).abs().max() < 1e-5
    with torch.no_grad():  # control
        model.decoder.layers[1].self_attention.linear_proj.weight[0, 0] += 1
    assert (logits_of(model) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["lm", "bridge"])
def test_what_was_trained_loads_too(form: str, ours: Path, one_process: None, tmp_path: Path) -> None:
    """Weights after two steps, in a checkpoint with optimizer state; as the reader of our own exports finds them."""
    tiny.write_tokens(tmp_path / "tokens", 20, 50, seed=0)
    settings = {
        "load": ours / form, "save": tmp_path / "run", "train-data-path": tmp_path / "tokens", "seq-length": 16,
        "train-iters": 2, "lr-warmup-iters": 0, "global-batch-size": 2, "micro-batch-size": 2, "lr": 0.01,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_a2d.train", *flags, "--no-verify-tokenizer"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model = build(form, local_layers(form))
    load(model, resolve(tmp_path / "run"))
    weight = model.decoder.layers[1].self_attention.linear_proj.weight
    with open_torch_dist(resolve(tmp_path / "run")) as stored, open_torch_dist(resolve(ours / form)) as before:
        rows = RowRange("decoder.layers.self_attention.linear_proj.weight", (1,), 0, weight.shape[0])
        assert torch.equal(weight.data, stored.read(rows)) and not torch.equal(weight.data, before.read(rows))


def test_only_local_layers_with_experts_ask_for_another_name(ours: Path, one_process: None) -> None:
    """megatron.core's own inconsistency, seen in 0.16.1 and 0.19.2: with experts its local layers' norm is stored under
    the name of a linear layer that they do not have, and loads from no checkpoint of Transformer Engine's layers."""
    with pytest.raises(CheckpointException, match=r"mlp\.linear_fc1\.layer_norm_weight"):
        load(build("bridge"), resolve(ours / "bridge"))


@pytest.mark.parametrize("form", FORMS)
def test_bridge_finds_what_it_asks_for(form: str, ours: Path) -> None:
    """The same settings come back, from a file of the form that Bridge writes and reads."""
    release = resolve(ours / form)
    assert (ours / form / TRACKER).read_text() == "release\n"  # Bridge reads it where there is no latest_train_state.pt
    content = yaml.safe_load((release / "run_config.yaml").read_text())
    assert content["model"]["_target_"] == "megatron.bridge.models.gpt_provider.GPTModelProvider"
    assert content["checkpoint"] == {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    assert content["model"]["params_dtype"] == {"_target_": "torch.float32", "_call_": False}
    recorded = read_recorded(release)
    assert recorded is not None
    again = model_config_from_hf(config_of(recorded, VOCAB_SIZE, "float32"), "again")
    expected = dataclasses.replace(read_model_config(release / "hf"), mask_token_id=None)
    assert again == expected


def test_llama3_positions_are_expressed_and_yarn_has_no_file(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = tiny.hub_config("llama3") | {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}}
    model = run_config(model_config_from_hf(config, "config"), torch.bfloat16)["model"]
    assert (model["rope_scaling"], model["rope_scaling_factor"], model["bf16"]) == (True, 32.0, True)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    others = (yarn, scaling | {"original_max_position_embeddings": 16}, None)
    for rope, is_written in zip(others, (False, False, True), strict=True):
        content = tiny.hub_config("llama3") | {"rope_scaling": rope}
        (tmp_path / "config.json").write_text(json.dumps(content))
        write_run_config(tmp_path, tmp_path, torch.bfloat16)
        assert (tmp_path / "run_config.yaml").exists() == is_written
