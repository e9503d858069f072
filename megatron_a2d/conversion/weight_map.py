"""The weight map between the tensors of Hugging Face models and megatron.core's global tensors.

The table has the standard names, those of Llama, Qwen2.5 and Qwen3 in transformers. A family with other names
maps them to the standard ones (families/family.py, `tensor_names`); everything but files uses the standard names.

Every matrix of a megatron tensor interleaves the rows (output features) of one or more HF tensors, its parts, by a
single rule: each part is cut into the same number of groups, and the groups follow one another, part after part.

    one group         a copy, or a concatenation: fc1 = all rows of gate_proj, then all rows of up_proj
    num_kv_heads      linear_qkv: for each KV head, the rows of its query heads, of its key, of its value

Example: Qwen3-8B has 32 query heads and 8 KV heads of size 128, so q_proj has 4096 rows, k_proj and v_proj 1024 each.
Its linear_qkv has 6144 rows in 8 groups of 4 x 128 + 128 + 128 = 768. Group 0 is q[0:512], k[0:128], v[0:128], group 1
is q[512:1024], k[128:256], v[128:256], and so on: row 1300 = 768 + 512 + 20 is row 128 + 20 = 148 of k_proj.

The rule has an exact inverse, so both directions use the same table. Nothing is transposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_a2d.checkpoint.tensor_rows import RowRange
from megatron_a2d.config.model_config import ModelConfig


@dataclass(frozen=True)
class Part:
    """An HF tensor, one letter per axis of its shape:

    V vocabulary, H hidden size, D head size, Q query rows (heads x D), K key or value rows (KV heads x D),
    E experts, F width of the MLP or of one expert, G gate and up rows of one expert (2 x F).
    """

    axes: str
    name: str


@dataclass(frozen=True)
class TensorMap:
    """A megatron tensor and the HF tensors it is made of. {layer} and {expert} in an HF name stand for one leading
    axis each of the megatron tensor, which holds all layers, and all experts, of a weight."""

    megatron: str
    parts: Sequence[Part]
    models: str = "all"  # those that have it: a key of `_HAS`
    is_grouped_by_kv_head: bool = False
    fused: Part | None = None  # the same rows in one HF tensor of all experts, as transformers 5 may write them


EMBEDDING = "embedding.word_embeddings.weight"  # the first of the table
DECODER = "decoder.layers."
LAYER = "model.layers.{layer}."
EXPERT = LAYER + "mlp.experts.{expert}."

# The order matters: tensors are written and reported in it, and WeightMap expands each run of adjacent entries with
# {layer} layer by layer, so that these must stay together.
TABLE = (
    TensorMap(EMBEDDING, [Part("VH", "model.embed_tokens.weight")]),
    TensorMap(
        DECODER + "self_attention.linear_qkv.layer_norm_weight",
        [Part("H", LAYER + "input_layernorm.weight")],
    ),
    TensorMap(
        DECODER + "self_attention.linear_qkv.weight",
        [
            Part("QH", LAYER + "self_attn.q_proj.weight"),
            Part("KH", LAYER + "self_attn.k_proj.weight"),
            Part("KH", LAYER + "self_attn.v_proj.weight"),
        ],
        is_grouped_by_kv_head=True,
    ),
    TensorMap(
        DECODER + "self_attention.linear_qkv.bias",
        [
            Part("Q", LAYER + "self_attn.q_proj.bias"),
            Part("K", LAYER + "self_attn.k_proj.bias"),
            Part("K", LAYER + "self_attn.v_proj.bias"),
        ],
        models="qkv_bias",
        is_grouped_by_kv_head=True,
    ),
    TensorMap(
        DECODER + "self_attention.q_layernorm.weight",
        [Part("D", LAYER + "self_attn.q_norm.weight")],
        models="qk_norm",
    ),
    TensorMap(
        DECODER + "self_attention.k_layernorm.weight",
        [Part("D", LAYER + "self_attn.k_norm.weight")],
        models="qk_norm",
    ),
    TensorMap(DECODER + "self_attention.linear_proj.weight", [Part("HQ", LAYER + "self_attn.o_proj.weight")]),
    # dense
    TensorMap(
        DECODER + "mlp.linear_fc1.layer_norm_weight",
        [Part("H", LAYER + "post_attention_layernorm.weight")],
        models="dense",
    ),
    TensorMap(
        DECODER + "mlp.linear_fc1.weight",
        [Part("FH", LAYER + "mlp.gate_proj.weight"), Part("FH", LAYER + "mlp.up_proj.weight")],
        models="dense",
    ),
    TensorMap(DECODER + "mlp.linear_fc2.weight", [Part("HF", LAYER + "mlp.down_proj.weight")], models="dense"),
    # MoE
    TensorMap(
        DECODER + "pre_mlp_layernorm.weight",
        [Part("H", LAYER + "post_attention_layernorm.weight")],
        models="moe",
    ),
    TensorMap(DECODER + "mlp.router.weight", [Part("EH", LAYER + "mlp.gate.weight")], models="moe"),
    TensorMap(
        DECODER + "mlp.experts.experts.linear_fc1.weight",
        [Part("FH", EXPERT + "gate_proj.weight"), Part("FH", EXPERT + "up_proj.weight")],
        models="moe",
        fused=Part("EGH", LAYER + "mlp.experts.gate_up_proj"),
    ),
    TensorMap(
        DECODER + "mlp.experts.experts.linear_fc2.weight",
        [Part("HF", EXPERT + "down_proj.weight")],
        models="moe",
        fused=Part("EHF", LAYER + "mlp.experts.down_proj"),
    ),
    TensorMap("decoder.final_layernorm.weight", [Part("H", "model.norm.weight")]),
    TensorMap("output_layer.weight", [Part("VH", "lm_head.weight")], models="untied"),
)

FUSED_PARTS = {part for entry in TABLE if entry.fused for part in entry.fused.name.split(".")}

# Modules with an `_extra_state` entry (empty unless FP8 is used) per layer, and per expert.
EXTRA_STATE = {
    DECODER + "self_attention.linear_qkv": "all",
    DECODER + "self_attention.linear_proj": "all",
    DECODER + "mlp.linear_fc1": "dense",
    DECODER + "mlp.linear_fc2": "dense",
    DECODER + "mlp.experts.experts.linear_fc1": "moe",
    DECODER + "mlp.experts.experts.linear_fc2": "moe",
    "output_layer": "all",
}


@dataclass(frozen=True)
class WeightBlock:
    """One matrix of a megatron tensor, that of (layer, expert) = `lead`, and the HF tensors it is made of."""

    key: str
    lead: tuple[int, ...]
    parts: tuple[RowRange, ...]  # each a complete tensor, or one expert of a fused tensor
    groups: int

    @property
    def num_rows(self) -> int:
        return sum(part.stop for part in self.parts)

    def hf_rows(self, start: int, stop: int) -> list[RowRange]:
        """The ranges of HF rows that, concatenated, are rows start:stop of this matrix."""
        row_ranges: list[RowRange] = []
        for group in range(self.groups):
            offset = group * self.num_rows // self.groups
            for part in self.parts:
                count = part.stop // self.groups
                low, high = max(start, offset), min(stop, offset + count)
                if low < high:
                    first = group * count - offset
                    row_ranges.append(RowRange(part.name, part.lead, first + low, first + high))
                offset += count
        return row_ranges

    def megatron_rows(self, index: int, start: int, stop: int) -> list[RowRange]:
        """The ranges of rows of this matrix that, concatenated, are rows start:stop of its part `index`."""
        count = self.parts[index].stop // self.groups
        before = sum(part.stop // self.groups for part in self.parts[:index])
        row_ranges: list[RowRange] = []
        for group in range(start // count, (stop - 1) // count + 1):
            low, high = max(start, group * count), min(stop, (group + 1) * count)
            first = group * self.num_rows // self.groups + before - group * count
            row_ranges.append(RowRange(self.key, self.lead, first + low, first + high))
        return row_ranges


class WeightMap:
    """The table for one architecture.

    `hf_names`, the tensors of an HF directory, decide per layer whether experts are fused; without them every expert
    has separate tensors, as in the files on the hub. `renamed`: a family's `tensor_names`; empty: the standard ones.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        hf_names: Collection[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        self.model_config, self._renamed = model_config, renamed
        self.hf_shapes: dict[str, tuple[int, ...]] = {}
        self.megatron_shapes: dict[str, tuple[int, ...]] = {}
        self.megatron_keys: dict[str, str] = {}
        """HF tensor -> the megatron tensor it is part of"""
        self._blocks: dict[tuple[str, tuple[int, ...]], WeightBlock] = {}
        self._owners: dict[tuple[str, tuple[int, ...]], tuple[WeightBlock, int]] = {}
        for block in self._build(hf_names):
            self._blocks[block.key, block.lead] = block
            for index, part in enumerate(block.parts):
                self._owners[part.name, part.lead] = (block, index)
                self.megatron_keys[part.name] = block.key

    def blocks(self) -> Iterator[WeightBlock]:
        """All matrices, layer by layer."""
        yield from self._blocks.values()

    def to_hf(self, row_range: RowRange) -> list[RowRange]:
        """The ranges of HF rows that hold the rows of a megatron tensor."""
        return self._blocks[row_range.name, row_range.lead].hf_rows(row_range.start, row_range.stop)

    def to_megatron(self, row_range: RowRange) -> list[RowRange]:
        """The ranges of megatron rows that hold the rows of an HF tensor."""
        block, index = self._owners[row_range.name, row_range.lead]
        return block.megatron_rows(index, row_range.start, row_range.stop)

    def counterpart(self, name: str) -> list[RowRange]:
        """The rows of the other side that make up the tensor `name` of either. Raises KeyError if unknown."""
        if name in self.megatron_shapes:
            blocks = [block for block in self.blocks() if block.key == name]
            return [row_range for block in blocks for row_range in block.hf_rows(0, block.num_rows)]
        owners = [(lead, owner) for (known, lead), owner in self._owners.items() if known == name]
        if not owners:
            raise KeyError(name)
        return [row_range for _, (block, i) in owners for row_range in block.megatron_rows(i, 0, block.parts[i].stop)]

    def extra_state_keys(self) -> Iterator[str]:
        """The byte entries that megatron.core expects: key/shard_<index>_<count>, one number per leading axis."""
        a = self.model_config
        for module, models in EXTRA_STATE.items():
            if not _has(a, models):
                continue
            counts: list[int] = [a.num_layers] if "layers." in module else []
            counts += [a.num_experts] if "experts." in module else []
            for index in itertools.product(*map(range, counts)):
                yield (
                    f"{module}._extra_state/shard_{'.'.join(map(str, index or (0,)))}"
                    f"_{'.'.join(map(str, counts or [1]))}"
                )

    def _build(self, hf_names: Collection[str]) -> Iterator[WeightBlock]:
        entries = [entry for entry in TABLE if _has(self.model_config, entry.models)]
        for per_layer, group in itertools.groupby(entries, _per_layer):
            if not per_layer:
                yield from (self._block(entry, (), hf_names) for entry in group)
                continue
            layer_entries = list(group)
            experts = [entry for entry in layer_entries if "{expert}" in entry.parts[0].name]
            shared = [entry for entry in layer_entries if entry not in experts]
            for layer in range(self.model_config.num_layers):
                yield from (self._block(entry, (layer,), hf_names) for entry in shared)
                for expert in range(self.model_config.num_experts):
                    yield from (self._block(entry, (layer, expert), hf_names) for entry in experts)

    def _block(self, entry: TensorMap, lead: tuple[int, ...], hf_names: Collection[str]) -> WeightBlock:
        sizes = _sizes(self.model_config)
        names = dict(zip(("layer", "expert"), lead, strict=False))
        parts, hf_lead = entry.parts, lead[2:]
        if entry.fused and not self._renamed and entry.fused.name.format(**names) in hf_names:
            parts, hf_lead = [entry.fused], lead[1:]
        row_ranges = []
        for part in parts:
            own_name = self._renamed[part.name] if self._renamed else part.name
            name, shape = own_name.format(**names), tuple(sizes[letter] for letter in part.axes)
            self.hf_shapes[name] = shape
            row_ranges.append(RowRange(name, hf_lead, 0, shape[len(hf_lead)]))
        counts = (self.model_config.num_layers, self.model_config.num_experts)[: len(lead)]
        rows, width = (
            sum(row_range.stop for row_range in row_ranges),
            (sizes[parts[0].axes[-1]],) * (len(parts[0].axes) > 1),
        )
        self.megatron_shapes[entry.megatron] = (*counts, rows, *width)
        groups = self.model_config.num_key_value_heads if entry.is_grouped_by_kv_head else 1
        return WeightBlock(entry.megatron, lead, tuple(row_ranges), groups)


def _sizes(model_config: ModelConfig) -> Mapping[str, int]:
    a = model_config
    width = a.moe_intermediate_size if a.is_moe else a.intermediate_size
    return {
        "V": a.vocab_size, "H": a.hidden_size, "D": a.head_dim,
        "E": a.num_experts, "F": width, "G": 2 * width,
        "Q": a.num_attention_heads * a.head_dim, "K": a.num_key_value_heads * a.head_dim,
    }  # fmt: skip


_HAS: dict[str, Callable[[ModelConfig], bool]] = {
    "all": lambda a: True,
    "dense": lambda a: not a.is_moe,
    "moe": lambda a: a.is_moe,
    "untied": lambda a: not a.tie_word_embeddings,
    "qkv_bias": lambda a: a.add_qkv_bias,
    "qk_norm": lambda a: a.qk_layernorm,
}


def _has(model_config: ModelConfig, models: str) -> bool:
    return _HAS[models](model_config)


def _per_layer(entry: TensorMap) -> bool:
    return "{layer}" in entry.parts[0].name
