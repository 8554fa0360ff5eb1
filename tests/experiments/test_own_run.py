"""Users' own checkpoints and folders of images, from the command line to the translated image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from envs.budget import project, random_proportions, uniform
from experiments import cli, evaluate, make_task, train_agents
from experiments.build import batch_size, prunable, usual_warm_up
from experiments.runs import open_run, task_of
from gan.checkpoints import load_network
from gan.networks import Architecture, ImageNorm2d, initialise
from gan.official import save_official
from gan.own_task import OwnOptions, make_own_task
from gan.tasks import AGENTS, own_task
from tests.experiments.test_road import ROWS, call
from tests.gan.conftest import random
from tests.gan.test_folders import save, side_by_side


def smooth(seed: int, size: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def write_images(folder: Path, counts: dict[str, int], size: int = 64) -> None:
    """Pictures, and beside each its negative."""
    for split, count in counts.items():
        for n in range(count):
            image = smooth(n, size)
            negative = Image.fromarray(255 - np.asarray(image))
            save(side_by_side(image, negative), folder / split / f"{n:03}.png")


def write_pair(folder: Path, generator: Architecture, discriminator: Architecture) -> None:
    for name, architecture in (("G", generator), ("D", discriminator)):
        network = initialise(architecture.build(), random(len(name)), std=0.1)
        save_official(folder / f"latest_net_{name}.pth", network)


OWN = ["--generator", "latest_net_G.pth", "--discriminator", "latest_net_D.pth", "--data", "shapes"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a user's own pair has been pruned, quickly."""
    folder = tmp_path_factory.mktemp("own")
    write_images(folder / "shapes", {"train": 30, "test": 12})
    discriminator = Architecture("n_layers", 6, 1, base_width=8, layers=2)
    write_pair(folder, Architecture("unet_64", base_width=8), discriminator)
    wanted = ["--budget", "0.3", "--algo", "uniform", "--evaluations", "1", "--norm-statistics", "image"]
    done = call(folder, "train_agents.py", *OWN, *wanted, "--quick")
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


RUN = "runs/shapes-uniform-s0"


def test_the_run_knows_what_it_was_made_from(work):
    printed = (work / "printed.txt").read_text()
    assert "generator: unet_64, ngf 8, 3 → 3 channels, batch norm" in printed
    assert "norm statistics: image, as asked for" in printed
    assert "has no val split: 10 train images stand in for it" in printed.replace("\n", " ")
    about = json.loads((work / RUN / "run.json").read_text())
    assert any("12 test pairs of 64 × 64 pixels" in note for note in about["notes"])
    rows = json.loads((work / RUN / "evaluation.json").read_text())["rows"]
    assert list(rows) == ROWS
    assert rows["pruned"]["params"] <= 0.3 * rows["dense"]["params"]
    reference = json.loads((work / RUN / "elastic.json").read_text())
    assert reference["start"] == "elastic"
    assert (work / RUN / "elastic.safetensors").is_file()  # of a warm-up of its own


def test_the_result_runs_with_the_statistics_of_the_image(work):
    network, architecture, recipe = load_network(work / RUN / "generator.safetensors")
    assert architecture.statistics == "image"
    assert any(isinstance(module, ImageNorm2d) for module in network.modules())
    assert recipe["preprocess"] == {"kind": "resize_and_crop", "load_size": 64, "crop_size": 64}
    images = torch.rand(3, 3, 64, 64, generator=random()) * 2 - 1
    with torch.no_grad():
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone)  # no image depends on its neighbours


def test_a_moved_run_is_resumed_without_its_checkpoints(work, tmp_path):
    shutil.copytree(work / RUN, tmp_path / "moved")
    (tmp_path / "moved" / "evaluation.json").unlink()
    done = call(tmp_path, "train_agents.py", "--resume", "moved", "--load-size", "70")
    assert done.returncode == 2
    assert "leave out --load-size" in done.stderr
    done = call(tmp_path, "train_agents.py", "--resume", "moved")
    assert done.returncode == 0, done.stderr
    assert task_of(open_run(tmp_path / "moved")) == str(tmp_path / "moved" / "task")
    before, after = (
        json.loads((folder / "plan.json").read_text()) for folder in (work / RUN, tmp_path / "moved")
    )
    assert after == before


def test_the_run_is_finetuned_for_longer(work):
    done = call(work, "finetune.py", RUN, "--epochs", "1", "--quick", "--output", "tuned")
    assert done.returncode == 0, done.stderr
    options = json.loads((work / "tuned" / "options.json").read_text())
    assert Path(options["task"]) == work / RUN / "task"
    assert load_network(work / "tuned" / "generator.safetensors")[1].statistics == "image"


