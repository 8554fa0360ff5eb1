"""Both directions of an unpaired translator at once: four networks, one plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gan.cost import CostKind
from gan.cyclegan import (
    DIRECTIONS,
    TWO_WAY_TASKS,
    CycleOptions,
    CycleTrainer,
    Direction,
    Translator,
)
from gan.data import UnpairedImages
from gan.elastic import ElasticNetwork
from gan.errors import UserError, unknown
from gan.evaluations import PlanScorer, PrunableNetwork, Scores
from gan.loop import TrainingProgress, trainable_copy
from gan.plans import Plan
from gan.surrogate import Surrogate
from gan.tasks import AGENTS, Start, Task, load_task

FOUR_AGENTS = tuple(f"{agent}_{way}" for agent in AGENTS for way in DIRECTIONS)
"""Generators first."""


def part_of(plan: Plan, way: Direction) -> Plan:
    """One direction of a plan for four networks: a plan for ``generator`` and ``discriminator``."""
    return Plan.of({agent: plan[f"{agent}_{way}"] for agent in AGENTS}, plan.ranking)


def joined(plans: Mapping[Direction, Plan]) -> Plan:
    """The plan for four networks of the plans of both directions.

    Raises:
        ValueError: they rank channels differently.
    """
    rankings = {plan.ranking for plan in plans.values()}
    if len(rankings) > 1:
        raise ValueError(f"both directions need one ranking of channels; these have {sorted(rankings)}")
    return Plan.of({f"{agent}_{way}": plans[way][agent] for agent in AGENTS for way in DIRECTIONS}, *rankings)


class TwoWayScorer:
    """A plan for four networks → the mean of both directions' gaps.

    Each direction is scored by a scorer of its own, on inputs of its own domain; the gaps of each stand among
    the diagnostics, as ``mmd_gap A``.

    Args:
        ways: direction → its scorer.
    """

    def __init__(self, ways: Mapping[Direction, PlanScorer]) -> None:
        self.ways = {way: ways[way] for way in DIRECTIONS}
        rankings = {scorer.ranking for scorer in self.ways.values()}
        if len(rankings) > 1:
            raise ValueError(f"both directions need one ranking of channels; these have {sorted(rankings)}")
        self._ranking = rankings.pop()
        self._networks = {
            f"{agent}_{way}": self.ways[way].networks[agent] for agent in AGENTS for way in DIRECTIONS
        }

    @property
    def networks(self) -> Mapping[str, PrunableNetwork]:
        return self._networks

    @property
    def ranking(self) -> str:
        return self._ranking

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {
            f"{name} {way}": value
            for way, scorer in self.ways.items()
            for name, value in scorer.fingerprint.items()
        }

    def score(self, plan: Plan) -> Scores:
        """All gaps of a plan; a direction whose networks did not change is answered by its scorer's cache."""
        found = {way: scorer.score(part_of(plan, way)) for way, scorer in self.ways.items()}
        gaps = {
            name: sum(scores.gaps[name] for scores in found.values()) / len(found) for name in found["A"].gaps
        }
        told = {
            f"{name} {way}": value
            for way, scores in found.items()
            for name, value in {**scores.gaps, **scores.diagnostics}.items()
        }
        return Scores(gaps, told)


@dataclass(frozen=True)
class TwoWayTask:
    """Both directions of a translator as one task.

    Attributes:
        name: key of ``TWO_WAY_TASKS``.
        ways: direction → its task; each one's ``back`` is the generator of the other.
    """

    name: str
    ways: Mapping[Direction, Task]

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Agent → dense network, generators first."""
        return {f"{agent}_{way}": self.ways[way].networks[agent] for agent in AGENTS for way in DIRECTIONS}

    @property
    def images(self) -> UnpairedImages:
        """To train on."""
        return UnpairedImages.of(self.ways["A"].train)

    def surrogate(self, cost: CostKind, budgets: Mapping[str, tuple[float, float]]) -> Surrogate | None:
        """Predictions of finetuned results are made for one direction: there are none for both."""
        return None

    def scorer(
        self, cost: CostKind, start: Start = "elastic", *, surrogate: None = None, **more: Any
    ) -> TwoWayScorer:
        """A scorer on the val images of both directions.

        Args:
            cost, start, more: as of :meth:`gan.tasks.Task.scorer`, for each direction.
            surrogate: None; see :meth:`surrogate`.
        """
        return TwoWayScorer({way: task.scorer(cost, start, **more) for way, task in self.ways.items()})

    def cut(
        self, weights: Mapping[Direction, Mapping[str, ElasticNetwork]], plan: Plan
    ) -> dict[Direction, tuple[nn.Module, nn.Module]]:
        """Direction → the networks of a plan, cut out for real."""
        return {way: task.cut(weights[way], part_of(plan, way)) for way, task in self.ways.items()}

    def finetune(
        self,
        pairs: Mapping[Direction, tuple[nn.Module, nn.Module]],
        options: CycleOptions,
        on_epoch: Callable[[TrainingProgress], bool | None] | None = None,
    ) -> dict[Direction, tuple[nn.Module, nn.Module]]:
        """Train pruned networks of both directions on, each against the other and taught by its dense twin.

        Args:
            pairs: direction → (generator, discriminator); copied, not changed.
            options: of the training.
            on_epoch: see :meth:`gan.loop.Trainer.fit`.
        """
        translators = {
            way: Translator(*(trainable_copy(network, options.amp) for network in pairs[way]))
            for way in DIRECTIONS
        }
        teachers = {way: task.networks["generator"] for way, task in self.ways.items()}
        trainer = CycleTrainer(translators, options, teachers)
        return trainer.pairs(trainer.fit(self.images, on_epoch))


def load_two_way(name: str, device: str = "cpu") -> TwoWayTask:
    """Both directions of an embedded translator.

    Raises:
        UserError: unknown name, networks that do not fit together, or files that are missing or damaged.
    """
    if name not in TWO_WAY_TASKS:
        raise unknown("task of two directions", name, TWO_WAY_TASKS)
    first, second = (load_task(part, device) for part in TWO_WAY_TASKS[name])
    if first.back is None or second.back is None:
        raise UserError(f"task {name!r} needs two unpaired directions")
    return TwoWayTask(name, {"A": first, "B": second})
