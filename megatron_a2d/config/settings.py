"""Settings of a training run, with their meaning and defaults (invalid combinations: validate.py).

Settings have Megatron-LM's names where it has them. The docstring below a field is its help text on the
command line. The model's architecture is not a setting: it is read from the checkpoint's `hf/config.json`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.config.batch_schedule import BatchSchedule, batch_schedule, read_pairs
from megatron_a2d.config.optimization_config import LearningRateSchedule, OptimizationConfig
from megatron_a2d.config.performance_config import PerformanceConfig
from megatron_a2d.config.skipped_samples import SkippedSamples, read_range

ROLES = ("attention", "mlp", "router", "norm", "embedding", "head")
# Groups of settings of which a run has one. A flag of a group replaces whichever of them the recipe sets.
ALTERNATIVES = (
    ("train_iters", "train_samples", "train_tokens"),
    ("rampup_batch_size", "batch_schedule"),
    ("lr_warmup_iters", "lr_warmup_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("attention_annealing_iters", "attention_annealing_samples"),
    ("grafting_iters", "grafting_samples"),
    ("block_length_schedule", "block_length_schedule_samples"),
)


def without_spaces(schedule: str) -> str:
    """A schedule LENGTH:COUNT,... without spaces around its marks: resumed runs compare it as text."""
    return re.sub(r"\s*([:,])\s*", r"\1", schedule.strip())


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout of the model. The data-parallel size follows from the world size."""

    tensor_model_parallel_size: int = 1
    """processes over which each attention and dense MLP matrix is sharded"""
    sequence_parallel: bool = False
    """shard activations along the sequence over tensor-parallel processes; required for MoE with TP > 1"""
    pipeline_model_parallel_size: int = 1
    """number of pipeline stages"""
    num_virtual_stages_per_pipeline_rank: int = 1
    """virtual stages per pipeline process; above 1: the interleaved schedule"""
    context_parallel_size: int = 1
    """processes over which each sample's sequence is sharded"""
    expert_model_parallel_size: int = 1
    """processes over which the experts of each MoE layer are distributed"""
    expert_tensor_parallel_size: int = 1
    """processes over which each expert's matrices are sharded"""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """token dispatch to experts; flex: the kernels of --moe-flex-dispatcher-backend"""
    moe_expert_placement: str = "auto"
    """which experts a process holds; auto: as in the expert_placement.json, if any, of the checkpoint that the run
    starts from; none: in order; or FILE, written by checkpoints_tools.place_experts"""
    use_distributed_optimizer: bool = False
    """shard the optimizer state over data-parallel processes"""
    overlap_grad_reduce: bool = False
    """overlap gradient reduction with the backward pass"""
    overlap_param_gather: bool = False
    """overlap the distributed optimizer's parameter all-gather with the forward pass"""

    distributed_timeout_minutes: float = 10.0
    """minutes without a heartbeat after which a rank counts as hung and the run ends"""

    @property
    def virtual_pipeline_size(self) -> int | None:
        """megatron.core's value: None unless the interleaved schedule is used."""
        stages = self.num_virtual_stages_per_pipeline_rank
        return stages if stages > 1 else None


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    train_data_path: str | None = None
    """prefix of the training .bin/.idx pair"""
    data_mixture: str | None = None
    """YAML file of weighted sources (a blend), instead of the two paths; launch/mixtures has an example"""
    train_data_fingerprint: str = ""
    """expected fingerprint of the training tokens and their weights; empty: not checked. Stored in checkpoints"""
    valid_data_path: str | None = None
    """prefix of the validation .bin/.idx pair; no validation without it"""
    seq_length: int = 4096
    """tokens per sample"""
    reset_attention_mask: bool = False
    """no attention between the documents packed into a sample (intra-document attention)"""
    reset_position_ids: bool = False
    """count positions from 0 in each document of a sample"""
    random_length_prob: float = 0.0
    """fraction of the training samples that are split in two at a random position, for short contexts (LLaDA: 0.01)"""
    eod_mask_loss: bool = False
    """no loss on end-of-document tokens: they are never masked; without: they are treated like other tokens"""
    verify_tokenizer: bool = True
    """refuse tokens whose vocabulary or end-of-document token differs from the checkpoint tokenizer's, or between the
    sources of a mixture"""
    num_workers: int = 1
    """prefetch threads of the data loader; 0: samples are prepared inside the step"""
    seed: int = 1234
    """seed of the sample order and, with a sample's index, of its noise"""
    skip_samples: tuple[str, ...] = field(default=(), metadata={"metavar": "FROM-TO", "read": read_range})
    """ranges of sample indices, both ends included, that the run skips; they are recorded in its checkpoints"""


