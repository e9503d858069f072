"""The planner's view of a run: the model, its layout, its batch, and the settings that affect memory and speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_a2d.config.fp8_recipe import choose_scaling
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, settings
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.routing import EVEN, RankImbalance, Routing, assumed
from megatron_a2d.utils.errors import UserError


@dataclass(frozen=True)
class Job:
    """Sizes are counts of processes, samples and tokens. The settings' names are those of the command line."""

    model_config: ModelConfig
    world_size: int
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    num_virtual_stages_per_pipeline_rank: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    micro_batch_size: int = 1
    global_batch_size: int = 8
    seq_length: int = 4096
    objective: str = "mdlm"
    bf16: bool = False
    transformer_impl: str = "auto"
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_grouped_gemm: bool = True
    moe_router_load_balancing_type: str = "none"
    moe_aux_loss_loads: str = "previous"
    fp8_recipe: str = "none"
    fp4_recipe: str = "none"
    fp8_param_gather: bool = False
    recompute_granularity: str = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    cuda_graph_impl: str = "none"
    cuda_graph_scope: tuple[str, ...] = ()
    use_transformer_engine_op_fuser: bool = False
    moe_expert_rank_capacity_factor: float | None = None
    overlap_moe_expert_parallel_comm: bool = False
    grad_reduce_in_fp32: bool = True
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    optimizer: str = "adam"
    muon_num_ns_steps: int = 5
    # Not settings of a run: needed for the published runs, or assumed.
    fused_kernels: bool = False  # FP8 casts and activation functions fused into the experts' GEMMs
    whole_logits: bool = False  # the LM head materialises the logits of all positions
    overlap_p2p_comm: bool = False
    tp_comm_overlap: bool = False
    imbalance: RankImbalance = EVEN

    @property
    def data_parallel_size(self) -> int:
        """Ranks with the same dense weights and different samples."""
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        return self.world_size // model

    @property
    def dense_replicas(self) -> int:
        """Ranks over which the optimizer state of dense weights is divided: data- and context-parallel ones."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_replicas(self) -> int:
        """Ranks over which the optimizer state of an expert is divided."""
        experts = self.expert_model_parallel_size * self.expert_tensor_parallel_size
        return self.world_size // self.pipeline_model_parallel_size // experts

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def layers_per_stage(self) -> int:
        """Layers of the largest stage; our layouts divide the layers evenly, those of published runs may not."""
        return -(-self.model_config.num_layers // self.pipeline_model_parallel_size)

    @property
    def input_length(self) -> int:
        """Positions per sample: block diffusion reads each sample twice (as RunConfig.input_length)."""
        return self.seq_length * (2 if self.objective == "block" else 1)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank, before sequence parallelism divides them."""
        return self.micro_batch_size * self.input_length / self.context_parallel_size

    @property
    def tokens_between_layers(self) -> float:
        """Tokens per rank in the regions that sequence parallelism divides."""
        return self.tokens / (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    @property
    def routed_rows(self) -> float:
        """Routed tokens (one per chosen expert) that a rank receives in a micro-batch with balanced routing."""
        rows = self.tokens_between_layers * self.model_config.num_experts_per_tok
        return rows * self.expert_tensor_parallel_size

    @property
    def counting_passes(self) -> int:
        """Forward passes of the layers, without LM head, by which a step counts its experts' loads before it begins."""
        counts = self.moe_router_load_balancing_type == "global_aux_loss" and self.moe_aux_loss_loads == "current"
        return int(counts)

    @property
    def waits_for_group_sizes(self) -> bool:
        """Whether the host waits in each MoE layer for the number of tokens that it is sent.

        Not where HybridEP's buffers have a fixed size and the experts' products read their group sizes on the device.
        """
        fixed = self.use_transformer_engine_op_fuser and self.moe_expert_rank_capacity_factor is not None
        return self.model_config.is_moe and not fixed

    @property
    def keeps_sent_rows(self) -> bool:
        """Whether each layer keeps the routed tokens that it sent until its backward pass.

        With overlapped experts megatron-core 0.16.1 frees them once they are sent (fine_grained_callables.py,
        should_free_input), except those that a CUDA graph writes.
        """
        graphed = self.cuda_graph_impl != "none" and "moe_preprocess" in self.cuda_graph_scope
        return graphed and self.overlap_moe_expert_parallel_comm and self.moe_token_dispatcher_type == "alltoall"

    @property
    def received_rows(self) -> float:
        """Token copies that the buffers of the busiest rank have room for."""
        return self.routed_rows * (self.moe_expert_rank_capacity_factor or self.imbalance.peak)

    @property
    def number_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def quantizes(self) -> bool:
        """Whether the layers' GEMMs are in FP8 or FP4."""
        return (self.fp8_recipe, self.fp4_recipe) != ("none", "none")

    @property
    def operand_bytes(self) -> float:
        """Bytes per number of a GEMM's operand in the layers; NVFP4's with the e4m3 scale of each 16."""
        if self.fp4_recipe != "none":
            return 1 / 2 + 1 / 16
        return 1 if self.fp8_recipe != "none" else self.number_bytes

    @property
    def is_causal(self) -> bool:
        return self.objective == "ar"

    def recomputes(self, module: str) -> bool:
        """Whether the backward pass recomputes this part of a layer: a name of --recompute-modules, or `layer`."""
        if self.recompute_granularity == "full":
            return module == "layer"
        return self.recompute_granularity == "selective" and module in self.recompute_modules

    @property
    def recomputed_layers(self) -> int:
        """Layers of a stage that are fully recomputed, and save only their input."""
        if self.recompute_granularity != "full":
            return 0
        return (
            min(self.recompute_num_layers, self.layers_per_stage)
            if self.recompute_method == "block"
            else self.layers_per_stage
        )


def job_of(
    config: RunConfig,
    model_config: ModelConfig,
    world_size: int,
    cluster: Cluster | None = None,
    routing: Routing | None = None,
    **changes: Any,
) -> Job:
    """The job described by a run's settings; `changes` are fields of `Job`.

    `routing`: measured or given; None: as assumed of the run. --fp8-recipe auto depends on the cluster.

    UserError if the cluster's GPUs do not support --fp8-recipe or --fp4-recipe, or the FP4 rate is unknown.
    """
    known = {
        name: getattr(getattr(config, settings()[name].group), name)
        for name in Job.__dataclass_fields__
        if name in settings()
    }
    known["imbalance"] = (routing or assumed(config)).at(config.parallel.expert_model_parallel_size)
    job = Job(model_config=model_config, world_size=world_size, **(known | changes))
    # As in model/transformer_config.py.
    job = dataclasses.replace(job, overlap_p2p_comm=job.num_virtual_stages_per_pipeline_rank > 1)
    if cluster is None:
        return dataclasses.replace(job, fp8_recipe="mxfp8") if job.fp8_recipe == "auto" else job
    choose_scaling(job.fp4_recipe, cluster.capability)
    if job.fp4_recipe != "none" and cluster.fp4_tflops is None:
        raise UserError(
            f"--fp4-recipe {job.fp4_recipe}: the cluster's file lacks fp4_tflops (dense, of {cluster.gpu}); add it"
        )
    scaling = choose_scaling(job.fp8_recipe, cluster.capability)
    return dataclasses.replace(job, fp8_recipe=scaling.recipe if scaling else "none")
