"""What a plan costs, from its widths alone: MACs and parameters in closed form, latency by a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gan.errors import UserError
from gan.groups import (
    CONVOLUTIONS,
    NORMS,
    ChannelGroup,
    is_depthwise,
    norm_channels,
    trace_resolutions,
)
from gan.latency import LatencyTable

CostKind = Literal["macs", "params", "latency"]

DEFAULT_COST: CostKind = "params"
"""What budgets speak of. At equal MACs the embedded U-Net's uniform plan is hard to beat; at equal parameters
the shape matters: see docs/calibration.md."""


@dataclass(frozen=True)
class CostModel:
    """Cost of a network as a function of its group widths.

    A convolution costs ``positions × kernel area × input width × output width`` MACs. Positions
    are the output pixels of a convolution and the *input* pixels of a transposed one: papers on
    Pix2Pix and CycleGAN count output pixels there, 4 times too much at stride 2.

    Attributes:
        kernel_macs: (L,) positions × kernel area of each convolution.
        kernel_params: (L,) kernel area.
        in_groups: (L, n) how many times each group feeds the convolution.
        in_fixed: (L,) input channels that no group owns; 1 for a depthwise convolution.
        out_groups: (L, n) 1 at the group that the convolution makes.
        out_fixed: (L,) output channels that no group owns.
        vector_params: (n,) parameters per channel beside the kernels (biases, norm scale and shift).
        vector_fixed: parameters beside the kernels that no group owns.
        dense: (n,) widths of the dense network.
        latency: measured milliseconds of the layers, or None: then there is no cost ``latency``.
    """

    kernel_macs: NDArray[np.float64]
    kernel_params: NDArray[np.float64]
    in_groups: NDArray[np.float64]
    in_fixed: NDArray[np.float64]
    out_groups: NDArray[np.float64]
    out_fixed: NDArray[np.float64]
    vector_params: NDArray[np.float64]
    vector_fixed: float
    dense: NDArray[np.int64]
    latency: LatencyTable | None = None

    def _layer_widths(self, widths: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(..., L) input and output widths of the convolutions."""
        w = np.asarray(widths, dtype=np.float64)
        return w @ self.in_groups.T + self.in_fixed, w @ self.out_groups.T + self.out_fixed

    def _kernels(self, widths: NDArray[Any], per_kernel: NDArray[np.float64]) -> NDArray[np.float64]:
        width_in, width_out = self._layer_widths(widths)
        return (width_in * width_out) @ per_kernel

    def macs(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Multiply-accumulates per image; ``widths`` is (..., n), the result (...)."""
        return self._kernels(widths, self.kernel_macs)

    def params(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Trainable parameters; ``widths`` is (..., n), the result (...)."""
        w = np.asarray(widths, dtype=np.float64)
        return self._kernels(w, self.kernel_params) + w @ self.vector_params + self.vector_fixed

    def milliseconds(self, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Latency for one image by the measured table; ``widths`` is (..., n), the result (...).

        Raises:
            ValueError: if there is no table.
        """
        if self.latency is None:
            raise ValueError("this cost model has no latency table; measure one: gan.latency.measure_latency")
        return self.latency.milliseconds(*self._layer_widths(widths))

    def with_latency(self, table: LatencyTable) -> CostModel:
        """The same model with a latency table.

        Raises:
            UserError: if the table was measured on a network of other layers.
        """
        for mine, measured in zip(self._layer_widths(self.dense), table.dense, strict=True):
            if not np.array_equal(mine, measured):
                raise UserError(
                    f"the latency table was measured on layers of {measured.tolist()} channels, but the "
                    f"network's have {mine.astype(int).tolist()}; measure it again in a new run"
                )
        return replace(self, latency=table)

    def of(self, kind: CostKind, widths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost of the named kind, in multiply-accumulates, parameters or milliseconds."""
        return {"macs": self.macs, "params": self.params, "latency": self.milliseconds}[kind](widths)


def build_cost_model(
    network: nn.Module, groups: Sequence[ChannelGroup], inputs: Sequence[Tensor]
) -> CostModel:
    """Read the closed form off a network: one run for the resolutions, the rest from the modules."""
    inputs = [x.to(next(network.parameters()).device) for x in inputs]
    resolutions = trace_resolutions(network, inputs)
    n, layers = len(groups), list(resolutions)
    kernel_macs, kernel_params = np.zeros(len(layers)), np.zeros(len(layers))
    in_groups, out_groups = np.zeros((len(layers), n)), np.zeros((len(layers), n))
    in_fixed, out_fixed = np.zeros(len(layers)), np.zeros(len(layers))
    row = {name: i for i, name in enumerate(layers)}
    for name, i in row.items():
        module = network.get_submodule(name)
        assert isinstance(module, CONVOLUTIONS)
        pixels_in, pixels_out, _ = resolutions[name]
        positions = pixels_in if isinstance(module, nn.ConvTranspose2d) else pixels_out
        kernel_params[i] = module.kernel_size[0] * module.kernel_size[1]
        in_fixed[i], out_fixed[i] = module.in_channels, module.out_channels
        if is_depthwise(module):  # every channel reads one, however many there are
            in_fixed[i] = 1
        else:
            kernel_params[i] /= module.groups
        kernel_macs[i] = positions * kernel_params[i]
    vector_params = np.zeros(n)
    vectors = {
        name: 0 for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS + NORMS)
    }
    # What belongs to other layers (linear ones, parameters of the network's own) is never cut.
    vector_fixed = float(
        sum(
            parameter.numel()
            for name, parameter in network.named_parameters()
            if name.rpartition(".")[0] not in vectors
        )
    )
    for name in vectors:
        module = network.get_submodule(name)
        own = dict(module.named_parameters(recurse=False))
        vectors[name] = sum(key == "bias" or isinstance(module, NORMS) for key in own)
        channels = module.out_channels if isinstance(module, CONVOLUTIONS) else norm_channels(module)
        vector_fixed += vectors[name] * channels
    for g, group in enumerate(groups):
        for slot in group.slots:
            if slot.axis == "in" and slot.module in row:
                in_groups[row[slot.module], g] += 1
                in_fixed[row[slot.module]] -= group.channels
            elif slot.axis == "out":
                if slot.module in row:
                    out_groups[row[slot.module], g] += 1
                    out_fixed[row[slot.module]] -= group.channels
                vector_params[g] += vectors[slot.module]
                vector_fixed -= vectors[slot.module] * group.channels
    dense = np.array([group.channels for group in groups], dtype=np.int64)
    return CostModel(
        kernel_macs,
        kernel_params,
        in_groups,
        in_fixed,
        out_groups,
        out_fixed,
        vector_params,
        vector_fixed,
        dense,
    )


def published_macs(network: nn.Module, inputs: Sequence[Tensor]) -> int:
    """MACs for one image as papers on Pix2Pix and CycleGAN count them, to stand beside their figures.

    They count a transposed convolution at its output pixels, 4 times what it takes at stride 2: 56.80 G for
    ResNet-9 at 256 × 256, as published (true: 49.55 G), and 18.14 G for U-Net-256 (true: 6.05 G), which is
    published as 18.6 G: the outermost level, 0.45 G, counted twice.
    """
    resolutions = trace_resolutions(network, inputs)
    kernels = {name: network.get_parameter(f"{name}.weight").numel() for name in resolutions}
    return sum(pixels_out * kernels[name] for name, (_, pixels_out, _) in resolutions.items())
