"""The walk around a rate that is about right, on responses whose optimum is known."""

import math

import pytest
from response_bank import Response, run

from autotune.errors import ConfigurationError
from autotune.search import BracketSearch, LogSpace, Outcome

HALF = 0.5 * math.log(10.0)
CENTRE = 1e-2


def walked(losses, **settings):
    """A search whose trials end at ``losses(log_lr)``; a loss of None is a divergence."""
    search = BracketSearch(CENTRE, **settings)
    state = search.init(5.0, 100, 4000)
    while (proposal := search.ask(state)) is not None:
        loss = losses(proposal.log_lr)
        status = "diverged" if loss is None else "finished"
        state = search.tell(state, Outcome(proposal.log_lr, 100, math.nan if loss is None else loss, 100, status))
    return search, state, [(o.log_lr - math.log(CENTRE)) / HALF for o in state.outcomes]


def test_downhill_goes_on_down():
    _, _, places = walked(lambda x: 3.0 + 0.2 * (x - math.log(1e-4)) ** 2 / 10)
    assert places == pytest.approx([0.0, -1.0, -2.0])


def test_uphill_turns_round():
    _, _, places = walked(lambda x: 3.0 + 0.2 * (x - math.log(1e-1)) ** 2)
    assert places == pytest.approx([0.0, -1.0, 1.0])


def test_about_equal_counts_as_downhill():
    """Above its edge a transformer's loss is level, whatever the rate: the way out is down."""
    edge = math.log(CENTRE) - 1.5 * HALF
    search, state, places = walked(lambda x: 3.14 if x > edge else 2.9)
    assert places == pytest.approx([0.0, -1.0, -2.0])
    assert search.recommend(state).log_lr < math.log(CENTRE) - HALF


def test_the_walk_begins_towards_what_is_usual():
    _, _, places = walked(lambda x: 3.0 - 0.1 * x, usual=1.0)
    assert places == pytest.approx([0.0, 1.0, 2.0])
    _, _, places = walked(lambda x: 3.0 + 0.2 * (x - math.log(1e-4)) ** 2, usual=1.0)
    assert places == pytest.approx([0.0, 1.0, -1.0])


def test_far_from_what_is_usual_a_tenth_is_about_equal():
    """Above the edge the trials of a transformer differ by chance; the way to the usual rate is not left for that."""
    level = lambda x: 3.02 if x > math.log(CENTRE) - 0.1 else 3.19 if x > math.log(CENTRE) - 1.5 * HALF else 2.95  # noqa: E731
    search, state, places = walked(level, usual=CENTRE / 10)
    assert places == pytest.approx([0.0, -1.0, -2.0])
    assert search.recommend(state).log_lr < math.log(CENTRE) - 1.5 * HALF
    assert walked(level, usual=CENTRE / 4)[2] == pytest.approx([0.0, -1.0, 1.0])


def test_what_is_usual_decides_between_rates_that_do_equally_well():
    """A level stretch: the answer goes to the usual rate as far as the bracket reaches, and no further."""
    for usual, end in ((1e-3, -2.0), (1e-1, 2.0)):
        search, state, places = walked(lambda x: 2.0 + 1e-4 * math.sin(9 * x), usual=usual)
        assert places[-1] == pytest.approx(end)
        assert search.recommend(state).log_lr == pytest.approx(math.log(usual), abs=0.4)
    search, state, _ = walked(lambda x: 2.0, usual=1e-6, shrink=0.0)
    assert -2.03 * HALF <= search.recommend(state).log_lr - math.log(CENTRE) <= -1.5 * HALF


def valley(best):
    """Losses that tell rates apart sharply."""
    return lambda x: 2.0 + 0.3 * (x - math.log(best)) ** 2


def answered(best, usual, **settings):
    """Decades by which the answer lies above the best rate of the trials."""
    search, state, _ = walked(valley(best), usual=usual, **settings)
    return (search.recommend(state).log_lr - math.log(best)) / math.log(10.0)


