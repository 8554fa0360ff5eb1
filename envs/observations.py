"""What agents see: named fields, the one source of order, bounds, vectors, docs and plots.

No field's place and no vector's size depends on the network, so a policy trained on one GAN runs on another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.budget import LARGEST_MOVE
from envs.laps import Laps
from envs.rewards import SCORE_BOUNDS
from gan.evaluations import FAMILIES, PrunableNetwork

PROFILE_LENGTH = 8
"""Width profiles are resampled to so many points, from the first group to the last."""

SLOTS = ("generator_1", "generator_2", "discriminator_1", "discriminator_2")
"""Network slots of the state; a two-way CycleGAN fills all four."""

TOP_SHARES = (0.1, 0.25, 0.5)
"""The importance profile says how much of the importance the top 10, 25, 50 % of the channels hold."""


class Field(NamedTuple):
    """One number of an observation.

    Attributes:
        name: unique within its vector.
        low: smallest value; values beyond the bounds are clipped.
        high: largest value.
        meaning: what it says, with its unit.
    """

    name: str
    low: float
    high: float
    meaning: str


def _short(term: str) -> str:
    return term.removesuffix("_gap")


LOCAL_FIELDS: tuple[Field, ...] = (
    # the network and where the agent stands
    Field("is_discriminator", 0, 1, "1 for a discriminator, 0 for a generator"),
    Field("groups", 0, 1, "number of channel groups / 32"),
    Field("progress", 0, 1, "share of the episode's steps taken"),
    Field("lap_left", 0, 1, "share of this lap's decisions still to take, this one included"),
    Field("budget", 0, 1, "keep ratio of the cost that the network must meet"),
    Field("log_budget", 0, 1, "-log10(budget) / 3"),
    Field("budget_left", 0, 1, "share of the budget above what decided widths and minima cost"),
    Field("mean_keep_ratio", 0, 1, "mean kept share of channels over the groups"),
    # the group to decide
    Field("position", 0, 1, "0 for the first group in forward order, 1 for the last"),
    Field("transposed", 0, 1, "1 for a transposed convolution"),
    Field("kernel", 0, 1, "log2(kernel size) / 3"),
    Field("stride", 0, 2, "log2(stride)"),
    Field("channels", 0, 1, "log2(dense channels) / 10"),
    Field("resolution", 0, 1, "log2(height of the output map) / 10"),
    Field("cost_share", 0, 1, "share of the dense cost saved by cutting the group to its minimum"),
    Field("top_10", 0, 1, "share of the importance in the top 10 % of the channels"),
    Field("top_25", 0, 1, "share of the importance in the top 25 % of the channels"),
    Field("top_50", 0, 1, "share of the importance in the top 50 % of the channels"),
    Field("effective_channels", 0, 1, "exp(entropy of the importance) / channels; 1 = all alike"),
    Field("importance_kept", 0, 1, "share of the importance in the channels kept now"),
    Field("keep_ratio", 0, 1, "the proportion that action 0 keeps"),
    Field("relative_keep_ratio", -2, 2, "log(proportion / uniform plan's proportion), in largest moves"),
    Field("room_up", 0, 1, "log(proportion of action 1 / proportion), in largest moves"),
    Field("room_down", 0, 1, "log(proportion / proportion of action -1), in largest moves"),
    Field("last_action", -1, 1, "own last action; 0 before the first"),
    Field("last_change", -1, 1, "log(new / old width) of own last decision, in largest moves"),
    # the peer's feedback: the adversary, and what the last joint step did
    Field("has_peer", 0, 1, "1 if the adversary is an agent whom one hears of; else its fields are 0"),
    Field("peer_budget", 0, 1, "the peer's budget"),
    Field("peer_mean_keep_ratio", 0, 1, "the peer's mean kept share of channels"),
    Field("peer_lap_left", 0, 1, "share of the peer's lap still to decide"),
    Field("peer_last_action", -1, 1, "the peer's last action; 0 before the first"),
    Field("peer_last_change", -1, 1, "log(new / old width) of the peer's last decision, in largest moves"),
    Field("feedback_reward", -2, 2, "reward of the last joint step / sum of the weights; 0 under 'final'"),
    *(
        Field(
            f"feedback_{_short(term)}",
            -2,
            2,
            f"change of the {term} score in the last joint step; 0 under 'final'",
        )
        for term in FAMILIES
    ),
)
"""An agent's observation."""

