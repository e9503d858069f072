"""Dream, LLaDA and LLaDA-MoE against logits that their public code computed (tests/fixtures/record_public_models.py).

The code itself is not part of this repository: A2D_PUBLIC_MODELS names a directory that holds it, and A2D_TRANSFORMERS4
one with transformers 4.57, and then the record is made anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_tools import convert_hf, export_hf
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import model_config_from_hf, read_model_config
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.public_form import leave_out_tokenizer_code, refer_to_tokenizer_code
from megatron_a2d.conversion.sources import open_hf
from megatron_a2d.diffusion.sampling.batch_state import make_canvas
from megatron_a2d.diffusion.sampling.sampler import denoise
from megatron_a2d.diffusion.sampling_options import SamplingOptions
from megatron_a2d.families.registry import kind_of
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.utils.errors import UserError
from megatron_a2d.verification.reference_forward import StreamedModel
from tests import tiny
from tests.cases import as_trained
from tests.fixtures.record_public_models import (
    DREAM_SAMPLED,
    HERE,
    MASK_TOKEN_ID,
    MODELS,
    PROMPT,
    SAMPLED,
    TEXT_LENGTH,
    TOKENS,
    YARN,
    write_recorded,
)
from tests.unit.hf_tensors import assert_bitwise_equal, tensors_of
from tests.unit.model_damage import edit_config, edit_tensors

TOLERANCE = 1e-5
CODE, TRANSFORMERS4 = os.environ.get("A2D_PUBLIC_MODELS"), os.environ.get("A2D_TRANSFORMERS4")
REPOSITORY = Path(__file__).parents[2]
needs_code = pytest.mark.skipif(
    not (CODE and TRANSFORMERS4),
    reason="A2D_PUBLIC_MODELS or A2D_TRANSFORMERS4 does not name a directory with the models' public code, or transformers 4.57",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each model, as on the hub, with our tests' tokenizer."""
    root = tmp_path_factory.mktemp("public")
    for name in MODELS:
        write_recorded(root / name, name)
    return root


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(HERE / f"{name}.safetensors")


def largest_difference(name: str, logits: torch.Tensor) -> float:
    expected = recorded(name)["recorded.logits"]
    assert expected.shape == logits.shape and torch.equal(recorded(name)["recorded.tokens"], TOKENS)
    return float((expected - logits).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_pass_computes_what_the_public_code_does(name: str, models: Path) -> None:
    with open_hf(models / name) as weights:
        assert largest_difference(name, StreamedModel(weights).logits(TOKENS)) <= TOLERANCE
        assert largest_difference(name, StreamedModel(weights, causal=True).logits(TOKENS)) > 0.1


@pytest.mark.parametrize("name", ["dream", "llada_moe"])
def test_yarn_is_what_the_public_code_computes(name: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / name, tmp_path / "hf")
    edit_config(tmp_path / "hf", rope_scaling=YARN)
    with open_hf(tmp_path / "hf") as weights:
        scaled = StreamedModel(weights).logits(TOKENS)
    assert float((recorded(name)["recorded.yarn_logits"] - scaled).abs().max()) <= TOLERANCE
    assert largest_difference(name, scaled) > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out(name: str, models: Path, tmp_path: Path) -> None:
    """Converted and exported as commands; the tensors are the source's, bit by bit, under the standard names."""
    convert_hf.main(["--hf-model", str(models / name), "--out", str(tmp_path / "ckpt")])
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "a2d"), "--format", "a2d"])
    names = kind_of(json.loads((models / name / "config.json").read_text()), name).family.tensor_names
    with open_hf(models / name) as weights:
        standard = weights.map.hf_shapes
    table = {own: plain for plain, own in _expanded(names, weights.model_config.num_layers).items()}
    original = {table.get(key, key): value for key, value in tensors_of(models / name).items()}
    assert original.keys() == standard.keys()
    assert_bitwise_equal(tensors_of(tmp_path / "a2d"), original)
    ours = A2DForMaskedLM.from_pretrained(tmp_path / "a2d", dtype=torch.float32).eval()
    with torch.no_grad():
        assert largest_difference(name, ours(TOKENS).logits) <= TOLERANCE
    trained = read_trained(tmp_path / "a2d")
    assert (trained.objective, trained.label_shift) == ("mdlm", name == "dream")
    assert trained == read_trained(models / name) == read_trained(tmp_path / "ckpt" / "release")
    assert read_model_config(tmp_path / "a2d").mask_token_id == MASK_TOKEN_ID


