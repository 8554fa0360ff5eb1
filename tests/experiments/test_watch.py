from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from envs.toy import toy_env
from experiments.runs import MetricsLog, RunFolder, read_metrics
from experiments.watch import SearchListener, Watch


def test_stages_are_timed_also_when_they_are_interrupted() -> None:
    watch = Watch(Console(file=io.StringIO()))
    with watch.stage("one", 3) as stage:
        stage.advance(note="half")
    with pytest.raises(KeyboardInterrupt), watch.stage("two"):
        raise KeyboardInterrupt
    assert list(watch.seconds) == ["one", "two"]
    assert all(seconds >= 0 for seconds in watch.seconds.values())


def test_a_stage_that_comes_twice_adds_up_and_prints_each_time() -> None:
    text = io.StringIO()
    watch = Watch(Console(file=text))
    watch.seconds["one"] = 5000.0
    with watch.stage("one"):
        pass
    assert watch.seconds["one"] >= 5000.0
    assert float(text.getvalue().split()[-2]) < 5000.0


def test_the_bar_shows_best_return_and_keep_ratios(tmp_path: Path) -> None:
    text = io.StringIO()
    watch = Watch(Console(file=text, force_terminal=True, width=160))
    env = toy_env(evaluations=10)
    listener = SearchListener(
        MetricsLog(tmp_path / "metrics.csv"),
        env.scorer.networks,
        best=lambda: env.best.potential if env.best else None,
        spent=lambda: (env.scorer.evaluations, 10),
    )
    with watch.stage("search", 10) as stage:
        listener.stage, env.listener = stage, listener
        env.reset(seed=0)
        while env.agents:
            env.step({agent: np.full(1, 0.3, np.float32) for agent in env.agents})
    assert "best +" in text.getvalue()
    assert "channels kept G 0." in text.getvalue()
    frame = read_metrics(RunFolder(tmp_path))
    assert len(frame) == 1
    assert frame["evaluations"][0] == env.scorer.evaluations
