from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from gan.checkpoints import (
    load_network,
    load_tensors,
    read_recipe,
    recipe_path,
    save_network,
    save_tensors,
    state_hash,
    tensors_hash,
)
from gan.errors import UserError
from gan.networks import Architecture
from tests.gan.conftest import random, randomise

ARCHITECTURE = Architecture("pixel", 6, 1, base_width=4)


@pytest.fixture
def network() -> nn.Module:
    return randomise(ARCHITECTURE.build())


@pytest.fixture
def path(tmp_path: Path, network: nn.Module) -> Path:
    return save_network(tmp_path / "critic.safetensors", network, ARCHITECTURE, {"seed": 3})


def test_float32_comes_back_bit_for_bit(path, network):
    loaded, architecture, recipe = load_network(path)
    assert architecture == ARCHITECTURE
    assert recipe["seed"] == 3
    assert recipe["weights_hash"] == state_hash(network) == state_hash(loaded)
    assert not any(module.training for module in loaded.modules())


def test_half_precision_keeps_what_is_no_kernel(tmp_path, network):
    network.net[3].num_batches_tracked.fill_(100_001)  # no fp16 number
    path = save_network(tmp_path / "half.safetensors", network, ARCHITECTURE, {}, half=True)
    loaded, _, recipe = load_network(path)
    assert recipe["weights_hash"] == state_hash(loaded)
    for name, value in network.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == value.dtype
        if value.dim() > 1:
            assert torch.equal(found, value.half().float())
            assert not torch.equal(found, value)
        else:
            assert torch.equal(found, value)
    full = save_network(tmp_path / "full.safetensors", network, ARCHITECTURE, {})
    assert path.stat().st_size < full.stat().st_size


def test_saving_what_was_loaded_changes_nothing(tmp_path, network):
    """A half-precision file that is read and written again keeps its hash."""
    first = save_network(tmp_path / "a.safetensors", network, ARCHITECTURE, {}, half=True)
    loaded, architecture, recipe = load_network(first)
    second = save_network(tmp_path / "b.safetensors", loaded, architecture, {}, half=True)
    assert second.read_bytes() == first.read_bytes()
    assert read_recipe(second)["weights_hash"] == recipe["weights_hash"]


def test_a_pruned_network_is_rebuilt_from_its_widths(tmp_path):
    architecture = Architecture("resnet_6blocks", base_width=4, norm="instance").pruned(range(2, 13))
    network = randomise(architecture.build())
    loaded, found, _ = load_network(save_network(tmp_path / "g.safetensors", network, architecture, {}))
    assert found == architecture
    inputs = torch.randn(1, 3, 16, 16, generator=random())
    assert torch.equal(loaded(inputs), network(inputs))


def test_any_tensors_survive(tmp_path):
    tensors = {
        "kernel": torch.randn(3, 4, generator=random()).t(),  # not contiguous
        "order": torch.tensor([2, 0, 1]),
        "importance": torch.rand(3, generator=random(), dtype=torch.float64),
        "scalar": torch.tensor(7),
        "bytes": torch.arange(8).to(torch.uint8),
    }
    found = load_tensors(save_tensors(tmp_path / "t.safetensors", tensors))
    assert tensors_hash(found) == tensors_hash(tensors)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in tensors.items()
    }


def test_saving_leaves_the_network_alone(tmp_path, network):
    before = state_hash(network)
    save_network(tmp_path / "half.safetensors", network, ARCHITECTURE, {}, half=True)
    assert state_hash(network) == before
    assert next(network.parameters()).dtype == torch.float32


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"weight file .*none\.safetensors does not exist; check the path"):
        load_network(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path)  # a folder


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_a_sentence(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        UserError, match=r"critic\.safetensors is damaged or no safetensors file \(.*get it again"
    ):
        load_network(path)


def test_a_file_of_another_kind_is_a_sentence(path):
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        load_network(path)


