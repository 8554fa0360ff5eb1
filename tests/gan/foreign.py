"""Generators and a discriminator as other hands write them: what the channel groups must cope with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 8


class SeparableConv(nn.Module):
    """Depthwise, norm, pointwise: the convolution of MobileNets and of GAN Compression's students."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in)
        self.norm = nn.InstanceNorm2d(width_in, affine=True)
        self.pointwise = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.norm(self.depthwise(x)))


class SeparableBlock(nn.Module):
    """A residual block of separable convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = SeparableConv(width, width), nn.BatchNorm2d(width)
        self.second, self.norm2 = SeparableConv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.second(F.relu(self.norm1(self.first(x)))))


class SeparableResnet(nn.Module):
    """Stem, two halvings, two blocks, resize-convolutions on the way up; everything inside is separable."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.down1 = SeparableConv(width, 2 * width, 2)
        self.down2 = SeparableConv(2 * width, 2 * width, 2)
        self.blocks = nn.Sequential(SeparableBlock(2 * width), SeparableBlock(2 * width))
        self.up1 = SeparableConv(2 * width, width)
        self.up2 = SeparableConv(width, width)
        self.image = nn.Conv2d(width, 3, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → the same shape; H and W multiples of 4."""
        x = F.relu(self.down2(F.relu(self.down1(self.stem(x)))))
        x = F.interpolate(self.blocks(x), scale_factor=2.0, mode="nearest")
        x = F.interpolate(F.relu(self.up1(x)), scale_factor=2.0, mode="nearest")
        return torch.tanh(self.image(F.relu(self.up2(x))))


class ConvBlock(nn.Sequential):
    """Two convolutions with norms."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(width_in, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )


class AttentionGate(nn.Module):
    """Oktay et al. 2018: the skip is multiplied by one map that skip and decoder agree on."""

    def __init__(self, width_gate: int, width_skip: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(width_gate, width, 1), nn.BatchNorm2d(width))
        self.skip = nn.Sequential(nn.Conv2d(width_skip, width, 1), nn.BatchNorm2d(width))
        self.psi = nn.Sequential(nn.Conv2d(width, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        return skip * self.psi(F.relu(self.gate(gate) + self.skip(skip)))


class AttentionUnet(nn.Module):
    """Pooling on the way down, transposed convolutions on the way up, gated skips."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        one, two, four = width, 2 * width, 4 * width
        self.enc1, self.enc2, self.enc3 = ConvBlock(3, one), ConvBlock(one, two), ConvBlock(two, four)
        self.up2 = nn.ConvTranspose2d(four, two, 2, stride=2)
        self.att2, self.dec2 = AttentionGate(two, two, one), ConvBlock(2 * two, two)
        self.up1 = nn.ConvTranspose2d(two, one, 2, stride=2)
        self.att1, self.dec1 = AttentionGate(one, one, one // 2), ConvBlock(2 * one, one)
        self.image = nn.Conv2d(one, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → the same shape; H and W multiples of 4."""
        first = self.enc1(x)
        second = self.enc2(F.max_pool2d(first, 2))
        up = self.up2(self.enc3(F.max_pool2d(second, 2)))
        up = self.dec2(torch.cat((self.att2(up, second), up), dim=1))
        up = self.up1(up)
        up = self.dec1(torch.cat((self.att1(up, first), up), dim=1))
        return torch.tanh(self.image(up))


class StarBlock(nn.Module):
    """StarGAN's residual block: instance norms with parameters and running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class StarGenerator(nn.Module):
    """StarGAN-like: a label vector is repeated over the image and stacked on it."""

    def __init__(self, labels: int = 5, width: int = WIDTH, blocks: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + labels, width, 7, padding=3, bias=False)]
        layers += [nn.InstanceNorm2d(width, affine=True, track_running_stats=True), nn.ReLU(inplace=True)]
        for _ in range(2):
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False)]
            width *= 2
            layers += [nn.InstanceNorm2d(width, affine=True, track_running_stats=True), nn.ReLU(inplace=True)]
        layers += [StarBlock(width) for _ in range(blocks)]
        for _ in range(2):
            layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False)]
            width //= 2
            layers += [nn.InstanceNorm2d(width, affine=True, track_running_stats=True), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(width, 3, 7, padding=3, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, 3, H, W) and (N, labels) → (N, 3, H, W); H and W multiples of 4."""
        maps = labels[:, :, None, None].repeat(1, 1, x.shape[2], x.shape[3])
        return self.main(torch.cat([x, maps], dim=1))


class GroupNormGenerator(nn.Module):
    """GroupNorms of several kinds, a squeeze gate, a grouped convolution, two outputs that are blended."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(1, width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(width, width)
        self.third, self.norm3 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)
        self.squeeze, self.excite = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.fourth = nn.Conv2d(width, width, 3, padding=1)
        self.content, self.mask = nn.Conv2d(width, 3, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → the same shape."""
        y = F.relu(self.norm1(self.first(x)))
        y = F.relu(self.norm2(self.second(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.norm3(self.third(y)))
        y = F.relu(self.fourth(F.relu(self.grouped(y))))
        mask = torch.sigmoid(self.mask(y))
        return mask * torch.tanh(self.content(y)) + (1 - mask) * x


class StridedCritic(nn.Module):
    """A discriminator with spectral norm left out and a depthwise first layer behind its stem."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Conv2d(6, width, 4, 2, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.down, self.norm = nn.Conv2d(width, 2 * width, 4, 2, 1), nn.InstanceNorm2d(2 * width)
        self.patches = nn.Conv2d(2 * width, 1, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6, H, W) → (N, 1, h, w) logits."""
        x = F.leaky_relu(self.depthwise(F.leaky_relu(self.stem(x), 0.2)), 0.2)
        return self.patches(F.leaky_relu(self.norm(self.down(x)), 0.2))
