"""The interval on its logarithmic axis."""

import math

import pytest
import torch

from autotune.errors import ConfigurationError
from autotune.search import LogSpace


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1e-3, math.inf), ("1", 2.0), (True, 2)],
)
def test_bounds_are_validated(low, high):
    with pytest.raises(ConfigurationError, match="LogSpace"):
        LogSpace(low, high)


def test_grid_is_even_ascending_double_and_holds_its_ends():
    space = LogSpace(1e-4, 1e-1)
    grid = space.grid(31)
    assert grid.dtype == torch.float64
    assert torch.allclose(grid.diff(), torch.full((30,), space.width / 30, dtype=torch.float64))
    assert grid[[0, -1]].exp().tolist() == pytest.approx([1e-4, 1e-1])
    with pytest.raises(ConfigurationError, match="points"):
        space.grid(1)


def test_clip_and_contains():
    space = LogSpace(1e-4, 1e-1)
    assert space.clip(math.log(1e-9)) == space.log_low
    assert space.clip(math.inf) == space.log_high
    assert space.clip(math.nan) == pytest.approx(0.5 * (space.log_low + space.log_high))
    assert space.contains(space.log_low)
    assert not space.contains(0.0)


def test_around_stays_inside():
    space = LogSpace(1e-4, 1e-1)
    near = space.around(math.log(1e-2), 8.0)
    assert (near.low, near.high) == pytest.approx((1e-2 / 8, 8e-2))
    edge = space.around(math.log(50.0), 8.0)
    assert (edge.low, edge.high) == pytest.approx((1e-1 / 8, 1e-1))
