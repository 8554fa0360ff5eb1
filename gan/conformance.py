"""Can this network be pruned? Groups, slices and costs of any network, tried out instead of trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gan.cost import build_cost_model
from gan.elastic import ElasticNetwork, order_channels
from gan.errors import UserError
from gan.factories import is_factory
from gan.gates import GatedNetwork
from gan.groups import (
    CONVOLUTIONS,
    Axis,
    ChannelGroup,
    Discovery,
    FrozenGroup,
    discover_groups,
    find_groups,
    norm_channels,
    tensors_of,
    without_inplace,
)
from gan.slicing import Slicer

TOLERANCE = 1e-8
"""Largest difference of two outputs that count as equal, as a share of the largest dense output. Networks run
in double precision: in single precision a deep one with random weights turns rounding into 1e-4."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried out.

    Attributes:
        name: what must hold.
        passed: whether it does; None where it means nothing for this network.
        detail: figures, or what goes wrong.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Conformance:
    """What pruning can do with a network.

    Attributes:
        groups: what can be cut, in forward order; every one really changes width.
        frozen: what cannot, and why, in forward order; those that broke the network when cut come last.
        tried: kept width of each group when it was cut alone.
        findings: everything else that was tried out.
        macs, params: of the dense network, for one image.
        least_macs, least_params: with every group at its narrowest.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenGroup, ...]
    tried: tuple[int, ...]
    findings: tuple[Finding, ...]
    macs: int
    params: int
    least_macs: int
    least_params: int

    @property
    def passed(self) -> bool:
        """Whether there is something to decide, and nothing that was tried out failed."""
        return bool(self.groups) and all(finding.passed is not False for finding in self.findings)


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


def groups_of(name: str, network: nn.Module, inputs: Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of an architecture of that name: those of a factory are tested."""
    return tried_groups(network, inputs).groups if is_factory(name) else find_groups(network, inputs)


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


def check_network(network: nn.Module, inputs: Sequence[Tensor], multiple: int = 1) -> Conformance:
    """Try out everything that pruning rests on.

    Groups cut alone and together, the slice that keeps everything against the dense network, slices against
    masks, and the closed form of MACs and parameters against those counted on slices.

    Args:
        network: any network of convolutions, with random or trained weights; never changed.
        inputs: example inputs, one tensor per argument of ``forward``, of one image.
        multiple: of the widths.

    Raises:
        UserError: if the network does not run on the inputs, or cannot be traced.
    """
    network = without_inplace(copy.deepcopy(network)).double().eval().requires_grad_(True)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    found = tried_groups(network, inputs, multiple)
    groups = found.groups
    tried = tuple(narrower(group.channels, multiple) for group in groups)
    least = tuple(min(multiple, group.channels) for group in groups)
    cost = build_cost_model(network, groups, inputs)
    dense = np.array([group.channels for group in groups], dtype=np.int64)
    ordered = order_channels(network, groups)
    findings: list[Finding] = []

    def find(name: str, check: Callable[[], tuple[bool | None, str]]) -> None:
        try:
            findings.append(Finding(name, *check()))
        except Exception as error:  # as above
            findings.append(Finding(name, False, brief(error)))

    if groups:
        wanted = shapes_of(run(network, inputs))

        def together() -> tuple[bool, str]:
            for widths in (tried, least):
                if fault := fault_of(network, groups, widths, inputs, wanted):
                    return False, fault
            return True, f"{sum(tried)} and {sum(least)} of {sum(dense)} channels"

        find("all groups are cut together", together)
        find("the slice that keeps everything is dense", lambda: _keeps_all(network, ordered, inputs))
        find("a slice is the network with masks", lambda: _masked(network, ordered, tried, inputs))
        find(
            "MACs in closed form are those counted", lambda: _counted_macs(ordered, cost.macs, tried, inputs)
        )
        find(
            "parameters in closed form are those counted",
            lambda: _counted_params(ordered, cost.params, tried),
        )
        if cost.macs(dense) > 0:
            find("convolutions make up the cost", lambda: _elsewhere(network, inputs))
    low = np.array(least, dtype=np.int64)
    figures = [round(float(of(w))) for w in (dense, low) for of in (cost.macs, cost.params)]
    return Conformance(groups, found.frozen, tried, tuple(findings), *figures)


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


