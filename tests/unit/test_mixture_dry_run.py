"""data_prep.mixture_dry_run: epochs as training counts them, disk, time by a run's log, and what to do about repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import mixture_dry_run
from data_prep.mixture_dry_run import speed, uses, warning
from megatron_a2d.config.settings import build
from megatron_a2d.data.blended_dataset import MixedDataset, read_mixture
from megatron_a2d.utils.errors import UserError
from tests.unit.token_files import write

LENGTH = 8


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Sources of 800 and 400 tokens, the second with a limit, and one that is not there."""
    write(tmp_path / "web", [[1] * 10] * 80)
    write(tmp_path / "web_valid", [[1] * 10] * 8)
    write(tmp_path / "math", [[1] * 10] * 40)
    path = tmp_path / "mix.yaml"
    path.write_text(
        f"sources:\n  web: {{train_path: {tmp_path}/web, valid_path: {tmp_path}/web_valid, weight: 0.5}}\n"
        f"  math: {{train_path: {tmp_path}/math, weight: 0.25, max_epochs: 2}}\n"
        f"  code: {{train_path: {tmp_path}/code, weight: 0.25, max_epochs: 4}}\n"
    )
    return path


def words(mixture: Path, *more: object) -> list[str]:
    return ["--data-mixture", str(mixture), "--seq-length", str(LENGTH), "--global-batch-size", "4", *map(str, more)]


def test_epochs_are_those_that_training_counts(mixture: Path, tmp_path: Path) -> None:
    config = build({"data_mixture": str(mixture), "seq_length": LENGTH, "global_batch_size": 4, "train_iters": 256})
    web, math, code = uses(config, 4.0)
    present = read_mixture(mixture)
    write(tmp_path / "code", [[1] * 10] * 40)
    trained = MixedDataset(present, LENGTH, seed=config.data.seed, scan=False)
    assert {"web": web.epochs, "math": math.epochs} == {
        name: pytest.approx(epochs) for name, epochs in trained.epochs(1024).items() if name != "code"
    }
    assert (web.read, math.read, code.read) == (512 * 8, 256 * 8, 256 * 8)  # exact: 1,024 samples are a block
    assert (web.there, math.there, code.there) == (800, 400, None)
    sizes = [
        Path(f"{tmp_path / name}{end}").stat().st_size for name in ("web", "web_valid") for end in (".bin", ".idx")
    ]
    assert (web.disk, code.disk) == (sum(sizes), 0) and (web.limit, math.limit) == (4.0, 2.0)


def test_a_warning_says_what_would_do(mixture: Path) -> None:
    def warnings(iterations: int, limit: float = 4.0, **others: bool) -> list[str]:
        sizes = {"seq_length": LENGTH, "global_batch_size": 4, "train_iters": iterations}
        config = build({"data_mixture": str(mixture), **sizes, **others})
        found = uses(config, limit)
        return [warning(use, sum(use.read for use in found), config.num_samples * LENGTH) for use in found]

    web, math, code = warnings(256)
    assert web == (
        "web: 5.12 epochs, more than 4: lower its share of the tokens from 0.5 to 0.391, add 224 tokens, train on at "
        "most 6.4k tokens, or raise --max-epochs"
    )  # 4,096 of 8,192 tokens are web's; 4 x 800 / 8,192; 4,096 / 4 - 800; 8,192 x 4 / 5.12
    assert math.startswith("math: 5.12 epochs, more than 2, and training refuses to start: lower its share")
    assert "add 624 tokens, train on at most 3.2k tokens, or raise its max_epochs" in math
    assert "is not tokenised yet; the run reads 2.05k tokens of it and needs 512 or more for at most 4 epochs" in code
    assert "2.05 kB at 4 bytes per token" in code
    assert warnings(256, 6.0)[0] == "" and warnings(100)[0] == ""
    # Two samples of each text: what is trained on is twice what is read.
    twice = warnings(512, complementary_masks=True)[0]
    assert twice.startswith("web: 5.12 epochs") and "add 224 tokens, train on at most 12.8k tokens" in twice


def test_the_command(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    records = [
        {"kind": "train", "iteration": n, "tokens_per_second": speed} for n, speed in ((1, 5.0), (2, 20.0), (3, 30.0))
    ]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    mixture_dry_run.main(words(mixture, "--train-tokens", 8192, "--tokens-per-second", tmp_path / "run"))
    out, err = capsys.readouterr()
    said = " ".join(out.split())
    assert "8.19k tokens in 1,024 samples and 256 iterations: 0.00474 days at 20 tokens/s (the median of 3" in said
    assert "web │ 0.5 │ 800 │ 4.1k │ 5.12 │ 4 │" in said and "code │ 0.25 │ - │ 2.05k │ - │ 4 │ 0 B" in said
    assert [line.partition(":")[2].split()[0] for line in err.splitlines()] == ["web:", "math:", "code:"]
    mixture_dry_run.main(words(mixture, "--train-samples", 100, "--max-epochs", 9))
    out, err = capsys.readouterr()
    assert "web" not in err and "days" not in out and "100 samples and 25 iterations" in out


def test_bad_input(mixture: Path, tmp_path: Path) -> None:
    def problem(*more: object) -> str:
        with pytest.raises(UserError) as caught:
            mixture_dry_run.main(words(mixture, *more))
        return " ".join(caught.value.problems)

    assert "--tokens-per-second 0: must be positive" in problem("--tokens-per-second", 0)
    assert "is neither a number nor an existing run" in problem("--tokens-per-second", tmp_path / "nowhere")
    (tmp_path / "log.jsonl").write_text('{"kind": "start", "iteration": 0}\n')
    assert "has no training interval yet" in problem("--tokens-per-second", tmp_path)
    assert "--max-epochs 0: must be positive" in problem("--max-epochs", 0)
    assert problem("--global-batch-size", 0) == "--global-batch-size 0: must be at least 1"
    assert problem("--seq-length", 0).startswith("--seq-length 0: a sample needs at least 2 tokens")
    assert "are less than the first global batch of 4" in problem("--train-tokens", LENGTH)
    (tmp_path / "math.bin").unlink()
    assert "math" in problem()
    with pytest.raises(UserError, match="--data-mixture: is missing"):
        mixture_dry_run.main(["--train-iters", "5"])
    assert speed("2e6") == (2e6, "as given")
