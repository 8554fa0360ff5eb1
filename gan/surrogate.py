"""A surrogate of finetuning: what plans that were finetuned say about plans that were not.

Scores before finetuning see what a plan can do now, not what it can learn. A few dozen plans that were
finetuned for real (``experiments/survey.py``) are enough for a Gaussian process to tell which shapes recover.
It sees the widths of the generator, and how the slice has rearranged the dense outputs' neighbourhoods; what
other inputs are worth stands in docs/calibration.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gan.cost import CostKind, CostModel
from gan.errors import UserError
from gan.files import write_json
from gan.plans import Plan
from gan.runtime import require

FORMAT = 3
"""Raised when the file changes, or what is made of it."""
CAUTION = 0.5
"""Standard deviations that are added to a prediction: a search must not be drawn to what nobody has tried."""
FEWEST = 8
"""Finetuned plans below which nothing is fitted."""
SLACK = 0.1
"""A budget is one that has been searched if it is no more than this share of it away."""
SEEN_AGENTS = ("generator",)
"""Networks whose widths predictions are made from.

Those of the discriminator matter too little to be learned from a few dozen plans: they disturbed. Predictions
of 34 plans by 32 others had a Kendall's tau of 0.68 with them, and have 0.75 without; searches ran after
widths of the discriminator that finetuning did not care for.
"""
SEEN = ("arrangement_gap",)
"""Gaps that predictions are made from, beside the widths."""
FLOOR = 1e-4
"""Gaps below it count as it: their logarithm is taken."""


@dataclass(frozen=True)
class Example:
    """A plan whose end is known.

    Attributes:
        plan: its widths.
        gaps: of the plan before finetuning, by term.
        metric: what finetuning made of it, > 0, lower is better; averaged over the seeds.
    """

    plan: Plan
    gaps: Mapping[str, float]
    metric: float


@dataclass(frozen=True)
class Searched:
    """A budget at which searches were led by predictions, and what they found was finetuned.

    Predictions for random plans are one thing. A search looks for where they err in its favour: at 6 % of the
    MACs, where no found plan was among the examples, 2,000 evaluations led to one that was predicted to end
    20 % better than uniform and ended 14 % worse.

    Attributes:
        cost: what the budgets are a share of.
        budgets: agent → keep ratio.
    """

    cost: str
    budgets: Mapping[str, float]

    def holds(self, cost: str, budgets: Mapping[str, tuple[float, float]]) -> bool:
        """True for about the same budgets (agent → smallest, largest) of the same cost."""
        return (
            cost == self.cost
            and budgets.keys() == self.budgets.keys()
            and all(
                self.budgets[agent] * (1 - SLACK) <= low and high <= self.budgets[agent] * (1 + SLACK)
                for agent, (low, high) in budgets.items()
            )
        )


@dataclass(frozen=True)
class Scope:
    """What the examples have in common: a surrogate says nothing about other plans.

    Attributes:
        weights: hash of the file of elastic weights that the plans were cut from.
        metric: name of the figure, with its extractor.
        formulas: version of the gaps.
    """

    weights: str
    metric: str
    formulas: str


def cautious(mean: float, deviation: float) -> float:
    """Gap of a prediction: mean plus ``CAUTION`` deviations of the log ratio; 0.1 is 10 % worse than dense.

    The only gap that may be below 0: finetuning can end better than the dense pair, and a search that is told
    no more than "as good" stops there.
    """
    return mean + CAUTION * deviation


class Surrogate:
    """Predicts the finetuned metric of a plan, as a log ratio to the dense pair's.

    A Gaussian process (scikit-learn) with a Matérn kernel (ν = 5/2) and a linear one on the standardised log
    keep ratios of the generator's groups and log gaps.

    Args:
        examples: plans that were finetuned, at least ``FEWEST``.
        dense: the metric of the dense pair, > 0.
        channels: agent → dense widths of its groups.
        terms: gaps that the process sees, in this order.
        scope: what the examples have in common.
        searched: budgets at which the predictions may lead a search.
        theta: log hyperparameters of the kernel; without them they are fitted to the marginal likelihood.

    Raises:
        UserError: too few examples, or a metric that is no positive number.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dense: float,
        channels: Mapping[str, Sequence[int]],
        terms: Sequence[str],
        scope: Scope,
        searched: Sequence[Searched] = (),
        theta: Sequence[float] | None = None,
    ) -> None:
        if len(examples) < FEWEST:
            raise UserError(
                f"a surrogate needs {FEWEST} finetuned plans or more; got {len(examples)}: finetune more"
            )
        values = [dense, *(example.metric for example in examples)]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"a surrogate predicts the log of a metric, which must be above 0; got {values}")
        self.examples, self.dense, self.terms, self.scope = tuple(examples), dense, tuple(terms), scope
        self.searched = tuple(searched)
        self.channels = {agent: tuple(widths) for agent, widths in channels.items()}
        self._inputs = np.array([self._features(example.plan, example.gaps) for example in examples])
        self._answers = np.array([math.log(example.metric / dense) for example in examples])
        self._centre = self._inputs.mean(axis=0)
        self._unit = np.maximum(self._inputs.std(axis=0), 1e-6)
        self._process = self._fit(np.ones(len(examples), dtype=bool), theta)
        self.theta = tuple(float(value) for value in self._process.kernel_.theta)

    @classmethod
    def fitted(
        cls,
        plans: Sequence[Plan],
        gaps: Sequence[Mapping[str, float]],
        metrics: Sequence[float],
        dense: float,
        channels: Mapping[str, Sequence[int]],
        scope: Scope,
        searched: Sequence[Searched] = (),
    ) -> Surrogate:
        """Fitted to finetuned plans: their gaps before and their metrics after, and what predictions see."""
        examples = [
            Example(plan, {term: row[term] for term in SEEN}, metric)
            for plan, row, metric in zip(plans, gaps, metrics, strict=True)
        ]
        return cls(examples, dense, channels, SEEN, scope, searched)

    def _features(self, plan: Plan, gaps: Mapping[str, float]) -> NDArray[np.float64]:
        """(groups + terms,) log keep ratios of the networks that are seen, and log gaps."""
        ratios = [
            width / channels
            for agent in SEEN_AGENTS
            for width, channels in zip(plan[agent], self.channels[agent], strict=True)
        ]
        return np.log([*ratios, *(max(gaps[term], FLOOR) for term in self.terms)])

    def _fit(self, rows: NDArray[np.bool_], theta: Sequence[float] | None) -> Any:
        processes = require("sklearn.gaussian_process")
        kernels = require("sklearn.gaussian_process.kernels")
        kernel = (
            kernels.ConstantKernel(1.0) * kernels.Matern(5.0, (0.5, 100.0), nu=2.5)
            + kernels.ConstantKernel(0.1) * kernels.DotProduct(1.0, "fixed")
            + kernels.WhiteKernel(0.05, (1e-3, 1.0))
        )
        optimizer: str | None = "fmin_l_bfgs_b"
        if theta is not None:
            kernel, optimizer = kernel.clone_with_theta(np.array(theta)), None
        process = processes.GaussianProcessRegressor(kernel, optimizer=optimizer, normalize_y=True)
        with warnings.catch_warnings():  # hyperparameters at their bounds are no reason to worry a user
            warnings.simplefilter("ignore")
            return process.fit((self._inputs[rows] - self._centre) / self._unit, self._answers[rows])

    def predict(self, plan: Plan, gaps: Mapping[str, float]) -> tuple[float, float]:
        """Mean and standard deviation of the log of the finetuned metric over the dense pair's.

        Args:
            plan: of the scope.
            gaps: of the plan before finetuning; those in ``terms`` are read.
        """
        return self._predict(self._process, plan, gaps)

    def _predict(self, process: Any, plan: Plan, gaps: Mapping[str, float]) -> tuple[float, float]:
        inputs = (self._features(plan, gaps) - self._centre) / self._unit
        mean, deviation = process.predict(inputs[None], return_std=True)
        return float(mean[0]), float(deviation[0])

    def gap(self, plan: Plan, gaps: Mapping[str, float]) -> float:
        """How much worse than the dense pair the finetuned plan is predicted to be: :func:`cautious`."""
        return cautious(*self.predict(plan, gaps))

    def reach(self, costs: Mapping[str, CostModel], kind: CostKind) -> dict[str, tuple[float, float]]:
        """Agent → smallest and largest share of its dense cost among the examples.

        Args:
            costs: agent → cost model of its network.
            kind: of the cost; latency needs models with tables.
        """
        shares = {}
        for agent, model in costs.items():
            widths = np.array([example.plan[agent] for example in self.examples], dtype=np.int64)
            found = model.of(kind, widths) / model.of(kind, model.dense)
            shares[agent] = float(found.min()), float(found.max())
        return shares

    def covers(self, cost: str, budgets: Mapping[str, tuple[float, float]]) -> bool:
        """True where the predictions may lead a search: agent → smallest and largest keep ratio."""
        return any(one.holds(cost, budgets) for one in self.searched)

    def fit_for(
        self, path: Path, channels: Mapping[str, Sequence[int]], weights: str, formulas: str
    ) -> Surrogate:
        """Itself, where it was fitted to plans of these networks.

        Args:
            path: where it was read from, to be named.
            channels: agent → dense widths of its groups.
            weights, formulas: see :class:`Scope`.

        Raises:
            UserError: it was fitted to plans of others.
        """
        wanted = {agent: tuple(widths) for agent, widths in channels.items()}
        if (wanted, weights, formulas) != (self.channels, self.scope.weights, self.scope.formulas):
            raise UserError(
                f"the predictions of {path} are for other networks, elastic weights or formulas than this "
                "study; use those of its task"
            )
        return self

    def leave_one_out(self) -> list[tuple[float, float]]:
        """What the process says of each example when it has not seen it."""
        places = np.arange(len(self.examples))
        return [self.leave_out(places == place)[0] for place in places]

    def leave_out(self, rows: NDArray[np.bool_]) -> list[tuple[float, float]]:
        """What the process says of some examples when it has seen none of them, nor fitted to them.

        Args:
            rows: (examples,) true for those that are left out; not all of them.
        """
        process = self._fit(~rows, None)
        left = [example for example, out in zip(self.examples, rows, strict=True) if out]
        return [self._predict(process, example.plan, example.gaps) for example in left]

    @property
    def fingerprint(self) -> str:
        """Changes when a prediction may change."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` reads it back."""
        scope = self.scope
        return {
            "format": FORMAT,
            "scope": {
                "weights": scope.weights,
                "metric": scope.metric,
                "formulas": scope.formulas,
            },
            "searched": [{"cost": one.cost, "budgets": dict(one.budgets)} for one in self.searched],
            "dense": self.dense,
            "channels": {agent: list(widths) for agent, widths in self.channels.items()},
            "terms": list(self.terms),
            "theta": list(self.theta),
            "examples": [
                {
                    "plan": example.plan.to_dict(),
                    "gaps": {term: example.gaps[term] for term in self.terms},
                    "metric": example.metric,
                }
                for example in self.examples
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Surrogate:
        """Read :meth:`to_dict` back."""
        examples = [
            Example(Plan.from_dict(entry["plan"]), dict(entry["gaps"]), float(entry["metric"]))
            for entry in data["examples"]
        ]
        scope = Scope(**data["scope"])
        searched = [Searched(one["cost"], dict(one["budgets"])) for one in data["searched"]]
        return cls(examples, data["dense"], data["channels"], data["terms"], scope, searched, data["theta"])

    def save(self, path: Path) -> Path:
        """Write it as JSON: the examples themselves, no pickle."""
        write_json(path, self.to_dict())
        return path


def load_surrogate(path: Path) -> Surrogate:
    """Read :meth:`Surrogate.save` back.

    Raises:
        UserError: missing or damaged file, or one of another format.
    """
    if not path.is_file():
        raise UserError(f"there is no surrogate at {path}; make one with experiments/survey.py")
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, not {FORMAT}")
        return Surrogate.from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the surrogate {path} is damaged ({error}); make it again with experiments/survey.py"
        ) from error
