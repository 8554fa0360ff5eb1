"""An environment in milliseconds: networks without weights, scores without images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from envs.budget import Budget, kind_of
from envs.pruning_env import PruningEnv
from envs.toy import toy_network
from gan.cost import CostModel
from gan.evaluations import FAMILIES, CountedScorer, PrunableNetwork, Scores
from gan.plans import Plan

CHANNELS = {"generator": (16, 32, 40, 24, 10), "discriminator": (16, 32, 48)}


def linear_network(channels: Sequence[int], costs: Sequence[float], multiple: int) -> PrunableNetwork:
    """Each channel of group i costs ``costs[i]``, whatever the others keep: oracles by hand."""
    n = len(channels)
    network = toy_network("generator", channels, multiple=multiple)
    cost = CostModel(
        kernel_macs=np.array(costs, dtype=np.float64),
        kernel_params=np.array(costs, dtype=np.float64),
        in_groups=np.zeros((n, n)),
        in_fixed=np.ones(n),
        out_groups=np.eye(n),
        out_fixed=np.zeros(n),
        vector_params=np.zeros(n),
        vector_fixed=0.0,
        dense=np.array(channels, dtype=np.int64),
    )
    return replace(network, cost=cost)


class FakeScorer:
    """All terms, each with its own favourite groups; balance depends on generators and discriminators."""

    def __init__(self, networks: Mapping[str, PrunableNetwork]) -> None:
        self.networks = networks
        self.ranking = "fake"
        self.fingerprint = {"scorer": "fake"}
        self.calls: list[Plan] = []

    def score(self, plan: Plan) -> Scores:
        self.calls.append(plan)
        lost = {"generator": 0.0, "discriminator": 0.0}
        gaps = {}
        for i, (term, family) in enumerate(FAMILIES.items()):
            for kind in lost:
                agents = sorted(agent for agent in self.networks if kind_of(agent) == kind)
                lost[kind] = sum(
                    (1 + (g + i) % 3) * math.log(network.groups[g].channels / plan[agent][g]) ** 2
                    for agent in agents
                    for network in [self.networks[agent]]
                    for g in range(len(network.groups))
                )
            both = abs(lost["generator"] - lost["discriminator"])
            gaps[term] = both if family == "balance" else lost["generator"]
        return Scores(gaps, {"probe": 0.0})


MakeEnv = Callable[..., PruningEnv]


@pytest.fixture
def make() -> MakeEnv:
    """``make(agents=…, budgets=…, channels={agent: widths}, evaluations=…, **options of PruningEnv)``."""

    def build(
        agents: Sequence[str] = ("generator", "discriminator"),
        budgets: Mapping[str, Any] | None = None,
        channels: Mapping[str, Sequence[int]] | None = None,
        evaluations: int | None = None,
        **options: Any,
    ) -> PruningEnv:
        networks = {
            agent: toy_network(
                kind_of(agent),
                (channels or {}).get(agent, CHANNELS[kind_of(agent)]),
                skips=kind_of(agent) == "generator",
                image=32,
                multiple=2,
            )
            for agent in agents
        }
        ranges = {agent: Budget.of((budgets or {}).get(agent, 0.3)) for agent in agents}
        return PruningEnv(CountedScorer(FakeScorer(networks), limit=evaluations), ranges, **options)

    return build


def run_episode(env: PruningEnv, actions: np.random.Generator | float, seed: int | None = None) -> list[Any]:
    """Everything that one episode gives: (observations, rewards, terminations, truncations, infos, state)."""
    observations, infos = env.reset(seed=seed)
    record: list[Any] = [(observations, {}, {}, {}, infos, env.state())]
    while env.agents:
        step = env.step(
            {
                agent: np.array(
                    [actions if isinstance(actions, float) else actions.uniform(-1, 1)], dtype=np.float32
                )
                for agent in env.agents
            }
        )
        record.append((*step, env.state()))
    return record
