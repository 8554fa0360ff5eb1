"""Budgets and projection: how real-valued proportions become widths that fill a budget exactly as far
as rounding allows.

Pure numpy; nothing here knows of agents, scores or weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gan.errors import UserError, unknown
from gan.evaluations import PrunableNetwork

DEFAULT_BUDGETS: dict[str, float] = {"generator": 0.10, "discriminator": 0.50}
"""Network kind → keep ratio of its cost; at 10 % of the U-Net's parameters the shape matters most
(docs/calibration.md); the other embedded tasks take the same."""

LARGEST_MOVE = 6.0
"""One decision changes a proportion by at most this factor. With 3, what a good plan cuts to an eighth stayed
out of reach of every learner that decides step by step (docs/results.md, "How far a decision reaches")."""

RANDOM_SIGMA = 0.5
"""Standard deviation of the log proportions of a random plan."""

COST_TOLERANCE = 1e-12
"""Relative; a budget computed as cost / dense cost must admit the plan that it was computed from."""

TIE_DECIMALS = 9
"""Log factors that agree to so many decimals are ties: scaling by a common factor moves the last bits."""


@dataclass(frozen=True)
class Budget:
    """The keep ratio that a network's cost may have; a range is drawn from, log-uniformly, per episode.

    Attributes:
        low: smallest budget, 0 < low ≤ high.
        high: largest budget, ≤ 1; equal to ``low`` for a fixed budget.

    Raises:
        UserError: if a bound is no number in (0, 1], or ``low > high``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        check_keep_ratio(self.low)
        check_keep_ratio(self.high)
        if self.low > self.high:
            raise UserError(
                f"the budget range {self.low:g}:{self.high:g} is reversed; write {self.high:g}:{self.low:g}"
            )

    @classmethod
    def of(cls, value: float | str | Budget) -> Budget:
        """A budget from a number, ``"LOW[:HIGH]"`` or a budget."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            parts = value.split(":")
            if len(parts) > 2:
                raise UserError(
                    f"the budget {value!r} has {len(parts)} parts; write LOW or LOW:HIGH, such as 0.05:0.5"
                )
            bounds = [_number(part) for part in parts]
            return cls(bounds[0], bounds[-1])
        return cls(float(value), float(value))

    @property
    def fixed(self) -> bool:
        return self.low == self.high

    def at(self, position: float) -> float:
        """The keep ratio at a position in [0, 1] between the ends, log-linear."""
        return (
            self.low if self.fixed else float(min(self.low * (self.high / self.low) ** position, self.high))
        )

    def position(self, keep_ratio: float) -> float:
        """The inverse of :meth:`at`; 0 for a fixed budget."""
        return 0.0 if self.fixed else math.log(keep_ratio / self.low) / math.log(self.high / self.low)

    def draw(self, rng: np.random.Generator) -> float:
        """A log-uniform draw; a fixed budget consumes no randomness."""
        return self.low if self.fixed else self.at(float(rng.uniform()))


def check_keep_ratio(value: float) -> None:
    """Refuse a budget that is no keep ratio in (0, 1], with one sentence."""
    if not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise UserError(
            f"a budget is a keep ratio of the cost: above 0, at most 1 (0.1 keeps 10 %); got {value:g}"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"a budget is a number or LOW:HIGH, above 0 and at most 1, such as 0.1 or 0.05:0.5; got {text!r}"
        ) from None


def kind_of(agent: str) -> str:
    """``generator`` of ``generator_A``."""
    return agent.split("_")[0]


def parse_budgets(text: str, agents: Iterable[str]) -> dict[str, Budget]:
    """Read ``[agent=]LOW[:HIGH],…``.

    Args:
        text: for example ``0.1``, ``0.05:0.5`` or ``generator=0.1,discriminator=0.5``. A bare value is for
            the generators; ``generator=`` also names every ``generator_…``. Who is not named keeps the
            default.
        agents: names of the networks' agents.

    Returns:
        Agent → budget, in the order of ``agents``.

    Raises:
        UserError: if a value is no keep ratio, a range is reversed, or an agent is unknown or named twice.
    """
    given: dict[str, Budget] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        name = name.strip() or "generator"
        if name in given:
            raise UserError(f"the budget {text!r} names {name!r} twice; give each agent one")
        given[name] = Budget.of(value.strip())
    return default_budgets(agents, given)


def fixed_ratios(budgets: Mapping[str, Budget]) -> dict[str, float]:
    """Agent → keep ratio, of the budgets that are no ranges."""
    return {agent: budget.low for agent, budget in budgets.items() if budget.fixed}


def budget_ends(budgets: Mapping[str, Budget]) -> dict[str, tuple[float, float]]:
    """Agent → smallest and largest keep ratio."""
    return {agent: (budget.low, budget.high) for agent, budget in budgets.items()}


def default_budgets(
    agents: Iterable[str], given: Mapping[str, float | str | Budget] | None = None
) -> dict[str, Budget]:
    """Agent → its budget: given by its name, else by its kind, else the default of its kind.

    Raises:
        UserError: if a name given is neither an agent's nor a kind's.
    """
    agents, given = list(agents), given or {}
    for name in given:
        if name not in agents and name not in map(kind_of, agents):
            raise unknown("agent in the budgets", name, {*agents, *map(kind_of, agents)})
    return {
        agent: Budget.of(given.get(agent, given.get(kind_of(agent), DEFAULT_BUDGETS[kind_of(agent)])))
        for agent in agents
    }


@dataclass(frozen=True)
class Projected:
    """Widths that fill a budget.

    Attributes:
        widths: (n,) kept channels, on the grid of the network's multiple.
        proportions: (n,) real-valued keep ratios in (0, 1] whose nearest allowed widths are ``widths``.
        unused: share of the budget that rounding leaves, in [0, 1).
    """

    widths: NDArray[np.int64]
    proportions: NDArray[np.float64]
    unused: float


class Increments(NamedTuple):
    """Every step from one allowed width to the next, group by group in forward order, ascending.

    Attributes:
        group: (i,) index of the group.
        before: (i,) width before the step.
        after: (i,) width after it.
    """

    group: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]


def list_increments(network: PrunableNetwork) -> Increments:
    """The increments of all groups; the last one of a group is smaller where the multiple does not divide."""
    channels, multiple = network.channels, network.multiple
    counts = -(-channels // multiple) - 1
    group = np.repeat(np.arange(len(channels)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    before = (np.arange(len(group)) - first + 1) * multiple
    return Increments(group, before, np.minimum(before + multiple, channels[group]))


def levels(network: PrunableNetwork, group: int) -> NDArray[np.int64]:
    """(k,) the allowed widths of a group, ascending."""
    width, multiple = network.groups[group].channels, network.multiple
    return np.append(np.arange(multiple, width, multiple), width)


def nearest_width(network: PrunableNetwork, group: int, proportion: float) -> int:
    """The allowed width nearest to a keep ratio; halves go up, as in :func:`project`."""
    allowed = levels(network, group)
    middles = (allowed[:-1] + allowed[1:]) / 2
    return int(allowed[np.searchsorted(middles, proportion * network.groups[group].channels, side="right")])


def allowed_cost(network: PrunableNetwork, budget: float) -> float:
    """The cost that a keep ratio stands for, in the network's cost units."""
    return budget * float(network.cost_of(network.channels)) * (1 + COST_TOLERANCE)