@dataclass(frozen=True)
class DiffusionConfig:
    """The training objective."""

    objective: Literal["mdlm", "block", "ar"] = "mdlm"
    """mdlm: masked diffusion with bidirectional attention; block: masked diffusion within blocks of --block-length,
    autoregressive over blocks (BD3LM); ar: next-token prediction with causal attention"""
    block_length: int = 0
    """block: tokens per block"""
    block_length_schedule: str = field(default="", metadata={"read": without_spaces})
    """block: earlier lengths and their iterations, LENGTH:ITERATIONS,...; with 1:500,4:500 blocks have one token, as in
    an autoregressive model, then 4, then --block-length. Validation always uses --block-length"""
    block_length_schedule_samples: str = field(default="", metadata={"read": without_spaces})
    """block: the same schedule in samples, LENGTH:SAMPLES,...; it then does not depend on the batch size"""
    reset_block_grid: bool = False
    """block: count blocks from the beginning of each document in a sample, as serving engines do for each request"""
    ar_loss_weight: float = 0.0
    """block: weight of the next-token loss on the clean copy of the text; above 0 its attention is causal"""
    noise_schedule: Literal["linear", "cosine"] = "linear"
    """mask ratio as a function of the time t; linear: the ratio is t"""
    timestep_sampling: Literal["low_discrepancy", "uniform"] = "low_discrepancy"
    """times of consecutive samples: low-discrepancy (evenly spread) or independent"""
    min_timestep: float = 1e-3
    """smallest time t; the loss weight of a masked token is at most 1 / min_timestep"""
    mask_sampling: Literal["bernoulli", "exact_count"] = "bernoulli"
    """in training, mask every token independently, or mask exactly the fraction of tokens given by the time"""
    complementary_masks: bool = False
    """each text twice in a batch, under a mask and its complement, so that every token is predicted (LLaDA2.0)"""
    mask_token_init: Literal["pretrained", "mean"] = "pretrained"
    """initial embedding of the mask token: as in --load, or the mean of all embeddings"""
    label_shift: bool = True
    """the logits at position i predict token i + 1, as in the autoregressive model; without: token i (LLaDA)"""
    loss_weighting: Literal["mdlm", "uniform", "cart"] = "mdlm"
    """loss weight of a masked token in training; mdlm: 1/t, the likelihood bound; uniform: constant; cart: larger with
    more unmasked tokens nearby (Dream). Validation always reports the bound"""
    cart_p: float = 0.8
    """cart: parameter of the geometric distribution over a neighbour's distance"""
    conversion: Literal["scp", "annealing", "grafting", "random"] = "scp"
    """conversion from causal to bidirectional attention; scp (simple continual pretraining): at step 0; annealing: the
    causal mask is removed entry by entry (DiffuLLaMA); grafting: layer by layer, each regressed on its causal version
    (Chandrasegaran et al. 2025); random: none, --load gives the architecture, weights are random (LLaDA)"""
    attention_annealing_iters: int = 0
    """annealing: iterations until attention is fully bidirectional"""
    attention_annealing_samples: int = 0
    """annealing: samples until attention is fully bidirectional, instead of iterations"""
    grafting_iters: int = 0
    """grafting: iterations of regression on clean text, during which the layers are swapped one after another"""
    grafting_samples: int = 0
    """grafting: samples of this regression, instead of iterations; the last iteration is completed"""


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    model: str | None = None
    """the model that a recipe is for: a name such as Qwen/Qwen3-8B-Base, or a directory with a config.json; a
    checkpoint with another architecture is refused"""
    load: str | None = None
    """checkpoint to start or resume from (convert_hf writes the first one)"""
    save: str | None = None
    """directory for checkpoints; if it already holds one, the run resumes from it"""
    ckpt_step: int | None = None
    """iteration to start from, instead of the newest intact one; in --save if that has checkpoints, else in --load"""
    finetune: bool = False
    """load only the weights of --load: no optimizer state, and start at iteration 0"""
    verify_checkpoint: bool = True
    """verify the checkpoint's files by the checksums in its manifest before loading; without: only their sizes"""
    train_iters: int | None = 1000
    """total number of iterations"""
    train_samples: int | None = None
    """total number of samples, instead of --train-iters; the learning rate then follows the samples, too"""
    train_tokens: int | None = None
    """total number of tokens, in samples of --seq-length, instead of --train-iters; otherwise as --train-samples"""
    micro_batch_size: int = 1
    """samples per micro-batch and data-parallel process"""
    global_batch_size: int = 8
    """samples per iteration over all processes; with a batch schedule: its last batch size, also used in validation"""
    rampup_batch_size: tuple[int, ...] = field(default=(), metadata={"metavar": ("START", "INCREMENT", "SAMPLES")})
    """batch size ramp, as in Megatron: from START in steps of INCREMENT to --global-batch-size over SAMPLES samples"""
    batch_schedule: str = field(default="", metadata={"read": read_pairs})
    """file of batch sizes, with lines SAMPLES BATCH: after SAMPLES samples, iterations have BATCH samples"""
    bf16: bool = False
    """train in bfloat16 with fp32 main weights and gradients; otherwise fp32"""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Transformer Engine's layers, or megatron.core's local ones in plain PyTorch; auto: Transformer Engine on a GPU if
    installed"""
    save_interval: int = 500
    """iterations between checkpoints; the last iteration always writes one"""
    async_save: bool = False
    """write checkpoints in the background while training continues; the run waits for the last one"""
    exit_interval: int = 0
    """save and exit at the first iteration divisible by this; 0: never"""
    exit_duration_in_mins: float = 0.0
    """save and exit once the run has lasted this many minutes; 0: never"""
    max_skipped_steps: int = 5
    """consecutive steps with non-finite gradients after which the run saves and exits"""
    on_spike: Literal["continue", "rollback"] = "continue"
    """if the loss is far above the recent ones: only log it, or return to the newest checkpoint from before the log
    interval and skip the samples since then"""
    max_rollbacks: int = 3
    """rollbacks of a run, after which it only logs a spike"""
    keep_latest_k: int = 0
    """number of checkpoints to keep; older ones are removed when a new one is complete; 0: keep all"""
    save_retain_interval: int = 0
    """with keep_latest_k: never remove checkpoints of iterations divisible by this; 0: no exception"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """if a checkpoint cannot be written (disk full): exit with code 74, or continue and retry at the next one"""
    eval_interval: int = 500
    """iterations between validations; there is always one at the start and at the end"""
    eval_iters: int = 8
    """global batches per validation"""
    log_interval: int = 10
    """iterations between log lines"""
    monitor: bool = True
    """also log gradients, updates and weight change by role, router load and gradient noise scale; keeps a copy of the
    initial weights in host memory"""
    tensorboard_dir: str | None = None
    """TensorBoard directory; default: tensorboard/ in --save"""
    wandb_project: str | None = None
    """project of Weights & Biases that also gets the metrics; needs the package wandb"""
    profile: bool = False
    """write a trace of a few iterations, and their time by phase, to profile/ in --save (docs/profiling.md)"""
    profile_step_start: int = 10
    """first profiled iteration"""
    profile_step_end: int = 12
    """last profiled iteration"""


@dataclass(frozen=True)
class RunConfig:
    """All settings, in groups."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    performance: PerformanceConfig = field(default_factory=PerformanceConfig)
    balancing: BalancingConfig = field(default_factory=BalancingConfig)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, without the groups: names are unique."""
        return {name: _copied(value) for group in vars(self).values() for name, value in vars(group).items()}

    @property
    def input_length(self) -> int:
        """Input positions per sample: block diffusion reads each sample twice, noised and clean."""
        return self.data.seq_length * (2 if self.diffusion.objective == "block" else 1)

    @property
    def batch_sizes(self) -> BatchSchedule:
        """Global batch sizes over the run. ValueError for settings that validate.py refuses."""
        training = self.training
        return batch_schedule(training.global_batch_size, training.rampup_batch_size, training.batch_schedule)

    @property
    def skipped(self) -> SkippedSamples:
        return SkippedSamples.read(self.data.skip_samples)

    @property
    def train_samples(self) -> int | None:
        """Samples by --train-samples or --train-tokens; None: the run is counted in iterations."""
        tokens = self.training.train_tokens
        return self.training.train_samples if tokens is None else tokens // max(1, self.data.seq_length)

    @property
    def length(self) -> str:
        """The setting that determines the run's length, as shown in errors."""
        given = {name: getattr(self.training, name) for name in ALTERNATIVES[0]}
        return ", ".join(f"{flag(name)} {value}" for name, value in given.items() if value is not None)

    @property
    def num_iterations(self) -> int:
        """Iterations of the run. An incomplete last batch is dropped, as in Megatron."""
        if self.train_samples is not None:
            return self.batch_sizes.iterations_within(self.train_samples)
        assert self.training.train_iters is not None
        return self.training.train_iters

    @property
    def num_samples(self) -> int:
        """Samples of all iterations of the run."""
        return self.batch_sizes.samples_before(self.num_iterations)

    @property
    def num_texts(self) -> int:
        """Texts that the whole run reads or skips (--skip-samples)."""
        samples = self.skipped.index_of(self.num_samples - 1) + 1
        return samples // 2 if self.diffusion.complementary_masks else samples

    @property
    def lr_schedule(self) -> LearningRateSchedule:
        """Lengths of the learning rate's phases, in samples with --train-samples or --train-tokens."""
        settings = self.optimization
        if self.train_samples is None:
            return LearningRateSchedule(self.num_iterations, settings.lr_warmup_iters, settings.lr_wsd_decay_iters)
        return LearningRateSchedule(self.train_samples, settings.lr_warmup_samples, settings.lr_wsd_decay_samples)

    @property
    def grafting_iters(self) -> int:
        """Iterations of grafting, those that begin within --grafting-samples."""
        samples = self.diffusion.grafting_samples
        if not samples:
            return self.diffusion.grafting_iters
        return self.batch_sizes.iteration_of(samples - 1) + 1

    def data_parallel_size(self, world_size: int) -> int:
        parallel = self.parallel
        return world_size // (
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        )


