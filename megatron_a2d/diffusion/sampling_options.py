"""Sampling settings: the samplers, caches and their valid ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Sampler = Literal["rnd1", "eb", "confidence", "threshold", "entropy", "maskgit_plus", "topk_margin", "self_speculative"]
Cache = Literal["none", "prefix", "dual"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SELF_SPECULATIVE: Sampler = "self_speculative"
DREAM: tuple[Sampler, ...] = ("entropy", "maskgit_plus", "topk_margin")  # `alg` of Dream's sampler, on its schedule
# Choose positions by probabilities before temperature, top-k and top-p.
UNSHAPED: tuple[Sampler, ...] = ("confidence", "threshold")
CACHES: tuple[str, ...] = get_args(Cache)
# Logits stay finite in fp32.
_SMALLEST_TEMPERATURE = 1e-6
_LARGEST_GUIDANCE = 1000
_MOST_DREAM_STEPS = 65536  # its schedule is followed step by step


class Problem(NamedTuple):
    """What is wrong with the value of a setting. `why` has the names of other settings in braces."""

    name: str
    value: Any
    why: str

    def line(self, show: Callable[[str], str]) -> str:
        """`name value: why`, with every setting named as `show` says."""
        why = re.sub(r"{(\w+)}", lambda match: show(match[1]), self.why)
        return f"{show(self.name)} {self.value}: {why}"


class SamplingOptionsError(ValueError):
    """Sampling settings that are out of range, or conflict."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__("; ".join(self.lines(str)))

    def lines(self, show: Callable[[str], str]) -> list[str]:
        """One line per problem. `show`: how to name a setting, such as by its flag."""
        return [problem.line(show) for problem in self.problems]


@dataclass(frozen=True)
class SamplingOptions:
    """Which positions are unmasked when (`sampler` to `remask`), and which token each gets (the rest).

    sampler: the positions that a forward pass unmasks.
        rnd1        those of lowest entropy; their number follows a linear schedule over `num_steps` (RND1)
        confidence  those whose token has the highest probability, equally many each time ("low-confidence
                    remasking" of LLaDA, Nie et al. 2025)
        eb          by falling confidence, while the sum of their entropies minus the largest one is at most `gamma`
                    nats (entropy-bounded unmasking, Ben-Hamu et al. 2025)
        threshold   all whose token has probability `threshold` or more, at least one (Fast-dLLM, Wu et al. 2025)
        entropy, maskgit_plus, topk_margin  those of lowest entropy, of highest probability, or whose token leads the
                    second one by most; their number follows the schedule of Dream (Ye et al. 2025), as do the names
        self_speculative  those at which a bidirectional draft of the block agrees with autoregressive decoding, and the
                    next one (sampling/self_speculation.py); for block diffusion with an autoregressive co-loss
    num_steps: forward passes in all, divided over the blocks; eb and threshold usually need fewer. self_speculative
        needs as many as its drafts ask for.
    block_length: holes are filled from left to right in blocks of this many tokens (semi-autoregressive); 0: one block.
    aligned_blocks: blocks are slices of the sequence itself, given tokens included, as in the training of a block
        diffusion model.
    cache: keys and values that are cached while a block is filled (Fast-dLLM): those before the block (prefix), or
        before and after it (dual). With aligned blocks `prefix` is exact, as finished blocks never change, and they are
        computed once. Otherwise they are recomputed when a sequence reaches its next block, and an approximation:
        cached entries do not depend on the tokens unmasked since.
    remask: the share of a block's decided tokens that every forward pass but the block's last masks again, before it
        predicts: those that were least certain when they were decided (after ReMDM, Wang et al. 2025).
    temperature, top_k, top_p: shape the distribution that tokens and entropies come from; 0 and 1 filter nothing.
        Temperature 0 takes the most likely token and does not change the distribution. The probabilities by which
        `confidence` and `threshold` choose positions are those before it is shaped, as in LLaDA's and Fast-dLLM's code.
    greedy: take the most likely token whatever the temperature, which then only affects entropies.
    cfg_scale: classifier-free guidance w: logits are l + w (l - u), where u are those with the given text masked; 0:
        none. The two forward passes count as one.
    """

    sampler: Sampler = "rnd1"
    num_steps: int = 256
    gamma: float = 0.1
    threshold: float = 0.9
    block_length: int = 0
    aligned_blocks: bool = False
    cache: Cache = "none"
    remask: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise SamplingOptionsError(problems)

    @property
    def takes_likeliest(self) -> bool:
        return self.greedy or self.temperature == 0

    def problems(self) -> list[Problem]:
        ranges = {
            "num_steps": (self.num_steps >= 1, "must be at least 1"),
            "gamma": (0 <= self.gamma < math.inf, "must be 0 or more (nats)"),
            "threshold": (0 < self.threshold <= 1, "must be a probability above 0"),
            "block_length": (self.block_length >= 0, "must be 0 (one block) or more"),
            "remask": (0 <= self.remask < 1, "must be a share of at least 0 and below 1"),
            "temperature": (
                self.temperature == 0 or _SMALLEST_TEMPERATURE <= self.temperature < math.inf,
                f"must be 0, or {_SMALLEST_TEMPERATURE} or more",
            ),
            "top_k": (self.top_k >= 0, "must be 0 (no limit) or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1 (no limit)"),
            "cfg_scale": (0 <= self.cfg_scale <= _LARGEST_GUIDANCE, f"must be 0 (none) to {_LARGEST_GUIDANCE}"),
            "sampler": (self.sampler in SAMPLERS, f"must be one of {', '.join(SAMPLERS)}"),
            "cache": (self.cache in CACHES, f"must be one of {', '.join(CACHES)}"),
        }
        found = [(name, why) for name, (good, why) in ranges.items() if not good]
        if self.sampler in DREAM and self.num_steps > _MOST_DREAM_STEPS:
            found.append(("num_steps", f"must be at most {_MOST_DREAM_STEPS} with {{sampler}} {self.sampler}"))
        if self.sampler == SELF_SPECULATIVE and (self.remask or self.cfg_scale):
            why = "decides tokens once and has no guidance; leave out {remask} and {cfg_scale}"
            found.append(("sampler", why))
        if self.aligned_blocks:
            excluded = {
                "block_length": (self.block_length == 0, "block diffusion needs the length that was trained"),
                "cache": (self.cache == "dual", "block diffusion attends to nothing after the block; use prefix"),
                "cfg_scale": (self.cfg_scale > 0, "block diffusion is sampled without guidance; use 0"),
            }
            found += [(name, why) for name, (bad, why) in excluded.items() if bad]
        elif self.cache != "none" and self.block_length == 0:
            found.append(("cache", "has no effect without blocks; set {block_length}"))
        return [Problem(name, getattr(self, name), why) for name, why in found]
