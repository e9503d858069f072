"""Benchmark of block diffusion sampling: finished blocks from the cache, against computing the whole text every time.

    python -m bench.block_sampling [--rounds 5] [--out bench/results/block_sampling_cpu.json]

Random weights, 4 layers of 512, blocks of 32, 4 tokens per forward pass, prompts that end inside a block: one text of
512 new tokens, by an exported model and by a checkpoint's model (one process), and a batch of 4 prompts of different
lengths with 128 new tokens each. Both sides of a pair must write the same texts. Ratios are above 1 where the cache is
faster.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from bench.paired import Comparison, compare, in_process
from bench.result_file import add_arguments, write
from megatron_a2d import megatron_compat
from megatron_a2d.config.cli import Parser
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.diffusion.block_diffusion import BlockModel
from megatron_a2d.diffusion.model_interface import Model
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.diffusion.sampling_options import Cache
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel
from megatron_a2d.terminal.console import entry_point

BLOCK, MASK, PER_PASS = 32, 16_383, 4
SIZES: dict[str, Any] = dict(
    vocab_size=16_384, hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    intermediate_size=1536, max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=False, mask_token_id=MASK,
)  # fmt: skip
LAYERS = 4
# name: lengths of the prompts, new tokens of each
TEXTS = {"one text": ([37], 512), "4 texts in a batch": ([5, 37, 90, 160], 128)}
SIDES: dict[str, Cache] = {"whole text": "none", "cache": "prefix"}


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    forms = {"export": exported_model(), "checkpoint": checkpoint_model()}
    compared = [
        measure(f"{form}, {name}", forms[form], name, options.rounds)
        for form, name in (("export", "one text"), ("checkpoint", "one text"), ("export", "4 texts in a batch"))
    ]
    write(options.out, "block_sampling", compared, settings=SIZES | {"layers": LAYERS, "block_length": BLOCK})


def exported_model() -> Model:
    """An export's model, run by transformers."""
    return TransformersModel(randomised(A2DForMaskedLM(A2DConfig(num_hidden_layers=LAYERS, **SIZES))))


def checkpoint_model() -> Model:
    """A checkpoint's model, run by megatron.core in this process."""
    megatron_compat.install()
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.inference.parallel_model import ParallelModel
    from megatron_a2d.training.initialization import build_model

    config = build({"objective": "block", "block_length": BLOCK, "global_batch_size": 1, "seq_length": 1024})
    process_groups.initialize(config.parallel)
    return ParallelModel(randomised(build_model(ModelConfig(num_layers=LAYERS, **SIZES), config)), config)


def randomised(model: Any) -> Any:
    """Weights so large that rounding does not decide between two tokens."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator).add_(parameter.dim() == 1)
    return model.eval()


def measure(name: str, model: Model, texts: str, rounds: int) -> Comparison:
    """Both sides in turns, and the forward passes of each text."""
    lengths, num_new = TEXTS[texts]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, MASK, (length,), generator=generator).tolist() + [MASK] * num_new for length in lengths]
    canvas = make_canvas(rows, MASK)
    written: dict[str, tuple[list[list[int]], list[int]]] = {}

    def side(label: str) -> Callable[[], None]:
        options = SamplingOptions(
            num_steps=num_new // PER_PASS, block_length=BLOCK, aligned_blocks=True, cache=SIDES[label]
        )
        blocks = BlockModel(model, MASK, BLOCK, causal_context=False)

        def run() -> None:
            sampled = denoise(blocks, canvas, MASK, options)
            written[label] = sampled.tokens.tolist(), sampled.num_forwards

        return run

    sides = {label: in_process(side(label)) for label in SIDES}
    compared = compare(name, sides, [("whole text", "cache")], rounds=rounds)
    assert written["cache"] == written["whole text"], "the cache changes the text"
    _, num_forwards = written["cache"]
    compared.figures = {"new tokens": num_new, "forward passes": max(num_forwards)}
    return compared


if __name__ == "__main__":
    entry_point(main)
