"""The networks of Pix2Pix and CycleGAN, built from explicit widths.

Keys of the state dicts and the arithmetic are those of pytorch-CycleGAN-and-pix2pix, so that its
checkpoints load; activations are not in place, because in-place ones hide layers from the tracer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.errors import UserError, unknown
from gan.factories import build_network, factory_widths, is_factory

NormKind = Literal["batch", "instance", "none"]
StatisticsKind = Literal["running", "image"]
UNET_LEVELS = {"unet_64": 6, "unet_128": 7, "unet_256": 8}
RESNET_BLOCKS = {"resnet_6blocks": 6, "resnet_9blocks": 9}
DISCRIMINATORS = ("basic", "n_layers", "pixel")
GENERATORS = (*UNET_LEVELS, *RESNET_BLOCKS)
"""The usual names; any power of two and any number of blocks can be asked for."""


def unet_levels(name: str) -> int | None:
    """Halvings of ``unet_SIZE``, which takes an image of SIZE pixels to one pixel; None for other names."""
    size = int(found[1]) if (found := re.fullmatch(r"unet_(\d+)", name)) else 0
    return size.bit_length() - 1 if size >= 4 and size.bit_count() == 1 else None


def resnet_blocks(name: str) -> int | None:
    """Residual blocks of ``resnet_Nblocks``; None for other names."""
    found = re.fullmatch(r"resnet_([1-9]\d*)blocks", name)
    return int(found[1]) if found else None


class ImageNorm2d(nn.InstanceNorm2d):
    """BatchNorm as it works at batch size 1: every image is normalised by statistics of its own.

    Pix2Pix trains at batch size 1 and is meant to run so (Isola et al. 2017, section 6.2). The tensors are
    those of ``BatchNorm2d`` under the same names, so the same checkpoint fits both; the running statistics go
    on in training, as they did there, but nothing reads them.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape; H × W > 1."""
        if not self.training or self.running_mean is None:
            return F.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var, momentum = self.running_mean, self.running_var, self.momentum or 0.0
        return F.instance_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)


def with_image_statistics(network: nn.Module) -> nn.Module:
    """A copy of a network whose BatchNorms use the statistics of the image at hand."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                own = ImageNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
                own.load_state_dict(norm.state_dict())
                own.requires_grad_(norm.weight.requires_grad)
                setattr(module, name, own.train(norm.training))
    return network


def make_norm(kind: NormKind, channels: int) -> nn.Module:
    """The norm layer of the given kind (Pix2Pix: batch, CycleGAN: instance without parameters)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    raise unknown("norm", kind, ("batch", "instance", "none"))


class UnetLevel(nn.Module):
    """One level of the U-Net: down, everything below it, up, and the skip around them.

    Args:
        width_in: channels that come in.
        width_down: channels of the way down.
        width_up: channels of the way up (what the level hands back beside its input).
        inner: the level below, or None at the bottleneck.
        inner_out: channels that ``inner`` hands back.
        outermost: the top level has no norm, no skip and ends in tanh.
    """

    def __init__(
        self,
        width_in: int,
        width_down: int,
        width_up: int,
        inner: UnetLevel | None,
        inner_out: int,
        norm: NormKind,
        outermost: bool = False,
        dropout: bool = False,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        bias = norm == "instance"
        down = nn.Conv2d(width_in, width_down, 4, stride=2, padding=1, bias=bias)
        up = nn.ConvTranspose2d(inner_out, width_up, 4, stride=2, padding=1, bias=bias or outermost)
        layers: list[nn.Module] = [] if outermost else [nn.LeakyReLU(0.2)]
        layers.append(down)
        if inner is not None:
            if not outermost:
                layers.append(make_norm(norm, width_down))
            layers.append(inner)
        layers += [nn.ReLU(), up, nn.Tanh() if outermost else make_norm(norm, width_up)]
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, H, W) → (N, width_in + width_up, H, W); the outermost level (N, width_up, H, W)."""
        # The reference applies its LeakyReLU in place, so its skip carries the activated x; the
        # ReLU behind the concatenation makes both the same: relu(leaky(x)) = relu(x).
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    """U-Net with ``levels`` halvings.

    Args:
        widths: 2 × levels − 1 channel counts: the way down from the top, then the way up from the
            bottleneck (its last level makes the image and has no width of its own).
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], norm: NormKind, dropout: bool
    ) -> None:
        super().__init__()
        levels = (len(widths) + 1) // 2
        down, up = widths[:levels], widths[levels:]
        level: UnetLevel | None = None
        inner_out = down[-1]
        for depth in range(levels - 1, 0, -1):
            drops = dropout and level is not None and depth >= 4
            width_up = up[levels - 1 - depth]
            level = UnetLevel(down[depth - 1], down[depth], width_up, level, inner_out, norm, dropout=drops)
            inner_out = down[depth - 1] + width_up
        self.model = UnetLevel(in_channels, down[0], out_channels, level, inner_out, norm, outermost=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) in [−1, 1] → (N, out_channels, H, W) in [−1, 1]."""
        return self.model(x)


