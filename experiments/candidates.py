"""Plans of equal cost to compare: uniform, near it, far from it, hand-made, and the best of finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.budget import Budget, kind_of, project, random_proportions, uniform_widths
from envs.checks import check_plan
from experiments.runs import RunFolder, open_run, read_json
from gan.errors import UserError
from gan.evaluations import PrunableNetwork
from gan.groups import ChannelGroup
from gan.plans import Plan

SIGMAS = (0.15, 1.0)
"""Range of the standard deviation of a drawn plan's log proportions: from near uniform to far from it."""
WAVES = 3
"""Cosines of a smooth profile: half a wave over the depth, a whole one, one and a half."""
DISCRIMINATOR_EVERY = 3
"""One drawn plan in three has a random discriminator, the others the uniform one."""
TRIES = 200
"""Draws of a plan before the budget is said to hold no more of them."""

SHAPES: dict[str, tuple[float, ...]] = {
    "narrow_bottleneck": (1.0, 1.0, 1.0, 0.7, 0.3, 0.3),
    "wide_ends": (2.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    "pyramid": (3.0, 2.0, 1.3, 0.8, 0.45, 0.3),
    "steep": (4.0, 3.0, 2.0, 1.0, 0.3, 0.15),
}
"""Name → proportions from the generator's largest maps to its smallest, at equal steps of the log resolution.

What a person would try: keep more where the maps are large. The factors are those of a U-Net of six levels,
a value per level; in between they are interpolated in the log. Only ratios matter."""


@dataclass(frozen=True)
class NamedPlan:
    """A plan of the study.

    Attributes:
        label: unique in the study.
        kind: ``uniform``, ``iid``, ``smooth`` or ``found``.
        plan: its widths.
    """

    label: str
    kind: str
    plan: Plan


def smooth_proportions(groups: int, rng: np.random.Generator, sigma: float) -> NDArray[np.float64]:
    """(groups,) proportions whose logs are a few slow cosines over the depth, with standard deviation σ.

    So wide ends with a narrow middle and the reverse occur, which independent draws hardly give.
    """
    place = (np.arange(groups) + 0.5) / groups
    waves = np.arange(1, WAVES + 1)
    profile = (rng.standard_normal(WAVES) / waves) @ np.cos(np.pi * waves[:, None] * place)
    spread = float(profile.std())
    return np.exp(sigma * profile / spread) if spread > 0 else np.ones(groups)


def shape_proportions(name: str, groups: Sequence[ChannelGroup]) -> NDArray[np.float64]:
    """Proportions of a hand-made shape for any generator.

    A group stands at t = log(R / r) / log(R / r_min), where r is the height of its map and R and r_min are
    the largest and the smallest of the network: 0 at the ends of a U-Net, 1 at its bottleneck and in the
    residual blocks of a ResNet.

    Args:
        name: key of ``SHAPES``.
        groups: n groups of the generator.

    Returns:
        (n,) proportions, the largest 1. All 1 where every map has the same height.
    """
    heights = np.array([group.resolution for group in groups], dtype=np.float64)
    depth = np.log(heights.max() / heights)
    place = depth / depth.max() if depth.max() > 0 else depth
    knots = np.array(SHAPES[name])
    logs = np.interp(place, np.linspace(0.0, 1.0, len(knots)), np.log(knots))
    return np.exp(logs - logs.max())


def draw_plans(
    networks: Mapping[str, PrunableNetwork],
    budgets: Mapping[str, float],
    count: int,
    rng: np.random.Generator,
    ranking: str,
) -> list[NamedPlan]:
    """The uniform plan and ``count − 1`` other plans that fill the same budget.

    Odd ones have independent log-normal proportions, even ones smooth profiles; the sigma is drawn
    log-uniformly from ``SIGMAS``. The discriminator is uniform in all but every third.

    Raises:
        UserError: the budget admits fewer plans.
    """
    uniform = {agent: uniform_widths(network, budgets[agent]) for agent, network in networks.items()}
    plans = [NamedPlan("uniform", "uniform", Plan.of(uniform, ranking))]
    known = {plans[0].plan.key}
    for number in range(1, count):
        for _ in range(TRIES):
            drawn = draw_plan(networks, budgets, number, rng, ranking)
            if drawn.plan.key not in known:
                break
        else:
            raise UserError(
                f"only {len(plans)} different plans were found at this budget, not {count}; "
                "take fewer --plans or a larger --budget"
            )
        known.add(drawn.plan.key)
        plans.append(drawn)
    return plans


def draw_plan(
    networks: Mapping[str, PrunableNetwork],
    budgets: Mapping[str, float],
    number: int,
    rng: np.random.Generator,
    ranking: str,
) -> NamedPlan:
    """A random plan that fills a budget; the number decides its kind and whether D is uniform."""
    kind = "iid" if number % 2 else "smooth"
    widths = {}
    for agent, network in networks.items():
        sigma = float(np.exp(rng.uniform(*np.log(SIGMAS))))
        if kind_of(agent) == "generator":
            proportions = (
                random_proportions(network, rng, sigma)
                if kind == "iid"
                else smooth_proportions(len(network.groups), rng, sigma)
            )
        elif number % DISCRIMINATOR_EVERY == 0:
            proportions = random_proportions(network, rng, sigma)
        else:
            proportions = np.ones(len(network.groups))
        widths[agent] = project(network, proportions, budgets[agent]).widths
    return NamedPlan(f"{kind}-{number:02d}", kind, Plan.of(widths, ranking))


def draw_over_range(
    networks: Mapping[str, PrunableNetwork],
    budgets: Mapping[str, Budget],
    count: int,
    rng: np.random.Generator,
    ranking: str,
) -> list[NamedPlan]:
    """``count`` random plans, each at budgets of its own, drawn log-uniformly from the ranges.

    Their draws are stratified: the generator's budgets are the middles of ``count`` equal steps of the log
    range in random order, so that a few dozen plans leave no gap.
    """
    places = (rng.permutation(count) + 0.5) / count
    plans = []
    for number in range(count):
        shares = {
            agent: budget.at(float(places[number]) if kind_of(agent) == "generator" else float(rng.random()))
            for agent, budget in budgets.items()
        }
        plans.append(draw_plan(networks, shares, number, rng, ranking))
    return plans


def best_of_run(path: Path) -> tuple[RunFolder, Mapping[str, Any], Any]:
    """A run's folder, its options, and what it holds as its best plan.

    Raises:
        UserError: no run, or no plan yet.
    """
    folder = open_run(path)
    if not folder.plan.is_file():
        raise UserError(f"the run {path} has no plan.json yet; finish it, or leave it out of --found")
    plans = read_json(folder.plan)
    return folder, read_json(folder.options), plans.get("best") if isinstance(plans, dict) else None


def found_plans(
    paths: Sequence[Path], task: str, networks: Mapping[str, PrunableNetwork], budgets: Mapping[str, float]
) -> dict[str, Plan]:
    """Label → best plan of a run, for several runs; see :func:`found_plan`.

    Raises:
        UserError: as there, or two runs of one name.
    """
    found = [found_plan(path, task, networks, budgets) for path in paths]
    if len({named.label for named in found}) < len(found):
        raise UserError("--found names two runs of one name; rename the folder of one of them")
    return {named.label: named.plan for named in found}


def found_plan(
    path: Path, task: str, networks: Mapping[str, PrunableNetwork], budgets: Mapping[str, float]
) -> NamedPlan:
    """The best plan of a run.

    Args:
        path: the run's folder.
        task: the study's task.
        networks: its networks, with the cost that budgets speak of.
        budgets: agent → keep ratio.

    Raises:
        UserError: no run, no plan yet, or one of another task, cost or budget.
    """
    folder, options, best = best_of_run(path)
    if options.get("task") != task:
        raise UserError(f"the run {path} is of task {options.get('task')!r}; this study is of {task!r}")
    cost = next(iter(networks.values())).cost_kind
    if options.get("cost", cost) != cost:
        raise UserError(f"the run {path} has a budget of {options['cost']}; this study of {cost}")
    try:
        plan, at = Plan.from_dict(best), {agent: float(best["budgets"][agent]) for agent in budgets}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder.plan} holds no best plan ({error}); make the run again") from error
    if any(not math.isclose(at[agent], budget, rel_tol=1e-9) for agent, budget in budgets.items()):
        given, wanted = (
            ", ".join(f"{agent} {share:g}" for agent, share in shares.items()) for shares in (at, budgets)
        )
        raise UserError(f"the best plan of {path} is for the budget {given}; this study is for {wanted}")
    try:
        check_plan(plan, networks, budgets)
    except ValueError as error:
        raise UserError(f"the best plan of {path} does not fit task {task!r}: {error}") from error
    return NamedPlan(f"found:{path.name}", "found", plan)
