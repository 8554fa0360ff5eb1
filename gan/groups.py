"""Channel groups: which output channels must be cut together, found on the dependency graph.

The only file that imports torch_pruning. Its graph is used once and turned into frozen values of
our own, because its groups come in no fixed order, its pruners mutate the network, and in-place
activations make it skip layers silently.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning.ops import _OutputOp

Axis = Literal["out", "in"]
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
"""A GroupNorm only where it has one group or one per channel: see :func:`_obstacle`."""


@dataclass(frozen=True)
class Slot:
    """One place where the channels of a group sit.

    Attributes:
        module: dotted name of the convolution or norm.
        axis: ``out`` (the module makes these channels) or ``in`` (it reads them). A depthwise convolution
            carries its channels through and counts as ``out``, like a norm.
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


@dataclass(frozen=True)
class FrozenGroup:
    """Channels that stay as they are.

    Attributes:
        name: dotted name of the first convolution (in forward order) that makes the channels.
        channels: their number.
        reason: why they cannot be cut; goes on after "frozen: ".
    """

    name: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Discovery:
    """What there is to decide on a network, and what is not.

    Attributes:
        groups: what can be cut, in forward order.
        frozen: what cannot, in forward order; the network's own output is among it.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenGroup, ...]


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution with one kernel per channel and nothing between channels."""
    return (
        isinstance(module, CONVOLUTIONS)
        and 1 < module.groups == module.in_channels
        and module.out_channels == module.groups
    )


def norm_channels(norm: nn.Module) -> int:
    """Channels of a norm: GroupNorm has another word for them."""
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)  # type: ignore[arg-type]


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


_BLENDS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, ("add", "sub", "mul", "div", "maximum", "minimum")),
        (Tensor, ("add", "sub", "mul", "div", "__add__", "__radd__", "__sub__", "__rsub__")),
        (Tensor, ("__mul__", "__rmul__", "__truediv__", "__rtruediv__", "expand_as")),
    )
    for name in names
)


_PRODUCTS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, ("matmul", "bmm", "baddbmm", "einsum")),
        (Tensor, ("matmul", "bmm", "baddbmm", "__matmul__", "__rmatmul__")),
        (torch.nn.functional, ("scaled_dot_product_attention",)),
    )
    for name in names
)


class _WithoutMixtures(TorchFunctionMode):
    """Keeps what is not channel by channel out of the graph: broadcast maps and attention products.

    torch_pruning ties the operands of every product channel by channel. For a map of one channel that meets
    many (attention gates, masks) that is wrong, and it moves the offsets of the concatenations behind it. In
    the matrix products of self-attention it follows every channel to every place, which takes minutes for
    8 × 8 pixels. Such operands are taken for outputs instead: whatever makes them keeps its width.

    Attributes:
        maps: what was taken out, in forward order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        operands = [x for x in args if isinstance(x, Tensor) and x.dim() == 4]
        if function in _BLENDS and len({x.shape[1] for x in operands}) > 1:
            self.maps += [x for x in operands if x.shape[1] == 1 and x.requires_grad]
            args = tuple(
                x.detach() if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == 1 else x for x in args
            )
        elif function in _PRODUCTS:
            # Kernels have no history; they are parameters of the network's own, and never cut.
            self.maps += [x for x in tensors_of(args) if x.grad_fn is not None]
            args = tuple(_detached(x) for x in args)
        return function(*args, **(kwargs or {}))


def _detached(argument: Any) -> Any:
    """Tensors, alone or in a row (einsum), without what they were made from."""
    if isinstance(argument, list | tuple):
        return type(argument)(map(_detached, argument))
    return argument.detach() if isinstance(argument, Tensor) else argument


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of whatever a network hands back, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [x for part in outputs for x in tensors_of(part)] if isinstance(outputs, list | tuple) else []


def _forward(network: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs for the tracer, gates and operands of attention beside them."""
    with _WithoutMixtures() as mode:
        outputs = tensors_of(network(*inputs))
    return [x for x in (*outputs, *mode.maps) if x.requires_grad]


