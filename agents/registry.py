"""Every learner by name: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agents.base import FORMER_NAMES, Agent
from agents.gradient import Gradient
from agents.heuristics import Magnitude, RandomSearch, Uniform
from agents.mappo import Mappo
from agents.sb3 import Sb3
from agents.search import CmaEs, Evolution
from agents.tpe import Tpe
from gan.errors import unknown

AGENTS: dict[str, Callable[..., Agent]] = {
    "mappo": Mappo,
    "ippo": partial(Mappo, name="ippo", critic="own"),
    "ppo": partial(Sb3, name="ppo"),
    "a2c": partial(Sb3, name="a2c"),
    "sac": partial(Sb3, name="sac"),
    "td3": partial(Sb3, name="td3"),
    "ddpg": partial(Sb3, name="ddpg"),
    "gradient": Gradient,
    "cma-es": CmaEs,
    "tpe": Tpe,
    "evolution": Evolution,
    "random": RandomSearch,
    "magnitude": Magnitude,
    "uniform": Uniform,
}
"""Name → builder; called with ``(seed, tensorboard=…, **options)``."""

RULES = ("magnitude", "uniform")
"""Agents that have one plan for a budget and need no evaluations to find it."""
WITHOUT_OBSERVATIONS = ("cma-es", "tpe", "evolution", "random", *RULES)
"""Agents that hand in whole plans and see nothing of the environment but their scores."""
WITHOUT_STEPS = ("gradient", *WITHOUT_OBSERVATIONS)
"""Agents that play no episode: when its reward is paid is nothing to them."""


def resolve_agent(name: str) -> str:
    """The name in ``AGENTS`` that is meant; an import path is its own name.

    Raises:
        UserError: for an unknown name, with the known ones and the nearest.
    """
    name = FORMER_NAMES.get(name, name)
    if name not in AGENTS and "." not in name:
        raise unknown("agent", name, AGENTS)
    return name


def build_agent(name: str, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> Agent:
    """A ready agent.

    Args:
        name: a key of ``AGENTS``, or the import path of an algorithm of stable-baselines3 or sb3-contrib,
            such as ``sb3_contrib.TQC``.
        seed: of everything random about it.
        tensorboard: folder for event files; None writes none.
        options: fields of the learner's options.

    Raises:
        UserError: for an unknown name or option, with the known ones and the nearest, or a class that cannot
            steer the environment.
    """
    name = resolve_agent(name)
    builder = AGENTS.get(name, partial(Sb3, name=name))
    return builder(seed, tensorboard=tensorboard, **options)
