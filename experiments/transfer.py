"""Transfer: a search that begins with a policy of another task, network size or of the toy problem."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agents.base import DESCRIPTION, Agent
from agents.registry import build_agent
from envs.pruning_env import PruningEnv
from envs.records import Evaluation
from experiments.build import build_budgets, fixed_shares
from experiments.runs import (
    RunFolder,
    check_no_study,
    flag,
    open_run,
    plain,
    read_json,
    read_metrics,
    spent_evaluations,
)
from experiments.searching import Incumbent, propose
from gan.errors import UserError
from gan.files import write_json

TRANSFERABLE = ("mappo", "ippo")
"""Learners whose policies fit every network: the size of their observations never depends on one."""
SAME = ("task", "budget", "cost", "start", "reward", "weights", "warm_up", "quick")
"""Options that a reference must share, or its scores would be of another problem."""


class Target(NamedTuple):
    """What a search without a source has reached.

    Attributes:
        run: its folder.
        score: potential of its best plan.
        evaluations: after which it had that plan.
    """

    run: Path
    score: float
    evaluations: int


def find_policy(path: Path, algo: str) -> Path:
    """The folder of the policy that ``--from`` names, after a look at what it holds.

    Args:
        path: a run, or the folder that a learner was saved to.
        algo: learner that is to begin with it.

    Raises:
        UserError: a learner without a policy, no such policy, or another learner's.
    """
    if algo not in TRANSFERABLE:
        raise UserError(
            f"--from gives the search a policy to begin with, which {algo} has none of that fits other "
            f"networks; use --algo {' or '.join(TRANSFERABLE)}"
        )
    if (path / DESCRIPTION).is_file():
        policy = path
    else:
        run = open_run(path)
        check_no_study(run)
        policy = run.policy
    if not (policy / DESCRIPTION).is_file():
        raise UserError(f"--from {path} holds no policy: its search has not ended yet; finish that run first")
    found = read_json(policy / DESCRIPTION)
    holder = found.get("agent") if isinstance(found, dict) else None
    if isinstance(holder, str) and holder not in TRANSFERABLE:
        raise UserError(
            f"--from {path} was made by {holder}, which learns no policy that fits other networks; name a "
            f"run of {' or '.join(TRANSFERABLE)}"
        )
    if isinstance(holder, str) and holder != algo:
        raise UserError(f"--from {path} holds a policy of {holder}, not of {algo}; add --algo {holder}")
    build_agent(algo).load(policy)
    return policy.resolve()


def read_target(path: Path, options: Mapping[str, Any]) -> Target:
    """What the run that ``--reference`` names has reached.

    Args:
        path: a run that began without a source.
        options: of the new run, as in ``options.json``.

    Raises:
        UserError: it is unfinished, searched another problem or began with a source itself, or the budget is
            a range, at which scores do not compare.
    """
    folder = open_run(path)
    folder.require(folder.plan, folder.metrics)
    best = read_json(folder.plan)["best"]
    agents = tuple(best["widths"])
    asked = {**options, "budget": build_budgets(options["budget"], agents)}
    fixed_shares(asked["budget"], options["budget"])
    known = read_json(folder.options)
    known["budget"] = build_budgets(known["budget"], agents)
    if "warm_up" not in known:  # a run of compare.py holds its own elastic weights, or has none
        known["warm_up"] = "its own" if folder.elastic.exists() else 0
    other = [flag(name) for name in SAME if known.get(name) != asked.get(name)]
    if other:
        raise UserError(f"--reference {path} searched another problem; it differs in {', '.join(other)}")
    if folder.source.is_dir():
        raise UserError(
            f"--reference {path} began with another run's policy itself, so that it says nothing of what one "
            "saves; name a run that was made without --from"
        )
    frame = read_metrics(folder)
    score = float(best["potential"])
    # the log rounds what the plan's file does not
    there = frame[frame["best_potential"] >= score - 1e-6 * max(1.0, abs(score))]
    # a plan of an episode that the search did not finish has no row
    spent = there["evaluations"].iloc[0] if len(there) else spent_evaluations(folder)
    return Target(path.resolve(), score, int(spent))


def adopt(policy: Path, folder: RunFolder) -> None:
    """Copy a policy into the run: resumed, it must not depend on where the policy came from."""
    shutil.copytree(policy, folder.source)


def begin(agent: Agent, env: PruningEnv, folder: RunFolder) -> Evaluation | None:
    """Load the run's source, if it has one, and score the plan that it proposes untrained, uncounted.

    Args:
        agent: takes the policy.
        env: prepared.
        folder: of the run.

    Returns:
        The zero-shot plan; None where the run has no source.
    """
    if not folder.source.is_dir():
        return None
    agent.load(folder.source)
    return propose(env, agent)


def reached(zero_shot: Evaluation, found: Sequence[Incumbent], score: float) -> int | None:
    """Evaluations until a score was reached, the zero-shot plan's among them; None where it never was.

    Args:
        zero_shot: the plan of the source, scored before the search.
        found: the search's best plans, in the order in which they came; the first is the uniform one.
        score: potential to reach.
    """
    if zero_shot.potential >= score:
        return 1
    return next((one.evaluations + 1 for one in found if one.evaluation.potential >= score), None)


def write_transfer(folder: RunFolder, zero_shot: Evaluation, found: Sequence[Incumbent]) -> list[str]:
    """Write ``transfer.json``; returns what to say of it, a line each."""
    about = read_json(folder.about)["transfer"]
    content = {"source": about["source"], "zero_shot": zero_shot.potential, "budgets": zero_shot.budgets}
    lines = [f"zero-shot: score {zero_shot.potential:+.3f} (uniform 0) with the policy of {about['source']}"]
    if about["reference"] is not None:
        run, score, spent = Target(*about["reference"])
        here = reached(zero_shot, found, score)
        saved = None if here is None else spent - here
        content |= {
            "reference": run,
            "reference_score": score,
            "reference_evaluations": spent,
            "evaluations": here,
            "evaluations_saved": saved,
        }
        ending = "it was not reached here" if here is None else f"{here} here: {saved} saved"
        lines.append(f"score {score:+.3f} of {run}: {spent} evaluations there, {ending}")
    write_json(folder.transfer, plain(content))
    return lines
