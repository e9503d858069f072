"""Settings of the optimizer and of the learning rate's schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class LearningRateSchedule(NamedTuple):
    """Lengths of the learning rate's phases, all in iterations or all in samples."""

    total: int
    warmup: int
    wsd_decay: int


@dataclass(frozen=True)
class OptimizationConfig:
    """AdamW or Muon, the learning rates and their schedule."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam: AdamW; muon: Muon for the matrices of attention, MLPs and experts, AdamW for all other parameters; needs
    megatron-core 0.19 and emerging-optimizers"""
    lr: float = 1e-4
    """peak learning rate"""
    min_lr: float = 0.0
    """learning rate at the end of the decay"""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """factors on lr and min_lr by role, ROLE=FACTOR ...; 0 freezes; roles: attention mlp router norm embedding head"""
    lr_warmup_iters: int = 0
    """iterations of linear learning rate warm-up from 0"""
    lr_warmup_samples: int = 0
    """samples of warm-up, with --train-samples or --train-tokens"""
    lr_decay_style: Literal["cosine", "WSD", "linear", "constant"] = "cosine"
    """shape of the decay after the warm-up; WSD: stable, then a decay over lr_wsd_decay_iters or _samples"""
    lr_wsd_decay_iters: int = 0
    """iterations of WSD's final decay"""
    lr_wsd_decay_samples: int = 0
    """samples of WSD's final decay, with --train-samples or --train-tokens"""
    weight_decay: float = 0.1
    """decoupled weight decay; not applied to vectors (norms)"""
    adam_beta1: float = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: float = 0.95
    """decay rate of Adam's second moment"""
    adam_eps: float = 1e-8
    """Adam's epsilon"""
    clip_grad: float = 1.0
    """maximum gradient norm; 0: no clipping"""
    muon_momentum: float = 0.95
    """Muon's momentum, the decay rate of the mean of its gradients"""
    muon_use_nesterov: bool = True
    """orthogonalise the mean of the gradients after one more step with the last one (Nesterov)"""
    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations that orthogonalise an update"""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """factor of an orthogonalised [out, in] update: sqrt(max(out, in)), sqrt(out / in), or sqrt(max(1, out / in))"""
    muon_extra_scale_factor: float = 0.2
    """another factor; 0.2 with spectral: updates as large as AdamW's, so that lr, weight_decay and lr_mult keep their
    meaning (Liu et al. 2025)"""
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"
    """precision of the Newton-Schulz iterations: fp32, TF32, bf16"""
    muon_router: bool = False
    """with muon: update the routers' matrices by Muon too"""
