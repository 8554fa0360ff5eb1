from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.errors import UserError
from gan.networks import Architecture, with_image_statistics
from gan.onnx_writer import size_step, write_onnx
from gan.runtime import OnnxNetwork
from tests.gan.conftest import random, randomise, tiny_discriminator, tiny_generator


def images(count: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=random(5)).clamp(-1, 1)


def difference(network: nn.Module, shown: Tensor, half: bool = False) -> float:
    written = OnnxNetwork(write_onnx(network, shown[:1], half))
    with torch.no_grad():
        return float((written(shown) - network(shown)).abs().max())


NETWORKS = {
    "unet batch": lambda: tiny_generator(),
    "unet image statistics": lambda: with_image_statistics(tiny_generator()).eval(),
    "resnet instance": lambda: Architecture("resnet_6blocks", base_width=4, norm="instance").build(),
    "resnet batch, dropout": lambda: Architecture("resnet_6blocks", base_width=4, dropout=True).build(),
    "resnet none": lambda: Architecture("resnet_6blocks", base_width=4, norm="none").build(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_generator_is_written_as_it_computes(name: str) -> None:
    network = randomise(NETWORKS[name]())
    if "resnet" in name:  # without norms in between, twelve random kernels leave the range of tanh
        network.load_state_dict(
            {key: t * (0.3 if t.dim() == 4 else 1) for key, t in network.state_dict().items()}
        )
    assert difference(network, images(3)) < 1e-4
    step = size_step(network, images())
    assert step == (8 if "unet" in name else 4)
    larger = images(1, 8 + step)
    written = OnnxNetwork(write_onnx(network, images(1)))  # written at 8 pixels, run at more
    torch.testing.assert_close(written(larger), network(larger), atol=1e-4, rtol=0)


def test_discriminators_are_written_too() -> None:
    assert difference(tiny_discriminator(), images(2, channels=6)) < 1e-4
    pixel = randomise(Architecture("pixel", in_channels=6, base_width=4, norm="instance").build())
    assert difference(pixel, images(2, channels=6)) < 1e-4


def test_the_network_is_not_changed() -> None:
    network = tiny_generator().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    write_onnx(network, images(1))
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_half_precision_is_half_the_file_and_close() -> None:
    network = randomise(Architecture("resnet_6blocks", base_width=8, norm="instance").build())
    whole, half = (write_onnx(network, images(1), half) for half in (False, True))
    assert len(half) < 0.6 * len(whole)
    assert 1e-6 < difference(network, images(), half=True) < 0.05


class Gated(nn.Module):
    """What other hands put into generators: gates, products, shuffles, resizing, pooling, grouped kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, padding_mode="reflect")
        self.raised = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2)
        self.behind, self.norm, self.own = (
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            nn.InstanceNorm2d(8, affine=True),
        )
        self.up, self.shuffle = nn.Upsample(scale_factor=2), nn.PixelShuffle(2)
        self.mean, self.pool = nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)), inplace=True)
        small = self.pool(y)
        small = self.norm(small) * torch.sigmoid(self.gate(small)) + 0.5 * self.mean(small)
        y = y - self.own(self.up(self.grouped(small)))
        y = y + F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
        y = torch.cat((y, F.leaky_relu(self.behind(self.raised(small)), 0.1)), dim=1)
        return torch.tanh(self.shuffle(y))


def test_networks_of_other_hands() -> None:
    assert difference(randomise(Gated()), images()) < 1e-4


class Grouped(nn.Module):
    """Group norms of every number of groups, slopes, and a scale of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, 8) for groups in (1, 2, 8))
        self.slopes = nn.ModuleList((nn.PReLU(), nn.PReLU(8), nn.PReLU()))
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 8).reshape(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, slope in zip(self.layers, self.norms, self.slopes, strict=True):
            x = slope(norm(layer(x))) * self.scale
        return x


@pytest.mark.parametrize(("half", "allowed"), [(False, 1e-4), (True, 0.05)])
def test_group_norms_slopes_and_scales(half: bool, allowed: float) -> None:
    network = Grouped()
    with torch.no_grad():
        for norm in network.norms:
            norm.weight.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
            norm.bias.normal_()  # type: ignore[operator, union-attr]
    assert difference(network, images(), half=half) < allowed


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.MaxPool2d(3, 2, ceil_mode=True), "MaxPool2d with ceil_mode=True is not known"),
        (nn.MaxPool2d(2, 1, dilation=2), "MaxPool2d with dilation=2 is not known"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "AvgPool2d with count_include_pad=False"),
    ],
)
def test_settings_that_cannot_be_written_are_named(layer: nn.Module, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        write_onnx(layer, images(1))


def test_arguments_that_cannot_be_written_are_named() -> None:
    class Weighted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, x, alpha=2)

    with pytest.raises(UserError, match=r"add cannot be written as it is called \(.*'alpha'"):
        write_onnx(Weighted(), images(1))


def test_a_single_layer_is_a_network_too() -> None:
    assert difference(randomise(nn.Conv2d(3, 4, 3)), images()) < 1e-4


def test_what_cannot_be_written_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    with pytest.raises(UserError, match=r"fft_fft2 is no operation that can be written"):
        write_onnx(Odd(), images(1))

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.mean() > 0 else -x

    with pytest.raises(UserError, match=r"Branching cannot be traced for ONNX"):
        write_onnx(Branching(), images(1))

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UserError, match=r"one output"):
        write_onnx(nn.Sequential(Two()), images(1))
