"""Trials that are stopped and, more important, trials that are not."""

import math

import numpy as np
import pytest

from autotune.errors import ConfigurationError
from autotune.search import TrialStopper
from autotune.search.stopping import _forecast

TOTAL = 100
START = 5.0


def curve(end, seed=0, noise=0.1, own_noise=0.01, rate=30.0, total=TOTAL):
    """An annealed trial: exponential descent, batch noise shared by equal seeds, a little noise of its own."""
    t = np.arange(total)
    shared = np.random.default_rng(seed).normal(size=total)
    own = np.random.default_rng(int(1000 * end) + 7).normal(size=total)
    return end + (START - end) * np.exp(-t / rate) + noise * shared + own_noise * own


def verdicts(own, best, stopper=None, start=START):
    stopper = stopper or TrialStopper()
    return [stopper.judge(own[:n], best, len(best), start) for n in range(1, len(own))]


def first_stop(own, best, **more):
    return next((n for n, v in enumerate(verdicts(own, best, **more), start=1) if v.stop), None)


def test_a_hopeless_trial_ends_at_the_first_checkpoint():
    assert first_stop(curve(4.0), curve(2.0)) == 40
    assert TrialStopper().judge(curve(4.0)[:40], curve(2.0), TOTAL, START).status == "stopped"


@pytest.mark.parametrize("end", [1.5, 2.0, 2.1, 2.2])
def test_a_trial_that_may_win_goes_on(end):
    assert first_stop(curve(end), curve(2.0)) is None


def test_a_slower_trial_that_arrives_later_goes_on():
    """Behind by more than the margin early would stop it; it is behind by less."""
    assert first_stop(curve(1.8, rate=36.0), curve(2.0)) is None


def test_pairing_is_what_finds_a_small_difference():
    """Half a unit behind under batch noise of half a unit: 3 standard errors only if the batches are the same."""
    stopper = TrialStopper(checkpoints=(0.4,), margin=0.05)
    best = curve(2.0, noise=0.5)
    behind = curve(2.5, noise=0.5)[:40]
    unpaired = curve(2.5, seed=5, noise=0.5)[:40]
    assert stopper.judge(behind, best, TOTAL, START).stop
    assert not stopper.judge(unpaired, best, TOTAL, START).stop


@pytest.mark.statistical
def test_equal_trials_are_hardly_ever_stopped():
    """200 trials that are as good as the best, on batches of their own: three looks at 3 standard errors each."""
    stopper = TrialStopper()
    wrong = sum(
        any(
            stopper.judge(curve(2.0, seed=1000 + k, noise=0.3)[:n], curve(2.0, seed=k, noise=0.3), TOTAL, START).stop
            for n in stopper.steps(TOTAL)
        )
        for k in range(200)
    )
    assert wrong <= 2


@pytest.mark.statistical
def test_correlated_differences_stop_nobody_by_chance():
    """Without a margin, slow swings of the difference must not count as many independent observations."""

    def swinging(seed):
        rng = np.random.default_rng(seed)
        swing = np.zeros(TOTAL)
        for i in range(1, TOTAL):
            swing[i] = 0.8 * swing[i - 1] + 0.1 * rng.normal()
        return curve(2.0) + swing

    stopper = TrialStopper(checkpoints=(0.4,), margin=0.0)
    wrong = sum(stopper.judge(swinging(seed)[:40], curve(2.0), TOTAL, START).stop for seed in range(400))
    assert wrong / 400 < 0.1  # 0.35 if the differences were taken for independent


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_units_of_the_loss_do_not_matter(scale, shift):
    for end in (4.0, 2.3, 1.5):
        reference = [v.stop for v in verdicts(curve(end), curve(2.0))]
        own, best, start = (scale * (v + shift) for v in (curve(end), curve(2.0), START))
        assert [v.stop for v in verdicts(own, best, start=start)] == reference


def test_between_checkpoints_nothing_new_is_said():
    stopper = TrialStopper()
    assert stopper.steps(TOTAL) == (40, 60, 80)
    all_verdicts = verdicts(curve(2.6), curve(2.0))
    for a, b in ((40, 59), (60, 79), (80, 98)):
        assert len({v.reason for v in all_verdicts[a - 1 : b]}) == 1