def unused_share(network: PrunableNetwork, widths: NDArray[np.int64], budget: float) -> float:
    """Share of the budget that a plan leaves, ≥ 0 for every plan that meets it."""
    return max(
        0.0, 1.0 - float(network.cost_of(widths)) * (1 + COST_TOLERANCE) / allowed_cost(network, budget)
    )


def keep_ratio(network: PrunableNetwork, widths: NDArray[np.int64]) -> float:
    """Cost of the widths / dense cost, in (0, 1]."""
    return float(network.cost_of(widths)) / float(network.cost_of(network.channels))


def reachable(network: PrunableNetwork) -> tuple[float, float]:
    """The keep ratios of the cost that plans can have: from every group at its minimum to 1."""
    return keep_ratio(network, network.minimum), 1.0


def check_reachable(network: PrunableNetwork, budget: float, agent: str | None = None) -> None:
    """Refuse a budget below the network's smallest plan, with the reachable range."""
    check_keep_ratio(budget)
    low, high = reachable(network)
    if low > budget * (1 + COST_TOLERANCE):
        low = math.ceil(low * 1e4) / 1e4  # rounded up, so that the printed number can be typed back
        raise UserError(
            f"a budget of {budget:g} of the {agent or network.kind}'s {network.cost_kind} cannot be reached: "
            f"{network.multiple} channels in every group keep {low:g}; give a budget from {low:g} to {high:g}"
        )


