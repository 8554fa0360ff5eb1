from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gan
from gan.checkpoints import load_tensors, save_network, save_tensors, tensors_hash
from gan.elastic import order_channels
from gan.errors import UserError
from gan.export import Source, describe_start, export_onnx, replay
from gan.files import file_hash
from gan.groups import find_groups
from gan.networks import Architecture
from gan.norm_statistics import recompute_statistics
from gan.runtime import OnnxNetwork, metadata_of, session
from tests.gan.conftest import randomise, tiny_generator, tiny_pairs

ARCHITECTURE = Architecture("unet_8", base_width=8)
WIDTHS = (4, 12, 20, 8, 4)
IMAGES = tiny_pairs(6).tensors()[0]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return randomise(ARCHITECTURE.build())


@pytest.fixture
def elastic(dense: nn.Module, tmp_path: Path) -> Path:
    """A file of elastic weights as tasks keep them: permuted, kernels in fp16."""
    made = order_channels(dense, find_groups(dense, [IMAGES[:1]]))
    tensors = {f"generator/weights/{name}": t for name, t in made.tensors.items()}
    tensors |= {f"generator/order/{index}": order for index, order in enumerate(made.orders)}
    return save_tensors(tmp_path / "elastic.safetensors", tensors, half=True)


@pytest.fixture
def exported(elastic: Path, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A finetuned network whose recipe knows its start, and that start."""
    source = Source.read("elastic", elastic, ARCHITECTURE, "generator", 8)
    kept = [order[:width].tolist() for order, width in zip(source.orders, WIDTHS, strict=True)]
    start = recompute_statistics(source.cut(kept, {}), IMAGES)
    path = tmp_path / "out" / "generator.safetensors"
    path.parent.mkdir()
    entry = describe_start(path, source, start, WIDTHS)
    assert entry is not None
    finetuned = randomise(ARCHITECTURE.pruned(WIDTHS).build(), seed=3)
    save_network(path, finetuned, ARCHITECTURE.pruned(WIDTHS), {"image_size": 8, "start": entry})
    return path, start


def test_replay_gives_the_start_bit_for_bit(exported: tuple[Path, nn.Module], elastic: Path) -> None:
    path, start = exported
    again = replay(path, elastic)
    assert not again.training
    assert again.state_dict().keys() == start.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(again(IMAGES), start(IMAGES))


def test_the_recipe_names_source_channels_and_statistics(
    exported: tuple[Path, nn.Module], elastic: Path, dense: nn.Module
) -> None:
    path, start = exported
    entry = json.loads(path.with_suffix(".json").read_text())["start"]
    assert entry["source"] == {"kind": "elastic", "file": "elastic.safetensors", "hash": file_hash(elastic)}
    assert [len(rows) for rows in entry["kept"].values()] == list(WIDTHS)
    # The kept channels are those of the dense network: its first kernel, up to fp16, is the start's.
    name, rows = next(iter(entry["kept"].items()))
    kernel = dense.get_submodule(name).weight[rows].half().float()
    assert torch.equal(start.get_submodule(name).weight, kernel)
    statistics = load_tensors(path.with_name(entry["statistics"]["file"]))
    assert statistics.keys() == dict(start.named_buffers()).keys()


def test_replay_from_dense_weights(dense: nn.Module, tmp_path: Path) -> None:
    save_network(tmp_path / "dense.safetensors", dense, ARCHITECTURE, {})
    source = Source.read("dense", tmp_path / "dense.safetensors", ARCHITECTURE, "generator", 8)
    rows = [np.random.default_rng(0).permutation(g.channels)[:4].tolist() for g in source.groups]
    start = source.cut(rows, {})
    first = source.groups[0]
    weight = dense.get_submodule(first.name).weight[rows[0]]
    assert torch.equal(start.get_submodule(first.name).weight, weight)  # any channels, in any order
    path = tmp_path / "generator.safetensors"
    kept = source.cut([list(range(width)) for width in WIDTHS], {})
    entry = describe_start(path, source, kept, WIDTHS)
    save_network(path, kept, ARCHITECTURE.pruned(WIDTHS), {"image_size": 8, "start": entry})
    again = replay(path, tmp_path / "dense.safetensors")
    assert tensors_hash(again.state_dict()) == tensors_hash(kept.state_dict())


def test_a_network_from_elsewhere_has_no_start(elastic: Path, tmp_path: Path) -> None:
    source = Source.read("elastic", elastic, ARCHITECTURE, "generator", 8)
    assert describe_start(tmp_path / "a.safetensors", source, tiny_generator(9, WIDTHS), WIDTHS) is None
    assert not list(tmp_path.glob("*_start*"))


def test_replay_refuses_other_files(exported: tuple[Path, nn.Module], elastic: Path) -> None:
    path, _ = exported
    with pytest.raises(UserError, match=r"other\.safetensors does not exist"):
        replay(path, path.with_name("other.safetensors"))
    with pytest.raises(UserError, match=r"is not the file that generator\.json names: elastic\.safetensors"):
        replay(path, path)
    beside = path.with_name("generator_start.safetensors")
    save_tensors(beside, {name: t + 1 for name, t in load_tensors(beside).items()})
    with pytest.raises(UserError, match=r"generator_start\.safetensors is not the file"):
        replay(path, elastic)
    save_network(path, tiny_generator(), ARCHITECTURE, {})
    with pytest.raises(UserError, match=r"has no key 'start'"):
        replay(path, elastic)


def test_onnx_says_how_far_it_is_from_the_network(tmp_path: Path) -> None:
    network, path = tiny_generator(), tmp_path / "generator.onnx"
    parity = export_onnx(path, network, IMAGES, about={"weights_hash": "abc"})
    assert 0 < parity.max_difference < 1e-4
    assert parity.mean_difference < parity.max_difference
    assert (parity.images, parity.sizes, parity.size_multiple) == (6, ((8, 8), (16, 16)), 8)
    said = metadata_of(path)
    assert float(said["parity_max_difference"]) == parity.max_difference
    assert (said["parity_images"], said["parity_tolerance"], said["size_multiple"]) == ("6", "0.0001", "8")
    assert (said["weights_hash"], said["precision"], said["value_range"]) == ("abc", "fp32", "[-1, 1]")
    with torch.no_grad():
        torch.testing.assert_close(OnnxNetwork(path)(IMAGES), network(IMAGES), atol=1e-4, rtol=0)
    (entry,) = session(path).get_inputs()
    assert (entry.name, entry.shape) == ("input", ["batch", 3, "height", "width"])


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "generator.onnx"
    with pytest.raises(UserError, match=r"generator\.onnx was not written: .* 1e-12 is allowed"):
        export_onnx(path, tiny_generator(), IMAGES, tolerance=1e-12)
    broken = tiny_generator(seed=4)
    monkeypatch.setattr("gan.export.write_onnx", lambda *_: write_other(broken))
    with pytest.raises(UserError, match=r"on 6 images, and 0\.0001 is allowed"):
        export_onnx(path, tiny_generator(), IMAGES)
    assert not list(tmp_path.iterdir())


def write_other(network: nn.Module) -> bytes:
    from gan.onnx_writer import write_onnx

    return write_onnx(network, IMAGES[:1])


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    whole = export_onnx(tmp_path / "a.onnx", tiny_generator(), IMAGES)
    half = export_onnx(tmp_path / "b.onnx", tiny_generator(), IMAGES, half=True)
    assert whole.max_difference < half.max_difference < half.tolerance == 0.05
    assert metadata_of(tmp_path / "b.onnx")["precision"] == "fp16"


def test_load_takes_folders_and_files(exported: tuple[Path, nn.Module]) -> None:
    path, _ = exported
    for source in (path, str(path), path.parent):
        network = gan.load(source)
        assert not network.training
        assert network(IMAGES).shape == IMAGES.shape


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "does not exist"),
        ("nowhere.safetensors", "does not exist"),
        (".", "holds no generator.safetensors"),
        ("text.onnx", "is no .safetensors file and no run folder"),
        ("bare.safetensors", "has no recipe"),
    ],
)
def test_load_refuses_the_rest(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "text.onnx").write_bytes(b"no network")
    save_tensors(tmp_path / "bare.safetensors", tiny_generator().state_dict())
    with pytest.raises(UserError, match=sentence):
        gan.load(tmp_path / name)


def test_the_package_alone_is_light() -> None:
    program = "import sys, gan; gan.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
