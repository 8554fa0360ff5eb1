"""Channel groups of a network of which nothing is known: each is cut alone, and run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gan.errors import UserError
from gan.groups import (
    CONVOLUTIONS,
    Axis,
    ChannelGroup,
    Discovery,
    FrozenGroup,
    discover_groups,
    norm_channels,
    tensors_of,
    without_inplace,
)
from gan.slicing import Slicer


def narrower(channels: int, multiple: int = 1) -> int:
    """About half of the channels, in multiples; all of them where there is nothing between."""
    half = max(multiple, channels // 2 // multiple * multiple)
    return half if half < channels else channels


def tried_groups(network: nn.Module, inputs: Sequence[Tensor], multiple: int = 1) -> Discovery:
    """The channel groups of a network of which nothing is known, each cut alone and run.

    Takes a forward pass for each group. Those that do not change width as planned, or break the network
    (hard-coded shapes, operations that the tracer misreads), are frozen with what went wrong.

    Args:
        network: in any mode; never changed.
        inputs: example inputs, one tensor per argument of ``forward``.
        multiple: of the widths.

    Raises:
        UserError: if the network does not run on the inputs, or cannot be traced.
    """
    network = without_inplace(copy.deepcopy(network)).eval()
    wanted = shapes_of(run(network, inputs))
    try:
        found = discover_groups(network, inputs)
    except Exception as error:  # a tracer meets whatever there is
        raise UserError(
            f"the graph of {type(network).__name__} cannot be traced ({brief(error)}); see "
            "docs/own-network.md"
        ) from error
    frozen = list(found.frozen)
    groups: list[ChannelGroup] = []
    for group in found.groups:
        width = narrower(group.channels, multiple)
        if width == group.channels:
            reason = f"nothing to cut at widths of multiples of {multiple}"
        else:
            reason = fault_of(network, (group,), (width,), inputs, wanted)
        if reason:
            frozen.append(FrozenGroup(group.name, group.channels, reason))
        else:
            groups.append(group)
    return Discovery(tuple(groups), tuple(frozen))


def fault_of(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    widths: Sequence[int],
    inputs: Sequence[Tensor],
    wanted: Sequence[torch.Size],
) -> str:
    """What is wrong with a slice; empty where nothing is.

    Args:
        groups: those to cut; all others keep their width.
        widths: what they keep.
        wanted: shapes of the dense outputs.
    """
    try:
        smaller = Slicer(network, groups).network(network.state_dict(), widths)
        with torch.no_grad():
            made = shapes_of(smaller(*inputs))
    except Exception as error:  # the network is anybody's
        return f"cutting breaks the network: {brief(error)}"
    if made != list(wanted):
        return f"cutting changes the output from {[*map(tuple, wanted)]} to {[*map(tuple, made)]}"
    for name, lost in _lost_channels(groups, widths).items():
        before, after = (net.get_submodule(name) for net in (network, smaller))
        for axis, count in lost.items():
            wanted_width = width_of(before, axis) - count
            if width_of(after, axis) != wanted_width:
                return f"{name!r} has {width_of(after, axis)} channels ({axis}) instead of {wanted_width}"
    return ""


def _lost_channels(groups: Sequence[ChannelGroup], widths: Sequence[int]) -> dict[str, dict[Axis, int]]:
    """Channels that each module loses along each axis."""
    lost: dict[str, dict[Axis, int]] = {}
    for group, width in zip(groups, widths, strict=True):
        for slot in group.slots:
            axes = lost.setdefault(slot.module, {})
            axes[slot.axis] = axes.get(slot.axis, 0) + group.channels - width
    return lost


def width_of(module: nn.Module, axis: Axis) -> int:
    """Channels of a convolution or norm along an axis, read off its tensors where it has any."""
    weight = module._parameters.get("weight")
    if not isinstance(module, CONVOLUTIONS):
        return norm_channels(module) if weight is None else len(weight)
    assert weight is not None
    first = (axis == "out") != isinstance(module, nn.ConvTranspose2d)
    return int(weight.shape[0 if first or weight.shape[1] == 1 < module.groups else 1])


def run(network: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """The outputs of the dense network.

    Raises:
        UserError: with what the network says, if it does not run.
    """
    try:
        with torch.no_grad():
            return network(*inputs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, x.shape[1:])) for x in inputs)
        raise UserError(
            f"{type(network).__name__} does not run on inputs of {shapes} ({brief(error)}); name the shape "
            "of each argument of forward: --input 3x64x64, and more for further arguments"
        ) from error


def shapes_of(outputs: Any) -> list[torch.Size]:
    """Their shapes."""
    return [x.shape for x in tensors_of(outputs)]


def brief(error: Exception) -> str:
    """First line of what an exception says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
