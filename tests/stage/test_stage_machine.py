"""The stage machine: its clock, its verdicts, and that its state survives a checkpoint."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.stage.machine import StageMachine, StageState
from autotune.stage.probe import Probe, compare


def probe(loss, spread=0.0):
    return Probe(loss, (loss - spread, loss + spread))


def started(machine, loss=1.0, train=2.0, lr=0.1):
    state = machine.searched(StageState(), lr)
    return replace(machine.begun(state, 0.0, 0, probe(loss), train), first_train=train)


def clock(machine, ticks=2000):
    """Starts of all stages of a run in which every stage ends by the clock and nothing else happens."""
    state, starts = started(machine), [0.0]
    for tick in range(ticks):
        progress = tick / ticks
        due = machine.due(state, progress)
        if due == "forecast":
            state = machine.predicted(state, None)
        elif due == "end":
            starts.append(progress)
            state = machine.begun(state, progress, tick, probe(1.0 - progress), 2.0 - progress)
    return starts, state


class TestClock:
    def test_a_search_is_due_first(self):
        assert StageMachine().due(StageState(), 0.0) == "search"

    def test_stages_double(self):
        starts, state = clock(StageMachine(first=0.04))
        lengths = [b - a for a, b in pairwise(starts)]
        for index, length in enumerate(lengths):
            assert length == pytest.approx(0.04 * 2**index, abs=1e-3)
        assert state.end == 1.0

    @given(st.floats(0.005, 0.5), st.floats(1.0, 3.0))
    def test_the_last_stage_ends_with_the_run(self, first, growth):
        starts, state = clock(StageMachine(first=first, growth=growth), ticks=300)
        assert state.end == 1.0
        assert starts == sorted(set(starts))
        # No stage is left that would be shorter than half of its clock.
        # A stage begins up to one tick late.
        assert 1.0 - starts[-1] >= 0.5 * first - 1.0 / 300 - 1e-9

    def test_without_an_end_stages_stop_growing(self):
        machine = StageMachine(known_end=False, longest=0.1)
        assert [machine.length(index) for index in range(6)] == pytest.approx([0.04, 0.08, 0.1, 0.1, 0.1, 0.1])
        state = started(machine)
        assert machine.due(replace(state, index=9, end=5.0, forecast_due=math.inf), 5.0) == "end"

    def test_forecast_is_due_once_within_a_stage(self):
        machine = StageMachine()
        state = started(machine)
        assert machine.due(state, 0.59 * 0.04) is None
        assert machine.due(state, 0.61 * 0.04) == "forecast"
        assert machine.due(machine.predicted(state, (1.0, 0.9, 1.1)), 0.61 * 0.04) is None

    def test_a_request_is_heard_once_training_has_begun(self):
        machine = StageMachine()
        assert machine.asked(StageState(), "grown").request == ""
        asked = machine.asked(started(machine), "grown")
        assert machine.due(asked, 0.001) == "search"
        assert machine.due(machine.searched(asked, 0.2), 0.001) is None

    def test_a_cut_stage_ends_now(self):
        machine = StageMachine()
        state = machine.cut(started(machine), 0.01)
        assert machine.due(state, 0.01) == "end"


class TestVerdicts:
    def ended(self, machine, state, loss, train=1.0, spread=0.0):
        end = probe(loss, spread)
        return machine.ended(machine.checked(state, end, train, 9), end)

    def test_progress_goes_on(self):
        _, verdict, evidence = self.ended(StageMachine(), started(StageMachine()), 0.5)
        assert (verdict, evidence) == ("train", ())

    def test_every_stage_searches_without_evidence(self):
        machine = StageMachine(search="every_stage")
        assert self.ended(machine, started(machine), 0.5)[1:] == ("search", ())

    def test_a_broken_forecast_is_evidence(self):
        machine = StageMachine()
        state = machine.predicted(started(machine), (0.4, 0.3, 0.5))
        _, verdict, evidence = self.ended(machine, state, 0.6)
        assert verdict == "search"
        assert evidence[0].startswith("forecast broken")

    def test_better_than_forecast_is_none(self):
        machine = StageMachine()
        assert self.ended(machine, machine.predicted(started(machine), (0.4, 0.3, 0.5)), 0.2)[1] == "train"

    def test_a_plateau_is_evidence_or_a_decay(self):
        known, unknown = StageMachine(), StageMachine(known_end=False)
        assert self.ended(known, started(known), 1.0)[1] == "search"
        state = replace(started(unknown), index=2)
        after, verdict, _ = self.ended(unknown, state, 1.0)
        assert verdict == "decay"
        assert after.lr == pytest.approx(0.1 * unknown.decay)

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_divergence_goes_back_and_lowers(self, loss):
        machine = StageMachine()
        after, verdict, evidence = self.ended(machine, started(machine), loss)
        assert verdict == "roll_back"
        assert after.lr == pytest.approx(0.1 * machine.lowering)
        assert evidence[0].startswith("divergence")

    def test_patience_runs_out(self):
        machine, state = StageMachine(), started(StageMachine())
        verdicts = []
        for _ in range(4):
            state, verdict = machine.failed(state)
            verdicts.append(verdict)
        assert verdicts == ["roll_back"] * 3 + ["train"]
        assert state.lr == pytest.approx(0.1 * machine.lowering**3)

    def test_at_the_end_patience_does_not_count(self):
        machine = StageMachine()
        state = replace(started(machine), strikes=machine.patience)
        assert machine.failed(state)[1] == "train"
        assert machine.failed(state, last=True)[1] == "roll_back"
        assert machine.failed(replace(state, best_probe=None), last=True)[1] == "train"

    def test_without_a_guard_nothing_is_undone(self):
        machine = StageMachine(guard=False)
        assert self.ended(machine, started(machine), math.nan)[1] == "train"

    def fell_behind(self, machine):
        return replace(started(machine, loss=1.0), best_probe=probe(0.5), best_step=4, best_train=1.5)

    def test_one_bad_check_is_not_enough_two_are(self):
        machine = StageMachine()
        once = machine.checked(self.fell_behind(machine), probe(0.8), 1.0, 9)
        assert (once.bad, machine.lost(once)) == (1, False)
        assert machine.lost(machine.checked(once, probe(0.8), 1.0, 9))
        assert machine.checked(once, probe(0.4), 1.0, 9).bad == 0

    def test_a_spike_without_better_training_loss_is_no_overfitting(self):
        machine = StageMachine()
        assert machine.checked(self.fell_behind(machine), probe(0.8), 1.6, 9).bad == 0

    @pytest.mark.parametrize(
        ("level", "loss", "lost"), [(0.51, 0.8, False), (0.5, 0.8, True), (0.0, 0.514, True), (0.0, 0.511, False)]
    )
    def test_once_the_rate_has_come_down_one_check_is_enough_whatever_the_training_loss_does(self, level, loss, lost):
        machine = StageMachine()
        state = machine.checked(self.fell_behind(machine), probe(loss), 1.6, 9, level)
        assert machine.lost(state) == lost
        after, verdict, evidence = machine.ended(state, probe(loss))
        assert (verdict == "roll_back") == lost
        if lost:
            assert after.lr == pytest.approx(0.1 * machine.lowering)
            assert evidence[0] == "worse: it was 0.5 at step 4, before the rate came down"

    @pytest.mark.parametrize(
        ("share", "level", "lost"),
        # Two errors are 2.2, the difference .3: sqrt(1 - share) has to come below .136.
        [(0.0, 0.1, False), (0.98, 0.1, False), (0.983, 0.1, True), (1.0, 0.1, True), (1.0, 1.0, False)],
    )
    def test_a_late_check_forgives_the_noise_of_what_the_probe_leaves_out(self, share, level, lost):
        machine = StageMachine()
        state = replace(self.fell_behind(machine), best_probe=Probe(0.5, (0.0, 1.0), share))
        state = machine.checked(state, Probe(0.8, (1.4, 0.2), share), 1.0, 9, level)
        assert machine.lost(state) == lost
        assert state.bad == lost

    @pytest.mark.parametrize(("share", "lost"), [(0.89, False), (0.9, True)])
    def test_a_probe_of_nearly_all_is_believed_late_though_its_noise_is_not_known(self, share, lost):
        machine = StageMachine()
        state = replace(self.fell_behind(machine), best_probe=Probe(0.5, (), share))
        assert machine.lost(machine.checked(state, Probe(0.8, (), share), 1.6, 9, 0.1)) == lost

    @pytest.mark.parametrize(
        ("level", "train", "bad", "lost"),
        [(0.1, 1.6, 0, False), (0.1, 1.0, 1, False), (0.0, 1.0, 1, True), (0.0, 1.6, 0, False)],
    )
    def test_where_the_noise_is_not_known_the_training_loss_must_tell_late_too(self, level, train, bad, lost):
        machine = StageMachine()
        state = replace(self.fell_behind(machine), best_probe=Probe(0.5))
        state = machine.checked(state, Probe(0.8), train, 9, level)
        assert (state.bad, machine.lost(state)) == (bad, lost)

    def test_every_check_may_be_the_best(self):
        machine = StageMachine()
        state = machine.checked(self.fell_behind(machine), probe(0.4), 1.2, 9)
        assert (state.best_probe.loss, state.best_step, state.best_train) == (0.4, 9, 1.2)
        again = machine.checked(state, probe(0.4), 1.1, 12)
        assert (again.best_step, again.best_train) == (9, 1.2)
        assert machine.checked(state, probe(math.nan), 1.1, 12).best_step == 9

    def test_a_run_that_began_without_a_probe_has_no_best_before_a_stage_has_ended(self):
        machine = StageMachine()
        state = machine.begun(machine.searched(StageState(), 0.1), 0.0, 0, None, math.nan)
        assert machine.checked(state, probe(0.4), 1.2, 9).best_probe is None

    def test_within_the_noise_is_not_bad(self):
        machine = StageMachine()
        state = replace(self.fell_behind(machine), best_probe=Probe(0.5, (0.0, 1.0)))
        assert machine.checked(state, Probe(0.8, (1.4, 0.2)), 1.0, 9).bad == 0


@given(
    st.builds(
        StageState,
        lr=st.none() | st.floats(0, 1),
        index=st.integers(0, 9),
        start_probe=st.none()
        | st.builds(Probe, st.floats(0, 9), st.lists(st.floats(0, 9)).map(tuple), st.floats(0, 1)),
        best_probe=st.none() | st.builds(Probe, st.floats(0, 9)),
        prediction=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
        request=st.text(),
    )
)
def test_state_round_trip(state):
    assert repr(StageState.from_dict(json.loads(json.dumps(state.to_dict())))) == repr(state)


losses = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


@given(losses, st.floats(-10, 10))
def test_comparison_is_paired(batches, shift):
    one = Probe(math.fsum(batches) / len(batches), tuple(batches))
    other = Probe(one.loss + shift, tuple(value + shift for value in batches))
    difference, error = compare(other, one)
    assert difference == pytest.approx(shift, abs=1e-9)
    # A common shift has no noise, however different the batches are.
    assert error == pytest.approx(0.0, abs=1e-9)


def test_comparison_without_pairs_has_no_error():
    assert compare(Probe(1.0), Probe(0.4))[0] == pytest.approx(0.6)
    assert math.isnan(compare(Probe(1.0), Probe(0.4))[1])
    assert math.isnan(compare(Probe(1.0, (1.0, 1.0)), Probe(0.4, (1.0,)))[1])


class TestPromise:
    """A stage that ends worse than the much shorter trial at its rate: the rate is too high for a long run."""

    def owing(self, machine, promised=0.5):
        return replace(started(machine), promised=promised)

    def test_behind_lowers_the_rate(self):
        state, verdict, evidence = StageMachine().ended(self.owing(StageMachine()), probe(0.6))
        assert verdict == "lower"
        assert state.lr == pytest.approx(0.1 * 10**-0.5)
        assert evidence[0].startswith("behind: 0.6 after the stage, 0.5 after the trial")

    def test_within_a_tenth_of_the_trials_progress_is_not_behind(self):
        state, verdict, _ = StageMachine().ended(self.owing(StageMachine()), probe(0.54))
        assert verdict == "train"
        assert state.promised == 0.5

    def test_a_promise_that_was_kept_is_forgotten(self):
        machine = StageMachine()
        state, _, _ = machine.ended(self.owing(machine), probe(0.45))
        assert math.isnan(state.promised)
        later = replace(machine.begun(state, 0.04, 40, probe(0.45), 1.0), index=2)
        assert machine.ended(later, probe(0.9))[1] != "lower"

    def test_late_stages_owe_nothing(self):
        machine = StageMachine()
        assert machine.ended(replace(self.owing(machine), index=3), probe(0.9))[1] != "lower"

    def test_nothing_is_owed_while_the_rate_is_warming_up(self):
        machine = StageMachine()
        state, verdict, _ = machine.ended(self.owing(machine), probe(0.6), 0.5)
        assert verdict == "train"
        assert state.promised == 0.5
        assert machine.ended(state, probe(0.6), 0.9)[1] == "lower"

    def test_a_trial_that_hardly_moved_promises_nothing(self):
        machine = StageMachine()
        assert machine.ended(self.owing(machine, promised=0.97), probe(0.999))[1] != "lower"

    def test_a_later_search_promises_nothing(self):
        state = StageMachine().searched(started(StageMachine()), 0.2, promised=0.3)
        assert math.isnan(state.promised)

    def test_the_baseline_has_no_guard(self):
        machine = StageMachine(guard=False)
        assert machine.ended(self.owing(machine), probe(0.9))[1] != "lower"
