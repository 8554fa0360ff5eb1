from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gan.errors import UserError
from gan.networks import Architecture, with_image_statistics
from gan.official import (
    OfficialNetwork,
    check_pair,
    infer_architecture,
    load_official,
    read_state,
    save_official,
)
from tests.gan import official_layout as layout
from tests.gan.conftest import random, randomise

NORMS = ("batch", "instance", "none")
KNOWN: dict[str, tuple[dict[str, Tensor], Architecture]] = {}
for norm in NORMS:
    KNOWN |= {
        f"unet {norm}": (layout.unet(7, 2, norm), Architecture("unet_128", base_width=2, norm=norm)),
        f"resnet {norm}": (
            layout.resnet(9, 2, norm),
            Architecture("resnet_9blocks", base_width=2, norm=norm),
        ),
        f"dropout {norm}": (
            layout.resnet(6, 3, norm, dropout=True),
            Architecture("resnet_6blocks", base_width=3, norm=norm, dropout=True),
        ),
        f"basic {norm}": (layout.patch(3, 4, norm), Architecture("basic", 6, 1, base_width=4, norm=norm)),
        f"n_layers {norm}": (
            layout.patch(5, 4, norm, came=3),
            Architecture("n_layers", 3, 1, base_width=4, norm=norm, layers=5),
        ),
        f"pixel {norm}": (layout.pixel(4, norm), Architecture("pixel", 6, 1, base_width=4, norm=norm)),
    }
KNOWN["unet grey to two"] = (
    layout.unet(8, 1, came=1, made=2),
    Architecture("unet_256", 1, 2, base_width=1),
)
KNOWN["unet_64"] = (layout.unet(6, 8), Architecture("unet_64", base_width=8))


def write(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_theirs_is_read_without_options(tmp_path, name):
    state, wanted = KNOWN[name]
    network, architecture, _ = load_official(write(tmp_path / "latest_net_G.pth", state))
    layers = architecture.layers if wanted.name == "n_layers" else wanted.layers
    assert architecture == Architecture(**{**wanted.to_dict(), "layers": layers})
    assert not network.training
    found = network.state_dict()
    assert set(found) == set(state)  # key for key
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", KNOWN)
def test_ours_is_written_as_theirs(tmp_path, name):
    """Key for key and in their order; and it comes back."""
    state, architecture = KNOWN[name]
    network = randomise(architecture.build(), seed=4)
    path = save_official(tmp_path / "latest_net_G.pth", network)
    written = torch.load(path, weights_only=True)
    assert {key: value.shape for key, value in written.items()} == {
        key: value.shape for key, value in state.items()
    }
    back = load_official(path)
    assert back.architecture == load_official(write(tmp_path / "theirs.pth", state)).architecture
    image = torch.randn(1, architecture.in_channels, *(2 * [256 if "256" in architecture.name else 128]))
    with torch.no_grad():
        assert torch.equal(back.network(image), network(image))


def test_a_pruned_network_keeps_its_widths(tmp_path):
    pruned = Architecture("unet_64", base_width=8).pruned((4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24))
    back = load_official(save_official(tmp_path / "g.pth", pruned.build()))
    assert back.architecture.widths == pruned.widths
    assert back.architecture.name == "unet_64"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_are_taken_off(tmp_path, prefix):
    state, architecture = KNOWN["basic batch"]
    path = write(tmp_path / "d.pth", {prefix + key: value for key, value in state.items()})
    assert load_official(path).architecture == architecture


@pytest.mark.parametrize(
    "make", [lambda: layout.unet(6, 2, "old_instance"), lambda: layout.resnet(6, 2, "old_instance")]
)
def test_statistics_of_old_instance_norms_are_dropped(tmp_path, make):
    state = make()
    network, architecture, notes = load_official(write(tmp_path / "g.pth", state))
    assert architecture.norm == "instance"
    assert not any("running" in key for key in network.state_dict())
    assert "old InstanceNorm" in notes[0]


def test_checkpoints_older_than_the_count_of_batches(tmp_path):
    state = {key: value for key, value in layout.unet(6, 2).items() if "num_batches" not in key}
    assert load_official(write(tmp_path / "g.pth", state)).architecture.norm == "batch"


def test_files_of_old_torch_and_half_precision(tmp_path):
    state, architecture = KNOWN["basic batch"]
    path = tmp_path / "d.pth"
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, path, _use_new_zipfile_serialization=False)
    network, found, _ = load_official(path)
    assert found == architecture
    assert next(network.parameters()).dtype == torch.float32


def test_a_unet_says_what_its_weights_do_not(tmp_path):
    notes = load_official(write(tmp_path / "g.pth", layout.unet(6, 2))).notes
    assert "dropout leaves no trace" in notes[0]


