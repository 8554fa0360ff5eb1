"""A critic that sees what a network trained on photographs sees, not pixels; it helps in training only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gan.features import load_differentiable_stages
from gan.loop import LoopOptions, colour_jitter, set_rate
from gan.losses import discriminator_loss, generator_loss

STAGES = (0, 3, 6)
"""Blocks whose maps are judged: 1/2, 1/4 and 1/8 of the size. Finer ones are pixels again, coarser ones say
what is drawn and not how."""
VIEW = 48
"""Side in pixels at which the maps are computed: what a CPU can afford."""
HIDDEN = 64
"""Channels inside a head."""
HEAD_RATE = 4.0
"""Learning rate of the heads as a share of the discriminators': they are small, and the maps never change."""


class Heads(nn.Module):
    """One small network per map: (N, C, h, w) → (N, 1, h, w) logits, 1-Lipschitz up to its activations.

    Args:
        channels: of every map.
        units: typical size of the values of every map; they are divided by it.
    """

    def __init__(self, channels: list[int], units: list[float]) -> None:
        super().__init__()
        bounded = nn.utils.parametrizations.spectral_norm
        self.units = units
        self.heads = nn.ModuleList(
            nn.Sequential(
                bounded(nn.Conv2d(width, HIDDEN, 1)),
                nn.LeakyReLU(0.2),
                bounded(nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1)),
                nn.LeakyReLU(0.2),
                bounded(nn.Conv2d(HIDDEN, 1, 1)),
            )
            for width in channels
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Logits of every map."""
        return [head(one / unit) for head, one, unit in zip(self.heads, maps, self.units, strict=True)]


class FeatureCritic:
    """Tells real from made images by early maps of EfficientNet-Lite1, with which no figure is measured.

    On a thousand drawings a discriminator of pixels learns little of a style before it has learnt the
    drawings; a frozen network brings its eyes along. Sauer et al., "Projected GANs Converge Faster", NeurIPS
    2021, with heads of spectral norm (Miyato et al., ICLR 2018) and without its random projections.

    Args:
        options: of the training.
        random: of the colour jitter.
        device: of the images.
    """

    def __init__(self, options: LoopOptions, random: torch.Generator, device: torch.device) -> None:
        self.options, self.random = options, random
        self.stages = load_differentiable_stages(VIEW, STAGES, str(device))
        noise = torch.rand(8, 3, VIEW, VIEW, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(options.seed)
            maps = self.stages(2 * noise - 1)
            heads = Heads([one.shape[1] for one in maps], [float(one.std()) for one in maps])
        self.network = heads.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=(0.0, 0.99))

    def learn(self, real: Tensor, fake: Tensor, rate: float) -> Tensor:
        """One update at a discriminator's learning rate; returns the loss (0-d).

        Args:
            real, fake: images (N, 3, H, W) in [−1, 1].
            rate: the discriminator's learning rate.
        """
        set_rate(self.optimizer, HEAD_RATE * rate)
        self.network.requires_grad_(True)
        with torch.no_grad():
            maps = self._see(real), self._see(fake)
        judged = zip(*(self.network(seen) for seen in maps), strict=True)
        loss = torch.stack([discriminator_loss(a, b, "hinge") for a, b in judged]).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def fooled(self, fake: Tensor) -> Tensor:
        """The generator's loss (0-d) for its outputs; gradients reach the outputs alone."""
        self.network.requires_grad_(False)
        return torch.stack([generator_loss(one, "hinge") for one in self.network(self._see(fake))]).mean()

    def _see(self, images: Tensor) -> list[Tensor]:
        """Maps of colour-jittered images."""
        if self.options.jitter > 0:
            images = colour_jitter(images, self.options.jitter, self.random)
        return self.stages(images)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
