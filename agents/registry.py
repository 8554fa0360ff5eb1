"""Every learner by name: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from agents.base import Agent
from agents.heuristics import RandomSearch, Uniform
from agents.mappo import Mappo
from agents.search import CmaEs, Evolution
from gan.errors import unknown

AGENTS: dict[str, Callable[..., Agent]] = {
    "mappo": Mappo,
    "ippo": partial(Mappo, name="ippo", critic="own"),
    "cmaes": CmaEs,
    "evolution": Evolution,
    "random": RandomSearch,
    "uniform": Uniform,
}
"""Name → builder; called with ``(seed, tensorboard=…, **options)``."""


def build_agent(name: str, seed: int = 0, *, tensorboard: Path | None = None, **options: Any) -> Agent:
    """A ready agent.

    Args:
        name: a key of ``AGENTS``.
        seed: of everything random about it.
        tensorboard: folder for event files; None writes none.
        options: fields of the learner's options.

    Raises:
        UserError: for an unknown name or option, with the known ones and the nearest.
    """
    if name not in AGENTS:
        raise unknown("agent", name, AGENTS)
    return AGENTS[name](seed, tensorboard=tensorboard, **options)
