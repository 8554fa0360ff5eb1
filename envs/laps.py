"""One network's laps through an episode: whose turn it is, how far it may move, what it has decided."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from envs.budget import Projected, Room, decision_order, find_room, nearest_width, project, uniform
from gan.evaluations import PrunableNetwork


class Laps:
    """The decisions of one agent in one episode, from the uniform plan on.

    In a lap each group but one is decided once; the budget gives the last. Groups that are not decided yet in
    the lap are rescaled together after every decision. After a lap all groups are free again.

    Attributes:
        network: the network.
        budget: keep ratio of its cost.
        uniform: the plan that the episode starts from.
        order: (n,) indices of the groups in the order of decisions.
        length: decisions per lap, max(1, n - 1).
        proportions: (n,) real-valued keep ratios, never fed from the widths.
        widths: (n,) kept channels: their rounded view, which fills the budget.
        unused: share of the budget that rounding leaves.
        decided: (n,) True for the groups decided in this lap.
        turn: decisions taken in this lap.
        room: how far the next decision can move.
        last_action: the last action, in [-1, 1]; 0 before the first.
        last_change: log of new width / old width of the group that it moved.
    """

    def __init__(self, network: PrunableNetwork, budget: float) -> None:
        self.network = network
        self.budget = budget
        self.uniform = uniform(network, budget)
        self.order = decision_order(network, self.uniform.widths)
        self.length = lap_length(network)
        self.decided = np.zeros(len(self.order), dtype=bool)
        self.turn = 0
        self.last_action = self.last_change = 0.0
        self._take(self.uniform)
        self.room = self._find_room()

    @property
    def group(self) -> int:
        """Index of the group that the next decision moves."""
        return int(self.order[self.turn])

    @property
    def decided_widths(self) -> NDArray[np.int64]:
        """(n,) the widths that are held, -1 = free."""
        return np.where(self.decided, self.widths, -1)

    def decide(self, action: float) -> None:
        """Move the group whose turn it is, rescale the free ones, pass the turn on.

        An action that changes no proportion keeps the plan as it is, without projecting again. A network with
        a single group ignores its action: the budget gives the width.

        Args:
            action: in [-1, 1]; see :class:`envs.budget.Room`.
        """
        group, before = self.group, int(self.widths[self.group])
        self.decided[group] = True
        proportion = self.room.moved(action)
        if len(self.order) > 1 and proportion != self.proportions[group]:
            held = self.decided_widths
            held[group] = min(nearest_width(self.network, group, proportion), self.room.widest)
            self.proportions[group] = proportion
            self._take(project(self.network, self.proportions, self.budget, held))
        self.last_action = action if len(self.order) > 1 else 0.0
        self.last_change = float(np.log(self.widths[group] / before))
        self.turn += 1
        if self.turn == self.length:
            self.turn = 0
            self.decided[:] = False
        self.room = self._find_room()

    def _take(self, projected: Projected) -> None:
        self.widths, self.unused = projected.widths, projected.unused
        self.proportions = projected.proportions.copy()

    def _find_room(self) -> Room:
        proportion = float(self.proportions[self.group])
        return find_room(self.network, self.group, proportion, self.budget, self.decided_widths)


def lap_length(network: PrunableNetwork) -> int:
    """Decisions a lap: one for each group but the last, at least one."""
    return max(1, len(network.groups) - 1)
