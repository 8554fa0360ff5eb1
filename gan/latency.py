"""What a plan costs in time: a table measured layer by layer, read in between for any widths.

Time is no product of widths: small layers cost calls, large ones memory. So every convolution, with the
padding, activation and norm around it, is timed at a coarse grid of (input width, output width); a plan's
latency is the sum over its layers. Two whole networks, the dense one and the smallest, are timed beside the
layers, and the sum is scaled and shifted to agree with both: what lies between the layers (concatenations,
calls) is in the shift, what differs between a layer alone and one among others (caches) in the scale.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from gan.errors import UserError
from gan.files import write_json
from gan.groups import CONVOLUTIONS, NORMS, Axis, ChannelGroup, Slot, without_inplace
from gan.slicing import Slicer
from gan.stopwatch import Job, Timer, time_all, time_once

if TYPE_CHECKING:
    from gan.cost import CostModel

FORMAT = 1
SLOPE = 1e-4
"""Share of the dense latency that is spread evenly over all channels: the table may be flat, but a wider
plan must cost more, or the longest prefix of increments that fits a budget would be no definite one."""


@dataclass(frozen=True)
class LayerTable:
    """Milliseconds of one kind of layer at a grid of widths.

    Attributes:
        widths_in: (a,) input channels, ascending.
        widths_out: (b,) output channels, ascending.
        milliseconds: (a, b) > 0, falling along neither axis.
    """

    widths_in: NDArray[np.int64]
    widths_out: NDArray[np.int64]
    milliseconds: NDArray[np.float64]


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a network as a function of its layers' widths.

    Attributes:
        layers: (L,) tables of the convolutions in forward order; layers of one geometry share theirs.
        scale: factor of the layers' sum, > 0.
        overhead_ms: what the network costs beside its layers; negative where they cost more alone.
        conditions: device, machine, threads and version that it was measured with.
    """

    layers: tuple[LayerTable, ...]
    scale: float
    overhead_ms: float
    conditions: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def dense(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(L,) input and (L,) output widths of the dense network."""
        ends = [(layer.widths_in[-1], layer.widths_out[-1]) for layer in self.layers]
        return np.array([end[0] for end in ends]), np.array([end[1] for end in ends])

    def milliseconds(self, widths_in: NDArray[Any], widths_out: NDArray[Any]) -> NDArray[np.float64]:
        """Latency of layer widths: bilinear between the grid's points, rising in every width.

        Args:
            widths_in: (..., L) whole numbers; beyond the grid its edge counts.
            widths_out: (..., L).

        Returns:
            (...) milliseconds for one image.
        """
        flat = self._flat
        w_in, w_out = (np.rint(widths).astype(np.int64) for widths in (widths_in, widths_out))
        row_in = flat.rows + np.clip(w_in, 0, flat.widest)
        row_out = flat.rows + np.clip(w_out, 0, flat.widest)
        corner = flat.corner_in.take(row_in) + flat.corner_out.take(row_out)
        share_in, share_out = flat.share_in.take(row_in), flat.share_out.take(row_out)
        below, above = flat.values.take(corner), flat.values.take(corner + flat.stride)
        below = below + share_out * (flat.values.take(corner + 1) - below)
        above = above + share_out * (flat.values.take(corner + flat.stride + 1) - above)
        layers = (below + share_in * (above - below)).sum(-1)
        kept = (w_in.sum(-1) + w_out.sum(-1)) / flat.channels
        dense_ms = self.overhead_ms + self.scale * flat.dense_sum
        return self.overhead_ms + self.scale * layers + SLOPE * dense_ms * (kept - 1.0)

    @cached_property
    def _flat(self) -> _Flat:
        return _Flat.of(self.layers)


@dataclass(frozen=True)
class _Flat:
    """All layers' tables in one array, and where each whole width lies in it: reading is a few takes."""

    values: NDArray[np.float64]
    rows: NDArray[np.int64]
    corner_in: NDArray[np.int64]
    corner_out: NDArray[np.int64]
    share_in: NDArray[np.float64]
    share_out: NDArray[np.float64]
    stride: int
    widest: int
    channels: float
    dense_sum: float

    @classmethod
    def of(cls, layers: Sequence[LayerTable]) -> _Flat:
        rows_in = 1 + max(len(layer.widths_in) for layer in layers)  # one more: every point has a next one
        stride = 1 + max(len(layer.widths_out) for layer in layers)
        widest = int(max(max(layer.widths_in[-1], layer.widths_out[-1]) for layer in layers))
        width = np.arange(widest + 1)
        values, corners, shares = [], ([], []), ([], [])  # type: ignore[var-annotated]
        for place, layer in enumerate(layers):
            a, b = layer.milliseconds.shape
            values.append(np.pad(layer.milliseconds, ((0, rows_in - a), (0, stride - b)), mode="edge"))
            for axis, grid in enumerate((layer.widths_in, layer.widths_out)):
                at = np.interp(width, grid, np.arange(len(grid)))
                point = np.floor(at).astype(np.int64)
                corners[axis].append((place * rows_in + point) * stride if axis == 0 else point)
                shares[axis].append(at - point)
        return cls(
            values=np.stack(values).ravel(),
            rows=np.arange(len(layers)) * (widest + 1),
            corner_in=np.concatenate(corners[0]),
            corner_out=np.concatenate(corners[1]),
            share_in=np.concatenate(shares[0]),
            share_out=np.concatenate(shares[1]),
            stride=stride,
            widest=widest,
            channels=float(sum(layer.widths_in[-1] + layer.widths_out[-1] for layer in layers)),
            dense_sum=float(sum(layer.milliseconds[-1, -1] for layer in layers)),
        )


@dataclass(frozen=True)
class LayerUnit:
    """A convolution with what runs right before and after it.

    Attributes:
        name: dotted name of the convolution.
        parts: the modules in the order of their run; the convolution is ``parts[place]``.
        place: index of the convolution.
        shape: (C, H, W) of what goes in.
        lowest: smallest (input, output) widths that a plan can give it.
    """

    name: str
    parts: tuple[nn.Module, ...]
    place: int
    shape: tuple[int, ...]
    lowest: tuple[int, int]

    @property
    def convolution(self) -> nn.Conv2d | nn.ConvTranspose2d:
        module = self.parts[self.place]
        assert isinstance(module, CONVOLUTIONS)
        return module

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Equal for layers that take equally long at equal widths."""
        return (*map(repr, self.parts), self.shape, self.lowest)

    def grids(self, multiple: int, points: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Input and output widths at which it is timed: geometric, on the widths' own steps."""
        dense = (self.convolution.in_channels, self.convolution.out_channels)
        grids = []
        for low, high in zip(self.lowest, dense, strict=True):
            steps = np.rint((np.geomspace(low, high, points) - low) / multiple).astype(np.int64)
            grids.append(np.unique(np.append(np.minimum(low + multiple * steps, high), (low, high))))
        return grids[0], grids[1]

    def slicer(self) -> tuple[Slicer | None, nn.Module, list[Axis]]:
        """What cuts it to other widths, and along which axes; None where no plan changes it."""
        whole = nn.Sequential(*map(copy.deepcopy, self.parts)).eval()
        convolution = self.convolution
        groups: list[ChannelGroup] = []
        axes: list[Axis] = []
        sizes: dict[Axis, tuple[int, int]] = {
            "in": (self.lowest[0], convolution.in_channels),
            "out": (self.lowest[1], convolution.out_channels),
        }
        for axis, (low, high) in sizes.items():
            if low == high:
                continue
            slots = [Slot(str(self.place), axis, 0)]
            if axis == "out":
                slots += [
                    Slot(str(at), "out", 0) for at, part in enumerate(self.parts) if isinstance(part, NORMS)
                ]
            groups.append(ChannelGroup(self.name, high, tuple(slots), "conv", 1, 1, 1))
            axes.append(axis)
        return (Slicer(whole, groups) if groups else None), whole, axes

    def jobs(self, grids: tuple[NDArray[np.int64], NDArray[np.int64]], device: torch.device) -> list[Job]:
        """One job for each point of the grid, input widths first."""
        slicer, whole, axes = self.slicer()
        tensors = whole.state_dict()
        draws = torch.Generator().manual_seed(0)
        image = torch.randn(1, *self.shape, generator=draws).to(device)
        jobs = []
        for width_in in grids[0].tolist():
            for width_out in grids[1].tolist():
                widths = [width_in if axis == "in" else width_out for axis in axes]

                def make(widths: list[int] = widths) -> nn.Module:
                    return whole if slicer is None else slicer.network(tensors, widths)

                jobs.append(Job(make, (image[:, :width_in].contiguous(),)))
        return jobs


def layer_units(
    network: nn.Module, groups: Sequence[ChannelGroup], inputs: Sequence[Tensor], multiple: int
) -> list[LayerUnit]:
    """The convolutions of a network in forward order, each with its neighbours.

    A norm goes with the convolution before it, whose channels it has; an activation or a padding with the one
    after it (between the two there may be a concatenation); what follows the last one goes with that.
    """
    seen: list[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]] = []
    hooks = []
    for name, module in network.named_modules():
        if next(module.children(), None) is None and not isinstance(module, nn.Identity | nn.Dropout):

            def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                if all(name != other for other, *_ in seen):
                    seen.append((name, module, tuple(args[0].shape[1:]), tuple(out.shape[1:])))

            hooks.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()

    cut: dict[tuple[str, Axis], int] = {}
    for group in groups:
        for slot in group.slots:
            spared = group.channels - min(multiple, group.channels)
            cut[slot.module, slot.axis] = cut.get((slot.module, slot.axis), 0) + spared
    places = [at for at, (_, module, _, _) in enumerate(seen) if isinstance(module, CONVOLUTIONS)]
    units = []
    for order, at in enumerate(places):
        name, module, shape, made = seen[at]
        assert isinstance(module, CONVOLUTIONS)
        before = seen[places[order - 1] + 1 if order else 0 : at]
        last = order == len(places) - 1
        after = seen[at + 1 :] if last else seen[at + 1 : places[order + 1]]
        lead = [entry for entry in before if not isinstance(entry[1], NORMS)]
        if not _chained(lead, shape):  # something else lies between; it falls to the overhead
            lead = []
        trail = [entry for entry in after if last or isinstance(entry[1], NORMS)]
        if any(entry[2] != made for entry in trail):
            trail = []
        parts = [entry[1] for entry in (*lead, seen[at], *trail)]
        lowest = (
            module.in_channels - cut.get((name, "in"), 0),
            module.out_channels - cut.get((name, "out"), 0),
        )
        units.append(LayerUnit(name, tuple(parts), len(lead), lead[0][2] if lead else shape, lowest))
    return units


