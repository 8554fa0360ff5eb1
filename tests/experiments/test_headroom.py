from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch import nn

import gan.tasks
from agents.registry import build_agent
from envs.toy import toy_env, toy_network
from experiments import cli, headroom
from experiments.headroom import SHAPES, Cell, compare_plans, shape_proportions, summarise
from experiments.runs import read_options
from experiments.trials import Settings, Trial, TrialResult
from experiments.watch import Watch
from gan.errors import UserError
from gan.groups import ChannelGroup
from gan.latency import LatencyTable, measure_latency
from gan.plans import Plan
from gan.tasks import Task

CELL = "edges2emoji:macs:0.1"
OTHER = "edges2emoji:params:generator=0.1,discriminator=0.3"


def result(label: str, seed: int, kid: float, latency: float = 1.0) -> TrialResult:
    row = dict.fromkeys(headroom.SHOWN, 1.0) | {headroom.KID: kid, "latency_ms": latency}
    return TrialResult(Trial(label, Plan.of({"generator": [len(label)]}), seed), row, row, 0.0, 0.0, 1.0)


def groups(*heights: int) -> tuple[ChannelGroup, ...]:
    return tuple(ChannelGroup(f"g{i}", 8, (), "conv", 4, 2, height) for i, height in enumerate(heights))


def test_shapes_of_a_unet() -> None:
    """Eleven groups of the embedded one: six levels down, five up."""
    unet = groups(32, 16, 8, 4, 2, 1, 2, 4, 8, 16, 32)
    wide_ends = shape_proportions("wide_ends", unet)
    np.testing.assert_allclose(wide_ends * 2, [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2])
    steep = shape_proportions("steep", unet)
    np.testing.assert_allclose(steep * 4, [4, 3, 2, 1, 0.3, 0.15, 0.3, 1, 2, 3, 4])


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_any_generator(name: str) -> None:
    resnet = shape_proportions(name, groups(64, 32, 16, 16, 16, 32, 64))
    assert resnet.max() == 1.0
    assert resnet[0] == resnet[-1] > resnet[3]  # wider where the maps are larger
    assert resnet[2] == resnet[3]
    np.testing.assert_array_equal(shape_proportions(name, groups(16, 16)), [1, 1])
    chain = toy_network("generator", (8, 8, 8)).groups
    assert np.isfinite(shape_proportions(name, chain)).all()


def test_plans_of_a_search() -> None:
    env = toy_env(40)
    build_agent("cma-es").learn(env)
    content = compare_plans(env)
    plans = {name: Plan.from_dict(plan) for name, plan in content["plans"].items()}
    assert list(plans) == ["uniform", *SHAPES, "found"]
    assert plans["uniform"] == env.uniform_plan()
    assert plans["found"] == env.best.plan
    for name in SHAPES:
        assert plans[name]["discriminator"] == env.uniform_plan()["discriminator"]
        assert plans[name]["generator"] != env.uniform_plan()["generator"]
    potential = content["search"]["potential"]
    assert potential["uniform"] == 0.0
    assert potential["found"] == max(potential.values())
    assert content["search"]["evaluations"] == env.scorer.evaluations == 40


