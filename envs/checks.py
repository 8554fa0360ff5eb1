"""What an environment refuses, each with one sentence: networks, budgets, plans."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from envs.budget import COST_TOLERANCE, Budget, check_reachable, keep_ratio, kind_of
from gan.errors import UserError, unknown
from gan.evaluations import PrunableNetwork
from gan.plans import Plan


def check_networks(networks: Mapping[str, PrunableNetwork]) -> None:
    """Refuse networks that no observation has room for, or whose names say another kind."""
    for agent, network in networks.items():
        if kind_of(agent) != network.kind:
            raise ValueError(
                f"the agent {agent!r} has a {network.kind}; call it {network.kind!r} or {network.kind}_…"
            )
        if not network.groups:
            raise UserError(f"{agent!r} has no channel group that could be pruned")
    if not networks:
        raise UserError("there is no network to prune")


def check_budgets(networks: Mapping[str, PrunableNetwork], budgets: Mapping[str, Budget]) -> None:
    """Refuse budgets of other agents than the networks', and unreachable ones, with the reachable range."""
    for agent in budgets:
        if agent not in networks:
            raise unknown("agent in budgets", agent, networks)
    for agent, network in networks.items():
        if agent not in budgets:
            raise UserError(
                f"the agent {agent!r} has no budget; budgets are given for {', '.join(budgets) or 'none'}"
            )
        check_reachable(network, budgets[agent].low, agent)


def check_held(held: Collection[str], networks: Mapping[str, PrunableNetwork]) -> None:
    """Refuse to hold agents that there are not, or all that there are."""
    for agent in held:
        if agent not in networks:
            raise unknown("agent to hold", agent, networks)
    if set(held) == set(networks):
        raise UserError(f"all agents are held ({', '.join(held)}), so nothing can be pruned; leave one free")


def check_plan(plan: Plan, networks: Mapping[str, PrunableNetwork], budgets: Mapping[str, float]) -> None:
    """Refuse a plan of other networks, with widths off the grid, or above a budget."""
    if set(plan.agents) != set(networks):
        raise ValueError(
            f"the plan is of {', '.join(plan.agents)}; the environment has {', '.join(networks)}"
        )
    for agent, network in networks.items():
        widths = np.array(plan[agent])
        if widths.shape != network.channels.shape:
            raise ValueError(
                f"the plan has {len(widths)} widths for {agent!r}; it has {len(network.groups)} groups"
            )
        on_grid = (widths % network.multiple == 0) | (widths == network.channels)
        if not np.all(on_grid & (widths >= network.minimum) & (widths <= network.channels)):
            raise ValueError(
                f"widths of {agent!r} must be multiples of {network.multiple}, from "
                f"{network.minimum.tolist()} to {network.channels.tolist()}; got {widths.tolist()}"
            )
        ratio = keep_ratio(network, widths)
        if ratio > budgets[agent] * (1 + COST_TOLERANCE):
            raise ValueError(
                f"the plan keeps {ratio:.6f} of {agent!r}'s cost; its budget is {budgets[agent]:g}"
            )
