"""Both directions of an unpaired translator at once: four networks, one plan.

What a program does with one direction or with both, it does for each of ``task.ways``: ``""`` names the only
direction of a task, ``A`` and ``B`` those of a translator. Plans, weights and budgets are by agent, for all
networks; :func:`part_of` and :func:`share_of` give a direction's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gan.cost import CostKind
from gan.cyclegan import (
    DIRECTIONS,
    TWO_WAY_TASKS,
    CycleOptions,
    CycleTrainer,
    Direction,
    Translator,
    agent_of,
)
from gan.data import UnpairedImages
from gan.elastic import ElasticNetwork
from gan.errors import UserError, unknown
from gan.evaluations import PlanScorer, PrunableNetwork, Scores
from gan.latency import LatencyTable
from gan.loop import TrainingProgress, trainable_copy
from gan.own_two_way import AnyOwn, OwnTwoWay
from gan.plans import Plan
from gan.surrogate import Surrogate
from gan.task_folder import find_both
from gan.tasks import AGENTS, Start, Task, load_task, own_task

T = TypeVar("T")
Pair = tuple[nn.Module, nn.Module]
FOUR_AGENTS = tuple(f"{agent}_{way}" for agent in AGENTS for way in DIRECTIONS)
"""Generators first."""


def share_of(values: Mapping[str, T], way: str) -> dict[str, T]:
    """What belongs to one direction: agent → value becomes ``generator`` and ``discriminator`` → value."""
    return {kind: values[agent_of(kind, way)] for kind in AGENTS}


def by_agent(ways: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The inverse of :func:`share_of` for all directions: agent → value, generators first."""
    return {agent_of(kind, way): values[kind] for kind in AGENTS for way, values in ways.items()}


def part_of(plan: Plan, way: str) -> Plan:
    """One direction of a plan: a plan for ``generator`` and ``discriminator``."""
    return Plan.of({kind: plan[agent_of(kind, way)] for kind in AGENTS}, plan.ranking)


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
        self._networks = by_agent({way: scorer.networks for way, scorer in self.ways.items()})

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
        name: key of ``TWO_WAY_TASKS``, or the name of the user's image folder.
        ways: direction → its task; each one's ``back`` is the generator of the other.
        folder: task folder of a user's own networks, absolute; None for embedded tasks.
    """

    name: str
    ways: Mapping[Direction, Task]
    folder: Path | None = None

    @property
    def reference(self) -> str:
        """What :func:`load_any_task` loads this task by."""
        return self.name if self.folder is None else str(self.folder)

    @property
    def device(self) -> torch.device:
        return self.ways["A"].device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Agent → dense network, generators first."""
        return by_agent({way: task.networks for way, task in self.ways.items()})

    @property
    def images(self) -> UnpairedImages:
        """To train on."""
        return UnpairedImages.of(self.ways["A"].train)

    @property
    def latency(self) -> dict[str, LatencyTable] | None:
        """Agent → measured table of its latency, or None."""
        tables: dict[str, Mapping[str, LatencyTable]] = {
            way: task.latency for way, task in self.ways.items() if task.latency is not None
        }
        return by_agent(tables) if len(tables) == len(self.ways) else None

    def with_latency(self, tables: Mapping[str, LatencyTable] | None = None) -> TwoWayTask:
        """The same task with latency tables by agent: the given ones, or measured now."""
        ways = {
            way: task.with_latency(None if tables is None else share_of(tables, way))
            for way, task in self.ways.items()
        }
        return replace(self, ways=ways)

    def ordered(self) -> dict[str, ElasticNetwork]:
        """Agent → the dense weights with their channels in order of importance."""
        return by_agent({way: task.ordered() for way, task in self.ways.items()})

    def shipped_elastic(self) -> dict[str, ElasticNetwork]:
        """Agent → the elastic weights that come with its direction.

        Raises:
            UserError: there are none, or they belong to another dense pair.
        """
        return by_agent({way: task.shipped_elastic() for way, task in self.ways.items()})

    def surrogate(self, cost: CostKind, budgets: Mapping[str, tuple[float, float]]) -> Surrogate | None:
        """Predictions of finetuned results are made for one direction: there are none for both."""
        return None

    def scorer(
        self,
        cost: CostKind,
        start: Start = "elastic",
        *,
        weights: Mapping[str, ElasticNetwork] | None = None,
        surrogate: None = None,
        **more: Any,
    ) -> TwoWayScorer:
        """A scorer on the val images of both directions.

        Args:
            cost, start, more: as of :meth:`gan.tasks.Task.scorer`, for each direction.
            weights: agent → elastic weights; those that come with the directions by default.
            surrogate: None; see :meth:`surrogate`.
        """
        given = {way: None if weights is None else share_of(weights, way) for way in self.ways}
        return TwoWayScorer(
            {way: task.scorer(cost, start, weights=given[way], **more) for way, task in self.ways.items()}
        )

    def finetune(
        self,
        pairs: Mapping[str, Pair],
        options: CycleOptions,
        on_epoch: Callable[[TrainingProgress], bool | None] | None = None,
        images: int | None = None,
    ) -> dict[str, Pair]:
        """Train pruned networks of both directions on, each against the other and taught by its dense twin.

        Seeds torch's own generator, which dropout draws from.

        Args:
            pairs: direction → (generator, discriminator); copied, not changed.
            options: of the training.
            on_epoch: see :meth:`gan.loop.Trainer.fit`.
            images: train on so many of each domain, spread evenly; None = all.
        """
        translators = {
            way: Translator(*(trainable_copy(network, options.amp) for network in pairs[way]))
            for way in DIRECTIONS
        }
        torch.manual_seed(options.seed)
        teachers = {way: task.networks["generator"] for way, task in self.ways.items()}
        trainer = CycleTrainer(translators, options, teachers)
        result = trainer.fit(self.images.take(images), on_epoch)
        return {str(way): pair for way, pair in trainer.pairs(result).items()}


