import itertools
import math

import pytest
import schedulefree
import torch

from autotune.batch.controller import BatchController, BatchState, Decay
from autotune.batch.plan import Split, micro_limit_from_memory, plan
from autotune.batch.rules import (
    Tolerances,
    augmented_test,
    coordinate_test,
    decay_test,
    inner_product_test,
    noise_scale_test,
    norm_test,
    orthogonality_test,
)
from autotune.batch.scaling import gain, refuse_betas, rule_for, scale_group_betas, scaled_betas
from autotune.errors import ConfigurationError, StateError, UnsupportedSetupError
from autotune.noise.smoothing import NoiseEstimate
from autotune.noise.statistics import ChunkSums
from autotune.optim import AdaGradNorm


def gradients(seed=0, n=20, p=6):
    return torch.randn(n, p, dtype=torch.double, generator=torch.Generator().manual_seed(seed)) + 0.7


def record_of(g):
    mean = g.mean(0)
    coordinate = (g.var(0) / mean.square()).max()
    return ChunkSums.of([1] * len(g), g.square().sum(1), g @ mean).close(mean.square().sum(), coordinate=coordinate)


@pytest.mark.parametrize("seed", range(5))
def test_the_published_tests_from_their_definitions(seed):
    g = gradients(seed)
    n, mean = len(g), g.mean(0)
    square = float(mean.square().sum())
    spread = float((g - mean).square().sum() / (n - 1))
    along = float((g @ mean).var())
    across = float((g - (g @ mean)[:, None] / square * mean).square().sum() / (n - 1))
    worst = float((g.var(0) / mean.square()).max())
    eta, theta, nu = 0.3, 0.4, 0.5
    record = record_of(g)
    cases = [
        (norm_test(record, eta), spread / (eta**2 * square)),
        (inner_product_test(record, theta), along / (theta**2 * square**2)),
        (orthogonality_test(record, nu), across / (nu**2 * square)),
        (coordinate_test(record, eta), worst / eta**2),
    ]
    for verdict, wanted in cases:
        assert verdict.wanted == math.ceil(wanted)
        assert verdict.passes == (wanted <= n)
    both = augmented_test(record, theta, nu)
    assert both.wanted == max(cases[1][0].wanted, cases[2][0].wanted)
    assert both.passes == (cases[1][0].passes and cases[2][0].passes)


@pytest.mark.statistical
def test_the_raw_norm_test_rests_where_its_noise_puts_it():
    """At B* = GNS (1 - eta^2) / eta^2 the test's two sides are equal on average."""
    eta, noise_scale, p = 0.5, 40.0, 400
    batch = round(noise_scale * (1 - eta**2) / eta**2)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.zeros(p, dtype=torch.double)
    gradient[0] = 1.0
    left, right = 0.0, 0.0
    for _ in range(200):
        noise = torch.randn(batch, p, dtype=torch.double, generator=generator)
        record = record_of(gradient + noise * math.sqrt(noise_scale / p))
        left += float(record.variance().sum()) / batch
        right += eta**2 * float(record.mean_sq.sum())
    assert left / right == pytest.approx(1.0, abs=0.02)


def test_nothing_known_passes_and_a_dead_coordinate_asks_for_infinity():
    nan = ChunkSums.of([8], torch.ones(1)).close(torch.tensor(1.0))
    verdict = norm_test(nan, 0.5)
    assert verdict.passes
    assert math.isnan(verdict.wanted)
    dead = ChunkSums.of([1, 1], torch.ones(2)).close(torch.tensor(1.0), coordinate=torch.tensor(math.inf))
    assert coordinate_test(dead, 0.5).wanted == math.inf


def estimate(low, scale=None, high=math.inf):
    return NoiseEstimate(low if scale is None else scale, low, high, 1.0, 1.0, 10.0)


def test_ours_needs_the_lower_end_of_the_interval():
    assert noise_scale_test(estimate(90.0, scale=500.0), 100, 1.0).passes
    assert not noise_scale_test(estimate(110.0, scale=500.0), 100, 1.0).passes
    assert not noise_scale_test(estimate(60.0), 100, 2.0).passes


