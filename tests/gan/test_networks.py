from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.errors import UserError
from gan.groups import find_groups
from gan.networks import (
    DISCRIMINATORS,
    GENERATORS,
    Architecture,
    ImageNorm2d,
    UnetGenerator,
    initialise,
    make_norm,
    with_image_statistics,
)
from gan.slicing import Slicer
from tests.gan.conftest import random, randomise, tiny_generator

UNET_256 = Architecture("unet_256")
RESNET_9 = Architecture("resnet_9blocks", norm="instance")
PATCH_70 = Architecture("basic", 6, 1)


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # shapes without memory
        network = architecture.build()
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [
        (UNET_256, 54.414),
        (RESNET_9, 11.378),
        (PATCH_70, 2.769),
        (Architecture("basic", 3, 1, norm="instance"), 2.765),
    ],
    ids=["unet_256", "resnet_9blocks", "pix2pix discriminator", "cyclegan discriminator"],
)
def test_sizes_are_those_that_the_original_prints(architecture, millions):
    with torch.device("meta"):
        network = architecture.build()
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == millions


def test_keys_of_the_unet():
    found = shapes(UNET_256)
    bottleneck = "model.model.1" + ".model.3" * 6
    wanted = {
        "model.model.0.weight": (64, 3, 4, 4),
        "model.model.1.model.1.weight": (128, 64, 4, 4),
        "model.model.1.model.2.weight": (128,),
        "model.model.1.model.2.running_mean": (128,),
        "model.model.1.model.3.model.1.weight": (256, 128, 4, 4),
        "model.model.1.model.3.model.5.weight": (512, 128, 4, 4),
        "model.model.1.model.5.weight": (256, 64, 4, 4),
        "model.model.1.model.6.bias": (64,),
        "model.model.3.weight": (128, 3, 4, 4),
        "model.model.3.bias": (3,),
        f"{bottleneck}.model.1.weight": (512, 512, 4, 4),
        f"{bottleneck}.model.3.weight": (512, 512, 4, 4),
        f"{bottleneck}.model.4.running_var": (512,),
    }
    assert wanted.items() <= found.items()
    assert len(found) == 16 + 1 + 13 * 5  # kernels, one bias, norms


def test_dropout_sits_where_the_original_has_it():
    network = Architecture("unet_256", base_width=1, dropout=True).build()
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)]
    assert set(found) == {"model.model.1" + ".model.3" * depth + ".model.7" for depth in (3, 4, 5)}
    assert shapes(Architecture("unet_256", dropout=True)) == shapes(UNET_256)


@pytest.mark.parametrize("dropout", [False, True])
def test_keys_of_the_resnet(dropout):
    second = 6 if dropout else 5  # the dropout layer takes a number
    wanted: dict[str, tuple[int, ...]] = {}

    def conv(name: str, *shape: int, out: int) -> None:
        wanted.update({f"{name}.weight": shape, f"{name}.bias": (out,)})

    conv("model.1", 64, 3, 7, 7, out=64)
    conv("model.4", 128, 64, 3, 3, out=128)
    conv("model.7", 256, 128, 3, 3, out=256)
    for block in range(10, 19):
        conv(f"model.{block}.conv_block.1", 256, 256, 3, 3, out=256)
        conv(f"model.{block}.conv_block.{second}", 256, 256, 3, 3, out=256)
    conv("model.19", 256, 128, 3, 3, out=128)
    conv("model.22", 128, 64, 3, 3, out=64)
    conv("model.26", 3, 64, 7, 7, out=3)
    assert shapes(Architecture("resnet_9blocks", norm="instance", dropout=dropout)) == wanted


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_keys_of_the_discriminators(norm):
    places = {"basic": ("model", (0, 2, 5, 8, 11), (3, 6, 9)), "pixel": ("net", (0, 2, 5), (3,))}
    always_biased = {"basic": (0, 11), "pixel": (0,)}
    for name, (root, convolutions, norms) in places.items():
        wanted = {f"{root}.{place}.weight" for place in convolutions}
        if norm == "batch":
            wanted |= {f"{root}.{place}.bias" for place in always_biased[name]}
            tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            wanted |= {f"{root}.{place}.{tensor}" for place in norms for tensor in tensors}
        else:
            wanted |= {f"{root}.{place}.bias" for place in convolutions}
        assert set(shapes(Architecture(name, 6, 1, norm=norm))) == wanted


