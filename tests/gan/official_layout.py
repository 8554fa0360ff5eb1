"""State dicts in the layout of pytorch-CycleGAN-and-pix2pix, written key by key."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tests.gan.conftest import random


@dataclass
class Layout:
    """Collects the tensors of a checkpoint.

    Attributes:
        norm: ``batch``, ``instance``, ``none``, or ``old_instance`` (with running statistics, as torch 0.3).
    """

    norm: str = "batch"
    state: dict[str, Tensor] = field(default_factory=dict)
    draws: torch.Generator = field(default_factory=lambda: random(11))

    def conv(
        self, key: str, shape: tuple[int, ...], bias: bool | None = None, transposed: bool = False
    ) -> None:
        """A kernel, and a bias where the repository has one (always with InstanceNorm)."""
        self.state[f"{key}.weight"] = torch.randn(shape, generator=self.draws) / shape[1] ** 0.5 / 4
        if "instance" in self.norm if bias is None else bias:
            self.state[f"{key}.bias"] = torch.randn(shape[1 if transposed else 0], generator=self.draws) / 4

    def up(self, key: str, came: int, made: int, kernel: int, bias: bool | None = None) -> None:
        self.conv(key, (came, made, kernel, kernel), bias, transposed=True)

    def normed(self, key: str, channels: int) -> None:
        """What the norm layer keeps."""
        if self.norm == "batch":
            self.state[f"{key}.weight"] = 0.5 + torch.rand(channels, generator=self.draws)
            self.state[f"{key}.bias"] = torch.randn(channels, generator=self.draws) / 4
        if self.norm in ("batch", "old_instance"):
            self.state[f"{key}.running_mean"] = torch.randn(channels, generator=self.draws) / 4
            self.state[f"{key}.running_var"] = 0.5 + torch.rand(channels, generator=self.draws)
        if self.norm == "batch":
            self.state[f"{key}.num_batches_tracked"] = torch.tensor(7)


def unet(downs: int, ngf: int, norm: str = "batch", came: int = 3, made: int = 3) -> dict[str, Tensor]:
    """``unet_128`` has 7 halvings, ``unet_256`` 8."""
    layout, widths = Layout(norm), [ngf * min(2**depth, 8) for depth in range(downs)]
    layout.conv("model.model.0", (widths[0], came, 4, 4))
    level = "model.model.1"
    for outer, inner in pairwise(widths[:-1]):
        layout.conv(f"{level}.model.1", (inner, outer, 4, 4))
        layout.normed(f"{level}.model.2", inner)
        layout.up(f"{level}.model.5", 2 * inner, outer, 4)
        layout.normed(f"{level}.model.6", outer)
        level += ".model.3"
    layout.conv(f"{level}.model.1", (widths[-1], widths[-2], 4, 4))
    layout.up(f"{level}.model.3", widths[-1], widths[-2], 4)
    layout.normed(f"{level}.model.4", widths[-2])
    layout.up("model.model.3", 2 * ngf, made, 4, bias=True)
    return layout.state


def resnet(
    blocks: int, ngf: int, norm: str = "instance", dropout: bool = False, came: int = 3, made: int = 3
) -> dict[str, Tensor]:
    """``resnet_6blocks`` and ``resnet_9blocks``."""
    layout = Layout(norm)
    for place, (width_in, width, kernel) in enumerate(
        ((came, ngf, 7), (ngf, 2 * ngf, 3), (2 * ngf, 4 * ngf, 3))
    ):
        layout.conv(f"model.{1 + 3 * place}", (width, width_in, kernel, kernel))
        layout.normed(f"model.{2 + 3 * place}", width)
    for block in range(10, 10 + blocks):
        second = 6 if dropout else 5
        for place in (1, second):
            layout.conv(f"model.{block}.conv_block.{place}", (4 * ngf, 4 * ngf, 3, 3))
            layout.normed(f"model.{block}.conv_block.{place + 1}", 4 * ngf)
    for place, width in ((10 + blocks, 2 * ngf), (13 + blocks, ngf)):
        layout.up(f"model.{place}", 2 * width, width, 3)
        layout.normed(f"model.{place + 1}", width)
    layout.conv(f"model.{17 + blocks}", (made, ngf, 7, 7), bias=True)
    return layout.state


def patch(layers: int, ndf: int, norm: str = "batch", came: int = 6) -> dict[str, Tensor]:
    """``basic`` (3 layers) and ``n_layers``."""
    layout, widths = Layout(norm), [ndf * min(2**depth, 8) for depth in range(layers + 1)]
    layout.conv("model.0", (ndf, came, 4, 4), bias=True)
    for place, (width_in, width) in enumerate(pairwise(widths)):
        layout.conv(f"model.{2 + 3 * place}", (width, width_in, 4, 4))
        layout.normed(f"model.{3 + 3 * place}", width)
    layout.conv(f"model.{2 + 3 * layers}", (1, widths[-1], 4, 4), bias=True)
    return layout.state


def pixel(ndf: int, norm: str = "batch", came: int = 6) -> dict[str, Tensor]:
    """``pixel``: 1 × 1 convolutions."""
    layout = Layout(norm)
    layout.conv("net.0", (ndf, came, 1, 1), bias=True)
    layout.conv("net.2", (2 * ndf, ndf, 1, 1))
    layout.normed("net.3", 2 * ndf)
    layout.conv("net.5", (1, 2 * ndf, 1, 1))
    return layout.state