def _expanded(names: Any, num_layers: int) -> dict[str, str]:
    return {plain.format(layer=i): own.format(layer=i) for plain, own in names.items() for i in range(num_layers)}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_loaded_as_it_is(name: str, models: Path) -> None:
    """By `generate` and `evaluate`: its tensors in our classes, its mask token and label shift from its family."""
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models / name)
    assert (loaded.mask_token_id, loaded.label_shift, loaded.objective) == (MASK_TOKEN_ID, name == "dream", "mdlm")
    with torch.no_grad():
        assert largest_difference(name, loaded.forward.model(TOKENS).logits) <= TOLERANCE  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="remove --objective ar"):
        load_hf_model(models / name, "ar")


@pytest.mark.parametrize("name", ["llada", "llada_moe"])
@pytest.mark.parametrize(("steps", "block_length"), SAMPLED)
def test_greedy_texts_are_those_of_the_public_sampler(name: str, steps: int, block_length: int, models: Path) -> None:
    """Token for token, under the settings that LLaDA publishes: no temperature, low-confidence remasking, in blocks."""
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models / name)
    canvas = make_canvas([PROMPT[0].tolist() + [MASK_TOKEN_ID] * TEXT_LENGTH], MASK_TOKEN_ID)
    options = SamplingOptions(sampler="confidence", num_steps=steps, block_length=block_length)
    ours = denoise(loaded.forward, canvas, MASK_TOKEN_ID, options, label_shift=loaded.label_shift).tokens
    assert torch.equal(ours, recorded(name)[f"recorded.text.{steps}.{block_length}"])
    shifted = denoise(loaded.forward, canvas, MASK_TOKEN_ID, options, label_shift=True).tokens
    assert not torch.equal(ours, shifted), "negative control: the label shift of another family"


@pytest.mark.parametrize(("alg", "steps", "top_p"), DREAM_SAMPLED)
def test_greedy_texts_are_those_of_dreams_sampler(alg: Any, steps: int, top_p: float, models: Path) -> None:
    """Token for token, at temperature 0 without alg_temp, where it is deterministic."""
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(models / "dream")
    canvas = make_canvas([PROMPT[0].tolist() + [MASK_TOKEN_ID] * TEXT_LENGTH], MASK_TOKEN_ID)
    options = SamplingOptions(sampler=alg, num_steps=steps, top_p=top_p)
    ours = denoise(loaded.forward, canvas, MASK_TOKEN_ID, options, label_shift=loaded.label_shift).tokens
    assert torch.equal(ours, recorded("dream")[f"recorded.text.{alg}.{steps}.{top_p}"])


def test_dreams_schedule_and_orders_matter() -> None:
    """Negative control of the texts above: no two settings of them wrote the same, but those that differ in `top_p`."""
    texts = {name: tuple(text[0].tolist()) for name, text in recorded("dream").items() if "recorded.text" in name}
    assert len(texts) == len(DREAM_SAMPLED) and len(set(texts.values())) >= len(texts) - 2


@pytest.mark.parametrize("name", MODELS)
def test_out_in_its_own_form(name: str, models: Path, tmp_path: Path) -> None:
    """Tensors bit by bit, every key of config.json; only the code's place and the mask token are added."""
    convert_hf.main(["--hf-model", str(models / name), "--out", str(tmp_path / "ckpt")])
    out = tmp_path / "out"
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(out), "--format", name])
    assert_bitwise_equal(tensors_of(out), tensors_of(models / name))
    source, config = (json.loads((path / "config.json").read_text()) for path in (models / name, out))
    code = kind_of(source, name).family.code
    assert code is not None
    expected = {key: f"{code.repository}--{where}" for key, where in code.auto_map.items()}
    assert config == source | {"auto_map": expected, "torch_dtype": "bfloat16"}
    assert not list(out.rglob("*.py")) and code.repository in (out / "README.md").read_text()
    with open_hf(out) as weights:
        assert largest_difference(name, StreamedModel(weights).logits(TOKENS)) <= TOLERANCE
    convert_hf.main(["--hf-model", str(out), "--out", str(tmp_path / "again")])
    assert read_trained(out) == read_trained(tmp_path / "again" / "release") == read_trained(models / name)


