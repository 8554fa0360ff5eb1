"""The environment: networks are agents, a decision is the keep ratio of one channel group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

from envs.budget import COST_TOLERANCE, Budget, keep_ratio, kind_of, project, unused_share
from envs.checks import check_budgets, check_held, check_networks, check_plan
from envs.laps import Laps, lap_length
from envs.observations import (
    LOCAL_FIELDS,
    STATE_FIELDS,
    Feedback,
    assign_slots,
    build_space,
    group_facts,
    observe_local,
    observe_state,
)
from envs.records import Episode, Evaluation, Listener
from envs.references import References
from envs.rewards import Weights, potential, term_rewards, term_scores
from gan.errors import UserError, unknown
from gan.evaluations import CountedScorer
from gan.plans import Plan

Vector = NDArray[np.float32]
Reward = Literal["step", "final"]


class PruningEnv(ParallelEnv[str, Vector, Vector]):
    """Prune a generator and its discriminator together, one keep ratio at a time.

    ## What happens
    Every network is an agent. An episode starts from the uniform plan at the budget: every group of channels
    keeps the same share. At each step every agent moves one of its groups, and its groups that are not
    decided yet in this lap are rescaled together, so that every plan on the way is feasible and fills its
    budget as far as rounding allows.

    ## Agents
    ``generator``, ``discriminator`` (or ``generator_A``, ``generator_B``, … of a two-way CycleGAN), up to two
    of each kind; the same names as the scorer's networks, in their order. All are alive until the episode
    ends.

    ## Action space
    ``Box(-1, 1, (1,), float32)`` per agent: where the proportion p of the group whose turn it is goes.

    | action | proportion |
    |---|---|
    | 0 | p, what rescaling gave |
    | a > 0 | p (hi / p)^a, hi = min(6 p, 1, the largest that leaves the other free groups their minimum) |
    | a < 0 | p (lo / p)^-a, lo = max(p / 6, one multiple, the smallest that the others can make up for) |

    Actions beyond the box are clipped. All-zero actions are uniform pruning and return exactly 0. The single
    group of a network that has only one is set by the budget: its agent's actions are ignored.

    The networks of ``held`` agents stay uniform: their actions count as 0, and a plan that is evaluated has
    its uniform widths in their place, whatever was asked for.

    ## Observation space
    Per agent a float32 box of ``envs.observations.LOCAL_FIELDS``: the group's geometry and importance
    profile, the budget, the agent's last decision, and the peer's feedback (the peer is the adversary:
    ``discriminator_A`` of ``generator_A``). With ``feedback=False`` that last part is all 0, from
    ``has_peer`` on. ``state()`` gives ``STATE_FIELDS`` for a centralised critic, which always sees everyone.
    No size depends on the networks.

    ## Reward
    One team reward for all. A term's score is (gap of the uniform plan at this budget - gap) / spread: 0 =
    uniform, one unit = one typical difference between random plans; clipped to -5 and 10. The potential is
    their weighted sum, the reward its change, so that (undiscounted) an episode returns the potential of its
    last plan: the gain over uniform. With ``reward="final"`` the last step pays it all and only the last plan
    is scored: one evaluation an episode. What observations tell of potential and reward is divided by the sum
    of the weights.

    ## Starting state
    The uniform plan. Budgets that are ranges are drawn log-uniformly, one per network;
    ``reset(options={"budgets": {agent: keep_ratio}})`` sets them. With fixed budgets nothing is random.

    ## Episode end
    After ``horizon`` steps, the longest lap of any agent (a lap decides all groups but one), every agent is
    terminated: there is no more to decide. Never truncated. An agent with fewer groups starts further laps.

    ## Info
    ``scores`` (term → score), ``gaps`` (term → gap), ``potential`` (of the plan; the sum of the rewards so
    far) and ``plan`` (``Plan.to_dict``), the same for every agent, ready for JSON. Under ``reward="final"``
    scores and gaps are empty before the last step.

    ## Version history
    v0: first version.

    Attributes:
        scorer: the counted scorer.
        budgets: agent → budget.
        weights: weights of the reward families.
        reward: ``step`` or ``final``.
        feedback: whether agents see what their peer and the last joint step did.
        held: agents whose networks stay uniform.
        horizon: steps per episode.
        plan: the current plan.
        best: the best of all counted plans by potential, the ones on the way too; the uniform plan to begin
            with. None where a budget is a range: potentials at different budgets do not compare.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "name": "gan_pruning_v0",
        "render_modes": [],
        "is_parallelizable": True,
    }
    render_mode = None

    def __init__(
        self,
        scorer: CountedScorer,
        budgets: Mapping[str, Budget],
        *,
        weights: Weights | None = None,
        reward: Reward = "step",
        feedback: bool = True,
        held: Collection[str] = (),
        listener: Listener | None = None,
    ) -> None:
        """Store the parts; nothing is scored before :meth:`prepare` or the first :meth:`reset`.

        Raises:
            UserError: if a budget is missing, unknown or unreachable, ``reward`` or an agent in ``held`` is
                unknown, or all of them are held.
        """
        networks = scorer.networks
        check_networks(networks)
        check_budgets(networks, budgets)
        check_held(held, networks)
        if reward not in get_args(Reward):
            raise unknown("reward", reward, get_args(Reward))
        self.scorer = scorer
        self.budgets = {agent: budgets[agent] for agent in networks}
        self.weights = weights or Weights()
        self.reward = reward
        self.feedback = feedback
        self.held = frozenset(held)
        self.listener = listener
        self.horizon = max(map(lap_length, networks.values()))
        self.possible_agents = list(networks)
        self.agents: list[str] = []
        self.observation_spaces = {agent: build_space(LOCAL_FIELDS) for agent in networks}
        self.action_spaces = {agent: spaces.Box(-1.0, 1.0, (1,), np.float32) for agent in networks}
        self.state_space = build_space(STATE_FIELDS)
        self.best: Evaluation | None = None
        self.episodes = 0
        self.references = References(scorer, self.budgets)
        self._slots = assign_slots(networks)
        self._facts = {agent: group_facts(network) for agent, network in networks.items()}
        self._laps: dict[str, Laps] = {}
        self._feedback = Feedback()
        self._steps = 0
        self._rng: np.random.Generator | None = None

    def observation_space(self, agent: str) -> spaces.Box:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Box:
        return self.action_spaces[agent]

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Score the uncounted plans that rewards are measured against; else the first ``reset`` does it.

        Args:
            progress: called with (plans done, plans in all) after each random plan.
        """
        self.references.prepare(progress)
        if self.best is None and all(budget.fixed for budget in self.budgets.values()):
            budgets = self._resolve_budgets(None)
            self.best = self._evaluate(self.uniform_plan(budgets), budgets, counted=False)

    def reset(
        self, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Vector], dict[str, dict[str, Any]]]:
        """Start an episode from the uniform plan.

        Args:
            seed: seeds the draws of budgets; None goes on from the last seed.
            options: ``{"budgets": {agent: keep_ratio}}`` sets budgets within their ranges instead of drawing
                them.
        """
        self.prepare()
        if seed is not None or self._rng is None:
            self._rng, _ = seeding.np_random(seed)
        # drawn in the order of the names, so that the order of the agents does not matter
        drawn = {agent: self.budgets[agent].draw(self._rng) for agent in sorted(self.budgets)}
        budgets = self._resolve_budgets({**drawn, **(options or {}).get("budgets", {})})
        self.agents = list(self.possible_agents)
        self._laps = {agent: Laps(self.scorer.networks[agent], budgets[agent]) for agent in self.agents}
        self._steps = 0
        start = self._evaluate(self.plan, budgets, counted=False) if self.reward == "step" else None
        self._feedback = Feedback(scores=start.term_scores if start else {})
        return self._observe(), self._infos(start)

    def step(
        self, actions: Mapping[str, Vector]
    ) -> tuple[
        dict[str, Vector], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
    ]:
        """Move one group of every network, score the joint plan, pay the change of its potential.

        Args:
            actions: agent → (1,) in [-1, 1]; values beyond are clipped.

        Raises:
            ValueError: if an agent's action is missing, has another shape or is not finite.
        """
        if not self.agents:
            raise RuntimeError("the episode is over (or was never begun): call reset() before step()")
        for agent, action in self._read(actions).items():
            self._laps[agent].decide(0.0 if agent in self.held else action)
        self._steps += 1
        done = self._steps == self.horizon
        scored = done or self.reward == "step"
        evaluation = self._evaluate(self.plan, self.episode_budgets, counted=True) if scored else None
        self._feedback = self._judge(evaluation)
        if done and evaluation is not None:
            self.agents = []
            self._report(evaluation)
        everyone = self.possible_agents
        return (
            self._observe(),
            dict.fromkeys(everyone, self._feedback.reward),
            dict.fromkeys(everyone, done),
            dict.fromkeys(everyone, False),
            self._infos(evaluation),
        )

    def state(self) -> Vector:
        """The critic's view, (len(STATE_FIELDS),) float32."""
        self._check_begun()
        slots = {slot: self._laps[agent] for slot, agent in self._slots.items()}
        return observe_state(slots, {slot: self._facts[self._slots[slot]] for slot in slots}, self._feedback)

    @property
    def plan(self) -> Plan:
        """The current joint plan."""
        self._check_begun()
        return Plan.of(
            {agent: laps.widths.tolist() for agent, laps in self._laps.items()}, self.scorer.ranking
        )

    @property
    def episode_budgets(self) -> dict[str, float]:
        """Agent → keep ratio of the cost in this episode."""
        self._check_begun()
        return {agent: laps.budget for agent, laps in self._laps.items()}

    def evaluate(
        self, plan: Plan, budgets: Mapping[str, float] | None = None, counted: bool = True
    ) -> Evaluation:
        """Score a whole plan, as direct searches do.

        A counted plan may become ``best``; the listener is told of it as a plan and as an episode of its own.

        Args:
            plan: a feasible plan of all networks; held ones are uniform in the plan that is scored.
            budgets: agent → keep ratio; by default the fixed ones, or those of the current episode.
            counted: False for references that cost nothing and change nothing.

        Raises:
            ValueError: if the plan is of other networks, has widths off the grid, or exceeds a budget.
        """
        self.prepare()
        budgets = self._resolve_budgets(budgets)
        check_plan(plan, self.scorer.networks, budgets)
        evaluation = self._evaluate(self._hold(plan, budgets), budgets, counted)
        if counted:
            self._report(evaluation)
        return evaluation

    def uniform_plan(self, budgets: Mapping[str, float] | None = None) -> Plan:
        """The plan of equal proportions."""
        return self.references.uniform_plan(self._resolve_budgets(budgets))

    def plan_from_proportions(
        self, proportions: Mapping[str, NDArray[np.float64]], budgets: Mapping[str, float] | None = None
    ) -> Plan:
        """The plan that fills the budgets with these proportions.

        Args:
            proportions: agent → (n,) > 0; only their ratios within a network matter.
            budgets: agent → keep ratio; by default the fixed ones, or those of the current episode.

        Raises:
            ValueError: if a network's proportions are missing, not one per group, or not positive and finite.
        """
        budgets = self._resolve_budgets(budgets)
        networks = self.scorer.networks
        if set(proportions) != set(networks):
            raise ValueError(
                f"proportions are needed for {', '.join(networks)}; got {', '.join(proportions)}"
            )
        widths = {
            agent: project(network, proportions[agent], budgets[agent]).widths.tolist()
            for agent, network in networks.items()
        }
        return self._hold(Plan.of(widths, self.scorer.ranking), budgets)

    def _hold(self, plan: Plan, budgets: Mapping[str, float]) -> Plan:
        """The plan with uniform widths for the held networks."""
        if not self.held:
            return plan
        uniform = self.references.uniform_plan(budgets)
        kept = {agent: (uniform if agent in self.held else plan)[agent] for agent in plan}
        return Plan.of(kept, plan.ranking)

    def _read(self, actions: Mapping[str, Vector]) -> dict[str, float]:
        if set(actions) != set(self.agents):
            raise ValueError(f"step() needs one action for each of {self.agents}; got {sorted(actions)}")
        read = {}
        for agent in self.agents:
            action = np.asarray(actions[agent], dtype=np.float64)
            if action.shape != (1,) or not np.all(np.isfinite(action)):
                raise ValueError(
                    f"the action of {agent!r} must be one finite number in [-1, 1], shape (1,); got {action}"
                )
            read[agent] = float(np.clip(action[0], -1.0, 1.0))
        return read

    def _evaluate(self, plan: Plan, budgets: Mapping[str, float], counted: bool) -> Evaluation:
        scores = self.scorer.score(plan, counted=counted)
        terms = term_scores(scores.gaps, *self.references.at(budgets))
        networks = self.scorer.networks
        evaluation = Evaluation(
            plan=plan,
            scores=scores,
            term_scores=terms,
            term_rewards=term_rewards(terms, self.weights),
            potential=potential(terms, self.weights),
            budgets=dict(budgets),
            unused={
                agent: unused_share(networks[agent], np.array(plan[agent]), budgets[agent])
                for agent in networks
            },
        )
        if counted:
            if self.best is not None and evaluation.potential > self.best.potential:
                self.best = evaluation
            if self.listener is not None:
                self.listener.on_plan(evaluation)
        return evaluation

    def _judge(self, evaluation: Evaluation | None) -> Feedback:
        """The reward of a step and what it did to each term; nothing while the plan is not scored."""
        progress = self._steps / self.horizon
        if evaluation is None:
            return Feedback(progress)
        reward = evaluation.potential - self._feedback.potential
        if self.reward == "final":
            return Feedback(progress, reward=reward)
        before = self._feedback.scores
        changes = {term: score - before[term] for term, score in evaluation.term_scores.items()}
        scores, total = evaluation.term_scores, self.weights.total
        return Feedback(progress, evaluation.potential, scores, reward, changes, total)

    def _observe(self) -> dict[str, Vector]:
        # under "final" the last reward is paid, but no observation tells of it: feedback stays 0
        told = self.feedback and self.reward == "step"
        feedback = self._feedback if told else Feedback(self._feedback.progress)
        peers = self._laps if self.feedback else {}
        return {
            agent: observe_local(laps, peers.get(peer_of(agent)), self._facts[agent], feedback)
            for agent, laps in self._laps.items()
        }

    def _infos(self, evaluation: Evaluation | None) -> dict[str, dict[str, Any]]:
        info = {
            "scores": dict(evaluation.term_scores) if evaluation else {},
            "gaps": dict(evaluation.scores.gaps) if evaluation else {},
            "potential": evaluation.potential if evaluation else 0.0,
            "plan": self.plan.to_dict(),
        }
        return {agent: dict(info) for agent in self.possible_agents}

    def _report(self, evaluation: Evaluation) -> None:
        self.episodes += 1
        if self.listener is not None:
            self.listener.on_episode(self._episode(evaluation))

    def _episode(self, evaluation: Evaluation) -> Episode:
        networks = self.scorer.networks
        widths = {agent: np.array(evaluation.plan[agent]) for agent in networks}
        return Episode(
            episode=self.episodes,
            return_=evaluation.potential,
            term_scores=evaluation.term_scores,
            term_rewards=evaluation.term_rewards,
            sparsity={agent: 1.0 - keep_ratio(network, widths[agent]) for agent, network in networks.items()},
            channel_sparsity={
                agent: 1.0 - float(np.mean(widths[agent] / network.channels))
                for agent, network in networks.items()
            },
            budgets=evaluation.budgets,
            unused=evaluation.unused,
            evaluations=self.scorer.evaluations,
            requests=self.scorer.requests,
            best_potential=self.best.potential if self.best else None,
        )

    def _resolve_budgets(self, budgets: Mapping[str, float] | None) -> dict[str, float]:
        """The budgets meant: given, else fixed, else those of the current episode; within the ranges."""
        resolved = {}
        given = budgets or {}
        for agent in given:
            if agent not in self.budgets:
                raise unknown("agent in budgets", agent, self.budgets)
        for agent, budget in self.budgets.items():
            if agent in given:
                value = float(given[agent])
                if not budget.low * (1 - COST_TOLERANCE) <= value <= budget.high * (1 + COST_TOLERANCE):
                    raise UserError(
                        f"a budget of {value:g} for {agent!r} is outside {budget.low:g}:{budget.high:g}, "
                        "where scores have a unit; make the environment with a range that holds it"
                    )
                resolved[agent] = min(max(value, budget.low), budget.high)
            elif budget.fixed:
                resolved[agent] = budget.low
            elif self._laps:
                resolved[agent] = self._laps[agent].budget
            else:
                raise UserError(
                    f"the budget of {agent!r} is a range, {budget.low:g}:{budget.high:g}: "
                    "say which one is meant, or reset() first"
                )
        return resolved

    def _check_begun(self) -> None:
        if not self._laps:
            raise RuntimeError("there is no plan before the first reset()")


def peer_of(agent: str) -> str:
    """The adversary: ``generator_A`` ↔ ``discriminator_A``."""
    kind = kind_of(agent)
    return ("discriminator" if kind == "generator" else "generator") + agent[len(kind) :]
