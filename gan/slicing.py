"""A plan and weights become a smaller network: real slices, never masks over the full one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gan.groups import (
    CONVOLUTIONS,
    NORMS,
    Axis,
    ChannelGroup,
    is_depthwise,
    norm_channels,
    without_inplace,
)
from gan.taps import recorded

Part = tuple[int, int, int | None]
"""(start, channels, index of the group that owns them or None) along one axis."""


def _parts(total: int, slots: list[tuple[int, int, int]]) -> list[Part]:
    """Split an axis of ``total`` channels into owned and fixed runs; slots are (start, channels, group)."""
    parts: list[Part] = []
    at = 0
    for start, channels, group in sorted(slots):
        if start > at:
            parts.append((at, start - at, None))
        parts.append((start, channels, group))
        at = start + channels
    if at < total:
        parts.append((at, total - at, None))
    return parts


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree that still holds the original's parameters and buffers.

    40 times quicker than ``copy.deepcopy``, which would take as long as running a small slice.
    """
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = dict(module.__dict__[table])
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _bare_copy(child)
    return twin


class Slicer:
    """Knows where the channels of each group sit in each tensor of a network.

    Channels must be in order of importance (see :func:`permuted`), because a width keeps a prefix.

    Args:
        network: gives the shape; it is neither changed nor kept.
        groups: its channel groups, in forward order.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self.groups = tuple(groups)
        self.dense_widths = tuple(group.channels for group in groups)
        with torch.device("meta"):
            self._skeleton = without_inplace(copy.deepcopy(network)).to("meta")
        slots: dict[tuple[str, Axis], list[tuple[int, int, int]]] = {}
        for index, group in enumerate(groups):
            for slot in group.slots:
                slots.setdefault((slot.module, slot.axis), []).append((slot.start, group.channels, index))
        self._axes: dict[str, dict[Axis, list[Part]]] = {}
        self._layout: dict[str, list[tuple[int, list[Part]]]] = {}
        self._statistics: list[str] = []
        self._group_per_channel = {
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.GroupNorm) and 1 < module.num_groups == module.num_channels
        }
        state = network.state_dict()
        # Values that no state dict carries: the skeleton has none.
        self._constants = {
            name: value.detach().clone() for name, value in network.named_buffers() if name not in state
        }
        for name, module in network.named_modules():
            if is_depthwise(module):
                axes: dict[Axis, list[Part]] = {
                    "out": _parts(module.out_channels, slots.get((name, "out"), []))  # type: ignore[arg-type]
                }
                self._layout |= {f"{name}.{tensor}": [(0, axes["out"])] for tensor in ("weight", "bias")}
            elif isinstance(module, CONVOLUTIONS) and module.groups != 1:
                continue  # never cut
            elif isinstance(module, CONVOLUTIONS):
                axes = {
                    "out": _parts(module.out_channels, slots.get((name, "out"), [])),
                    "in": _parts(module.in_channels, slots.get((name, "in"), [])),
                }
                out_dim, in_dim = (1, 0) if isinstance(module, nn.ConvTranspose2d) else (0, 1)
                self._layout[f"{name}.weight"] = [(out_dim, axes["out"]), (in_dim, axes["in"])]
                self._layout[f"{name}.bias"] = [(0, axes["out"])]
            elif isinstance(module, NORMS):
                axes = {"out": _parts(norm_channels(module), slots.get((name, "out"), []))}
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    self._layout[f"{name}.{tensor}"] = [(0, axes["out"])]
            else:
                continue
            self._axes[name] = axes
            if isinstance(module, NORMS):
                self._statistics += [f"{name}.{key}" for key, _ in module.named_buffers(recurse=False)]

    def _check(self, widths: Sequence[int]) -> None:
        if len(widths) != len(self.groups):
            raise ValueError(f"got {len(widths)} widths for {len(self.groups)} channel groups")
        for width, group in zip(widths, self.groups, strict=True):
            if not 1 <= width <= group.channels:
                raise ValueError(f"{group.name} keeps {width} channels; allowed are 1 to {group.channels}")

    def narrow(self, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the sliced network: views of ``tensors``, joined copies at concatenations."""
        self._check(widths)
        sliced = {}
        constants = {name: value for name, value in self._constants.items() if name not in tensors}
        if constants:
            device = next(iter(tensors.values())).device
            constants = {name: value.to(device) for name, value in constants.items()}
        for name, tensor in {**tensors, **constants}.items():
            for dim, parts in self._layout.get(name, ()):
                kept = [
                    tensor.narrow(dim, start, channels if group is None else widths[group])
                    for start, channels, group in parts
                ]
                tensor = kept[0] if len(kept) == 1 else torch.cat(kept, dim)
            sliced[name] = tensor
        return sliced

    def _shape(self, network: nn.Module, widths: Sequence[int]) -> None:
        """Set the channel counts that modules carry as attributes."""
        for name, axes in self._axes.items():
            module = network.get_submodule(name)
            count = {
                axis: sum(channels if group is None else widths[group] for _, channels, group in parts)
                for axis, parts in axes.items()
            }
            if isinstance(module, CONVOLUTIONS) and "in" not in axes:  # depthwise, also at one channel
                module.out_channels = module.in_channels = module.groups = count["out"]
            elif isinstance(module, CONVOLUTIONS):
                module.out_channels, module.in_channels = count["out"], count["in"]
            elif isinstance(module, nn.GroupNorm):
                module.num_channels = count["out"]
                if name in self._group_per_channel:
                    module.num_groups = count["out"]
            elif isinstance(module, NORMS):
                module.num_features = count["out"]

    def run(
        self, tensors: Mapping[str, Tensor], widths: Sequence[int], *inputs: Tensor, training: bool
    ) -> Tensor:
        """Run the slice with gradients to the shared ``tensors``.

        BatchNorm uses the statistics of the batch in training and leaves the shared ones alone.
        """
        sliced = self.narrow(tensors, widths)
        if training:  # running statistics of a mixture of widths would mean nothing
            sliced |= {name: torch.zeros_like(sliced[name]) for name in self._statistics}
        self._shape(self._skeleton, widths)
        self._skeleton.train(training)
        output = functional_call(self._skeleton, sliced, inputs)
        assert isinstance(output, Tensor)
        return output

    def recorded(self, taps: Sequence[str]) -> AbstractContextManager[dict[str, Tensor]]:
        """Within it, :meth:`run` leaves the outputs of the named modules in the dict."""
        return recorded(self._skeleton, taps)

    def network(
        self, tensors: Mapping[str, Tensor], widths: Sequence[int], shared: bool = False
    ) -> nn.Module:
        """A stand-alone smaller network in evaluation mode.

        Args:
            shared: hold views of ``tensors`` instead of copies (for scoring; never train it). BatchNorm's
                statistics are copies in any case.
        """
        sliced = self.narrow(tensors, widths)
        network = _bare_copy(self._skeleton)
        self._shape(network, widths)
        for name, module in network.named_modules():
            prefix = f"{name}." if name else ""
            for key, parameter in module.named_parameters(recurse=False):
                value = sliced[prefix + key].detach()
                value = value if shared else value.clone(memory_format=torch.contiguous_format)
                setattr(
                    module, key, nn.Parameter(value, requires_grad=parameter.requires_grad and not shared)
                )
            for key, _ in module.named_buffers(recurse=False):
                setattr(module, key, sliced[prefix + key].detach().clone())
        return network.eval()

    def permuted(self, tensors: Mapping[str, Tensor], orders: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same function with the channels of each group in another order.

        Args:
            orders: per group a permutation (channels,) of indices, most important first.
        """
        result = {}
        for name, tensor in tensors.items():
            for dim, parts in self._layout.get(name, ()):
                index = torch.cat(
                    [
                        start + (torch.arange(channels) if group is None else orders[group].cpu())
                        for start, channels, group in parts
                    ]
                )
                tensor = tensor.index_select(dim, index.to(tensor.device))
            result[name] = tensor.clone()
        return result
