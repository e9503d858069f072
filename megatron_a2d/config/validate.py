"""Validation of a run's settings, before anything is built.

Every check returns one line per problem: the flag and its value, why it is invalid, what to do. All are reported
together.
"""

from __future__ import annotations

import dataclasses
import math

from megatron_a2d.config.block_schedule import find_block_schedule_problems
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import ROLES, ParallelConfig, RunConfig, flag, settings
from megatron_a2d.config.validate_balancing import find_balancing_problems, needs_experts
from megatron_a2d.config.validate_batch import (
    find_length_problems,
    find_odd,
    find_schedule_problems,
    find_undividable,
)
from megatron_a2d.config.validate_optimizer import find_optimizer_layout_problems, find_optimizer_problems
from megatron_a2d.config.validate_performance import find_performance_problems

NO_START = "--load: is missing; give the checkpoint to start from, as python -m checkpoints_tools.convert_hf writes it"
NO_DATA = "--train-data-path: is missing; give the prefix that data_prep.tokenize_corpus wrote"


def missing_inputs(config: RunConfig) -> list[str]:
    """Required inputs that are missing."""
    lines = [] if config.training.load or config.training.save else [NO_START]
    return lines + ([] if config.data.train_data_path or config.data.data_mixture else [NO_DATA])


MOST_PROCESSES = 1 << 20  # largest world size; ten times that of the largest clusters


def find_problems(config: RunConfig, model_config: ModelConfig | None, world_size: int) -> list[str]:
    """All problems of a run's settings, one line each: flag and value, why, what to do."""
    return find_general_problems(config) + find_layout_problems(config, model_config, world_size)


def find_general_problems(config: RunConfig) -> list[str]:
    """Problems that do not depend on the layout and the model. (The planner checks them once for all layouts.)"""
    problems = _range_problems(config) + _objective_problems(config) + list(find_balancing_problems(config))
    without_length = find_length_problems(config)
    return problems + (without_length or list(find_schedule_problems(config)))


def find_layout_problems(config: RunConfig, model_config: ModelConfig | None, world_size: int) -> list[str]:
    """Problems of the layout, of the layout for this model, and of the performance settings."""
    problems = _layout_problems(config, world_size) + list(find_optimizer_layout_problems(config))
    if model_config is not None:
        problems += _model_config_problems(config, model_config)
        if not model_config.is_moe:
            problems += needs_experts(config)
    return problems + find_performance_problems(config, model_config)


