"""`make gpu` loses nothing that was measured: parts that fail, hang, or fail in part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import chunked_head, gpu, host_waits, train_step_vs_hf
from bench.shapes import SHAPES, rehearsal
from megatron_a2d.distributed import process_groups
from megatron_a2d.model.flops import train_flops_per_token
from megatron_a2d.utils.errors import UserError
from tests.unit.test_training import QWEN3_8B, QWEN3_30B_A3B

WRITES = "import json, sys; json.dump({'rows': [ROWS]}, open(sys.argv[1], 'w')); print('said', flush=True); "


def part(name: str, rows: str = "{}", then: str = "", limit: float = 300) -> gpu.Part:
    return gpu.Part(name, [sys.executable, "-c", WRITES.replace("ROWS", rows) + then, "OUT"], limit)


def part_of_tests(name: str, *outcomes: str) -> gpu.Part:
    written = json.dumps({"outcomes": dict(enumerate(outcomes))})
    return gpu.Part(name, [sys.executable, "-c", f"import sys; open(sys.argv[1], 'w').write({written!r})", "OUT"], 300)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "NVIDIA H200"})


def test_every_end_of_a_part(
    card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [
        part("good"),
        part("partly", rows="{'error': 'no kernel'}"),
        part_of_tests("skipping", "skipped", "skipped"),
        part_of_tests("testing", "skipped", "passed"),
        part("failing", then="raise ValueError('no image')"),
        # A shell starts at once, also on a busy machine: what it says and writes is there when its time is over.
        gpu.Part("hanging", ["sh", "-c", 'echo "{\\"rows\\": [{}]}" > "$0"; echo said; exec sleep 600', "OUT"], 3),
        gpu.Part("silent", [sys.executable, "-c", "pass", "OUT"], 300),
    ]
    monkeypatch.setattr(gpu, "parts", lambda rehearse: chosen)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    result = json.loads((tmp_path / "result.json").read_text())
    seen: dict[str, Any] = {item["name"]: item for item in result["parts"]}
    assert {name: item["status"] for name, item in seen.items()} == {
        "good": "ok", "partly": "partly", "skipping": "failed", "testing": "ok", "failing": "failed", "hanging": "timeout", "silent": "failed",
    }  # fmt: skip
    assert all(seen[name]["result"]["rows"] for name in ("good", "partly", "failing", "hanging"))
    assert "ValueError: no image" in seen["failing"]["last_lines"] and "said" in seen["hanging"]["last_lines"]
    assert "last_lines" not in seen["good"] and "6 of 7" not in capsys.readouterr().out


def test_no_time_left(card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "parts", lambda rehearse: [part("good")])
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "result.json"), "--budget", "5"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert json.loads((tmp_path / "result.json").read_text())["parts"] == [{"name": "good", "status": "skipped"}]


def test_a_second_command_continues(
    card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing first, then what failed; what was measured is neither taken again nor lost."""
    out, mended = tmp_path / "result.json", tmp_path / "mended"
    fails = f"import os; os._exit(0 if os.path.exists({str(mended)!r}) else 1)"
    chosen = [part("failing", then=fails), part("good"), part("partly", rows="{'error': 'no kernel'}"), part("late")]
    monkeypatch.setattr(gpu, "parts", lambda rehearse: chosen)
    took: list[str] = []
    run = gpu.run
    monkeypatch.setattr(gpu, "run", lambda part, *rest: took.append(part.name) or run(part, *rest))  # type: ignore[func-returns-value]

    def command(*more: str) -> dict[str, Any]:
        took.clear()
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), *more])
        with pytest.raises(SystemExit):
            gpu.main()
        return {item["name"]: item for item in json.loads(out.read_text())["parts"]}

    first = command("--parts", "failing", "good", "partly")
    assert took == ["failing", "good", "partly"] and "late" not in first
    assert command("--budget", "5")["late"] == {"name": "late", "status": "skipped"} and not took
    mended.touch()
    second = command()
    assert took == ["late", "failing"] and list(second) == ["failing", "good", "partly", "late"]
    assert second["failing"]["status"] == "ok" and second["good"] == first["good"]
    assert "3 of 4 parts; not ['partly']" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "holds no result of this command"),
        ("[]", "holds no result of this command"),
        ('{"rows": []}', "holds no result of this command"),
        ('{"machine": {"gpu": "NVIDIA H200"}, "rehearsal": false, "parts": []}', "was measured on another machine"),
    ],
)
def test_another_result_is_not_continued(content: str, words: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    out.write_text(content)
    with pytest.raises(UserError, match=words):
        gpu.earlier(out, rehearse=False)
    assert out.read_text() == content


def test_two_commands_of_ten_minutes_hold_all() -> None:
    """And a quarter of an hour of a card's time; the first one has what is wanted most."""
    limits = {part.name: part.limit for part in gpu.parts(rehearse=False)}
    assert sum(limits.values()) <= 15 * 60
    assert list(limits)[:4] == [
        "engine_vs_local",
        "fp8_vs_emulation",
        "train_step qwen3_8b",
        "train_step qwen3_30b_a3b",
    ]
    assert sum(list(limits.values())[:7]) <= 570


def test_waits_are_found_by_their_lines() -> None:
    tensor = torch.tensor([2.0, 3.0])

    def step() -> None:
        tensor.sum().item()
        float(tensor[0])

    places = host_waits.find_places(step)
    lines = [int(place.rpartition(":")[2]) for place in places]
    assert list(places.values()) == [1, 1] and lines[1] == lines[0] + 1
    assert all(place.startswith("tests/unit/test_gpu_command.py:") for place in places)
    assert host_waits.find_places(lambda: None) == {}


def test_the_heads_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is of the form of all benchmarks in turns."""
    source = tmp_path / "head.json"
    monkeypatch.setattr(chunked_head, "cpu_peak_bytes", lambda kind, sizes: len(kind))
    monkeypatch.setattr(sys, "argv", ["masked_head", "--rehearse", "--rounds", "1", "--out", str(source)])
    chunked_head.main()
    process_groups.finalize()
    copies = f"import shutil, sys; shutil.copy({str(source)!r}, sys.argv[1])"
    done = gpu.run(gpu.Part("masked_head", [sys.executable, "-c", copies, "OUT"], 300), 300, rehearse=True)
    assert done["status"] == "ok" and set(done["result"]["comparisons"][0]["seconds"]) == set(chunked_head.KINDS)


def test_outcomes_are_written_after_every_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test that hangs takes its process with it, not what the tests before it measured."""
    from tests.gpu import conftest

    path = tmp_path / "report.json"
    for name, value in {"REPORT": [path], "OUTCOMES": {}, "FIGURES": {"test_a": {"distance": 0.5}}}.items():
        monkeypatch.setattr(conftest, name, value)
    for name, outcome in (("test_a", "passed"), ("test_b", "failed")):
        node = f"tests/gpu/test_gpu.py::{name}"
        conftest.pytest_runtest_logreport(pytest.TestReport(node, ("", 0, ""), {}, outcome, None, "call"))  # type: ignore[arg-type]
        written = json.loads(path.read_text())
        assert written["outcomes"][name] == outcome and written["figures"] == {"test_a": {"distance": 0.5}}


def test_shapes_are_the_published_models() -> None:
    """The whole models have the parameters that their names say; what is measured differs in its layers alone."""
    from bench.train_step_variants import model_config_of

    for name, parameters in {"qwen3_0p6b": 0.596e9, "qwen3_1p7b": 1.72e9, "qwen3_4b": 4.02e9}.items():
        whole = SHAPES[name]._replace(layers=SHAPES[name].model["num_hidden_layers"])
        assert model_config_of(whole.config()).num_parameters() == pytest.approx(parameters, rel=0.01)
    for name, model in {"qwen3_8b": QWEN3_8B, "qwen3_30b_a3b": QWEN3_30B_A3B}.items():
        whole = SHAPES[name]._replace(layers=SHAPES[name].model["num_hidden_layers"])
        assert model_config_of(whole.config()).num_parameters() == model.num_parameters()
        layers = SHAPES[name].layers
        cut = train_flops_per_token(model_config_of(SHAPES[name].config()), 4096, head_fraction=0)
        assert cut / layers == pytest.approx(train_flops_per_token(model, 4096, head_fraction=0) / model.num_layers)


def row(variant: str, speed: float, **more: Any) -> dict[str, Any]:
    return {"shape": "moe", "variant": variant, "tokens_per_second": speed, **more}


def test_ratios_are_to_the_fastest_baseline() -> None:
    rows = [
        row("bf16", 300.0), row("fp8", 390.0), row("hugging_face, grouped_mm", 100.0), row("hugging_face, eager", 50.0),
        row("fp8, blockwise", 330.0), {"shape": "moe", "variant": "bf16, portable", "error": "no kernel"},
    ]  # fmt: skip
    assert train_step_vs_hf.ratios(rows) == {
        "moe": {
            "bf16 over hugging_face": 3.0, "fp8 over hugging_face": 3.9, "fp8 over bf16": pytest.approx(1.3),
            "fp8, blockwise over hugging_face": 3.3, "fp8, blockwise over bf16": pytest.approx(1.1),
        }
    }  # fmt: skip
    assert train_step_vs_hf.ratios(rows[:1]) == {"moe": {}}


def test_layers_alone() -> None:
    """A head that takes half of the time at a tenth of the operations' rate changes nothing."""
    sizes = {"micro_batch_size": 2, "num_microbatches": 4, "seq_length": 1000}
    whole = {**sizes, "seconds": [2.0, 3.0, 4.0], "flops_per_token": 8.5e9}
    half = {**sizes, "seconds": [2.2, 2.0, 1.9], "flops_per_token": 4.5e9}
    found = train_step_vs_hf.of_layers(whole, half, peak=64e12)
    assert found["layer_tflops"] == pytest.approx(32.0) and found["layer_mfu"] == pytest.approx(0.5)
    for unlike in ({**half, "micro_batch_size": 1, "num_microbatches": 8}, {"error": "out of memory"}):
        assert train_step_vs_hf.of_layers(whole, unlike, peak=64e12) == {"half": unlike}


def test_memory_is_found_by_smaller_micro_batches_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(shape: Any, *_: Any) -> dict[str, Any]:
        tried.append((shape.micro_batch_size, shape.num_microbatches))
        if shape.micro_batch_size > 1:
            raise torch.OutOfMemoryError("all of it")
        return {"fits": True}

    monkeypatch.setattr(train_step_vs_hf, "measure", measure)
    shape = SHAPES["qwen3_30b_a3b"]
    assert train_step_vs_hf.largest_that_fits(shape, "bf16", {}, 1, 1.0) == {"fits": True}
    assert tried == [(4, 8), (2, 16), (1, 32)]


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_the_baselines_experts_are_computed_in_bf16(experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's autocast leaves the grouped product out."""
    from bench.train_step_variants import Batches, hugging_face_step

    seen = []
    original = F.grouped_mm

    def spy(rows: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((rows.dtype, weight.dtype))
        return original(rows, weight, **options)

    monkeypatch.setattr(F, "grouped_mm", spy)
    shape = rehearsal(SHAPES["qwen3_30b_a3b"])
    batches = Batches(shape.micro_batch_size, shape.seq_length, shape.config()["mask_token_id"], shape.num_microbatches)
    step = hugging_face_step(shape.config(), batches, torch.device("cpu"), bf16=True, experts=experts)
    seen.clear()  # the probe for causality is not measured
    step.run()
    assert set(seen) == ({(torch.bfloat16, torch.bfloat16)} if experts == "grouped_mm" else set())
    assert F.grouped_mm is spy


@pytest.mark.parametrize("name", SHAPES)
def test_rehearsals_are_small(name: str) -> None:
    from bench.train_step_variants import model_config_of

    assert model_config_of(rehearsal(SHAPES[name]).config()).num_parameters() < 1e6


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (
            gpu,
            ["--out", "OUT", "--parts", "tests", "bogus"],
            "--parts bogus: no part has a name with this prefix; there are engine_vs_local",
        ),
        (gpu, ["--out", "OUT"], "bench.gpu: this machine has no CUDA device; --rehearse"),
        (gpu, ["--out", "OUT", "--budget", "-5"], "--budget -5: must be above 0"),
        (gpu, ["--out", "OUT/nowhere/x.json"], "--out .*: is not a file in an existing directory"),
        (train_step_vs_hf, ["--rehearse", "--variants", "bogus"], "--variants bogus: is not one of .*bf16, portable"),
        (
            train_step_vs_hf,
            ["--variants", "bf16"],
            "bench.train_step_vs_hf: this machine has no CUDA device; use --rehearse",
        ),
        (train_step_vs_hf, ["--rehearse", "--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_nonsense_is_refused(
    module: Any, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = str(tmp_path / "result.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", *(word.replace("OUT", out) for word in arguments)])
    # A rehearsal imports Transformer Engine over the stand-in, for good: not in the process of all other tests.
    monkeypatch.setattr(train_step_vs_hf, "uses_engine", lambda rehearse: False)
    with pytest.raises(UserError, match=words):
        module.main()
    assert not list(tmp_path.iterdir())