def test_code_in_a_file_is_not_run(tmp_path):
    path = write(tmp_path / "g.pth", argparse.Namespace(netG="unet_256"))
    with pytest.raises(UserError, match=r"g\.pth holds more than tensors; save the network alone"):
        load_official(path)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_official(write(tmp_path / "whole.pth", nn.Linear(2, 2)))


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_file_is_a_sentence(tmp_path, keep):
    path = write(tmp_path / "g.pth", layout.patch(3, 2))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"g\.pth is damaged or no checkpoint") as caught:
        load_official(path)
    assert "\n" not in str(caught.value)


def test_other_contents_are_sentences(tmp_path):
    with pytest.raises(UserError, match="does not exist; name a file such as"):
        read_state(tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds a list; it must be a state dict"):
        read_state(write(tmp_path / "a.pth", [torch.zeros(1)]))
    with pytest.raises(UserError, match="holds no tensors; it must be a network's state dict"):
        read_state(write(tmp_path / "c.pth", {}))
    with pytest.raises(UserError, match=r"'epoch' is no tensor"):
        read_state(write(tmp_path / "b.pth", {"epoch": 3, "state": {}}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_training_that_went_astray_are_refused(tmp_path, value):
    """Nothing else would notice: they are searched, finetuned and exported for an hour."""
    state = layout.patch(3, 2)
    state["model.5.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"values in 'model\.5\.weight' that are no finite numbers"):
        load_official(write(tmp_path / "d.pth", state))


@pytest.mark.parametrize("make", [lambda x: x.to("meta"), Tensor.cfloat], ids=["meta", "complex"])
def test_tensors_that_no_network_takes_are_refused(tmp_path, make):
    state = layout.patch(3, 2)
    state["model.5.weight"] = make(state["model.5.weight"])
    with pytest.raises(UserError, match=r"'model\.5\.weight' in a form that no network takes"):
        load_official(write(tmp_path / "d.pth", state))


def test_unknown_networks_are_named():
    with pytest.raises(UserError, match=r"no network that is known here \(features\.0\.weight\)"):
        infer_architecture({"features.0.weight": torch.zeros(4, 3, 3, 3)})
    zeros = {"model.10.conv_block.0.weight": torch.zeros(4, 4, 3, 3)}
    with pytest.raises(UserError, match="pad with zeros"):
        infer_architecture(zeros)
    for stray in ("a.conv_block.b", "model.x.conv_block.1.weight", "net.conv_block.conv_block.0"):
        with pytest.raises(UserError, match="no network that is known here"):
            infer_architecture({stray: torch.zeros(4, 4, 3, 3)})
    with pytest.raises(UserError, match=r"'model\.1' is missing"):
        infer_architecture({"model.10.conv_block.1.weight": torch.zeros(4, 4, 3, 3)})


def test_what_does_not_fit_is_named(tmp_path):
    state = layout.unet(6, 2)
    del state["model.model.3.bias"]
    with pytest.raises(UserError, match=r"looks like unet_64 with batch norm, but .*bias. is missing"):
        load_official(write(tmp_path / "g.pth", state))
    state = layout.resnet(6, 2) | {"model.99.filt": torch.zeros(2)}
    with pytest.raises(UserError, match=r"'model\.99\.filt' has no place in it"):
        load_official(write(tmp_path / "g.pth", state))
    state = layout.patch(3, 2) | {"model.0.weight": torch.zeros(0, 6, 4, 4)}
    with pytest.raises(UserError, match=r"d\.pth looks like basic, but a layer of it has no channels"):
        load_official(write(tmp_path / "d.pth", state))
    state = layout.patch(3, 2)
    state["model.5.weight"] = torch.zeros(8, 5, 4, 4)
    with pytest.raises(UserError, match=r"'model\.5\.weight' is \(8, 5, 4, 4\) instead of \(8, 4, 4, 4\)"):
        load_official(write(tmp_path / "d.pth", state))


def test_pairs(tmp_path):
    def of(name: str, state: dict[str, Tensor]) -> OfficialNetwork:
        return load_official(write(tmp_path / name, state))

    made, grey = of("g", layout.unet(6, 2)), of("h", layout.unet(6, 2, came=1))
    paired, unpaired, four = (of(f"d{n}", layout.patch(1, 2, came=n)) for n in (6, 3, 4))
    check_pair(made, paired)
    check_pair(grey, four)
    with pytest.raises(UserError, match="exchange --generator and --discriminator"):
        check_pair(paired, made)
    with pytest.raises(UserError, match="name one file of each kind"):
        check_pair(made, made)
    with pytest.raises(UserError, match=r"unpaired images \(CycleGAN\); paired work needs .* 6 channels"):
        check_pair(made, unpaired)
    with pytest.raises(UserError, match="it must be 6: are the two files of one training"):
        check_pair(made, four)


def test_statistics_of_the_image_are_those_of_a_batch_of_one(tmp_path):
    """What the repository's own test.py does: no eval(), one image a time."""
    network = load_official(write(tmp_path / "g.pth", layout.unet(6, 2))).network
    images = torch.randn(3, 3, 64, 64, generator=random())
    own = with_image_statistics(network)
    with torch.no_grad():
        found = own(images)
        network.train()
        wanted = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(found, wanted)
    assert own.state_dict().keys() == network.state_dict().keys()