def test_the_answer_goes_half_of_the_way_back_to_what_is_usual():
    """However sure the trials are: a whole run's best rate is half a decade off theirs."""
    sure = answered(1e-2, 3e-3, shrink=0.0)
    assert sure == pytest.approx(0.0, abs=0.1)
    assert answered(1e-2, 3e-3) == pytest.approx((sure + math.log10(0.3)) / 2.0, abs=0.01)
    assert answered(1e-2, 3e-3, shrink=1.0) == pytest.approx(sure - 0.4, abs=0.02)
    above = answered(1e-2, 3e-2, shrink=0.0)
    assert answered(1e-2, 3e-2) == pytest.approx((above + math.log10(3.0)) / 2.0, abs=0.01)


def test_far_from_what_is_usual_it_goes_four_tenths_of_a_decade():
    for usual, way in ((1e-5, -0.4), (1.0, 0.4)):
        assert answered(1e-2, usual) - answered(1e-2, usual, shrink=0.0) == pytest.approx(way, abs=0.01)
    assert answered(1e-2, None) == answered(1e-2, None, shrink=0.0), "where nothing is usual nothing is known"


def test_bounds_that_leave_out_what_is_usual_keep_the_answer_where_it_is():
    space = LogSpace(1e-6, 2e-2)
    assert answered(1e-2, 1e-1, space=space) == answered(1e-2, 1e-1, space=space, shrink=0.0)
    assert answered(1e-2, 1e-3, space=space) < answered(1e-2, 1e-3, space=space, shrink=0.0) - 0.3


def test_it_does_not_go_up_to_harm():
    """Half a decade below what exploded, though what is usual lies far above."""
    limit = math.log(CENTRE) + 0.9 * HALF
    sharp = lambda x: None if x > limit else valley(1e-2)(x)  # noqa: E731
    search, state, _ = walked(sharp, usual=1.0)
    free, told, _ = walked(sharp, usual=1.0, shrink=0.0)
    exploded = min(o.log_lr for o in state.outcomes if o.status == "diverged")
    said, answer = free.recommend(told).log_lr, search.recommend(state).log_lr
    assert answer == pytest.approx(max(said, exploded - HALF))
    assert answer < said + 0.4 * math.log(10.0)


def test_what_is_usual_is_the_answer_where_no_trial_helps():
    """A saddle, or a model that was trained before: short trials do nothing, or harm that a whole run makes good."""
    for loss in (5.0, 5.001):
        search, state, _ = walked(lambda x: loss, usual=3e-3)  # noqa: B023
        found = search.recommend(state)
        assert math.exp(found.log_lr) == pytest.approx(3e-3)
        assert "usual" in found.reason
    # Not above what exploded, and a single trial that helped by next to nothing does not outweigh it.
    search, state, _ = walked(lambda x: 5.0 if x < math.log(CENTRE) - 0.1 else None, usual=2.0 * CENTRE)
    assert math.exp(search.recommend(state).log_lr) == pytest.approx(CENTRE / 10**0.5)
    search, state, _ = walked(lambda x: 4.999 if x < math.log(CENTRE) - 0.1 else 5.1, usual=CENTRE)
    assert math.exp(search.recommend(state).log_lr) == pytest.approx(CENTRE, rel=0.2)


def tried(*trials, usual, before=(), start=5.0):
    """A search that was told of trials (rate, loss or None for a divergence); its recommended rate."""
    search = BracketSearch(usual, usual=usual)

    def outcome(rate, loss, steps):
        status = "diverged" if loss is None else "finished"
        return Outcome(math.log(rate), steps, math.nan if loss is None else loss, steps, status)

    state = search.init(start, 60, 4000, None, tuple(outcome(*one, 6) for one in before))
    for one in trials:
        state = search.tell(state, outcome(*one, 60))
    return math.exp(search.recommend(state).log_lr)