def _chained(
    entries: Sequence[tuple[str, nn.Module, tuple[int, ...], tuple[int, ...]]], end: tuple[int, ...]
) -> bool:
    """Whether the entries hand (C, H, W) on to one another and to the ``end``, all with its channels."""
    shapes = [*(entry[2] for entry in entries), end][1:]
    return all(
        entry[3] == follows and entry[2][0] == end[0] for entry, follows in zip(entries, shapes, strict=True)
    )


def monotone(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values (a, b) that fall along neither axis: half way between the nearest ones above and below.

    The running maximum from the small end alone would let one disturbed measurement of a small layer raise
    all larger ones.
    """
    above = np.maximum.accumulate(np.maximum.accumulate(values, 0), 1)
    turned = values[::-1, ::-1]
    below = np.minimum.accumulate(np.minimum.accumulate(turned, 0), 1)[::-1, ::-1]
    return (above + below) / 2


def measure_latency(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Sequence[Tensor],
    multiple: int,
    *,
    timer: Timer = time_once,
    points: int = 5,
    rounds: int = 10,
    runs: int = 3,
    seed: int = 0,
) -> LatencyTable:
    """Time the layers of a network at a grid of widths, for one image, on one thread.

    Args:
        network: dense, traceable; it is copied, never changed.
        groups: its channel groups in forward order.
        inputs: one tensor per argument of ``forward``, each (1, C, H, W), on the device that counts.
        multiple: widths are multiples of it.
        timer: gives the milliseconds of one run.
        points: widths along each axis of a layer's grid, ≥ 2.
        rounds: visits to each point.
        runs: runs that count at each visit.
        seed: of the order of the visits.
    """
    device = next(network.parameters()).device
    network = without_inplace(copy.deepcopy(network)).eval().requires_grad_(False)
    inputs = tuple(x.to(device) for x in inputs)
    units = layer_units(network, groups, inputs, multiple)
    grids = {unit.geometry: unit.grids(multiple, points) for unit in units}
    firsts = {unit.geometry: unit for unit in reversed(units)}
    jobs: list[Job] = []
    spans: dict[tuple[Any, ...], slice] = {}
    for geometry, unit in firsts.items():
        cells = unit.jobs(grids[geometry], device)
        spans[geometry] = slice(len(jobs), len(jobs) + len(cells))
        jobs += cells
    slicer, tensors = Slicer(network, groups), network.state_dict()
    smallest = [min(multiple, group.channels) for group in groups]
    jobs += [Job(lambda: network, inputs), Job(lambda: slicer.network(tensors, smallest), inputs)]
    times = time_all(jobs, timer, rounds, runs, seed)

    tables = {}
    for geometry, span in spans.items():
        w_in, w_out = grids[geometry]
        tables[geometry] = LayerTable(w_in, w_out, monotone(times[span].reshape(len(w_in), len(w_out))))
    layers = tuple(tables[unit.geometry] for unit in units)
    ends = (
        sum(float(layer.milliseconds[-1, -1]) for layer in layers),
        sum(float(layer.milliseconds[0, 0]) for layer in layers),
    )
    scale, overhead = calibrate(ends, (float(times[-2]), float(times[-1])))
    return LatencyTable(layers, scale, overhead, conditions(device))


def calibrate(sums: tuple[float, float], wholes: tuple[float, float]) -> tuple[float, float]:
    """(scale, overhead) that turn the layers' sums into the measured wholes, dense first, smallest second.

    A layer alone is called as dearly as a whole network, so the overhead may be negative. The dense network
    is always met; the smallest one unless that took a negative scale: a disturbed measurement.
    """
    if sums[0] > sums[1]:
        scale = (wholes[0] - wholes[1]) / (sums[0] - sums[1])
        if scale > 0:
            return scale, wholes[0] - scale * sums[0]
    return wholes[0] / sums[0], 0.0


def conditions(device: torch.device) -> dict[str, str | int]:
    """What a measured time depends on beside the network."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": device.type,
        "machine": name or f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "torch": torch.__version__,
    }


