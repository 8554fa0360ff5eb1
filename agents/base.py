"""What every learner offers, and what they share: checked options, saved descriptions, plans for free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from envs.pruning_env import PruningEnv
from gan.errors import UserError, unknown
from gan.evaluations import CountedScorer, PrunableNetwork, Scores
from gan.files import write_json
from gan.plans import Plan

DESCRIPTION = "agent.json"
"""The file in an agent's folder that says what the folder holds."""

FORMER_NAMES = {"cmaes": "cma-es"}
"""What agents were called once → what they are called; folders and commands of then still work."""

FORMAT = 1
"""Raised when what an agent writes changes."""

Options = TypeVar("Options")


class Agent(Protocol):
    """A learner (or a heuristic) that searches an environment for the best plan.

    The registry builds it with ``(seed, tensorboard=folder or None, **options)``.

    Attributes:
        name: its name in the registry.
    """

    name: str

    def learn(self, env: PruningEnv) -> None:
        """Search until ``env.scorer.exhausted``, or until there is nothing left to learn.

        A policy's last evaluation is for its proposal, and is left where that is no new plan.

        Deterministic: the same seed asks for the same plans. A second call goes on from what the first (or
        :meth:`load`) gave.

        Raises:
            UserError: if the environment has no limit of evaluations to stop at.
        """

    def propose(self, env: PruningEnv, budgets: Mapping[str, float] | None = None) -> Plan:
        """The agent's own final plan for the environment's networks; deterministic, costs no evaluation.

        Args:
            env: may be another one than it learned on.
            budgets: agent → keep ratio; by default the fixed ones, or those of the current episode.

        Raises:
            UserError: if a budget is a range, none is given, and no episode has begun.
        """

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` needs into ``folder`` (made if missing); no pickle."""

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: if a file is missing, damaged, or of another learner.
        """


def read_options(cls: type[Options], name: str, given: Mapping[str, Any]) -> Options:
    """A frozen dataclass of options from keywords.

    Raises:
        UserError: for an option that the learner does not have.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            raise (
                unknown(f"option of {name!r}", key, known)
                if known
                else UserError(f"{name!r} has no options; got {key!r}")
            )
    return cls(**given)


def check_limited(env: PruningEnv, name: str) -> None:
    """Refuse a search that would never end.

    Raises:
        UserError: if the environment's scorer has no limit.
    """
    if env.scorer.limit is None:
        raise UserError(
            f"{name!r} searches until the evaluations are spent; make the environment with a number"
        )


def write_description(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write ``agent.json``: whose folder this is, and what it learned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DESCRIPTION, {"format": FORMAT, "agent": name, **content})


def read_description(folder: Path, name: str) -> dict[str, Any]:
    """Read ``agent.json``.

    Raises:
        UserError: missing, damaged, of another format or another learner.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} holds no agent: {DESCRIPTION} is missing; check the path")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); train the agent again, or get the file again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no agent of format {FORMAT}; train the agent again with this version")
    if FORMER_NAMES.get(str(content.get("agent")), content.get("agent")) != name:
        raise UserError(
            f"{folder} holds a {content.get('agent')!r} agent, not {name!r}; build that one to load it"
        )
    return content


class FreeScorer:
    """A counted scorer's plans without the count: known scores are read, new ones computed, none is spent."""

    def __init__(self, scorer: CountedScorer) -> None:
        self.counted = scorer

    @property
    def networks(self) -> Mapping[str, PrunableNetwork]:
        return self.counted.networks

    @property
    def ranking(self) -> str:
        return self.counted.ranking

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.counted.scorer.fingerprint

    def score(self, plan: Plan) -> Scores:
        """Score a plan, uncounted."""
        return self.counted.score(plan, counted=False)


def resolve_budgets(env: PruningEnv, budgets: Mapping[str, float] | None) -> dict[str, float]:
    """Agent → the keep ratio meant: given, else fixed, else the current episode's.

    Raises:
        UserError: if a budget is unknown, out of range, or a range of which nothing says where.
    """
    return dict(env.evaluate(env.uniform_plan(budgets), budgets, counted=False).budgets)


def rehearse(env: PruningEnv) -> PruningEnv:
    """The same environment, but plans cost no evaluation, are no candidates for ``best``, and nobody is told.

    A policy that is played out must see what it saw in training, the feedback on its plans too, so these
    have to be scored; yet the search has not asked for them.
    """
    scorer = CountedScorer(FreeScorer(env.scorer))
    return PruningEnv(
        scorer,
        env.budgets,
        weights=env.weights,
        reward=env.reward,
        feedback=env.feedback,
        held=env.held,
    )
