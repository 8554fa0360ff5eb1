"""Gates on the channels of a network whose weights stay as they are: how a gradient reaches a width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gan.elastic import ElasticNetwork
from gan.groups import CONVOLUTIONS


class GatedNetwork:
    """A full-width network with a gate on every channel that can be cut.

    The gates multiply what the convolutions read: behind norm and activation, where a gate of 0 is the same
    as a channel that is not there. Gates of ones and zeros give the slice's outputs. BatchNorm takes the
    statistics of the batch, as in the warm-up: those of a slice would have to be recomputed for every gate.

    Args:
        elastic: the weights, channels in order of importance; neither changed nor trained.
        own_statistics: keep BatchNorm's running statistics instead.
    """

    def __init__(self, elastic: ElasticNetwork, own_statistics: bool = False) -> None:
        slicer = elastic.slicer
        self.channels = slicer.dense_widths
        self._network = elastic.network(slicer.dense_widths, shared=True).requires_grad_(False)
        for module in self._network.modules():
            if isinstance(module, nn.BatchNorm2d) and not own_statistics:
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        self._readers: dict[str, list[tuple[int, int]]] = {}
        for index, group in enumerate(slicer.groups):
            for slot in group.slots:
                if slot.axis == "in":
                    self._readers.setdefault(slot.module, []).append((slot.start, index))
        for name, module in self._network.named_modules():
            if isinstance(module, CONVOLUTIONS) and name in self._readers:
                module.register_forward_pre_hook(self._gate(sorted(self._readers[name])))
        self._gates: Sequence[Tensor] | None = None

    def __call__(self, inputs: Tensor, gates: Sequence[Tensor] | None = None) -> Tensor:
        """The outputs, with gradients to the gates and to the inputs.

        Args:
            inputs: (N, C, H, W).
            gates: per group (channels,) in [0, 1]; None leaves everything open.
        """
        return self.run((inputs,), gates)

    def run(self, inputs: Sequence[Tensor], gates: Sequence[Tensor] | None = None) -> Any:
        """The same for networks with several inputs or outputs: whatever the network hands back."""
        with self._held(gates):
            return self._network(*inputs)

    @contextmanager
    def _held(self, gates: Sequence[Tensor] | None) -> Iterator[None]:
        if gates is not None and [len(gate) for gate in gates] != list(self.channels):
            raise ValueError(
                f"gates are for {[len(gate) for gate in gates]} channels; the network has {self.channels}"
            )
        self._gates = gates
        try:
            yield
        finally:
            self._gates = None

    def _gate(self, places: list[tuple[int, int]]) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self._gates is None:
                return None
            (inputs,) = arguments
            factors, at = [], 0
            for start, index in places:
                gate = self._gates[index].to(inputs)
                factors += [inputs.new_ones(start - at), gate]
                at = start + len(gate)
            factors.append(inputs.new_ones(inputs.shape[1] - at))
            return (inputs * torch.cat(factors)[:, None, None],)

        return hook


@dataclass(frozen=True)
class GatedPair:
    """What a search by gradients works on.

    Attributes:
        generator, discriminator: the networks, with gates.
        inputs: (N, 3, H, W) images in [−1, 1] that plans are scored on.
        condition: (N, c, H, W) what a discriminator is told of them, c = 0 for nothing.
        outputs: (N, 3, H, W) what the dense generator makes of them.
        neighbours: (N, K) indices of the dense outputs nearest to each, nearest first.
    """

    generator: GatedNetwork
    discriminator: GatedNetwork
    inputs: Tensor
    condition: Tensor
    outputs: Tensor
    neighbours: Tensor


@runtime_checkable
class Differentiable(Protocol):
    """A scorer that has networks behind it and hands them out."""

    def gated(self) -> GatedPair:
        """The networks that plans are cut from, with gates on their channels."""


@runtime_checkable
class Directed(Protocol):
    """A scorer of several directions, each with a scorer of its own."""

    @property
    def ways(self) -> Mapping[str, Any]:
        """Direction, as in the names of its agents → its scorer."""