@pytest.mark.parametrize("dense", [False, True])
def test_images_are_translated(work, tmp_path, dense):
    save(smooth(3, 90), tmp_path / "drawings" / "a.png")
    save(smooth(4, 64).convert("L"), tmp_path / "drawings" / "b.png")
    arguments = [str(work / RUN), "--input", "drawings", "--output", "made", *(["--dense"] if dense else [])]
    done = call(tmp_path, "translate.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 images of 64 × 64 pixels" in done.stdout
    with Image.open(tmp_path / "made" / "a.png") as image:
        assert image.size == (64, 64)


def test_make_task_says_what_it_found_and_other_programs_take_it(work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    cli.run(make_task.main, make_task.Options, "", (), [*OWN, "--output", "task", "--direction", "BtoA"])
    printed = capsys.readouterr().out
    assert "generator: 11 channel groups, widths are multiples of 1" in printed
    assert "use it with --task task" in printed
    arguments = ["--task", "task", "--start", "dense", "--budgets", "0.5"]
    cli.run(evaluate.main, evaluate.Options, "", (), arguments)
    assert "12 test images of shapes" in capsys.readouterr().out


def test_an_interrupted_make_task_leaves_nothing_behind(work, monkeypatch):
    """Half a task folder would be in the way of the next attempt."""
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gan.task_folder.write_json", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.run(make_task.main, make_task.Options, "", (), [*OWN, "--output", "another"])
    assert stopped.value.code == 130
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (OWN[:4], "--data is missing"),
        (OWN[2:], "--generator is missing"),
        ([*OWN, "--task", "edges2emoji_resnet"], "exclude each other"),
        ([*OWN[:4], "--data", "nowhere"], "nowhere does not exist"),
        ([*OWN, "--crop-size", "60"], "multiples of 64 pixels"),
        (["--generator", "latest_net_D.pth", "--discriminator", "latest_net_G.pth", *OWN[4:]], "exchange"),
        ([*OWN, "--warm-up=-1"], "--warm-up is -1"),
        ([*OWN, "--warm-up", "0"], "comes without elastic weights"),
        (["--task", "shapes"], "is no task folder"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(work, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_agents.main, train_agents.Options, "", (), arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(work.rglob("*")) == before


def test_the_usual_warm_up_is_bounded_and_says_its_time(work, monkeypatch):
    monkeypatch.chdir(work)
    paths = [Path(name) for name in OWN[1::2]]
    task = own_task(make_own_task(OwnOptions(*paths)))
    assert batch_size(task) == 16
    budgets = train_agents.build_budgets("0.3")
    clock = iter(range(0, 100, 10))  # a step takes 10 seconds
    monkeypatch.setattr("experiments.build.time.perf_counter", lambda: float(next(clock)))
    assert usual_warm_up(task, budgets, "params")[0] == 150
    clock = (n / 100 for n in range(100))
    steps, note = usual_warm_up(task, budgets, "params")
    assert steps == 1200
    assert note.startswith("elastic warm-up of 1200 steps, about 0 min")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "groups"),
    [(Architecture("unet_256"), 15), (Architecture("resnet_9blocks", norm="instance"), 14)],
    ids=["unet_256", "resnet_9blocks"],
)
def test_full_size_networks(tmp_path, architecture, groups):
    """At 256 × 256: inferred, grouped, planned, and cut to a tenth of the parameters."""
    write_images(tmp_path / "shapes", {"train": 9, "val": 9, "test": 9}, 256)
    judge = Architecture("basic", 6, 1, norm=architecture.norm)
    write_pair(tmp_path, architecture, judge)
    paths = [tmp_path / name for name in OWN[1::2]]
    own = make_own_task(OwnOptions(*paths, norm_statistics="running"))
    assert own.architectures == {"generator": architecture, "discriminator": judge}
    assert own.multiples == {"generator": 8, "discriminator": 4}
    task = own_task(own)
    assert batch_size(task) == 4
    assert [len(task.groups[agent]) for agent in AGENTS] == [groups, 4]
    networks, draws = prunable(task, "params"), np.random.default_rng(0)
    ordered = task.ordered()
    for agent, share in (("generator", 0.1), ("discriminator", 0.5)):
        network = networks[agent]
        plain = uniform(network, share)
        others = [project(network, random_proportions(network, draws), share) for _ in range(50)]
        assert plain.unused <= np.mean([plan.unused for plan in others])
        cut = ordered[agent].network(tuple(int(width) for width in plain.widths))
        with torch.no_grad():
            assert torch.isfinite(cut(task.example(agent))).all()
        kept = sum(p.numel() for p in cut.parameters())
        assert kept <= share * sum(p.numel() for p in task.networks[agent].parameters())
