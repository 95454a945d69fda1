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


def test_of_equal_rates_the_middle():
    search, state, _ = walked(lambda x: 2.0 + 1e-3 * abs(x - math.log(CENTRE) + 2.0 * HALF))
    strict = BracketSearch(CENTRE, tie=0.0).recommend(state).log_lr
    assert strict < math.log(CENTRE) - HALF
    assert search.recommend(state).log_lr == pytest.approx(0.5 * (strict + math.log(CENTRE)))


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


@pytest.mark.parametrize("bad", [{"centre": 0.0}, {"gap": 0.0}, {"near": -1.0}, {"tie": -0.1}])
def test_bad_settings(bad):
    with pytest.raises(ConfigurationError, match="BracketSearch"):
        BracketSearch(**{"centre": CENTRE, **bad})