def step(controller, state, low, updates):
    target = controller.step(state, record_of(gradients()), estimate(low), updates)
    return state if target is None else controller.grown(state, target.batch, updates)


def test_ours_doubles_at_most_rests_and_stops_at_the_ceiling():
    controller = BatchController(multiple=1.0, rest_updates=10)
    state = controller.init(32, 100)
    sizes = []
    for updates in range(10, 50):
        state = step(controller, state, 1e6, updates)
        sizes.append(state.batch)
    assert sizes == [64] * 10 + [100] * 30
    assert state.batch == 100
    assert state.growths == 2


def test_ours_never_shrinks_and_ignores_small_steps():
    controller = BatchController(multiple=1.0, rest_updates=0)
    state = controller.init(100, 1000)
    for low in (5.0, 99.0, 120.0, 0.0, math.nan):
        assert step(controller, state, low, 1) == state
    assert step(controller, state, 130.0, 1).batch == 130


def test_in_a_decay_the_batch_keeps_progress_and_temperature():
    """At the batch asked for, rate times growth is the most AdaScale allows there; without noise, the peak."""
    for low, level in ((0.0, 0.5), (0.0, 0.3), (100.0, 0.9), (1000.0, 0.95), (64.0, 0.7)):
        wanted = decay_test(estimate(low), 32, 1.0, base=32, level=level, most=4.0).wanted
        growth = wanted / 32
        assert growth <= 4.0
        if growth < 4.0:
            assert level * growth == pytest.approx(gain("adascale", growth, low, 32), rel=1e-6)
    assert decay_test(estimate(1e5), 32, 1.0, base=32, level=1.0, most=4.0).passes
    for low, level in itertools.product((0.0, 1e5), (1e-9, 0.0)):
        assert decay_test(estimate(low), 32, 1.0, base=32, level=level, most=2.5).wanted == 80.0


@pytest.mark.parametrize("growth", [2.0, 2.5, 3.0, 7.9])
@pytest.mark.parametrize("limit", [None, 31, 40, 63, 64, 95])
def test_no_plan_makes_more_of_a_decay_than_is_allowed(growth, limit):
    controller = BatchController(rest_updates=0, decay_growth=growth)
    state, now = controller.init(32, 4096), Split(32, 1)
    for level in (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.01):
        target = controller.step(state, record_of(gradients()), estimate(100.0), 1, Decay(32, level))
        if target is not None:
            split = plan(target.batch, now, limit, target.most, 32)
            assert split.examples <= growth * 32
            if split.examples > now.examples:
                state, now = controller.grown(state, split.examples, 1), split
    assert now.examples > 32


def test_where_the_user_wants_no_growth_in_a_decay_there_is_none():
    state, decay = (controller := BatchController(rest_updates=0, decay_growth=1.0)).init(32, 1024), Decay(32, 0.01)
    assert controller.step(state, record_of(gradients()), estimate(1e4), 9, decay) is None
    assert controller.step(state, record_of(gradients()), estimate(1e4), 9) is not None


def test_after_a_growth_that_failed_the_rate_stays_below_its_peak():
    controller = BatchController(multiple=1.0, rest_updates=0)
    state, decay = controller.init(32, 1024), Decay(32, 0.9)
    target = controller.step(state, record_of(gradients()), estimate(1e4), 1, decay)
    assert target is not None
    assert target.batch == 64
    failed = controller.undone(controller.grown(state, 64, 1), 32, 5, decay)
    assert failed.ceiling == 1024
    assert controller.step(failed, record_of(gradients()), estimate(1e4), 9, decay) is None
    later = controller.step(failed, record_of(gradients()), estimate(1e4), 99, Decay(32, 0.5))
    assert later is not None
    assert later.batch == 64
    assert later.most == 64
    assert controller.undone(controller.grown(failed, 64, 99), 32, 101, decay).ceiling == 32
    assert controller.undone(state, 32, 5).ceiling == 32


