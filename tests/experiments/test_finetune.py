from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from experiments import cli, finetune
from experiments.finetune import EpochLog, Options
from experiments.runs import create_run, describe_run
from experiments.train_agents import Options as TrainOptions
from gan import networks
from gan.checkpoints import load_network, tensors_hash
from gan.cyclegan import CYCLE_FINETUNING
from gan.distillation import PERCEPTUAL, Ingredients
from gan.errors import UserError
from gan.evaluation import COLUMNS
from gan.files import write_json
from gan.networks import Architecture
from gan.tasks import Task
from gan.training import FINETUNING, PairedTrainer
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

WIDTHS = {"generator": [4, 8, 8, 8, 4], "discriminator": [4, 6]}
DENSE = {"generator": [8, 12, 16, 12, 8], "discriminator": [8, 12]}


@pytest.fixture(autouse=True)
def tiny(task: Task, monkeypatch: pytest.MonkeyPatch) -> Task:
    """The embedded task in miniature, with architectures that can be written."""
    monkeypatch.setitem(networks.UNET_LEVELS, "unet_8", 3)
    monkeypatch.setattr(networks, "GENERATORS", (*networks.GENERATORS, "unet_8"))
    architectures = {
        "generator": Architecture("unet_8", base_width=8),
        "discriminator": Architecture("n_layers", in_channels=6, out_channels=1, base_width=8, layers=1),
    }
    small = replace(task, architectures=architectures)
    monkeypatch.setattr(finetune, "load_task", lambda *_: small)
    monkeypatch.setattr(finetune, "load_extractor", lambda **_: fake_extractor())
    return small


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_json(tmp_path / "plan.json", {"widths": WIDTHS})


@pytest.fixture
def options(plan: Path, tmp_path: Path) -> Options:
    return Options(source=plan, start="dense", epochs=3, output=tmp_path / "out")


def weights(folder: Path) -> list[str]:
    return [
        tensors_hash(load_network(folder / f"{agent}.safetensors")[0].state_dict())
        for agent in ("generator", "discriminator")
    ]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]


def timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "seconds"}


def test_the_folder_holds_everything(options: Options, tmp_path: Path) -> None:
    finetune.main(options)
    folder = tmp_path / "out"
    expected = {
        cli.LOCK,
        "options.json",
        "run.json",
        "plan.json",
        "log.jsonl",
        "metrics.csv",
        "evaluation.json",
        "curve.png",
    }
    for network in ("generator", "discriminator", "generator_raw", "discriminator_raw"):
        expected |= {f"{network}.safetensors", f"{network}.json"}
    assert {path.name for path in folder.iterdir()} == expected
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation["rows"]) == ["dense", "before", "after"]
    assert all(tuple(row) == COLUMNS for row in evaluation["rows"].values())
    assert (evaluation["epochs"], evaluation["steps"]) == (3, 3)
    table = pd.read_csv(folder / "metrics.csv", index_col="row")
    assert table.loc["after", "l1"] == evaluation["rows"]["after"]["l1"]
    assert table["kept"].sum() == 1
    assert [entry["epoch"] for entry in entries(folder)] == [0, 1, 2, 3]
    assert all({"val_kid", "val_l1"} <= set(entry) for entry in entries(folder))
    for agent in WIDTHS:
        network, architecture, recipe = load_network(folder / f"{agent}.safetensors")
        assert architecture.widths == tuple(WIDTHS[agent])
        assert recipe["plan"]["widths"] == WIDTHS
        assert not network.training
    with Image.open(folder / "curve.png") as image:
        assert image.size[0] > 500


INGREDIENTS = Ingredients(features="adapters", adversary="both", online=True, schedule="restarts")


