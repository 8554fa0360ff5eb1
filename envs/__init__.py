"""The pruning environment: plans as decisions, gaps as rewards.

``make_env`` gives a ready :class:`PruningEnv` (PettingZoo, parallel);
``gymnasium.make("envs:GanPruning-v0")`` the same as a single-controller Gymnasium environment,
``"envs:GanPruningToy-v0"`` an analytic one with a known optimum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import gymnasium

from envs.budget import Budget, budget_ends, default_budgets, parse_budgets
from envs.joint_env import JointPruningEnv
from envs.pruning_env import PruningEnv, Reward
from envs.records import Episode, Evaluation, Listener
from envs.rewards import Weights
from envs.toy import toy_env
from gan.cost import DEFAULT_COST, CostKind
from gan.evaluations import CountedScorer, EvaluationLog

__all__ = [
    "Budget",
    "Episode",
    "Evaluation",
    "JointPruningEnv",
    "Listener",
    "PruningEnv",
    "Weights",
    "make_env",
    "make_joint_env",
    "make_joint_toy_env",
    "parse_budgets",
    "toy_env",
]


def make_env(
    task: str = "edges2emoji",
    *,
    budget: str | float | Mapping[str, Budget | float | str] | None = None,
    cost: CostKind = DEFAULT_COST,
    start: Literal["elastic", "dense"] = "elastic",
    reward: Reward = "step",
    weights: Weights | None = None,
    feedback: bool = True,
    held: Collection[str] = (),
    evaluations: int | None = None,
    log: EvaluationLog | None = None,
    listener: Listener | None = None,
) -> PruningEnv:
    """A ready environment for a named task.

    Args:
        task: name of a task, or the folder of one of your own; ``noto_and_twemoji``, or a folder of both
            directions of a translator, is pruned by four agents.
        budget: keep ratio of the cost: ``"0.1"`` or 0.1 (the generators'), ``"0.05:0.5"`` (drawn per
            episode), ``"generator=0.1,discriminator=0.5"`` or a mapping. Default: 0.10 of generators, 0.50 of
            discriminators.
        cost: what budgets speak of, ``macs``, ``params`` or ``latency`` (measured first, in seconds).
        start: weights that plans are scored with: ``elastic``, or raw slices of the ``dense`` ones.
        reward: ``step`` pays the change of the potential at each step, ``final`` all of it at the last.
        weights: weights of the reward families.
        feedback: False hides from every agent what its peer and the last joint step did.
        held: agents whose networks stay uniform, such as ``("discriminator",)``.
        evaluations: evaluations after which ``env.scorer.exhausted`` is true; None = never.
        log: keeps the scores, and gives back those that it has.
        listener: is told of every plan and episode.

    Raises:
        UserError: if an option has a value that is unknown, malformed or out of reach.
    """
    known = _load(task)
    agents = tuple(known.networks)
    if budget is None or isinstance(budget, Mapping):
        budgets = default_budgets(agents, budget)
    else:
        budgets = parse_budgets(str(budget), agents)
    surrogate = known.surrogate(cost, budget_ends(budgets)) if start == "elastic" else None
    scorer = known.scorer(cost=cost, start=start, surrogate=surrogate)
    counted = CountedScorer(scorer, log, evaluations)
    return PruningEnv(
        counted,
        budgets,
        weights=weights,
        reward=reward,
        feedback=feedback,
        held=held,
        listener=listener,
    )


def _load(task: str) -> Any:
    """A named task, of one pair or of both directions of a translator."""
    from gan.task_folder import find_both  # torch is slow to load: only who wants a real task pays for it

    if find_both(task) is not None:
        from gan.two_way import load_two_way

        return load_two_way(task)
    from gan.tasks import load_task

    return load_task(task)


def make_joint_env(**options: Any) -> JointPruningEnv:
    """The joint view of :func:`make_env`; what ``GanPruning-v0`` calls."""
    return JointPruningEnv(make_env(**options))


def make_joint_toy_env(**options: Any) -> JointPruningEnv:
    """The joint view of :func:`toy_env`; what ``GanPruningToy-v0`` calls."""
    return JointPruningEnv(toy_env(**options))


gymnasium.register("GanPruning-v0", entry_point="envs:make_joint_env")
gymnasium.register("GanPruningToy-v0", entry_point="envs:make_joint_toy_env")