STATE_FIELDS: tuple[Field, ...] = (
    Field("progress", 0, 1, "share of the episode's steps taken"),
    Field("potential", *SCORE_BOUNDS, "weighted mean of the term scores; 0 under reward='final'"),
    *(
        Field(f"score_{_short(term)}", *SCORE_BOUNDS, f"{term} score of the plan; 0 under 'final'")
        for term in FAMILIES
    ),
    *(
        field
        for slot in SLOTS
        for field in (
            Field(f"{slot}.mask", 0, 1, "1 if the slot has a network; else all its fields are 0"),
            Field(f"{slot}.budget", 0, 1, "keep ratio of the cost that the network must meet"),
            Field(f"{slot}.log_budget", 0, 1, "-log10(budget) / 3"),
            Field(f"{slot}.unused", 0, 1, "share of the budget left unused"),
            Field(f"{slot}.mean_keep_ratio", 0, 1, "mean kept share of channels over the groups"),
            Field(f"{slot}.lap_left", 0, 1, "share of the lap's decisions still to take"),
            Field(f"{slot}.position", 0, 1, "place of the group to decide next: 0 first, 1 last"),
            Field(f"{slot}.last_action", -1, 1, "the agent's last action"),
            *(
                Field(
                    f"{slot}.profile_{i}",
                    -2,
                    2,
                    "log(keep ratio / uniform plan's), in largest moves, over the depth",
                )
                for i in range(PROFILE_LENGTH)
            ),
        )
    ),
)
"""The state: what a centralised critic sees beside the agent's own vector."""


def build_space(*groups: Sequence[Field]) -> spaces.Box:
    """The float32 box of the fields, in order."""
    fields = [field for group in groups for field in group]
    return spaces.Box(
        np.array([field.low for field in fields], dtype=np.float32),
        np.array([field.high for field in fields], dtype=np.float32),
        dtype=np.float32,
    )


def build_vector(fields: Sequence[Field], values: Mapping[str, float]) -> NDArray[np.float32]:
    """(len(fields),) float32, clipped to the bounds.

    Raises:
        ValueError: if the values' names are not the fields', or a value is not finite.
    """
    if len(values) != len(fields) or any(field.name not in values for field in fields):
        raise ValueError(
            f"values and fields differ in {sorted(set(values) ^ {field.name for field in fields})}"
        )
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"observations must be finite; {', '.join(wrong)} are not")
    clipped = [min(max(float(values[field.name]), field.low), field.high) for field in fields]
    return np.array(clipped, dtype=np.float32)


class Feedback(NamedTuple):
    """What the last joint step did.

    Attributes:
        progress: share of the episode's steps taken.
        potential: potential of the plan; 0 while it is not scored.
        scores: term → score of the plan; empty while it is not scored.
        reward: reward of the last step.
        changes: term → change of its score in the last step.
        weight: sum of the reward's weights, by which what is seen of potential and reward is divided: in the
            unit of one term, however the terms are weighted.
    """

    progress: float = 0.0
    potential: float = 0.0
    scores: Mapping[str, float] = {}
    reward: float = 0.0
    changes: Mapping[str, float] = {}
    weight: float = 1.0


class GroupFacts(NamedTuple):
    """What never changes about a network's groups; every array is (n,)."""

    position: NDArray[np.float64]
    cost_share: NDArray[np.float64]
    top: NDArray[np.float64]
    effective: NDArray[np.float64]


def group_facts(network: PrunableNetwork) -> GroupFacts:
    """Compute the constant fields of all groups once; ``top`` is (n, len(TOP_SHARES))."""
    n = len(network.groups)
    dense = network.channels
    cut = np.repeat(dense[None], n, axis=0)
    cut[np.arange(n), np.arange(n)] = network.minimum
    whole = float(network.cost_of(dense))
    shares = [importance / importance.sum() for importance in network.importance]
    return GroupFacts(
        position=np.linspace(0.0, 1.0, n) if n > 1 else np.zeros(1),
        cost_share=1.0 - network.cost_of(cut) / whole,
        top=np.array([[share[: math.ceil(t * len(share))].sum() for t in TOP_SHARES] for share in shares]),
        effective=np.array([math.exp(-np.sum(s * np.log(np.maximum(s, 1e-300)))) / len(s) for s in shares]),
    )


