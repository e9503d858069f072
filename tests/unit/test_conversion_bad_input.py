"""Bad input ends with one clear error and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from checkpoints_tools import convert_hf, export_hf, options, verify
from megatron_a2d.checkpoint.directory import TRACKER, iteration_of, resolve
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.mask_token import choose_mask_token
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.utils.errors import UserError
from tests import tiny

NAME = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """moe/ (sharded), dense/ (a single file) and the checkpoint of moe, ckpt/; tests copy them."""
    directory = tmp_path_factory.mktemp("models")
    tiny.write_hf(directory / "moe", "moe", max_shard_size="300KB")
    tiny.write_hf(directory / "dense", "dense")
    convert(directory / "moe", directory / "ckpt")
    return directory


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def duplicate(directory: Path) -> None:
    """The first shard's tensors once more, in a second file."""
    files = sorted(directory.glob("model-*.safetensors"))
    edit_index(directory, lambda weight_map: weight_map.update(extra="model-extra.safetensors"))
    shutil.copyfile(files[0], directory / "model-extra.safetensors")


DENSE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop(NAME)), rf"tensor {NAME} is missing"),
    "extra tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(96)})),
        r"q_proj\.bias \[96\] is unknown",
    ),
    "wrong shape": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: t[NAME][:40].clone()})),
        r"has shape \[40, 64\], but config.json asks for \[48, 64\]",
    ),
    "quantised": (
        lambda d: edit_tensors(d, lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)})),
        rf"weights are quantised \(F8_E4M3: {NAME} and 0 others\).*use the original unquantised",
    ),
    "one layer too few": (lambda d: edit_config(d, num_hidden_layers=3), r"layers\.3\.[a-z_.]+ .*is unknown"),
    "truncated values": (
        lambda d: truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 1000),
        "truncated or damaged",
    ),
    "truncated header": (lambda d: truncate(d / "model.safetensors", 2000), "truncated or not a safetensors"),
    "empty file": (lambda d: truncate(d / "model.safetensors", 0), "truncated or not a safetensors"),
    "overlapping tensors": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h.update({NAME: h[NAME.replace("1.self", "2.self")]})),
        "starts at byte",
    ),
    "a number of 4,300 digits": (
        lambda d: edit_header(
            d / "model.safetensors", lambda h: h[NAME].update(data_offsets=[-(10**4300 - 1), 10**4300 - 1])
        ),
        "header is damaged",
    ),
    "a hundred thousand axes": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(shape=[2**63] * 100_000)),
        "header entry is damaged",
    ),
    "numbers that are text": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(shape=["48", "64"])),
        "header entry is damaged",
    ),
    "a type that is no text": (
        lambda d: edit_header(d / "model.safetensors", lambda h: h[NAME].update(dtype=["F32"])),
        "header entry is damaged",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "foreign architecture": (lambda d: edit_config(d, model_type="llama"), "model_type 'llama' is not supported"),
    "no config": (lambda d: (d / "config.json").unlink(), "configuration is missing"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "tokenizer of another model": (
        lambda d: (d / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"999": {"content": "<x>"}}}'),
        "goes up to id 999",
    ),
    "damaged tokenizer": (
        lambda d: (d / "tokenizer.json").write_text('{"model": {"vocab": {"a": "zero"}}}'),
        "an id that is not a number",
    ),
    "no tokenizer": (
        lambda d: remove(d / "tokenizer.json", d / "tokenizer_config.json"),
        "give --mask-token-id",
    ),
}

SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: sorted(d.glob("*.safetensors"))[1].unlink(), "is missing, though"),
    "unlisted tensor": (
        lambda d: edit_index(d, lambda w: w.pop(NAME)),
        rf"tensor {NAME} is not listed in",
    ),
    "promised tensor": (
        lambda d: edit_index(d, lambda w: w.update({"ghost": min(w.values())})),
        "lacks tensor ghost",
    ),
    "path outside": (
        lambda d: edit_index(d, lambda w: w.update({NAME: "../dense/model.safetensors"})),
        "is outside the directory",
    ),
    "duplicate": (duplicate, "is also in model-00001"),
    "two models": (lambda d: shutil.copyfile(min(d.glob("*.safetensors")), d / "model.safetensors"), "two models"),
    "empty index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
}


