"""SDAR's public modelling and generation code on a CPU: `sdar_client.py DIRECTORY CHECKOUT BLOCK_LENGTH PROMPTS NEW OUT`.

DIRECTORY: an export whose Python files are SDAR's. Runs in a process of its own, with a transformers that SDAR's code
takes in front of the path. Stood in for: flash-attn, by its formulas; draws, by the most likely token.
"""

import ast
import json
import sys
import types
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers


def install_flash_attn() -> None:
    def attention(query, key, value, *_, causal=False, softmax_scale=None, **options):
        groups = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
        heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    def rms_norm(x, weight, bias=None, eps=1e-6, **options):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    import importlib.machinery

    for name, contents in {
        "flash_attn": {"flash_attn_func": attention, "flash_attn_varlen_func": attention},
        "flash_attn.ops": {}, "flash_attn.ops.triton": {}, "flash_attn.ops.triton.layer_norm": {"rms_norm_fn": rms_norm},
        "flash_attn.bert_padding": dict.fromkeys(("index_first_axis", "pad_input", "unpad_input")),
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module


def functions_of(script: Path) -> dict:
    """The functions of SDAR's generate.py; as a script it stops at an undefined name."""
    tree = ast.parse(script.read_text())
    kept = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    found: dict = {}
    exec(compile(ast.Module(kept, []), str(script), "exec"), found)
    return found


def main() -> None:
    directory, checkout, block_length, prompts, new, out = sys.argv[1:]
    install_flash_attn()
    if not hasattr(transformers.utils, "LossKwargs"):
        transformers.utils.LossKwargs = typing.TypedDict("LossKwargs", {}, total=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, torch_dtype=torch.float32
    ).eval()
    torch.multinomial = lambda probabilities, num_samples, **_: probabilities.argmax(-1, keepdim=True)
    generate = functions_of(Path(checkout) / "generate.py")["block_diffusion_generate"]
    length = int(block_length)
    texts = []
    for prompt in json.loads(prompts):
        made = generate(
            model, {"input_ids": torch.tensor([prompt])}, mask_id=model.config.mask_token_id, gen_length=int(new),
            block_length=length, denoising_steps=length, remasking_strategy="low_confidence_static",
        )  # fmt: skip
        texts.append(made[0].tolist())
    torch.save(texts, out)


main()