def _difference(found: Any, wanted: Any) -> tuple[bool, str]:
    """Whether outputs are equal, and by how much they differ at most, as a share of the largest."""
    pairs = list(zip(tensors_of(found), tensors_of(wanted), strict=True))
    largest = max(float(b.abs().max()) for _, b in pairs) or 1.0
    share = max(float((a - b).abs().max()) for a, b in pairs) / largest
    return share <= TOLERANCE, f"largest difference {share:.1e} of the largest output"


def _keeps_all(network: nn.Module, ordered: ElasticNetwork, inputs: Sequence[Tensor]) -> tuple[bool, str]:
    whole = ordered.network(ordered.slicer.dense_widths)
    with torch.no_grad():
        return _difference(whole(*inputs), network(*inputs))


def _masked(
    network: nn.Module, ordered: ElasticNetwork, widths: Sequence[int], inputs: Sequence[Tensor]
) -> tuple[bool | None, str]:
    """A slice against the full network whose convolutions read zeros where channels were cut."""
    for group in ordered.slicer.groups:
        for slot in group.slots:
            module = network.get_submodule(slot.module)
            if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
                return None, f"{slot.module!r} is a GroupNorm over all channels: a cut one changes the others"
    masks = [torch.zeros(channels, dtype=torch.float64) for channels in ordered.slicer.dense_widths]
    for mask, width in zip(masks, widths, strict=True):
        mask[:width] = 1
    with torch.no_grad():
        wanted = GatedNetwork(ordered, own_statistics=True).run(inputs, masks)
        return _difference(ordered.network(widths)(*inputs), wanted)


def _flops(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """Multiply-accumulates of the convolutions and of everything else, counted while the network runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(n for kind, n in counts.items() if "convolution" in str(kind))
    return convolutions // 2, (sum(counts.values()) - convolutions) // 2


def _counted_macs(
    ordered: ElasticNetwork, closed: Callable[..., Any], tried: Sequence[int], inputs: Sequence[Tensor]
) -> tuple[bool, str]:
    return _equal(
        ordered, closed, tried, lambda smaller: _flops(smaller, inputs)[0], "a layer that runs twice?"
    )


def _counted_params(
    ordered: ElasticNetwork, closed: Callable[..., Any], tried: Sequence[int]
) -> tuple[bool, str]:
    return _equal(
        ordered,
        closed,
        tried,
        lambda smaller: sum(p.numel() for p in smaller.parameters()),
        "shared weights?",
    )


def _equal(
    ordered: ElasticNetwork,
    closed: Callable[..., Any],
    tried: Sequence[int],
    count: Callable[[nn.Module], int],
    guess: str,
) -> tuple[bool, str]:
    """Closed form against a count, on the dense network and on a slice."""
    said = []
    for widths in (ordered.slicer.dense_widths, tuple(tried)):
        found = count(ordered.network(widths))
        wanted = float(closed(np.array(widths, dtype=np.int64)))
        if found != round(wanted):
            return False, f"{found} counted, {wanted:.0f} in closed form ({guess})"
        said.append(f"{found}")
    return True, " dense, ".join(said) + " cut"


def _elsewhere(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[bool | None, str]:
    """How much of the work no budget knows of."""
    convolutions, others = _flops(network, inputs)
    share = others / max(1, convolutions + others)
    if share > 0.05:
        return None, f"{share:.0%} of the MACs are outside of convolutions: no budget counts them"
    return True, f"{1 - share:.1%} of the MACs are theirs"