def _range_problems(config: RunConfig) -> list[str]:
    problems = []
    values = config.to_dict()

    def need(name: str, good: bool, why: str) -> None:
        if not good:
            problems.append(f"{flag(name)} {values[name]}: {why}")

    for name in (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank",
        "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
        "micro_batch_size", "save_interval", "max_skipped_steps", "eval_interval",
        "eval_iters", "log_interval",
    ):  # fmt: skip
        need(name, values[name] >= 1, "must be at least 1")
    need("seq_length", values["seq_length"] >= 2, "a sample needs at least 2 tokens; choose a longer one")
    for name in (
        "num_workers",
        "seed",
        "lr_warmup_iters",
        "lr_warmup_samples",
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
        "weight_decay",
        "clip_grad",
        "min_lr",
        "keep_latest_k",
        "save_retain_interval",
        "exit_interval",
        "exit_duration_in_mins",
    ):
        need(name, values[name] >= 0, "must not be negative")
    need("seed", values["seed"] < 1 << 64, "must be below 2^64")
    need("num_workers", values["num_workers"] <= 1024, "must be at most 1024; one thread keeps ahead of most steps")
    for name in ("lr", "adam_eps", "distributed_timeout_minutes"):
        need(name, values[name] > 0, "must be positive")
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{flag(name)} {value}: must be a finite number")
    for name in ("adam_beta1", "adam_beta2"):
        need(name, 0 <= values[name] < 1, "must lie in [0, 1)")
    need("random_length_prob", 0 <= values["random_length_prob"] <= 1, "must lie in [0, 1]; 0.01 is LLaDA's")
    if values["data_mixture"]:
        for name in ("train_data_path", "valid_data_path"):
            need(name, not values[name], "cannot be combined with --data-mixture, which has its own; remove one")
    need("min_timestep", 0 < values["min_timestep"] < 1, "must lie between 0 and 1; 0.001 is usual")
    need("ckpt_step", values["ckpt_step"] is None or values["ckpt_step"] >= 1, "must be at least 1")
    need(
        "save_retain_interval", not values["save_retain_interval"] or values["keep_latest_k"] > 0,
        "has no effect without --keep-latest-k, which keeps all; set that too",
    )  # fmt: skip
    for name in ("profile_step_start", "profile_step_end"):
        is_default = values[name] == settings()[name].default
        need(name, values["profile"] or is_default, "has no effect without --profile; add it or remove this")
    if values["profile"]:
        first, last = values["profile_step_start"], values["profile_step_end"]
        need("profile_step_start", 1 <= first <= last, f"must lie between 1 and --profile-step-end {last}")
    for name in ("keep_latest_k", "save_retain_interval", "async_save", "profile"):
        need(name, not values[name] or bool(values["save"]), "has no effect without --save; add it or remove this")
    rolls_back, default = values["on_spike"] == "rollback", settings()["max_rollbacks"].default
    need("on_spike", not rolls_back or bool(values["save"]), "has no checkpoints to go back to without --save; add it")
    need("max_rollbacks", values["max_rollbacks"] >= 1, "must be at least 1")
    need(
        "max_rollbacks", rolls_back or values["max_rollbacks"] == default,
        "has no effect without --on-spike rollback; add it or remove this",
    )  # fmt: skip
    need("min_lr", not 0 < values["lr"] < values["min_lr"], f"exceeds --lr {values['lr']}; lower it")
    if all(values["lr_mult"].get(role) == 0 for role in ROLES):
        problems.append("--lr-mult: freezes every role, so nothing would be trained; set one above 0")
    for role, factor in values["lr_mult"].items():
        if role not in ROLES:
            problems.append(f"--lr-mult {role}={factor}: there is no role {role!r}; roles are {', '.join(ROLES)}")
        elif not 0 <= factor < math.inf:
            problems.append(
                f"--lr-mult {role}={factor}: a factor must be a finite number, not negative; 0 freezes the role"
            )
    return problems + list(find_optimizer_problems(config))