def _obstacle(module: nn.Module, label: str) -> str | None:
    """Why the channels of a module cannot be cut; None where they can."""
    if isinstance(module, CONVOLUTIONS):
        if "weight" not in module._parameters:
            return f"the weight of {label!r} is computed (spectral or weight norm); fold it into a plain one"
        if module.groups != 1 and not is_depthwise(module):
            return f"they reach {label!r}, a grouped convolution that is not depthwise"
        return None
    if isinstance(module, nn.GroupNorm):
        if module.num_groups in (1, module.num_channels):
            return None
        return (
            f"they reach {label!r}, a GroupNorm of {module.num_groups} groups; only those of 1 group or one "
            "per channel keep their meaning in a slice"
        )
    if isinstance(module, NORMS):
        return None
    return f"they reach {label!r} ({type(module).__name__}); only convolutions and norms can be sliced"


def find_groups(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network that can be cut, in forward order: see :func:`discover_groups`."""
    return discover_groups(network, inputs).groups


def discover_groups(network: nn.Module, inputs: Sequence[Tensor]) -> Discovery:
    """The channel groups of a network in forward order: what can be cut, and what cannot and why.

    Args:
        network: any traceable convolutional network; it is copied, never changed.
        inputs: example inputs, one tensor per argument of ``forward``, (N, C, H, W) or, for labels, (N, C).

    Frozen are groups that reach the network's output or input, or a layer that cannot be sliced (linear
    layers, convolutions of several groups that are not depthwise, most GroupNorms, parameters of the
    network's own), and channels that are scattered somewhere.
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
        graph = tp.DependencyGraph().build_dependency(
            network, example_inputs=list(inputs), forward_fn=_forward, verbose=False
        )

    groups: list[ChannelGroup] = []
    frozen: list[FrozenGroup] = []
    claimed: set[str] = set()
    for name in order:
        module = network.get_submodule(name)
        if name in claimed or not isinstance(module, CONVOLUTIONS):
            continue
        channels = module.out_channels
        slots: list[Slot] = []
        obstacles: list[str] = []
        if is_depthwise(module):  # whatever feeds it is no convolution, or that would have claimed it
            obstacles.append("they are the network's input, through a depthwise convolution")
        if module not in graph.module2node:
            frozen.append(FrozenGroup(name, channels, "the tracer does not see how they reach the output"))
            continue
        reaches_output = False
        prune = graph.get_pruner_of_module(module).prune_out_channels
        for item in graph.get_pruning_group(module, prune, idxs=list(range(channels))):
            target = item.dep.target.module
            reaches_output |= isinstance(target, _OutputOp)
            if isinstance(target, nn.Parameter):
                label = next((key for key, value in network.named_parameters() if value is target), "?")
                obstacles.append(f"they reach {label!r}, a parameter outside of convolutions and norms")
            if target not in names or isinstance(target, nn.Identity | nn.Dropout):
                continue  # concatenations, activations: nothing to cut
            if isinstance(target, nn.PReLU) and target.num_parameters == 1:
                continue
            label = names[target]
            axis: Axis = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            places = [int(i) for i in item.idxs]
            start = places[0]
            if isinstance(target, CONVOLUTIONS) and axis == "out":
                claimed.add(label)
            if (obstacle := _obstacle(target, label)) is not None:
                obstacles.append(obstacle)
            elif places != list(range(start, start + channels)):
                obstacles.append(f"they are scattered in {label!r}; they must be contiguous there")
            slot = Slot(label, axis, start)
            if slot not in slots:
                slots.append(slot)
        claimed.add(name)
        if reaches_output:
            obstacles = [
                "they are the network's output, a map that many channels are multiplied by, or part of an "
                "attention product"
            ]
        elif not any(slot.axis == "in" for slot in slots):
            obstacles.append("no convolution reads them; they go to the network's output")
        if obstacles:
            frozen.append(FrozenGroup(name, channels, obstacles[0]))
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
    return Discovery(tuple(groups), tuple(frozen))
