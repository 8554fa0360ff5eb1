"""Both directions of a user's own CycleGAN: from four checkpoints on the command line to the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gan
import gan.tasks
from experiments import build, credit, export, finetune, make_task, measure, road, train_agents, translate
from experiments.build import build_budgets, usual_warm_up
from experiments.runs import open_run, read_metrics, task_of
from gan.checkpoints import load_network, state_hash
from gan.plans import Plan
from gan.two_way import FOUR_AGENTS, TwoWayTask, load_any_task
from tests.experiments.test_unpaired_run import call
from tests.gan import official_layout as layout
from tests.gan.conftest import fake_extractor
from tests.gan.test_folders import picture, save

OWN = ["--generator", "latest_net_G_A.pth", "--discriminator", "latest_net_D_A.pth", "--data", "beasts"]
OWN += ["--back", "latest_net_G_B.pth", "--back-discriminator", "latest_net_D_B.pth"]
ARGUMENTS = ["--algo", "random", "--evaluations", "3", "--epochs", "1", "--warm-up", "2"]
ARGUMENTS += ["--budget", "generator_A=0.4,generator_B=0.6,discriminator=0.5"]
BUDGETS = dict(zip(FOUR_AGENTS, (0.4, 0.6, 0.5, 0.5), strict=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a run on 8 × 8 images has ended."""
    folder = tmp_path_factory.mktemp("both")
    for split, first, second in (("train", 12, 14), ("val", 10, 9), ("test", 9, 11)):
        for side, count, start in (("A", first, 0), ("B", second, 50)):
            for n in range(count):
                save(picture(start + n, (8, 8)), folder / "beasts" / f"{split}{side}" / f"{side}{n}.png")
    for name, state in (
        ("G_A", layout.unet(3, 8, "instance")),
        ("G_B", layout.unet(3, 4, "instance")),
        ("D_A", layout.patch(1, 8, "instance", came=3)),
        ("D_B", layout.patch(1, 4, "instance", came=3)),
    ):
        torch.save(state, folder / f"latest_net_{name}.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (gan.tasks, road):
            patch.setattr(module, "load_extractor", lambda device: fake_extractor())
        for module in (gan.tasks, build):
            patch.setattr(module, "bfloat16_pays", lambda device: False)
        call(train_agents, *OWN, *ARGUMENTS, "--output", "run")
        yield folder


def test_the_run_holds_four_networks_and_their_task(work: Path) -> None:
    names = {path.name for path in (work / "run").iterdir()}
    assert {f"{agent}{end}.safetensors" for agent in FOUR_AGENTS for end in ("", "_raw", "_uniform")} <= names
    assert {"elastic_A.safetensors", "elastic_B.safetensors", "samples.png", "evaluation.json"} <= names
    dense = {
        path.relative_to(work / "run" / "task").as_posix() for path in (work / "run").rglob("task/*/*.safe*")
    }
    assert dense == {f"{way}/{kind}.safetensors" for way in "AB" for kind in ("generator", "discriminator")}
    rows = json.loads((work / "run" / "evaluation.json").read_text())["rows"]
    assert list(rows)[-2:] == ["pruned_A", "pruned_B"]
    for way in "AB":
        share = rows[f"pruned_{way}"]["params"] / rows[f"dense_{way}"]["params"]
        assert share <= BUDGETS[f"generator_{way}"]
        assert "l1" not in rows[f"pruned_{way}"]  # no image has a counterpart
    frame = read_metrics(open_run(work / "run"))
    for agent, budget in BUDGETS.items():
        assert (frame[f"{agent}.budget"] == budget).all()
    about = json.loads((work / "run" / "run.json").read_text())
    assert any(note.startswith("generator_B: unet_8, ngf 4") for note in about["notes"])


def test_its_networks_are_the_plan(work: Path) -> None:
    plan = Plan.from_dict(json.loads((work / "run" / "plan.json").read_text())["best"])
    for agent in FOUR_AGENTS:
        network, architecture, recipe = load_network(work / "run" / f"{agent}.safetensors")
        assert architecture.widths == plan[agent]
        assert recipe["task"] == f"beasts_{agent[-1]}"
        assert recipe["preprocess"]["crop_size"] == 8
        assert state_hash(gan.load(work / "run", agent)) == state_hash(network)


def test_a_moved_run_goes_on_without_its_checkpoints(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "run", tmp_path / "moved")
    for name in ("evaluation.json", "elastic_B.safetensors"):
        (tmp_path / "moved" / name).unlink()
    hidden = sorted(work.glob("*.pth"))
    for path in hidden:
        path.rename(tmp_path / path.name)
    try:
        call(train_agents, "--resume", str(tmp_path / "moved"))
    finally:
        for path in hidden:
            (tmp_path / path.name).rename(path)
    run = open_run(tmp_path / "moved")
    assert run.finished
    assert task_of(run) == str(tmp_path / "moved" / "task")
    for agent in FOUR_AGENTS:
        files = [folder / f"{agent}.safetensors" for folder in (work / "run", tmp_path / "moved")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_direction_is_exported_translated_and_measured(work: Path, tmp_path: Path) -> None:
    network = ["--network", "generator_B"]
    call(export, "run", *network, "--quick", "--output", str(tmp_path / "export"))
    files = {path.name for path in (tmp_path / "export").iterdir()}
    assert {
        "generator_B.safetensors",
        "generator_B.onnx",
        "pruned_generator_B.py",
        "latest_net_G.pth",
    } <= files
    recipe = json.loads((tmp_path / "export" / "generator_B.json").read_text())
    assert recipe["start"]["source"]["file"] == "elastic_B.safetensors"
    save(picture(3, (20, 12)), tmp_path / "a.png")
    for dense in ([], ["--dense"]):
        made = tmp_path / f"made{len(dense)}"
        call(translate, "run", *network, "--input", str(tmp_path / "a.png"), "--output", str(made), *dense)
        with Image.open(made / "a.png") as image:
            assert image.size == (8, 8)
    pixels = [np.asarray(Image.open(tmp_path / f"made{n}" / "a.png")) for n in range(2)]
    assert (pixels[0] != pixels[1]).any()
    quick = ["--rounds", "1", "--runs", "1", "--threads", "1", "--no-memory"]
    call(measure, "run", *network, *quick, "--output", str(tmp_path / "b.json"))
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["network"] for row in rows} == {"dense", "pruned", "uniform"}


def test_make_task_writes_what_other_programs_take(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(make_task, *OWN, "--output", "task")
    printed = capsys.readouterr().out
    for agent in FOUR_AGENTS:
        assert f"{agent}: unet_8" in printed or f"{agent}: n_layers" in printed
        assert f"{agent}: {5 if agent.startswith('generator') else 2} channel groups" in printed
    assert "one direction alone: --task task/A or --task task/B" in printed
    task = load_any_task("task")
    assert isinstance(task, TwoWayTask)
    steps, note = usual_warm_up(task, build_budgets("0.5", FOUR_AGENTS), "params")
    assert 150 <= steps <= 1200
    assert f"{steps} steps for each direction, about" in note


def test_the_elastic_weights_of_the_run_are_those_of_its_task(work: Path) -> None:
    task = load_any_task("run")
    assert isinstance(task, TwoWayTask)
    assert set(task.shipped_elastic()) == set(FOUR_AGENTS)


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (finetune, ["--epochs", "1"], "finetunes one pair; both are finetuned for longer by a run"),
        (credit, [], "takes one pair: name a direction, run/task/A or run/task/B"),
    ],
)
def test_programs_for_one_pair_say_what_to_do(
    work: Path, capsys: pytest.CaptureFixture[str], program: Any, arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(program, "run", *arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*OWN[:6], *OWN[8:]], "and --back is missing"),
        ([*OWN[:-1], "latest_net_G_B.pth"], "--back-discriminator holds the generator 'unet_8'"),
        ([*OWN[:-1], "latest_net_D_A.pth"], "hold the same weights"),
        ([*OWN, "--budget", "generator_C=0.2"], "known are discriminator, discriminator_A"),
        ([*OWN, "--schedule", "cosine"], "ingredients of finetuning need pairs"),
        ([*OWN, "--warm-up", "0"], "comes without elastic weights"),
        ([*OWN, "--task", "noto_and_twemoji"], "exclude each other"),
        (["--resume", "run", "--back-discriminator", "x.pth"], "leave out --back-discriminator"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        call(train_agents, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(work.rglob("*")) == before
