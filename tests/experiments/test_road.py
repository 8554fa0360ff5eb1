"""The main job and what follows from it, as a user runs them: README commands in a fresh folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import cli, train_agents
from experiments.runs import open_run, read_metrics
from gan.checkpoints import load_network
from gan.evaluation import COLUMNS
from gan.plans import Plan
from tests.experiments.test_plot import finetuning

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
ROWS = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
RUN = "runs/edges2emoji-mappo-s0"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Arguments of every README command that calls the program."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    prefix = f"python experiments/{program}"
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(prefix)]


def call(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program as README says, in ``folder``."""
    command = [sys.executable, str(ROOT / "experiments" / program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``train_agents.py --quick`` has run."""
    folder = tmp_path_factory.mktemp("work")
    done = call(folder, "train_agents.py", "--quick")
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def test_the_run_folder_holds_everything(work: Path) -> None:
    names = {path.name for path in (work / RUN).iterdir()}
    expected = {"options.json", "run.json", "metrics.csv", "evaluations.jsonl", "tensorboard", "policy"}
    expected |= {cli.LOCK, "plan.json", "credit.json", "ranking.json", "elastic.json", "evaluation.json"}
    expected |= {"curves.png", "curves.pdf", "widths.png", "widths.pdf", "samples.png"}
    for stage in ("", "_raw", "_uniform"):
        for network in ("generator", "discriminator"):
            expected |= {f"{network}{stage}.safetensors", f"{network}{stage}.json"}
    assert names == expected


def test_the_table_has_all_rows_and_keys(work: Path) -> None:
    evaluation = json.loads((work / RUN / "evaluation.json").read_text())
    assert list(evaluation["rows"]) == ROWS
    for row in evaluation["rows"].values():
        assert tuple(row) == COLUMNS
    assert {"search", "references", "finetune pruned", "evaluate"} <= set(evaluation["seconds"])
    dense, pruned = evaluation["rows"]["dense"], evaluation["rows"]["pruned"]
    assert pruned["params"] <= 0.1 * dense["params"]
    assert pruned["discriminator_macs"] < dense["discriminator_macs"]
    printed = (work / "printed.txt").read_text()
    assert all(name in printed for name in ROWS)


def test_the_saved_pair_is_the_plan(work: Path) -> None:
    plan = Plan.from_dict(json.loads((work / RUN / "plan.json").read_text())["best"])
    for agent in plan:
        network, architecture, recipe = load_network(work / RUN / f"{agent}.safetensors")
        assert architecture.widths == plan[agent]
        assert Plan.from_dict(recipe["plan"]) == plan
        assert not network.training


def test_metrics_tell_the_search(work: Path) -> None:
    frame = read_metrics(open_run(work / RUN))
    assert frame["evaluations"].is_monotonic_increasing
    assert (frame["generator.sparsity"] >= 0.9 - 1e-9).all()
    assert frame["best_potential"].is_monotonic_increasing
    lines = (work / RUN / "evaluations.jsonl").read_text().splitlines()
    counted = sum(json.loads(line)["counted"] for line in lines[1:])
    assert 1 <= counted <= 24


def test_resume_repeats_the_search_from_the_log(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / RUN, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    log = tmp_path / "run" / "evaluations.jsonl"
    whole = log.read_text().splitlines(keepends=True)
    # What a run that was killed while it wrote its last plan leaves behind.
    log.write_text("".join(whole[:-6]) + whole[-6][:20])
    done = call(tmp_path, "train_agents.py", "--resume", "run")
    assert done.returncode == 0, done.stderr
    before, after = (
        json.loads((folder / "plan.json").read_text()) for folder in (work / RUN, tmp_path / "run")
    )
    assert after["best"]["widths"] == before["best"]["widths"]
    plans = [json.loads(line)["plan"] for line in whole[1:]]
    assert [json.loads(line)["plan"] for line in log.read_text().splitlines()[1:]] == plans


def test_credit_and_balance_of_a_run(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / RUN, tmp_path / "run")
    done = call(tmp_path, "credit.py", "run", "--workers", "1")
    assert done.returncode == 0, done.stderr
    before, after = (
        json.loads((folder / "credit.json").read_text()) for folder in (work / RUN, tmp_path / "run")
    )
    assert after == before
    best = json.loads((tmp_path / "run" / "plan.json").read_text())["best"]
    assert sum(after["shapley"].values()) == pytest.approx(after["joint"]) == pytest.approx(best["potential"])
    balance = json.loads((tmp_path / "run" / "balance.json").read_text())
    assert balance["search"]["best"][-1] == best["gaps"]["balance_gap"]
    assert len(balance["finetuning"]) == 2
    with Image.open(tmp_path / "run" / "balance.png") as image:
        assert image.width > 1000


def test_finished_runs_and_other_options_are_not_resumed(work: Path) -> None:
    done = call(work, "train_agents.py", "--resume", RUN)
    assert done.returncode == 2
    assert "is finished" in done.stderr
    for given in (("--seed", "4"), ("--variants", "0")):  # the default, too
        done = call(work, "train_agents.py", "--resume", RUN, *given)
        assert done.returncode == 2
        assert f"leave out {given[0]}\n" in done.stderr


@pytest.mark.parametrize("dense", [False, True])
def test_translate(work: Path, tmp_path: Path, dense: bool) -> None:
    (tmp_path / "drawings").mkdir()
    for index in range(3):
        drawing = np.full((48 + 16 * index, 64), 255, np.uint8)
        drawing[10:30, 10:50] = 0
        Image.fromarray(drawing).save(tmp_path / "drawings" / f"{index}.png")
    model = [str(work / RUN), "--dense"] if dense else [str(work / RUN / "generator.safetensors")]
    arguments = (*model, "--input", "drawings", "--output", "made")
    done = call(tmp_path, "translate.py", *arguments)
    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / "made").iterdir())
    assert [path.name for path in made] == ["0.png", "1.png", "2.png"]
    for path in made:
        with Image.open(path) as image:
            assert image.size == (64, 64)
    again = call(tmp_path, "translate.py", *arguments)
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_readme_plots_and_translations(work: Path) -> None:
    (work / "drawings").mkdir()
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(work / "drawings" / "a.png")
    finetuning(work / "runs" / "edges2emoji-finetune-s0", (0.6, 0.4), 0.3)
    lines = [("plot.py", arguments) for arguments in commands("plot.py")]
    lines += [("translate.py", arguments) for arguments in commands("translate.py")]
    assert len(lines) >= 3
    for program, arguments in lines:
        globbed = [str(p) for a in arguments for p in (sorted(work.glob(a)) if "*" in a else [a])]
        done = call(work, program, *globbed)
        assert done.returncode == 0, done.stderr
        output = work / globbed[globbed.index("--output") + 1]
        assert output.exists()


def test_readme_finetunings(work: Path, tmp_path: Path) -> None:
    """As they stand, but for ``--quick``; resuming has tests of its own."""
    best = json.loads((work / RUN / "plan.json").read_text())["best"]
    (work / "plan.json").write_text(json.dumps({"widths": best["widths"]}))
    lines = [arguments for arguments in commands("finetune.py") if "--resume" not in arguments]
    assert len(lines) >= 3
    for number, arguments in enumerate(lines):
        output = tmp_path / str(number)
        done = call(work, "finetune.py", *arguments, "--quick", "--output", str(output))
        assert done.returncode == 0, done.stderr
        assert json.loads((output / "evaluation.json").read_text())["rows"].keys() >= {"dense", "after"}


def test_readme_exports_and_measures(work: Path, tmp_path: Path) -> None:
    for program, quick in (("export.py", ["--quick"]), ("measure.py", ["--rounds", "2"])):
        lines = commands(program)
        assert lines
        for arguments in lines:
            output = tmp_path / ("exported" if program == "export.py" else "measured.json")
            done = call(work, program, *arguments, *quick, "--output", str(output))
            assert done.returncode == 0, done.stderr
            assert output.exists()


def test_readme_python(work: Path) -> None:
    done = [
        subprocess.run(
            [sys.executable, "-c", block],
            cwd=work,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        for block in blocks("python")
    ]
    assert len(done) == 2
    assert [result.returncode for result in done] == [0, 0], done
    assert "better than uniform by" in done[1].stdout


@pytest.mark.gpu
def test_the_road_on_cuda(tmp_path: Path) -> None:
    done = call(tmp_path, "train_agents.py", "--quick", "--device", "cuda")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", commands("train_agents.py"), ids=" ".join)
def test_readme_train_commands(work: Path, tmp_path: Path, arguments: list[str]) -> None:
    """As they stand, but for ``--quick``; a run to resume is the quick one, unfinished."""
    if "--resume" in arguments:
        shutil.copytree(work / RUN, tmp_path / arguments[-1])
        (tmp_path / arguments[-1] / "evaluation.json").unlink()
    elif "--quick" not in arguments:
        arguments = [*arguments, "--quick"]
    if "--from" in arguments:
        shutil.copytree(work / RUN, tmp_path / arguments[arguments.index("--from") + 1])
    done = call(tmp_path, "train_agents.py", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algo", "mapo"], "did you mean 'mappo'"),
        (["--task", "edges2shoes"], "edges2emoji"),
        (["--budget", "0"], "got 0"),
        (["--seed=-1"], "--seed is -1"),
        (["--budget", "1.5"], "1.5"),
        (["--budget", "abc"], "abc"),
        (["--budget", "0.0001"], "reach"),
        (["--evaluations", "0"], "--evaluations is 0"),
        (["--output", "."], "exists"),
        (["--resume", "nowhere"], "does not exist"),
        (["--colour", "red"], "--colour"),
        (["--cost", "flops"], "flops"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str], sentence: str, refused: Callable[..., None]
) -> None:
    refused(train_agents.main, train_agents.Options, arguments, sentence)


def test_missing_and_truncated_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assets = tmp_path / "assets"
    shutil.copytree(ROOT / "gan" / "assets" / "edges2emoji", assets / "edges2emoji")
    monkeypatch.setattr("gan.tasks.ASSETS", assets)
    for name in ("elastic.safetensors", "generator.safetensors"):
        path = assets / "edges2emoji" / name
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(SystemExit) as stopped:
            cli.run(train_agents.main, train_agents.Options, "", (), ["--output", str(tmp_path / "run")])
        assert stopped.value.code == 2
        assert "damaged" in capsys.readouterr().err
        path.unlink()
        with pytest.raises(SystemExit) as stopped:
            cli.run(train_agents.main, train_agents.Options, "", (), ["--output", str(tmp_path / "run")])
        assert stopped.value.code == 2
        assert name.split(".")[0] in capsys.readouterr().err
        shutil.copy(ROOT / "gan" / "assets" / "edges2emoji" / name, path)
    assert not (tmp_path / "run").exists()
