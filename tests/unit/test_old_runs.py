"""What runs of earlier versions rely on: golden values of all that is drawn, and the settings that a resume is held to."""

from __future__ import annotations

import ast
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import megatron_a2d
from megatron_a2d.config.settings import RunConfig, build, flag, settings
from megatron_a2d.data.blended_dataset import SourceChoice
from megatron_a2d.data.permutation import Permutation
from megatron_a2d.diffusion import rng as noises
from megatron_a2d.diffusion.attention_masks import annealing_key_and_threshold
from megatron_a2d.diffusion.block_diffusion import corrupt_blocks
from megatron_a2d.diffusion.choice_decision import draws
from megatron_a2d.diffusion.conditional_likelihood import likelihood_samples
from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.rng import Noise, Stream, attention_key, random_cut, uniforms
from megatron_a2d.diffusion.sampling.token_scores import position_uniforms, row_seed
from megatron_a2d.study.gradient_moments import BatchTimes
from megatron_a2d.study.infilling_eval import holes
from megatron_a2d.training.initialization import normals
from megatron_a2d.training.resume import FIXED, REPORTED, differences, find_start
from megatron_a2d.utils.atomic_write import write_json

PACKAGE = Path(megatron_a2d.__file__).parent

# Golden values. A change of one of them is a change of every run that is resumed: there is no reason to edit them.


def test_the_order_of_samples() -> None:
    orders = {epoch: [Permutation(1000, 1234, epoch)(index) for index in (0, 1, 2, 999)] for epoch in (0, 1)}
    assert orders == {0: [154, 575, 716, 624], 1: [450, 0, 707, 487]}
    assert [Permutation(10**12 + 39, 7, 0)(index) for index in (0, 10**12)] == [436614495290, 422881092974]
    assert [Permutation(10, 5)(index) for index in range(10)] == [3, 0, 6, 9, 5, 2, 7, 8, 1, 4]


def test_the_sources_of_a_mixture() -> None:
    choice = SourceChoice([Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)], 1234)
    found = [tuple(choice(index)) for index in (0, 1, 2, 3, 5000, 10**9)]
    assert found == [(1, 238), (2, 139), (1, 76), (0, 457), (0, 2339), (2, 199999931)]


def test_random_cuts() -> None:
    cuts = {index: random_cut(1234, index, 4096, 0.01) for index in range(700)}
    assert {index: place for index, place in cuts.items() if place is not None} == {
        47: 2787, 48: 3444, 49: 2086, 118: 2499, 239: 3933, 280: 2277, 334: 136, 473: 3061, 495: 2868, 570: 368, 670: 4,
    }  # fmt: skip
    assert random_cut(7, 10**12, 64, 1.0) == 5
    assert {random_cut(7, index, 3, 1.0) for index in range(50)} == {1, 2}, "both parts hold a token"
    assert random_cut(7, 0, 1, 1.0) is None


def test_attention_keys() -> None:
    keys = [attention_key(seed, index) for seed, index in ((1234, 0), (1234, 1), (7, 10**12))]
    assert keys == [-2850068064519920615, -2798035208783464651, 2867923649604362579]
    annealing = annealing_key_and_threshold(1234, 5, 2, 10)
    assert annealing is not None and annealing.tolist() == [-443895856657101926, 2702159776422297]


def test_times_and_masks() -> None:
    noise = Noise(7, 99, timestep_sampling="uniform")
    times = [noise.time(index) for index in (0, 1, 10**12)]
    assert times == pytest.approx([0.8825843634242867, 0.5063559427572774, 0.5674081256469362], abs=1e-15)

    def masked(tokens: np.ndarray) -> str:
        return "".join("#" if token == 99 else "." for token in tokens[:24])

    samples = (
        corrupt(np.arange(24), 4, Noise(7, 99)), corrupt(np.arange(24), 4, Noise(7, 99, mask_sampling="exact_count")),
        corrupt_blocks(np.arange(24), 3, Noise(7, 99), 6),
    )  # fmt: skip
    assert [masked(sample.tokens) for sample in samples] == [
        ".##..#.#....#.#.#.#.#.##",
        ".##..#.#......#.#.#.#..#",
        ".#...#######.##..##.....",
    ]


def test_weights_and_texts_that_are_drawn() -> None:
    drawn = normals(1234, "output_layer.weight", 5, 3)
    assert drawn == pytest.approx([0.3890656530857086, -2.479562520980835, 1.3748716115951538], rel=1e-6)
    assert [row_seed(0, 0), row_seed(1234, 7)] == [1452414493, 2772063322]
    draws = position_uniforms(3, 2, 2)
    assert draws.tolist() == [[0.8344555478405586, 0.2765326682665008], [0.3983448418783271, 0.4033070297478679]]


