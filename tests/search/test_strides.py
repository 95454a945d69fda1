"""How long an optimizer's first steps are, against torch's own optimizers taking steps by a gradient that stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.search.strides import steps_made, trial_shares
from autotune.stage.schedule import Shape

KINDS = {
    "RMSprop": lambda weights, **options: torch.optim.RMSprop(weights, lr=1.0, eps=0.0, **options),
    "Adagrad": lambda weights, **options: torch.optim.Adagrad(weights, lr=1.0, eps=0.0, **options),
}


def walk(optimizer, steps):
    """The lengths of some steps at a rate of 1, by a gradient of 1."""
    (weight,) = optimizer.param_groups[0]["params"]
    lengths = []
    for _ in range(steps):
        before = weight.item()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        lengths.append(abs(weight.item() - before))
    return lengths


def fresh(name, **options):
    return KINDS[name]([torch.zeros(1, dtype=torch.float64, requires_grad=True)], **options)


def mean(lengths, shape):
    weights = [shape((index + 0.5) / len(lengths)) for index in range(len(lengths))]
    return sum(a * b for a, b in zip(lengths, weights, strict=True)) / sum(weights)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["RMSprop", "Adagrad"]),
    st.integers(1, 40),
    st.integers(40, 600),
    st.floats(0.5, 0.999),
    st.floats(0.0, 0.01),
    st.booleans(),
)
def test_no_step_of_a_trial_is_longer_than_the_runs_are_in_the_mean(name, trial, run, alpha, decay, decays):
    options = {"alpha": alpha} if name == "RMSprop" else {"lr_decay": decay}
    shape = Shape(warmup=0.0, decay_from=0.5) if decays else lambda progress: 1.0
    lengths = walk(fresh(name, **options), run)
    shares = trial_shares(name, options, trial, run, shape=shape)
    level = mean(lengths, shape)
    expected = [min(length, level) for length in lengths[:trial]]
    assert [share * length for share, length in zip(shares, lengths, strict=False)] == pytest.approx(expected)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_buffer_that_fills_makes_the_first_steps_no_longer_than_they_are(momentum):
    lengths = walk(fresh("RMSprop", momentum=momentum), 4000)
    shares = trial_shares("RMSprop", {"alpha": 0.99, "momentum": momentum}, 60, 4000)
    level = sum(lengths) / len(lengths)
    found = [share * length for share, length in zip(shares, lengths, strict=False)]
    assert max(found) <= 1.05 * level
    # Steps that are shorter than the run's, while the buffer is empty, are left as they are.
    assert all(share == 1.0 for share, length in zip(shares, lengths, strict=False) if length < 0.9 * level)


def test_the_mean_of_a_very_long_run_is_taken_at_some_places():
    (share,) = trial_shares("Adagrad", {}, 1, 10**9)
    assert share == pytest.approx(2.0 / 10**4.5, rel=0.02)  # the mean of 1 / sqrt(t)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "Lion", "Sophia"])
def test_others_are_left_alone(name):
    assert trial_shares(name, {"momentum": 0.9, "betas": (0.9, 0.999)}, 10, 1000) == ()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_options_at_their_limits_give_rates_all_the_same(alpha):
    assert all(0.0 < share <= 1.0 for share in trial_shares("RMSprop", {"alpha": alpha, "momentum": 1.0}, 5, 100))


def test_a_mean_that_has_filled_asks_for_nothing_more():
    optimizer = fresh("RMSprop")
    walk(optimizer, 1000)
    assert steps_made(optimizer) == 1000
    assert trial_shares("RMSprop", {}, 20, 1000, made=1000) == pytest.approx([1.0] * 20, abs=1e-4)


def test_a_sum_that_has_grown_asks_for_less():
    optimizer = fresh("Adagrad")
    assert steps_made(optimizer) == 0
    walk(optimizer, 900)
    late = trial_shares("Adagrad", {}, 20, 100, made=steps_made(optimizer))
    assert late == pytest.approx([(920.0 / 950.0) ** 0.5] * 20, rel=0.03)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_steps_that_nobody_counts_are_none(make):
    assert steps_made(make([torch.zeros(1, requires_grad=True)], lr=0.1)) == 0
