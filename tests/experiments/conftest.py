"""Small run folders to read and draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import cli
from experiments.runs import MetricsLog, RunFolder, create_run, describe_run


@dataclass(frozen=True)
class SomeWeights:
    density: float = 0.1
    fidelity: float = 1.0


@dataclass(frozen=True)
class SomeOptions:
    """Options of every shape that the programs have."""

    task: str = "edges2emoji"
    algo: str = "mappo"
    seed: int = 0
    budget: str = "0.1"
    output: Path | None = None
    images: tuple[int, ...] = (64, 128)
    weights: SomeWeights = field(default_factory=SomeWeights)


def metrics_rows(episodes: int, seed: int = 0, steps: int = 10) -> list[dict[str, float | None]]:
    """Rows as an environment reports them: ``steps`` evaluations an episode, return = its number + noise."""
    random = np.random.default_rng(seed)
    rows: list[dict[str, float | None]] = []
    for episode in range(1, episodes + 1):
        noise = float(random.normal())
        row: dict[str, float | None] = {"episode": episode, "return": episode + noise}
        for term, weight in (("mmd_gap", 0.5), ("real_gap", 0.0)):
            row |= {f"{term}.score": 2.0 * episode, f"{term}.reward": 2.0 * episode * weight}
        for agent, budget in (("generator", 0.1), ("discriminator", 0.5)):
            row |= {f"{agent}.sparsity": 1 - budget, f"{agent}.channel_sparsity": 1 - budget**0.5}
            row |= {f"{agent}.budget": budget, f"{agent}.unused": 0.001}
        row |= {"evaluations": steps * episode, "requests": steps * episode, "best_potential": episode + 1.0}
        rows.append({**row, "seconds": 1.5})
    return rows


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Write a run folder with some episodes."""

    def make(algo: str = "mappo", seed: int = 0, episodes: int = 12, budget: str = "0.1") -> RunFolder:
        options = SomeOptions(algo=algo, seed=seed, budget=budget)
        folder = create_run(options.task, algo, seed, root=tmp_path / "runs")
        describe_run(folder, options)
        log = MetricsLog(folder.metrics)
        for row in metrics_rows(episodes, seed):
            log.append(row)
        return folder

    return make


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Call a program in an empty folder: it ends with code 2 and a sentence, and writes nothing."""

    def check(main: Callable[[Any], None], options: Any, arguments: Sequence[str], sentence: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            cli.run(main, options, "", (), arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert sentence in error
        assert "Traceback" not in error
        assert not list(tmp_path.iterdir())

    return check


@pytest.fixture
def frame() -> Callable[..., pd.DataFrame]:
    """A metrics frame as ``read_metrics`` gives it."""
    return lambda episodes=12, seed=0, steps=10: pd.DataFrame(metrics_rows(episodes, seed, steps))
