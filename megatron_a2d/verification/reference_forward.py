"""Reference forward pass of every family that streams the weights from disk, a few rows of a matrix at a time.

Written from the formulas and independent of the models in this project, so that agreement with them is evidence. Slow,
in fp32 on the CPU, with memory bounded by a few slabs and the activations.

Shapes: B batch, L sequence, D hidden, N = B * L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_a2d.checkpoint.tensor_rows import RowRange, slabs
from megatron_a2d.config.rotary import Llama3Scaling
from megatron_a2d.conversion.read_back import ReadRows
from megatron_a2d.conversion.sources import EMBEDDING, HEAD, Weights

Advance = Callable[[float], None]

# Few activations are multiplied with this many values at a time, which stay in the processor's cache as fp32.
_FEW, _CACHED_VALUES = 16, 1 << 18
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: x86 and ARM


class BlockAttention(NamedTuple):
    """Attention masks of block diffusion as matrices: [L, L] bool, queries first."""

    own_block: torch.Tensor
    earlier_blocks: torch.Tensor
    finished: torch.Tensor  # of a finished block's queries

    @classmethod
    def of(cls, length: int, block_length: int, causal: bool) -> BlockAttention:
        """The masks of a text; finished blocks are `causal` after training with an autoregressive co-loss."""
        places = torch.arange(length)
        query, key = (places // block_length)[:, None], (places // block_length)[None]
        finished = places[None] <= places[:, None] if causal else key <= query
        return cls(key == query, key < query, finished)

    def while_sampling(self, num_finished: int) -> torch.Tensor:
        """The mask of a text whose first `num_finished` positions are finished blocks, [L, L]."""
        is_finished_L = torch.arange(len(self.own_block)) < num_finished
        return torch.where(is_finished_L[:, None], self.finished, self.own_block | self.earlier_blocks)

    def while_training(self) -> torch.Tensor:
        """The mask of a noised copy followed by a clean one, [2 L, 2 L]."""
        noised = torch.cat([self.own_block, self.earlier_blocks], dim=1)
        return torch.cat([noised, torch.cat([torch.zeros_like(self.own_block), self.finished], dim=1)])


class StreamedModel:
    """A model whose weights (under HF names) are streamed from disk in every forward pass."""

    def __init__(
        self,
        weights: Weights,
        causal: bool = False,
        advance: Advance = lambda amount: None,
        read_rows: ReadRows | None = None,
        visible: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        in_bf16: bool = False,
    ):
        """`read_rows` yields the rows of a tensor in place of `weights`, which are then read where rows are chosen, and
        for a tied head: it is asked for tensors in the order of the model, each once at most.

        `visible` [L, L], True where a query attends to a key; without it, attention is full, or `causal`. `positions`
        [L] default to 0..L-1. `in_bf16`: the products with bf16 matrices, in place of fp32.
        """
        self.visible, self.positions, self._in_bf16 = visible, positions, in_bf16
        self._tensors, self.causal, self._advance = weights.tensors, causal, advance
        self._read_rows = read_rows or self._stored_rows
        self._shape = weights.model_config
        self._wide = torch.empty(0)  # one memory for all: freed and allocated it would fragment the heap
        self.chosen: list[torch.Tensor] = []  # experts [N, k] of each layer's tokens, of all forward passes so far

    @torch.no_grad()
    def hidden(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, D] after the last norm."""
        x = self._embed(tokens_BL)
        for layer in range(self._shape.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, prefix + "input_layernorm.weight"), prefix + "self_attn.")
            y = self._norm(x, prefix + "post_attention_layernorm.weight")
            x = x + (self._experts if self._shape.is_moe else self._mlp)(y, prefix + "mlp.")
        return self._norm(x, "model.norm.weight")

    @torch.no_grad()
    def logits(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, L, V]."""
        return self._linear(self.hidden(tokens_BL), self._head)

    @torch.no_grad()
    def cross_entropy(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Cross-entropy [N] in nats of hidden states, without materialising all logits."""
        total_N = torch.full_like(targets_N, -torch.inf, dtype=torch.float32)
        target_N = torch.zeros_like(total_N)
        for start, rows in self._stored(self._head):
            logits_NV = self._product(hidden_ND, rows)
            total_N = torch.logaddexp(total_N, logits_NV.logsumexp(-1))
            inside = (targets_N >= start) & (targets_N < start + len(rows))
            target_N[inside] = logits_NV[inside, targets_N[inside] - start]
        return total_N - target_N

    @property
    def _head(self) -> str:
        return EMBEDDING if self._shape.tie_word_embeddings else HEAD

    def _embed(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        ids = tokens_BL.unique().tolist()
        rows = torch.cat([self._tensors.read(RowRange(EMBEDDING, (), i, i + 1)).float() for i in ids])
        return rows[torch.searchsorted(torch.tensor(ids), tokens_BL)]

    def _stored(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(index of the first row, consecutive rows as they are stored), over the complete tensor."""
        for start, rows in (self._stored_rows if name == EMBEDDING else self._read_rows)(name):
            self._advance(rows.nbytes)
            yield start, rows

    def _stored_rows(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        shape = self._tensors.shapes[name]
        for start, stop in slabs(shape, 0, shape[0], self._tensors.dtype(name).itemsize):
            yield start, self._tensors.read(RowRange(name, (), start, stop))

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.cat([self._product(x, rows) for _, rows in self._stored(name)], dim=-1)

    def _product(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """x [..., D] times the transpose of `rows` [R, D], [..., R] in fp32."""
        if self._in_bf16 and rows.dtype == torch.bfloat16:
            return (x.bfloat16() @ rows.T).float()
        few = x.numel() <= _FEW * x.shape[-1]
        return torch.cat([x @ part.T for part in self._widened(rows, _CACHED_VALUES if few else rows.numel())], dim=-1)

    def _widened(self, rows: torch.Tensor, num_values: int) -> Iterator[torch.Tensor]:
        """`rows` in fp32, about `num_values` at a time; valid until the next ones."""
        for part in rows.split(max(1, num_values // max(1, rows[0].numel()))):
            if part.numel() > len(self._wide):
                self._wide = torch.empty(part.numel())
            yield self._wide[: part.numel()].view_as(part).copy_(part)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self._vector(name), self._shape.rms_norm_eps)

    def _vector(self, name: str) -> torch.Tensor:
        """A bias comes in the pieces in which it was read, one of each group of heads."""
        return torch.cat([rows.float() for _, rows in self._stored(name)])

    def _attention(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        a = self._shape
        rows = [self._linear(x, f"{prefix}{name}_proj.weight") for name in "qkv"]
        if a.add_qkv_bias:
            rows = [y + self._vector(f"{prefix}{name}_proj.bias") for name, y in zip("qkv", rows, strict=True)]
        query, key, value = (y.unflatten(-1, (-1, a.head_dim)) for y in rows)
        if a.qk_layernorm:
            query, key = self._norm(query, prefix + "q_norm.weight"), self._norm(key, prefix + "k_norm.weight")
        query, key = self._rotate(query), self._rotate(key)
        key, value = (t.repeat_interleave(a.num_attention_heads // a.num_key_value_heads, dim=2) for t in (key, value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        scale = a.rope_scaling.attention_factor**2 if a.rope_scaling else 1.0
        mixed = self._mix(scale * query, key, value)
        return self._linear(mixed.transpose(1, 2).flatten(2), prefix + "o_proj.weight")

    def _mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of queries, keys and values [B, heads, L, d]."""
        return F.scaled_dot_product_attention(query, key, value, self.visible, is_causal=self.causal)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x [B, L, heads, d] as complex numbers: j real, j + d / 2 imaginary."""
        half = x.shape[-1] // 2
        frequencies = torch.tensor([self._frequency(index / half) for index in range(half)])
        positions = torch.arange(x.shape[1]) if self.positions is None else self.positions
        angles = positions.float()[:, None, None] * frequencies
        rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([rotated.real, rotated.imag], dim=-1)

    def _frequency(self, part: float) -> float:
        """Radians per position of the rotary frequency at the fraction `part` (0 to 1) of the spectrum.

        YaRN: a frequency with more than `beta_fast` rotations in the original context is kept, one with less than
        `beta_slow` is divided by `factor`; both bounds and the interpolation are linear in `part`. Llama 3.1: the same
        with bounds and an interpolation that are linear in the number of rotations.
        """
        theta, scaling = self._shape.rope_theta, self._shape.rope_scaling
        frequency = theta**-part
        if scaling is None:
            return frequency
        if isinstance(scaling, Llama3Scaling):
            rotations = frequency * scaling.original_max_position_embeddings / (2 * math.pi)
            kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            kept = min(max(kept, 0.0), 1.0)
            return frequency * kept + frequency / scaling.factor * (1 - kept)
        half = self._shape.head_dim / 2
        fast, slow = (
            half * math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations), theta)
            for rotations in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, 2 * half - 1)
        slowed = min(max((part * half - fast) / ((slow - fast) or 0.001), 0.0), 1.0)
        return frequency * (1 - slowed) + frequency / scaling.factor * slowed

    def _mlp(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = (self._linear(x, f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
        return self._linear(F.silu(gate) * up, prefix + "down_proj.weight")

    def _experts(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        x_ND = x.flatten(0, -2)
        probabilities = self._linear(x_ND, prefix + "gate.weight").softmax(-1)
        chosen = self._choose(probabilities)
        self.chosen.append(chosen)
        weights = probabilities.gather(-1, chosen)
        if self._shape.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        out_ND = torch.zeros_like(x_ND)
        for expert in chosen.unique().tolist():
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            output = self._mlp(x_ND[tokens], f"{prefix}experts.{expert}.")
            out_ND[tokens] += output * weights[tokens, slots, None]
        return out_ND.view_as(x)

    def _choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities.topk(self._shape.num_experts_per_tok, dim=-1).indices


def has_bf16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bf16 products; elsewhere those in fp32 are faster.

    matrix_products.py asks another question: whether torch has library products of bf16, which AVX512 suffices for.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())
