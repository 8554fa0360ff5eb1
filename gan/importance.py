"""Which channels of a group matter: the order in which a width keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gan.groups import CONVOLUTIONS, ChannelGroup, is_depthwise


def l1_importance(network: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[Tensor, ...]:
    """Mean absolute kernel weight that makes each channel, averaged over the convolutions that do.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017: the ranking that most tools use.

    Returns:
        Per group a (channels,) float64 tensor, > 0, larger = more important.
    """
    result = []
    for group in groups:
        rows = []
        for slot in group.slots:
            module = network.get_submodule(slot.module)
            if slot.axis == "out" and isinstance(module, CONVOLUTIONS) and not is_depthwise(module):
                weight = module.weight.detach().double()
                weight = weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight
                rows.append(weight[slot.start : slot.start + group.channels].abs().flatten(1).mean(1))
        result.append(torch.stack(rows).mean(0).clamp_min(1e-12))
    return tuple(result)


def order_of(importance: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Per group the channel indices, most important first; ties keep their place."""
    return tuple(torch.argsort(row, descending=True, stable=True) for row in importance)
