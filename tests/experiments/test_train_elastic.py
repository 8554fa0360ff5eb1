from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import cli, train_elastic
from gan.tasks import load_elastic, load_task

SHORT = ("--warm-up.steps", "2", "--warm-up.batch-size", "2")


def call(*arguments: str) -> None:
    cli.run(train_elastic.main, train_elastic.Options, "", (), arguments)


def moved(path: Path, other: Path) -> float:
    """Largest change of a generator's weight between two files, in its own tensors' mean size."""
    task = load_task("edges2emoji")
    first, second = (load_elastic(p, task)["generator"].tensors for p in (path, other))
    trained = [name for name in first if not name.endswith(("mean", "var", "tracked"))]
    return max(
        float((first[n].float() - second[n].float()).abs().max() / first[n].float().abs().mean())
        for n in trained
    )


def test_writes_weights_and_their_recipe(tmp_path: Path) -> None:
    call("--output", str(tmp_path / "new.safetensors"), "--warm-up.perceptual", "2", *SHORT)
    recipe = json.loads((tmp_path / "new.json").read_text())
    assert "--warm-up.perceptual 2" in recipe["command"]
    assert (recipe["start"], recipe["steps"], recipe["perceptual"]) == ("dense", 2, 2.0)
    task = load_task("edges2emoji")
    made = load_elastic(tmp_path / "new.safetensors", task)
    ordered = task.ordered()
    for agent, network in made.items():
        assert all(torch.equal(a, b) for a, b in zip(network.orders, ordered[agent].orders, strict=True))


def test_goes_on_from_other_elastic_weights(tmp_path: Path) -> None:
    shipped = load_task("edges2emoji").elastic_path
    assert shipped is not None
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    call("--start", "elastic", "--output", str(first), *SHORT)
    call("--start", str(shipped), "--output", str(again), *SHORT)
    assert moved(first, again) == 0.0
    call("--output", str(tmp_path / "dense.safetensors"), *SHORT)
    assert 0.0 < moved(first, shipped) < moved(tmp_path / "dense.safetensors", shipped)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--warm-up.steps", "0"), "steps is 0; it must be above 0"),
        (("--warm-up.perceptual", "nan"), "perceptual is nan; it must be 0 or more"),
        (("--warm-up.ema", "1.5"), "ema is 1.5; it must be from 0 to 1"),
        (("--start", "missing.safetensors"), "missing.safetensors"),
        (("--budget", "0.00001"), "reach"),
    ],
)
def test_bad_input_is_a_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call("--output", str(tmp_path / "new.safetensors"), *arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
