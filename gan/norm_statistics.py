"""BatchNorm statistics of a network, recomputed on a fixed set of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def cumulative_statistics(network: nn.Module) -> Iterator[None]:
    """Within it, forward passes set BatchNorm's running statistics to the average over the passes.

    Everything but the BatchNorms stays in evaluation mode (dropout off); gradients are off. The
    network is left in evaluation mode, its momentum as it was.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative average
        norm.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()


def recompute_statistics(network: nn.Module, images: Tensor, batch_size: int | None = None) -> nn.Module:
    """Set the BatchNorm statistics to those of ``images`` (N, C, H, W), and freeze them.

    Statistics are averaged over the batches, as running statistics are, so what goes into one batch matters:
    by default the first half of the images and the second (a discriminator's real and made ones).
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network.eval()  # other norms keep no statistics that anything reads
    batch_size = max(1, len(images) // 2) if batch_size is None else batch_size
    with cumulative_statistics(network):
        for chunk in images.split(batch_size):
            network(chunk)
    return network
