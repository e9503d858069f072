"""Architecture of a model of a supported family (families/), read from a Hugging Face `config.json`.

Both spellings are read: the hub's (`rope_theta`, `num_experts`) and those of transformers 5 (`rope_parameters`,
`num_local_experts`). Anything that is not implemented is an error, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a2d.config.rotary import RopeScaling, agreed, is_positive, read_rotary
from megatron_a2d.families.registry import Kind, kind_of, read_config
from megatron_a2d.utils.errors import UserError

# A hundred times the sizes of any published model. Otherwise a few bytes could request unlimited names and layers.
MOST = {"num_hidden_layers": 10_000, "num_experts": 65_536}
MOST_EXPERTS = 1_000_000  # of all layers together


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model. Sizes are counts of elements; `num_experts` is 0 for a dense model."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    initializer_range: float = 0.02
    mask_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    add_qkv_bias: bool = False
    qk_layernorm: bool = True

    @property
    def context_length(self) -> int:
        """Maximum number of positions; that of YaRN if `max_position_embeddings` was not raised."""
        return max(self.max_position_embeddings, self.rope_scaling.extended_length if self.rope_scaling else 0)

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def has_role(self, role: str) -> bool:
        """Whether the model has parameters of this role (config.ROLES); a tied LM head counts as embedding."""
        return {"router": self.is_moe, "head": not self.tie_word_embeddings}.get(role, True)

    def num_parameters(self) -> int:
        """All parameters, with a tied LM head counted once."""
        return self._weights(self.num_experts)

    def num_active_parameters(self) -> int:
        """Parameters active for a token: `num_experts_per_tok` of the experts."""
        return self._weights(self.num_experts_per_tok)

    def _weights(self, experts: int) -> int:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * (2 * heads + 2 * groups)
        attention += self.head_dim * (heads + 2 * groups) if self.add_qkv_bias else 0
        attention += 2 * self.head_dim if self.qk_layernorm else 0
        if self.is_moe:
            mlp = self.hidden_size * (3 * self.moe_intermediate_size * experts + self.num_experts)
        else:
            mlp = 3 * self.hidden_size * self.intermediate_size
        layers = self.num_layers * (attention + mlp + 2 * self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + embeddings + self.hidden_size


def read_model_config(directory: str | Path) -> ModelConfig:
    """The architecture of the Hugging Face model in `directory`."""
    return model_config_from_hf(read_config(Path(directory)), str(Path(directory) / "config.json"))


def model_config_from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """Raises UserError with every problem of `config`; `where` names its file."""
    kind = kind_of(config, where)
    if config.get("quantization_config") or config.get("compression_config"):
        raise UserError(f"{where}: {quantised(_method(config))}")
    read = _Reader(config, where, kind)
    num_heads, hidden_size = read.size("num_attention_heads"), read.size("hidden_size")
    max_position_embeddings = read.size("max_position_embeddings", default=32768)
    rotary = read_rotary(config, where, max_position_embeddings, read.problems, kind)
    model_config = ModelConfig(
        num_layers=read.size("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=read.size("num_key_value_heads", default=num_heads),
        head_dim=read.size("head_dim", default=max(1, hidden_size // num_heads)),
        intermediate_size=read.size("intermediate_size"),
        vocab_size=read.size("vocab_size"),
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=rotary.theta,
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        initializer_range=read.number("initializer_range", 0.02),
        mask_token_id=_mask_token_id(config, kind),
        rope_scaling=rotary.scaling,
        add_qkv_bias=read.flag("add_qkv_bias", kind.family.add_qkv_bias),
        qk_layernorm=read.flag("qk_layernorm", kind.family.qk_layernorm),
        **_experts(read, kind),
    )
    problems = read.problems + _unsupported(config, model_config, where, kind)
    if problems:
        raise UserError(problems)
    return model_config


def _experts(read: _Reader, kind: Kind) -> dict[str, Any]:
    """The settings of a mixture of experts; none for a dense model."""
    is_moe = kind.model_type.is_moe
    if is_moe is None:
        is_moe = any(read.config.get(key) for key in kind.spellings("num_experts"))
    if not is_moe:
        return {}
    sizes = {name: read.size(name) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    return {**sizes, "norm_topk_prob": read.flag("norm_topk_prob", kind.family.norm_topk_prob)}


class _Reader:
    """Settings of a config.json in its family's spellings. Lines about invalid ones collect in `problems`."""

    def __init__(self, config: dict[str, Any], where: str, kind: Kind):
        self.config, self._where, self._kind = config, where, kind
        self.problems: list[str] = []

    def _get(self, name: str, default: Any = None) -> Any:
        keys = self._kind.spellings(name)
        found = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        if found:
            return agreed(found, self._where, self.problems)
        value = self._kind.absent(name, default, self.config)
        if value is None:
            self._problem(name, "is missing; use the config.json that belongs to the weights")
            return 1
        return value

    def _problem(self, name: str, what: str) -> None:
        self.problems.append(f"{self._where}: {self._kind.spellings(name)[0]} {what}")

    def size(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self._problem(name, f"is {value!r}, not a positive whole number; correct the file")
            return 1
        if value > (most := MOST.get(name, 2**31 - 1)):
            self._problem(name, f"is {value}, more than the {most:,} that are supported; correct the file")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if not is_positive(value):
            self._problem(name, f"is {value!r}, not a positive number; correct the file")
            return default
        return float(value)

    def flag(self, name: str, constant: bool | None = None) -> bool:
        """`constant`: the family's only value."""
        if constant is not None:
            return constant
        key = self._kind.spellings(name)[0]
        value = self._get(name, default=self._kind.model_type.absent.get(key, False)) or False
        if not isinstance(value, bool):
            self._problem(name, f"is {value!r}, neither true nor false; correct the file")
        return bool(value)


def _mask_token_id(config: dict[str, Any], kind: Kind) -> Any:
    """The id in the file, which is checked later; else the family's."""
    found = config.get("mask_token_id")
    return found if found is not None or kind.family.diffusion is None else kind.family.diffusion.mask_token_id


def quantised(how: str) -> str:
    """Error text for a model whose weights are quantised by the method `how`."""
    return (
        f"its weights are quantised ({how}), and only bfloat16, float16 and float32 can be converted and trained; "
        "use the original unquantised model, or save it dequantised"
    )


def _method(config: dict[str, Any]) -> str:
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method") or settings.get("format") if isinstance(settings, dict) else None
    return str(method or "quantization_config")[:40]


def _unsupported(config: dict[str, Any], model_config: ModelConfig, where: str, kind: Kind) -> list[str]:
    problems = []
    unmodified = f"use an unmodified {kind.family.title}"
    mask = model_config.mask_token_id
    if mask is not None and (not isinstance(mask, int) or not 0 <= mask < model_config.vocab_size):
        problems.append(
            f"{where}: mask_token_id is {mask!r}, not a token id (0 to {model_config.vocab_size - 1}); "
            "convert the model again with checkpoints_tools.convert_hf"
        )
    if model_config.num_attention_heads % model_config.num_key_value_heads:
        problems.append(
            f"{where}: num_attention_heads {model_config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {model_config.num_key_value_heads}; correct the file"
        )
    if (experts := model_config.num_layers * model_config.num_experts) > MOST_EXPERTS:
        problems.append(f"{where}: has {experts:,} experts, more than the {MOST_EXPERTS:,} supported; correct the file")
    if model_config.num_experts_per_tok > model_config.num_experts:
        problems.append(
            f"{where}: num_experts_per_tok {model_config.num_experts_per_tok} exceeds "
            f"num_experts {model_config.num_experts}; correct the file"
        )
    for key, value in kind.family.fixed.items():
        found = config.get(key) if key in config else kind.model_type.absent.get(key)
        if found is not None and found != value:
            problems.append(f"{where}: {key} is {found!r}, and only {value!r} is supported; {unmodified}")
    for key, value in {"layer_types": "full_attention", **kind.family.per_layer}.items():
        if (layers := config.get(key)) is not None and layers != [value] * model_config.num_layers:
            problems.append(f"{where}: {key} is {str(layers)[:60]}, and only {value} in each of the "
                            f"{model_config.num_layers} layers is supported; {unmodified}")  # fmt: skip
    if config.get("per_layer_config"):
        problems.append(f"{where}: per_layer_config sets individual layers differently; {unmodified}")
    types = {key: str(config[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if config.get(key)}
    agreed(types, where, problems)
    return problems
