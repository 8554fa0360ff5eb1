"""One direction of a user's own CycleGAN, on images without partners: from the command line to the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gan.tasks
from experiments import (
    build,
    calibrate,
    cli,
    discriminators,
    finetune,
    make_task,
    road,
    sweep,
    train_agents,
)
from experiments.runs import open_run
from gan.evaluation import AGAINST_COUNTERPARTS, COLUMNS
from tests.gan import official_layout as layout
from tests.gan.conftest import fake_extractor
from tests.gan.test_folders import picture, save

OWN = ["--generator", "latest_net_G_A.pth", "--discriminator", "latest_net_D_A.pth"]
OWN += ["--back", "latest_net_G_B.pth", "--data", "beasts"]
ARGUMENTS = ["--algo", "random", "--evaluations", "3", "--budget", "generator=0.5", "--epochs", "1"]


def call(program: Any, *arguments: str) -> None:
    cli.run(program.main, program.Options, "", (), list(arguments))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a run on 8 × 8 images has ended."""
    folder = tmp_path_factory.mktemp("unpaired")
    for split, first, second in (("train", 14, 17), ("val", 10, 9), ("test", 9, 11)):
        for side, count, start in (("A", first, 0), ("B", second, 50)):
            for n in range(count):
                save(picture(start + n, (8, 8)), folder / "beasts" / f"{split}{side}" / f"{side}{n}.png")
    for name, width in (("G_A", 8), ("G_B", 4)):
        torch.save(layout.unet(3, width), folder / f"latest_net_{name}.pth")
    torch.save(layout.patch(1, 8, came=3), folder / "latest_net_D_A.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module in (gan.tasks, road, finetune):
            patch.setattr(module, "load_extractor", lambda device: fake_extractor())
        for module in (gan.tasks, build):
            patch.setattr(module, "bfloat16_pays", lambda device: False)
        call(train_agents, *OWN, *ARGUMENTS, "--warm-up", "2", "--output", "run")
        yield folder


def test_figures_that_need_a_counterpart_are_missing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = json.loads((work / "run" / "evaluation.json").read_text())
    for row in evaluation["rows"].values():
        assert set(COLUMNS) - set(row) == set(AGAINST_COUNTERPARTS)
        assert row["n_images"] == 18
    assert "against the real images of the target domain" in evaluation["protocol"]
    rows = evaluation["rows"]
    assert rows["pruned"]["params"] <= 0.5 * rows["dense"]["params"]
    undone = rows["pruned"]["kid_efficientnet_lite0"] == rows["pruned_raw"]["kid_efficientnet_lite0"]
    assert undone == (evaluation["val"]["pruned"]["kept"] == "before")
    assert (work / "run" / "samples.png").is_file()


def test_the_run_goes_on_without_the_checkpoints(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "run", tmp_path / "moved")
    (tmp_path / "moved" / "evaluation.json").unlink()
    hidden = work / "latest_net_G_B.pth"
    hidden.rename(tmp_path / hidden.name)
    try:
        call(train_agents, "--resume", str(tmp_path / "moved"))
    finally:
        (tmp_path / hidden.name).rename(hidden)
    assert open_run(tmp_path / "moved").finished
    for name in ("generator", "discriminator"):
        files = [folder / f"{name}.safetensors" for folder in (work / "run", tmp_path / "moved")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_run_is_finetuned_for_longer(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(finetune, "run", "--epochs", "1", "--output", "tuned")
    log = [json.loads(line) for line in (work / "tuned" / "log.jsonl").read_text().splitlines()[1:]]
    assert {"cycle", "cycle back", "identity", "val_kid"} <= set(log[-1])
    assert "val_l1" not in log[-1]
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.strip().startswith("L1"))
    assert line.split() == ["L1", "↓", "–", "–", "–"]


def test_make_task_keeps_the_way_back(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(make_task, *OWN, "--output", "task")
    assert "way back: unet_8, ngf 4" in capsys.readouterr().out
    task = gan.tasks.load_task(str(work / "task"))
    assert task.back is not None
    assert task.adversarial == "lsgan"


def test_the_way_back_is_refused_where_images_are_pairs(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(9):
        save(picture(n, (16, 8)), tmp_path / "pairs" / "train" / f"{n}.png")
    with pytest.raises(SystemExit) as stopped:
        call(train_agents, *OWN[:-1], str(tmp_path / "pairs"))
    assert stopped.value.code == 2
    assert "holds pairs; unpaired work needs trainA/ and trainB/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (calibrate, ["--budget", "0.5"]),
        (discriminators, []),
        (sweep, ["--shares", "0.5"]),
    ],
)
def test_studies_that_report_l1_refuse_the_task(
    work: Path, capsys: pytest.CaptureFixture[str], program: Any, arguments: list[str]
) -> None:
    if not (work / "task").exists():
        call(make_task, *OWN, "--output", "task")
    with pytest.raises(SystemExit) as stopped:
        call(program, "--task", "task", *arguments)
    assert stopped.value.code == 2
    assert "have no true counterparts" in capsys.readouterr().err
