"""Reader of torch_dist checkpoints written by Megatron-LM, Megatron-Bridge, NeMo 2 or megatron.core alone.

Their tensors are those of our checkpoints under other names (docs/weights.md has the table):

    all layers in one tensor            decoder.layers.self_attention.linear_proj.weight      [layers, H, Q]
    one tensor a layer                  decoder.layers.3.self_attention.linear_proj.weight    [H, Q]
    all experts in one tensor           ...mlp.experts.experts.linear_fc1.weight              [experts, 2F, H]
    one tensor an expert                ...mlp.experts.experts.7.linear_fc1.weight            [2F, H]
    gate and up apart                   ...linear_fc1.weight_w, ...linear_fc1.weight_v        [F, H]

and any combination of these, with "module." in front (NeMo 2), and each norm as its own layer has it (local layers)
or as the linear layer that it is fused with (Transformer Engine). So a name is a pattern with numbers left out, and a
row of a weight is found by putting them in.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.checkpoint.directory import HF_FILES, TRACKER, check_complete, resolve
from megatron_a2d.checkpoint.manifest import MANIFEST
from megatron_a2d.checkpoint.metadata_index import Box
from megatron_a2d.checkpoint.model_files import check_model_files
from megatron_a2d.checkpoint.tensor_rows import Remapped, RowRange, account
from megatron_a2d.checkpoint.torch_dist_reader import EXPERT_BIAS, NOT_WEIGHTS, TorchDistCheckpoint, open_torch_dist
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf
from megatron_a2d.conversion.compare_weights import config_differences
from megatron_a2d.conversion.mask_token import read_tokens
from megatron_a2d.conversion.megatron_settings import NEMO_CONTEXT, NEMO_WEIGHTS, Recorded, config_of, read_recorded
from megatron_a2d.conversion.sources import Weights, too_few
from megatron_a2d.conversion.weight_map import EMBEDDING, WeightMap
from megatron_a2d.families.registry import read_config
from megatron_a2d.utils.errors import UserError

HEAD = "output_layer.weight"
# Where none are recorded: Megatron-LM's --make-vocab-size-divisible-by, and the largest tensor parallelism.
_PADDING, _LARGEST_TP = 128, 64


class MegatronModel(NamedTuple):
    """A checkpoint's model. `config`: its config.json, without a mask token unless it has one."""

    weights: Weights
    config: dict[str, Any]
    tokenizer: Path | None  # a directory with the model's tokenizer
    padded_vocab_size: int


@contextmanager
def open_megatron(path: Path, hf_model: Path | None = None, vocab_size: int | None = None) -> Iterator[MegatronModel]:
    """The model of the checkpoint `path`, of an iteration of it, or of NeMo's directory.

    `hf_model`: a Hugging Face directory whose config.json and tokenizer are the model's; `vocab_size`: without padding.
    UserError if a tensor is missing, unknown or of a wrong shape, or if settings contradict one another.
    """
    directory = find_iteration(path)
    recorded = read_recorded(directory)
    with open_torch_dist(directory) as stored:
        patterns = _Patterns(stored, directory)
        rows = patterns.shape_of(EMBEDDING)[0]
        tokenizer = _tokenizer(directory, hf_model)
        config, model_config, described_by = _describe(directory, recorded, hf_model, tokenizer, rows, vocab_size)
        if problems := too_few(model_config, stored.shapes, directory, described_by):
            raise UserError(problems)
        table = WeightMap(model_config)
        patterns.check(table, rows, described_by)

        def locate(row_range: RowRange) -> list[RowRange]:
            return [piece for middle in table.to_megatron(row_range) for piece in patterns.locate(middle)]

        dtypes = {name: stored.dtype(locate(RowRange(name, (), 0, 1))[0].name) for name in table.hf_shapes}
        config.pop("dtype", None)  # the other spelling
        config["torch_dtype"] = str(dtypes[next(iter(dtypes))]).removeprefix("torch.")
        weights = Weights(directory, model_config, table, Remapped(stored, table.hf_shapes, dtypes, locate))
        yield MegatronModel(weights, config, tokenizer, rows)


