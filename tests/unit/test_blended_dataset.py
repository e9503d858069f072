"""Mixtures: the share of each source, chance without memory, and what is wrong with a mixture file."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.data.blended_dataset import MixedDataset, Source, SourceChoice, read_mixture
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.data.diffusion_samples import attention_segments, make_sample, positions_within
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.rng import Noise, random_cut
from megatron_a2d.utils.errors import UserError

WEIGHTS = [Fraction(w) for w in ("0.35", "0.3", "0.14", "0.1", "0.1", "0.01")]
EOD = 0


def write(prefix: Path, num_tokens: int, first: int) -> str:
    """Tokens first, first + 1, ... in documents of 7, each closed by the end-of-document token."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for start in range(first, first + num_tokens, 7):
        builder.add_document(np.append(np.arange(start, start + 6), EOD), [7])
    builder.finalize(f"{prefix}.idx")
    Path(f"{prefix}.json").write_text(f'{{"eod_token_id": {EOD}}}')
    return str(prefix)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    for number, name in enumerate("abc"):
        write(tmp_path / name, 700 * (number + 1), 10_000 * (number + 1))
    lines = [
        f"  {name}: {{train_path: {tmp_path / name}, weight: {w}}}" for name, w in zip("abc", (5, 3, 2), strict=True)
    ]
    (tmp_path / "mix.yaml").write_text("sources:\n" + "\n".join(lines) + "\n")
    return tmp_path / "mix.yaml"


def test_a_million_samples_have_their_shares_and_no_rhythm():
    choice = SourceChoice(WEIGHTS, seed=1)
    million = 1_000_000
    sources = np.fromiter((choice(i).source for i in range(million)), dtype=np.int8, count=million)
    counts = np.bincount(sources, minlength=6)
    assert choice.counts(million) == counts.tolist()
    for count, weight in zip(counts, WEIGHTS, strict=True):
        assert abs(count / million / float(weight) - 1) < 1e-3
    # Independent draws would miss the smallest share by ten times as much, more often than not.
    for source in range(6):
        signal = (sources == source) - counts[source] / million
        for lag in (1, 2, 3, 8, 64, 512, 1000):
            correlation = float((signal[:-lag] * signal[lag:]).mean() / signal.var())
            assert abs(correlation) < 5 / math.sqrt(million), (source, lag)
    # The spectrum of a regular pattern has lines; noise of a million values stays below ln(10^6) + 10 at every frequency.
    signal = (sources == 0) - counts[0] / million
    power = np.abs(np.fft.rfft(signal)) ** 2 / (million * signal.var())
    assert power.max() < math.log(million) + 10


def test_the_rhythm_test_can_fail():
    regular = np.floor(np.arange(1, 10_001) * 0.35) > np.floor(np.arange(10_000) * 0.35)
    signal = regular - 0.35
    assert abs(float((signal[:-1] * signal[1:]).mean() / signal.var())) > 0.3
    power = np.abs(np.fft.rfft(signal)) ** 2 / (10_000 * signal.var())
    assert power.max() > math.log(10_000) + 10


@pytest.mark.parametrize("share", [0.6180339887, 0.3819660113, 0.2360679775])
def test_sources_do_not_fall_into_step_with_times(share):
    """Times follow the golden ratio. A source with just that share must see all times, not a part of them."""
    noise = Noise(seed=3, mask_token_id=0)
    choice = SourceChoice([Fraction(str(share)), 1 - Fraction(str(share))], seed=3)
    times = np.array([noise.time(i) for i in range(20_000) if choice(i).source == 0])
    assert abs(times.mean() - 0.5) < 0.01 and np.histogram(times, bins=10, range=(0, 1))[0].min() > 0.09 * len(times)


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 2, 3], [7, 1, 1, 90, 1]])
def test_every_sample_of_every_source_comes_once_and_in_no_gap(weights):
    total = sum(weights)
    choice = SourceChoice([Fraction(w, total) for w in weights], seed=0)
    for count in (1024, 4096, 3000):
        places = [choice(i) for i in range(count)]
        for source, number in enumerate(choice.counts(count)):
            mine = sorted(place.number for place in places if place.source == source)
            assert len(mine) == number
            if count % 1024 == 0:
                assert mine == list(range(number))
        if count % 1024 == 0:
            for number, weight in zip(choice.counts(count), weights, strict=True):
                assert abs(number - count * weight / total) < 3
    assert choice(10**15) == SourceChoice([Fraction(w, total) for w in weights], seed=0)(10**15)
    with pytest.raises(IndexError):
        choice(-1)


