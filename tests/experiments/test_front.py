from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.front import Place, halvings, hypervolume, undominated

CORNER = Place(4.0, 4.0)


def test_the_hypervolume_of_a_staircase_by_hand() -> None:
    # 3 × 1 above the first step, 2 × 1 more under the second, 1 × 1 more under the third
    steps = [Place(1, 3), Place(2, 2), Place(3, 1)]
    assert hypervolume(steps, CORNER) == 3 + 2 + 1
    assert hypervolume([Place(1, 1)], CORNER) == 9
    assert hypervolume([], CORNER) == 0


def test_what_is_dominated_adds_nothing() -> None:
    steps = [Place(1, 3), Place(3, 1)]
    assert hypervolume([*steps, Place(3, 3), Place(1, 3)], CORNER) == hypervolume(steps, CORNER) == 5


def test_what_lies_beyond_the_reference_adds_nothing() -> None:
    assert hypervolume([Place(0, 4), Place(4, 0), Place(5, -9), Place(-9, 5)], CORNER) == 0
    assert hypervolume([Place(1, 3), Place(0, 7)], CORNER) == 3


def test_the_area_is_that_of_counted_pixels() -> None:
    rng = np.random.default_rng(3)
    places = [Place(*map(float, row)) for row in rng.integers(0, 40, (12, 2))]
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(40) + 0.5)
    covered = np.any([(x > place.cost) & (y > place.value) for place in places], axis=0)
    assert hypervolume(places, Place(40, 40)) == covered.sum()


def test_a_front_has_no_worse_and_no_equal_places() -> None:
    places = [Place(2, 2), Place(1, 3), Place(2, 2), Place(2, 5), Place(3, 2), Place(4, 1)]
    assert undominated(places) == [Place(1, 3), Place(2, 2), Place(4, 1)]


def test_infinite_places_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be finite"):
        hypervolume([Place(math.nan, 1)], CORNER)


def test_halvings() -> None:
    assert (halvings(1.0), halvings(0.5), halvings(0.125)) == (0, -1, -3)
