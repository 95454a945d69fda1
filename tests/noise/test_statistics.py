import math

import pytest
import torch

from autotune.errors import ConfigurationError, StateError
from autotune.noise.smoothing import NoiseSmoother, NoiseState, _student_quantile
from autotune.noise.statistics import ChunkSums, GradientRecord, two_batch_estimate
from tests.noise.twins import chunked_variance, variance


def record_of(rows, sizes):
    means, start = [], 0
    for size in sizes:
        means.append(rows[start : start + size].mean(0))
        start += size
    norms = torch.stack([m.square().sum() for m in means])
    return ChunkSums.of(sizes, norms).close(rows[:start].mean(0).square().sum())


def rows(seed=0, n=24, p=7):
    return torch.randn(n, p, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_closed_forms():
    g = rows()
    assert float(record_of(g, [1] * 24).variance()) == pytest.approx(variance(g), rel=1e-12)
    assert float(record_of(g, [5, 8, 8, 3]).variance()) == pytest.approx(chunked_variance(g, [5, 8, 8, 3]), rel=1e-12)
    record = record_of(g, [6] * 4)
    small = sum(float(g[i : i + 6].mean(0).square().sum()) for i in range(0, 24, 6)) / 4
    published = two_batch_estimate(small, float(g.mean(0).square().sum()), 6, 24)
    assert (float(record.variance()), float(record.signal())) == pytest.approx(published, rel=1e-12)


def test_the_variance_splits_into_along_and_across():
    g = rows(1)
    mean = g.mean(0)
    record = ChunkSums.of([1] * 24, g.square().sum(1), g @ mean).close(mean.square().sum())
    along = (g @ mean)[:, None] * mean / mean.square().sum()
    assert float(record.inner_product_variance()) == pytest.approx(float((g @ mean).var()), rel=1e-10)
    assert float(record.orthogonal_variance()) == pytest.approx(variance(g - along), rel=1e-10)


def test_merging_is_the_record_of_the_joined_chunks_in_any_order():
    g = rows(2)
    parts = [record_of(g[:8], [3, 5]), record_of(g[8:14], [2, 2, 2]), record_of(g[14:], [4, 6])]
    whole = record_of(g, [3, 5, 2, 2, 2, 4, 6])

    def joined(upto):
        return g[:upto].mean(0).square().sum()

    left = parts[0].merge(parts[1], joined(14)).merge(parts[2], joined(24))
    right = parts[0].merge(parts[1].merge(parts[2], g[8:].mean(0).square().sum()), joined(24))
    for merged in (left, right):
        assert merged.pack().nan_to_num().tolist() == pytest.approx(whole.pack().nan_to_num().tolist(), rel=1e-12)


@pytest.mark.parametrize("power", range(-60, 61, 20))
def test_scale_equivariance_over_many_orders_of_magnitude(power):
    g, factor = rows(3), 10.0**power
    record, scaled = record_of(g, [6] * 4), record_of(g * factor, [6] * 4)
    assert float(scaled.variance()) == pytest.approx(float(record.variance()) * factor**2, rel=1e-9)
    smoother = NoiseSmoother()
    one = smoother.estimate(smoother.step(smoother.init(), record))
    two = smoother.estimate(smoother.step(smoother.init(), scaled))
    assert two.noise_scale == pytest.approx(one.noise_scale, rel=1e-9)


def test_packing_is_lossless():
    record = record_of(rows(4), [6] * 4)
    assert (
        GradientRecord.unpack(record.pack()).pack()[3:].nan_to_num().tolist() == record.pack()[3:].nan_to_num().tolist()
    )


def test_one_chunk_knows_nothing_and_is_skipped():
    smoother = NoiseSmoother()
    state = smoother.step(smoother.init(), record_of(rows(5), [24]))
    assert state.skipped == 1
    assert math.isnan(smoother.estimate(state).noise_scale)


def test_smoothing_a_constant_gives_the_constant_from_the_first_record_on():
    smoother = NoiseSmoother(0.95)
    state = smoother.init()
    for _ in range(5):
        state = smoother.step_values(state, 6.0, 2.0)
        assert smoother.estimate(state).noise_scale == pytest.approx(3.0)
    assert (smoother.estimate(state).low, smoother.estimate(state).high) == pytest.approx((3.0, 3.0))


def test_state_survives_and_strangers_are_refused():
    smoother = NoiseSmoother()
    state = smoother.step_values(smoother.step_values(smoother.init(), 3.0, 1.0), 4.0, 1.0)
    assert NoiseState.from_state_dict(state.state_dict()) == state
    with pytest.raises(StateError, match="keys"):
        NoiseState.from_state_dict({"weight": 1.0})


@pytest.mark.parametrize("bad", [{"decay": 1.0}, {"decay": -0.1}, {"level": 0.0}, {"level": 1.0}])
def test_bad_configuration(bad):
    with pytest.raises(ConfigurationError):
        NoiseSmoother(**bad)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 3.0777), (2, 1.8856), (3, 1.6377), (12, 1.3562), (100, 1.2901)])
def test_student_quantile_against_tables(freedom, expected):
    assert _student_quantile(0.9, freedom) == pytest.approx(expected, rel=0.01)


def coverage(chunks, size, noise_scale, steps=40, runs=400, p=50, decay=0.9):
    """Share of runs whose 80 % interval holds the truth, on a quadratic with a known, uneven covariance."""
    generator = torch.Generator().manual_seed(chunks * 1000 + size)
    spread = torch.linspace(0.1, 2, p, dtype=torch.double)
    spread *= math.sqrt(noise_scale) / spread.norm()
    gradient = torch.zeros(p, dtype=torch.double)
    gradient[0] = 1.0
    smoother, hits = NoiseSmoother(decay, level=0.8), 0
    for _ in range(runs):
        state = smoother.init()
        for _ in range(steps):
            noise = torch.randn(chunks, p, dtype=torch.double, generator=generator) * spread
            means = gradient + noise / math.sqrt(size)
            sums = ChunkSums.of([size] * chunks, means.square().sum(1))
            state = smoother.step(state, sums.close(means.mean(0).square().sum()))
        estimate = smoother.estimate(state)
        hits += estimate.low <= noise_scale <= estimate.high
    return hits / runs


@pytest.mark.statistical
@pytest.mark.parametrize(("chunks", "size"), [(4, 8), (8, 8), (64, 1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(chunks, size):
    assert 0.75 <= coverage(chunks, size, noise_scale=100.0, runs=200) <= 0.85


@pytest.mark.statistical
def test_where_the_gradient_drowns_in_noise_the_interval_is_open_above():
    generator = torch.Generator().manual_seed(0)
    smoother = NoiseSmoother()
    state = smoother.init()
    for _ in range(20):
        means = torch.randn(2, 50, dtype=torch.double, generator=generator)
        sums = ChunkSums.of([4, 4], means.square().sum(1))
        state = smoother.step(state, sums.close(means.mean(0).square().sum()))
    estimate = smoother.estimate(state)
    assert estimate.high == math.inf
    assert estimate.low > 0
