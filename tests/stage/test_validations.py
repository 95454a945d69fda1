"""What a run's own validations say: when they are gone by, which weights are best, and when the run has lost them."""

import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.stage.validations import Validations, ValidationState, scatter

RULE = Validations()


def seen(losses, every=0.02):
    state = ValidationState()
    for number, loss in enumerate(losses, start=1):
        state = RULE.seen(state, loss, 10 * number, every * number)
    return state


class TestOften:
    def test_the_first_one_says_whether_they_come_often(self):
        assert RULE.serve(seen([1.0], every=0.125))
        assert not RULE.serve(seen([1.0], every=0.126))
        assert not RULE.serve(seen([1.0, 0.9, 0.8], every=0.126))
        assert not RULE.serve(ValidationState())

    def test_a_run_that_is_made_longer_may_turn_out_to_be_validated_often(self):
        seldom = seen([1.0, 0.2], every=0.3)
        longer = RULE.moved(seldom, 0.1)
        assert RULE.serve(longer)
        assert longer.last == pytest.approx(0.06)
        # Nobody kept the weights of those that did not serve.
        assert RULE.seen(longer, 0.5, 30, 0.09).best == 0.5

    def test_they_count_until_the_next_one_is_overdue(self):
        state = seen([1.0, 0.9], every=0.1)
        assert RULE.current(state, 0.2)
        assert RULE.current(state, 0.325)
        assert not RULE.current(state, 0.33)
        assert not RULE.current(ValidationState(), 0.0)
        assert not RULE.current(seen([1.0], every=0.2), 0.2)

    def test_neighbours_that_are_alike_do_not_count(self):
        state = seen([1.0], every=0.02)
        assert RULE.counts(ValidationState(), 0.0)
        assert not RULE.counts(state, 0.02 + 0.9 * RULE.apart)
        assert RULE.counts(state, 0.02 + RULE.apart)


class TestBest:
    @given(st.lists(st.one_of(st.floats(), st.integers(-3, 3).map(float)), min_size=1, max_size=30))
    def test_it_is_the_first_of_the_lowest(self, losses):
        state = seen(losses)
        known = [loss for loss in losses if loss < math.inf]
        assert state.best == min(known, default=math.inf)
        if known:
            assert state.best_step == 10 * (losses.index(min(known)) + 1)

    def test_going_back_forgets_the_way_but_not_the_best(self):
        state = RULE.went_back(seen([1.0, 0.5, 0.8]))
        assert (state.best, state.best_step, state.recent) == (0.5, 20, (0.5,))
        assert not RULE.lost(state, 0.0)


class TestLost:
    def test_only_when_the_rate_has_come_down(self):
        state = seen([1.0, *[0.5] * 10, 0.55, 0.6, 0.65, 0.7, 0.75])
        assert RULE.lost(state, 0.5)
        assert RULE.lost(state, 0.0)
        assert not RULE.lost(state, 0.51)

    def test_not_while_the_rate_is_higher_than_it_was_at_the_best(self):
        """As on the way up from a trough of a schedule that goes up and down: it will come down again."""
        state = seen([1.0, *[0.8] * 8])
        state = RULE.seen(state, 0.5, 100, 0.2, 0.1)
        for number, loss in enumerate((0.7, 0.72, 0.74, 0.76, 0.75, 0.76), start=11):
            state = RULE.seen(state, loss, 10 * number, 0.02 * number, 0.3)
        assert not RULE.lost(state, 0.3)
        assert RULE.lost(state, 0.1)

    def test_not_again_where_going_back_did_not_help(self):
        state = replace(seen([0.5 + 0.02 * number for number in range(16)]), resigned=True)
        assert not RULE.lost(state, 0.3)
        assert RULE.lost(state, 0.0), "but at the end"
        assert not RULE.seen(state, 0.4, 170, 0.34).resigned

    def test_not_by_less_than_its_noise(self):
        assert not RULE.lost(seen([0.5, 0.7] * 8), 0.3)
        assert RULE.lost(seen([0.5 + 0.02 * number for number in range(16)]), 0.3)

    def test_not_by_next_to_nothing(self):
        levels = [1.0, *[0.5] * 12]
        assert not RULE.lost(seen([*levels, *[0.5 * (1.0 + 0.9 * RULE.least)] * 12]), 0.3)
        assert RULE.lost(seen([*levels, *[0.5 * (1.0 + 1.1 * RULE.least)] * 12]), 0.3)

    def test_not_by_one_step_up_from_a_level(self):
        """A step that stands alone is noise as far as anybody can tell; the second at that height is not."""
        assert not RULE.lost(seen([0.5, 0.6]), 0.3)
        levels = [*[0.5] * 12, 0.6]
        found = [RULE.lost(seen([*levels, *[0.6] * more]), 0.3) for more in range(8)]
        assert found == sorted(found)
        assert found[-1]

    def test_what_is_no_number_is_worse_than_any(self):
        assert RULE.lost(seen([1.0, math.nan]), 0.3)
        assert RULE.lost(seen([1.0, math.inf]), 0.3)
        assert not RULE.lost(seen([math.nan] * 3), 0.3), "there is nothing to go back to"

    def test_seldom_they_say_nothing(self):
        assert not RULE.lost(seen([0.5, *[5.0] * 12], every=0.3), 0.0)
        assert not RULE.lost(ValidationState(), 0.0)

    def test_after_going_back_the_next_one_does_not_count_alone(self):
        state = RULE.went_back(seen([0.5, *[5.0] * 12]))
        assert not RULE.lost(state, 0.3)
        after = RULE.seen(state, 0.51, 140, 0.28)
        assert not RULE.lost(after, 0.3)
        assert RULE.lost(RULE.seen(RULE.seen(after, 0.515, 150, 0.3), 0.52, 160, 0.32), 0.3)

    def test_the_noise_of_ten_about_a_level_is_mostly_told_from_a_loss(self):
        """The rate is down in the last quarter, and nothing is learned any more: the best of many is low by chance."""
        rng = random.Random(0)
        wrong = 0
        for _ in range(200):
            state, lost = ValidationState(), False
            for number in range(1, 11):
                state = RULE.seen(state, 0.5 + rng.gauss(0.0, 0.1), number, number / 10)
                lost = lost or (number / 10 >= 0.75 and RULE.lost(state, 0.4))
            wrong += lost
        assert wrong / 200 < 0.5