def test_samples_of_a_mixture(mixture):
    sources = read_mixture(mixture)
    assert [float(source.weight) for source in sources] == [0.5, 0.3, 0.2]
    data = MixedDataset(sources, seq_length=14, seed=5)
    late = {i: data.tokens(i).tolist() for i in reversed(range(2048))}
    again = MixedDataset(sources, seq_length=14, seed=5)
    assert all(again.tokens(i).tolist() == late[i] for i in range(2048))
    seen = [max(late[i]) // 10_000 for i in range(2048)]
    assert [seen.count(n) for n in (1, 2, 3)] == data.choice.counts(2048)
    # Source a, 50 samples: in an epoch of its own each comes once.
    firsts = [tuple(data.datasets[0].tokens(n)) for n in range(50)]
    assert len(set(firsts)) == 50
    assert data.epochs(2048)["a"] == pytest.approx(1024 / 50, rel=0.01)
    assert data.eod_token_id() == EOD
    assert data.fingerprint() == again.fingerprint()
    mixture.write_text(mixture.read_text().replace("weight: 5", "weight: 6"))
    assert MixedDataset(read_mixture(mixture), 14).fingerprint() != data.fingerprint()


def test_equally_long_sources_have_orders_of_their_own(tmp_path):
    for name in "ab":
        write(tmp_path / name, 7000, 10_000)
    (tmp_path / "m.yaml").write_text(
        "sources:\n" + "".join(f"  {n}: {{train_path: {tmp_path / n}, weight: 1}}\n" for n in "ab")
    )
    data = MixedDataset(read_mixture(tmp_path / "m.yaml"), 14)
    one, other = ([tuple(dataset.tokens(i)) for i in range(50)] for dataset in data.datasets)
    assert one != other


def test_ranks_workers_and_restarts_of_a_mixture(mixture):
    config = build({"seq_length": 14, "random_length_prob": 0.3, "reset_position_ids": True, "eod_mask_loss": True})
    data = MixedDataset(read_mixture(mixture), 14, seed=5)
    maker = make_sample(config, model_config(), data, 7, for_training=True)

    def samples(start: int, count: int, dp: int, workers: int) -> dict[int, bytes]:
        found = {}
        for rank in range(dp):
            with MicroBatches(
                data, maker, micro_batch_size=2, global_batch_size=8, dp_rank=rank, dp_size=dp, start_sample=start,
                num_workers=workers,
            ) as batches:  # fmt: skip
                for _ in range(count // dp // 2):
                    batch = next(batches)
                    for row, index in enumerate(batch.sample_index.tolist()):
                        columns = [batch.tokens, batch.labels, batch.weights, batch.positions]
                        if batch.documents is not None and (batch.documents[row] != 0).any():
                            columns.append(batch.documents)
                        found[index] = b"".join(column[row].numpy().tobytes() for column in columns)
        return found

    whole = samples(0, 64, 1, 0)
    assert samples(0, 64, 2, 2) == whole
    assert samples(24, 40, 4, 1) == {index: value for index, value in whole.items() if index >= 24}


def model_config() -> ModelConfig:
    return ModelConfig(2, 64, 4, 2, 24, 160, 50_000, 512, 1e-6, 1e6, False, mask_token_id=49_999)


# ---- what is made of a sample


def test_cut_samples_keep_their_shape_and_lose_no_token(mixture):
    data = MixedDataset(read_mixture(mixture), 14, seed=5)
    config = build({"seq_length": 14, "random_length_prob": 0.5})
    maker = make_sample(config, model_config(), data, 7, for_training=True)
    cuts = 0
    for index in range(400):
        tokens = data.tokens(index)
        sample, cut = maker(tokens, index), random_cut(7, index, 14, 0.5)
        assert sample.tokens.shape == (14,)
        if cut is None:
            assert sample.documents is None and sample.num_maskable == 13
            continue
        cuts += 1
        assert sample.documents.tolist() == [0] * cut + [1] * (14 - cut)
        assert sample.num_maskable == 12 and sample.weights[cut - 1] == 0 and sample.tokens[cut] == tokens[cut]
    assert 150 < cuts < 250
    validation = make_sample(config, model_config(), data, 7)
    assert all(validation(data.tokens(i), i).documents is None for i in range(50))


def test_cuts_are_uniform_and_rare():
    cuts = [random_cut(0, index, 100, 0.01) for index in range(50_000)]
    places = [cut for cut in cuts if cut is not None]
    assert 400 < len(places) < 600 and min(places) >= 1 and max(places) <= 99
    assert abs(np.mean(places) - 50) < 5
    assert random_cut(0, 0, 1, 1.0) is None and all(random_cut(0, i, 2, 1.0) == 1 for i in range(20))


def test_positions_begin_anew_in_each_document(mixture):
    assert positions_within(np.array([4, 4, 4, 5, 7, 7])).tolist() == [0, 1, 2, 0, 0, 1]
    assert positions_within(None) is None
    assert attention_segments(np.array([3, 3, 4, 4]), 3, 4).tolist() == [6, 6, 8, 9]
    data = MixedDataset(read_mixture(mixture), 14)
    config = build({"seq_length": 14, "reset_position_ids": True})
    sample = make_sample(config, model_config(), data, 0)(data.tokens(0), 0)
    assert sample.documents is None and sample.positions.tolist() == [*range(7), *range(7)]
    isolated = build({"seq_length": 14, "reset_attention_mask": True})
    sample = make_sample(isolated, model_config(), data, 0)(data.tokens(0), 0)
    assert sample.positions is None and len(set(sample.documents.tolist())) == 2


@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_ends_of_documents_are_masked_or_not(objective, mixture):
    data = MixedDataset(read_mixture(mixture), 14)
    for maskable in (True, False):
        config = build({"seq_length": 14, "eod_mask_loss": not maskable, "objective": objective})
        maker = make_sample(config, model_config(), data, 0)
        samples = [maker(data.tokens(i), i) for i in range(200)]
        carrying = sum(int(((s.labels == EOD) & (s.weights > 0)).sum()) for s in samples)
        assert (carrying > 50) == maskable
        assert {s.num_maskable for s in samples} == ({13} if maskable else {11})
    unknown = PackedDataset(data.datasets[0].file.prefix, 14)
    unknown.file.metadata.clear()
    with pytest.raises(UserError, match="--eod-mask-loss"):
        make_sample(build({"eod_mask_loss": True}), model_config(), unknown, 0)


def test_visible_tokens_are_not_in_the_denominator():
    noise = Noise(seed=0, mask_token_id=99, label_shift=False)
    tokens = np.array([1, 5, 2, 5, 3])
    assert corrupt(tokens, 0, noise).num_maskable == 5
    assert corrupt(tokens, 0, noise, visible_token_id=5).num_maskable == 3


# ---- what is wrong with a mixture


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no settings"),
        ("sources: []", "must have the single key `sources:`"),
        ("sources: {a: {train_path: x, weight: 1}}\nmore: 1", "must have the single key `sources:`"),
        ("sources: {a: 1}", "holds no settings"),
        ("sources: {a: {train_path: x, weight: 0}}", "weight 0: must be a positive number"),
        ("sources: {a: {train_path: x, weight: -1}}", "weight -1"),
        ("sources: {a: {train_path: x, weight: .nan}}", "nan is not a finite number"),
        ("sources: {a: {train_path: x, weight: .inf}}", "inf is not a finite number"),
        ("sources: {a: {train_path: x, weight: yes}}", "weight True"),
        ("sources: {a: {train_path: x}}", "weight None"),
        ("sources: {a: {weight: 1}}", "train_path None"),
        ("sources: {a: {train_path: x, valid_path: 3, weight: 1}}", "valid_path 3: must be the prefix"),
        ('sources: {a: {train_path: x, valid_path: "y\\0", weight: 1}}', "valid_path y"),
        ("sources: {a: {train_path: x, weight: 1, hub: web}}", "hub web: must be settings of data_prep.download"),
        ("sources: {a: {train_path: x, weight: 1, max_epochs: yes}}", "max_epochs True"),
        ("sources: {a: {train_path: x, weight: 1, max_epochs: 0}}", "max_epochs 0"),
        ("sources: {a: {train_path: x, wieght: 1}}", "unknown key wieght (did you mean weight?)"),
        ("sources: {a: [", "not valid YAML"),
        ("sources: {a: {train_path: x, weight: 1}, a: {train_path: y, weight: 1}}", "'a' comes twice"),
        ("sources: {a: {train_path: x, weight: 1e400}}", "weight inf"),
        ('sources: {a: {train_path: "x\\0", weight: 1}}', "train_path x"),
    ],
)
def test_bad_mixtures(text, words, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_mixture(tmp_path / "m.yaml")
    lines = caught.value.problems
    assert any(words in line for line in lines) and all("\n" not in line and "m.yaml" in line for line in lines)


def test_numbers_without_a_point(tmp_path):
    """YAML 1.1 takes 1e-3 for text; a weight is read as it is meant."""
    (tmp_path / "m.yaml").write_text(
        "sources: {a: {train_path: x, weight: 1e-3, max_epochs: 2e0}, b: {train_path: y, weight: 3.0e-3}}"
    )
    sources = read_mixture(tmp_path / "m.yaml")
    assert [source.weight for source in sources] == [Fraction(1, 4), Fraction(3, 4)] and sources[0].max_epochs == 2


def test_all_that_a_source_may_say(tmp_path):
    (tmp_path / "m.yaml").write_text(
        "sources: {a: {train_path: x, valid_path: v, weight: 0.1, max_epochs: 1.5, hub: {repo: r}}, b: {train_path: y, weight: 0.3}}"
    )
    assert read_mixture(tmp_path / "m.yaml") == [
        Source("a", "x", "v", Fraction(1, 4), 1.5, {"repo": "r"}), Source("b", "y", None, Fraction(3, 4), None, {}),
    ]  # fmt: skip


def test_epochs_of_a_mixture(mixture):
    """50, 100 and 150 samples of 14 tokens; the first 1,024 are dealt by the weights 5, 3, 2."""
    data = MixedDataset(read_mixture(mixture), 14)
    assert data.choice.counts(1024) == [512, 307, 205]
    assert data.epochs(1024) == {"a": 512 / 50, "b": 307 / 100, "c": 205 / 150}
    assert data.choice.counts(0) == [0, 0, 0] and [data.place(i) for i in (3, 2000)] == [
        data.choice(i) for i in (3, 2000)
    ]
    places = [data.place(i) for i in range(1500)]
    assert data.choice.counts(1500) == [sum(place.source == source for place in places) for source in range(3)]
    for i in (0, 1, 2, 1030):
        source, number = data.place(i)
        assert data.documents(i).tolist() == data.datasets[source].documents(number).tolist()


def test_every_missing_source_is_named(mixture):
    mixture.write_text(mixture.read_text().replace(f"{mixture.parent}/", f"{mixture.parent}/not_"))
    with pytest.raises(UserError) as caught:
        MixedDataset(read_mixture(mixture), 14)
    assert [line.partition(":")[0][-5:] for line in caught.value.problems] == ["not_a", "not_b", "not_c"]


def test_missing_mixture(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_mixture(tmp_path / "none.yaml")


def test_a_cap_on_epochs(mixture):
    mixture.write_text(mixture.read_text().replace("weight: 5", "weight: 5, max_epochs: 2"))
    data = MixedDataset(read_mixture(mixture), 14)  # a has 50 samples, and half of all
    data.check_epochs(180)
    with pytest.raises(UserError, match=r"a would be repeated 2\.\d\d times in 210 samples, above its max_epochs 2"):
        data.check_epochs(210)
