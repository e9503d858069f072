"""Exports in the form rnd1 in the hands of programs that are not ours: RND1's public package, llama.cpp's converter.

Only where they are at hand: A2D_RND1 names a checkout of the package (github.com/RadicalNumerics/RND1),
A2D_TRANSFORMERS4 a directory with transformers 4.57, A2D_LLAMA_CPP a checkout of llama.cpp.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_tools import export_hf
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.hf.modeling_rnd import RND1LM
from tests import tiny
from tests.unit.hf_tensors import tensors_of

RND1 = os.environ.get("A2D_RND1")
TRANSFORMERS4 = os.environ.get("A2D_TRANSFORMERS4")
LLAMA_CPP = os.environ.get("A2D_LLAMA_CPP")
# The package's configuration class replaces the file's sizes by RND1-Base's unless configured otherwise.
OVERWRITTEN = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


@pytest.fixture
def export(tmp_path: Path) -> Path:
    hf = tiny.write_hf(tmp_path / "hf", "moe")
    convert(hf, tmp_path / "ckpt")
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "export"), "--format", "rnd1"])
    return tmp_path / "export"


GENERATE = """
import json, sys, torch, transformers
from rnd.configuration_rnd import RND1Config
from rnd.generation_config import RND1GenerationConfig
from rnd.modeling_rnd import RND1LM
directory, out, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert transformers.__version__.startswith("4.57")
config = RND1Config.from_pretrained(directory, **sizes)
model = RND1LM.from_pretrained(directory, config=config, dtype=torch.float32).eval()
tokens = torch.load(out)
settings = dict(max_new_tokens=25, num_diffusion_steps=12, temperature=1.0, greedy=True)
ids = model.generation_config.mask_token_id, config.eos_token_id, config.pad_token_id
made = model.generate(
    inputs=tokens[:1],
    generation_config=RND1GenerationConfig(mask_token_id=ids[0], eos_token_id=ids[1], pad_token_id=ids[2], **settings),
)
with torch.no_grad():
    torch.save({"logits": model(tokens).logits, "generated": made, "mask": ids[0]}, out)
"""


@pytest.mark.skipif(not (RND1 and TRANSFORMERS4), reason="A2D_RND1 and A2D_TRANSFORMERS4 do not name their checkouts")
def test_the_public_package_loads_and_generates(export: Path, tmp_path: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    tokens_BL = torch.randint(0, tiny.NUM_TOKENS, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.save(tokens_BL, tmp_path / "result.pt")
    sizes = json.dumps({name: config[name] for name in OVERWRITTEN})
    command = [sys.executable, "-c", GENERATE, str(export), str(tmp_path / "result.pt"), sizes]
    path = os.pathsep.join(str(Path(name).resolve()) for name in (TRANSFORMERS4 or "", RND1 or ""))
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.load(tmp_path / "result.pt")
    ours = RND1LM.from_pretrained(export, dtype=torch.float32).eval()
    assert theirs["mask"] == tiny.MASK_TOKEN_ID
    with torch.no_grad():
        assert (ours(tokens_BL).logits - theirs["logits"]).abs().max() < 1e-5
    # It keeps one slot at the end for padding; the rest, in the same order, is what ours decides.
    holes_BL = torch.full((1, 24), tiny.MASK_TOKEN_ID)
    end_BL = torch.full((1, 1), config["pad_token_id"])
    canvas_BL = torch.cat([tokens_BL[:1], holes_BL, end_BL], dim=1)
    assert torch.equal(ours.generate(canvas_BL, num_steps=12), theirs["generated"])


CONVERT = """
import runpy, sys
checkout = sys.argv.pop(1)
sys.path[:0] = [checkout, checkout + "/gguf-py"]
from conversion.base import TextModel
# It knows tokenizers by a checksum of what they give, and the tests' own is none of them.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[0] = checkout + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
READ = """
import sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import gguf, torch
reader = gguf.GGUFReader(sys.argv[2])
fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.") or "mask" in name}
tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
torch.save((fields, tensors), sys.argv[3])
"""


@pytest.mark.skipif(not LLAMA_CPP, reason="A2D_LLAMA_CPP does not name a checkout of llama.cpp")
def test_llama_cpp_knows_the_architecture(export: Path, tmp_path: Path) -> None:
    checkout, gguf, out = str(Path(LLAMA_CPP or "").resolve()), str(tmp_path / "model.gguf"), str(tmp_path / "read.pt")
    for command in (
        [CONVERT, checkout, str(export), "--outfile", gguf, "--outtype", "f32"],
        [READ, checkout, gguf, out],
    ):
        done = subprocess.run([sys.executable, "-c", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    fields, found = torch.load(out, weights_only=False)
    assert fields["general.architecture"] == "rnd1" and fields["rnd1.attention.causal"] is False
    assert fields["tokenizer.ggml.mask_token_id"] == tiny.MASK_TOKEN_ID and fields["rnd1.expert_count"] == 8
    expected = tensors_of(export)
    for ours, theirs in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate", "ffn_gate_inp"),
    ):
        assert torch.equal(found[f"blk.2.{theirs}.weight"], expected[f"model.layers.2.{ours}.weight"])
    experts = torch.stack([expected[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(8)])
    assert torch.equal(found["blk.1.ffn_up_exps.weight"], experts)