def test_the_masks_of_a_likelihood() -> None:
    masks = likelihood_samples(6, 9, seed=3).masks.astype(int)
    assert ["".join(map(str, row)) for row in masks] == [
        "010001", "101110", "111111", "000100", "011010", "111101", "010000", "100011", "011111",
    ]  # fmt: skip


# Streams.


def test_every_stream_has_its_number() -> None:
    assert {stream.name: int(stream) for stream in Stream} == {
        "MASK": 0, "TIME": 1, "CUT": 2, "ATTENTION": 3, "CONTINUATION": 4, "CHOICE": 5, "STUDY_HOLE": 101, "STUDY_TIME": 102,
    }  # fmt: skip
    first = {float(uniforms(1234, stream, 5, 1)[0]) for stream in Stream}
    assert len(first) == len(Stream) and uniforms(1234, Stream.MASK, 5, 1)[0] == 0.39436698157209327


def test_no_two_uses_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use, called once, under the streams that it draws from."""
    asked: list[Stream] = []
    original = noises._bits

    def record(seed: int, stream: Stream, index: int, count: int) -> np.ndarray:
        assert isinstance(stream, Stream)
        asked.append(stream)
        return original(seed, stream, index, count)

    monkeypatch.setattr(noises, "_bits", record)
    noises._first_time.cache_clear()
    noise = Noise(5, 99)

    opened: Any = SimpleNamespace(config=build({}), model_config=SimpleNamespace(mask_token_id=99))
    uses: dict[str, Any] = {
        "mask": lambda: noise.uniforms(0, 8),
        "time": lambda: noise.time(0),
        "cut": lambda: random_cut(5, 0, 8, 1.0),
        "attention": lambda: attention_key(5, 0),
        "likelihood": lambda: likelihood_samples(9, 1),
        "choices": lambda: draws.__wrapped__(9, 1),
        "hole": lambda: holes(opened, 2)(np.arange(8), 0),
        "study's times": lambda: BatchTimes(5, 99, scheme="iid").time(0),
    }
    found = {}
    for name, use in uses.items():
        asked.clear()
        use()
        found[name] = set(asked)
    assert Counter(stream for streams in found.values() for stream in streams) == Counter(Stream), found


def test_nothing_else_counts_streams() -> None:
    """Philox is asked in rng.py alone, and by the weights that are drawn, under keys that are hashes."""
    places = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "Philox"
    }
    assert places == {"diffusion/rng.py", "training/initialization.py"}


def test_a_seed_reaches_into_no_other_stream() -> None:
    with pytest.raises(AssertionError):
        uniforms(1 << 64, Stream.MASK, 0, 1)


# Settings. Every field of the configuration is in one of these three: a new one has to be thought about.

FREE = {
    "the layout": (
        "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank", "context_parallel_size", "expert_model_parallel_size",
        "expert_tensor_parallel_size", "moe_token_dispatcher_type", "moe_expert_placement", "use_distributed_optimizer",
        "overlap_grad_reduce", "overlap_param_gather", "micro_batch_size",
    ),
    "when to give up": ("distributed_timeout_minutes", "max_skipped_steps", "on_spike", "max_rollbacks"),
    "samples ahead; those of the checkpoint stay": ("skip_samples",),
    "a place; what lies there is bound by its fingerprint": ("train_data_path", "data_mixture"),
    "what is read, written or shown, not trained": (
        "valid_data_path", "eval_interval", "eval_iters", "log_interval", "monitor", "tensorboard_dir", "wandb_project", "profile",
        "profile_step_start", "profile_step_end", "save", "save_interval", "async_save", "keep_latest_k", "save_retain_interval",
        "on_save_error", "verify_checkpoint", "verify_tokenizer",
    ),
    "where the run starts and ends": (
        "model", "load", "ckpt_step", "finetune", "exit_interval", "exit_duration_in_mins",
    ),
    "speed and memory: the same numbers, rounded otherwise": (
        "num_workers", "transformer_impl", "moe_grouped_gemm", "moe_flex_dispatcher_backend", "moe_permute_fusion",
        "moe_router_fusion", "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "apply_rope_fusion",
        "gradient_accumulation_fusion", "cuda_graph_impl", "cuda_graph_scope", "recompute_granularity",
        "recompute_method", "recompute_num_layers", "recompute_modules", "grad_reduce_in_fp32",
        "use_precision_aware_optimizer", "exp_avg_dtype", "exp_avg_sq_dtype", "manual_gc", "manual_gc_interval",
        "fp8_param_gather", "moe_hybridep_num_sms", "moe_hybridep_num_sms_preprocessing", "use_transformer_engine_op_fuser",
        "moe_expert_rank_capacity_factor",
    ),
}  # fmt: skip
REPORTED_ONES = {
    "lr", "min_lr", "lr_mult", "lr_warmup_iters", "lr_warmup_samples", "lr_wsd_decay_samples", "train_samples", "train_tokens", "lr_decay_style", "lr_wsd_decay_iters", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_eps", "clip_grad", "train_iters", "fp8_recipe", "fp4_recipe", "fp8_output_proj", "first_last_layers_bf16",
    "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "moe_router_force_load_balancing",
    "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_aux_loss_tokens", "moe_aux_loss_loads", "moe_z_loss_coeff",
    "moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_expert_capacity_factor", "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity", "muon_momentum", "muon_use_nesterov", "muon_num_ns_steps", "muon_scale_mode",
    "muon_extra_scale_factor", "muon_fp32_matmul_prec",
}  # fmt: skip
FIXED_ONES = {
    "global_batch_size", "rampup_batch_size", "batch_schedule", "attention_annealing_samples", "grafting_samples",
    "block_length_schedule_samples", "bf16", "train_data_fingerprint", "seq_length", "reset_attention_mask", "reset_position_ids",
    "random_length_prob", "eod_mask_loss", "seed", "objective", "block_length", "ar_loss_weight", "noise_schedule",
    "timestep_sampling", "min_timestep", "mask_sampling", "mask_token_init", "label_shift", "loss_weighting", "cart_p",
    "conversion", "attention_annealing_iters", "grafting_iters", "block_length_schedule", "reset_block_grid",
    "complementary_masks", "optimizer", "muon_router",
}  # fmt: skip


def other_value(name: str) -> Any:
    """A value that the setting does not have by default."""
    setting = settings()[name]
    if name in ("rampup_batch_size", "skip_samples"):
        return {"rampup_batch_size": (4, 2, 16), "skip_samples": ("4-5",)}[name]
    if isinstance(setting.kind, tuple):
        return next(choice for choice in setting.kind if choice != setting.default)
    others = {bool: not setting.default, dict: {"mlp": 0.5}, list: setting.choices[-1:], str: "another"}
    return others.get(setting.kind, (setting.default or 0) + 1 if setting.kind in (int, float) else None)


def test_every_setting_is_fixed_reported_or_free() -> None:
    free = [name for names in FREE.values() for name in names]
    assert sorted([*FIXED_ONES, *REPORTED_ONES, *free]) == sorted(RunConfig().to_dict()), "each has one place"
    assert sorted(FIXED) == sorted(FIXED_ONES) and sorted(REPORTED) == sorted(REPORTED_ONES)


def test_a_record_from_before_a_setting(tmp_path: Path) -> None:
    """A setting that it lacks had its default: nothing is refused, nothing told."""
    (tmp_path / "iter_0000003").mkdir()
    write_json(tmp_path / "iter_0000003" / "run.json", {"train_data_fingerprint": "some"})
    config = build({"verify_checkpoint": False, "save": str(tmp_path), "train_data_fingerprint": "some"})
    told: list[str] = []
    assert find_start(config, told.append).directory.name == "iter_0000003" and told == []


@pytest.mark.parametrize("recorded", ["1:2, 4:1", "1:2,4:1", "1:2,4:2"])
def test_a_recorded_schedule_with_spaces(recorded: str, tmp_path: Path) -> None:
    """It is the same schedule as one without, as settings are read now."""
    write_json(tmp_path / "run.json", build({"block_length_schedule": recorded}).to_dict())
    lines = differences(build({"block_length_schedule": "1:2,4:1"}), tmp_path)
    assert len(lines) == (recorded == "1:2,4:2"), lines


@pytest.mark.parametrize("name", list(RunConfig().to_dict()))
def test_a_resume_under_another_setting(name: str, tmp_path: Path) -> None:
    """One setting changed, either way round: a fixed one is refused, a reported one is printed, a free one is ignored."""
    directory = tmp_path / "iter_0000003"
    directory.mkdir()
    for was, now in (({}, {name: other_value(name)}), ({name: other_value(name)}, {})):
        recorded = {"train_data_fingerprint": "some"} | was
        write_json(directory / "run.json", build(recorded).to_dict())
        own = {"verify_checkpoint": False, "save": str(tmp_path), "train_data_fingerprint": "some"}
        config = build(own | now)
        lines = differences(config, directory)
        assert len(lines) == (name in FIXED_ONES), lines
        assert all("--finetune" in line for line in lines)
        if name != "train_data_fingerprint":
            assert all(line.startswith(f"{flag(name)} ") for line in lines)
        if name in FIXED_ONES | {"save", "ckpt_step", "verify_checkpoint"}:
            continue
        told: list[str] = []
        find_start(config, told.append)
        assert len(told) == (name in REPORTED_ONES)
        length = f"--train-iters 1000: was {flag(name)} 1 until"  # back from another unit of the run's length
        assert all(line.startswith((f"{flag(name)} ", length)) for line in told)