def test_what_is_usual_does_not_go_where_harm_was_done():
    # By a trial of this leg, whether or not another helped by next to nothing.
    for lowest in (5.0, 4.999):
        assert tried((1e-2, 9.0), (3.2e-3, 5.0), (1e-3, lowest), usual=1e-2) == pytest.approx(3.2e-3, rel=0.05)
    # By the shorter trials before.
    short = ((1e-3, 7.0), (1e-2, 20.0), (1e-4, 5.2), (3e-5, 4.999))
    assert tried((3e-5, 4.98), (9.5e-5, 5.003), (9.5e-6, 5.003), usual=3e-3, before=short) < 4e-4
    assert tried((3e-5, 5.0), (9.5e-5, 5.003), (9.5e-6, 5.003), usual=3e-3, before=short) == pytest.approx(
        3.2e-4, rel=0.05
    )
    # A rate that looks harmful by chance, below others that are not, is no bound: a loss near zero, say.
    near = tried((3e-3, 0.01), (9.5e-4, 0.012), (9.5e-3, 0.01), usual=3e-3, start=0.01)
    assert near == pytest.approx(3e-3)


def test_nothing_is_tried_at_or_above_what_exploded():
    _, _, places = walked(lambda x: None if x > math.log(CENTRE) - 1.2 * HALF else 2.0, usual=CENTRE)
    assert places == pytest.approx([0.0, -1.0, -3.0])
    search = BracketSearch(3e-3, usual=3e-3)
    before = (Outcome(math.log(1e-4), 6, math.nan, 2, "diverged"), Outcome(math.log(1e-5), 6, 5.0, 6))
    first = search.ask(search.init(5.0, 60, 4000, None, before))
    assert math.exp(first.log_lr) == pytest.approx(1e-4 / 10**0.5)
    assert "exploded" in first.reason


def test_trials_that_differ_outweigh_what_is_usual():
    clear = lambda x: 2.0 + 0.5 * (x - math.log(CENTRE)) ** 2  # noqa: E731
    search, state, _ = walked(clear, usual=0.1, shrink=0.0)
    free = BracketSearch(CENTRE).recommend(state).log_lr
    assert abs(search.recommend(state).log_lr - free) < 0.15 * math.log(10.0)


def test_a_loss_that_has_hardly_moved_counts_less():
    """The same trials in units of their progress, which is a hundredth of the loss and nine tenths of it."""
    shape = lambda x: (x - math.log(CENTRE) + HALF) ** 2 / 10  # noqa: E731
    answers = []
    for floor, height in ((4.95, 0.05), (0.5, 4.5)):
        search, state, _ = walked(lambda x: floor + height * shape(x), usual=1e-1)  # noqa: B023
        answers.append(search.recommend(state).log_lr)
    assert answers[0] > answers[1] + 0.1


def test_never_above_the_highest_trial_that_finished():
    search, state, _ = walked(lambda x: 2.0 if x < math.log(CENTRE) - 0.1 else None)
    assert search.recommend(state).log_lr <= math.log(CENTRE) - HALF + 1e-6


def test_stays_inside_the_space():
    space = LogSpace(5e-3, 5e-2)
    search = BracketSearch(CENTRE, space)
    state = run(search, Response("flat", math.log(1e-3), 0.0), 0)
    assert all(space.contains(o.log_lr) for o in state.outcomes)
    assert space.contains(search.recommend(state).log_lr)


@pytest.mark.parametrize("kind", ["cliff", "flat", "saturating"])
def test_a_decade_off_is_found_again(kind):
    response = Response(kind, math.log(1e-2), 0.0)
    for offset in (-0.75, 0.75):
        search = BracketSearch(1e-2 * 10**offset)
        answer = search.recommend(run(search, response, 1))
        before = response.regret(search.centre, 100)
        assert response.regret(answer.log_lr_trial_optimum, 100) <= max(0.5 * before, 0.05)


@pytest.mark.parametrize("bad", [{"centre": 0.0}, {"gap": 0.0}, {"usual": 0.0}, {"pull": -0.1}, {"shrink": 1.5}])
def test_bad_settings(bad):
    with pytest.raises(ConfigurationError, match="BracketSearch"):
        BracketSearch(**{"centre": CENTRE, **bad})
