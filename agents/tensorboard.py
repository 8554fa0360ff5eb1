"""TensorBoard events of a search: one point per episode, over the evaluations spent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stable_baselines3.common.logger import Logger, configure


class EpisodeLog:
    """Writes the return and every reward term by name; what else is recorded in ``logger`` goes along.

    Args:
        folder: where the event file goes; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        # without a folder a bare logger: SB3's own default would write to a temporary folder
        self.logger = Logger(None, []) if folder is None else configure(str(folder), ["tensorboard"])

    def record(self, evaluations: int, potential: float, scores: Mapping[str, float]) -> None:
        """Log an episode.

        Args:
            evaluations: spent so far; the horizontal axis.
            potential: the episode's return: how much better than uniform its last plan is.
            scores: term → unweighted score of the last plan.
        """
        self.logger.record("episode/return", potential)
        for term, score in scores.items():
            self.logger.record(f"score/{term}", score)
        self.logger.dump(evaluations)

    def close(self) -> None:
        """Write what is pending."""
        self.logger.close()