class TestLooks:
    def test_few_are_spread_over_the_end_and_many_come_as_close_as_validations_may(self):
        for count in range(RULE.fewest, 200):
            state = RULE.planned(ValidationState(), count)
            assert state.look_every >= RULE.apart
            assert state.look_due >= RULE.often
            made = (1.0 - state.look_due) / state.look_every
            assert made <= count + 1e-9
            assert state.look_due <= 1.0 - RULE.span + 1e-9

    @pytest.mark.parametrize("count", [-5, 0, RULE.fewest - 1])
    def test_too_few_are_none(self, count):
        assert not RULE.is_due(RULE.planned(ValidationState(), count), 1.0)

    def test_they_wait_while_validations_serve_that_cost_nothing(self):
        validated = RULE.planned(seen([1.0, 0.9], every=0.1), 100)
        assert not RULE.is_due(validated, 0.3)
        assert RULE.is_due(validated, 0.4), "the next one is overdue"
        assert RULE.is_due(RULE.planned(seen([1.0], every=0.2), 100), 0.2), "they come seldom"

    def test_they_begin_with_the_best_probe_and_forget_what_validations_said(self):
        state = RULE.begun(replace(seen([0.1, 0.2, 0.3]), resigned=True), 0.5, 7)
        assert (state.best, state.best_step, state.recent, state.resigned) == (0.5, 7, (), False)
        assert RULE.serve(state)
        assert RULE.counts(state, 0.06)

    def test_once_begun_they_go_on(self):
        state = RULE.looked(RULE.begun(RULE.planned(ValidationState(), 20), 0.5, 7), 0.5)
        state = RULE.seen(state, 0.4, 50, 0.5)
        assert not RULE.is_due(state, 0.5)
        assert not RULE.is_due(state, 0.52)
        assert RULE.is_due(state, 0.525)
        late = RULE.looked(state, 0.55)
        assert late.look_due == pytest.approx(0.575), "one that was overdue moves those after it"

    def test_on_another_clock_they_come_no_closer_than_they_count(self):
        state = RULE.looked(RULE.begun(RULE.planned(ValidationState(), 20), 0.5, 7), 0.5)
        longer = RULE.moved(RULE.seen(state, 0.4, 50, 0.5), 0.5)
        assert longer.look_due == pytest.approx(0.2625)
        assert longer.look_every == RULE.apart
        assert not RULE.is_due(longer, 0.2625)
        assert RULE.is_due(longer, 0.275)
        assert longer.looking
        assert RULE.moved(state, 2.0).look_every == 2.0 * state.look_every
        assert not RULE.is_due(RULE.moved(state, 1.0, known=False), 10.0)

    def test_often_counts_from_where_the_run_came_under_control(self):
        late = RULE.seen(replace(ValidationState(), start=0.5), 1.0, 60, 0.6)
        assert RULE.serve(late)
        assert not RULE.serve(RULE.seen(ValidationState(), 1.0, 60, 0.6))
        assert RULE.planned(late, 100).look_due == 0.625


@given(st.lists(st.floats(allow_nan=True), max_size=12))
def test_the_state_survives_a_checkpoint(losses):
    state = seen(losses, every=0.2 if len(losses) % 2 else 0.02)
    again = ValidationState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert repr(again) == repr(state)
    assert scatter(again.recent) == scatter(state.recent) or math.isnan(scatter(state.recent))


def test_scatter_is_the_noise_of_one():
    rng = random.Random(1)
    found = [scatter(tuple(rng.gauss(3.0, 0.2) for _ in range(6))) for _ in range(2000)]
    assert sum(value**2 for value in found) / len(found) == pytest.approx(0.04, rel=0.1)