@pytest.mark.parametrize(("algo", "own"), [("magnitude", True), ("random", False)])
def test_a_rule_is_finetuned_by_its_own_plan_however_it_scores(
    algo: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best plan that was scored is the uniform one, where the rule's is worse."""
    env = toy_env(20)
    env.prepare()
    steep = {agent: np.geomspace(9, 1, len(one.groups)) for agent, one in env.scorer.networks.items()}
    poor = env.evaluate(env.plan_from_proportions(steep), counted=False)
    assert poor.potential < 0
    learner = SimpleNamespace(name=algo, learn=lambda _: None, propose=lambda *_: poor.plan)
    monkeypatch.setattr(headroom, "build_env", lambda *_, **__: env)
    monkeypatch.setattr(headroom, "build_learner", lambda *_: learner)
    monkeypatch.setattr(Task, "scorer", lambda *_, **__: None)
    options = headroom.Options(algo=algo, shapes=(), quick=True)
    place = headroom.CellFolder(tmp_path)
    content = headroom.search(Cell.of(CELL), place, options, Watch(Console(quiet=True)))
    assert Plan.from_dict(content["plans"]["found"]) == (poor.plan if own else env.uniform_plan())


def test_differences_are_paired_by_seed() -> None:
    # seeds differ by 1, plans by 0.1 and 0.3: a mean difference of -0.2 and, unpaired, nothing to see
    uniform = [result("uniform", 0, 1.0, 9.0), result("uniform", 1, 2.0)]
    found = [result("found", 1, 1.7), result("found", 0, 0.9)]
    rows = summarise(found + uniform)
    assert rows["found"].kid == (0.9, 1.7)
    assert rows["found"].kid_spread == pytest.approx(0.8 / math.sqrt(2))
    value, low, high = rows["found"].difference
    assert value == pytest.approx(-0.2)
    assert rows["found"].relative == pytest.approx(-0.2 / 1.5)
    # t(0.975, 1 degree of freedom) = 12.706; standard error = |0.1 - 0.3| / 2
    assert (low, high) == pytest.approx((-0.2 - 1.2706, -0.2 + 1.2706), abs=1e-4)
    assert rows["uniform"].difference == (0.0, 0.0, 0.0)
    assert rows["uniform"].means["latency_ms"] == 5.0


@dataclass
class Work:
    """Stand-ins for what takes hours: counts calls, and can be interrupted."""

    searches: int = 0
    trained: int = 0
    stop_after: int | None = None

    def search(self, cell: Cell, folder: headroom.CellFolder, *_: Any) -> dict[str, Any]:
        self.searches += 1
        env = toy_env(20)
        build_agent("cma-es").learn(env)
        return compare_plans(env)

    def run_trials(
        self, settings: Settings, trials: Sequence[Trial], log: Path, *, on_done: Any, **_: Any
    ) -> list[TrialResult]:
        assert (settings.task, settings.weights, settings.split) == ("edges2emoji", "elastic", "test")
        known = set(log.read_text().splitlines()) if log.exists() else set()
        done = []
        for trial in trials:
            name = f"{trial.label} {trial.seed}"
            kid = 1.0 + 0.1 * trial.seed - (0.05 if trial.label == "found" else 0.0)
            made = result(trial.label, trial.seed, kid)
            if name not in known:
                if self.trained == self.stop_after:
                    raise KeyboardInterrupt
                self.trained += 1
                with log.open("a") as file:
                    file.write(name + "\n")
                on_done(made)
            done.append(made)
        return done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(headroom, "search", work.search)
    monkeypatch.setattr(headroom, "run_trials", work.run_trials)
    monkeypatch.setattr(headroom, "elastic_weights", lambda task, options: {})
    return work


def call(*arguments: str) -> None:
    cli.run(headroom.main, headroom.Options, "", (), arguments)


def test_an_interrupted_study_goes_on(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "study"
    plans = len(SHAPES) + 2
    work.stop_after = 3 * plans + 2  # in the second cell
    given = ["--cell", CELL, "--cell", OTHER, "--seeds", "3", "--evaluations", "20"]
    with pytest.raises(SystemExit) as stopped:
        call(*given, "--output", str(output))
    assert stopped.value.code == 130
    assert f"--resume {output}" in capsys.readouterr().err
    assert list(json.loads((output / "headroom.json").read_text())["cells"]) == ["edges2emoji-macs-0.1"]
    work.stop_after = None
    call(*given, "--resume", str(output))
    assert (work.searches, work.trained) == (2, 2 * 3 * plans)  # nothing twice

    cells = json.loads((output / "headroom.json").read_text())["cells"]
    assert list(cells) == ["edges2emoji-macs-0.1", "edges2emoji-params-generator0.1-discriminator0.3"]
    for name, cell in cells.items():
        assert json.loads((output / name / "cell.json").read_text()) == cell
        assert cell["rows"]["found"]["difference"][0] == pytest.approx(-0.05)
    table = (output / "table.md").read_text()
    assert table.count("| found |") == 2
    assert "-0.0500 (-0.0500 to -0.0500) | -4.5 |" in table
    assert (output / "headroom.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "headroom.pdf").read_bytes().startswith(b"%PDF")

    call("--resume", str(output))  # a finished one is read
    assert (work.searches, work.trained) == (2, 2 * 3 * plans)


def test_one_seed_has_no_interval(work: Work, tmp_path: Path) -> None:
    call("--cell", CELL, "--seeds", "1", "--output", str(tmp_path / "study"))
    line = next(
        line for line in (tmp_path / "study/table.md").read_text().splitlines() if line.startswith("| found")
    )
    assert line.split(" | ")[2:5] == ["0.9500", "-0.0500", "-5.0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cell", "edges2emoji:macs"], "TASK:COST:BUDGET"),
        (["--cell", "edges2emoji:macs:"], "TASK:COST:BUDGET"),
        (["--cell", "edges2emojis:macs:0.1"], "did you mean 'edges2emoji'"),
        (["--cell", "edges2emoji:mac:0.1"], "did you mean 'macs'"),
        (["--cell", "edges2emoji:macs:0.05:0.5"], "range"),
        (["--cell", "edges2emoji:macs:0.0001"], "reach"),
        (["--cell", CELL, "--cell", CELL], "twice"),
        (["--cell", CELL, "--seeds", "0"], "--seeds is 0"),
        (["--cell", CELL, "--epochs", "0"], "--epochs is 0"),
        (["--cell", CELL, "--seed", "-1"], "--seed is -1"),
        (["--cell", CELL, "--algo", "cmes"], "did you mean 'cma-es'"),
        ([], "no cell"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: list[str], sentence: str, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments, "--output", str(tmp_path / "study"))
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_study_is_resumed_as_it_was(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("--cell", CELL, "--output", str(tmp_path / "study"))
    with pytest.raises(SystemExit):
        call("--resume", str(tmp_path / "study"), "--epochs", "3")
    assert "leave out --epochs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("--cell", CELL)
    assert "--output" in capsys.readouterr().err


def test_a_cell_may_be_of_any_embedded_task() -> None:
    assert Cell.of("noto2twemoji:macs:0.2").task == "noto2twemoji"
    with pytest.raises(UserError, match="known are edges2emoji, edges2emoji_resnet, noto2twemoji, twemoji2n"):
        Cell.of("noto_and_twemoji:macs:0.2")


def test_cells_of_ranges_are_refused() -> None:
    with pytest.raises(UserError, match="range"):
        Cell.of("edges2emoji:macs:generator=0.1,discriminator=0.3:0.5")


def test_a_budget_of_latency_is_measured_once(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def clock(module: nn.Module, inputs: Any) -> float:
        return 0.1 + 1e-6 * sum(parameter.numel() for parameter in module.parameters())

    def quickly(network: nn.Module, *arguments: Any) -> LatencyTable:
        measured.append(network)
        return measure_latency(network, *arguments, timer=clock, points=2, rounds=1, runs=1)

    monkeypatch.setattr(gan.tasks, "measure_latency", quickly)
    output = tmp_path / "study"
    cells = [f"edges2emoji:latency:generator={budget},discriminator=0.6" for budget in (0.4, 0.5)]
    call("--cell", cells[0], "--cell", cells[1], "--output", str(output))
    assert len(measured) == 2  # a generator and a discriminator
    first, second = (output / Cell.of(text).name / "latency.json" for text in cells)
    assert first.read_text() == second.read_text()


@pytest.mark.slow
def test_the_whole_road(tmp_path: Path) -> None:
    call("--cell", CELL, "--quick", "--output", str(tmp_path / "study"))
    cell = json.loads((tmp_path / "study/headroom.json").read_text())["cells"]["edges2emoji-macs-0.1"]
    assert cell["search"]["evaluations"] == 24
    assert set(cell["rows"]) == {"uniform", "found", *SHAPES}
    for row in cell["rows"].values():
        assert 0.08 < row["means"]["macs"] / 94.9e6 < 0.102
        assert len(row["kid"]) == 2


def test_a_file_of_weights_is_found_from_anywhere(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = headroom.Options(cell=(CELL,), elastic=Path("mine.safetensors"), output=Path("study"))
    options, folder = headroom.open_folder(given)
    assert options.elastic == tmp_path / "mine.safetensors"
    assert read_options(folder, headroom.Options) == options
    again, _ = headroom.open_folder(replace(given, output=None, resume=folder.path))
    assert again.elastic == options.elastic  # the same may be given again
