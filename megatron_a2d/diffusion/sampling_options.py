"""How a text is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Sampler = Literal["rnd1", "eb", "confidence", "threshold"]
Cache = Literal["none", "prefix", "dual"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
CACHES: tuple[str, ...] = get_args(Cache)
# Logits stay finite in fp32.
_SMALLEST_TEMPERATURE = 1e-6
_LARGEST_GUIDANCE = 1000


@dataclass(frozen=True)
class SamplingOptions:
    """Which tokens are decided when (`sampler` to `cache`), and which token is taken (the rest).

    sampler: the positions that a forward pass decides.
        rnd1        those of lowest entropy, as many as a linear schedule of `num_steps` says (RND1)
        confidence  those whose token has the highest probability, equally many each time ("low-confidence
                    remasking" of LLaDA, Nie et al. 2025)
        eb          by falling confidence, while the sum of their entropies less the largest one stays within `gamma`
                    nats (entropy-bounded unmasking, Ben-Hamu et al. 2025)
        threshold   all whose token has probability `threshold` or more, at least one (Fast-dLLM, Wu et al. 2025)
    num_steps: forward passes in all, divided over the blocks; eb and threshold usually need fewer.
    block_length: the holes are filled in blocks of so many tokens from left to right (semi-autoregressive); 0: one
    block. aligned_blocks: blocks are pieces of the text itself, given tokens included, as a block diffusion model was
    trained with. cache: keys and values that are kept while a block is filled, as in Fast-dLLM: those before the block
    (prefix), or
        before and behind it (dual); they are computed anew when a row reaches its next block. An
        approximation: what is kept has not seen the tokens decided since.
    temperature, top_k, top_p: shape the distribution that tokens and entropies come from; 0 and 1 filter nothing.
        Temperature 0 takes the likeliest token and leaves the distribution as it is.
    greedy: take the likeliest token whatever the temperature, which then only shapes entropies.
    guidance: classifier-free guidance w: logits are l + w (l - u), u those with the given text masked; 0: none. Two
        forward passes count as one.
    """

    sampler: Sampler = "rnd1"
    num_steps: int = 256
    gamma: float = 0.1
    threshold: float = 0.9
    block_length: int = 0
    aligned_blocks: bool = False
    cache: Cache = "none"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    @property
    def takes_likeliest(self) -> bool:
        return self.greedy or self.temperature == 0

    def problems(self) -> list[str]:
        """Lines of the form `name value: why`."""
        ranges = {
            "num_steps": (self.num_steps >= 1, "must be at least 1"),
            "gamma": (0 <= self.gamma < math.inf, "must be 0 or more (nats)"),
            "threshold": (0 < self.threshold <= 1, "must be a probability above 0"),
            "block_length": (self.block_length >= 0, "must be 0 (one block) or more"),
            "temperature": (
                self.temperature == 0 or _SMALLEST_TEMPERATURE <= self.temperature < math.inf,
                f"must be 0, or {_SMALLEST_TEMPERATURE} or more",
            ),
            "top_k": (self.top_k >= 0, "must be 0 (no limit) or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1 (no limit)"),
            "guidance": (0 <= self.guidance <= _LARGEST_GUIDANCE, f"must be 0 (none) to {_LARGEST_GUIDANCE}"),
            "sampler": (self.sampler in SAMPLERS, f"must be one of {', '.join(SAMPLERS)}"),
            "cache": (self.cache in CACHES, f"must be one of {', '.join(CACHES)}"),
        }
        found = [f"{name} {getattr(self, name)}: {why}" for name, (good, why) in ranges.items() if not good]
        if self.aligned_blocks and (self.block_length == 0 or self.cache != "none" or self.guidance):
            found.append("block_length: a block diffusion model needs its own, and has neither cache nor guidance")
        if self.cache != "none" and self.block_length == 0:
            found.append(f"cache {self.cache}: has no effect without blocks, set block_length")
        return found