def project(
    network: PrunableNetwork,
    proportions: NDArray[np.float64],
    budget: float,
    decided_widths: NDArray[np.int64] | None = None,
) -> Projected:
    """Scale the proportions by one common factor until their nearest allowed widths fill the budget.

    The increment from width a to b of a group with dense width C and proportion p appears at the factor
    ``(a + b) / 2 / (p C)``: there ``factor × p × C`` gets nearer to b than to a. All increments are put in
    that order (ties: forward order), and the longest prefix that fits is taken. So the result meets the
    budget, its next increment would exceed it, and it is monotone in the budget.

    The returned proportions are scaled by a factor half way (in the log) between the last increment taken and
    the first one not taken, and capped at 1. So they are real keep ratios, comparable to 1, of which the
    widths are the nearest-rounded view; and projecting them again gives the same widths: the factor 1
    separates the same increments, whether a group was capped (its increments all lie below 1) or not (a
    common factor changes no order).

    Args:
        network: the network.
        proportions: (n,) > 0; only their ratios matter.
        budget: keep ratio of the network's cost.
        decided_widths: (n,) widths that are held, -1 = free. Held groups keep their proportion.

    Raises:
        UserError: if no choice of the free widths meets the budget; the sentence gives the reachable range.
        ValueError: if the proportions are no positive finite numbers, one per group.
    """
    channels, n = network.channels, len(network.groups)
    proportions = np.asarray(proportions, dtype=np.float64)
    if proportions.shape != (n,) or not np.all(np.isfinite(proportions) & (proportions > 0)):
        raise ValueError(f"proportions must be {n} positive finite numbers, one per group; got {proportions}")
    decided = np.full(n, -1) if decided_widths is None else np.asarray(decided_widths, dtype=np.int64)
    free = decided < 0
    increments = list_increments(network)
    group, before, after = (column[free[increments.group]] for column in increments)
    log_factors = np.log((before + after) / (2.0 * channels[group])) - np.log(proportions)[group]
    order = np.argsort(np.round(log_factors, TIE_DECIMALS), kind="stable")

    prefixes = np.zeros((len(order) + 1, n), dtype=np.int64)
    prefixes[0] = np.where(free, network.minimum, decided)
    prefixes[np.arange(1, len(order) + 1), group[order]] = (after - before)[order]
    np.cumsum(prefixes, axis=0, out=prefixes)
    taken = int(np.searchsorted(network.cost_of(prefixes), allowed_cost(network, budget), side="right")) - 1
    if taken < 0:
        check_reachable(network, budget)
        raise UserError(f"the widths decided already exceed the budget of {budget:g} of the {network.kind}")

    scaled = proportions.copy()
    movable = free & (channels > network.multiple)
    if taken == len(order):
        scaled[movable] = 1.0
    else:
        comes = order[taken]
        if taken > 0:
            log_factor = (log_factors[order[taken - 1]] + log_factors[comes]) / 2
        else:  # the group that would grow first stands at its minimum
            log_factor = log_factors[comes] + math.log(2 * before[comes] / (before[comes] + after[comes]))
        scaled[movable] = np.minimum(proportions[movable] * math.exp(log_factor), 1.0)
    scaled[free & ~movable] = 1.0  # a group of one allowed width is always kept whole
    widths = prefixes[taken].copy()
    return Projected(widths, scaled, unused_share(network, widths, budget))