class ResnetBlock(nn.Module):
    """Two convolutions with a skip; the trunk's width must not change inside."""

    def __init__(self, trunk: int, width: int, norm: NormKind, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(1),
            nn.Conv2d(trunk, width, 3, bias=bias),
            make_norm(norm, width),
            nn.ReLU(),
        ]
        if dropout:
            layers.append(nn.Dropout(0.5))
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(width, trunk, 3, bias=bias), make_norm(norm, trunk)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, trunk, H, W) → the same shape."""
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """Johnson's generator: stem, two halvings, residual blocks, two doublings.

    Args:
        widths: stem, first halving, trunk, one per block, first doubling, second doubling.
    """

    def __init__(
        self, in_channels: int, out_channels: int, widths: tuple[int, ...], norm: NormKind, dropout: bool
    ) -> None:
        super().__init__()
        stem, half, trunk, *blocks, up1, up2 = widths
        bias = norm == "instance"
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(in_channels, stem, 7, bias=bias),
            make_norm(norm, stem),
            nn.ReLU(),
        ]
        for width_in, width in ((stem, half), (half, trunk)):
            conv = nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=bias)
            layers += [conv, make_norm(norm, width), nn.ReLU()]
        layers += [ResnetBlock(trunk, width, norm, dropout) for width in blocks]
        for width_in, width in ((trunk, up1), (up1, up2)):
            conv_up = nn.ConvTranspose2d(width_in, width, 3, stride=2, padding=1, output_padding=1, bias=bias)
            layers += [conv_up, make_norm(norm, width), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(up2, out_channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) in [−1, 1] → (N, out_channels, H, W) in [−1, 1]."""
        return self.model(x)


class PatchDiscriminator(nn.Module):
    """PatchGAN: one real/fake logit per overlapping patch.

    Args:
        widths: one channel count per layer before the last: ``layers`` halvings, then one more.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...], norm: NormKind) -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for place, (width_in, width) in enumerate(pairwise(widths), start=2):
            stride = 1 if place == len(widths) else 2
            conv = nn.Conv2d(width_in, width, 4, stride=stride, padding=1, bias=bias)
            layers += [conv, make_norm(norm, width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, 1, h, w) logits, high = real."""
        return self.model(x)


class PixelDiscriminator(nn.Module):
    """1 × 1 PatchGAN: one logit per pixel. ``widths`` has two entries."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], norm: NormKind) -> None:
        super().__init__()
        bias = norm == "instance"
        first, second = widths
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, first, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(first, second, 1, bias=bias),
            make_norm(norm, second),
            nn.LeakyReLU(0.2),
            nn.Conv2d(second, 1, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → (N, 1, H, W) logits, high = real."""
        return self.net(x)


