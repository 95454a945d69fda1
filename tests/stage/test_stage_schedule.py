"""Base shapes, trial shapes, budgets, search policies: closed forms and laws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.stage.budget import Budget
from autotune.stage.policy import SearchPolicy
from autotune.stage.schedule import Shape, TrialShape


class TestShape:
    @given(st.integers(1, 5000), st.floats(0.0, 0.5))
    def test_rises_then_falls_and_never_rests(self, updates, warmup):
        shape = Shape(warmup=warmup, resolution=1.0 / updates)
        rates = [shape(step / updates) for step in range(updates)]
        assert all(0.0 < rate <= 1.0 for rate in rates)
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] <= max(1.0 / updates / (1.0 - warmup), 1e-6) + 1e-12 or updates < 3

    def test_closed_form(self):
        shape = Shape(warmup=0.1, resolution=0.01)
        for step in range(9):
            assert shape(step / 100) == pytest.approx((step + 1) / 10)
        for step in range(10, 100):
            assert shape(step / 100) == pytest.approx((100 - step) / 90)

    def test_the_peak_is_held_until_the_decay_begins(self):
        shape = Shape(warmup=0.1, resolution=0.01, decay_from=0.5)
        assert [shape(step / 100) for step in (10, 30, 49, 50)] == [1.0] * 4
        for step in range(50, 100):
            assert shape(step / 100) == pytest.approx((100 - step) / 50)
        assert Shape(warmup=0.2, decay_from=0.1)(0.5) == Shape(warmup=0.2)(0.5)

    def test_without_an_end_the_peak_is_held(self):
        shape = Shape(warmup=0.1, decay=False, resolution=0.01)
        assert [shape(progress) for progress in (0.1, 0.9, 1.5, 40.0)] == [1.0] * 4

    def test_an_overrun_keeps_the_last_rate(self):
        shape = Shape(resolution=0.01)
        assert shape(1.7) == pytest.approx(0.01 / 0.98)


class TestTrialShape:
    @given(st.integers(1, 500))
    def test_is_the_run_on_a_smaller_scale(self, steps):
        trial, run = TrialShape(steps), Shape(0.0, True, 1.0 / steps)
        assert [trial(step) for step in range(steps)] == [run(step / steps) for step in range(steps)]

    def test_annealed_to_zero_across_the_whole_trial(self):
        assert [TrialShape(4)(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])

    def test_constant_as_published(self):
        assert [TrialShape(4, constant=True)(step) for step in range(4)] == [1.0] * 4

    def test_each_step_may_have_a_share_of_its_own(self):
        assert [TrialShape(2, shares=(0.1, 0.5))(step) for step in range(2)] == pytest.approx([0.1, 0.25])
        assert [TrialShape(2, constant=True, shares=(0.1, 0.5))(step) for step in range(2)] == [0.1, 0.5]

    def test_steps_that_say_nothing_come_before_the_decay(self):
        shape = TrialShape(6, shares=(0.0, 0.0, 1.0, 1.0, 1.0, 1.0), idle=2)
        assert [shape(step) for step in range(6)] == pytest.approx([0.0, 0.0, 1.0, 0.75, 0.5, 0.25])


class TestBudget:
    @given(st.floats(0.01, 0.99), st.floats(1, 1e6), st.lists(st.floats(0, 1e5), max_size=20))
    def test_spending_what_is_left_never_breaks_the_cap(self, share, planned, wishes):
        budget = Budget(share, planned)
        first = spent = min(wishes[0] if wishes else 0.0, budget.first(planned))
        for number, wish in enumerate(wishes[1:], start=1):
            done = planned * number / len(wishes)
            spent += min(wish, budget.left(spent, done, first))
            assert spent <= share * planned * (1 + 1e-9)
            assert spent <= (2.0 * share * done + first) * (1 + 1e-9)

    def test_an_unknown_end_is_paid_by_what_is_done(self):
        budget = Budget(0.1, math.inf)
        assert budget.first(1000.0) == pytest.approx(100.0)
        assert budget.left(100.0, 0, 100.0) == 0.0
        assert budget.left(100.0, 500, 100.0) == pytest.approx(100.0)


class TestPolicy:
    """Whatever the shares are: what is planned can be paid."""

    @given(st.floats(0.0, 1e5), st.floats(0.0, 20.0), st.booleans(), st.sampled_from([0, 5, 50]))
    def test_first_search_fits_in(self, budget, probe, centred, idle):
        legs = SearchPolicy().first(budget, probe, centred=centred, idle=idle)
        cost = probe + sum(leg.candidates * (leg.steps + probe) for leg in legs)
        assert not legs or cost <= budget * (1 + 1e-9)
        assert all(leg.candidates >= 1 and leg.steps >= 1 for leg in legs)
        assert [leg.steps for leg in legs] == sorted(leg.steps for leg in legs)
        assert all(leg.steps >= idle + 3 for leg in legs)
        assert not legs or legs[0].candidates >= 3
        assert not legs or not legs[0].walk or (centred and len(legs) == 1)

    @given(st.floats(0.0, 1e5), st.integers(0, 10**6), st.floats(0.0, 20.0), st.booleans())
    def test_later_search_fits_in(self, left, done, probe, anyhow):
        leg = SearchPolicy().later_leg(left, done, probe, at_any_length=anyhow)
        assert leg is None or probe + leg.candidates * (leg.steps + probe) <= left * (1 + 1e-9)

    def test_a_large_budget_is_searched_in_two_legs(self):
        legs = SearchPolicy().first(1000.0, 1.0)
        assert len(legs) == 2
        assert legs[1].steps > 2 * legs[0].steps

    def test_probes_of_the_run_share_what_is_left_and_none_has_to_wait(self):
        policy = SearchPolicy(checks=12)
        assert policy.check_steps(36.0, 100.0) == 3.0
        assert policy.check_steps(36.0, 4.0) == 2.0

    def test_a_small_budget_goes_into_trials_around_what_is_usual(self):
        """Where there is one: else most of it pays for six trials of three steps, and the rest for a single one."""
        (leg,) = SearchPolicy().first(36.0, 4 / 3)
        assert (leg.candidates, leg.steps, leg.walk) == (3, 8, True)
        assert (
            len(SearchPolicy().first(1000.0, 60.0)) == 2
        )  # probes may be dear in a long run too: there both legs stay
        coarse, fine = SearchPolicy().first(40.0, 4 / 3, centred=False)
        assert (coarse.candidates, coarse.steps, fine.candidates) == (6, 3, 1)