def _objective_problems(config: RunConfig) -> list[str]:
    """Settings that have no effect with the objective and the conversion, or that these require."""
    diffusion = config.diffusion
    if diffusion.objective == "ar":
        return [
            f"{flag(name)} {value}: has no effect with --objective ar; remove it"
            for name, value in dataclasses.asdict(diffusion).items()
            if name != "objective" and value != settings()[name].default and (name, value) != ("conversion", "random")
        ]
    is_block, conversion, factors = diffusion.objective == "block", diffusion.conversion, config.optimization.lr_mult
    problems = []

    def need(name: str, good: bool, why: str) -> None:
        if not good:
            problems.append(f"{flag(name)} {config.to_dict()[name]}: {why}")

    def belongs(name: str, there: bool, to: str) -> None:
        value = getattr(diffusion, name)
        need(name, there or value == settings()[name].default, f"has no effect without {to}; remove it")

    belongs("cart_p", diffusion.loss_weighting == "cart", "--loss-weighting cart")
    need("cart_p", 0 < diffusion.cart_p <= 1, "must lie above 0 and be at most 1; 0.8 is Dream's")
    need(
        "mask_sampling", not is_block or diffusion.mask_sampling == "bernoulli",
        "is not supported with --objective block, whose blocks have separate times; use bernoulli",
    )  # fmt: skip
    for name in (
        "block_length", "block_length_schedule", "block_length_schedule_samples", "reset_block_grid", "ar_loss_weight",
    ):  # fmt: skip
        belongs(name, is_block, "--objective block")
    need("block_length", not is_block or diffusion.block_length >= 1, "--objective block needs at least 1 token")
    need(
        "block_length", diffusion.block_length <= config.data.seq_length,
        f"is longer than --seq-length {config.data.seq_length}",
    )  # fmt: skip
    has_length = not find_length_problems(config)
    problems += find_block_schedule_problems(config, has_length)
    odd = find_odd(config.batch_sizes) if has_length else ""
    for good, why in (
        (diffusion.noise_schedule == "linear", "needs --noise-schedule linear, whose times have complements"),
        (diffusion.mask_sampling == "bernoulli", "needs --mask-sampling bernoulli"),
        (not odd, odd),
        (conversion != "grafting", "is not supported with --conversion grafting, whose first iterations mask nothing"),
    ):  # fmt: skip
        need("complementary_masks", not diffusion.complementary_masks or good, why)
    halved = [item for item in config.skipped.ranges if item.first % 2 or not item.last % 2]
    if diffusion.complementary_masks and halved:
        whole = f"{halved[0].first - halved[0].first % 2}-{halved[0].last | 1}"
        problems.append(f"--skip-samples {halved[0]}: --complementary-masks pairs samples; use {whole}")
    need("ar_loss_weight", 0 <= diffusion.ar_loss_weight < math.inf, "must be a finite number, not negative")
    need(
        "loss_weighting", not is_block or diffusion.loss_weighting != "cart",
        "is not supported with --objective block, whose blocks have different contexts; use mdlm or uniform",
    )  # fmt: skip
    for name, owner in (("attention_annealing", "annealing"), ("grafting", "grafting")):
        in_iters, in_samples = f"{name}_iters", f"{name}_samples"
        for phase in (in_iters, in_samples):
            belongs(phase, conversion == owner, f"--conversion {owner}")
        if conversion == owner:
            given = [value for value in (getattr(diffusion, in_iters), getattr(diffusion, in_samples)) if value]
            need(in_iters, bool(given) and min(given) >= 1, f"--conversion {owner} needs at least 1")
            need(in_samples, len(given) < 2, f"{flag(in_iters)} is given too; remove one of them")
    need(
        "conversion", not is_block or conversion in ("scp", "random"),
        "is not supported with --objective block, which has its own attention mask; use scp",
    )  # fmt: skip
    if conversion == "grafting" and factors.get("attention") == 0:
        problems.append("--lr-mult attention=0: --conversion grafting trains attention; set it above 0")
    if conversion == "random" and config.training.finetune:
        problems.append("--finetune: has no effect with --conversion random, which loads no weights; remove it")
    return problems


def _layout_problems(config: RunConfig, world_size: int) -> list[str]:
    problems = []
    parallel, training = config.parallel, config.training
    tp, pp, cp, ep, etp = (max(1, size) for size in _sizes(parallel))
    if world_size % (tp * pp * cp):
        return [
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp}: "
            f"does not divide the {world_size} processes; change the sizes or the number of processes"
        ]
    # Outside the experts, TP x CP x DP processes share a stage; the experts are divided over all of them.
    stage = world_size // pp
    if stage % (ep * etp):
        problems.append(
            f"--expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp}: does not divide the {stage} "
            "processes of a pipeline stage; change the sizes or the number of processes"
        )
    dp = world_size // (tp * pp * cp)
    if not find_length_problems(config):
        interleaved = pp if parallel.num_virtual_stages_per_pipeline_rank > 1 else 1
        problems += find_undividable(config.batch_sizes, max(1, training.micro_batch_size), dp, interleaved)
    if parallel.num_virtual_stages_per_pipeline_rank > 1 and pp == 1:
        problems.append(
            f"--num-virtual-stages-per-pipeline-rank {parallel.num_virtual_stages_per_pipeline_rank}: has no effect "
            "without --pipeline-model-parallel-size above 1; remove it"
        )
    if parallel.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel: has no effect without --tensor-model-parallel-size above 1; remove it")
    pieces = cp * (tp if parallel.sequence_parallel else 1)
    if config.input_length % pieces:
        problems.append(
            f"--seq-length {config.data.seq_length}: is divided over {pieces} processes (--context-parallel-size and "
            f"--sequence-parallel); use a multiple of {pieces}"
        )
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        problems.append("--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce; add them")
    return problems


