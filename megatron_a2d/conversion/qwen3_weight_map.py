"""The one table of weights: Hugging Face's Qwen3 and Qwen3-MoE <-> megatron.core's global tensors.

Every matrix of a megatron tensor is made of whole rows of Hugging Face tensors, by a single rule: the rows
of its parts are dealt in equal turns, part after part within a turn.

    one turn               a plain copy, or parts one after the other: fc1 = the gate's rows, then the up rows
    a turn per KV group    linear_qkv: for each group its query heads' rows, its key's rows, its value's rows

The rule has an exact inverse, so both directions read the same table. Nothing is transposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_a2d.checkpoint.tensor_rows import Span
from megatron_a2d.config.model_config import Architecture


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor, one letter per axis of its shape:

    V vocabulary, H hidden size, D head size, Q query rows (heads x D), K key or value rows (KV heads x D),
    E experts, F width of the MLP or of one expert, G gate and up rows of one expert (2 x F).
    """

    axes: str
    name: str


@dataclass(frozen=True)
class Row:
    """A megatron tensor and the Hugging Face tensors that fill it. Names with {layer} and {expert} stand
    for a leading axis each: megatron keeps all layers, and all experts, of a weight in one tensor."""

    megatron: str
    parts: Sequence[Part]
    models: str = "all"  # all, dense, moe, untied
    turn_per_kv_group: bool = False
    fused: Part | None = None  # the same rows as one tensor of all experts, as transformers 5 holds them


DECODER = "decoder.layers."
LAYER = "model.layers.{layer}."
EXPERT = LAYER + "mlp.experts.{expert}."

TABLE = (
    Row("embedding.word_embeddings.weight", [Part("VH", "model.embed_tokens.weight")]),
    Row(
        DECODER + "self_attention.linear_qkv.layer_norm_weight",
        [Part("H", LAYER + "input_layernorm.weight")],
    ),
    Row(
        DECODER + "self_attention.linear_qkv.weight",
        [
            Part("QH", LAYER + "self_attn.q_proj.weight"),
            Part("KH", LAYER + "self_attn.k_proj.weight"),
            Part("KH", LAYER + "self_attn.v_proj.weight"),
        ],
        turn_per_kv_group=True,
    ),
    Row(DECODER + "self_attention.q_layernorm.weight", [Part("D", LAYER + "self_attn.q_norm.weight")]),
    Row(DECODER + "self_attention.k_layernorm.weight", [Part("D", LAYER + "self_attn.k_norm.weight")]),
    Row(DECODER + "self_attention.linear_proj.weight", [Part("HQ", LAYER + "self_attn.o_proj.weight")]),
    # dense
    Row(
        DECODER + "mlp.linear_fc1.layer_norm_weight",
        [Part("H", LAYER + "post_attention_layernorm.weight")],
        models="dense",
    ),
    Row(
        DECODER + "mlp.linear_fc1.weight",
        [Part("FH", LAYER + "mlp.gate_proj.weight"), Part("FH", LAYER + "mlp.up_proj.weight")],
        models="dense",
    ),
    Row(DECODER + "mlp.linear_fc2.weight", [Part("HF", LAYER + "mlp.down_proj.weight")], models="dense"),
    # mixture of experts
    Row(
        DECODER + "pre_mlp_layernorm.weight",
        [Part("H", LAYER + "post_attention_layernorm.weight")],
        models="moe",
    ),
    Row(DECODER + "mlp.router.weight", [Part("EH", LAYER + "mlp.gate.weight")], models="moe"),
    Row(
        DECODER + "mlp.experts.experts.linear_fc1.weight",
        [Part("FH", EXPERT + "gate_proj.weight"), Part("FH", EXPERT + "up_proj.weight")],
        models="moe",
        fused=Part("EGH", LAYER + "mlp.experts.gate_up_proj"),
    ),
    Row(
        DECODER + "mlp.experts.experts.linear_fc2.weight",
        [Part("HF", EXPERT + "down_proj.weight")],
        models="moe",
        fused=Part("EHF", LAYER + "mlp.experts.down_proj"),
    ),
    Row("decoder.final_layernorm.weight", [Part("H", "model.norm.weight")]),
    Row("output_layer.weight", [Part("VH", "lm_head.weight")], models="untied"),
)

FUSED_PARTS = {part for row in TABLE if row.fused for part in row.fused.name.split(".")}