def uniform(network: PrunableNetwork, budget: float) -> Projected:
    """The projection of equal proportions: every group keeps the same share of its channels."""
    return project(network, np.ones(len(network.groups)), budget)


def uniform_widths(network: PrunableNetwork, budget: float) -> NDArray[np.int64]:
    """(n,) widths of the uniform plan at a budget."""
    return uniform(network, budget).widths


def random_proportions(
    network: PrunableNetwork, rng: np.random.Generator, sigma: float = RANDOM_SIGMA
) -> NDArray[np.float64]:
    """(n,) log-normal proportions exp(N(0, σ)); the projection scales them and caps what they give at 1."""
    return np.exp(rng.normal(0.0, sigma, size=len(network.groups)))


class Room(NamedTuple):
    """How far one decision can move a group.

    Attributes:
        proportion: keep ratio that rescaling gave.
        start: where moves begin: the proportion, or one multiple's keep ratio where it is below that.
        low: keep ratio of the action -1.
        high: keep ratio of the action 1.
        widest: largest width that leaves the other groups their minimum.
    """

    proportion: float
    start: float
    low: float
    high: float
    widest: int

    def moved(self, action: float) -> float:
        """The proportion after an action in [-1, 1]; 0 keeps it, beyond that log-linear up to the ends."""
        if action == 0:
            return self.proportion
        end = self.high if action > 0 else self.low
        return self.start * (end / self.start) ** abs(action)


def find_room(
    network: PrunableNetwork,
    group: int,
    proportion: float,
    budget: float,
    decided_widths: NDArray[np.int64],
) -> Room:
    """The ends of a group's next decision.

    Args:
        network: the network.
        group: index of the group.
        proportion: its keep ratio now.
        budget: keep ratio of the network's cost.
        decided_widths: (n,) widths that are held, -1 = free.
    """
    width, minimum = network.groups[group].channels, int(network.minimum[group])
    choices = levels(network, group)
    free = decided_widths < 0
    plans = np.repeat([np.where(free, network.minimum, decided_widths)], 2 * len(choices), axis=0)
    plans[len(choices) :] = np.where(free, network.channels, decided_widths)
    plans[:, group] = np.tile(choices, 2)
    smallest, largest = np.split(network.cost_of(plans), 2)
    limit = allowed_cost(network, budget)
    fitting = int(np.searchsorted(smallest, limit, side="right"))
    filling = int(np.searchsorted(largest, limit * (1 - 2 * COST_TOLERANCE), side="left"))
    widest = int(choices[max(0, fitting - 1)])
    narrowest = int(choices[min(filling, len(choices) - 1)])
    start = max(proportion, minimum / width)
    return Room(
        proportion=proportion,
        start=start,
        low=min(start, max(start / LARGEST_MOVE, narrowest / width)),
        high=max(start, min(start * LARGEST_MOVE, widest / width)),
        widest=widest,
    )


def increment_costs(network: PrunableNetwork, widths: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n,) cost of one more width increment of each group (of the last one, where a group is whole)."""
    n, multiple = len(widths), network.multiple
    up = np.minimum((widths // multiple + 1) * multiple, network.channels)
    down = np.where(up > widths, widths, np.maximum((widths - 1) // multiple * multiple, network.minimum))
    plans = np.repeat(widths[None], 2 * n, axis=0)
    plans[np.arange(n), np.arange(n)] = up
    plans[n + np.arange(n), np.arange(n)] = down
    above, below = np.split(network.cost_of(plans), 2)
    return above - below


def decision_order(network: PrunableNetwork, widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) group indices in the order of decisions: descending cost of one increment (ties: forward order).

    The budget gives the last group: the one with the cheapest increments fills it best. At 10 % of U-Net-64's
    MACs (multiple 4) episodes of random actions end with 0.04 % of the budget unused, in forward order 3.6 %.
    """
    return np.argsort(-increment_costs(network, widths), kind="stable")
