"""The modelling code of exports against Hugging Face's Qwen3 and Qwen3-MoE, under transformers 5 and 4.57.

Run under 4.57 by naming a directory that holds it: A2D_TRANSFORMERS4=DIR (one test then runs this file again, and
test_hf_generation.py with it).
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from megatron_a2d.hf import CODE_FILES
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.configuration_rnd import RND1Config
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM, A2DModel
from megatron_a2d.hf.modeling_rnd import RND1LM, RND1Model
from tests.unit.qwen3_exports import KINDS, MOE, SIZES, export_and_load, qwen3, tokens, write_export

REPOSITORY = Path(__file__).parents[2]
TRANSFORMERS4 = os.environ.get("A2D_TRANSFORMERS4")


@torch.no_grad()
def bidirectional(model: torch.nn.Module, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Hugging Face's logits when nothing is masked: an additive 4D mask of zeros."""
    batch, length = tokens_BL.shape
    return model(tokens_BL, attention_mask=torch.zeros(batch, 1, length, length)).logits


@torch.no_grad()
def position_errors(ours: torch.nn.Module, expected: torch.Tensor) -> torch.Tensor:
    return (ours(tokens()).logits - expected).abs().amax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_hugging_face(kind, tmp_path):
    model, ours = export_and_load(kind, tmp_path)
    assert position_errors(ours, bidirectional(model, tokens())).max() <= 1e-5
    with torch.no_grad():
        causal = model(tokens()).logits
    errors = position_errors(ours, causal)
    assert errors.min() > 1e-2, "a causal mask must break every position"


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("dense", {"rope_theta": 1e4, "rope_parameters": None}),
        ("dense", {"rms_norm_eps": 1e-2}),
        ("moe", {"norm_topk_prob": False}),
        ("moe", {"num_experts_per_tok": 3}),
    ],
)
def test_a_wrong_config_breaks_parity(kind, changes, tmp_path):
    model, ours = export_and_load(kind, tmp_path, **changes)
    assert position_errors(ours, bidirectional(model, tokens())).max() > 1e-3


