"""What a search loses against the best learning rate, over the bank of synthetic responses.

Regret is the share of the possible progress that is lost; 0.02 is what benchmark noise cannot tell from nothing.
"""

import statistics
from functools import cache

import pytest
from response_bank import BANK, DRIFTS, run

from autotune.search import GridSearch, LRSearch, PublishedSearch


@cache
def both_regrets(kind, candidates, response):
    """At the trials' horizon, 100 steps, and at forty times it."""
    search = kind(candidates=candidates)
    answer = search.recommend(run(search, response, 0))
    return response.regret(answer.log_lr_trial_optimum, 100), response.regret(answer.log_lr, 4000)


def regrets(kind, responses, horizon_asked):
    return [both_regrets(kind, 7, response)[horizon_asked != 100] for response in responses]


FEW = BANK[::4]


def test_seven_trials_find_the_optimum_of_their_horizon():
    found = regrets(LRSearch, FEW, 100)
    assert statistics.mean(found) < 0.03
    assert max(found) < 0.12


def test_a_fixed_grid_of_the_same_cost_does_worse():
    ours, grid = (statistics.mean(regrets(kind, FEW, 100)) for kind in (LRSearch, GridSearch))
    assert ours < 0.5 * grid


def test_the_drift_that_is_expected_is_free():
    """Where the optimum falls as h^-0.1 the recommendation for 40 times the horizon is as good as at the horizon."""
    usual = [r for r in BANK if r.drift == 0.1]
    assert statistics.mean(regrets(LRSearch, usual, 4000)) < 0.05


@pytest.mark.slow
def test_the_whole_bank(capsys):
    rows = {}
    for kind in (LRSearch, GridSearch, PublishedSearch):
        rows[kind.__name__] = [statistics.mean(regrets(kind, BANK, h)) for h in (100, 4000)]
    with capsys.disabled():
        for name, (trial, target) in rows.items():
            print(f"\n{name:28} regret at the trials' horizon {trial:.3f}, at 40 times it {target:.3f}", end="")
    assert rows["LRSearch"][0] < 0.025
    assert rows["LRSearch"][0] < min(rows["GridSearch"][0], rows["PublishedSearch"][0])
    assert rows["LRSearch"][1] < min(rows["GridSearch"][1], rows["PublishedSearch"][1])


@pytest.mark.slow
def test_a_local_search_at_a_longer_horizon_learns_the_drift():
    """Three more trials at four times the horizon, with the first search as history, halve the regret."""
    before, after = [], []
    search, local = LRSearch(), LRSearch(candidates=3)
    for response in [r for r in BANK if r.drift in (DRIFTS[0], DRIFTS[-1])]:
        first = run(search, response, 0)
        answer = search.recommend(first)
        before.append(response.regret(answer.log_lr, 4000))
        second = run(local, response, 0, horizon=400, current=answer.log_lr, history=first.earlier)
        after.append(response.regret(local.recommend(second).log_lr, 4000))
    assert statistics.mean(after) < 0.6 * statistics.mean(before)
