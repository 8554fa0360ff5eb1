from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments import cli, measure
from experiments.memory import STATUS, MemoryJob, peaks_mb
from experiments.runs import RunFolder
from gan.checkpoints import load_network, save_network
from gan.networks import Architecture, initialise
from gan.stopwatch import Clocks

SMALL = Architecture("unet_16", base_width=8)
QUICK = ["--rounds", "1", "--runs", "1"]


def call(arguments: list[str]) -> None:
    cli.run(measure.main, measure.Options, "", (), arguments)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    pruned = SMALL.pruned((4, 8, 8, 8, 8, 8, 4))
    network = initialise(pruned.build(), torch.Generator().manual_seed(0)).eval()
    return save_network(tmp_path / "generator.safetensors", network, pruned, {"image_size": 16})


def test_a_weight_file_is_measured_beside_its_dense_network(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "measured.json"
    call([str(weights), *QUICK, "--threads", "1", "--layers", "--output", str(output)])
    document = json.loads(output.read_text())
    rows = {(row["network"], row["engine"]): row for row in document["rows"]}
    assert set(rows) == {(name, engine) for name in ("dense", "pruned") for engine in ("torch", "onnx")}
    for engine in ("torch", "onnx"):
        dense, pruned = rows["dense", engine], rows["pruned", engine]
        assert dense["speedup"] == dense["promised"] == 1
        assert pruned["promised"] == pytest.approx(dense["macs"] / pruned["macs"], rel=1e-3)
        assert pruned["promised"] > 2
        assert pruned["file_mb"] < dense["file_mb"]
        assert dense["published_macs"] > dense["macs"]
        assert 0 < pruned["low_ms"] <= pruned["median_ms"] <= pruned["high_ms"]
        assert (pruned["peak_mb"] is not None) == STATUS.exists()
    with output.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == [row["network"] for row in document["rows"]]
    assert float(table[0]["median_ms"]) == document["rows"][0]["median_ms"]
    layers = document["layers"]["pruned"]
    assert len(layers) == 8
    assert {layer["layer"] for layer in layers} >= {"model.model.0", "model.model.3"}
    assert [layer["lost_ms"] for layer in layers] == sorted(
        (layer["lost_ms"] for layer in layers), reverse=True
    )
    first = next(layer for layer in layers if layer["layer"] == "model.model.0")
    assert first["promised"] == pytest.approx(8 / 4)  # its input are the image's channels
    assert any("ConvTranspose2d BatchNorm2d" in layer["kind"] for layer in layers)
    printed = capsys.readouterr().out
    assert "ONNX Runtime: file, MB" in printed
    assert "slower than the MACs of the whole network promise" in " ".join(printed.split())


def test_an_architecture_is_measured_at_uniform_plans(tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    arguments = ["unet_16", "--base-width", "16", "--size", "16", "--macs", "0.5", "0.2", "--no-memory"]
    call([*arguments, *QUICK, "--threads", "1", "2", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert {(row["engine"], row["threads"]) for row in rows} == {
        (engine, threads) for engine in ("torch", "onnx") for threads in (1, 2)
    }
    macs = {row["network"]: row["macs"] for row in rows}
    assert list(macs) == ["dense", "uniform 0.5", "uniform 0.2"]
    for share in (0.5, 0.2):
        assert 0.6 * share < macs[f"uniform {share:g}"] / macs["dense"] <= share
    assert all(row["peak_mb"] is None for row in rows)


def test_an_image_is_as_wide_as_the_recipe_says(weights: Path) -> None:
    recipe = json.loads(weights.with_suffix(".json").read_text())
    weights.with_suffix(".json").write_text(json.dumps({**recipe, "image_width": 32}))
    _, image, _ = measure.subjects(measure.Options(weights))
    assert image.shape == (1, 3, 16, 32)


def test_a_dense_network_that_was_pruned_before_is_the_one_to_beat(
    weights: Path, make_run: Callable[..., RunFolder]
) -> None:
    """The users' own network, not the one that it was once cut from."""
    run, task = make_run(), SMALL.pruned((8, 12, 8, 8, 8, 8, 8))
    save_network(run.weights("generator"), *load_network(weights)[:2], {"image_size": 16})
    run.task.mkdir()
    save_network(run.task / "generator.safetensors", task.build(), task, {})
    (run.task / "task.json").write_text("{}")
    networks, _, _ = measure.subjects(measure.Options(run.path))
    assert networks["dense"].model.model[1].model[1].weight.shape == (12, 8, 4, 4)  # type: ignore[union-attr, index]


def test_one_thread_is_compared_by_the_processors_clock() -> None:
    dense, pruned = [Clocks(10.0, 8.0)], [Clocks(5.0, 2.0)]
    assert measure.faster(dense, pruned, threads=1) == 4
    assert measure.faster(dense, pruned, threads=2) == 2


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells a process's peak")
def test_memory_grows_with_the_network(tmp_path: Path) -> None:
    shape = (1, 4, 8, 8)
    for name, width in (("tiny", 4), ("small", 400), ("large", 1200)):
        torch.save(torch.nn.Conv2d(4, width, 16, padding=8), tmp_path / name)
    tiny, small, large = (
        MemoryJob("torch", str(tmp_path / name), shape) for name in ("tiny", "small", "large")
    )
    found = peaks_mb([small, large, small], [tiny])
    first, second, again = (float(peak) for peak in found if peak is not None)
    weights = 800 * 4 * 16 * 16 * 4 / 1e6  # what the large one has more
    assert second - first > 0.8 * weights
    assert abs(first - again) < 0.5 * weights  # each in a process of its own


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.safetensors"], "does not exist"),
        (["unet_255"], "no weight file"),
        (["basic"], "no generator's architecture"),
        (["unet_16", "--macs", "1.5"], "--macs is [1.5]"),
        (["unet_16", "--threads", "0"], "--threads is [0]"),
        (["unet_16", "--rounds", "0"], "--rounds is 0"),
        (["."], "no run folder"),
        (
            ["unet_16", "--size", "24", "--base-width", "8"],
            "multiples of 16 pixels, and this would be 24 × 24",
        ),
        (["resnet_1blocks", "--size", "4", "--base-width", "8"], "does not run on an image of 4 × 4 pixels"),
        (["unet_16", "--output", "table.csv"], "name a JSON file"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, refused: Callable[..., None]) -> None:
    refused(measure.main, measure.Options, arguments, sentence)
