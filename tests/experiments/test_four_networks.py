"""Both directions of a translator on the road from the dense networks to the table, in miniature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gan
import gan.tasks
from agents.gradient import Gradient
from agents.registry import AGENTS as LEARNERS
from agents.registry import build_agent
from envs.budget import Budget
from envs.pruning_env import PruningEnv
from envs.toy import toy_scorer
from experiments import build, cli, credit, export, finetune, measure, pareto, road, train_agents, translate
from experiments.build import build_budgets, check_reachable, prunable
from experiments.runs import open_run, read_metrics
from gan.checkpoints import load_network
from gan.errors import UserError
from gan.evaluation import COLUMNS
from gan.evaluations import CountedScorer
from gan.plans import Plan
from gan.two_way import FOUR_AGENTS, TwoWayScorer
from tests.gan.conftest import fake_extractor
from tests.gan.test_two_way import make_both

STAGES = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
ARGUMENTS = ["--task", "noto_and_twemoji", "--budget", "generator=0.4,discriminator=0.5,generator_B=0.6"]
ARGUMENTS += ["--evaluations", "6", "--epochs", "1", "--warm-up", "2"]


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Programs see tiny networks, by whatever name they ask."""
    task = replace(make_both(), name="noto_and_twemoji")
    with pytest.MonkeyPatch.context() as patch:
        for program in (train_agents, road, export, translate):
            patch.setattr(program, "load_any_task", lambda *_: task)
        for module in (gan.tasks, road):
            patch.setattr(module, "load_extractor", lambda device: fake_extractor())
        for module in (gan.tasks, build):
            patch.setattr(module, "bfloat16_pays", lambda device: False)
        yield patch


def call(program: Any, *arguments: str) -> None:
    cli.run(program.main, program.Options, "", (), list(arguments))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("four")
    call(train_agents, *ARGUMENTS, "--output", str(folder / "run"))
    return folder / "run"


def test_the_run_folder_holds_both_directions(work: Path) -> None:
    names = {path.name for path in work.iterdir()}
    expected = {"options.json", "run.json", "metrics.csv", "evaluations.jsonl", "tensorboard", "policy"}
    expected |= {cli.LOCK, "plan.json", "credit.json", "ranking.json", "elastic.json", "evaluation.json"}
    expected |= {"curves.pdf", "widths.pdf"}
    expected |= {"curves.png", "widths.png", "samples.png", "elastic_A.safetensors", "elastic_B.safetensors"}
    for stage in ("", "_raw", "_uniform"):
        for agent in FOUR_AGENTS:
            expected |= {f"{agent}{stage}.safetensors", f"{agent}{stage}.json"}
    assert names == expected
    assert list(json.loads((work / "ranking.json").read_text())) == list(FOUR_AGENTS)
    with Image.open(work / "samples.png") as image:
        assert image.width > 10 * 128


def test_every_stage_has_a_row_for_each_direction(work: Path) -> None:
    rows = json.loads((work / "evaluation.json").read_text())["rows"]
    assert list(rows) == [f"{stage}_{way}" for stage in STAGES for way in "AB"]
    for row in rows.values():
        assert tuple(row) == COLUMNS
    for way, share in (("A", 0.4), ("B", 0.6)):
        assert 0.5 * share < rows[f"pruned_{way}"]["params"] / rows[f"dense_{way}"]["params"] <= share
        assert rows[f"pruned_{way}"] != rows[f"pruned_raw_{way}"]
        assert rows[f"dense_{way}"]["crowd_gap"] == pytest.approx(0, abs=0.02)


def test_budgets_of_a_kind_are_for_both_directions(work: Path) -> None:
    frame = read_metrics(open_run(work))
    for agent, share in zip(FOUR_AGENTS, (0.4, 0.6, 0.5, 0.5), strict=True):
        assert (frame[f"{agent}.budget"] == share).all()
        assert (frame[f"{agent}.sparsity"] >= 1 - share).all()
    assert build_budgets("0.2", FOUR_AGENTS)["generator_B"] == Budget(0.2, 0.2)
    with pytest.raises(UserError, match="cannot be reached"):
        check_reachable(make_both(), build_budgets("generator_B=0.001", FOUR_AGENTS), "params")
    assert tuple(prunable(make_both())) == FOUR_AGENTS


def test_credit_is_shared_among_four(work: Path) -> None:
    shared = json.loads((work / "credit.json").read_text())
    assert list(shared["shapley"]) == list(FOUR_AGENTS)
    assert sum(shared["shapley"].values()) == pytest.approx(shared["joint"])


def test_the_saved_networks_are_the_plan(work: Path) -> None:
    plan = Plan.from_dict(json.loads((work / "plan.json").read_text())["best"])
    for agent in FOUR_AGENTS:
        network, architecture, recipe = load_network(work / f"{agent}.safetensors")
        assert architecture.widths == plan[agent]
        assert recipe["plan"]["widths"][agent.split("_")[0]] == list(plan[agent])
        assert not network.training
        torch.testing.assert_close(gan.load(work, agent).state_dict(), network.state_dict())