def in_moves(ratio: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm to the base ``LARGEST_MOVE``: one decision moves a proportion by at most ± 1."""
    return np.log(ratio) / math.log(LARGEST_MOVE)


def resample(values: NDArray[np.float64], length: int = PROFILE_LENGTH) -> NDArray[np.float64]:
    """(length,) linear interpolation from the first value to the last."""
    return np.interp(np.linspace(0.0, len(values) - 1, length), np.arange(len(values)), values)


def _log_budget(budget: float) -> float:
    return -math.log10(budget) / 3


def _mean_keep_ratio(laps: Laps) -> float:
    return float(np.mean(laps.widths / laps.network.channels))


def _lap_left(laps: Laps) -> float:
    return 1.0 - laps.turn / laps.length


def _budget_left(laps: Laps) -> float:
    bound = np.where(laps.decided, laps.widths, laps.network.minimum)
    return (
        1.0 - float(laps.network.cost_of(bound) / laps.network.cost_of(laps.network.channels)) / laps.budget
    )


def observe_local(
    laps: Laps, peer: Laps | None, facts: GroupFacts, feedback: Feedback
) -> NDArray[np.float32]:
    """An agent's observation, (len(LOCAL_FIELDS),) float32.

    Args:
        laps: the agent's own network.
        peer: its adversary's, or None.
        facts: constants of its own network.
        feedback: what the last joint step did.
    """
    network, g, room = laps.network, laps.group, laps.room
    group, importance = network.groups[g], network.importance[g]
    values = {
        "is_discriminator": float(network.kind == "discriminator"),
        "groups": len(network.groups) / 32,
        "progress": feedback.progress,
        "lap_left": _lap_left(laps),
        "budget": laps.budget,
        "log_budget": _log_budget(laps.budget),
        "budget_left": _budget_left(laps),
        "mean_keep_ratio": _mean_keep_ratio(laps),
        "position": facts.position[g],
        "transposed": float(group.kind == "transposed"),
        "kernel": math.log2(group.kernel) / 3,
        "stride": math.log2(group.stride),
        "channels": math.log2(group.channels) / 10,
        "resolution": math.log2(group.resolution) / 10,
        "cost_share": facts.cost_share[g],
        "top_10": facts.top[g, 0],
        "top_25": facts.top[g, 1],
        "top_50": facts.top[g, 2],
        "effective_channels": facts.effective[g],
        "importance_kept": importance[: laps.widths[g]].sum() / importance.sum(),
        "keep_ratio": room.proportion,
        "relative_keep_ratio": float(in_moves(room.proportion / laps.uniform.proportions[g])),
        "room_up": float(in_moves(room.high / room.start)),
        "room_down": float(in_moves(room.start / room.low)),
        "last_action": laps.last_action,
        "last_change": laps.last_change / math.log(LARGEST_MOVE),
        "has_peer": 0.0,
        "peer_budget": 0.0,
        "peer_mean_keep_ratio": 0.0,
        "peer_lap_left": 0.0,
        "peer_last_action": 0.0,
        "peer_last_change": 0.0,
        "feedback_reward": feedback.reward / feedback.weight,
        **{f"feedback_{_short(term)}": feedback.changes.get(term, 0.0) for term in FAMILIES},
    }
    if peer is not None:
        values |= {
            "has_peer": 1.0,
            "peer_budget": peer.budget,
            "peer_mean_keep_ratio": _mean_keep_ratio(peer),
            "peer_lap_left": _lap_left(peer),
            "peer_last_action": peer.last_action,
            "peer_last_change": peer.last_change / math.log(LARGEST_MOVE),
        }
    return build_vector(LOCAL_FIELDS, values)


def observe_state(
    slots: Mapping[str, Laps], facts: Mapping[str, GroupFacts], feedback: Feedback
) -> NDArray[np.float32]:
    """The critic's state, (len(STATE_FIELDS),) float32.

    Args:
        slots: slot → the network in it; a subset of ``SLOTS``.
        facts: slot → constants of that network.
        feedback: what the last joint step did.
    """
    values: dict[str, float] = {field.name: 0.0 for field in STATE_FIELDS}
    values |= {"progress": feedback.progress, "potential": feedback.potential / feedback.weight}
    values |= {f"score_{_short(term)}": feedback.scores.get(term, 0.0) for term in FAMILIES}
    for slot, laps in slots.items():
        profile = resample(in_moves(laps.proportions / laps.uniform.proportions))
        values |= {
            f"{slot}.mask": 1.0,
            f"{slot}.budget": laps.budget,
            f"{slot}.log_budget": _log_budget(laps.budget),
            f"{slot}.unused": laps.unused,
            f"{slot}.mean_keep_ratio": _mean_keep_ratio(laps),
            f"{slot}.lap_left": _lap_left(laps),
            f"{slot}.position": facts[slot].position[laps.group],
            f"{slot}.last_action": laps.last_action,
            **{f"{slot}.profile_{i}": value for i, value in enumerate(profile.tolist())},
        }
    return build_vector(STATE_FIELDS, values)


def assign_slots(networks: Mapping[str, PrunableNetwork]) -> dict[str, str]:
    """Slot → agent: by kind, then by name, so that the order of the agents does not matter.

    Raises:
        ValueError: if there are more than two networks of a kind.
    """
    slots: dict[str, str] = {}
    for kind in ("generator", "discriminator"):
        free = [slot for slot in SLOTS if slot.startswith(kind)]
        agents = sorted(agent for agent, network in networks.items() if network.kind == kind)
        if len(agents) > len(free):
            raise ValueError(
                f"at most {len(free)} networks of a kind have a slot in the state; got {', '.join(agents)}"
            )
        slots |= dict(zip(free, agents, strict=False))
    return slots