def find_iteration(path: Path) -> Path:
    """The directory of a checkpoint's tensors: an iteration's, or `weights` of NeMo 2. UserError for other formats."""
    if path.is_file():
        raise UserError(
            f"{path}: is a file; give a torch_dist checkpoint's directory (NeMo 1's .nemo files are not supported)"
        )
    unfinished = path.with_name(f"{path.name}-unfinished")
    if unfinished.exists():
        raise UserError(f"{path}: is incomplete ({unfinished.name} exists); use another checkpoint")
    directory = path / NEMO_WEIGHTS if (path / NEMO_WEIGHTS).is_dir() else path
    if directory.name != NEMO_WEIGHTS and not (directory / ".metadata").exists():
        old = next((item.parent for item in sorted(directory.glob("**/mp_rank_*"))), None)
        directory = resolve(directory) if (directory / TRACKER).exists() or old is None else old
    for checked in (directory, *([directory.parent / NEMO_CONTEXT] if directory.name == NEMO_WEIGHTS else [])):
        check_model_files(checked)
    check_complete(directory)
    if (directory / MANIFEST).is_file() and (directory / HF_FILES).is_dir() and read_trained(directory).is_diffusion:
        raise UserError(
            f"{directory}: is a diffusion model's checkpoint of this project, and would lose its training settings; "
            "use it directly in train, export_hf or average"
        )
    return directory


def _tokenizer(directory: Path, hf_model: Path | None) -> Path | None:
    """--hf-model if it has one, else the checkpoint's own: Bridge and newer Megatron-LM keep its files in `tokenizer`,
    NeMo 2 in `context/nemo_tokenizer`. Of an --hf-model that is all there is, the other files."""
    kept = (directory / "tokenizer", directory.parent / NEMO_CONTEXT / "nemo_tokenizer")
    found = [*([hf_model] if hf_model else []), *(path for path in kept if path.is_dir())]
    for path in found:
        check_model_files(path)
    return next((path for path in found if read_tokens(path)), next(iter(found), None))


def _describe(
    directory: Path,
    recorded: Recorded | None,
    hf_model: Path | None,
    tokenizer: Path | None,
    rows: int,
    requested: int | None,
) -> tuple[dict[str, Any], ModelConfig, str]:
    """config.json, the architecture, and the file that describes it."""
    given = hf_model / "config.json" if hf_model and (hf_model / "config.json").is_file() else None
    config = read_config(given.parent) if given else None
    if config is None and recorded is None:
        raise UserError(
            f"{directory}: its writer stored no settings of the model (neither run_config.yaml nor arguments); give "
            "a directory with the model's config.json as --hf-model"
        )
    size = _vocab_size(directory, recorded, config, tokenizer, rows, requested)
    own = config_of(recorded, size, "bfloat16") if recorded else None
    if config is None or given is None:
        assert own is not None and recorded is not None
        return own, model_config_from_hf(own, recorded.where), recorded.where
    config = {**config, "vocab_size": size}
    model_config = model_config_from_hf(config, str(given))
    if own is not None and recorded is not None:
        theirs = model_config_from_hf(own, recorded.where)
        # Of the first Megatron records the length of its sequences; of the second, a mixture of experts has no use.
        theirs = dataclasses.replace(
            theirs,
            max_position_embeddings=model_config.max_position_embeddings,
            intermediate_size=(model_config if model_config.is_moe else theirs).intermediate_size,
        )
        if problems := config_differences(model_config, theirs, str(given), recorded.where):
            raise UserError(problems)
    return config, model_config, str(given)


def _vocab_size(
    directory: Path,
    recorded: Recorded | None,
    config: Mapping[str, Any] | None,
    tokenizer: Path | None,
    rows: int,
    requested: int | None,
) -> int:
    """The vocabulary without the rows by which Megatron pads it to a multiple of the layout's size."""
    size = requested
    if size is None and config is not None:
        size = config.get("vocab_size")
    if size is None and recorded is not None:
        size = recorded.get("vocab_size")
    if size is None and tokenizer is not None:
        size = max(read_tokens(tokenizer), default=-1) + 1 or None
    if size is None:
        raise UserError(
            f"{directory}: its embedding has {rows} rows, of which some may be padding, and no vocabulary is recorded; "
            "give its size with --vocab-size, or the tokenizer with --hf-model"
        )
    if type(size) is not int or size < 1:
        raise UserError(
            f"{directory}: the size of its vocabulary is {str(size)[:40]}, not a count; give it with --vocab-size"
        )
    if size > rows:
        raise UserError(
            f"{directory}: its embedding has {rows} rows, too few for the vocabulary of {size}; give the "
            "size that it was trained with as --vocab-size, or the model's own tokenizer with --hf-model"
        )
    if requested is None and rows not in padded_sizes(size, recorded):
        raise UserError(
            f"{directory}: its embedding has {rows} rows, which is not the vocabulary of {size} with Megatron's "
            "padding; give the vocabulary's size with --vocab-size, or the model's own tokenizer with --hf-model"
        )
    return size


