"""How long an optimizer's first steps are, against torch's own optimizers taking steps by a gradient that stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.search.strides import idle_steps, steps_made, trial_shares
from autotune.stage.schedule import Shape

KINDS = {
    "RMSprop": lambda weights, **options: torch.optim.RMSprop(weights, lr=1.0, eps=0.0, **options),
    "Adagrad": lambda weights, **options: torch.optim.Adagrad(weights, lr=1.0, eps=0.0, **options),
    "RAdam": lambda weights, **options: torch.optim.RAdam(weights, lr=1.0, eps=0.0, **options),
}


def walk(optimizer, steps, gradient=1.0):
    """The lengths of some steps at a rate of 1, by a gradient that stays."""
    (weight,) = optimizer.param_groups[0]["params"]
    lengths = []
    for _ in range(steps):
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
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


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 60), st.integers(60, 600), st.floats(0.8, 0.9999), st.integers(0, 40))
def test_under_radam_steps_by_the_gradient_itself_are_left_out_and_the_others_as_long_as_the_runs(
    trial, run, beta, made
):
    options = {"betas": (0.9, beta)}
    lengths = walk(fresh("RAdam", **options), made + run, gradient=1e-6)  # so that such a step is no length at all
    found = idle_steps("RAdam", options, made)
    assert [length < 2e-6 for length in lengths[made : made + found + 1]] == [True] * found + [False]
    shares = trial_shares("RAdam", options, trial, run, made=made)
    level = sum(length for length in lengths[made:] if length > 2e-6) / run
    assert shares[:found] == (0.0,) * found
    told = [share * length for share, length in zip(shares, lengths[made:], strict=False)][found:]
    assert told == pytest.approx([level] * (trial - found), rel=1e-6)


def test_radam_that_never_rectifies_is_left_as_it_is():
    assert idle_steps("RAdam", {"betas": (0.9, 0.5)}) == 0
    assert trial_shares("RAdam", {"betas": (0.9, 0.5)}, 5, 100) == (1.0,) * 5


def test_the_mean_of_a_very_long_run_is_taken_at_some_places():
    (share,) = trial_shares("Adagrad", {}, 1, 10**9)
    assert share == pytest.approx(2.0 / 10**4.5, rel=0.02)  # the mean of 1 / sqrt(t)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "Lion", "Sophia"])
def test_others_are_left_alone(name):
    assert trial_shares(name, {"momentum": 0.9, "betas": (0.9, 0.999)}, 10, 1000) == ()
    assert idle_steps(name, {"betas": (0.9, 0.999)}) == 0


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
