"""Readers that give a model's weights under HF names, from safetensors files or a torch_dist checkpoint.

Opening one checks every tensor: all unknown, missing and mis-shaped ones are reported before anything is
read or written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.model_files import check_model_files
from megatron_a2d.checkpoint.tensor_rows import FiniteCheck, Remapped, RowRange, RowSource, account, num_bytes, slabs
from megatron_a2d.checkpoint.torch_dist_reader import open_torch_dist
from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf, read_model_config
from megatron_a2d.conversion.safetensors_files import SafetensorsDirectory, open_safetensors
from megatron_a2d.conversion.weight_map import FUSED_PARTS, WeightMap
from megatron_a2d.families.registry import FAMILIES, Kind, kind_of, read_config
from megatron_a2d.terminal.console import progress
from megatron_a2d.utils.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weights(NamedTuple):
    """A model's weights. `tensors` has the standard names, one per layer and expert (conversion/weight_map.py)."""

    directory: Path
    model_config: ModelConfig
    map: WeightMap
    tensors: RowSource

    def num_bytes(self) -> int:
        return num_bytes(self.tensors)

    def dtypes(self) -> set[torch.dtype]:
        return {self.tensors.dtype(name) for name in self.tensors.shapes}


@contextmanager
def open_hf(directory: Path, check_values: bool = False, from_disk: bool = False) -> Iterator[Weights]:
    """The weights of an HF directory; experts may be fused, and a tied LM head may be stored or not.

    With `check_values`, a directory that is refused is also searched for non-finite values, so that all problems are
    reported at once. `from_disk`: past the page cache, as in OpenFiles.
    """
    check_model_files(directory)
    config = read_config(directory)
    model_config = model_config_from_hf(config, str(directory / "config.json"))
    kind = kind_of(config, str(directory / "config.json"))
    names = kind.family.tensor_names
    embedding, head = names.get(EMBEDDING, EMBEDDING), names.get(HEAD, HEAD)
    with open_safetensors(directory, from_disk) as files:
        if problems := too_few(model_config, files.shapes, directory):
            raise UserError(files.problems or problems)
        stored = WeightMap(model_config, files.shapes, names)
        expected = dict(stored.hf_shapes)
        if model_config.tie_word_embeddings and head in files.shapes:
            expected[head] = expected[embedding]
        if problems := files.problems + account(expected, files.shapes, str(directory)):
            if other := _other_model(model_config, files.shapes, directory, kind):
                raise UserError(other)
            raise UserError(problems + (_non_finite(files, directory) if check_values else []))
        if head in expected and head not in stored.hf_shapes:
            _check_tied(files, directory, embedding, head)
        canonical = WeightMap(model_config)

        def locate(row_range: RowRange) -> list[RowRange]:
            return [piece for middle in canonical.to_megatron(row_range) for piece in stored.to_hf(middle)]

        dtypes = {name: files.dtype(locate(RowRange(name, (), 0, 1))[0].name) for name in canonical.hf_shapes}
        yield Weights(directory, model_config, canonical, Remapped(files, canonical.hf_shapes, dtypes, locate))


@contextmanager
def open_checkpoint(path: Path, allow_expert_bias: bool = False, from_disk: bool = False) -> Iterator[Weights]:
    """The weights of a torch_dist checkpoint saved in any layout; `path` is as for checkpoint.directory.resolve.
    `from_disk`: past the page cache, as in OpenFiles.

    UserError if its routers choose experts with biases, which are not part of the weights, unless they are allowed.
    """
    directory = resolve(path)
    if not (directory / HF_FILES).is_dir():
        raise UserError(
            f"{directory / HF_FILES}: the model's configuration is missing (Megatron does not write it); create the "
            "directory with the model's config.json and tokenizer, or use checkpoints_tools.convert_megatron"
        )
    model_config = read_model_config(directory / HF_FILES)
    with open_torch_dist(directory, from_disk) as stored:
        if problems := too_few(model_config, stored.shapes, directory):
            raise UserError(problems)
        if not allow_expert_bias and stored.has_expert_bias():
            raise UserError(
                f"{directory}: its routers choose experts with biases (--moe-router-enable-expert-bias), which "
                "exports and averages cannot hold; use the checkpoint of the run's last iteration, where they are zero"
            )
        weights = WeightMap(model_config)
        if problems := account(weights.megatron_shapes, stored.shapes, str(directory)):
            raise UserError(problems)
        dtypes = {name: stored.dtype(key) for name, key in weights.megatron_keys.items()}
        tensors = Remapped(stored, weights.hf_shapes, dtypes, weights.to_megatron)
        yield Weights(directory, model_config, weights, tensors)


def too_few(
    model_config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    directory: Path,
    described_by: str = "config.json",
) -> list[str]:
    """A problem if `described_by` is of a far larger model than the files: listing its missing tensors takes memory."""
    there, named = sum(map(math.prod, shapes.values())), model_config.num_parameters()
    if named <= 2 * there + 10_000:
        return []
    return [
        f"{directory}: {described_by} describes {named:,} parameters, but the files hold {there:,} values in "
        f"{len(shapes):,} tensors; use the {described_by} that belongs to the weights"
    ]