def test_after_two_growths_that_failed_the_rate_stays_as_scheduled_where_it_may():
    controller = BatchController(rest_updates=0)
    state, decay = controller.init(32, 1024), Decay(32, 0.4)
    for ceiling in (1024, 1024, 32):
        target = controller.step(state, record_of(gradients()), estimate(1e4), 9, decay)
        assert target is not None
        assert controller.leaves_rate(state) == (state.undone == 2)
        assert ("the rate as scheduled" in target.reason(target.batch)) == (state.undone == 2)
        grown = controller.grown(state, target.batch, 9)
        state = controller.undone(grown, 32, 9, decay, may_leave_rate=True)
        assert state.ceiling == ceiling
    assert controller.step(state, record_of(gradients()), estimate(1e4), 9, decay) is None
    for rule, schedule in (("noise_scale", None), ("norm", decay)):
        other = BatchController(rule)
        assert other.undone(other.init(32, 64), 32, 9, schedule, may_leave_rate=True).ceiling == 32


def test_published_rules_jump_and_stop_at_the_ceiling():
    controller = BatchController("norm", Tolerances(eta=0.1))
    target = controller.step(controller.init(20, 64), record_of(gradients()), estimate(0.0), 0)
    assert target is not None
    assert target.batch == 64
    assert "most allowed" in target.reason(target.batch)


def test_an_undone_growth_is_remembered():
    controller = BatchController(rest_updates=0)
    state = controller.grown(controller.init(32, 512), 64, 5)
    state = controller.undone(state, 32, 8)
    assert step(controller, state, 1e6, 100) == state
    assert BatchState.from_state_dict(state.state_dict()) == state
    with pytest.raises(StateError):
        BatchState.from_state_dict({"batch": 3})


@pytest.mark.parametrize(
    "bad",
    [{"rule": "x"}, {"multiple": 0.0}, {"rest_updates": -1}, {"most_growth": 1.0}, {"decay_growth": 0.5}],
)
def test_bad_configuration_is_refused(bad):
    with pytest.raises(ConfigurationError):
        BatchController(**bad)
    with pytest.raises(ConfigurationError):
        Tolerances(eta=0.0)


