"""Fronts of cost against quality: who dominates whom, and how much of the plane (pure)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """A point of the plane; both coordinates are better when lower.

    Attributes:
        cost: what it costs.
        value: what is wrong with it.
    """

    cost: float
    value: float


def undominated(places: Sequence[Place]) -> list[Place]:
    """The places that none of the others is at least as good as in both coordinates, by rising cost.

    Of equal ones, one stays.
    """
    kept: list[Place] = []
    for place in sorted(set(places)):
        if not kept or place.value < kept[-1].value:
            kept.append(place)
    return kept


def hypervolume(places: Sequence[Place], reference: Place) -> float:
    """Area between a front and a reference point: all that some place dominates and that dominates it.

    Zitzler & Thiele, "Multiobjective Optimization Using Evolutionary Algorithms", 1998. In two dimensions it
    is a sum of rectangles, so it is exact.

    Args:
        places: any; dominated ones add nothing, nor do those that are not better than the reference in both.
        reference: the worst place that counts.

    Returns:
        The area, ≥ 0.

    Raises:
        ValueError: a coordinate that is not finite.
    """
    if not all(map(math.isfinite, (*reference, *(number for place in places for number in place)))):
        raise ValueError(f"places of a front must be finite; got {list(places)}, reference {reference}")
    inside = [place for place in places if place.cost < reference.cost and place.value < reference.value]
    area, ceiling = 0.0, reference.value
    for cost, value in undominated(inside):
        area += (reference.cost - cost) * (ceiling - value)
        ceiling = value
    return area


def halvings(share: float) -> float:
    """log2 of a share of the cost: 0 for the dense network, −1 for a half, −2 for a quarter.

    On this axis a step from a tenth to a twentieth is as long as one from the whole to a half.
    """
    return math.log2(share)