def test_both_spellings_of_the_dtype_leave_alike(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "dream", tmp_path / "hf")
    edit_config(tmp_path / "hf", dtype="bfloat16", torch_dtype="bfloat16")
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt"), "--no-verify"])
    arguments = ["--checkpoint", str(tmp_path / "ckpt"), "--out", str(tmp_path / "out"), "--format", "dream"]
    export_hf.main([*arguments, "--dtype", "fp32"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


# With transformers 4, as any user: python -c SCRIPT DIRECTORY TOKENS, which prints nothing and writes DIRECTORY/logits.
AS_A_USER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["recorded.tokens"]).logits.float().contiguous()
save_file({"logits": logits}, Path(sys.argv[1]) / "logits")
"""


@needs_code
@pytest.mark.parametrize("name", MODELS)
def test_its_own_code_loads_the_export(name: str, models: Path, tmp_path: Path) -> None:
    """With the files of its code beside the weights, as without a network; the class's name is the copy's."""
    convert(models / name, tmp_path / "ckpt", verify=False)
    out = tmp_path / "out"
    export_hf.main(["--checkpoint", str(tmp_path / "ckpt"), "--out", str(out), "--format", name, "--no-verify"])
    module, model_class, config_class, _ = MODELS[name]
    for file in (f"configuration_{module}.py", f"modeling_{module}.py", "generation_utils.py"):
        text = (Path(CODE or "") / file).read_text()
        (out / file).write_text(text.replace('init_device = "cuda"', 'init_device = "cpu"'))  # LLaDA asks for a GPU
    auto_map = {"AutoConfig": f"configuration_{module}.{config_class}", "AutoModel": f"modeling_{module}.{model_class}"}
    edit_config(out, auto_map=auto_map)
    environment = {**os.environ, "PYTHONPATH": str(TRANSFORMERS4), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", AS_A_USER, str(out), str(HERE / f"{name}.safetensors")]
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    assert largest_difference(name, load_file(out / "logits")["logits"]) <= TOLERANCE


@pytest.mark.parametrize(("kind", "form"), [("qwen2_tied", "dream"), ("llama_full", "llada")])
def test_another_model_in_their_form(kind: str, form: str, tmp_path: Path) -> None:
    """A Qwen2.5 leaves as a Dream, a Llama as a LLaDA: with the keys of the published model, in its own sizes."""
    heads = {"head_dim": None, "num_attention_heads": 4, "hidden_size": 64}
    tiny.write_hf(tmp_path / "hf", kind.removesuffix("_full"), **heads)
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "ckpt")])
    trained = as_trained(tmp_path / "ckpt", tmp_path / "run", {"label_shift": form == "dream"})
    export_hf.main(["--checkpoint", str(trained), "--out", str(tmp_path / "out"), "--format", form])
    found, expected = read_model_config(tmp_path / "out"), read_model_config(tmp_path / "hf")
    assert found == dataclasses.replace(expected, mask_token_id=tiny.MASK_TOKEN_ID)
    with open_hf(tmp_path / "hf") as one, open_hf(tmp_path / "out") as other:
        assert torch.equal(StreamedModel(one).logits(TOKENS), StreamedModel(other).logits(TOKENS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = next(iter(kind_of(config, form).family.published.values()))
    assert config.keys() >= published.keys() and config["eos_token_id"] == tiny.TURN_END


NOT_THEIRS: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "dream", {}, "no biases of queries, keys and values, and Dream does"),
    ("qwen2", "dream", {"label_shift": False}, "its label shift is false, and Dream is trained with it"),
    ("qwen2", "dream", {}, "its heads have 24 channels, and Dream's the hidden size over"),
    ("qwen2", "dream", {"objective": "block", "block_length": 4}, "trained in blocks of 4"),
    ("llama3", "llada", {"label_shift": False}, "its rotary embedding is scaled .*LLaDA's cannot be"),
    ("moe", "llada_moe", {"label_shift": False}, "its chosen experts are renormalised, unlike LLaDA-MoE's"),
]


@pytest.mark.parametrize(("kind", "form", "settings", "message"), NOT_THEIRS)
def test_what_is_not_theirs_is_not_exported(
    kind: str, form: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny.write_hf(tmp_path / "hf", kind, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "ckpt")
    trained = as_trained(tmp_path / "ckpt", tmp_path / "run", settings)
    with pytest.raises(UserError, match=f"--format {form}: .*{message}"):
        export_hf.main(["--checkpoint", str(trained), "--out", str(tmp_path / "out"), "--format", form])
    assert not (tmp_path / "out").exists()


def test_the_tokenizers_code_is_named_on_the_hub(tmp_path: Path) -> None:
    """Dream's tokenizer has a class of its own, whose file an export does not have."""
    code = kind_of(MODELS["dream"][3], "dream").family.code
    assert code is not None
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}))
    for _ in range(2):  # and once is enough
        refer_to_tokenizer_code(tmp_path, code)
    expected = ["Dream-org/Dream-v0-Base-7B--tokenization_dream.DreamTokenizer", None]
    assert json.loads(path.read_text()) == {"auto_map": {"AutoTokenizer": expected}}