@dataclass(frozen=True)
class Architecture:
    """Everything that is needed to build a network again.

    Attributes:
        name: one of ``GENERATORS`` or ``DISCRIMINATORS``, or ``module:factory``: code of the user's.
        in_channels: channels of the input (a paired discriminator sees input and output stacked).
        out_channels: channels of the image (1 logit for discriminators).
        base_width: ngf or ndf of the reference; the dense widths follow from it.
        norm: ``batch``, ``instance`` or ``none``.
        dropout: dropout inside the generator.
        layers: halvings of the ``n_layers`` discriminator.
        widths: channel counts of a pruned network, in the forward order of its groups; None = dense.
        statistics: what BatchNorm normalises with: ``running`` statistics, or those of the ``image`` at hand.
        role: what a factory's network is; the names of the others say it.
        trace_size: height and width in pixels at which the groups of a factory's network are found.
    """

    name: str
    in_channels: int = 3
    out_channels: int = 3
    base_width: int = 64
    norm: NormKind = "batch"
    dropout: bool = False
    layers: int = 3
    widths: tuple[int, ...] | None = None
    statistics: StatisticsKind = "running"
    role: Literal["generator", "discriminator"] | None = None
    trace_size: int = 0

    @property
    def dense_widths(self) -> tuple[int, ...]:
        """Channel counts of the unpruned network."""
        base = self.base_width
        if is_factory(self.name):
            return factory_widths(self.name, self._traced)
        if levels := unet_levels(self.name):
            down = [base * min(2**depth, 8) for depth in range(levels)]
            return (*down, *reversed(down[:-1]))
        if blocks := resnet_blocks(self.name):
            return (base, base * 2, *[base * 4] * (1 + blocks), base * 2, base)
        if self.name in ("basic", "n_layers"):
            layers = 3 if self.name == "basic" else self.layers
            return tuple(base * min(2**depth, 8) for depth in range(layers + 1))
        if self.name == "pixel":
            return (base, base * 2)
        raise unknown("architecture", self.name, (*GENERATORS, *DISCRIMINATORS))

    @property
    def _traced(self) -> tuple[int, int, int]:
        return self.in_channels, self.trace_size, self.trace_size

    @property
    def is_generator(self) -> bool:
        return (
            self.role == "generator"
            or unet_levels(self.name) is not None
            or resnet_blocks(self.name) is not None
        )

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width of an image must be a multiple of."""
        if levels := unet_levels(self.name):
            return int(2**levels)
        return 4 if resnet_blocks(self.name) else 1

    def pruned(self, widths: tuple[int, ...]) -> Architecture:
        """The same architecture with other channel counts."""
        return replace(self, widths=tuple(int(w) for w in widths))

    def build(self) -> nn.Module:
        """A network with torch's default initialisation.

        Raises:
            UserError: unknown name or a wrong number of widths.
        """
        if self.statistics not in get_args(StatisticsKind):
            raise unknown("norm statistics", self.statistics, get_args(StatisticsKind))
        network: nn.Module
        if is_factory(self.name):
            network = build_network(self.name, self._traced, self.widths)
            return with_image_statistics(network) if self.statistics == "image" else network
        dense = self.dense_widths
        widths = dense if self.widths is None else self.widths
        if len(widths) != len(dense) or min(widths) < 1:
            raise UserError(f"{self.name} takes {len(dense)} positive widths; got {list(widths)}")
        if self.is_generator:
            kind = UnetGenerator if unet_levels(self.name) else ResnetGenerator
            network = kind(self.in_channels, self.out_channels, widths, self.norm, self.dropout)
        else:
            one = PixelDiscriminator if self.name == "pixel" else PatchDiscriminator
            network = one(self.in_channels, widths, self.norm)
        return with_image_statistics(network) if self.statistics == "image" else network

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; what only factories have is left out for others."""
        values = asdict(self)
        return values if self.role else {k: v for k, v in values.items() if k not in ("role", "trace_size")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Read :meth:`to_dict` back; unknown keys, a missing name and values of another kind raise."""
        wrong = sorted(set(data) - set(cls.__dataclass_fields__))
        if wrong:
            raise UserError(
                f"unknown architecture keys {wrong}; allowed are {sorted(cls.__dataclass_fields__)}"
            )
        if "name" not in data:
            raise UserError(f"an architecture needs the key 'name'; got keys {sorted(data)}")
        values = dict(data)
        if isinstance(values.get("widths"), list):
            values["widths"] = tuple(values["widths"])
        for key, kind in _KINDS.items():
            value = values.get(key)
            rows = value if key == "widths" and isinstance(value, tuple) else (value,)
            optional = key in ("widths", "role") and value is None
            if key in values and not optional and any(type(one) is not kind for one in rows):
                raise UserError(f"the architecture key {key!r} is {value!r}; it must be of {kind.__name__}")
        return cls(**values)


_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("in_channels", "out_channels", "base_width", "layers", "widths", "trace_size"), int),
    **dict.fromkeys(("name", "norm", "statistics", "role"), str),
    "dropout": bool,
}
"""Key of an architecture as JSON → kind of its value, or of each of its values."""


def initialise(network: nn.Module, generator: torch.Generator, std: float = 0.02) -> nn.Module:
    """Normal initialisation of the reference: N(0, 0.02) kernels, N(1, 0.02) norm scales, zero shifts."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.weight.normal_(0.0, std, generator=generator)
            elif isinstance(module, nn.BatchNorm2d | ImageNorm2d):
                module.weight.normal_(1.0, std, generator=generator)
            else:
                continue
            if module.bias is not None:
                module.bias.zero_()
    return network