def _copied(value: Any) -> Any:
    """A copy of a value, of plain YAML types. (dataclasses.asdict does the same, far slower.)"""
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value


@dataclass(frozen=True)
class Setting:
    """One field of a group, as the command line and recipes see it."""

    name: str
    group: str
    kind: Any  # int, float, str, bool, dict, list (of `element`), or a tuple of allowed strings
    default: Any
    help: str
    optional: bool = False
    element: type = str  # of a list
    choices: tuple[str, ...] = ()  # for a list's elements; (): any
    metavar: str | tuple[str, ...] = "NAME"  # of a list; a tuple: of each element of a list of fixed length
    read: Callable[[str], str] | None = None  # of a text: the value that it stands for, such as a file's; ValueError


@functools.cache
def settings() -> dict[str, Setting]:
    """Every setting by name."""
    result: dict[str, Setting] = {}
    for group, cls in get_type_hints(RunConfig).items():
        docs, hints, defaults = _field_docs(cls), get_type_hints(cls), cls()
        for item in dataclasses.fields(cls):
            kind, optional, element = _kind(hints[item.name])
            default = getattr(defaults, item.name)
            help_text = docs[item.name]
            result[item.name] = Setting(item.name, group, kind, default, help_text, optional, element, **item.metadata)
    return result


def _kind(hint: Any) -> tuple[Any, bool, type]:
    """Kind, whether it is optional, and the type of a list's elements."""
    members = [member for member in get_args(hint) if member is not type(None)]
    if get_origin(hint) is Literal:
        return get_args(hint), False, str
    if get_origin(hint) in (dict, tuple):
        return (dict, False, str) if get_origin(hint) is dict else (list, False, members[0])
    return (members[0], True, str) if members else (hint, False, str)


def _field_docs(cls: Any) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    docs: dict[str, str] = {}
    for item, after in itertools.pairwise(body):
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[ast.unparse(item.target)] = str(after.value.value)
    return docs


def build(values: dict[str, Any]) -> RunConfig:
    """A RunConfig from settings by name; the rest have their defaults."""
    if any(values.get(name) is not None for name in ("train_samples", "train_tokens")):
        values = {"train_iters": None, **values}
    groups = {}
    for group, cls in get_type_hints(RunConfig).items():
        own = {name: value for name, value in values.items() if settings()[name].group == group}
        groups[group] = cls(**{name: tuple(v) if settings()[name].kind is list else v for name, v in own.items()})
    return RunConfig(**groups)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
