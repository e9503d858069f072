"""Turn a Hugging Face Qwen3 or Qwen3-MoE model into a checkpoint that training loads in any layout.

    python -m checkpoints_tools.convert_hf --hf Qwen/Qwen3-30B-A3B-Base --out checkpoints/qwen3-30b-a3b

Nothing but weights is converted, and no value changes unless --dtype asks for it.
"""

from __future__ import annotations

from pathlib import Path

from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point, human


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m checkpoints_tools.convert_hf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hf", required=True, metavar="DIR|HUB_ID", help="the model to convert")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the checkpoint to write; must be new")
    parser.add_argument(
        "--mask-token-id",
        type=int,
        metavar="ID",
        help="token that stands for a masked position; by default the first that the tokenizer leaves unused",
    )
    parser.add_argument("--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="type to store")
    options = parser.parse_args(argv)

    from megatron_a2d.conversion.convert import convert
    from megatron_a2d.conversion.hub import find_model
    from megatron_a2d.conversion.rows import DTYPES

    model = find_model(options.hf)
    done = convert(model.directory, options.out, options.mask_token_id, DTYPES.get(options.dtype), model.hub_id)
    types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in done.dtypes))
    print(
        f"{done.directory}: {human(done.architecture.num_parameters())} parameters, "
        f"{human(done.num_bytes, 'B')} of {types}, mask token {done.mask_token_id}"
    )


if __name__ == "__main__":
    entry_point(main)