def padded_sizes(size: int, recorded: Recorded | None) -> set[int]:
    """The numbers of rows that a vocabulary may have been padded to."""
    found = {size}
    names = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    unit, layout = (recorded.get(name) if recorded else None for name in names)
    if type(unit) is int and type(layout) is int and unit > 0 and layout > 0:
        found.add(-(-size // (unit * layout)) * unit * layout)
        if recorded and type(padded := recorded.get("padded_vocab_size")) is int:
            found.add(padded)
    else:
        found |= {-(-size // multiple) * multiple for multiple in range(_PADDING, _PADDING * _LARGEST_TP + 1, _PADDING)}
    return found


class _Pattern(NamedTuple):
    """The names of a weight's tensors, with {layer}, {expert} and {half} for numbers that are left out."""

    names: str
    has_layer: bool
    has_expert: bool
    has_half: bool


_LAYER = re.compile(r"^((?:module\.)?decoder\.layers\.)(\d+)\.(.*)$")
# Megatron's own names inside a model are read too: of experts in a list, and of grouped ones.
_EXPERT = (
    re.compile(r"(mlp\.experts\.experts\.)(\d+)(\.linear_fc[12]\.weight.*)$"),
    re.compile(r"(mlp\.experts\.local_experts\.)(\d+)(\.linear_fc[12]\.weight.*)$"),
    re.compile(r"(mlp\.experts\.linear_fc[12]\.weight)(\d+)()$"),
)
_HALF = re.compile(r"(linear_fc1\.weight_)([wv])$")
_CANONICAL_EXPERTS = re.compile(r"mlp\.experts\.(?:experts\.|local_experts\.)?(?:\{expert\}\.)?(linear_fc[12]\.weight)")
_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class _Patterns:
    """The weights of a checkpoint by our names, and where the rows of each are."""

    def __init__(self, stored: TorchDistCheckpoint, directory: Path):
        self._directory = directory
        self._shapes = {
            name: shape
            for name, shape in stored.all_shapes.items()
            if not name.startswith(NOT_WEIGHTS) and "_extra_state" not in name
        }
        if adapters := next((name for name in self._shapes if ".adapter." in name), None):
            raise UserError(
                f"{directory}: {adapters} belongs to an adapter (LoRA), which is stored apart from the model; merge "
                "the two with the tool that trained it, and convert the result"
            )
        self._patterns: dict[str, _Pattern] = {}
        is_moe = any(".experts." in name for name in self._shapes)
        for name, shape in list(self._shapes.items()):
            pattern = _pattern(name)
            key = _our_name(pattern, is_moe)
            if key == EXPERT_BIAS:
                self._check_bias(stored, name, shape)
                del self._shapes[name]
            else:
                self._patterns.setdefault(key, pattern)  # a second form of the same weight is unknown below

    def shape_of(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor that is stored once. UserError if it is missing."""
        name = self._patterns[key].names if key in self._patterns else key
        if name not in self._shapes or len(self._shapes[name]) != 2:
            raise UserError(f"{self._directory}: has no {key}, so it is not a complete GPTModel of Megatron; give one")
        return self._shapes[name]

    def check(self, table: WeightMap, rows: int, described_by: str) -> None:
        """UserError unless the tensors are exactly those of the model."""
        expected: dict[str, tuple[int, ...]] = {}
        for key, shape in table.megatron_shapes.items():
            padded = (rows, *shape[1:]) if key in (EMBEDDING, HEAD) else shape
            expected |= _expected(self._patterns.get(key) or _Pattern(key, False, False, False), key, padded)
        problems = []
        if HEAD in self._patterns and HEAD not in table.megatron_shapes:
            self._shapes.pop(self._patterns[HEAD].names, None)
            problems.append(
                f"{self._directory}: has a separate LM head, but {described_by} ties it to the embedding; correct the "
                "settings, or give the model as --hf-model"
            )
        problems += account(expected, self._shapes, str(self._directory), described_by)
        if problems:
            raise UserError(problems)

    def locate(self, row_range: RowRange) -> list[RowRange]:
        """The stored rows that, concatenated, are these rows of one of our tensors."""
        key, lead, start, stop = row_range
        pattern = self._patterns[key]
        numbers = dict(zip(("layer", "expert"), lead, strict=False))
        named = (pattern.has_layer, pattern.has_expert)
        rest = tuple(number for number, is_named in zip(lead, named, strict=False) if not is_named)
        if not pattern.has_half:
            return [RowRange(pattern.names.format(**numbers), rest, start, stop)]
        names = {half: pattern.names.format(**numbers, half=half) for half in ("w", "v")}
        rows = self._shapes[names["w"]][len(rest)]
        pieces = [("w", start, min(stop, rows)), ("v", max(0, start - rows), stop - rows)]
        return [RowRange(names[half], rest, low, high) for half, low, high in pieces if low < high]

    def _check_bias(self, stored: TorchDistCheckpoint, name: str, shape: tuple[int, ...]) -> None:
        if stored.read_box(name, Box((0,) * len(shape), shape)).any():
            raise UserError(
                f"{self._directory}: {name} is not zero: its routers choose experts with biases "
                "(--moe-router-enable-expert-bias), which no supported family has"
            )


def _pattern(name: str) -> _Pattern:
    layer = _LAYER.match(name)
    names = f"{layer[1]}{{layer}}.{layer[3]}" if layer else name
    has_expert = False
    for form in _EXPERT:
        if found := form.search(names):
            names, has_expert = f"{names[: found.start()]}{found[1]}{{expert}}{found[3]}", True
    half = _HALF.search(names)
    names = f"{names[: half.start()]}{half[1]}{{half}}" if half else names
    return _Pattern(names, layer is not None, has_expert, half is not None)


def name_in_ours(name: str, is_moe: bool) -> str:
    """The tensor of our checkpoints to which one called `name` belongs."""
    return _our_name(_pattern(name), is_moe)


def _our_name(pattern: _Pattern, is_moe: bool) -> str:
    """Our names are those of Transformer Engine's layers, stacked."""
    name = pattern.names.removeprefix("module.").replace("{layer}.", "")
    name = _CANONICAL_EXPERTS.sub(r"mlp.experts.experts.\1", name).replace("_{half}", "")
    name = re.sub(r"(mlp\.experts\.experts\.linear_fc[12]\.weight)\{expert\}$", r"\1", name)
    prefix, layers, rest = name.partition("decoder.layers.")
    if layers:
        rest = _NORMS.get(rest, rest)
        if is_moe and rest == "mlp.linear_fc1.layer_norm_weight":  # megatron.core's local layers, with experts too
            rest = "pre_mlp_layernorm.weight"
    return f"{prefix}{layers}{rest}"


def _expected(pattern: _Pattern, key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of our weight `key` of `shape`, and their shapes."""
    lead = num_lead_axes(key)
    named = (pattern.has_layer, pattern.has_expert)[:lead]
    numbers = [range(count) if is_named else [None] for count, is_named in zip(shape, named, strict=False)]
    kept = [count for count, is_named in zip(shape, named, strict=False) if not is_named]
    rows, *width = shape[lead:]
    halves = ("w", "v") if pattern.has_half else ("",)
    return {
        pattern.names.format(**dict(zip(("layer", "expert"), lead, strict=False)), half=half): (
            *kept, rows // len(halves), *width,
        )
        for lead in itertools.product(*numbers)
        for half in halves
    }  # fmt: skip


def num_lead_axes(key: str) -> int:
    """The number of leading axes (layers, experts) of one of our tensors."""
    return 0 if not key.startswith("decoder.layers.") else 2 if ".experts." in key else 1