@pytest.mark.parametrize("case", [*DENSE, *SHARDED])
def test_bad_model_directories(case: str, models: Path, tmp_path: Path) -> None:
    kind, (damage, message) = ("dense", DENSE[case]) if case in DENSE else ("moe", SHARDED[case])
    shutil.copytree(models / kind, tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_all_wrong_tensors_are_listed_at_once(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "hf")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            del tensors[f"model.layers.{layer}.self_attn.q_norm.weight"]
            tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = torch.zeros(96)
        tensors["model.norm.weight"] = torch.zeros(65)

    edit_tensors(tmp_path / "hf", spoil)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    kinds = [problem.partition(" is ")[2].partition(";")[0] for problem in caught.value.problems]
    assert len(caught.value.problems) == 9
    assert (kinds.count("missing"), kinds.count("unknown")) == (4, 4)


def test_tensors_that_are_missing_and_double_are_listed_together(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "moe", tmp_path / "hf")
    duplicate(tmp_path / "hf")
    edit_config(tmp_path / "hf", num_hidden_layers=5)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "hf", tmp_path / "out")
    text = str(caught.value)
    assert "is also in" in text and "model.layers.4.mlp.gate.weight is missing" in text


def test_mask_token_choices(models: Path, tmp_path: Path) -> None:
    directory = models / "dense"
    assert choose_mask_token(directory, 256, None, None) == tiny.MASK_TOKEN_ID
    assert choose_mask_token(directory, 256, None, 255) == 255
    assert choose_mask_token(directory, 256, 252, 255) == 252
    with pytest.raises(UserError, match=r"--mask-token-id 17: is the token .* such as 250"):
        choose_mask_token(directory, 256, 17, None)
    with pytest.raises(UserError, match=r"config.json: mask_token_id 17: is the token"):
        choose_mask_token(directory, 256, None, 17)
    for outside in (256, -1):
        with pytest.raises(UserError, match="outside the embedding"):
            choose_mask_token(directory, 256, outside, None)
    with pytest.raises(UserError, match="uses all 250 ids"):
        choose_mask_token(directory, 250, None, None)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({"id": 250, "content": "<|mask|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert choose_mask_token(tmp_path, 256, 250, None) == 250
    assert choose_mask_token(tmp_path, 256, None, None) == 250  # the tokenizer's own, not the first free row
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<|im_start|>"}}))
    assert choose_mask_token(tmp_path, 256, None, None) == tiny.TURN_START  # the declared one before a mere name
    assert choose_mask_token(tmp_path, 256, None, 255) == 255  # what the model was trained with before both
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))  # without an id
    assert choose_mask_token(tmp_path, 251, None, None) == 250