def as_megatron(weights: Weights, dtype: torch.dtype | None) -> Remapped:
    """The same weights under megatron's names, cast to `dtype` unless it is None.

    A megatron tensor holds all layers, so its parts must have one dtype.
    """
    dtypes: dict[str, torch.dtype] = {}
    problems = []
    for name, key in weights.map.megatron_keys.items():
        found = dtype or weights.tensors.dtype(name)
        if dtypes.setdefault(key, found) != found:
            problems.append(
                f"{weights.directory}: tensor {name} is {found}, others of its kind are {dtypes[key]}; "
                "choose one type with --dtype"
            )
    if problems:
        raise UserError(problems)
    return Remapped(weights.tensors, weights.map.megatron_shapes, dtypes, weights.map.to_hf)


def untied(weights: Weights) -> Weights:
    """The same weights with a separate LM head: a copy of the embedding, if the two are tied."""
    if not weights.model_config.tie_word_embeddings:
        return weights
    model_config = dataclasses.replace(weights.model_config, tie_word_embeddings=False)
    table = WeightMap(model_config)
    source = weights.tensors

    def locate(row_range: RowRange) -> list[RowRange]:
        return [row_range._replace(name=EMBEDDING) if row_range.name == HEAD else row_range]

    dtypes = {name: source.dtype(EMBEDDING if name == HEAD else name) for name in table.hf_shapes}
    return Weights(weights.directory, model_config, table, Remapped(source, table.hf_shapes, dtypes, locate))


def renamed(tensors: RowSource, model_config: ModelConfig, names: Mapping[str, str]) -> RowSource:
    """Tensors with the standard names under a family's own (`tensor_names`); as they are if it has none."""
    if not names:
        return tensors
    own, standard = WeightMap(model_config, (), names).hf_shapes, WeightMap(model_config).hf_shapes
    standard_name = dict(zip(own, standard, strict=True))  # both in the order of the table
    dtypes = {name: tensors.dtype(standard_name[name]) for name in own}
    return Remapped(tensors, own, dtypes, lambda rows: [rows._replace(name=standard_name[rows.name])])


def as_type(weights: Weights, dtype: torch.dtype | None) -> RowSource:
    """The tensors of `weights`, cast to `dtype` unless it is None."""
    if dtype is None:
        return weights.tensors
    shapes = weights.tensors.shapes
    return Remapped(weights.tensors, shapes, dict.fromkeys(shapes, dtype), lambda row_range: [row_range])


def _other_model(model_config: ModelConfig, found: Mapping[str, tuple], directory: Path, kind: Kind) -> str | None:
    """A problem if the tensors are those of another kind of model than config.json's, as a whole; else None."""
    for family in (family for family in FAMILIES if family.type_of(model_config.is_moe)):
        for bias, norms in itertools.product((False, True), repeat=2):
            other = dataclasses.replace(model_config, add_qkv_bias=bias, qk_layernorm=norms)
            if other == model_config and family.tensor_names == kind.family.tensor_names:
                continue
            if family.describes(bias, norms) and not account(
                WeightMap(other, found, family.tensor_names).hf_shapes, found, ""
            ):
                return (
                    f"{directory}: config.json is {kind.family.title}'s ({_layers(model_config)}), and the tensors are "
                    f"{family.title}'s ({_layers(other)}); use the config.json that belongs to the weights"
                )
    return _foreign_names(model_config, found, directory, kind)


def _layers(a: ModelConfig) -> str:
    biases = "biases" if a.add_qkv_bias else "no biases"
    return f"{biases} of queries, keys and values, {'norms' if a.qk_layernorm else 'no norms'} on queries and keys"


def _foreign_names(model_config: ModelConfig, found: Mapping[str, tuple], directory: Path, kind: Kind) -> str | None:
    """A problem if most tensors have other names than the family's, as in wrappers and multimodal models; else None."""
    if kind.family.tensor_names:
        return None
    table = WeightMap(model_config).hf_shapes
    parts = {part for name in table for part in name.split(".")} | FUSED_PARTS

    def plain(name: str) -> str:
        known = ".".join(part for part in name.split(".") if part in parts)
        return "model." + re.sub(r"^(model\.)*", "", known) if not known.startswith("lm_head.") else known

    plain_names = {plain(name): name for name in found if name not in table}
    expected = WeightMap(model_config, plain_names).hf_shapes
    missing = [name for name in expected if name not in found]
    renamed = [name for name in missing if name in plain_names]
    if len(renamed) < 2 or 2 * len(renamed) < len(missing):
        return None
    return (
        f"{directory}: tensor names differ from {kind.family.title}'s ({plain_names[renamed[0]]} instead of "
        f"{renamed[0]}, and {len(renamed) - 1} others); rename them, or load the model with the code that saved it and "
        "save only its language model with transformers' save_pretrained"
    )


def _non_finite(files: SafetensorsDirectory, directory: Path) -> list[str]:
    checked = FiniteCheck(files)
    with progress("checking values", num_bytes(files), "B") as advance:
        for name, shape in files.shapes.items():
            for start, stop in slabs(shape, 0, shape[0] if shape else 0, files.dtype(name).itemsize):
                advance(checked.read(RowRange(name, (), start, stop)).nbytes)
    return checked.problems(directory)


def _check_tied(files: SafetensorsDirectory, directory: Path, embedding: str, head: str) -> None:
    shape, types = files.shapes[head], {files.dtype(head), files.dtype(embedding)}
    for start, stop in slabs(shape, 0, shape[0], 4):
        first, second = (files.read(RowRange(name, (), start, stop)) for name in (head, embedding))
        if len(types) > 1 or not torch.equal(first, second):
            raise UserError(
                f"{directory}: config.json ties {head} to {embedding}, but the two tensors differ; "
                "set tie_word_embeddings to false, or use the config.json that belongs to the weights"
            )
