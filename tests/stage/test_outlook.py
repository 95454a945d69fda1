"""The stage's end, predicted from the training curve and two probes; and the trace it is fitted to."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.forecast.trace import LossTrace
from autotune.stage.outlook import WANDER, look_ahead
from autotune.stage.probe import Probe


def traced(curve, steps, noise=0.0, seed=0):
    dice, trace = random.Random(seed), LossTrace()
    for step in range(steps):
        trace.add(step, curve(step) + dice.gauss(0.0, noise))
    return trace


def falling(step):
    return 1.0 + 2.0 * math.exp(-step / 40.0)


class TestLookAhead:
    def probes(self, gap=0.3):
        return Probe(falling(0) + gap, (3.2, 3.4)), Probe(falling(60) + gap, (1.6, 1.8))

    def test_a_validation_loss_that_follows(self):
        start, now = self.probes()
        outlook = look_ahead(traced(falling, 60, 0.01), start, now, 60, 100)
        assert outlook.trusted
        assert outlook.value == pytest.approx(falling(100) + 0.3, abs=0.03)
        assert outlook.low <= falling(100) + 0.3 <= outlook.high
        assert outlook.low < outlook.value < outlook.high

    def test_a_validation_loss_that_no_longer_follows_is_predicted_to_stay(self):
        start, now = Probe(2.0, (2.0, 2.1)), Probe(2.1, (2.1, 2.1))
        outlook = look_ahead(traced(falling, 60, 0.01), start, now, 60, 100)
        assert outlook.value == pytest.approx(2.1)

    def test_the_interval_is_as_wide_as_a_validation_loss_wanders(self):
        start, now = self.probes()
        outlook = look_ahead(traced(falling, 60), start, now, 60, 100)
        half = WANDER * (start.loss - now.loss)
        assert outlook.high - outlook.value >= half
        assert outlook.value - outlook.low >= half

    def test_a_loss_that_is_never_negative_is_not_expected_to_be(self):
        start, now = Probe(3.0, (2.9, 3.1)), Probe(0.05, (0.04, 0.06))
        outlook = look_ahead(traced(falling, 60, 0.01), start, now, 60, 100)
        assert outlook.low == 0.0
        assert 0.0 <= outlook.value <= outlook.high
        # A score to be maximised is watched as its negative; its curve has no such bound.
        sunk = [Probe(p.loss - 4.0, tuple(b - 4.0 for b in p.batches)) for p in (start, now)]
        assert look_ahead(traced(lambda step: falling(step) - 4.0, 60, 0.01), *sunk, 60, 100).low < -4.0

    def test_the_watch_lies_between_now_and_the_end(self):
        outlook = look_ahead(traced(falling, 60, 0.01), *self.probes(), 60, 100)
        places = [place for place, _ in outlook.watch]
        assert places == sorted(places)
        assert places[0] > 60
        assert places[-1] == pytest.approx(100)
        assert all(high >= falling(place) - 0.05 for place, high in outlook.watch)

    @pytest.mark.parametrize(
        ("trace", "start", "now"),
        [
            (traced(falling, 60), None, Probe(1.0)),
            (traced(falling, 60), Probe(math.nan), Probe(1.0)),
            (traced(falling, 60), Probe(1.0), Probe(math.inf)),
            (traced(falling, 2), Probe(1.0), Probe(1.0)),
            (LossTrace(), Probe(1.0), Probe(1.0)),
            (traced(lambda step: math.nan, 60), Probe(1.0), Probe(1.0)),
            (traced(lambda step: 1.0, 60, 0.5), Probe(1.0), Probe(1.0)),
        ],
    )
    def test_refuses_with_a_reason(self, trace, start, now):
        outlook = look_ahead(trace, start, now, 60, 100)
        assert not outlook.trusted
        assert outlook.reason
        assert math.isnan(outlook.value)

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_scales_with_the_loss(self, scale):
        start, now = self.probes()
        plain = look_ahead(traced(falling, 60, 0.01), start, now, 60, 100)
        big = [Probe(p.loss * scale, tuple(b * scale for b in p.batches)) for p in (start, now)]
        trace = LossTrace()
        for step, loss in zip(*traced(falling, 60, 0.01).curve(), strict=True):
            trace.add(round(step), loss * scale)
        scaled = look_ahead(trace, *big, 60, 100)
        assert scaled.value == pytest.approx(plain.value * scale, rel=1e-3)


class TestTrace:
    @given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300), st.integers(2, 16))
    def test_keeps_the_mean_in_bounded_memory(self, losses, bins):
        trace = LossTrace(bins=bins)
        for step, loss in enumerate(losses):
            trace.add(step, loss)
        steps, means = trace.curve()
        assert len(trace) == len(steps) <= bins
        assert steps == sorted(steps)
        span = trace.state_dict()["span"]
        counts = [min(span, len(losses) - index * span) for index in range(len(steps))]
        assert sum(counts) == len(losses)
        total = math.fsum(count * mean for count, mean in zip(counts, means, strict=True))
        assert total == pytest.approx(math.fsum(losses), rel=1e-9, abs=1e-6)

    def test_losses_that_are_not_finite_are_left_out(self):
        trace = LossTrace()
        for step, loss in enumerate([1.0, math.nan, math.inf, 3.0]):
            trace.add(step, loss)
        assert trace.curve() == ([0.0, 3.0], [1.0, 3.0])

    def test_recent_mean_and_error(self):
        trace = traced(lambda step: float(step), 100)
        mean, error = trace.recent(10)
        assert mean == pytest.approx(94.5)
        assert error == pytest.approx(math.sqrt(sum((x - 4.5) ** 2 for x in range(10)) / 10 / 9))
        assert math.isnan(LossTrace().recent(10)[0])

    @given(st.lists(st.floats(-10, 10), max_size=60), st.lists(st.floats(-10, 10), max_size=60))
    def test_saved_and_loaded_goes_on_the_same(self, before, after):
        whole, first, second = LossTrace(8), LossTrace(8), LossTrace(8)
        for step, loss in enumerate(before):
            whole.add(step, loss)
            first.add(step, loss)
        second.load_state_dict(first.state_dict())
        for step, loss in enumerate(after, start=len(before)):
            whole.add(step, loss)
            second.add(step, loss)
        assert second.curve() == whole.curve()
