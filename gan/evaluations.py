"""The evaluation log: every scored plan, counted, cached and appended to one file.

It is at once the cache (a plan is never scored twice), the count (what a search has spent) and the
resume (a run repeated from its seed reads the log until it gets to new plans).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gan.append_log import AppendLog
from gan.cost import CostKind, CostModel
from gan.groups import ChannelGroup
from gan.plans import Plan

FAMILIES: dict[str, str] = {
    "crowd_gap": "density",
    "arrangement_gap": "density",
    "mmd_gap": "fidelity",
    "real_gap": "fidelity",
    "l1_gap": "fidelity",
    "feature_gap": "fidelity",
    "recovery_gap": "recovery",
    "balance_gap": "balance",
}
"""Reward term → family. Every gap but those in ``SIGNED`` is ≥ 0 and 0 for the dense pair."""
SIGNED = frozenset({"recovery_gap"})
"""Terms that may be below 0: finetuning may be predicted to end better than the dense pair."""


@dataclass(frozen=True)
class Scores:
    """What the scorer says of a plan.

    Attributes:
        gaps: distance from the dense pair by term (``FAMILIES``); 0 = identical, ≥ 0 but for ``SIGNED``.
        diagnostics: further finite numbers worth logging; never part of a reward.
    """

    gaps: Mapping[str, float]
    diagnostics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PrunableNetwork:
    """What a search may know of one network: everything but its weights.

    Attributes:
        kind: ``generator`` or ``discriminator``.
        groups: channel groups in forward order.
        multiple: widths are multiples of it (or the group's full width); at least one is kept.
        cost: closed-form cost of the widths.
        cost_kind: the cost that budgets speak of.
        importance: per group (channels,) importance of the channels, in descending order, > 0.
    """

    kind: str
    groups: tuple[ChannelGroup, ...]
    multiple: int
    cost: CostModel
    cost_kind: CostKind
    importance: tuple[NDArray[np.float64], ...]

    @property
    def channels(self) -> NDArray[np.int64]:
        """(n,) dense widths."""
        return np.array([group.channels for group in self.groups], dtype=np.int64)

    @property
    def minimum(self) -> NDArray[np.int64]:
        """(n,) smallest allowed widths: one multiple, or the full width where that is smaller."""
        return np.minimum(self.multiple, self.channels)

    def cost_of(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost in ``cost_kind`` units; ``widths`` is (..., n), the result (...)."""
        return self.cost.of(self.cost_kind, widths)


class PlanScorer(Protocol):
    """Anything that scores plans: the real scorer, or an analytic one."""

    @property
    def networks(self) -> Mapping[str, PrunableNetwork]:
        """Agent → network, in the order of the agents (generators first)."""

    @property
    def ranking(self) -> str:
        """Name of the channel ranking that plans refer to."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """What the scores depend on (hashes of weights, probe, extractor, formulas)."""

    def score(self, plan: Plan) -> Scores:
        """Score a plan; deterministic."""


class EvaluationLog:
    """Append-only ``evaluations.jsonl``: a header line, then one line per scored plan.

    A torn last line (the process died while writing) is dropped on reading and cut off before the
    next append.

    Attributes:
        scores: plan key → scores, of every plan in the file.
        counted: keys of the counted plans, in the order of the file.
        search_seconds, reference_seconds: that scoring the counted and the other plans took, of those that
            the file held when it was opened.

    Raises:
        LogMismatch: if the file was written by a scorer with another fingerprint, or is no log.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        self.path = path
        self.scores: dict[str, Scores] = {}
        self.counted: list[str] = []
        self.search_seconds = self.reference_seconds = 0.0
        self._file = AppendLog(path, fingerprint, self._read, kind="evaluation log", entries="scores")

    def _read(self, entry: Mapping[str, Any]) -> None:
        key = Plan.from_dict(entry["plan"]).key
        scores, seconds = Scores(entry["gaps"], entry["diagnostics"]), float(entry["seconds"])
        self.scores[key] = scores
        if entry["counted"]:
            self.counted.append(key)
            self.search_seconds += seconds
        else:
            self.reference_seconds += seconds

    def append(self, plan: Plan, scores: Scores, counted: bool, seconds: float) -> None:
        entry = {
            "plan": plan.to_dict(),
            "gaps": dict(scores.gaps),
            "diagnostics": dict(scores.diagnostics),
            "counted": counted,
            "seconds": round(seconds, 4),
        }
        self._file.append(entry)
        self.scores[plan.key] = scores


class CountedScorer:
    """A scorer with a cache, a log and a count.

    An *evaluation* is the first time that this run requests a plan, whether its score is computed
    or read from the log. Reference plans (``counted=False``) are free. A search that computes something
    else than scores says so by :meth:`spend`. A search ends after ``limit`` evaluations, or 4 × ``limit``
    requests: a policy that repeats itself must end too.

    Attributes:
        evaluations: distinct plans that this run has requested, and what it spent otherwise.
        requests: all requests of this run.
        computed: requests that were really computed.
        replay_left: position in the log at which the run left it, or None while it follows.
    """

    def __init__(
        self, scorer: PlanScorer, log: EvaluationLog | None = None, limit: int | None = None
    ) -> None:
        self.scorer = scorer
        self.log = log
        self.limit = limit
        self.evaluations = self.requests = self.computed = 0
        self.replay_left: int | None = None
        self._cache: dict[str, Scores] = dict(log.scores) if log else {}
        self._replay: list[str] = list(log.counted) if log else []
        self._counted = set(self._replay)
        self._seen: set[str] = set()

    @property
    def networks(self) -> Mapping[str, PrunableNetwork]:
        return self.scorer.networks

    @property
    def ranking(self) -> str:
        return self.scorer.ranking

    @property
    def exhausted(self) -> bool:
        """True once the search has spent its evaluations or its requests."""
        return self.limit is not None and (self.evaluations >= self.limit or self.requests >= 4 * self.limit)

    def spend(self, evaluations: int) -> None:
        """Count work that is no plan's score, such as gradient steps, as so many evaluations."""
        self.evaluations += evaluations

    def score(self, plan: Plan, *, counted: bool = True) -> Scores:
        """Score a plan, from the cache when it is known.

        Raises:
            ValueError: if the scorer returns a gap that is negative or not finite.
        """
        key = plan.key
        first = False
        if counted:
            self.requests += 1
            first = key not in self._seen
        if first:
            self._follow_replay(key)
            self._seen.add(key)
            self.evaluations += 1
        if key in self._cache:
            if first and key not in self._counted and self.log is not None:
                # Known as a reference plan only: without this line a resumed run would lose its place.
                self.log.append(plan, self._cache[key], counted=True, seconds=0.0)
            return self._cache[key]
        start = time.perf_counter()
        scores = self.scorer.score(plan)
        for term, gap in scores.gaps.items():
            if not math.isfinite(gap) or (gap < 0 and term not in SIGNED):
                raise ValueError(f"{term} of plan {key} is {gap}; a gap must be finite and at least 0")
        self.computed += 1
        self._cache[key] = scores
        if self.log is not None:
            self.log.append(plan, scores, counted, time.perf_counter() - start)
        return scores

    def _follow_replay(self, key: str) -> None:
        """Note where the run leaves the log."""
        place = len(self._seen)
        if self.replay_left is None and place < len(self._replay) and self._replay[place] != key:
            self.replay_left = place