def test_the_tokenizer_of_another_form_needs_no_code(tmp_path: Path) -> None:
    """Of a Dream as `a2d`: tokenizer.json is enough."""
    path = tmp_path / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    path.write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "DreamTokenizer", "eos_token": "a"}))
    leave_out_tokenizer_code(tmp_path)
    assert "auto_map" in json.loads(path.read_text()), "without tokenizer.json it is needed"
    (tmp_path / "tokenizer.json").write_text("{}")
    leave_out_tokenizer_code(tmp_path)
    assert json.loads(path.read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("q_proj.weight", "attn_out.weight"),
        ("ff_proj.weight", "up_proj.weight"),
        ("attn_norm.weight", "ff_norm.weight"),
    ],
)
def test_swapped_tensors_of_llada_break_parity(first: str, second: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llada", tmp_path / "hf")
    one, other = (f"model.transformer.blocks.1.{name}" for name in (first, second))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    edit_tensors(tmp_path / "hf", swap)
    with open_hf(tmp_path / "hf") as weights:
        assert largest_difference("llada", StreamedModel(weights).logits(TOKENS)) > 100 * TOLERANCE


def test_a_renormalised_router_breaks_parity(models: Path) -> None:
    from dataclasses import replace

    with open_hf(models / "llada_moe") as weights:
        wrong = weights._replace(model_config=replace(weights.model_config, norm_topk_prob=True))
        assert largest_difference("llada_moe", StreamedModel(wrong).logits(TOKENS)) > 100 * TOLERANCE


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"block_type": "sequential"}, "block_type is 'sequential', and only 'llama' is supported"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
    ("llada", {"include_bias": True}, "include_bias is True"),
    ("llada", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("llada", {"n_layers": 0}, "n_layers is 0, not a positive whole number"),
    ("llada", {"embedding_size": 512}, "embedding_size is 512 and vocab_size is 256"),
    ("llada", {"architectures": ["Other"]}, "architectures is .'Other'., but .*LLaDAModelLM or LLaDAMoEModelLM"),
    ("llada", {"rope_scaling": YARN}, "rope_scaling is .*only None is supported"),
    ("llada", {"include_qkv_bias": True}, "config.json is LLaDA's .*biases.*tensors are LLaDA's"),
    ("llada_moe", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size is 24"),
    ("llada_moe", {"moe_layer_freq": [0, 1]}, "moe_layer_freq"),
    ("llada_moe", {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias is True"),
    ("llada_moe", {"qk_layernorm": False}, "config.json is LLaDA-MoE's .*no norms.*tensors are .*norms on queries"),
    ("dream", {"use_sliding_window": True}, "use_sliding_window is True.*unmodified Dream"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_refused(name: str, changes: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / name, tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=message) as refusal:
        convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")])
    assert len(refusal.value.problems) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_llada_without_its_keys_is_another_model(models: Path) -> None:
    """OLMo's class fills missing keys with settings that are not LLaDA's."""
    config = json.loads((models / "llada" / "config.json").read_text())
    for key in ("block_type", "rope", "activation_type", "layer_norm_type"):
        with pytest.raises(UserError, match=f"{key} is "):
            model_config_from_hf({name: value for name, value in config.items() if name != key}, "config.json")


@needs_code
def test_the_record_is_what_the_public_code_computes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{TRANSFORMERS4}:{REPOSITORY}"}
    command = [sys.executable, "-m", "tests.fixtures.record_public_models", str(tmp_path)]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=300)
    for name in MODELS:
        anew = load_file(tmp_path / f"{name}.safetensors")
        if (scaled := anew.pop("recorded.yarn_logits", None)) is not None:
            assert float((recorded(name)["recorded.yarn_logits"] - scaled).abs().max()) <= TOLERANCE
        assert largest_difference(name, anew.pop("recorded.logits")) <= TOLERANCE
        assert_bitwise_equal(anew, {k: v for k, v in recorded(name).items() if not k.endswith("logits")})