def test_an_existing_output_is_never_touched(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    for command in (
        lambda: convert_hf.main(["--hf-model", str(models / "dense"), "--out", str(tmp_path / "out")]),
        lambda: export_hf.main(["--checkpoint", str(models / "ckpt"), "--out", str(tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match="already exists"):
            command()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_writing(models: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="its disk has 1 kB left"):
        convert(models / "dense", tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


class Evil:
    """Pickles to a call of os.mkdir: harmless proof that code ran."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def spoil_places(release: Path, **changes: Callable) -> None:
    """Change where .metadata says that the chunks lie."""
    path = release / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        for name, change in changes.items():
            setattr(place, name, change(getattr(place, name)))
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / ".metadata").write_bytes(pickle.dumps(Evil(r.parent / "owned"))), "posix.mkdir, which is not"),
        (lambda r: torch.save(Evil(r.parent / "owned"), r / "common.pt"), "common.pt: cannot be read"),
        (lambda r: truncate(r / ".metadata", 500), "is refused"),
        (lambda r: truncate(r / "__0_0.distcp", 50_000), "truncated"),
        (lambda r: (r / "__0_0.distcp").unlink(), "__0_0.distcp: is missing"),
        (lambda r: (r / "metadata.json").unlink(), "incomplete"),
        (lambda r: (r / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "format 'zarr'"),
        (lambda r: (r / "hf" / "config.json").unlink(), "configuration is missing"),
        (lambda r: edit_config(r / "hf", num_hidden_layers=5), "has shape"),
        (
            lambda r: spoil_places(r, relative_path=lambda name: f"../{name}"),
            "lies outside the checkpoint",
        ),
        (
            lambda r: spoil_places(r, offset=lambda offset: offset + 8),
            "is damaged",
        ),
    ],
    ids=[
        "hostile .metadata", "hostile common.pt", "cut .metadata", "cut data", "no data", "no metadata.json",
        "other format", "no config", "other architecture", "path outside", "wrong offsets",
    ],
)  # fmt: skip
def test_bad_checkpoints(damage: Callable[[Path], object], message: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    damage(tmp_path / "ckpt" / "release")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert not (tmp_path / "ckpt" / "owned").exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """Control for the above: the pickle does what it says when nothing restricts it."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


def test_a_hostile_chunk_is_refused(models: Path, tmp_path: Path) -> None:
    """A chunk's own pickle may name nothing but tensors, even when its place and length are right."""
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "release" / "__0_0.distcp"
    data = path.read_bytes()
    hostile = data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n")
    assert hostile != data
    path.write_bytes(hostile)
    with pytest.raises(UserError, match=r"_rebuild_tensor_v3, which is not allowed"):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_leaves_no_export(models: Path, tmp_path: Path, monkeypatch) -> None:
    """The export is read back before it gets its name."""
    from megatron_a2d.conversion import torch_dist_to_hf as module

    write = module.write_safetensors

    def write_badly(work, *args):
        digests = write(work, *args)
        with (work.directory / "model.safetensors").open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return digests

    monkeypatch.setattr(module, "write_safetensors", write_badly)
    with pytest.raises(UserError, match="differs from"):
        export(models / "ckpt", tmp_path / "out", "qwen3")
    assert not list(tmp_path.iterdir())
    export(models / "ckpt", tmp_path / "out", "qwen3", verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("release\n", None),
        ("300", "iter_0000300, which does not exist"),
        ("latest", "not an iteration"),
        ("", "not an iteration"),
    ],
)
def test_trackers(content: str, message: str | None, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / TRACKER).write_text(content)
    if message is None:
        assert resolve(tmp_path / "ckpt") == tmp_path / "ckpt" / "release"
        return
    with pytest.raises(UserError, match=message):
        resolve(tmp_path / "ckpt")


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        resolve(tmp_path / "nothing")
    with pytest.raises(UserError, match="written by convert_hf or by training"):
        resolve(tmp_path)
    (tmp_path / "iter_0000040").mkdir()
    with pytest.raises(UserError, match=r"give .*iter_0000040"):
        resolve(tmp_path)
    with pytest.raises(UserError, match=r"lacks \.metadata, common\.pt, metadata\.json"):
        resolve(tmp_path / "iter_0000040")
    assert iteration_of(tmp_path / "iter_0000040") == 40
    with pytest.raises(UserError, match="named neither"):
        iteration_of(tmp_path)


def test_hub_ids(models: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.safetensors" in allow_patterns and "tokenizer*.json" in allow_patterns
        if name == "Qwen/Tiny":
            return str(models / "dense")
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    convert_hf.main(["--hf-model", "Qwen/Tiny", "--out", str(tmp_path / "out")])
    assert "mask token 250" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "release" / "hf" / "config.json").read_text())
    assert config["_name_or_path"] == "Qwen/Tiny"
    with pytest.raises(UserError, match=r"Qwen/Absent: no such directory.*no network.*connection"):
        convert_hf.main(["--hf-model", "Qwen/Absent", "--out", str(tmp_path / "other")])
    for path in ("./absent", "/absent", "absent", "a/b/c"):
        with pytest.raises(UserError, match="check the path"):
            convert_hf.main(["--hf-model", path, "--out", str(tmp_path / "other")])
    assert asked == ["Qwen/Tiny", "Qwen/Absent"]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("text", ["5GB", "1.5 gb", "300KB", "1000", "0", "five", "-3GB", "5GiB", ""])
def test_sizes(text: str) -> None:
    expected = {"5GB": 5 * 10**9, "1.5 gb": 1_500_000_000, "300KB": 300_000, "1000": 1000}
    if text in expected:
        assert options.parse_size("--max-shard-size", text) == expected[text]
    else:
        with pytest.raises(UserError, match="--max-shard-size"):
            options.parse_size("--max-shard-size", text)


def test_verify_wants_two_things(models: Path) -> None:
    with pytest.raises(UserError, match="exactly two"):
        verify.main(["--hf-model", str(models / "dense")])
    verify.main(["--hf-model", str(models / "moe"), "--checkpoint", str(models / "ckpt"), "--logits"])
    with pytest.raises(UserError, match="not the same model"):
        verify.main(["--hf-model", str(models / "dense"), "--checkpoint", str(models / "ckpt")])


def test_the_command_ends_with_code_2_and_one_line(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dense", tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda tensors: tensors.pop(NAME))
    command = [sys.executable, "-m", "checkpoints_tools.convert_hf", "--hf-model", "hf", "--out", "out"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == f"error: hf: tensor {NAME} is missing; fetch or write the model again, completely"
    )
    assert done.stderr.count("error:") == 1 and done.stdout == ""
    assert not (tmp_path / "out").exists()


def renamed(rename: Callable[[str], str]) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        edit_tensors(directory, lambda t: [t.update({rename(name): t.pop(name)}) for name in list(t)])

    return edit


def with_scales(directory: Path) -> None:
    """A model that stores scales of a key-value cache alongside plain weights."""
    scales = {f"model.layers.{i}.self_attn.{kv}_scale": torch.ones(1) for i in range(12) for kv in "kv"}
    edit_tensors(directory, lambda t: t.update(scales))


def quantise(directory: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1)

    edit_tensors(directory, edit)


WHOLE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "FP8": (quantise, 1, r"\(F8_E4M3: model.* and 27 others\)"),
    "FP8, as config.json says": (
        lambda d: (quantise(d), edit_config(d, quantization_config={"quant_method": "fp8"})),
        1, r"config\.json: its weights are quantised \(fp8\)",
    ),
    "packed in 4 bits": (
        lambda d: edit_tensors(d, lambda t: t.update({n: t[n].to(torch.uint8) for n in t if n.endswith("proj.weight")})),
        1, r"\(U8: model.* and 27 others\)",
    ),
    "another method": (lambda d: edit_config(d, quantization_config={"bits": 4}), 1, "quantised"),
    "compressed": (lambda d: edit_config(d, compression_config={"format": "pack-quantized"}), 1, "pack-quantized"),
    "of a larger model": (renamed(lambda n: f"language_model.{n}"), 1, "instead of model.embed_tokens.weight, and 46"),
    "inside another": (renamed(lambda n: n.replace("model.", "model.language_model.")), 1, "instead of model.embed_tokens"),
    "wrapped": (renamed(lambda n: f"module.base_model.model.{n}"), 1, "module.base_model.model.model.embed_tokens"),
    "wrapped inside": (renamed(lambda n: n.replace("self_attn", "_orig_mod.self_attn")), 1, "_orig_mod.self_attn"),
    "without its head": (renamed(lambda n: n.removeprefix("model.")), 1, "embed_tokens.weight instead of"),
    "scales beside": (with_scales, 2, r"\.k_scale \[1\] and 11 others of its kind are unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_wrong_with_all_tensors_is_told_once(case: str, models: Path, tmp_path: Path) -> None:
    damage, num_lines, message = WHOLE[case]
    shutil.copytree(models / "dense", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message) as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == num_lines, refusal.value.problems[:3]
    assert not (tmp_path / "out").exists()


def test_fused_experts_under_other_names_are_told_once(models: Path, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and a larger model names them."""
    shutil.copytree(models / "moe", tmp_path / "hf")
    for file in tmp_path.glob("hf/model*"):
        file.unlink()
    model = tiny.hf_model("moe")
    save_file(
        {f"language_model.{n}": t.contiguous() for n, t in model.state_dict().items()},
        tmp_path / "hf" / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"language_model\.model\.") as refusal:
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(refusal.value.problems) == 1