# Modules that keep an `_extra_state` entry (empty unless FP8 is used) for every layer, and every expert.
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
class Block:
    """One matrix of a megatron tensor, at (layer, expert) = `lead`, and the Hugging Face rows in it."""

    key: str
    lead: tuple[int, ...]
    parts: tuple[Span, ...]  # each a whole tensor, or a whole expert of a fused one
    turns: int

    @property
    def num_rows(self) -> int:
        return sum(part.stop for part in self.parts)

    def hf_rows(self, start: int, stop: int) -> list[Span]:
        """The Hugging Face rows that, one after the other, are rows start:stop of this matrix."""
        spans: list[Span] = []
        for turn in range(self.turns):
            offset = turn * self.num_rows // self.turns
            for part in self.parts:
                count = part.stop // self.turns
                low, high = max(start, offset), min(stop, offset + count)
                if low < high:
                    first = turn * count - offset
                    spans.append(Span(part.name, part.lead, first + low, first + high))
                offset += count
        return spans

    def megatron_rows(self, index: int, start: int, stop: int) -> list[Span]:
        """The rows of this matrix that, one after the other, are rows start:stop of its part `index`."""
        count = self.parts[index].stop // self.turns
        before = sum(part.stop // self.turns for part in self.parts[:index])
        spans: list[Span] = []
        for turn in range(start // count, (stop - 1) // count + 1):
            low, high = max(start, turn * count), min(stop, (turn + 1) * count)
            first = turn * self.num_rows // self.turns + before - turn * count
            spans.append(Span(self.key, self.lead, first + low, first + high))
        return spans


class WeightMap:
    """The table filled in for one architecture.

    `hf_names`, the tensors that a directory holds, decides layer by layer whether its experts are fused;
    without it every expert has tensors of its own, as in the files on the hub.
    """

    def __init__(self, architecture: Architecture, hf_names: Collection[str] = ()):
        self.architecture = architecture
        self.hf_shapes: dict[str, tuple[int, ...]] = {}
        self.megatron_shapes: dict[str, tuple[int, ...]] = {}
        self.megatron_keys: dict[str, str] = {}
        """the megatron tensor of every Hugging Face tensor"""
        self._blocks: dict[tuple[str, tuple[int, ...]], Block] = {}
        self._homes: dict[tuple[str, tuple[int, ...]], tuple[Block, int]] = {}
        for block in self._build(hf_names):
            self._blocks[block.key, block.lead] = block
            for index, part in enumerate(block.parts):
                self._homes[part.name, part.lead] = (block, index)
                self.megatron_keys[part.name] = block.key

    def blocks(self) -> Iterator[Block]:
        """All matrices, in the order of the layers."""
        yield from self._blocks.values()

    def to_hf(self, span: Span) -> list[Span]:
        """Where rows of a megatron tensor lie in the Hugging Face tensors."""
        return self._blocks[span.name, span.lead].hf_rows(span.start, span.stop)

    def to_megatron(self, span: Span) -> list[Span]:
        """Where rows of a Hugging Face tensor lie in the megatron tensors."""
        block, index = self._homes[span.name, span.lead]
        return block.megatron_rows(index, span.start, span.stop)

    def counterpart(self, name: str) -> list[Span]:
        """What the tensor `name`, of either side, corresponds to on the other. Raises KeyError if unknown."""
        if name in self.megatron_shapes:
            blocks = [block for block in self.blocks() if block.key == name]
            return [span for block in blocks for span in block.hf_rows(0, block.num_rows)]
        homes = [(lead, home) for (known, lead), home in self._homes.items() if known == name]
        if not homes:
            raise KeyError(name)
        return [span for _, (block, i) in homes for span in block.megatron_rows(i, 0, block.parts[i].stop)]

    def extra_state_keys(self) -> Iterator[str]:
        """The byte entries megatron.core expects: key/shard_<index>_<count>, a number per leading axis."""
        a = self.architecture
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

    def _build(self, hf_names: Collection[str]) -> Iterator[Block]:
        rows = [row for row in TABLE if _has(self.architecture, row.models)]
        for per_layer, group in itertools.groupby(rows, _per_layer):
            if not per_layer:
                yield from (self._block(row, (), hf_names) for row in group)
                continue
            group_rows = list(group)
            experts = [row for row in group_rows if "{expert}" in row.parts[0].name]
            shared = [row for row in group_rows if row not in experts]
            for layer in range(self.architecture.num_layers):
                yield from (self._block(row, (layer,), hf_names) for row in shared)
                for expert in range(self.architecture.num_experts):
                    yield from (self._block(row, (layer, expert), hf_names) for row in experts)

    def _block(self, row: Row, lead: tuple[int, ...], hf_names: Collection[str]) -> Block:
        sizes = _sizes(self.architecture)
        names = dict(zip(("layer", "expert"), lead, strict=False))
        parts, hf_lead = row.parts, lead[2:]
        if row.fused and row.fused.name.format(**names) in hf_names:
            parts, hf_lead = [row.fused], lead[1:]
        spans = []
        for part in parts:
            name, shape = part.name.format(**names), tuple(sizes[letter] for letter in part.axes)
            self.hf_shapes[name] = shape
            spans.append(Span(name, hf_lead, 0, shape[len(hf_lead)]))
        counts = (self.architecture.num_layers, self.architecture.num_experts)[: len(lead)]
        rows, width = sum(span.stop for span in spans), (sizes[parts[0].axes[-1]],) * (len(parts[0].axes) > 1)
        self.megatron_shapes[row.megatron] = (*counts, rows, *width)
        turns = self.architecture.num_key_value_heads if row.turn_per_kv_group else 1
        return Block(row.megatron, lead, tuple(spans), turns)


def _sizes(architecture: Architecture) -> Mapping[str, int]:
    a = architecture
    width = a.moe_intermediate_size if a.is_moe else a.intermediate_size
    return {
        "V": a.vocab_size, "H": a.hidden_size, "D": a.head_dim,
        "E": a.num_experts, "F": width, "G": 2 * width,
        "Q": a.num_attention_heads * a.head_dim, "K": a.num_key_value_heads * a.head_dim,
    }  # fmt: skip


def _has(architecture: Architecture, models: str) -> bool:
    if models == "untied":
        return not architecture.tie_word_embeddings
    return models == "all" or architecture.is_moe == (models == "moe")


def _per_layer(row: Row) -> bool:
    return "{layer}" in row.parts[0].name
