"""Direct searches: black-box optimisers of the log proportions of all channel groups at once.

The only file that imports ``cma``.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cma
import numpy as np
from numpy.typing import NDArray

from agents.base import check_limited, read_description, read_options, resolve_budgets, write_description
from agents.tensorboard import EpisodeLog
from envs.pruning_env import PruningEnv
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from gan.plans import Plan

Points = NDArray[np.float64]

FARTHEST = 12.0
"""Log proportions are cut off at ± this: one multiple against a whole group of 10⁵ channels. Beyond, plans no
longer change, and exp would leave the floats if an optimiser diverged."""


@dataclass(frozen=True)
class CmaEsOptions:
    """Options of :class:`CmaEs`.

    Attributes:
        sigma: first step, in standard deviations of the log proportions.
        population: plans in a generation; 0 takes cma's 4 + 3 ln(groups).
        growth: factor of the population at every restart; 2 is IPOP, 1 restarts as it began.
        discriminator: search the discriminators too; else they stay uniform.
    """

    sigma: float = 0.3
    population: int = 0
    growth: float = 2.0
    discriminator: bool = True

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if self.population != 0 and self.population < 4:
            raise UserError(
                f"population is {self.population}; a generation needs 4 plans or more, 0 takes cma's default"
            )
        if not 1 <= self.growth < math.inf:
            raise UserError(f"growth is {self.growth}; a population is multiplied by 1 or more at a restart")


@dataclass(frozen=True)
class EvolutionOptions:
    """Options of :class:`Evolution`.

    Attributes:
        sigma: first step of a mutation, in standard deviations of the log proportions.
        parents: plans that survive a generation (mu).
        children: new plans in a generation (lambda).
        crossover: share of the children that have two parents, in [0, 1].
        discriminator: search the discriminators too; else they stay uniform.
    """

    sigma: float = 0.3
    parents: int = 4
    children: int = 8
    crossover: float = 0.5
    discriminator: bool = True

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if not 0 <= self.crossover <= 1:
            raise UserError(f"crossover is {self.crossover}; it is a share of the children, from 0 to 1")
        for name in ("parents", "children"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")


def check_sigma(sigma: float) -> None:
    """Refuse a first step that is no positive finite number.

    Raises:
        UserError: with what came.
    """
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma is {sigma}; the first step must be above 0 and finite")


class Optimiser(Protocol):
    """Generations of points: ask, score, tell. Larger values are better."""

    @property
    def finished(self) -> bool:
        """True when it cannot make progress any more."""

    def ask(self) -> Points:
        """(k, n) the next generation."""

    def tell(self, points: Points, values: Points) -> None:
        """The values (k,) of the points (k, n) that ``ask`` gave."""


class Coordinates:
    """Where the log proportions of each searched network stand in a point.

    Args:
        networks: agent → network.
        discriminator: False leaves the discriminators out: they stay uniform.
    """

    def __init__(self, networks: Mapping[str, PrunableNetwork], discriminator: bool) -> None:
        self.groups = {agent: len(network.groups) for agent, network in networks.items()}
        self._places: dict[str, slice] = {}
        start = 0
        for agent, network in networks.items():
            if discriminator or network.kind != "discriminator":
                self._places[agent] = slice(start, start + self.groups[agent])
                start += self.groups[agent]
        # cma has no one-dimensional search; a single group has no choice, so a coordinate without a meaning
        # does no harm
        self.size = max(start, 2)

    def proportions(self, point: Points) -> dict[str, Points]:
        """Agent → (n,) proportions; the largest of a searched network is 1, all of another are 1."""
        proportions = {agent: np.ones(groups) for agent, groups in self.groups.items()}
        for agent, place in self._places.items():
            proportions[agent] = np.exp(np.maximum(point[place] - point[place].max(), -FARTHEST))
        return proportions

    def point(self, proportions: Mapping[str, Points]) -> Points:
        """The point (size,) of proportions, centred in each network: uniform is the origin."""
        point = np.zeros(self.size)
        for agent, place in self._places.items():
            logs = np.log(proportions[agent])
            point[place] = logs - logs.mean()
        return point


class DirectSearch(ABC):
    """What direct searches share: generations of plans until the evaluations are spent.

    The projection makes every point a feasible plan, so there are no constraints. Points that differ by less
    than a width increment are the same plan, which is no evaluation; so a search that has shrunk to known
    plans is started anew. Where budgets are ranges, a generation has one budget: its plans are compared with
    each other, and potentials are in the units of their budget.

    Args:
        name: in the registry.
        seed: of the points and of the budgets that are drawn.
        tensorboard: folder for event files; None writes none.

    Attributes:
        restarts: whether a generation of known plans starts the optimiser anew.
        discriminator: search the discriminators too; else they stay uniform.
    """

    restarts = True
    discriminator: bool

    def __init__(self, name: str, seed: int, tensorboard: Path | None) -> None:
        self.name = name
        self.seed = seed
        self.tensorboard = tensorboard
        self._best: dict[str, Points] | None = None  # None is uniform
        self._potential = 0.0

    @abstractmethod
    def start(self, point: Points, rng: np.random.Generator, restart: int) -> Optimiser:
        """A new optimiser around a point (n,).

        Args:
            point: where it starts.
            rng: all of its randomness.
            restart: how often the search has been started anew, from 0.
        """

    def learn(self, env: PruningEnv) -> None:
        """Search until the evaluations are spent, also in the middle of a generation.

        Starts at uniform, or at the best plan that an earlier call or :meth:`load` gave.
        """
        check_limited(env, self.name)
        rng = np.random.default_rng(self.seed)
        coordinates = Coordinates(env.scorer.networks, self.discriminator)
        origin = np.zeros(coordinates.size)
        if self._best is not None:
            self._check_networks(env)
            origin = coordinates.point(self._best)
        log = EpisodeLog(self.tensorboard)
        env.reset(seed=self.seed)
        restart = 0
        optimiser = self.start(origin, rng, restart)
        while not env.scorer.exhausted:
            spent = env.scorer.evaluations
            points = optimiser.ask()
            values = self._score(env, [coordinates.proportions(point) for point in points], log)
            if len(values) < len(points):
                break
            optimiser.tell(points, np.array(values))
            if self.restarts and (optimiser.finished or env.scorer.evaluations == spent):
                restart += 1
                optimiser = self.start(origin, rng, restart)
            env.reset()  # draws the next budgets, where they are ranges
        log.close()

    def _score(self, env: PruningEnv, generation: list[dict[str, Points]], log: EpisodeLog) -> list[float]:
        """Potentials, one per plan; fewer where the evaluations end before the generation."""
        values: list[float] = []
        for proportions in generation:
            if env.scorer.exhausted:
                break
            evaluation = env.evaluate(env.plan_from_proportions(proportions))
            values.append(evaluation.potential)
            if evaluation.potential > self._potential:
                self._potential, self._best = evaluation.potential, proportions
            log.record(env.scorer.evaluations, evaluation.potential, evaluation.term_scores)
        return values

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The best proportions it has seen, uniform among them, projected to the budget.

        Where budgets were drawn, each potential is in the units of its own budget: the best is then a guess.

        Raises:
            UserError: if they are of other networks.
        """
        if self._best is None:
            return env.uniform_plan(budgets)
        self._check_networks(env)
        return env.plan_from_proportions(self._best, resolve_budgets(env, budgets))

    def _check_networks(self, env: PruningEnv) -> None:
        groups = {agent: len(network.groups) for agent, network in env.scorer.networks.items()}
        mine = {agent: len(row) for agent, row in (self._best or {}).items()}
        if mine != groups:
            raise UserError(
                f"the {self.name} plan is for networks of {mine} groups; the environment has {groups}"
            )

    def save(self, folder: Path) -> None:
        best = None if self._best is None else {agent: row.tolist() for agent, row in self._best.items()}
        content = {"seed": self.seed, "potential": self._potential, "proportions": best}
        write_description(folder, self.name, content)

    def load(self, folder: Path) -> None:
        content = read_description(folder, self.name)
        try:
            found = content["proportions"]
            best = found and {agent: np.array(row, dtype=np.float64) for agent, row in found.items()}
            potential = float(content["potential"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder} holds no plan of a {self.name} search ({error}); search again"
            ) from error
        self._best, self._potential = best, potential


