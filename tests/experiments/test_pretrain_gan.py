from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, pretrain_gan
from experiments.pretrain_gan import Options, main
from gan.checkpoints import load_network, state_hash
from gan.cyclegan import CycleOptions
from gan.data import embedded_pairs, embedded_unpaired
from gan.errors import UserError
from gan.features import Extractor
from gan.tasks import ASSETS
from gan.training import TrainingOptions


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Eight images, narrow networks, features by an average."""

    def few(load: Any) -> Any:
        return lambda task, split: load(task, split).take(
            32 if split == "val" and load is embedded_pairs else 8
        )

    def average(images: Any) -> tuple[Any, Any]:
        return images.unfold(2, 16, 16).unfold(3, 16, 16).mean((-2, -1)).flatten(1), images[:, :, :4, :4]

    monkeypatch.setattr(pretrain_gan, "embedded_pairs", few(embedded_pairs))
    monkeypatch.setattr(pretrain_gan, "embedded_unpaired", few(embedded_unpaired))
    extractor = Extractor("efficientnet_lite0", 64, 48, "average", average)
    monkeypatch.setattr(pretrain_gan, "load_extractor", lambda device: extractor)
    return Options(
        task="noto2twemoji",
        output=tmp_path,
        epochs=2,
        ngf=12,
        ndf=4,
        keep_every=1,
        training=TrainingOptions(batch_size=8),
        cycle=CycleOptions(batch_size=4, learning_rate=1e-3),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


NETWORKS = ["discriminator_A", "discriminator_B", "generator_A", "generator_B"]


def test_both_directions_are_pretrained_and_an_interruption_changes_nothing(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(options)
    folder = tmp_path / "noto2twemoji"
    whole, log = {}, rows(folder)
    for name in NETWORKS:
        network, architecture, recipe = load_network(folder / f"{name}.safetensors")
        whole[name] = state_hash(network)
        width = 12 if architecture.is_generator else 4
        assert (architecture.base_width, architecture.norm) == (width, "instance")
        assert (recipe["task"], recipe["image_size"], recipe["epochs"]) == ("noto2twemoji", 64, 2)
    assert [row["epoch"] for row in log] == [1, 2]
    figures = {f"val_{name}_{way}" for name in ("l1", "kid_efficientnet_lite0") for way in "AB"}
    assert figures | {"cycle A", "identity B", "adversarial A", "discriminator B"} <= set(log[0])
    for name in ("done", "samples.png", "generator_A-1.safetensors", "generator_B-2.safetensors"):
        assert (folder / name).is_file()

    again = replace(options, output=tmp_path / "again")
    save = pretrain_gan.save_image
    calls: list[Path] = []

    def interrupted(image: Any, path: Path) -> Path:
        """Dies in the second epoch, after its log and before its checkpoint."""
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(image, path)

    monkeypatch.setattr(pretrain_gan, "save_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(again)
    folder = tmp_path / "again" / "noto2twemoji"
    assert len(rows(folder)) == 2
    assert not (folder / "done").exists()
    main(again)
    assert rows(folder) == log
    for name in NETWORKS:
        assert state_hash(load_network(folder / f"{name}.safetensors")[0]) == whole[name]


def test_only_the_end_of_a_training_may_move(options: Options, tmp_path: Path) -> None:
    main(replace(options, epochs=1))
    main(options)
    assert [row["epoch"] for row in rows(tmp_path / "noto2twemoji")] == [1, 2]
    with pytest.raises(UserError, match="holds a training with other options"):
        main(replace(options, ngf=16))


def test_paired_tasks_are_pretrained_by_the_same_program(options: Options, tmp_path: Path) -> None:
    main(replace(options, task="edges2emoji", epochs=1))
    folder = tmp_path / "edges2emoji"
    _, architecture, recipe = load_network(folder / "generator.safetensors")
    assert (architecture.name, recipe["training"]["perceptual"]) == ("unet_64", 100.0)
    assert load_network(folder / "discriminator.safetensors")[1].in_channels == 6
    assert {"val_l1", "val_kid_efficientnet_lite0", "perceptual"} <= set(rows(folder)[0])


def test_the_perceptual_distance_of_pretraining_can_be_turned_off(options: Options, tmp_path: Path) -> None:
    main(replace(options, task="edges2emoji", epochs=1, perceptual=0.0))
    folder = tmp_path / "edges2emoji"
    assert "perceptual" not in rows(folder)[0]
    assert load_network(folder / "generator.safetensors")[2]["training"]["perceptual"] == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "noto2emoji"}, r"unknown task 'noto2emoji'; .*noto2twemoji"),
        ({"ngf": 0}, "--ngf is 0; it must be 1 or more"),
        ({"perceptual": -1.0}, "perceptual"),
        ({"epochs": 0}, "--epochs is 0; it must be 1 or more"),
        ({"epochs": None, "minutes": 0.0}, "--minutes is 0; it must be more than 0"),
        ({"minutes": 5.0}, "--epochs and --minutes both say when to end"),
        ({"task": "twemoji2noto"}, "the way back of noto2twemoji"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: Options, change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        main(replace(options, **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", sorted({path.parent for path in ASSETS.glob("*/generator*.json")}))
def test_what_ships_says_how_it_was_made(folder: Path) -> None:
    for path in folder.glob("*.json"):
        recipe = json.loads(path.read_text())
        if "training" not in recipe:  # not pretrained networks
            continue
        program, *arguments = recipe["command"].split()[1:]
        assert program == "experiments/pretrain_gan.py"
        made = cli.parse(Options, "", (), arguments)
        assert made.task == recipe["task"]
        options = made.cycle if "cycle" in recipe["training"] else made.training
        for name in ("learning_rate", "amp", "gradient_penalty", "batch_size"):
            assert getattr(options, name) == recipe["training"].get(name, 0.0)