def test_swapped_weights_break_parity(tmp_path):
    model, ours = export_and_load("dense", tmp_path)
    expected = bidirectional(model, tokens())
    layer = ours.model.layers[0]
    swaps = [
        (layer.mlp.gate_proj, layer.mlp.up_proj),
        (layer.self_attn.q_norm, layer.self_attn.k_norm),
        (layer.input_layernorm, layer.post_attention_layernorm),
    ]
    for first, second in swaps:
        first.weight, second.weight = second.weight, first.weight
        assert position_errors(ours, expected).max() > 1e-3
        first.weight, second.weight = second.weight, first.weight
    assert position_errors(ours, expected).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_has_the_names_of_the_hub(kind, tmp_path):
    directory = write_export(qwen3(kind), tmp_path)
    with safe_open(directory / "model.safetensors", "pt") as file:
        on_disk = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ours = A2DForMaskedLM(A2DConfig.from_pretrained(directory))
    in_memory = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    if "tied" in kind:
        assert in_memory.pop("lm_head.weight") == in_memory["model.embed_tokens.weight"]
    assert in_memory == on_disk
    assert not list(ours.named_buffers()), "a buffer would be garbage after a load without storage"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_padding_changes_nothing(kind, side, tmp_path):
    _, ours = export_and_load(kind, tmp_path)
    rows = [tokens(1, 21)[0], tokens(1, 9)[0]]
    padded_BL = torch.full((2, 21), 95)
    mask_BL = torch.zeros(2, 21, dtype=torch.long)
    places = [slice(0, len(row)) if side == "right" else slice(21 - len(row), 21) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        padded_BL[index, place], mask_BL[index, place] = row, 1
    with torch.no_grad():
        logits = ours(padded_BL, attention_mask=mask_BL).logits
        unmasked = ours(padded_BL).logits
        for index, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = ours(row[None]).logits[0]
            assert (logits[index, place] - alone).abs().max() <= 1e-5
        assert (unmasked[1, places[1]] - alone).abs().max() > 1e-3, "padding must matter without its mask"


def test_only_padding_masks_are_taken(tmp_path):
    _, ours = export_and_load("dense", tmp_path)
    with pytest.raises(ValueError, match="padding mask only"):
        ours(tokens(), attention_mask=torch.zeros(2, 1, 21, 21))
    with pytest.raises(ValueError, match="exactly one"):
        ours()


@pytest.mark.parametrize("kind, export", [("dense", "a2d"), ("dense_tied", "a2d"), ("moe", "a2d"), ("moe", "rnd1")])
def test_save_and_load(kind, export, tmp_path):
    model_class = {"a2d": A2DForMaskedLM, "rnd1": RND1LM}[export]
    first = model_class.from_pretrained(write_export(qwen3(kind), tmp_path / "first", export), dtype=torch.float32)
    first.save_pretrained(tmp_path / "second")
    second = model_class.from_pretrained(tmp_path / "second", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(first.eval()(tokens()).logits, second.eval()(tokens()).logits)
    is_tied = second.lm_head.weight is second.model.embed_tokens.weight
    assert is_tied == ("tied" in kind)
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["rope_theta"] == 1e6 and config["model_type"] == export and config["mask_token_id"] == 96
    assert config["architectures"] == {"a2d": ["A2DForMaskedLM"], "rnd1": ["RND1"]}[export]
    assert config.get("num_experts", 0) == (6 if kind == "moe" else 0)
    code_files = {path.name for path in CODE_FILES[export]}
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == code_files
    base_class = {"a2d": A2DModel, "rnd1": RND1Model}[export]
    assert type(second.model) is base_class


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_gradient_checkpointing(kind, tmp_path, monkeypatch):
    _, ours = export_and_load(kind, tmp_path)
    calls = []
    attention = type(ours.model.layers[0].self_attn)
    original = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args: calls.append(0) or original(self, *args))
    gradients = []
    for is_on in (False, True):
        ours.train()
        if is_on:
            ours.gradient_checkpointing_enable()
        calls.clear()
        ours.zero_grad()
        ours(tokens(), labels=tokens()).loss.backward()
        found = {name: parameter.grad for name, parameter in ours.named_parameters()}
        gradients.append({name: gradient.clone() for name, gradient in found.items() if gradient is not None})
        without = {name for name, gradient in found.items() if gradient is None}
        assert all(".experts." in name for name in without), "only an expert may have had no token"
        assert len(calls) == len(ours.model.layers) * (2 if is_on else 1), "layers are recomputed if it is on"
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 or ".experts." in name, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label_shift", [True, False])
def test_loss(label_shift, tmp_path):
    _, ours = export_and_load("dense", tmp_path, label_shift=label_shift)
    labels = torch.full_like(tokens(), -100)
    labels[0, 0], labels[0, 5], labels[1, 20] = 7, 11, 13
    with torch.no_grad():
        output = ours(tokens(), labels=labels)
        logp = output.logits.log_softmax(-1)
    shift = int(label_shift)
    terms = [logp[0, 5 - shift, 11], logp[1, 20 - shift, 13]] + ([] if label_shift else [logp[0, 0, 7]])
    assert float(output.loss) == pytest.approx(-float(sum(terms)) / len(terms), abs=1e-5)
    with torch.no_grad():
        as_tuple = ours(tokens(), labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


def test_config_reads_both_spellings():
    hub = A2DConfig(**SIZES | MOE | {"rope_theta": 5e5})
    renamed = {key: value for key, value in (SIZES | MOE).items() if key not in ("rope_theta", "num_experts")}
    five = A2DConfig(**renamed, num_local_experts=6, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scaled = A2DConfig(**SIZES | MOE | {"rope_theta": None}, rope_scaling={"type": "default", "rope_theta": 5e5})
    for config in (hub, five, scaled):
        assert (config.rope_theta, config.num_experts, config.num_local_experts) == (5e5, 6, 6)
        assert config.to_dict()["num_experts"] == 6 and "num_local_experts" not in config.to_dict()
    assert A2DConfig(**SIZES).num_experts == 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e6}),
    ],
)
def test_config_refuses_what_the_model_does_not_do(key, value):
    with pytest.raises(ValueError, match=value["rope_type"] if isinstance(value, dict) else key):
        A2DConfig(**SIZES, **{key: value})
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        A2DConfig(**SIZES, num_experts=4)