class CmaEs(DirectSearch):
    """CMA-ES: a normal distribution of log proportions that learns its mean, step and correlations.

    Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772; restarts with a growing population
    (IPOP) from Auger and Hansen, "A Restart CMA Evolution Strategy With Increasing Population Size", CEC
    2005.

    Args:
        seed: of the plans and of the budgets that are drawn.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`CmaEsOptions`.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        super().__init__("cma-es", seed, tensorboard)
        self.options = read_options(CmaEsOptions, self.name, options)
        self.discriminator = self.options.discriminator

    def start(self, point: Points, rng: np.random.Generator, restart: int) -> Optimiser:
        first = self.options.population or 4 + int(3 * math.log(len(point)))
        population = round(first * self.options.growth**restart)
        return CmaStrategy(point, self.options.sigma, population, rng)


class CmaStrategy:
    """A strategy of the ``cma`` package with randomness of its own, which says and writes nothing.

    Args:
        point: (n,) the first mean, n ≥ 2.
        sigma: the first step.
        population: points in a generation, ≥ 4.
        rng: all of its randomness.
    """

    def __init__(self, point: Points, sigma: float, population: int, rng: np.random.Generator) -> None:
        options = {
            "popsize": population,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,  # any number would seed numpy's global generator
            "verbose": -10,  # above it reads options from a file in the working directory, if there is one
            "verb_log": 0,
        }
        with warnings.catch_warnings():  # its constructor changes the filters, and warns of its own defaults
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(point, sigma, options)

    @property
    def finished(self) -> bool:
        return bool(self._strategy.stop())

    def ask(self) -> Points:
        return np.array(self._strategy.ask())

    def tell(self, points: Points, values: Points) -> None:
        with warnings.catch_warnings():
            # flat generations are expected: widths are steps, and ``finished`` tells of them
            warnings.simplefilter("ignore")
            self._strategy.tell(list(points), (-values).tolist())


class Evolution(DirectSearch):
    """A plain (mu + lambda) evolution of log proportions whose steps evolve along.

    A child is a parent plus normal noise of the parent's step, which is multiplied by a log-normal number
    first; the best of parents and children survive (Beyer and Schwefel, "Evolution strategies: A
    comprehensive introduction", Natural Computing 2002). Without recombination and correlations: what CMA-ES
    has to beat.

    Args:
        seed: of the plans and of the budgets that are drawn.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`EvolutionOptions`.
    """

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        super().__init__("evolution", seed, tensorboard)
        self.options = read_options(EvolutionOptions, self.name, options)
        self.discriminator = self.options.discriminator

    def start(self, point: Points, rng: np.random.Generator, restart: int) -> Optimiser:
        options = self.options
        return PlusStrategy(point, options.sigma, options.parents, options.children, rng, options.crossover)


class PlusStrategy:
    """Points, each with a step of its own; see :class:`Evolution`.

    Args:
        point: (n,) the first parent.
        sigma: its step.
        parents: survivors of a generation, ≥ 1.
        children: points in a generation, ≥ 1.
        rng: all of its randomness.
        crossover: share of the children with two parents, in [0, 1].
    """

    finished = False
    """Its steps shrink without an end; a generation of known plans ends it."""

    def __init__(
        self,
        point: Points,
        sigma: float,
        parents: int,
        children: int,
        rng: np.random.Generator,
        crossover: float = 0.0,
    ) -> None:
        self._mu, self._children, self._rng, self._crossover = parents, children, rng, crossover
        self._points = point[None]
        # the origin has no value of its own: it is a parent until children with values replace it
        self._values = np.full(1, -math.inf)
        self._sigmas = np.full(1, sigma)
        self._asked = self._sigmas

    def ask(self) -> Points:
        parents = self._rng.integers(len(self._points), size=self._children)
        size = self._points.shape[1]
        # the usual learning rate of one step for all coordinates
        noise = self._rng.standard_normal(self._children) / math.sqrt(2 * size)
        self._asked = self._sigmas[parents] * np.exp(noise)
        steps = self._rng.standard_normal((self._children, size))
        return self._cross(parents) + self._asked[:, None] * steps

    def _cross(self, parents: NDArray[np.int64]) -> Points:
        """(k, n) where the children's mutations begin: at a parent, or at a mixture of two."""
        starts = self._points[parents]
        if not self._crossover:
            return starts
        others = self._points[self._rng.integers(len(self._points), size=len(parents))]
        crossed = self._rng.random(len(parents)) < self._crossover
        taken = self._rng.random(starts.shape) < 0.5
        return np.where(crossed[:, None] & taken, others, starts)

    def tell(self, points: Points, values: Points) -> None:
        everyone = np.concatenate([self._points, points])
        worth = np.concatenate([self._values, values])
        sigmas = np.concatenate([self._sigmas, self._asked])
        survivors = np.argsort(-worth, kind="stable")[: self._mu]
        self._points, self._values, self._sigmas = everyone[survivors], worth[survivors], sigmas[survivors]