AnyTask = Task | TwoWayTask


def cut(task: AnyTask, weights: Mapping[str, ElasticNetwork], plan: Plan) -> dict[str, Pair]:
    """Direction → the networks of a plan, cut out for real.

    Args:
        task: with one direction or both.
        weights: agent → what they are cut from.
        plan: widths of all of its networks.
    """
    return {way: one.cut(share_of(weights, way), part_of(plan, way)) for way, one in task.ways.items()}


def direction_of(task: AnyTask, agent: str) -> tuple[Task, str]:
    """The direction that a network belongs to, and which of its two it is: of ``generator_A`` ``generator``.

    Raises:
        UserError: the task has no such network.
    """
    places = {agent_of(kind, way): (one, kind) for way, one in task.ways.items() for kind in AGENTS}
    if agent not in places:
        raise unknown(f"network of {task.name}", agent, places)
    return places[agent]


def own_any_task(own: AnyOwn, device: str = "cpu") -> AnyTask:
    """A user's own networks and images as a task of one direction or both, before they are written.

    Args:
        own: as made.
        device: where the networks run.
    """
    if not isinstance(own, OwnTwoWay):
        return own_task(own, device)
    return TwoWayTask(own.name, {way: own_task(one, device) for way, one in own.ways.items()})


def load_two_way(name: str, device: str = "cpu") -> TwoWayTask:
    """Both directions of a translator: an embedded one, or a user's own.

    Args:
        name: key of ``TWO_WAY_TASKS``; or a task folder, or the folder of a run with networks of the user's.
        device: where the networks run.

    Raises:
        UserError: unknown name, networks that do not fit together, or files that are missing or damaged.
    """
    both = find_both(name)
    if both is None:
        raise unknown("task of two directions", name, TWO_WAY_TASKS)
    first, second = (load_task(part, device) for part in both.ways)
    if first.back is None or second.back is None:
        raise UserError(f"task {name!r} needs two unpaired directions")
    folder = None if both.folder is None else both.folder.resolve()
    return TwoWayTask(both.name, {"A": first, "B": second}, folder)


def load_any_task(name: str, device: str = "cpu") -> AnyTask:
    """A task by its name, with one direction or both; see :func:`gan.tasks.load_task`."""
    return load_task(name, device) if find_both(name) is None else load_two_way(name, device)
