"""Searches that learn nothing: what every learner is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agents.base import check_limited, read_description, read_options, resolve_budgets, write_description
from agents.tensorboard import EpisodeLog
from envs.budget import allowed_cost, random_proportions
from envs.pruning_env import PruningEnv
from gan.errors import UserError, unknown
from gan.evaluations import PrunableNetwork
from gan.plans import Plan


class Uniform:
    """Every group of channels keeps the same share: what people do without a search.

    Args:
        seed: of the budgets that are drawn; nothing else is random.
        tensorboard: the same; one plan makes no curve.
        options: there are none.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        self.name = "uniform"
        self.seed = seed
        read_options(NoOptions, self.name, options)

    def learn(self, env: PruningEnv) -> None:
        """Score the uniform plan, so that a run has it in its log; there is nothing to learn."""
        env.reset(seed=self.seed)
        env.evaluate(env.uniform_plan())

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        return env.uniform_plan(budgets)

    def save(self, folder: Path) -> None:
        write_description(folder, self.name, {})

    def load(self, folder: Path) -> None:
        read_description(folder, self.name)


@dataclass(frozen=True)
class MagnitudeOptions:
    """Options of :class:`Magnitude`.

    Attributes:
        scale: what importance is measured in, before channels of different groups are compared: ``group``
            divides by the group's mean; ``none`` compares kernel weights as they are, which are the smaller
            the wider the layer.
    """

    scale: Literal["group", "none"] = "group"

    def __post_init__(self) -> None:
        if self.scale not in ("group", "none"):
            raise unknown("scale", str(self.scale), ("group", "none"))


class Magnitude:
    """One threshold on the importance of all channels of a network: what most pruning tools do globally.

    Every group keeps the channels whose importance (mean absolute kernel weight: Li et al., "Pruning Filters
    for Efficient ConvNets", ICLR 2017) is above the threshold; the smallest threshold whose plan meets the
    budget is taken, and the projection fills what rounding leaves. There is nothing to learn: one evaluation.

    Args:
        seed: of the budgets that are drawn; nothing else is random.
        tensorboard: the same; one plan makes no curve.
        options: fields of :class:`MagnitudeOptions`.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        self.name = "magnitude"
        self.seed = seed
        self.options = read_options(MagnitudeOptions, self.name, options)

    def learn(self, env: PruningEnv) -> None:
        """Score the rule's plan, so that a run has it in its log; there is nothing to learn."""
        env.reset(seed=self.seed)
        env.evaluate(self.propose(env))

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        budgets = resolve_budgets(env, budgets)
        proportions = {
            agent: threshold_proportions(network, budgets[agent], self.options.scale == "group")
            for agent, network in env.scorer.networks.items()
        }
        return env.plan_from_proportions(proportions, budgets)

    def save(self, folder: Path) -> None:
        write_description(folder, self.name, {"options": asdict(self.options)})

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        try:
            self.options = read_options(MagnitudeOptions, self.name, content["options"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder} holds no readable options ({error}); make the agent again") from error


def threshold_proportions(network: PrunableNetwork, budget: float, by_group: bool) -> NDArray[np.float64]:
    """(n,) shares of the channels above the smallest threshold that meets a budget, one channel at least.

    Args:
        network: its groups' importance, in descending order.
        budget: keep ratio of its cost.
        by_group: measure importance in means of its group.

    Raises:
        UserError: if a group has no importance.
    """
    rows = network.importance
    if len(rows) != len(network.groups):
        raise UserError(f"the {network.kind} carries no importance of its channels; take another learner")
    rows = tuple(row / row.mean() for row in rows) if by_group else rows
    thresholds = np.unique(np.concatenate(rows))  # ascending: each one keeps at most what the one before does
    kept = np.stack([np.searchsorted(-row, -thresholds, side="right") for row in rows], axis=1)
    costs = network.cost_of(np.maximum(kept, network.minimum))
    fits = np.flatnonzero(costs <= allowed_cost(network, budget))
    first = fits[0] if len(fits) else -1
    return np.maximum(kept[first], 1) / network.channels


@dataclass(frozen=True)
class NoOptions:
    """The options of an agent that has none."""


@dataclass(frozen=True)
class RandomOptions:
    """Options of :class:`RandomSearch`.

    Attributes:
        smallest_sigma: plans differ from uniform by at least this (standard deviation of log proportions).
        largest_sigma: and by at most this; log-uniform between, a new one for each plan.
    """

    smallest_sigma: float = 0.1
    largest_sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest_sigma <= self.largest_sigma < math.inf:
            raise UserError(f"sigmas must be 0 < smallest_sigma <= largest_sigma; got {self}")


class RandomSearch:
    """Independent random plans: log-normal proportions around uniform, projected to the budget.

    How far random plans should stray is not known beforehand (near uniform most are mediocre, far from it
    most are bad), so every plan draws its own sigma: a random search that needs no tuning is a fair one.

    Args:
        seed: of the plans and of the budgets that are drawn.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`RandomOptions`.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        self.name = "random"
        self.tensorboard = tensorboard
        self.seed = seed
        self.options = read_options(RandomOptions, self.name, options)
        self._best: dict[str, NDArray[np.float64]] | None = None
        self._potential = -math.inf

    def learn(self, env: PruningEnv) -> None:
        check_limited(env, self.name)
        rng = np.random.default_rng(self.seed)
        low, high = math.log(self.options.smallest_sigma), math.log(self.options.largest_sigma)
        log = EpisodeLog(self.tensorboard)
        env.reset(seed=self.seed)
        while not env.scorer.exhausted:
            sigma = math.exp(rng.uniform(low, high))
            proportions = {
                agent: random_proportions(network, rng, sigma)
                for agent, network in env.scorer.networks.items()
            }
            evaluation = env.evaluate(env.plan_from_proportions(proportions))
            if evaluation.potential > self._potential:
                self._potential, self._best = evaluation.potential, proportions
            log.record(env.scorer.evaluations, evaluation.potential, evaluation.term_scores)
            env.reset()  # draws the next budgets, where they are ranges
        log.close()

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The best proportions it has seen, projected to the budget.

        Where budgets were drawn, each potential is in the units of its own budget: the best is then a guess.

        Raises:
            UserError: if they are of other networks.
        """
        if self._best is None:
            return env.uniform_plan(budgets)
        groups = {agent: len(network.groups) for agent, network in env.scorer.networks.items()}
        mine = {agent: len(row) for agent, row in self._best.items()}
        if mine != groups:
            raise UserError(f"the random plan is for networks of {mine} groups; the environment has {groups}")
        return env.plan_from_proportions(self._best, resolve_budgets(env, budgets))

    def save(self, folder: Path) -> None:
        best = None if self._best is None else {agent: row.tolist() for agent, row in self._best.items()}
        potential = None if best is None else self._potential
        write_description(folder, self.name, {"seed": self.seed, "potential": potential, "proportions": best})

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        try:
            found = content["proportions"]
            best = found and {agent: np.array(row, dtype=np.float64) for agent, row in found.items()}
            potential = -math.inf if best is None else float(content["potential"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder} holds no plan of a random search ({error}); search again") from error
        self._best, self._potential = best, potential