@pytest.mark.parametrize("ingredients", [Ingredients(), INGREDIENTS], ids=["plain", "ingredients"])
@pytest.mark.parametrize("moment", ["before the checkpoint", "after it"])
def test_a_resumed_finetuning_equals_an_uninterrupted_one(
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ingredients: Ingredients,
    moment: str,
) -> None:
    options = replace(options, ingredients=ingredients)
    finetune.main(options)
    keep = finetune.save_checkpoint

    def stop(path: Path, trainer: PairedTrainer) -> None:
        if moment == "after it" or trainer.epoch < 2:
            keep(path, trainer)
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        finetune.main(replace(options, output=tmp_path / "again"))
    monkeypatch.setattr(finetune, "save_checkpoint", keep)
    (tmp_path / "plan.json").unlink()  # the folder needs nothing but itself
    with (tmp_path / "again" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 3, "ste')  # torn
    finetune.main(Options(resume=tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    whole = {entry["epoch"]: timeless(entry) for entry in entries(tmp_path / "out")}
    again = {entry["epoch"]: timeless(entry) for entry in entries(tmp_path / "again")}
    assert again == whole
    rows = [
        json.loads((tmp_path / name / "evaluation.json").read_text())["rows"] for name in ("out", "again")
    ]
    for name, row in rows[0].items():
        assert {k: v for k, v in row.items() if k != "latency_ms"} == {
            k: v for k, v in rows[1][name].items() if k != "latency_ms"
        }


def test_val_decides_whether_the_start_is_kept(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Test figures have no say: they are the same here whatever val says."""
    measured = finetune.measure
    for name, worse in (("better", -1.0), ("worse", 1.0)):
        calls: list[float] = []

        def measure(*arguments: Any, worse: float = worse, calls: list[float] = calls) -> dict[str, float]:
            calls.append(worse * len(calls))
            return {**measured(*arguments), "val_kid": calls[-1]}

        monkeypatch.setattr(finetune, "measure", measure)
        finetune.main(replace(options, output=tmp_path / name))
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        kept = "before" if name == "worse" else "after"
        assert evaluation["kept"] == kept
        assert ("the start is kept" in capsys.readouterr().out) == (name == "worse")
        table = pd.read_csv(tmp_path / name / "metrics.csv", index_col="row")
        assert table.index[table["kept"]].tolist() == [kept]
    assert weights(tmp_path / "worse") != weights(tmp_path / "better")
    network = load_network(tmp_path / "worse" / "generator.safetensors")[0]
    start = load_network(tmp_path / "worse" / "generator_raw.safetensors")[0]
    for one, other in zip(network.parameters(), start.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-3  # the result is written in half precision


def test_patience_ends_a_finetuning(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kids = iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.0, 9.0])
    monkeypatch.setattr(finetune, "measure", lambda *_: {"val_kid": next(kids), "val_l1": 0.1})
    finetune.main(replace(options, epochs=50, patience=3))
    found = entries(tmp_path / "out")
    assert [entry["val_kid"] for entry in found] == [5.0, 4.0, 3.0, 3.5, 3.2, 3.1]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["epochs"] == 5


def test_val_is_measured_every_so_many_epochs_and_in_the_end(options: Options, tmp_path: Path) -> None:
    finetune.main(replace(options, validate_every=2))
    assert ["val_kid" in entry for entry in entries(tmp_path / "out")] == [True, False, True, True]


def test_minutes_end_a_finetuning(options: Options, tmp_path: Path) -> None:
    finetune.main(replace(options, epochs=None, minutes=0.01))
    found = entries(tmp_path / "out")
    assert "val_kid" in found[-1]  # the last epoch is measured, whenever the time is up
    assert [entry["epoch"] for entry in found if entry["epoch"]] == list(range(1, len(found)))
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_the_dense_adversary_takes_the_place_of_the_pruned_one(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kids = iter([2.0, 1.0, 3.0])  # the start, the end, the dense pair
    monkeypatch.setattr(finetune, "measure", lambda *_: {"val_kid": next(kids), "val_l1": 0.1})
    finetune.main(replace(options, epochs=1, ingredients=Ingredients(adversary="dense")))
    _, architecture, _ = load_network(tmp_path / "out" / "discriminator.safetensors")
    assert architecture.widths == tuple(DENSE["discriminator"])


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), -1.0])
def test_weights_are_finite(weight: float) -> None:
    with pytest.raises(UserError, match=r"--feature-weight is .*; it must be 0 or more"):
        Ingredients(feature_weight=weight).check()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A run folder with the files that a finetuning reads."""

    def make(reference: dict[str, Any]) -> Path:
        folder = create_run("tiny", "random", 0, tmp_path / "run")
        describe_run(folder, replace(TrainOptions(), task="tiny"))
        write_json(folder.plan, {"best": {"widths": WIDTHS}, "uniform": {"widths": DENSE}})
        write_json(folder.elastic_reference, reference)
        return folder.path

    return make


@pytest.mark.parametrize(("name", "widths"), [("best", WIDTHS), ("uniform", DENSE)])
def test_a_run_is_a_source(
    make_run: Callable[[dict[str, Any]], Path], tmp_path: Path, name: str, widths: dict[str, list[int]]
) -> None:
    options = Options(source=make_run({"start": "dense"}), plan=name, epochs=1, output=tmp_path / "out")
    finetune.main(options)
    resolved = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (resolved["task"], resolved["start"], resolved["epochs"]) == ("tiny", "dense", 1)
    assert load_network(tmp_path / "out" / "generator_raw.safetensors")[1].widths == tuple(
        widths["generator"]
    )


def test_a_finished_finetuning_is_not_resumed(options: Options, tmp_path: Path) -> None:
    finetune.main(replace(options, epochs=1))
    with pytest.raises(UserError, match="is finished"):
        finetune.main(Options(resume=tmp_path / "out"))
    with pytest.raises(UserError, match="leave out the run or plan, --epochs"):
        finetune.main(Options(source=tmp_path, resume=tmp_path / "out", epochs=3))
    with pytest.raises(UserError, match="leave out --perceptual"):
        finetune.main(Options(resume=tmp_path / "out", ingredients=Ingredients(perceptual=1.0)))


def test_runs_and_finetunings_are_told_apart(
    options: Options, make_run: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no finetuning"):
        finetune.main(Options(resume=make_run({"start": "dense"})))
    finetune.main(replace(options, epochs=1))
    with pytest.raises(UserError, match="itself a finetuning; give what it began with"):
        finetune.main(Options(source=tmp_path / "out"))


def test_another_dense_pair_is_no_way_to_go_on(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Task
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(options)
    other = copy.deepcopy(dict(tiny.networks))
    with torch.no_grad():
        next(other["generator"].parameters()).add_(0.1)
    monkeypatch.setattr(finetune, "load_task", lambda *_: replace(tiny, networks=other))
    with pytest.raises(UserError, match="written with another dense_pair"):
        finetune.main(Options(resume=tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x93\x00", "no valid JSON .*; a plan file is JSON"),
        (b"[" * 100_000, "no valid JSON .*; a plan file is JSON"),
        (b'{"best": 3, "uniform": {"widths": {}}}', "holds no plan 'best'"),
        (b'{"widths": {"generator": [4, 8, 8, 8, 4], "critic": [4, 6]}}', "unknown network 'critic'"),
    ],
)
def test_what_is_no_plan_is_a_sentence(
    options: Options, plan: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    plan.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        finetune.main(options)
    assert not (tmp_path / "out").exists()


def test_a_finetuning_that_goes_astray_keeps_the_start(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kids = iter([2.0, math.nan, 1.0])  # the start, the end, the dense pair
    monkeypatch.setattr(finetune, "measure", lambda *_: {"val_kid": next(kids), "val_l1": 0.1})
    finetune.main(replace(options, epochs=1))
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["kept"] == "before"


def test_a_damaged_checkpoint_is_a_sentence(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, _trainer: PairedTrainer) -> None:
        path.write_bytes(b"PK nothing")
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(options)
    with pytest.raises(UserError, match=r"checkpoint.pt is damaged; delete it"):
        finetune.main(Options(resume=tmp_path / "out"))


def test_the_epochs_of_another_start_are_not_continued(tmp_path: Path) -> None:
    log = EpochLog(tmp_path / "log.jsonl", {"start": "a"})
    log.append({"epoch": 0, "val_kid": 2.0})
    log.append({"epoch": 1})
    log.append({"epoch": 1, "val_kid": 1.0})
    again = EpochLog(tmp_path / "log.jsonl", {"start": "a"})
    assert again.validated == [{"epoch": 0, "val_kid": 2.0}, {"epoch": 1, "val_kid": 1.0}]
    again.cut(0)
    assert set(again.entries) == {0}
    with pytest.raises(UserError, match="its epochs cannot be mixed"):
        EpochLog(tmp_path / "log.jsonl", {"start": "b"})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to finetune"),
        (["nowhere"], "nowhere does not exist"),
        (["."], "no run folder"),
        (["{plan}", "--epochs", "3", "--minutes", "1"], "exclude each other"),
        (["{plan}", "--epochs", "0"], "--epochs is 0"),
        (["{plan}", "--minutes", "nan"], "--minutes is nan"),
        (["{plan}", "--learning-rate", "0"], "--learning-rate is 0"),
        (["{plan}", "--ema", "1"], "--ema is 1"),
        (["{plan}", "--patience=-1"], "--patience is -1"),
        (["{plan}", "--feature-weight=-1"], "--feature-weight is -1"),
        (["{plan}", "--features", "maps"], "maps"),
        (["{plan}", "--online", "--variants", "4", "--start", "dense"], "leave out --online"),
        (["{plan}", "--start", "dense", "--output", "{folder}"], "exists"),
        (["{plan}"], "without elastic weights"),
        (["{wrong}", "--start", "dense"], "does not fit tiny"),
        (["{broken}", "--start", "dense"], "no valid JSON"),
        (["{other}", "--start", "dense"], "needs the key 'widths'"),
        (["--resume", "nowhere"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    plan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = write_json(tmp_path / "wrong.json", {"widths": {**WIDTHS, "generator": [4, 4]}})
    other = write_json(tmp_path / "other.json", {"width": 3})
    (tmp_path / "broken.json").write_text("{")
    before = set(tmp_path.iterdir())
    names = {
        "plan": plan,
        "wrong": wrong,
        "other": other,
        "broken": tmp_path / "broken.json",
        "folder": tmp_path,
    }
    filled = [argument.format(**names) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.run(finetune.main, Options, "", (), filled)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error
    assert "Traceback" not in error
    assert set(tmp_path.iterdir()) == before


def test_the_command_line_knows_every_ingredient(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(plan),
        "--start",
        "dense",
        "--quick",
        "--output",
        str(tmp_path / "out"),
        "--variants",
        "1",
    ]
    arguments += ["--features", "alignment", "--schedule", "cosine", "--matching", "target", "--epochs", "9"]
    cli.run(finetune.main, Options, "", (), arguments)
    resolved = json.loads((tmp_path / "out" / "options.json").read_text())
    assert resolved["ingredients"]["features"] == "alignment"
    assert resolved["ingredients"]["matching"] == "target"
    assert resolved["ingredients"]["perceptual"] == PERCEPTUAL  # a number, whatever the default will be
    header = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert "EfficientNet-Lite1" in header["ingredients"]["perceived_by"]
    assert "the finetuned pair is kept" in (text := capsys.readouterr().out) or "the start is kept" in text
    assert [entry["epoch"] for entry in entries(tmp_path / "out")] == [0, 1, 2]  # quick


def test_what_is_not_given_is_what_the_task_is_finetuned_with(options: Options, task: Task) -> None:
    usual = finetune.training_options(options, task)
    assert (usual.learning_rate, usual.ema) == (FINETUNING.learning_rate, FINETUNING.ema)
    other = finetune.training_options(replace(options, learning_rate=0.1, gradient_penalty=3.0), task)
    assert other == replace(usual, learning_rate=0.1, gradient_penalty=3.0)
    unpaired = finetune.training_options(options, replace(task, back=task.networks["generator"]))
    assert unpaired.learning_rate == CYCLE_FINETUNING.learning_rate
