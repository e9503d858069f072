"""Validation of the performance and precision settings, before anything is built.

megatron.core asserts most of these combinations itself, but one at a time, during construction, and in its own terms.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_a2d.config.core_attention import isolates_documents, own_attention_problems
from megatron_a2d.config.fp8_recipe import chosen_recipe, emulation_of
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, flag, settings
from megatron_a2d.config.validate_batch import changes_batch_size

# Settings that need Transformer Engine.
_NEEDS_TRANSFORMER_ENGINE = (
    "fp8_recipe", "fp4_recipe", "moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion",
    "gradient_accumulation_fusion", "use_precision_aware_optimizer", "cuda_graph_impl", "delay_wgrad_compute",
    "use_transformer_engine_op_fuser",
)  # fmt: skip
_FOR_EXPERTS = (
    "moe_permute_fusion", "moe_router_fusion", "moe_router_force_load_balancing", "overlap_moe_expert_parallel_comm",
    "use_transformer_engine_op_fuser",
)  # fmt: skip


def find_performance_problems(config: RunConfig, model_config: ModelConfig | None) -> list[str]:
    """One line per problem: flag and value, why, what to do."""
    problems = [
        f"{_shown(config, name)}: has no effect without {needed}; set that too, or remove this"
        for name, needed in without_effect(config).items()
    ]
    problems += [
        *_fp8_problems(config), *_gathered_fp8_problems(config), *_emulation_problems(config),
        *_memory_problems(config), *_overlap_problems(config), *_hybridep_problems(config), *_graph_problems(config),
        *_engine_problems(config), *own_attention_problems(config),
    ]  # fmt: skip
    if model_config is not None:
        problems += [*_expert_problems(config, model_config), *_size_problems(config, model_config)]
    return problems


def needs_transformer_engine(config: RunConfig) -> list[str]:
    """The flags that were set and that need Transformer Engine; FP8 and FP4 are emulated on local layers."""
    emulated = ("fp8_recipe", "fp4_recipe") if emulation_of(config) else ()
    return [name for name in _NEEDS_TRANSFORMER_ENGINE if _is_set(config, name) and name not in emulated]


def _is_set(config: RunConfig, name: str) -> bool:
    default = settings()[name].default
    value = getattr(config.performance, name)
    return (tuple(value) if isinstance(default, tuple) else value) != default


def without_effect(config: RunConfig) -> dict[str, str]:
    """Options that were set of a feature that is not enabled -> the flag that enables it."""
    performance = config.performance
    flex = config.parallel.moe_token_dispatcher_type == "flex"
    hybridep = flex and performance.moe_flex_dispatcher_backend != "deepep"
    needs_hybridep = "--moe-token-dispatcher-type flex and its backend hybridep"
    full, selective = (performance.recompute_granularity == kind for kind in ("full", "selective"))
    precise = performance.use_precision_aware_optimizer
    options = (
        ("first_last_layers_bf16", chosen_recipe(config) != "none", "--fp8-recipe or --fp4-recipe"),
        ("fp8_output_proj", performance.fp8_recipe != "none", "--fp8-recipe"),
        ("num_layers_at_start_in_bf16", performance.first_last_layers_bf16, "--first-last-layers-bf16"),
        ("num_layers_at_end_in_bf16", performance.first_last_layers_bf16, "--first-last-layers-bf16"),
        ("moe_flex_dispatcher_backend", flex, "--moe-token-dispatcher-type flex"),
        ("moe_hybridep_num_sms", hybridep, needs_hybridep),
        ("moe_hybridep_num_sms_preprocessing", hybridep, needs_hybridep),
        ("delay_wgrad_compute", performance.overlap_moe_expert_parallel_comm, "--overlap-moe-expert-parallel-comm"),
        ("cuda_graph_scope", performance.cuda_graph_impl != "none", "--cuda-graph-impl"),
        ("recompute_method", full, "--recompute-granularity full"),
        ("recompute_num_layers", full, "--recompute-granularity full"),
        ("recompute_modules", selective, "--recompute-granularity selective"),
        ("exp_avg_dtype", precise, "--use-precision-aware-optimizer"),
        ("exp_avg_sq_dtype", precise, "--use-precision-aware-optimizer"),
        ("manual_gc_interval", performance.manual_gc, "--manual-gc"),
        ("grad_reduce_in_fp32", config.training.bf16, "--bf16"),
    )  # fmt: skip
    return {name: needed for name, effective, needed in options if not effective and _is_set(config, name)}


def _fp8_problems(config: RunConfig) -> Iterator[str]:
    performance = config.performance
    for name in ("fp8_recipe", "fp4_recipe"):
        if _is_set(config, name) and not config.training.bf16:
            yield f"{_shown(config, name)}: needs --bf16, in which everything else is computed; add it"
    if performance.fp4_recipe != "none" and performance.fp8_recipe != "none":
        yield f"{_shown(config, 'fp4_recipe')}: not with {_shown(config, 'fp8_recipe')}; choose one"
    uses_fp4 = performance.fp4_recipe != "none" and not emulation_of(config)
    if uses_fp4 and performance.overlap_moe_expert_parallel_comm:
        yield (
            "--overlap-moe-expert-parallel-comm: with --fp4-recipe megatron-core 0.16.1's interleaved schedule never "
            "enters FP4, and all layers would compute in bf16; drop one"
        )
    if performance.fp8_recipe == "delayed" and performance.first_last_layers_bf16:
        yield (
            "--first-last-layers-bf16: delayed scaling needs all layers in FP8 for its amax history (megatron.core "
            "refuses the pair); use --fp8-recipe tensorwise, blockwise or mxfp8"
        )


def _gathered_fp8_problems(config: RunConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    if not performance.fp8_param_gather:
        return
    if performance.fp8_recipe == "none":
        yield "--fp8-param-gather: needs --fp8-recipe; set that too"
        return
    if not parallel.use_distributed_optimizer:
        yield "--fp8-param-gather: needs --use-distributed-optimizer, which holds the fp32 weights; add it"
    overlaps = parallel.overlap_grad_reduce and parallel.overlap_param_gather
    if performance.fp8_recipe in ("auto", "mxfp8") and not overlaps:
        yield (
            f"--fp8-param-gather: with --fp8-recipe {performance.fp8_recipe} the gathered weights are in the "
            "gradients' buffer, and without --overlap-grad-reduce and --overlap-param-gather that gives NaN; add both"
        )
    if performance.use_precision_aware_optimizer:
        yield "--fp8-param-gather: not with --use-precision-aware-optimizer, whose main weights it reads; drop one"
    for setting, sets_weights in (
        ("--mask-token-init mean", config.diffusion.mask_token_init == "mean"),
        ("--conversion random", config.diffusion.conversion == "random"),
    ):
        if sets_weights:
            yield f"--fp8-param-gather: not with {setting}, after which all main weights would be FP8's; drop one"


def _emulation_problems(config: RunConfig) -> Iterator[str]:
    performance, emulation = config.performance, emulation_of(config)
    if emulation is None:
        if performance.fp8_output_proj and performance.fp8_recipe != "none":
            yield "--fp8-output-proj: the LM head is in FP8 in emulation alone; add --transformer-impl local"
        return
    if emulation.recipe == "auto":
        yield "--fp8-recipe auto: is a GPU's choice, and --transformer-impl local emulates a recipe by name; name one"
    if performance.fp8_param_gather:
        yield "--fp8-param-gather: with --transformer-impl local FP8 is emulated, and weights stay in bf16; remove it"
    if emulation.recipe == "delayed" and performance.recompute_granularity != "none":
        yield (
            f"--recompute-granularity {performance.recompute_granularity}: not where --fp8-recipe delayed is emulated, "
            "whose scales would advance with what is computed again; remove one"
        )
    if "moe_act" in performance.recompute_modules:
        yield "--recompute-modules moe_act: has no effect where FP8 or FP4 is emulated; recompute moe"


def _memory_problems(config: RunConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    modules = performance.recompute_modules
    if performance.recompute_granularity == "selective" and not modules:
        yield f"--recompute-modules: is empty; choose from {', '.join(settings()['recompute_modules'].choices)}"
    if "moe_act" in modules and not performance.moe_grouped_gemm:
        yield "--recompute-modules moe_act: needs --moe-grouped-gemm; add that, or recompute moe"
    scaled_late = {"moe_act", "layernorm"} & set(modules)
    if scaled_late and performance.fp8_recipe == "delayed":
        yield f"--recompute-modules {min(scaled_late)}: not with --fp8-recipe delayed; use another scaling"
    if performance.recompute_num_layers < 1:
        yield f"--recompute-num-layers {performance.recompute_num_layers}: must be at least 1"
    if performance.manual_gc_interval < 1:
        yield f"--manual-gc-interval {performance.manual_gc_interval}: must be at least 1"
    if performance.use_precision_aware_optimizer and not parallel.use_distributed_optimizer:
        yield "--use-precision-aware-optimizer: needs --use-distributed-optimizer; add it"
    if performance.use_precision_aware_optimizer and not config.training.bf16:
        yield "--use-precision-aware-optimizer: needs --bf16; add it"
    if not performance.grad_reduce_in_fp32 and performance.gradient_accumulation_fusion:
        yield "--gradient-accumulation-fusion: adds to fp32 gradients; not with --no-grad-reduce-in-fp32, drop one"


def _overlap_problems(config: RunConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    if parallel.moe_token_dispatcher_type == "flex":
        if parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size == 1:
            yield "--moe-token-dispatcher-type flex: needs --expert-model-parallel-size above 1; use alltoall"
        if not config.training.bf16:
            yield "--moe-token-dispatcher-type flex: its kernels send bf16 tokens; add --bf16, or use alltoall"
    if not performance.overlap_moe_expert_parallel_comm:
        return
    name = "--overlap-moe-expert-parallel-comm"
    if parallel.expert_model_parallel_size == 1:
        yield f"{name}: has no effect without --expert-model-parallel-size above 1; remove it"
    if parallel.moe_token_dispatcher_type == "allgather":
        yield f"{name}: not with --moe-token-dispatcher-type allgather; use alltoall or flex"
    if not config.training.bf16:
        yield f"{name}: megatron.core supports it only in bf16; add --bf16"
    if parallel.pipeline_model_parallel_size > 1 and parallel.num_virtual_stages_per_pipeline_rank == 1:
        yield f"{name}: needs the interleaved schedule: --num-virtual-stages-per-pipeline-rank above 1"
    if performance.recompute_granularity == "full":
        yield f"{name}: not with --recompute-granularity full; use selective"
    if "moe" in performance.recompute_modules:
        yield f"{name}: not with --recompute-modules moe, whose parts are interleaved; use moe_act"
    for role in ("attention", "mlp"):
        if performance.delay_wgrad_compute and config.optimization.lr_mult.get(role) == 0:
            yield f"--delay-wgrad-compute: waits for gradients of {role}, which --lr-mult {role}=0 freezes; drop one"
    if {"mlp"} & set(performance.cuda_graph_scope) and performance.cuda_graph_impl != "none":
        yield f"{name}: not with --cuda-graph-scope mlp; remove one"
    if performance.cuda_graph_impl == "local":
        yield f"{name}: not with --cuda-graph-impl local; use transformer_engine"


def _hybridep_problems(config: RunConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    for name in ("moe_hybridep_num_sms", "moe_hybridep_num_sms_preprocessing"):
        if (sms := getattr(performance, name)) is not None and sms < 1:
            yield f"{flag(name)} {sms}: must be at least 1"
    if performance.use_transformer_engine_op_fuser:
        name = "--use-transformer-engine-op-fuser"
        if not config.training.bf16:
            yield f"{name}: Transformer Engine's grouped products are in bf16 or FP8; add --bf16"
        if not performance.moe_grouped_gemm:
            yield f"{name}: not with --no-moe-grouped-gemm, which computes expert by expert; drop one"
        if parallel.expert_tensor_parallel_size > 1:
            yield f"{name}: not with --expert-tensor-parallel-size above 1; use 1"
    if (factor := performance.moe_expert_rank_capacity_factor) is None:
        return
    name = f"--moe-expert-rank-capacity-factor {factor:g}"
    if not 1 <= factor < float("inf"):
        yield f"{name}: must be at least 1, the mean; every step would exceed less"
    if parallel.moe_token_dispatcher_type != "flex" or performance.moe_flex_dispatcher_backend != "hybridep":
        yield (
            f"{name}: the buffers are HybridEP's; add --moe-token-dispatcher-type flex and "
            "--moe-flex-dispatcher-backend hybridep"
        )
    if not performance.use_transformer_engine_op_fuser:
        yield f"{name}: other experts wait for their group sizes; add --use-transformer-engine-op-fuser"
    if (recipe := chosen_recipe(config)) not in ("none", "auto", "mxfp8"):
        yield f"{name}: with {recipe} Transformer Engine may read group sizes on the host; use mxfp8, or bf16 alone"
    if performance.cuda_graph_impl != "none" and "moe_preprocess" in performance.cuda_graph_scope:
        yield (
            f"{name}: not with --cuda-graph-scope moe_preprocess, whose replays do not pass the buffers' size on "
            "(megatron-core 0.19, token_dispatcher.py); remove one"
        )


def _graph_problems(config: RunConfig) -> Iterator[str]:
    performance = config.performance
    impl, scope = performance.cuda_graph_impl, performance.cuda_graph_scope
    if impl == "none":
        return
    if not scope:
        yield f"--cuda-graph-scope: is empty; choose from {', '.join(settings()['cuda_graph_scope'].choices)}"
    if "moe_preprocess" in scope and "moe_router" not in scope:
        yield "--cuda-graph-scope moe_preprocess: needs the router in the graph too; add moe_router"
    if performance.recompute_granularity == "full":
        yield f"--cuda-graph-impl {impl}: not with --recompute-granularity full; use selective, or none"
    if performance.first_last_layers_bf16 and performance.gradient_accumulation_fusion:
        yield (
            f"--first-last-layers-bf16: with --cuda-graph-impl {impl} and --gradient-accumulation-fusion those layers "
            "would keep only the gradients of the last micro-batch; drop one of the three"
        )
    if "moe" in performance.recompute_modules and "moe_router" in scope:
        yield "--cuda-graph-scope moe_router: not with --recompute-modules moe; remove one"
    overlaps = performance.overlap_moe_expert_parallel_comm
    if (config.parallel.pipeline_model_parallel_size > 1 or overlaps) and changes_batch_size(config):
        yield (
            f"--cuda-graph-impl {impl}: the graphs of a pipeline, and those with overlapped experts, are captured for "
            "one number of micro-batches, and this run's batch size changes; use a constant batch, or none"
        )
    if isolates_documents(config):
        yield (
            f"--cuda-graph-impl {impl}: with intra-document attention kernel sizes change from batch to "
            "batch; use --no-reset-attention-mask without --random-length-prob, or none"
        )


def _engine_problems(config: RunConfig) -> Iterator[str]:
    if config.training.transformer_impl == "local":
        for name in needs_transformer_engine(config):
            yield f"{_shown(config, name)}: only Transformer Engine has it; use --transformer-impl auto, or remove it"


def _expert_problems(config: RunConfig, model_config: ModelConfig) -> Iterator[str]:
    performance = config.performance
    graphs = performance.cuda_graph_scope if performance.cuda_graph_impl != "none" else ()
    if model_config.is_moe:
        yield from _single_expert_problems(config, model_config)
        for name, chosen in (("recompute_modules", performance.recompute_modules), ("cuda_graph_scope", graphs)):
            if "mlp" in chosen:
                yield f"{flag(name)} mlp: the model has experts instead; remove it"
        return
    for name in _FOR_EXPERTS:
        if _is_set(config, name):
            yield f"{_shown(config, name)}: the model is dense and has no experts; remove it"
    if config.parallel.moe_token_dispatcher_type == "flex":
        yield "--moe-token-dispatcher-type flex: the model is dense and has no experts; remove it"
    for name, chosen in (("recompute_modules", performance.recompute_modules), ("cuda_graph_scope", graphs)):
        for module in chosen:
            if module.startswith("moe"):
                yield f"{flag(name)} {module}: the model is dense and has no experts; remove it"


def _single_expert_problems(config: RunConfig, model_config: ModelConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    size, whole = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size == 1
    interleaves = performance.overlap_moe_expert_parallel_comm and parallel.moe_token_dispatcher_type == "alltoall"
    in_bf16 = chosen_recipe(config) == "none" or emulation_of(config)
    if interleaves and size == model_config.num_experts and whole and in_bf16:
        yield (
            f"--overlap-moe-expert-parallel-comm: with --expert-model-parallel-size {size} a process has one expert, "
            "whose input megatron.core 0.16 frees too early; use a smaller one, or flex"
        )


def _size_problems(config: RunConfig, model_config: ModelConfig) -> Iterator[str]:
    performance, parallel = config.performance, config.parallel
    stage = max(1, model_config.num_layers // max(1, parallel.pipeline_model_parallel_size))
    if performance.recompute_granularity == "full" and performance.recompute_num_layers > stage:
        yield f"--recompute-num-layers {performance.recompute_num_layers}: a stage has {stage} layers; choose fewer"
    recipe = chosen_recipe(config)
    if recipe == "none":
        return
    shown = _shown(config, "fp4_recipe" if recipe == "nvfp4" else "fp8_recipe")
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(performance, name)
        if performance.first_last_layers_bf16 and not 0 <= count <= stage:
            yield f"{flag(name)} {count}: must lie between 0 and the {stage} layers of a stage"
    if performance.fp8_param_gather and performance.fp8_recipe in ("auto", "mxfp8"):
        # Each weight is aligned to 64 elements; megatron.core 0.16 reads it at the end of the previous one.
        for what, size in (("hidden size", model_config.hidden_size), ("head size", model_config.head_dim)):
            if size % 64:
                yield (
                    f"--fp8-param-gather: the {what}, {size}, is not a multiple of 64, and with --fp8-recipe "
                    f"{performance.fp8_recipe} weights would be read at wrong offsets of the gradients' buffer; drop "
                    "it, or choose another --fp8-recipe"
                )
    # Transformer Engine's FP8 products need multiples of 16 on every side; MXFP8 scales blocks of 32, and FP4 products
    # read 16 bytes, which are 32 numbers.
    block = 32 if recipe in ("auto", "mxfp8", "nvfp4") else 16
    tp, etp = (max(1, n) for n in (parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size))
    pieces = max(1, parallel.context_parallel_size) * (tp if parallel.sequence_parallel else 1)
    tokens = config.training.micro_batch_size * config.data.seq_length // pieces
    query_rows = (model_config.num_attention_heads + 2 * model_config.num_key_value_heads) * model_config.head_dim // tp
    mlp = model_config.moe_intermediate_size // etp if model_config.is_moe else model_config.intermediate_size // tp
    # Tensors gathered by sequence parallelism must consist of full 128 x 128 blocks (Transformer Engine 2.12,
    # Float8BlockQuantizer.is_quantizable, asserted by its column-parallel layers).
    gathers_blocks = recipe == "blockwise" and parallel.sequence_parallel
    gathered = 128 if gathers_blocks else block
    for what, size, multiple in (
        ("tokens of a micro-batch on a process", tokens, gathered),
        ("hidden size", model_config.hidden_size, gathered),
        ("rows of a process's query, key and value matrix", query_rows, block),
        ("rows of a process's MLP matrix", mlp, block),
    ):
        if size % multiple:
            remedy = "leave out --sequence-parallel, or " if gathers_blocks and size % block == 0 else ""
            yield f"{shown}: the {what}, {size}, is not a multiple of {multiple}; {remedy}choose other sizes or none"


def _shown(config: RunConfig, name: str) -> str:
    value = getattr(config.performance, name)
    if value is True:
        return flag(name)
    if value is False:
        return "--no-" + flag(name)[2:]
    return f"{flag(name)} {' '.join(value) if isinstance(value, tuple | list) else value}".rstrip()
