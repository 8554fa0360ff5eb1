"""Channel groups: which output channels must be cut together, found on the dependency graph.

The only file that imports torch_pruning. Its graph is used once and turned into frozen values of
our own, because its groups come in no fixed order, its pruners mutate the network, and in-place
activations make it skip layers silently.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

Axis = Literal["out", "in"]
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Slot:
    """One place where the channels of a group sit.

    Attributes:
        module: dotted name of the convolution or norm.
        axis: ``out`` (the module makes these channels) or ``in`` (it reads them).
        start: position of the group's first channel along that axis (> 0 behind a concatenation).
    """

    module: str
    axis: Axis
    start: int


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are kept or cut together: one decision of a search.

    Attributes:
        name: dotted name of the first convolution (in forward order) that makes the channels.
        channels: width of the dense network, > 0.
        slots: every place where the channels sit, in forward order.
        kind: type of the first producer.
        kernel: its kernel size in pixels.
        stride: its stride in pixels.
        resolution: height of its output map, in pixels, for the traced input.
    """

    name: str
    channels: int
    slots: tuple[Slot, ...]
    kind: Literal["conv", "transposed"]
    kernel: int
    stride: int
    resolution: int


def without_inplace(network: nn.Module) -> nn.Module:
    """Switch off in-place activations: they hide layers from the tracer (and change skips)."""
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return network


def trace_resolutions(network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, tuple[int, int, int]]:
    """Run once and note, per convolution in forward order, (input pixels, output pixels, output height)."""
    seen: dict[str, tuple[int, int, int]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, CONVOLUTIONS):

            def note(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                seen[name] = (
                    args[0].shape[-2] * args[0].shape[-1],
                    out.shape[-2] * out.shape[-1],
                    out.shape[-2],
                )

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def find_groups(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in forward order.

    Args:
        network: any traceable convolutional network; it is copied, never changed.
        inputs: example inputs, one tensor per argument of ``forward``, each (N, C, H, W).

    Groups that reach the network's output are no decision and are left out.

    Raises:
        ValueError: if a group spreads over a layer that cannot be sliced (linear layers, grouped
            convolutions, scattered channels); the sentence names the layer.
    """
    network = without_inplace(copy.deepcopy(network)).eval()
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module.track_running_stats = False  # torch_pruning raises on InstanceNorm's running statistics
            module.running_mean = module.running_var = None
    inputs = [x.to(next(network.parameters()).device) for x in inputs]
    resolutions = trace_resolutions(network, inputs)
    order = {name: place for place, name in enumerate(resolutions)}
    names = {module: name for name, module in network.named_modules()}
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # the graph is read off autograd
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(network, example_inputs=tuple(inputs))

    groups: list[ChannelGroup] = []
    claimed: set[str] = set()
    for name in order:
        module = network.get_submodule(name)
        if name in claimed or not isinstance(module, CONVOLUTIONS):
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        channels = module.out_channels
        slots: list[Slot] = []
        reaches_output = False
        for item in graph.get_pruning_group(module, prune, idxs=list(range(channels))):
            target = item.dep.target.module
            if target not in names or isinstance(target, (nn.Identity, nn.Dropout)):
                continue  # concatenations, activations: nothing to cut
            label = names[target]
            axis: Axis = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            places = [int(i) for i in item.idxs]
            start = places[0]
            if not isinstance(target, CONVOLUTIONS + NORMS):
                raise ValueError(
                    f"channels of {name!r} reach {label!r} ({type(target).__name__}); only convolutions, "
                    "BatchNorm2d and InstanceNorm2d can be sliced"
                )
            if places != list(range(start, start + channels)):
                raise ValueError(
                    f"channels of {name!r} are scattered in {label!r}; they must be contiguous there"
                )
            if isinstance(target, CONVOLUTIONS) and target.groups != 1:
                raise ValueError(
                    f"channels of {name!r} reach {label!r}, a grouped convolution, which cannot be sliced"
                )
            if isinstance(target, CONVOLUTIONS) and axis == "out":
                claimed.add(label)
                reaches_output |= label == next(reversed(order))
            slot = Slot(label, axis, start)
            if slot not in slots:
                slots.append(slot)
        reads = [slot for slot in slots if slot.axis == "in"]
        if reaches_output or not reads:
            continue
        groups.append(
            ChannelGroup(
                name=name,
                channels=channels,
                slots=tuple(slots),
                kind="transposed" if isinstance(module, nn.ConvTranspose2d) else "conv",
                kernel=int(module.kernel_size[0]),
                stride=int(module.stride[0]),
                resolution=resolutions[name][2],
            )
        )
    return tuple(groups)