def test_the_unet_computes_what_the_original_does():
    """Whose LeakyReLU works in place, so that its skips carry the activated maps."""
    network = tiny_generator()
    state = network.state_dict()
    x = torch.randn(2, 3, 8, 8, generator=random())

    def down(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], stride=2, padding=1)

    def up(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        return F.conv_transpose2d(F.relu(x), weight, bias, stride=2, padding=1)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    middle, inner = "model.model.1.model", "model.model.1.model.3.model"
    first = F.leaky_relu(down(x, "model.model.0"), 0.2)
    second = F.leaky_relu(norm(down(first, f"{middle}.1"), f"{middle}.2"), 0.2)
    third = down(second, f"{inner}.1")
    back = torch.cat([second, norm(up(third, f"{inner}.3"), f"{inner}.4")], 1)
    back = torch.cat([first, norm(up(back, f"{middle}.5"), f"{middle}.6")], 1)
    torch.testing.assert_close(network(x), torch.tanh(up(back, "model.model.3")))


@pytest.mark.parametrize(
    ("architecture", "size", "wanted"),
    [
        (Architecture("unet_64", base_width=4), 64, (3, 64, 64)),
        (Architecture("unet_128", 1, 2, base_width=2, norm="instance"), 128, (2, 128, 128)),
        (Architecture("resnet_6blocks", base_width=4), 16, (3, 16, 16)),
        (Architecture("resnet_9blocks", 1, 3, base_width=2, norm="none"), 16, (3, 16, 16)),
        (Architecture("basic", 6, 1, base_width=4), 64, (1, 6, 6)),
        (Architecture("n_layers", 6, 1, base_width=4, layers=1), 64, (1, 30, 30)),
        (Architecture("pixel", 6, 1, base_width=4, norm="instance"), 16, (1, 16, 16)),
    ],
    ids=lambda value: value.name if isinstance(value, Architecture) else None,
)
def test_output_shapes(architecture, size, wanted):
    network = architecture.build().eval()
    made = network(torch.randn(2, architecture.in_channels, size, size, generator=random()))
    assert made.shape == (2, *wanted)
    if architecture.is_generator:
        assert float(made.detach().abs().max()) <= 1


def test_a_logit_of_the_basic_discriminator_sees_70_by_70_pixels():
    network = randomise(Architecture("basic", 3, 1, base_width=2).build())
    image = torch.randn(1, 3, 128, 128, generator=random()).requires_grad_()
    network(image)[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert len(rows) == int(rows[-1] - rows[0]) + 1 == 70


@pytest.mark.parametrize("name", [*GENERATORS, *DISCRIMINATORS])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_any_widths_can_be_asked_for(name, norm):
    """Every count differs, so one in the wrong place would not fit."""
    dense = Architecture(name, 3 if name in GENERATORS else 6, base_width=2, norm=norm)
    widths = tuple(range(2, 2 + len(dense.dense_widths)))
    pruned = dense.pruned(widths)
    assert pruned.widths == widths
    assert dense.widths is None
    size = 2 ** int(name.removeprefix("unet_")).bit_length() // 2 if name.startswith("unet_") else 32
    with torch.device("meta"):
        network = pruned.build().eval()
        made = network(torch.zeros(1, dense.in_channels, size, size))
    assert made.shape[1] == (3 if name in GENERATORS else 1)
    counts = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert set(widths) <= set(counts)


def test_the_reference_widths_are_the_dense_ones():
    explicit = UNET_256.pruned((64, 128, 256, 512, 512, 512, 512, 512, 512, 512, 512, 512, 256, 128, 64))
    assert shapes(explicit) == shapes(UNET_256)
    assert RESNET_9.dense_widths == (64, 128, *[256] * 10, 128, 64)
    assert PATCH_70.dense_widths == (64, 128, 256, 512)
    assert Architecture("n_layers", layers=5).dense_widths == (64, 128, 256, 512, 512, 512)
    assert Architecture("pixel").dense_widths == (64, 128)


@pytest.mark.parametrize("name", [*GENERATORS, *DISCRIMINATORS])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_widths_is_refused(name, change):
    architecture = Architecture(name)
    n = len(architecture.dense_widths)
    with pytest.raises(UserError, match=rf"{name} takes {n} positive widths; got \[8\b"):
        architecture.pruned((8,) * (n + change)).build()


def test_a_width_of_zero_is_refused():
    with pytest.raises(UserError, match=r"pixel takes 2 positive widths; got \[8, 0\]"):
        Architecture("pixel").pruned((8, 0)).build()


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"unknown architecture 'unet_265'; .* did you mean 'unet_256'"):
        Architecture("unet_265").build()
    with pytest.raises(UserError, match=r"unknown norm 'layer'; known are batch, instance, none"):
        Architecture("pixel", norm="layer").build()  # type: ignore[arg-type]
    assert isinstance(make_norm("none", 4), nn.Identity)


@pytest.mark.parametrize("architecture", [UNET_256, Architecture("pixel", 6, 1, 16, "none").pruned((3, 5))])
def test_an_architecture_survives_json(architecture):
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_an_unknown_or_missing_key_is_refused():
    with pytest.raises(UserError, match=r"unknown architecture keys \['ngf'\]; allowed are .*'base_width'"):
        Architecture.from_dict({"name": "unet_64", "ngf": 64})
    with pytest.raises(UserError, match="needs the key 'name'"):
        Architecture.from_dict({"base_width": 64})


def test_initialisation_is_that_of_the_reference():
    network = initialise(Architecture("unet_64", base_width=16, norm="batch").build(), random(3))
    kernels = torch.cat([p.detach().flatten() for p in network.parameters() if p.dim() == 4])
    scales = torch.cat([m.weight.detach() for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert float(kernels.mean()) == pytest.approx(0, abs=2e-4)
    assert float(kernels.std()) == pytest.approx(0.02, rel=0.01)
    assert float(scales.mean()) == pytest.approx(1, abs=5e-3)
    assert float(scales.std()) == pytest.approx(0.02, rel=0.15)
    biases = [value for name, value in network.named_parameters() if name.endswith("bias")]
    assert len(biases) == 10
    assert not any(bool(bias.any()) for bias in biases)


def test_initialisation_depends_on_its_generator_alone():
    def weights(seed: int) -> Tensor:
        network = UnetGenerator(3, 3, (4, 4, 4), "batch", False)
        return torch.cat([p.flatten() for p in initialise(network, random(seed)).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(("name", "count"), [("unet_16", 7), ("unet_512", 17), ("resnet_4blocks", 9)])
def test_other_depths_can_be_asked_for(name, count):
    architecture = Architecture(name, base_width=2)
    assert architecture.is_generator
    assert len(architecture.dense_widths) == count
    assert architecture.size_multiple == (int(name.removeprefix("unet_")) if "unet" in name else 4)


@pytest.mark.parametrize("name", ["unet_60", "unet_2", "unet_", "resnet_0blocks", "resnet_blocks", "basic"])
def test_names_of_no_generator(name):
    assert not Architecture(name).is_generator


def test_statistics_of_the_image_are_those_of_batch_norm_at_batch_size_1():
    network = randomise(Architecture("unet_16", base_width=4).build())
    own = with_image_statistics(network)
    images = torch.randn(4, 3, 16, 16, generator=random())
    with torch.no_grad():
        before = network(images)
        found = own(images)
        network.train()
        wanted = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, before)
    assert {name: value.shape for name, value in own.state_dict().items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }
    built = Architecture("unet_16", base_width=4, statistics="image").build().eval()
    built.load_state_dict(own.state_dict())
    assert torch.equal(built(images), found)


def test_running_statistics_go_on_in_training_as_they_did():
    """At batch size 1, where those checkpoints were trained."""
    theirs, own = nn.BatchNorm2d(3).train(), ImageNorm2d(3).train()
    for seed in range(3):
        image = torch.randn(1, 3, 4, 4, generator=random(seed))
        torch.testing.assert_close(own(image), theirs(image))
    torch.testing.assert_close(own.running_mean, theirs.running_mean)
    torch.testing.assert_close(own.running_var, theirs.running_var)


def test_a_slice_with_statistics_of_the_image_is_the_masked_network():
    network = randomise(Architecture("unet_16", base_width=4, statistics="image").build())
    images = torch.randn(2, 3, 16, 16, generator=random())
    groups = find_groups(network, [images[:1]])
    assert [group.channels for group in groups] == [4, 8, 16, 32, 16, 8, 4]
    widths = (2, 5, 9, 11, 7, 3, 4)
    small = Slicer(network, groups).network(network.state_dict(), widths)
    kept = {group.name: width for group, width in zip(groups, widths, strict=True)}

    def mask(name: str, channels: int) -> None:
        def cut(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
            return torch.cat([out[:, :channels], torch.zeros_like(out[:, channels:])], 1)

        network.get_submodule(name).register_forward_hook(cut)

    for group in groups:
        norms = [
            slot.module for slot in group.slots if isinstance(network.get_submodule(slot.module), ImageNorm2d)
        ]
        mask(norms[0] if norms else group.name, kept[group.name])
    with torch.no_grad():
        torch.testing.assert_close(small(images), network(images), rtol=1e-4, atol=1e-5)


def test_unknown_statistics_are_refused():
    with pytest.raises(UserError, match=r"unknown norm statistics 'batch'; known are image, running"):
        Architecture("pixel", statistics="batch").build()  # type: ignore[arg-type]