def write_latency(path: Path, tables: Mapping[str, LatencyTable]) -> Path:
    """Write the tables of several networks, agent → table; :func:`read_latency` gives the same numbers."""
    data: dict[str, Any] = {}
    for agent, table in tables.items():
        distinct = list({id(layer): layer for layer in table.layers}.values())
        places = {id(layer): place for place, layer in enumerate(distinct)}
        data[agent] = {
            "conditions": dict(table.conditions),
            "scale": table.scale,
            "overhead_ms": table.overhead_ms,
            "layers": [places[id(layer)] for layer in table.layers],
            "tables": [
                {
                    "widths_in": layer.widths_in.tolist(),
                    "widths_out": layer.widths_out.tolist(),
                    "milliseconds": layer.milliseconds.tolist(),
                }
                for layer in distinct
            ],
        }
    return write_json(path, {"format": FORMAT, "networks": data})


def read_latency(path: Path) -> dict[str, LatencyTable]:
    """Read :func:`write_latency` back: agent → table.

    Raises:
        UserError: missing or damaged file, or one of another format.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}, not {FORMAT}")
        return {agent: _read_table(entry) for agent, entry in data["networks"].items()}
    except FileNotFoundError:
        raise UserError(f"the latency table {path} does not exist; make a new run") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no latency table ({error}); make a new run") from error


def _read_table(entry: Mapping[str, Any]) -> LatencyTable:
    tables = [
        LayerTable(
            np.array(table["widths_in"], dtype=np.int64),
            np.array(table["widths_out"], dtype=np.int64),
            np.array(table["milliseconds"], dtype=np.float64),
        )
        for table in entry["tables"]
    ]
    for table in tables:
        shape = (len(table.widths_in), len(table.widths_out))
        if table.milliseconds.shape != shape:
            raise ValueError(f"a table of {shape} widths has {table.milliseconds.shape} times")
    layers = tuple(tables[place] for place in entry["layers"])
    return LatencyTable(layers, float(entry["scale"]), float(entry["overhead_ms"]), entry["conditions"])


@dataclass(frozen=True)
class Prediction:
    """The table's word for some plans beside the clock's.

    Attributes:
        predicted_ms: (p,) by the table.
        measured_ms: (p,) of the sliced networks, on one thread.
    """

    predicted_ms: NDArray[np.float64]
    measured_ms: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Median of |predicted / measured - 1|, ≥ 0."""
        return float(np.median(np.abs(self.predicted_ms / self.measured_ms - 1.0)))

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of both, in [-1, 1]; NaN where either is constant."""
        return float(spearmanr(self.predicted_ms, self.measured_ms).statistic)


def random_widths(
    groups: Sequence[ChannelGroup], multiple: int, count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """(count, n) allowed widths: around a keep ratio drawn per plan, log-normal from group to group."""
    channels = np.array([group.channels for group in groups], dtype=np.int64)
    keep = np.exp(
        random.uniform(np.log(0.1), 0.0, (count, 1)) + random.normal(0.0, 0.4, (count, len(groups)))
    )
    widths = np.rint(keep * channels / multiple).astype(np.int64) * multiple
    return np.clip(widths, np.minimum(multiple, channels), channels)


def check_prediction(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    inputs: Sequence[Tensor],
    cost: CostModel,
    widths: NDArray[np.int64],
    *,
    timer: Timer = time_once,
    rounds: int = 10,
    runs: int = 3,
    seed: int = 0,
) -> Prediction:
    """Cut plans out for real and time them, all in turns, beside what the table says.

    Args:
        network: dense; it is copied, never changed.
        groups: its channel groups.
        inputs: one tensor per argument of ``forward``, each (1, C, H, W).
        cost: its cost with a latency table.
        widths: (p, n) kept channels, such as :func:`random_widths`.
        timer, rounds, runs, seed: as in :func:`measure_latency`.
    """
    device = next(network.parameters()).device
    inputs = tuple(x.to(device) for x in inputs)
    slicer, tensors = Slicer(network, groups), network.state_dict()
    jobs = [Job(partial(slicer.network, tensors, row), inputs) for row in widths.tolist()]
    return Prediction(cost.of("latency", widths), time_all(jobs, timer, rounds, runs, seed))