def test_a_file_without_recipe_is_a_sentence(path):
    recipe_path(path).unlink()
    with pytest.raises(UserError, match=r"has no recipe: critic\.json must lie beside it"):
        load_network(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no valid JSON"),
        ('{"architecture": {"name"', "is no valid JSON"),
        ("\xff\xfe", "is no valid JSON"),
        ("[1, 2]", "has no key 'architecture'; it is no recipe of a network"),
        ('{"weights_hash": "0"}', "has no key 'architecture'"),
        ('{"architecture": "unet_64"}', "has no key 'architecture'"),
        ('{"architecture": null}', "has no key 'architecture'"),
        ('{"architecture": {"base_width": 4}}', "needs the key 'name'"),
        ('{"architecture": {"name": "pixel", "ngf": 4}}', r"unknown architecture keys \['ngf'\]"),
        ('{"architecture": {"name": "pixel", "base_width": "4"}}', "'base_width' is '4'; it must be of int"),
        ('{"architecture": {"name": "pixel", "widths": [4, null]}}', r"'widths' is \(4, None\); it must be"),
        ('{"architecture": {"name": "pixle"}}', "unknown architecture 'pixle'; .* did you mean 'pixel'"),
    ],
)
def test_a_recipe_that_is_none_is_a_sentence(path, text, sentence):
    recipe_path(path).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=sentence):
        load_network(path)


@pytest.mark.parametrize(
    "other",
    [
        Architecture("pixel", 6, 1, base_width=8),
        Architecture("pixel", 3, 1, base_width=4),
        Architecture("pixel", 6, 1, base_width=4, norm="instance"),
        Architecture("basic", 6, 1, base_width=4),
        ARCHITECTURE.pruned((4, 7)),
    ],
)
def test_weights_that_do_not_fit_their_recipe_are_a_sentence(path, other):
    recipe_path(path).write_text(json.dumps({"architecture": other.to_dict()}))
    with pytest.raises(
        UserError, match=r"critic\.safetensors do not fit their recipe critic\.json: \S"
    ) as caught:
        load_network(path)
    assert "\n" not in str(caught.value)


def test_a_failing_write_leaves_the_old_pair_of_files(path, network, monkeypatch):
    before = path.read_bytes(), recipe_path(path).read_bytes()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        save_network(path, randomise(network, seed=5), ARCHITECTURE, {})
    assert (path.read_bytes(), recipe_path(path).read_bytes()) == before
    assert len(list(path.parent.iterdir())) == 2


def test_the_hash_is_stable():
    tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor(1)}
    assert tensors_hash(tensors) == tensors_hash(dict(reversed(tensors.items())))
    assert tensors_hash(tensors) == tensors_hash(
        {n: t.clone().requires_grad_(n == "b") for n, t in tensors.items()}
    )
    digest = hashlib.sha256(b"a()torch.int64" + struct.pack("<q", 1))
    digest.update(b"b(2, 3)torch.float32" + struct.pack("<6f", 0, 1, 2, 3, 4, 5))
    assert tensors_hash(tensors) == digest.hexdigest()[:16]


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0 + 1e-6]])},
        {"w": torch.tensor([[1.0, 3.0], [2.0, 4.0]])},
        {"w": torch.tensor([[1.0, 2.0, 3.0, 4.0]])},
        {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)},
        {"v": torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
        {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "x": torch.zeros(0)},
        {},
    ],
)
def test_the_hash_sees_every_change(other):
    assert tensors_hash(other) != tensors_hash({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})


def test_the_hash_of_a_network_sees_its_statistics(network):
    before = state_hash(network)
    network.net[3].running_mean[0] += 1e-4
    assert state_hash(network) != before


@pytest.mark.parametrize("ending", [".pth", ".onnx"])
def test_weights_of_another_kind_are_not_called_damaged(tmp_path, ending):
    path = tmp_path / f"latest_net_G{ending}"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"is no \.safetensors file; checkpoints of .* by make_task\.py"):
        load_network(path)
