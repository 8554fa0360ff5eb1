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
from gan.gates import GatedNetwork
from gan.groups import CONVOLUTIONS, ChannelGroup, FrozenGroup, tensors_of, without_inplace
from gan.trial_cuts import brief, fault_of, narrower, run, shapes_of, tried_groups

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
            "MACs in closed form are those counted",
            lambda: _counted_macs(network, ordered, cost.macs, tried, inputs),
        )
        find(
            "parameters in closed form are those counted",
            lambda: _counted_params(network, ordered, cost.params, tried),
        )
        if cost.macs(dense) > 0:
            find("convolutions make up the cost", lambda: _elsewhere(network, inputs))
    low = np.array(least, dtype=np.int64)
    figures = [round(float(of(w))) for w in (dense, low) for of in (cost.macs, cost.params)]
    return Conformance(groups, found.frozen, tried, tuple(findings), *figures)


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
    network: nn.Module,
    ordered: ElasticNetwork,
    closed: Callable[..., Any],
    tried: Sequence[int],
    inputs: Sequence[Tensor],
) -> tuple[bool, str]:
    both = network, ordered.network(tried)
    return _equal(
        both, ordered, closed, tried, lambda one: _flops(one, inputs)[0], "a layer that runs twice?"
    )


def _counted_params(
    network: nn.Module, ordered: ElasticNetwork, closed: Callable[..., Any], tried: Sequence[int]
) -> tuple[bool, str]:
    both = network, ordered.network(tried)
    computed = any(isinstance(m, CONVOLUTIONS) and "weight" not in m._parameters for m in network.modules())
    guess = "spectral or weight norm: fold it into plain weights" if computed else "shared weights?"
    return _equal(both, ordered, closed, tried, lambda one: sum(p.numel() for p in one.parameters()), guess)


def _equal(
    both: tuple[nn.Module, nn.Module],
    ordered: ElasticNetwork,
    closed: Callable[..., Any],
    tried: Sequence[int],
    count: Callable[[nn.Module], int],
    guess: str,
) -> tuple[bool, str]:
    """Closed form against a count, on the dense network itself (slices share no weights) and on a slice."""
    said = []
    for one, widths in zip(both, (ordered.slicer.dense_widths, tuple(tried)), strict=True):
        found = count(one)
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
