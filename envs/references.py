"""What scores are measured against: the uniform plan's gaps, and how much random plans differ."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.budget import Budget, kind_of, project, random_proportions, uniform_widths
from envs.rewards import robust_spread
from gan.evaluations import CountedScorer, Scores
from gan.plans import Plan

SPREAD_PLANS = 64
"""Random plans per budget that the spread is read off."""

SPREAD_SEED = 20240
"""Fixed: every run of one task has the same unit of reward, whatever its seed."""

GRID = (0.0, 0.5, 1.0)
"""Positions in a budget range (log-linear) at which the spread is measured."""

KINDS = ("generator", "discriminator")


class Reference(NamedTuple):
    """What a plan at some budgets is compared with.

    Attributes:
        uniform_gaps: term → gap of the uniform plan.
        spreads: term → typical difference between random plans, > 0.
    """

    uniform_gaps: Mapping[str, float]
    spreads: Mapping[str, float]


class References:
    """Reference scores of one scorer, for budgets or ranges of them. All are uncounted.

    For fixed budgets the spread is read off ``SPREAD_PLANS`` random plans; for ranges, off as many at each
    point of a 3 × 3 grid of generator × discriminator budgets (ends and log-middle; all networks of a kind
    move together), bilinear in log budget between them. The random proportions are the same at every grid
    point.

    Args:
        scorer: scores the plans; its cache and log keep them.
        budgets: agent → budget.
    """

    def __init__(self, scorer: CountedScorer, budgets: Mapping[str, Budget]) -> None:
        self.scorer = scorer
        self.budgets = budgets
        self.axes = tuple(
            GRID if any(kind_of(agent) == kind and not b.fixed for agent, b in budgets.items()) else (0.0,)
            for kind in KINDS
        )
        self._grid: dict[str, NDArray[np.float64]] = {}
        self._last: tuple[Mapping[str, float], Reference] | None = None

    @property
    def ready(self) -> bool:
        return bool(self._grid)

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Score the random plans, once.

        Args:
            progress: called with (plans done, plans in all) after each.
        """
        if self.ready:
            return
        proportions = {agent: self._random_proportions(agent) for agent in self.scorer.networks}
        # the generator's budget is the outer loop: its outputs are cached while the discriminator's moves
        points = list(itertools.product(*self.axes))
        rows: dict[tuple[float, ...], list[Mapping[str, float]]] = {point: [] for point in points}
        for done, (k, point) in enumerate(itertools.product(range(SPREAD_PLANS), points), start=1):
            budgets = self._budgets_at(point)
            widths = {
                agent: project(network, proportions[agent][k], budgets[agent]).widths.tolist()
                for agent, network in self.scorer.networks.items()
            }
            rows[point].append(self.scorer.score(Plan.of(widths, self.scorer.ranking), counted=False).gaps)
            if progress is not None:
                progress(done, SPREAD_PLANS * len(points))
        uniform_gaps = {point: self.uniform_at(self._budgets_at(point)).gaps for point in points}
        for term in uniform_gaps[points[0]]:
            spreads = [robust_spread([gaps[term] for gaps in rows[p]], uniform_gaps[p][term]) for p in points]
            self._grid[term] = np.array(spreads).reshape([len(axis) for axis in self.axes])

    def _budgets_at(self, point: tuple[float, ...]) -> dict[str, float]:
        """Agent → keep ratio at a grid point, one position per kind."""
        return {agent: b.at(point[KINDS.index(kind_of(agent))]) for agent, b in self.budgets.items()}

    def _random_proportions(self, agent: str) -> list[NDArray[np.float64]]:
        # seeded by name, so that the order of the agents does not matter
        rng = np.random.default_rng([SPREAD_SEED, zlib.crc32(agent.encode())])
        return [random_proportions(self.scorer.networks[agent], rng) for _ in range(SPREAD_PLANS)]

    def uniform_plan(self, budgets: Mapping[str, float]) -> Plan:
        """The plan of equal proportions in every network."""
        networks = self.scorer.networks
        return Plan.of(
            {agent: uniform_widths(network, budgets[agent]).tolist() for agent, network in networks.items()},
            self.scorer.ranking,
        )

    def uniform_at(self, budgets: Mapping[str, float]) -> Scores:
        """Scores of the uniform plan at exactly these budgets."""
        return self.scorer.score(self.uniform_plan(budgets), counted=False)

    def at(self, budgets: Mapping[str, float]) -> Reference:
        """The reference at these budgets: agent → keep ratio, within the ranges."""
        if self._last is None or self._last[0] != budgets:  # an episode asks for the same one at each step
            self.prepare()
            rows, columns = (
                self._hat_weights(kind, axis, budgets) for kind, axis in zip(KINDS, self.axes, strict=True)
            )
            spreads = {term: float(rows @ grid @ columns) for term, grid in self._grid.items()}
            self._last = (dict(budgets), Reference(self.uniform_at(budgets).gaps, spreads))
        return self._last[1]

    def _hat_weights(
        self, kind: str, axis: tuple[float, ...], budgets: Mapping[str, float]
    ) -> NDArray[np.float64]:
        """(len(axis),) linear interpolation weights at the mean log position of a kind's budgets."""
        drawn = [
            b.position(budgets[a]) for a, b in self.budgets.items() if kind_of(a) == kind and not b.fixed
        ]
        position = float(np.mean(drawn)) if drawn else 0.0
        return np.array([np.interp(position, axis, row) for row in np.eye(len(axis))])
