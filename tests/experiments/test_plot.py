from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from experiments import cli, plot
from experiments.figures import learning_curves
from experiments.plot import DESCRIPTION, EXAMPLES, Options, flatten, group, main, tunings
from experiments.runs import RunFolder, read_finetuning, read_run
from gan.errors import UserError


def call(arguments: Sequence[str]) -> None:
    cli.run(main, Options, DESCRIPTION, EXAMPLES, arguments)


def test_runs_of_one_kind_become_one_series(make_run: Callable[..., RunFolder]) -> None:
    folders = [make_run(seed=seed) for seed in (0, 1, 2)] + [make_run(algo="random")]
    title, series = group([read_run(folder.path) for folder in folders])
    assert [(one.label, len(one.metrics)) for one in series] == [("mappo", 3), ("random", 1)]
    assert title == "edges2emoji, budget 0.1"


def test_labels_tell_what_differs(make_run: Callable[..., RunFolder]) -> None:
    folders = [make_run(budget="0.1"), make_run(budget="0.25")]
    title, series = group([read_run(folder.path) for folder in folders])
    assert [one.label for one in series] == ["mappo, budget 0.1", "mappo, budget 0.25"]
    assert title == "edges2emoji"


def test_seeds_of_one_transfer_are_one_series(make_run: Callable[..., RunFolder]) -> None:
    folders = []
    for seed, beginning in enumerate((None, "/somewhere/other-s1", "/elsewhere/other-s2")):
        folders.append(make_run(seed=seed))
        path = folders[-1].options
        more = {"from_": beginning, "reference": f"/here/run-s{seed}"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    _, series = group([read_run(folder.path) for folder in folders])
    labels = [(one.label, len(one.metrics)) for one in series]
    assert labels == [("mappo, from scratch", 1), ("mappo, from other", 2)]


def test_nested_options_are_flattened() -> None:
    assert flatten({"seed": 0, "weights": {"density": 0.1}}) == {"seed": "0", "weights.density": "0.1"}


def test_plot_writes_one_figure_of_several_runs(
    tmp_path: Path, make_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(make_run(seed=seed).path) for seed in (0, 1)]
    call([*paths, paths[0], "--output", str(tmp_path / "curves.png"), "--window", "30"])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    assert "mappo (2)" in capsys.readouterr().out  # a run named twice counts once


def finetuning(folder: Path, epochs: Sequence[float], dense: float | None = None) -> str:
    """A folder as ``finetune.py`` leaves it; without ``dense`` it is still under way."""
    folder.mkdir(parents=True)
    for name, content in (("run", {"format": 1}), ("options", {"task": "edges2emoji"})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    entries = [{"epoch": n, "seconds": 90.0 * n, "val_kid": kid} for n, kid in enumerate(epochs)]
    lines = [json.dumps(entry) for entry in [{"format": 1}, *entries]]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 99, "sec')
    if dense is not None:
        (folder / "evaluation.json").write_text(json.dumps({"val_of_dense": {"val_kid": dense}}))
    return str(folder)


def test_finetunings_are_drawn_by_their_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [finetuning(tmp_path / "a", (0.6, 0.4, 0.3), 0.2), finetuning(tmp_path / "b", (0.5, 0.4))]
    call([*folders, "--output", str(tmp_path / "tuned.svg")])
    assert "a (2 epochs), b (1 epochs)" in capsys.readouterr().out
    title, curves = tunings([read_finetuning(Path(folder)) for folder in folders])
    assert title == "edges2emoji: finetuning, val images"
    assert [dict(curve.dense) for curve in curves] == [{"val_kid": 0.2}, {}]
    axes = learning_curves(curves).axes
    assert len(axes) == 1  # nobody knows L1
    first, second, level = axes[0].lines
    assert list(first.get_xdata()) == pytest.approx([0.0, 1.5, 3.0])  # minutes
    assert list(second.get_ydata()) == pytest.approx([0.5, 0.4])
    assert list(level.get_ydata()) == pytest.approx([0.2, 0.2])


def test_searches_and_finetunings_are_two_figures(tmp_path: Path, make_run: Callable[..., RunFolder]) -> None:
    tuned = finetuning(tmp_path / "tuned", (0.6, 0.4))
    with pytest.raises(UserError, match=r"tuned is a finetuning and .* is not; draw them in two figures"):
        main(Options((Path(tuned), make_run().path), tmp_path / "x.png"))


def test_a_finetuning_without_an_epoch_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be drawn"):
        main(Options((Path(finetuning(tmp_path / "tuned", ())),), tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("options.json", "{}"),
        ("options.json", '{"task": null}'),
        ("evaluation.json", "[]"),
        ("evaluation.json", '{"val_of_dense": null}'),
        ("evaluation.json", '{"val_of_dense": {"val_kid": null}}'),
        ("log.jsonl", '{"format": 1}\n{"epoch": 0, "seconds": "x", "val_kid": 0.3}\n'),
        ("log.jsonl", '{"format": 1}\n{"epoch": 0}\n'),
        ("log.jsonl", "\udcff\n"),
    ],
)
def test_a_damaged_finetuning_is_a_sentence(name: str, content: str, tmp_path: Path) -> None:
    folder = Path(finetuning(tmp_path / "tuned", (0.6, 0.4), 0.2))
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError):
        main(Options((folder,), tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def test_finetunings_of_equal_names_and_other_tasks(tmp_path: Path) -> None:
    folders = [Path(finetuning(tmp_path / place / "tuned", (0.6, 0.4))) for place in "ab"]
    _, curves = tunings([read_finetuning(folder) for folder in folders])
    assert [curve.label for curve in curves] == [str(folder) for folder in folders]
    (folders[1] / "options.json").write_text('{"task": "edges2emoji_resnet"}')
    with pytest.raises(UserError, match="finetunings of edges2emoji and edges2emoji_resnet; draw each"):
        main(Options(tuple(folders), tmp_path / "x.png"))


def test_too_many_finetunings_are_a_sentence(tmp_path: Path) -> None:
    folders = tuple(Path(finetuning(tmp_path / str(n), (0.6, 0.4))) for n in range(9))
    with pytest.raises(UserError, match="9 finetunings cannot be told apart"):
        main(Options(folders, tmp_path / "x.png"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "x.png"], "no run to draw"),
        (["nowhere", "--output", "x.png"], "does not exist"),
        ([".", "--output", "x.png"], "no run folder"),
        (["RUN", "--output", "x.jpeg"], "must end in"),
        (["RUN", "--output", "nowhere/x.png"], "nowhere does not exist"),
        (["RUN", "--output", "x.png", "--window", "0"], "--window is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    make_run: Callable[..., RunFolder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(make_run().path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        call([run if argument == "RUN" else argument for argument in arguments])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "arguments", [["RUN"], ["RUN", "--output", "x.png", "--windw", "3"], ["--window", "a"]]
)
def test_unknown_options_and_wrong_types_exit_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        call(arguments)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err


def test_help_shows_the_examples_first_on_one_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_info:
        call(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    places = [
        text.index(part) for part in ("examples:", "Reward (total", "positional arguments", "Run folders")
    ]
    assert places == sorted(places)
    assert all(command in text for command, _ in plot.EXAMPLES)
    assert len(text.splitlines()) <= 45