def _sizes(parallel: ParallelConfig) -> tuple[int, int, int, int, int]:
    """TP, PP, CP, EP, ETP."""
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )


def _model_config_problems(config: RunConfig, model_config: ModelConfig) -> list[str]:
    parallel = config.parallel
    tp, pp, _, ep, etp = (max(1, size) for size in _sizes(parallel))
    stages = pp * max(1, parallel.num_virtual_stages_per_pipeline_rank)
    stage_flag = "pipeline_model_parallel_size" if stages == pp else "num_virtual_stages_per_pipeline_rank"
    problems = []
    for what, amount, name, size in (
        ("attention heads", model_config.num_attention_heads, "tensor_model_parallel_size", tp),
        ("key-value heads", model_config.num_key_value_heads, "tensor_model_parallel_size", tp),
        ("vocabulary rows", model_config.vocab_size, "tensor_model_parallel_size", tp),
        ("layers", model_config.num_layers, stage_flag, stages),
        ("experts", model_config.num_experts, "expert_model_parallel_size", ep),
        ("rows of an expert", model_config.moe_intermediate_size, "expert_tensor_parallel_size", etp),
    ):
        if amount % size:
            problems.append(f"{flag(name)} {size}: does not divide the model's {amount} {what}; choose a divisor")
    if not model_config.is_moe and model_config.intermediate_size % tp:
        problems.append(
            f"--tensor-model-parallel-size {tp}: does not divide the model's MLP width "
            f"{model_config.intermediate_size}; choose a divisor"
        )
    for name, size in (("expert_model_parallel_size", ep), ("expert_tensor_parallel_size", etp)):
        if size > 1 and not model_config.is_moe:
            problems.append(f"{flag(name)} {size}: the model is dense and has no experts; remove it")
    if parallel.moe_expert_placement not in ("auto", "none") and not model_config.is_moe:
        problems.append(
            f"--moe-expert-placement {parallel.moe_expert_placement}: the model is dense and has no experts; remove it"
        )
    if model_config.is_moe and tp > 1 and not parallel.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {tp}: MoE layers require --sequence-parallel with it; add that flag"
        )
    if config.data.seq_length > model_config.context_length:
        problems.append(
            f"--seq-length {config.data.seq_length}: the model's context length is "
            f"{model_config.context_length}; shorten the samples, or add YaRN to the model (docs/weights.md)"
        )
    if config.diffusion.objective != "ar" and model_config.mask_token_id is None:
        problems.append(
            f"--objective {config.diffusion.objective}: the checkpoint's hf/config.json has no mask_token_id; "
            "convert the model again with python -m checkpoints_tools.convert_hf"
        )
    frozen = {role for role, factor in config.optimization.lr_mult.items() if factor == 0}
    if frozen != set(ROLES) and frozen >= {role for role in ROLES if model_config.has_role(role)}:
        problems.append("--lr-mult: freezes every role that the model has, so nothing would train; set one above 0")
    if not model_config.is_moe and "router" in config.optimization.lr_mult:
        problems.append("--lr-mult router=...: the model is dense and has no router; remove it")
    if model_config.tie_word_embeddings and "head" in config.optimization.lr_mult:
        problems.append(
            "--lr-mult head=...: the model's LM head is tied to the embedding; set the factor of embedding instead"
        )
    return problems