def test_an_interrupted_run_goes_on(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    (tmp_path / "run" / "elastic_B.safetensors").unlink()
    log = tmp_path / "run" / "evaluations.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-4]) + whole[-4][:20])
    call(train_agents, "--resume", str(tmp_path / "run"))
    plans = [json.loads(line)["plan"] for line in whole[1:]]
    assert [json.loads(line)["plan"] for line in log.read_text().splitlines()[1:]] == plans
    for name in FOUR_AGENTS:
        before, after = (gan.load(folder, name).state_dict() for folder in (work, tmp_path / "run"))
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_direction_is_exported(work: Path, tmp_path: Path) -> None:
    call(export, str(work), "--network", "generator_B", "--quick", "--output", str(tmp_path / "export"))
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"generator_B.safetensors", "generator_B.onnx", "pruned_generator_B.py"} <= names
    recipe = json.loads((tmp_path / "export" / "generator_B.json").read_text())
    assert recipe["start"]["source"]["file"] == "elastic_B.safetensors"
    assert recipe["start"]["agent"] == "generator"


@pytest.mark.parametrize("dense", [[], ["--dense"]])
def test_a_direction_translates(work: Path, tmp_path: Path, dense: list[str]) -> None:
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "a.png")
    made = [tmp_path / way for way in "AB"]
    for folder in made:
        network = ["--network", f"generator_{folder.name}", "--input", str(tmp_path / "a.png")]
        call(translate, str(work), *network, "--output", str(folder), *dense)
    pixels = [np.asarray(Image.open(folder / "a.png")) for folder in made]
    assert (pixels[0] != pixels[1]).any()


def test_a_direction_is_measured(work: Path, tmp_path: Path) -> None:
    arguments = ["--network", "generator_A", "--rounds", "1", "--runs", "1", "--threads", "1", "--no-memory"]
    call(measure, str(work), *arguments, "--output", str(tmp_path / "a.json"))
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["network"] for row in rows} == {"dense", "pruned", "uniform"}


@pytest.mark.parametrize(
    ("program", "arguments"),
    [(export, []), (measure, []), (translate, ["--input", "a", "--output", "b"])],
)
def test_without_a_name_the_programs_say_which_there_are(
    work: Path, capsys: pytest.CaptureFixture[str], program: Any, arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(program, str(work), *arguments)
    assert stopped.value.code == 2
    assert "has no 'generator' but generator_A, generator_B, discriminator_A" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments"), [(finetune, ["--epochs", "1"]), (credit, []), (pareto, [])]
)
def test_programs_for_one_pair_say_so(
    work: Path, capsys: pytest.CaptureFixture[str], program: Any, arguments: list[str]
) -> None:
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        call(program, str(work), *arguments)
    assert stopped.value.code == 2
    assert "one pair" in capsys.readouterr().err
    assert sorted(work.rglob("*")) == before


def test_loading_without_a_name_says_which_there_are(work: Path) -> None:
    with pytest.raises(UserError, match=r"holds generator_A and generator_B; .* 'generator_A'\)"):
        gan.load(work)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "generator_C=0.2"], "known are discriminator, discriminator_A"),
        (["--budget", "generator_A=0.0001"], "generator_A's params cannot be reached"),
        (["--schedule", "cosine"], "ingredients of finetuning need pairs"),
        (["--warm-up", "0", "--budget", "0.5"], "comes without elastic weights"),
    ],
)
def test_bad_input_is_one_sentence(
    patched: pytest.MonkeyPatch, arguments: list[str], sentence: str, refused: Callable[..., None]
) -> None:
    refused(train_agents.main, train_agents.Options, [*ARGUMENTS[:2], *arguments], sentence)


def env_of(scorer: Any, evaluations: int = 16) -> PruningEnv:
    counted = CountedScorer(scorer, limit=evaluations)
    env = PruningEnv(counted, build_budgets("generator=0.4", counted.networks), reward="final")
    env.prepare()
    return env


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - {"gradient"}))
def test_learners_steer_four_networks(name: str) -> None:
    env = env_of(TwoWayScorer({"A": toy_scorer(), "B": toy_scorer(coupling=0.2)}))
    agent = build_agent(name, 1)
    agent.learn(env)
    assert env.scorer.evaluations <= 16
    plan = agent.propose(env)
    assert plan.agents == FOUR_AGENTS
    assert env.evaluate(plan, counted=False).budgets["generator_B"] == 0.4


def test_gradients_reach_both_directions(patched: pytest.MonkeyPatch) -> None:
    env = env_of(make_both().scorer("params", "dense", statistics_images=12), 6)
    agent = build_agent("gradient", 1, steps=1, every=3)
    agent.learn(env)
    assert isinstance(agent, Gradient)
    assert agent.agents is not None
    assert list(agent.agents) == list(FOUR_AGENTS)
    assert all(player.head.weight.any() for player in agent.agents.values())  # they begin at 0