def test_asking_at_every_step_costs_one_fit_a_checkpoint():
    _forecast.cache_clear()
    assert first_stop(curve(2.1), curve(2.0)) is None
    assert _forecast.cache_info().misses == 4  # two curves at 60 % and at 80 %


def test_the_forecast_stops_what_the_paired_rule_cannot_see():
    """A trial on other batches, behind by less than 3 noisy standard errors but certain to end behind."""
    stopper = TrialStopper(standard_errors=1e9)
    verdict = stopper.judge(curve(3.5)[:60], curve(2.0), TOTAL, START)
    assert verdict.stop
    assert "forecast" in verdict.reason
    assert not stopper.judge(curve(3.5)[:40], curve(2.0), TOTAL, START).stop


def test_the_drop_that_annealing_brings_is_granted():
    """Both trials drop by one unit in the last fifth, as the learning rate falls; the later one is the better one."""
    t = np.arange(TOTAL)
    drop = np.where(t < 80, 0.0, (t - 80) / 20.0)
    best, own = curve(2.5) - drop, curve(2.6) - 2.0 * drop
    assert best[-10:].mean() > own[-10:].mean()
    assert first_stop(own, best) is None


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_a_trial_at_once(poison):
    own = curve(2.0)
    own[4] = poison
    for best in (None, curve(2.0)):
        verdict = TrialStopper().judge(own[:5], best, TOTAL, START)
        assert (verdict.stop, verdict.status) == (True, "diverged")


def test_an_explosion_ends_a_trial_at_once():
    t = np.arange(TOTAL)
    own = START + np.exp(t / 4.0)
    # 5 + 3 x (5 - 2) = 14 is passed by the median of five losses within a dozen steps.
    stopped = first_stop(own, curve(2.0))
    assert stopped is not None
    assert stopped < 14
    assert TrialStopper().judge(own[:stopped], curve(2.0), TOTAL, START).status == "diverged"
    assert TrialStopper().judge(own[:40], None, TOTAL, START).status == "diverged"


def test_a_warm_up_bump_a_bad_batch_and_noise_are_no_explosion():
    bump = curve(2.0)
    bump[:15] += 6.0 * np.exp(-0.5 * ((np.arange(15) - 5) / 2.0) ** 2)  # up to 2.2 times the start
    spikes = curve(2.0)
    spikes[[3, 20, 21, 50]] = 1e6
    for own in (bump, spikes[:39]):
        assert not any(v.status == "diverged" for v in verdicts(own, curve(2.0)))
    for seed in range(50):  # a loss that stands still under heavy noise, with nothing yet to compare it with
        still = START + 1.5 * np.random.default_rng(seed).normal(size=TOTAL)
        assert not any(TrialStopper().judge(still[:n], None, TOTAL, START).stop for n in range(1, TOTAL))


def test_without_anything_to_compare_with_only_divergence_counts():
    own = np.full(TOTAL, START)
    assert not TrialStopper().judge(own, None, TOTAL, START).stop
    assert not TrialStopper().judge(own, curve(2.0)[:50], TOTAL, START).stop
    assert not TrialStopper().judge(own, np.full(TOTAL, 6.0), TOTAL, START).stop
    assert not TrialStopper().judge(own, curve(2.0), TOTAL, math.nan).stop
    broken = curve(2.0)
    broken[3] = math.nan
    assert not TrialStopper().judge(own, broken, TOTAL, START).stop


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 12])
def test_short_trials_never_raise(total):
    for own in ([], [1.0], [1e300] * total, list(curve(4.0, total=max(total, 1)))):
        for best in (None, [], list(curve(2.0, total=max(total, 1))), [1e300] * total, [-1e308, 1e308] * total):
            verdict = TrialStopper().judge(own, best, total, START)
            assert verdict.reason


def test_settings_are_validated():
    for bad in ((0.6, 0.4), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ConfigurationError, match="checkpoints"):
            TrialStopper(checkpoints=bad)
    with pytest.raises(ConfigurationError, match="margin"):
        TrialStopper(margin=-1.0)
