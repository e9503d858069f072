"""LMDeploy's configuration, loader and modules on a CPU: `lmdeploy_client.py EXPORT BLOCK_LENGTH TOKENS OUT`.

Runs in a process of its own, with LMDeploy and a transformers in front of the path. Stood in for: the kernels of
attention and of experts, by their formulas.
"""

import sys
import types

import torch
import torch.nn.functional as F
from lmdeploy.pytorch import config as lmdeploy_config
from lmdeploy.pytorch.backends import selector
from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
from lmdeploy.pytorch.backends.default.op_backend import DefaultOpsBackend
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec
from lmdeploy.pytorch.model_inputs import BuildModelContext
from lmdeploy.pytorch.models.patch import build_patched_model
from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights


class Attention:
    def __init__(self, spec):
        self.spec = spec

    def forward(self, query, key, value, *caches, **options):
        length, block = query.shape[0], self.spec.block_sparse_size
        blocks = torch.arange(length) // block
        groups = self.spec.num_heads // self.spec.num_kv_heads
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, blocks[None] <= blocks[:, None])
        return mixed[0].transpose(0, 1)


class Experts:
    def __init__(self, spec):
        self.spec = spec

    def update_weights(self, gate_up, down):
        return gate_up, down

    def ep_expert_list(self, world_size, rank):
        return list(range(self.spec.num_experts))

    def forward(self, x, weights, chosen, gate_up, down, *rest, **options):
        if self.spec.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token, (row, experts) in enumerate(zip(weights, chosen, strict=True)):
            for weight, expert in zip(row, experts, strict=True):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                out[token] += weight * (down[expert] @ (F.silu(gate) * up))
        return out


class Backend(DefaultOpsBackend):
    @classmethod
    def build_op(cls, spec, **options):
        for kind, stand_in in ((PagedAttentionBuildSpec, Attention), (FusedMoEBuildSpec, Experts)):
            if isinstance(spec, kind):
                return stand_in(spec)
        return super().build_op(spec, **options)


def main() -> None:
    directory, block_length, tokens, out = sys.argv[1:]
    lmdeploy_config.is_bf16_supported = lambda *_: True  # asks CUDA
    selector._get_backend = lambda: Backend
    config = lmdeploy_config.ModelConfig.from_pretrained(directory, trust_remote_code=True)
    facts = {"mask": config.dllm_mask_token, "paradigm": config.model_paradigm, "theta": config.hf_config.rope_theta}
    config.dtype = torch.float32
    config.hf_config.dllm_block_length = int(block_length)
    context = BuildModelContext(dllm_config=lmdeploy_config.DLLMConfig(block_length=int(block_length)))
    model = build_patched_model(config, device=torch.device("cpu"), build_model_ctx=context)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_model_weights(model, directory, device=torch.device("cpu"))
    facts["unset"] = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    caches = [(None, None)] * config.num_layers
    metadata, logits = types.SimpleNamespace(quant_policy=0), []
    for row in torch.load(tokens):
        places = torch.arange(len(row))[None]
        with torch.inference_mode():
            hidden = model(input_ids=row[None], position_ids=places, past_key_values=caches, attn_metadata=metadata)
            logits.append(model.get_logits(hidden)[0])
    torch.save((facts, torch.stack(logits)), out)


main()
