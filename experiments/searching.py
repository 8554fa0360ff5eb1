"""A search as every program runs it: what is searched, the learner at work, what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agents.base import Agent, FreeScorer
from agents.registry import RULES
from envs.budget import Budget, budget_ends
from envs.pruning_env import PruningEnv, Reward
from envs.records import Episode, Evaluation
from envs.rewards import Weights
from experiments.build import ImageCounts, build_budgets, build_env
from experiments.runs import MetricsLog, RunFolder, plain
from experiments.watch import SearchListener, Stage
from gan.cost import DEFAULT_COST, CostKind
from gan.elastic import ElasticNetwork
from gan.evaluations import CountedScorer, PlanScorer
from gan.files import write_json
from gan.surrogate import Surrogate
from gan.tasks import Start
from gan.two_way import AnyTask


@dataclass(frozen=True)
class Problem:
    """What an agent searches.

    Attributes:
        budget: as in ``--budget``.
        cost: what it is a share of.
        evaluations: plans that the search may score.
        start: slices of elastic weights, or of the raw dense ones.
        reward: paid at every step, or at the end of an episode.
        weights: of the reward families.
        feedback: whether agents see what their peer and the last joint step did.
        held: agents whose networks stay uniform.
    """

    budget: str
    evaluations: int
    cost: CostKind = DEFAULT_COST
    start: Start = "elastic"
    reward: Reward = "final"
    weights: Weights = field(default_factory=Weights)
    feedback: bool = True
    held: tuple[str, ...] = ()

    @classmethod
    def of_run(cls, options: Mapping[str, Any]) -> Problem:
        """From the ``options.json`` of a run; what it does not name is at its default."""
        named = {name: options[name] for name in ("cost", "start", "reward", "feedback") if name in options}
        return cls(
            budget=options["budget"],
            evaluations=int(options["evaluations"]),
            weights=Weights(**options.get("weights", {})),
            held=tuple(options.get("held", ())),
            **named,
        )

    @property
    def budgets(self) -> dict[str, Budget]:
        """Agent → budget, of one pair."""
        return build_budgets(self.budget)

    def surrogate(self, task: AnyTask, images: ImageCounts, shipped: bool) -> Surrogate | None:
        """Predictions of finetuned results, where those that come with the task hold.

        Args:
            task: whose predictions.
            images: predictions hold for gaps on the whole probe.
            shipped: whether plans are cut from the weights that come with the task.
        """
        holds = self.start == "elastic" and shipped and images.probe is None
        if not holds:
            return None
        return task.surrogate(self.cost, budget_ends(build_budgets(self.budget, task.networks)))

    def scorer(
        self, task: AnyTask, weights: Mapping[str, ElasticNetwork], images: ImageCounts, shipped: bool
    ) -> PlanScorer:
        """The scorer of the task; see :meth:`surrogate`."""
        return task.scorer(
            self.cost,
            weights=weights,
            probe=images.probe,
            statistics_images=images.statistics,
            surrogate=self.surrogate(task, images, shipped),  # type: ignore[arg-type]  # both have none
        )

    def env(self, scorer: PlanScorer, folder: RunFolder) -> PruningEnv:
        """The environment, with the evaluation log of a run."""
        return build_env(
            scorer,
            build_budgets(self.budget, scorer.networks),
            log=folder.evaluations,
            evaluations=self.evaluations,
            weights=self.weights,
            reward=self.reward,
            feedback=self.feedback,
            held=self.held,
        )


class Incumbent(NamedTuple):
    """The best plan of a search from some point on.

    Attributes:
        evaluations: spent when it was found; 0 for the uniform plan that a search begins with.
        evaluation: the plan and what the search's own reward says of it.
    """

    evaluations: int
    evaluation: Evaluation


class Incumbents:
    """A listener that keeps every plan that was the best when it came; others may listen through it.

    Args:
        env: its best plan so far is the first; none where its budgets are ranges.
        also: is told of everything, too.
    """

    def __init__(self, env: PruningEnv, also: SearchListener) -> None:
        self._env, self._also = env, also
        self.found = [] if env.best is None else [Incumbent(0, env.best)]

    def on_plan(self, evaluation: Evaluation) -> None:
        if evaluation is self._env.best:
            self.found.append(Incumbent(self._env.scorer.evaluations, evaluation))
        self._also.on_plan(evaluation)

    def on_episode(self, episode: Episode) -> None:
        self._also.on_episode(episode)


def learn(env: PruningEnv, agent: Agent, folder: RunFolder, stage: Stage | None = None) -> list[Incumbent]:
    """Let an agent search until the evaluations are spent; writes ``metrics.csv`` and the agent itself.

    Args:
        env: prepared.
        agent: the learner.
        folder: of the run.
        stage: its bar, or None.

    Returns:
        The best plans so far, in the order in which they came.
    """
    limit = env.scorer.limit
    listener = Incumbents(
        env,
        SearchListener(
            MetricsLog(folder.metrics),
            env.scorer.networks,
            best=lambda: env.best.potential if env.best else None,
            spent=lambda: (env.scorer.evaluations, limit or env.scorer.evaluations),
            stage=stage,
        ),
    )
    env.listener = listener
    try:
        agent.learn(env)
    finally:
        env.listener = None
    folder.policy.mkdir(exist_ok=True)
    agent.save(folder.policy)
    return listener.found


def propose(env: PruningEnv, agent: Agent, budgets: Mapping[str, float] | None = None) -> Evaluation:
    """What the agents propose, scored; nothing is counted.

    Args:
        env: prepared.
        agent: the learner.
        budgets: agent → keep ratio; by default the lowest of each.
    """
    asked = {name: budget.low for name, budget in env.budgets.items()} if budgets is None else budgets
    return env.evaluate(agent.propose(env, asked), asked, counted=False)


def find(env: PruningEnv, agent: Agent) -> dict[str, Evaluation]:
    """``best``: the best plan that was scored; ``proposed``: what the agents propose; ``uniform``.

    Where the budget was a range, plans of different budgets do not compare: the agents' plan at the
    lowest budget is taken. A rule has one plan, which is what was asked for, however it scores: else where it
    is worse than uniform, uniform would be finetuned under its name.
    """
    proposed = propose(env, agent)
    best = proposed if env.best is None or agent.name in RULES else env.best
    uniform = env.evaluate(env.uniform_plan(best.budgets), best.budgets, counted=False)
    return {"best": best, "proposed": proposed, "uniform": uniform}


def write_plans(folder: RunFolder, found: Mapping[str, Evaluation]) -> None:
    """Write ``plan.json``: every plan with its scores."""
    described = {
        name: {
            **evaluation.plan.to_dict(),
            "potential": evaluation.potential,
            "scores": dict(evaluation.term_scores),
            "gaps": dict(evaluation.scores.gaps),
            "budgets": dict(evaluation.budgets),
            "unused": dict(evaluation.unused),
        }
        for name, evaluation in found.items()
    }
    write_json(folder.plan, plain(described))


def judging(env: PruningEnv, weights: Weights, scorer: CountedScorer | None = None) -> PruningEnv:
    """The same budgets under given weights, with everyone free to move: plans of different searches compare.

    Nothing is counted there.

    Args:
        env: of the search.
        weights: of the reward families.
        scorer: another one to ask; by default the search's own, whose known scores are free.
    """
    asked = CountedScorer(FreeScorer(env.scorer)) if scorer is None else scorer
    return PruningEnv(asked, env.budgets, weights=weights, reward=env.reward)
