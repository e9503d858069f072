"""Exports in SDAR's form: what serving engines need of the directory, what is refused, and the same text and logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.checkpoint.directory import RELEASE
from megatron_a2d.checkpoint.training_facts import Trained, inherited, read_trained
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.diffusion.model_interface import Request
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.diffusion.sampling_options import Cache
from megatron_a2d.hf.load_hf_model import diffusion_classes
from megatron_a2d.inference.arguments import close_model, load_model
from megatron_a2d.inference.loaded_model import LoadedModel
from megatron_a2d.utils.errors import UserError
from tests import tiny
from tests.cases import as_trained
from tests.unit.hf_tensors import tensors_of

MASK, BLOCK = 151669, 4
# Qwen3's vocabulary, so that the engines' mask token exists; narrow, so that it stays small.
SIZES = {"vocab_size": 151936, "hidden_size": 16, "num_hidden_layers": 2}
SERVED = {"objective": "block", "block_length": BLOCK, "label_shift": False}
# Both end inside a block.
PROMPTS = [[5, 7, 9, 11, 13, 20], [20, 21]]
NEW, STEPS = 13, 7
TRANSFORMERS4 = os.environ.get("A2D_TRANSFORMERS4", "")


def trained(root: Path, kind: str, settings: dict[str, Any], mask: int = MASK, **sizes: Any) -> Path:
    """A run's checkpoint with these settings."""
    hf = tiny.write_hf(root / "hf", kind, **SIZES | sizes)
    convert(hf, root / "checkpoint", mask, verify=False)
    run = as_trained(root / "checkpoint", root / "run", settings)
    shutil.rmtree(hf)
    shutil.rmtree(root / "checkpoint")
    return run


def exported(run: Path, out: Path, form: str, *flags: str) -> Path:
    export_hf.main(["--checkpoint", str(run), "--out", str(out), "--format", form, *flags])
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: trained(tmp_path_factory.mktemp(kind), kind, SERVED) for kind in ("dense_tied", "moe")}


