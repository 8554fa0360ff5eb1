"""What an environment reports: an evaluation for every plan, a row for every episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gan.evaluations import FAMILIES, Scores
from gan.plans import Plan


@dataclass(frozen=True)
class Evaluation:
    """A plan and what it is worth at a budget.

    Attributes:
        plan: the plan.
        scores: gaps and diagnostics, as the scorer gave them.
        term_scores: term → score; 0 = the uniform plan, 1 = one typical difference between random plans.
        term_rewards: term → score × weight.
        potential: sum of ``term_rewards``; 0 for the uniform plan.
        budgets: agent → keep ratio of the cost that the plan had to meet.
        unused: agent → share of that budget that the plan leaves, ≥ 0.
    """

    plan: Plan
    scores: Scores
    term_scores: Mapping[str, float]
    term_rewards: Mapping[str, float]
    potential: float
    budgets: Mapping[str, float]
    unused: Mapping[str, float]


@dataclass(frozen=True)
class Episode:
    """One finished episode, or one plan of a search that proposes whole plans: a row of ``metrics.csv``.

    Attributes:
        episode: number of the episode, from 1.
        return_: sum of its rewards: how much better than uniform its last plan is.
        term_scores: term → score of the last plan.
        term_rewards: term → score × weight.
        sparsity: agent → 1 - cost / dense cost.
        channel_sparsity: agent → 1 - mean keep ratio of the groups.
        budgets: agent → keep ratio of the cost.
        unused: agent → share of the budget left unused.
        evaluations: distinct plans that the run has scored so far.
        requests: plans that it has asked for so far.
        best_potential: best potential so far, or None where budgets are drawn (they do not compare).
    """

    episode: int
    return_: float
    term_scores: Mapping[str, float]
    term_rewards: Mapping[str, float]
    sparsity: Mapping[str, float]
    channel_sparsity: Mapping[str, float]
    budgets: Mapping[str, float]
    unused: Mapping[str, float]
    evaluations: int
    requests: int
    best_potential: float | None

    def row(self) -> dict[str, float | int | None]:
        """One flat row: ``return``, ``density`` (weighted), ``mmd_gap.score``, ``generator.sparsity`` …"""
        families = dict.fromkeys(FAMILIES.values(), 0.0)
        for term, reward in self.term_rewards.items():
            families[FAMILIES[term]] += reward
        row: dict[str, float | int | None] = {"episode": self.episode, "return": self.return_, **families}
        row |= {f"{term}.score": score for term, score in self.term_scores.items()}
        row |= {f"{term}.reward": reward for term, reward in self.term_rewards.items()}
        for agent, budget in self.budgets.items():
            row[f"{agent}.sparsity"] = self.sparsity[agent]
            row[f"{agent}.channel_sparsity"] = self.channel_sparsity[agent]
            row[f"{agent}.budget"] = budget
            row[f"{agent}.unused"] = self.unused[agent]
        row |= {
            "evaluations": self.evaluations,
            "requests": self.requests,
            "best_potential": self.best_potential,
        }
        return row


class Listener(Protocol):
    """Who wants to know: metrics files, progress bars."""

    def on_plan(self, evaluation: Evaluation) -> None:
        """Called for every counted plan, in the order of requests."""

    def on_episode(self, episode: Episode) -> None:
        """Called at the end of every episode."""