def test_rnd1_config_keeps_the_sizes_of_the_file():
    config = RND1Config(**SIZES | MOE, mask_token_id=96, rope_scaling=False, sliding_window=False)
    assert (config.hidden_size, config.vocab_size, config.num_experts, config.mask_token_id) == (
        32,
        97,
        6,
        96,
    )
    with torch.device("meta"):
        published = RND1LM(RND1Config())
    assert sum(parameter.numel() for parameter in published.parameters()) == 30_532_122_624
    assert len(published.state_dict()) == 18_867


def test_travelling_files_are_self_contained():
    for files in CODE_FILES.values():
        modules = {path.stem for path in files}
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and node.module in modules, (path.name, node.module)
                elif isinstance(node, ast.ImportFrom | ast.Import):
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
                    roots = {(name or "").split(".")[0] for name in names}
                    assert roots <= {"__future__", "itertools", "math", "typing", "torch", "transformers"}, (
                        path.name,
                        roots,
                    )


REMOTE = """
import sys, torch, transformers
from transformers import AutoModel, AutoModelForMaskedLM
out, *directories = sys.argv[1:]
tokens = torch.load(out)
result = {"version": transformers.__version__}
for directory in directories:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model, report = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    base = AutoModel.from_pretrained(directory, **options)
    model.save_pretrained(directory + "-again")
    again = AutoModelForMaskedLM.from_pretrained(directory + "-again", **options)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        assert torch.equal(again.eval()(tokens).logits, logits)
        assert torch.equal(model.lm_head(base.eval()(tokens).last_hidden_state), logits)
    made = model.generate(tokens, max_new_tokens=6, num_steps=3)
    assert made.shape == (len(tokens), tokens.shape[1] + 6) and not (made == model.config.mask_token_id).any()
    assert torch.equal(again.generate(tokens, max_new_tokens=6, num_steps=3), made)
    result[directory] = logits
assert "megatron_a2d" not in sys.modules
torch.save(result, out)
"""


@pytest.mark.parametrize("version", [transformers.__version__.split(".")[0], "4"] if TRANSFORMERS4 else ["any"])
def test_loads_with_trust_remote_code(version, tmp_path):
    """As a user does who has only the exported directory, in a process that cannot see this package's classes."""
    expected = {}
    for kind, export in (("dense_tied", "a2d"), ("moe", "a2d"), ("moe", "rnd1")):
        model = qwen3(kind)
        directory = write_export(model, tmp_path / f"{kind}-{export}", export)
        # The file as the hub writes it must do under both versions.
        config = json.loads((directory / "config.json").read_text())
        config.pop("rope_parameters", None)
        (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
        expected[str(directory)] = bidirectional(model, tokens())
    out = tmp_path / "result.pt"
    torch.save(tokens(), out)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if version == "4":
        environment["PYTHONPATH"] = str(TRANSFORMERS4)
    command = [sys.executable, "-c", REMOTE, str(out), *expected]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    result = torch.load(out)
    assert version in ("any", result["version"].split(".")[0])
    for directory, logits in expected.items():
        assert (result[directory] - logits).abs().max() <= 1e-5, directory


@pytest.mark.skipif(not TRANSFORMERS4, reason="A2D_TRANSFORMERS4 does not name a directory with transformers 4.57")
def test_this_file_under_transformers_4(tmp_path):
    """Gradient checkpointing, tied weights, saving: all of the above under the other major version."""
    code = """
import sys, transformers, pytest
assert transformers.__version__.startswith("4.57."), transformers.__version__
sys.exit(pytest.main(sys.argv[1:]))
"""
    elsewhere = ("test_loads_with_trust_remote_code", "test_rnd1_config_keeps_the_sizes_of_the_file")
    environment = {name: value for name, value in os.environ.items() if name != "A2D_TRANSFORMERS4"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(TRANSFORMERS4), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["--noconftest", "-q", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(elsewhere)})"]
    command = [sys.executable, "-c", code, *arguments, __file__, str(Path(__file__).with_name("test_hf_generation.py"))]
    process = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    assert process.stdout.count(".") >= 30, "the tests did not run"
