"""What a search looks for: a plan says how many channels every group of every network keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """The kept width of each channel group of each network; hashable and replayable.

    Attributes:
        entries: one ``(agent, widths)`` pair per network, in the order of the agents; widths are
            kept channels per group, in the forward order of the groups.
        ranking: name of the channel ranking that says *which* channels a width keeps (the first
            ``width`` of the ranking); two plans with equal widths and different rankings differ.
    """

    entries: tuple[tuple[str, tuple[int, ...]], ...]
    ranking: str = ""

    @classmethod
    def of(cls, widths: Mapping[str, Sequence[int] | NDArray[np.integer]], ranking: str = "") -> Plan:
        """Build a plan from ``{agent: widths}``; numpy integers are turned into ints."""
        entries = tuple((agent, tuple(int(w) for w in row)) for agent, row in widths.items())
        return cls(entries, ranking)

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(agent for agent, _ in self.entries)

    def __getitem__(self, agent: str) -> tuple[int, ...]:
        for name, widths in self.entries:
            if name == agent:
                return widths
        raise KeyError(f"the plan has no network {agent!r}; it has {', '.join(self.agents)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.agents)

    def replace(self, agent: str, widths: Sequence[int]) -> Plan:
        """The same plan with other widths for one network."""
        self[agent]  # raises for an unknown agent
        return Plan.of({name: widths if name == agent else row for name, row in self.entries}, self.ranking)

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready form; :meth:`from_dict` reads it back."""
        return {"widths": {agent: list(widths) for agent, widths in self.entries}, "ranking": self.ranking}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Plan:
        """The plan of a :meth:`to_dict`.

        Raises:
            ValueError: no lists of whole numbers of 1 or more.
        """
        widths = data.get("widths")
        if not isinstance(widths, Mapping):
            raise ValueError(
                f"a plan needs the key 'widths' with one list per network; got keys {sorted(data)}"
            )
        for agent, row in widths.items():
            # True is an int in Python, and no width.
            if not isinstance(row, list) or not all(type(width) is int and width >= 1 for width in row):
                raise ValueError(
                    f"the widths of {agent!r} are {row!r}; a plan has a list of whole numbers, 1 or more"
                )
        return cls.of(widths, str(data.get("ranking", "")))

    @property
    def key(self) -> str:
        """A canonical string: equal plans have equal keys, across processes and versions."""
        return json.dumps(self.to_dict(), separators=(",", ":"))
