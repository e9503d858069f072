"""SGLang's configuration, modules and weight loader on a CPU: `sglang_client.py EXPORT OUT`.

Runs in a process of its own, with SGLang and a transformers in front of the path. Stood in for: packages of which it
only needs that they can be imported. The forward pass, whose kernels need a GPU, is not run.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class Names(types.ModuleType):
    """A package of which every module can be imported, and every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "tvm_ffi", "vllm"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Names(spec.name)

    def exec_module(self, module):
        pass


from transformers import AutoProcessor  # noqa: E402, F401  # while it finds no torchvision, which it would use

sys.meta_path.insert(0, Finder())

import torch  # noqa: E402
from sglang.srt.configs.device_config import DeviceConfig  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.dllm.config import DllmConfig  # noqa: E402
from sglang.srt.layers.dp_attention import initialize_dp_attention  # noqa: E402
from sglang.srt.layers.moe import initialize_moe_config  # noqa: E402
from sglang.srt.model_loader.loader import DefaultModelLoader  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402


def main() -> None:
    directory, out = sys.argv[1:]
    arguments = ServerArgs(
        model_path=directory, trust_remote_code=True, device="cpu", skip_tokenizer_init=True,
        dllm_algorithm="LowConfidence", dllm_algorithm_config=f"{directory}/sglang_dllm.yaml",
    )  # fmt: skip
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
    blocks, config = DllmConfig.from_server_args(arguments), ModelConfig.from_server_args(arguments)
    init_distributed_environment(
        world_size=1, rank=0, local_rank=0, backend="gloo", distributed_init_method=f"file://{out}.store"
    )
    initialize_model_parallel()
    initialize_dp_attention(arguments)
    initialize_moe_config()
    loader, device = DefaultModelLoader(LoadConfig()), torch.device("cpu")
    model = loader.initialize_model_for_startup(model_config=config, device_config=DeviceConfig("cpu"))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    loader.load_weights_only(model, loader._get_all_weights(config, model), device)
    facts = {
        "class": type(model).__name__, "mask": blocks.mask_id, "block": blocks.block_size,
        "theta": {layer.self_attn.rotary_emb.base for layer in model.model.layers},
        "unset": [name for name, parameter in model.named_parameters() if parameter.isnan().any()],
    }  # fmt: skip
    torch.save((facts, {name: parameter.data for name, parameter in model.named_parameters()}), out)


main()