@pytest.fixture(scope="module")
def exports(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sdar")
    return {kind: exported(run, root / kind, "sdar") for kind, run in runs.items()}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("kind", ["dense_tied", "moe"])
def test_config_json_is_what_engines_read(kind: str, exports: dict[str, Path]) -> None:
    """LMDeploy 0.18.0 and SGLang 0.5.23: each key was missed by one of them, with an error or in silence."""
    config = config_of(exports[kind])
    name, model_type = ("SDARMoe", "sdar_moe") if kind == "moe" else ("SDAR", "sdar")
    assert config["architectures"] == [f"{name}ForCausalLM"] and config["model_type"] == model_type
    assert config["auto_map"] == {
        "AutoConfig": f"configuration_sdar.{name}Config",
        "AutoModel": f"modeling_sdar.{name}Model",
        "AutoModelForCausalLM": f"modeling_sdar.{name}ForCausalLM",
    }
    assert config["rope_theta"] == 1e6 and config["rope_scaling"] is None and "rope_parameters" not in config
    assert config["tie_word_embeddings"] is False
    assert config["sliding_window"] is None and config["use_sliding_window"] is False
    assert config["attention_bias"] is False and config["head_dim"] == 24
    assert config["mask_token_id"] == MASK and config["block_size"] == BLOCK and "block_length" not in config
    assert config["pad_token_id"] == tiny.END_OF_TEXT and config["eos_token_id"] == tiny.TURN_END
    assert config["label_shift"] is False and config["objective"] == "block"
    assert config["fuse_cross_entropy"] is True, "SDAR's own modelling code"
    if kind == "moe":
        experts = {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
        assert {key: config[key] for key in experts} == experts


@pytest.mark.parametrize("kind", ["dense_tied", "moe"])
def test_tensors_are_the_hubs_and_nothing_else(kind: str, exports: dict[str, Path]) -> None:
    """LMDeploy raises on other names and is silent about missing ones; SGLang is silent about fused experts."""
    with safe_open(exports[kind] / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer = {"input_layernorm", "post_attention_layernorm"} | {f"self_attn.{part}" for part in (
        "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}  # fmt: skip
    projections = ("gate_proj", "up_proj", "down_proj")
    if kind == "moe":
        layer |= {"mlp.gate"} | {f"mlp.experts.{expert}.{part}" for expert in range(8) for part in projections}
    else:
        layer |= {f"mlp.{part}" for part in projections}
    expected = {f"model.layers.{number}.{part}.weight" for number in range(2) for part in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    tensors = tensors_of(exports[kind])
    tied = torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert tied == (kind == "dense_tied")


def test_tokenizer_names_the_mask(exports: dict[str, Path]) -> None:
    for directory in exports.values():
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|MASK|>", MASK)
        assert Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id("<|MASK|>") == MASK


def test_card_tells_engines_the_block_length(exports: dict[str, Path]) -> None:
    for directory in exports.values():
        assert yaml.safe_load((directory / "sglang_dllm.yaml").read_text()) == {"block_size": BLOCK}
        card = (directory / "README.md").read_text()
        assert f"--dllm-block-length {BLOCK}" in card and "--dllm-algorithm-config DIRECTORY/sglang_dllm.yaml" in card
        assert "AutoModelForCausalLM" in card and f"blocks of {BLOCK} tokens" in card
        assert "sglang_dllm.yaml" in (directory / "SHA256SUMS").read_text()


CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any], str]] = {
    "label shift": ({**SERVED, "label_shift": True}, MASK, {}, "trained with the label shift"),
    "co-loss": ({**SERVED, "ar_loss_weight": 0.5}, MASK, {}, r"--ar-loss-weight 0.5, so its finished blocks attend caus"),
    "mask": (SERVED, 151670, {}, "its mask token is 151670, and engines fill masks of the fixed id 151669"),
    "no blocks": ({"objective": "mdlm", "label_shift": False}, MASK, {}, "was not trained in blocks"),
    "ar": ({"objective": "ar"}, MASK, {}, "predict the next token"),
    "long blocks": ({**SERVED, "block_length": 1024, "seq_length": 2048}, MASK, {}, "accept at most 512"),
    "yarn": (SERVED, MASK, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "YaRN"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str, tmp_path: Path) -> None:
    settings, mask, sizes, message = CASES[case]
    run = trained(tmp_path, "dense_tied", settings, mask, **sizes)
    with pytest.raises(UserError, match=message):
        exported(run, tmp_path / "out", "sdar")
    assert not (tmp_path / "out").exists()


def test_co_loss_is_exported_only_when_asked(tmp_path: Path) -> None:
    run = trained(tmp_path, "dense_tied", {**SERVED, "ar_loss_weight": 0.5})
    out = exported(run, tmp_path / "out", "sdar", "--allow-objective-mismatch", "--no-verify")
    assert "**Not what it was trained for**" in (out / "README.md").read_text()
    assert read_trained(out).ar_loss_weight == 0.5


# What is exported, and the settings that the run had.
FORMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sdar": ("dense_tied", SERVED, "sdar"),
    "sdar_moe": ("moe", SERVED, "sdar"),
    "no_shift": ("moe", SERVED, "a2d"),
    "shift": ("dense", {**SERVED, "label_shift": True}, "a2d"),
    "co_loss": ("moe", {**SERVED, "label_shift": True, "ar_loss_weight": 0.5}, "a2d"),
}


@pytest.fixture(scope="module")
def pairs(
    runs: dict[str, Path], exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """(checkpoint, export) of each form; those in a2d's are of the tests' own vocabulary."""
    root = tmp_path_factory.mktemp("pairs")
    found = {}
    for name, (kind, settings, form) in FORMS.items():
        if form == "sdar":
            found[name] = (runs[kind], exports[kind])
            continue
        run = trained(root / name, kind, settings, tiny.MASK_TOKEN_ID, vocab_size=256, hidden_size=64)
        found[name] = (run, exported(run, root / name / "export", form))
    return found


def written(loaded: LoadedModel, cache: Cache = "none") -> list[list[int]]:
    """What our sampler writes behind PROMPTS."""
    rows = [[*prompt, *[loaded.mask_token_id] * NEW] for prompt in PROMPTS]
    options = SamplingOptions(
        num_steps=STEPS, greedy=True, temperature=1.0, block_length=loaded.block_length, aligned_blocks=True,
        cache=cache,
    )  # fmt: skip
    canvas = make_canvas(rows, loaded.mask_token_id)
    sampled = denoise(loaded.forward, canvas, loaded.mask_token_id, options, label_shift=loaded.label_shift)
    return [
        until_end(tokens[: len(row)], len(prompt))
        for tokens, row, prompt in zip(sampled.tokens.tolist(), rows, PROMPTS, strict=True)
    ]


def until_end(tokens: list[int], num_given: int) -> list[int]:
    """A text up to its first end token; what follows is padding in one, and more text in another."""
    ends = (tiny.END_OF_TEXT, tiny.TURN_END)
    stop = next((place for place in range(num_given, len(tokens)) if tokens[place] in ends), len(tokens))
    return tokens[:stop]


def logits(loaded: LoadedModel, tokens_BL: torch.Tensor) -> torch.Tensor:
    everywhere = torch.ones_like(tokens_BL, dtype=torch.bool)
    (logits_NV,) = loaded.forward(Request(tokens_BL, everywhere, everywhere), lambda rows, head: (head(rows),))
    return logits_NV.view(*tokens_BL.shape, -1)


def half_written(mask: int) -> torch.Tensor:
    """Two clean blocks, then one of which every second token is masked."""
    tokens_BL = torch.randint(3, tiny.NUM_TOKENS, (2, 3 * BLOCK), generator=torch.Generator().manual_seed(0))
    tokens_BL[:, 2 * BLOCK :: 2] = mask
    return tokens_BL


ELSEWHERE = """
import json, sys, torch, transformers
out, prompts, new, steps, *directories = sys.argv[1:]
results = {"version": transformers.__version__}
for directory in directories:
    config = json.load(open(directory + "/config.json"))
    kind = next(name for name in config["auto_map"] if name.startswith("AutoModelFor"))
    model, report = getattr(transformers, kind).from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    model.eval()
    with torch.no_grad():
        logits = model(torch.load(directory + "/../tokens.pt")).logits
    results[directory] = logits, [
        model.generate(torch.tensor([prompt]), max_new_tokens=int(new), num_steps=int(steps))[0].tolist()
        for prompt in json.loads(prompts)
    ]
assert "megatron_a2d" not in sys.modules
torch.save(results, out)
"""


@pytest.mark.parametrize("line", ["4.57", "5."])
def test_exports_are_the_trained_model(line: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Logits on a partly masked block, and the text written, under transformers that know nothing of this project."""
    if line == "4.57" and not TRANSFORMERS4:
        pytest.skip("A2D_TRANSFORMERS4 names no transformers 4.57; `make test` sets it")
    expected, tokens = {}, {}
    for name, (run, directory) in pairs.items():
        loaded = load_model(str(run), {})
        try:
            tokens[name] = half_written(loaded.mask_token_id)
            expected[name] = logits(loaded, tokens[name]), written(loaded)
        finally:
            close_model()
        torch.save(tokens[name], directory.parent / "tokens.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if line == "4.57":
        environment["PYTHONPATH"] = str(Path(TRANSFORMERS4).resolve())
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "out.pt"), json.dumps(PROMPTS), str(NEW), str(STEPS)]
    command += [str(directory) for _, directory in pairs.values()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = torch.load(tmp_path / "out.pt")
    assert results["version"].startswith(line)
    for name, (_, directory) in pairs.items():
        (logits_BLV, texts), (theirs_BLV, their_texts) = expected[name], results[str(directory)]
        assert (logits_BLV - theirs_BLV).abs().max() < 1e-5, name
        assert texts == [until_end(row, len(given)) for row, given in zip(their_texts, PROMPTS, strict=True)], name
        assert sum(len(set(row[len(given) :])) for row, given in zip(texts, PROMPTS, strict=True)) > 6, name


def test_exports_are_sampled_and_evaluated_as_their_checkpoints(pairs: dict[str, tuple[Path, Path]]) -> None:
    """By generate, and by held-out evaluation, which reads a noised and a clean copy at once."""
    for name, (run, directory) in pairs.items():
        results = []
        for path in (run, directory):
            loaded = load_model(str(path), {})
            try:
                both_BL = half_written(loaded.mask_token_id).repeat(1, 2)
                places_L = torch.arange(3 * BLOCK)
                starts_L = places_L // BLOCK * BLOCK
                levels_L = torch.cat([2 * starts_L, 2 * starts_L + 1])
                everywhere = torch.ones_like(both_BL, dtype=torch.bool)
                request = Request(
                    both_BL, everywhere, everywhere,
                    levels=levels_L.expand_as(both_BL), positions=places_L.repeat(2).expand_as(both_BL),
                )  # fmt: skip
                (noised,) = loaded.forward(request, lambda rows, head: (head(rows),))
                assert written(loaded, "prefix") == written(loaded), (name, path)
                results.append((loaded.objective, loaded.block_length, written(loaded), noised))
            finally:
                close_model()
        (*facts, ours), (*their_facts, theirs) = results
        assert facts == their_facts and facts[:2] == ["block", BLOCK], name
        assert (ours - theirs).abs().max() < 1e-5, name


def test_padding_moves_the_blocks_with_the_text(pairs: dict[str, tuple[Path, Path]]) -> None:
    """Blocks are counted from the first real token."""
    for name in ("sdar", "co_loss"):
        directory = pairs[name][1]
        model = diffusion_classes()[config_of(directory)["model_type"]].from_pretrained(directory).eval()
        pad = torch.full((1, 3), tiny.END_OF_TEXT)
        prompt = torch.tensor([PROMPTS[0]])
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(prompt)], dim=1)
        alone = model.generate(prompt, max_new_tokens=NEW, num_steps=STEPS)
        padded = model.generate(torch.cat([pad, prompt], 1), attention_mask=mask, max_new_tokens=NEW, num_steps=STEPS)
        assert torch.equal(padded[:, 3:], alone), name


# SDAR's published config.json: the keys besides the model's sizes, as in github.com/JetAstra/SDAR at c2041a8.
PUBLISHED: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_implementation": "flex_attention", "bos_token_id": 0,
    "debug": False, "eos_token_id": 0, "block_size": 8, "mask_token_id": MASK, "ep_size": 1, "fuse_cross_entropy": True,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 512, "max_window_layers": 2,
    "micro_forward": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "skip_checkpoint": False,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False, "use_deepep": False,
    "use_sliding_window": False,
}  # fmt: skip
SIZE_KEYS = (
    "architectures", "auto_map", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models as SDAR publishes them: its config.json, and code that is not ours."""
    root, found = tmp_path_factory.mktemp("published"), {}
    for kind, source in exports.items():
        found[kind] = shutil.copytree(source, root / kind)
        config = {key: value for key, value in config_of(source).items() if key in SIZE_KEYS} | PUBLISHED
        (found[kind] / "config.json").write_text(json.dumps(config))
        for path in found[kind].glob("*.py"):
            path.write_text("raise RuntimeError('code of the directory was run')\n")
    return found


# How SDAR's own models count blocks and positions: from the beginning of each document.
GRID = {"reset_attention_mask": True, "reset_block_grid": True, "reset_position_ids": True}


@pytest.mark.parametrize("kind", ["dense_tied", "moe"])
def test_published_models_come_in_and_go_out_bitwise(kind: str, published: dict[str, Path], tmp_path: Path) -> None:
    convert_hf.main(["--hf-model", str(published[kind]), "--out", str(tmp_path / "checkpoint")])
    expected = Trained("block", label_shift=False, block_length=8, **GRID)
    assert read_trained(tmp_path / "checkpoint" / RELEASE) == expected
    again = exported(tmp_path / "checkpoint", tmp_path / "again", "sdar")
    before, after = tensors_of(published[kind]), tensors_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, original = config_of(again), config_of(published[kind])
    assert config["block_size"] == 8 and config["mask_token_id"] == MASK
    for key in SIZE_KEYS:
        assert config.get(key) == original.get(key), key


def test_a_run_from_a_published_model_inherits_its_blocks(published: dict[str, Path], tmp_path: Path) -> None:
    convert(published["dense_tied"], tmp_path / "checkpoint", verify=False)
    assert inherited({"load": str(tmp_path / "checkpoint")}) == {
        "objective": "block", "label_shift": False, "block_length": 8, **GRID,
    }  # fmt: skip


def test_an_export_says_how_its_blocks_were_counted(exports: dict[str, Path], tmp_path: Path) -> None:
    """Through packed samples here: a run that starts from it does the same, and the card tells who serves it."""
    source = exports["dense_tied"]
    assert not GRID.keys() & config_of(source).keys() and "no `--reset-block-grid" in (source / "README.md").read_text()
    trained = read_trained(source)
    assert not trained.reset_block_grid and not trained.reset_position_ids
    again = shutil.copytree(source, tmp_path / "again")
    (again / "config.json").write_text(json.dumps(config_of(source) | GRID))
    assert read_trained(again) == trained._replace(**GRID)


def test_published_models_are_sampled_without_their_code(published: dict[str, Path]) -> None:
    loaded = load_model(str(published["moe"]), {})
    assert (loaded.objective, loaded.block_length, loaded.label_shift) == ("block", 8, False)
    assert written(loaded)


def test_a_model_without_its_block_length_is_refused(published: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(published["dense_tied"], tmp_path / "model")
    config = config_of(directory)
    del config["block_size"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no block_size; write the block length"):
        convert(directory, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
