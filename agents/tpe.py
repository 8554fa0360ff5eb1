"""The tree-structured Parzen estimator of optuna as a direct search; the only file that imports it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import create_trial

from agents.base import read_options
from agents.search import DirectSearch, Optimiser, Points, check_sigma
from gan.errors import UserError


@dataclass(frozen=True)
class TpeOptions:
    """Options of :class:`Tpe`.

    Attributes:
        sigma: standard deviation of the first plans' log proportions around the start.
        reach: log proportions lie within ± this of the start, > 0; one decision of an agent moves by 1.1.
        first: plans drawn before the estimator decides, ≥ 1.
        candidates: draws from the good plans' density, of which the likeliest is taken, ≥ 1.
        multivariate: one density over all groups, or one for each group by itself.
        discriminator: search the discriminators too; else they stay uniform.
    """

    sigma: float = 0.3
    reach: float = 1.5
    first: int = 10
    candidates: int = 24
    multivariate: bool = True
    discriminator: bool = True

    def __post_init__(self) -> None:
        check_sigma(self.sigma)
        if not 0 < self.reach < math.inf:
            raise UserError(f"reach is {self.reach}; it must be above 0 and finite")
        for name in ("first", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")


class Tpe(DirectSearch):
    """TPE: one density of the good plans so far, one of the others; the next plan is where they differ most.

    Bergstra, Bardenet, Bengio and Kégl, "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011. It
    remembers every plan, so it is never started anew, and it asks for one plan at a time: where budgets are
    ranges, potentials of different budgets meet in it, each in the unit of its budget.

    Args:
        seed: of the plans and of the budgets that are drawn.
        tensorboard: folder for event files; None writes none.
        options: fields of :class:`TpeOptions`.
    """

    restarts = False

    def __init__(self, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> None:
        super().__init__("tpe", seed, tensorboard)
        self.options = read_options(TpeOptions, self.name, options)
        self.discriminator = self.options.discriminator

    def start(self, point: Points, rng: np.random.Generator, restart: int) -> Optimiser:
        return ParzenEstimator(point, self._potential, self.options, rng)


class ParzenEstimator:
    """An optuna study with randomness of its own, which says and writes nothing.

    Args:
        point: (n,) the start.
        value: its value, known already.
        options: of the search.
        rng: all of its randomness.
    """

    finished = False

    def __init__(self, point: Points, value: float, options: TpeOptions, rng: np.random.Generator) -> None:
        self._start, self._options, self._rng = point, options, rng
        self._left = options.first
        self._space: dict[str, BaseDistribution] = {
            f"{i:03d}": FloatDistribution(-options.reach, options.reach) for i in range(len(point))
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # a new study is news at the level INFO
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of ``multivariate``
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=0,
                n_ei_candidates=options.candidates,
                multivariate=options.multivariate,
                seed=int(rng.integers(2**32)),
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._add(np.zeros(len(point)), value)

    def ask(self) -> Points:
        """(1, n) the next point: a normal draw around the start to begin with, then the estimator's."""
        if self._left > 0:
            self._left -= 1
            step = self._rng.normal(0.0, self._options.sigma, len(self._start))
        else:
            trial = self._study.ask(self._space)
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # ``tell`` adds it with its value
            step = np.array([trial.params[name] for name in self._space])
        reach = self._options.reach
        return (self._start + np.clip(step, -reach, reach))[None]

    def tell(self, points: Points, values: Points) -> None:
        for point, value in zip(points - self._start, values, strict=True):
            self._add(np.clip(point, -self._options.reach, self._options.reach), float(value))

    def _add(self, step: Points, value: float) -> None:
        parameters = dict(zip(self._space, step.tolist(), strict=True))
        self._study.add_trial(create_trial(params=parameters, distributions=self._space, value=value))
