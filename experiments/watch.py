"""What a person sees while a run works: a bar per stage, the best so far, the seconds of everything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from envs.records import Episode, Evaluation
from experiments.runs import MetricsLog, episode_row
from gan.evaluations import PrunableNetwork


class Stage:
    """One bar: ``advance`` moves it, ``say`` sets the text behind it."""

    def __init__(self, progress: Progress, total: float | None, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def advance(self, step: float = 1, note: str | None = None) -> None:
        self._progress.advance(self._task, step)
        if note is not None:
            self.say(note)

    def at(self, done: float, total: float) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def say(self, note: str) -> None:
        self._progress.update(self._task, note=note)

    def finish(self) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        self._progress.update(self._task, total=task.total or 1, completed=task.total or 1)


class Watch:
    """Times the stages of a run and shows them.

    Attributes:
        console: where everything is printed.
        seconds: stage → wall seconds, in the order of the stages.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        """Show a bar while the block runs; its seconds are kept, also when it is interrupted.

        Stages of one name are summed up in ``seconds``; what is printed is this one's time.
        """
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        started = time.perf_counter()
        live = self.console.is_terminal
        try:
            with Progress(*columns, console=self.console, transient=live, disable=not live) as progress:
                stage = Stage(progress, total, name)
                yield stage
                stage.finish()
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
        self.console.print(f"{name:<22} {spent:8.1f} s", highlight=False)


class SearchListener:
    """Writes ``metrics.csv`` and keeps the search's bar up to date.

    Args:
        log: the metrics file.
        networks: agent → network, for the keep ratios that are shown.
        best: gives the best potential so far, or None.
        spent: gives the evaluations spent, and those that the search may spend.
        stage: the search's bar, or None.
    """

    def __init__(
        self,
        log: MetricsLog,
        networks: Mapping[str, PrunableNetwork],
        best: Callable[[], float | None],
        spent: Callable[[], tuple[int, int]],
        stage: Stage | None = None,
    ) -> None:
        self.stage = stage
        self._log, self._networks, self._best, self._spent = log, networks, best, spent
        self._episode_started = time.perf_counter()

    def on_plan(self, evaluation: Evaluation) -> None:
        """Move the bar; show best return and mean keep ratios."""
        if self.stage is None:
            return
        done, limit = self._spent()
        self.stage.at(done, limit)
        kept = " ".join(
            f"{agent[0].upper()}{agent[agent.find('_') :] if '_' in agent else ''} "
            f"{np.mean(np.array(evaluation.plan[agent]) / network.channels):.2f}"
            for agent, network in self._networks.items()
        )
        best = self._best()
        shown = "" if best is None else f"best {best:+.3f}  "
        self.stage.say(f"{shown}now {evaluation.potential:+.3f}  channels kept {kept}")

    def on_episode(self, episode: Episode) -> None:
        """Append the episode's row."""
        now = time.perf_counter()
        self._log.append(episode_row(episode, now - self._episode_started))
        self._episode_started = now