def test_plans_grow_the_micro_batch_first_and_double_accumulation_after():
    now = Split(16, 3, 2)
    assert plan(192, now) == Split(32, 3, 2)
    assert plan(384, now, micro_limit=32) == Split(32, 6, 2)
    assert plan(380, now, micro_limit=16) == Split(16, 12, 2)
    for target in range(96, 3000, 37):
        for limit in (None, 16, 40):
            split = plan(target, now, limit, max_examples=2048)
            assert split.examples <= 2048
            assert limit is None or split.micro <= limit
            assert split.accumulate % 3 == 0
            assert bin(split.accumulate // 3).count("1") == 1
    with pytest.raises(ConfigurationError):
        Split(0, 1)


def test_planned_micro_batches_are_multiples_of_the_loaders_own():
    """So that an epoch ends on a single example only where it did before."""
    for unit, accumulate in itertools.product((2, 7, 32), (1, 3)):
        for target in range(unit, 40 * unit, 5):
            for limit in (None, 2 * unit + 1):
                split = plan(target, Split(unit, accumulate), limit, max_examples=30 * unit, unit=unit)
                assert split.micro % unit == 0
                assert split.examples <= max(30 * unit, unit * accumulate)
                assert limit is None or split.micro <= limit
    assert plan(40, Split(4, 3), 5, max_examples=40, unit=4) == Split(4, 6)
    assert plan(64, Split(8, 1), 3, unit=8) == Split(2, 32)


def test_memory_limit_is_linear_and_never_below_what_fitted():
    assert micro_limit_from_memory(2_000, 1_000, 10, 11_000, fill=1.0) == 100
    assert micro_limit_from_memory(10_000, 1_000, 10, 10_000) == 10


def test_gains_are_laws():
    for rule in ("linear", "sqrt", "adascale", "adam", "adam_betas", "none"):
        assert gain(rule, 1.0, 50.0, 32) == pytest.approx(1.0)
    for noise in (0.0, 1.0, 100.0, math.inf):
        assert 1.0 <= gain("adascale", 4.0, noise, 32) <= 4.0
    whole = gain("adascale", 8.0, 70.0, 32)
    assert gain("adascale", 2.0, 70.0, 32) * gain("adascale", 4.0, 70.0, 64) == pytest.approx(whole)
    v, m, k, batch = 3.0, 0.2, 4.0, 16
    published = (v / batch + m) / (v / batch / k + m)
    assert gain("adascale", k, v / m, batch) == pytest.approx(published)
    assert gain("adam", 4.0, math.inf, 32) == pytest.approx(gain("adam", 4.0, 1e12, 32)) == 2.0
    assert gain("adam", 4.0, 0.0, 32) == gain("adam_betas", 4.0, 0.0, 32) == pytest.approx(4.0)
    whole = gain("adam", 8.0, 70.0, 32)
    assert gain("adam", 2.0, 70.0, 32) * gain("adam", 4.0, 70.0, 64) == pytest.approx(whole)
    # k steps of eta m / sqrt(m^2 + s^2) are one step of k times the batch.
    small, large = 1 / math.sqrt(m + v / batch), 1 / math.sqrt(m + v / batch / k)
    assert gain("adam", k, v / m, batch) * large == pytest.approx(k * small)
    with pytest.raises(ConfigurationError):
        gain("auto", 2.0, 1.0, 1)


def test_auto_follows_the_optimizers_family():
    weight = [torch.nn.Parameter(torch.ones(2))]
    assert rule_for(torch.optim.SGD(weight, momentum=0.9, lr=0.1)) == "adascale"
    assert rule_for(torch.optim.AdamW(weight)) == "adam"
    assert rule_for(torch.optim.RMSprop(weight)) == "adam"
    assert rule_for(torch.optim.SGD(weight, lr=0.1), in_decay=True) == "linear"
    assert rule_for(torch.optim.Adagrad(weight)) == "none"
    assert rule_for(AdaGradNorm(weight)) == "none"


def test_betas_reach_back_over_as_many_examples():
    (b1, b2), eps = scaled_betas((0.9, 0.999), 1e-8, 4.0)
    assert b1 == pytest.approx(0.9**4)
    assert b2 == pytest.approx(1 - 4 * 0.001, abs=1e-5)
    assert eps == pytest.approx(5e-9)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    scale_group_betas(optimizer, 4.0)
    assert optimizer.param_groups[0]["betas"] == (b1, b2)


def test_scaled_betas_do_not_lengthen_a_step():
    """On a gradient that is always the same Adam's step is its rate, however its averages are made."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.double))
    optimizer = torch.optim.Adam([weight], lr=1.0, eps=1e-12)
    for step in range(300):
        if step == 100:
            scale_group_betas(optimizer, 3.0)
        before, weight.grad = weight.item(), torch.ones_like(weight)
        optimizer.step()
        assert before - weight.item() == pytest.approx(1.0, rel=1e-6)


def test_betas_are_scaled_where_they_are_adams_and_refused_elsewhere():
    weight = [torch.nn.Parameter(torch.ones(2))]
    three = torch.optim.Optimizer(weight, {"betas": (0.9, 0.99, 0.999), "eps": 1e-8})
    free = schedulefree.AdamWScheduleFree(weight)
    for optimizer in (torch.optim.RMSprop(weight), torch.optim.SGD(weight, lr=0.1), three, free):
        for rule in ("sqrt_betas", "adam_betas"):
            with pytest.raises(UnsupportedSetupError, match="two betas"):
                refuse_betas(rule, optimizer)
        refuse_betas("adam", optimizer)
        before = [dict(group) for group in optimizer.param_groups]
        scale_group_betas(optimizer, 4.0)
        assert optimizer.param_groups == before
    refuse_betas("adam_betas", torch.optim.NAdam(weight))
