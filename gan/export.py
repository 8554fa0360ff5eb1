"""What leaves the project: ONNX that was checked, and weights that tell what they were cut out of.

The ONNX file carries the largest difference from the network that it was written from. The recipe names the
source of the weights and the channels that were kept, so that the network which the finetuning began with can
be cut out again: :func:`replay`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.checkpoints import load_network, load_tensors, read_recipe, recipe_path, save_tensors, tensors_hash
from gan.errors import UserError
from gan.factories import groups_of
from gan.files import file_hash, write_bytes
from gan.groups import ChannelGroup
from gan.networks import Architecture
from gan.onnx_writer import size_step, write_onnx
from gan.runtime import OnnxNetwork, with_metadata
from gan.slicing import Slicer

TOLERANCE = 1e-4
"""Largest difference of any output value, in [−1, 1], that an ONNX file may have."""
HALF_TOLERANCE = 0.05
"""The same for fp16: six of 255 grey levels. What it is worth, its row of figures says."""


@dataclass(frozen=True)
class Parity:
    """How far an ONNX file is from the network that it was written from.

    Attributes:
        max_difference: of any output value, in units of [−1, 1].
        mean_difference: over all values.
        images: how many were compared.
        sizes: heights and widths that were tried.
        size_multiple: heights and widths must be multiples of it.
        tolerance: what was allowed.
    """

    max_difference: float
    mean_difference: float
    images: int
    sizes: tuple[tuple[int, int], ...]
    size_multiple: int
    tolerance: float


def export_onnx(
    path: Path,
    network: nn.Module,
    images: Tensor,
    *,
    half: bool = False,
    tolerance: float | None = None,
    about: Mapping[str, str] | None = None,
) -> Parity:
    """Write a network as ONNX, after ONNX Runtime has given the same outputs for real images.

    Batch, height and width stay free. The comparison runs on all images at once, on one alone and, where the
    network takes other sizes, on one that is enlarged to the next size up.

    Args:
        path: the file; nothing is written when the outputs differ.
        network: in evaluation mode; one image in, one image out.
        images: (N, C, H, W) real inputs, float32 in [−1, 1].
        half: kernels and arithmetic in fp16; inputs and outputs stay float32.
        tolerance: largest difference allowed; by default 1e-4, 0.05 for fp16.
        about: further keys of the file's metadata.

    Raises:
        UserError: the outputs differ by more than the tolerance, or a layer cannot be written.
    """
    tolerance = (HALF_TOLERANCE if half else TOLERANCE) if tolerance is None else tolerance
    network = network.cpu().eval()
    images = images.cpu()
    model = write_onnx(network, images[:1], half)
    step = size_step(network, images[:1])
    shown = [images, images[:1]]
    height, width = images.shape[-2:]
    if step < min(height, width) or step == height == width:
        larger = (height + step, width + step)
        shown.append(F.interpolate(images[:1], larger, mode="bilinear").clamp(-1, 1))
    found = _compare(network, OnnxNetwork(model), shown, step, tolerance)
    if not found.max_difference <= tolerance:  # also for NaN
        raise UserError(
            f"{path.name} was not written: ONNX Runtime's outputs differ from the network's by up to "
            f"{found.max_difference:.2g} on {found.images} images, and {tolerance:.2g} is allowed"
        )
    metadata = {
        "precision": "fp16" if half else "fp32",
        "value_range": "[-1, 1]",
        "image_size": str(height),
        **{f"parity_{key}": str(value) for key, value in asdict(found).items() if key != "size_multiple"},
        "size_multiple": str(step),
        **(about or {}),
    }
    write_bytes(path, with_metadata(model, metadata))
    return found


@torch.no_grad()
def _compare(
    network: nn.Module, written: nn.Module, shown: Sequence[Tensor], step: int, tolerance: float
) -> Parity:
    differences = [(network(images) - written(images)).abs() for images in shown]
    values = sum(difference.numel() for difference in differences)
    return Parity(
        max_difference=float(np.max([float(difference.max()) for difference in differences])),
        mean_difference=float(sum(float(difference.sum()) for difference in differences)) / values,
        images=len(shown[0]),
        sizes=tuple((int(images.shape[-2]), int(images.shape[-1])) for images in (shown[0], *shown[2:])),
        size_multiple=step,
        tolerance=tolerance,
    )


@dataclass(frozen=True)
class Source:
    """Dense or elastic weights that a network was cut out of.

    Attributes:
        kind: ``elastic`` or ``dense``.
        path: their file.
        architecture: of the dense network.
        tensors: full-width state dict.
        orders: per group the dense index of each channel of ``tensors``.
        groups: channel groups of the dense network.
        agent: whose weights they are in a file of elastic weights.
    """

    kind: str
    path: Path
    architecture: Architecture
    tensors: Mapping[str, Tensor]
    orders: tuple[Tensor, ...]
    groups: tuple[ChannelGroup, ...]
    agent: str

    @classmethod
    def read(cls, kind: str, path: Path, architecture: Architecture, agent: str, image_size: int) -> Source:
        """Read elastic weights of an agent, or a dense network.

        Args:
            architecture: of the dense network.
            image_size: height and width of its images, for the channel groups.

        Raises:
            UserError: missing or damaged file.
        """
        network = architecture.build()
        example = torch.zeros(1, architecture.in_channels, image_size, image_size)
        groups = groups_of(architecture.name, network, [example])
        if kind == "dense":
            tensors = load_network(path)[0].state_dict()
            orders = tuple(torch.arange(group.channels) for group in groups)
            return cls(kind, path, architecture, tensors, orders, groups, agent)
        stored = load_tensors(path)
        prefix = f"{agent}/weights/"
        tensors = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
        places = [f"{agent}/order/{index}" for index in range(len(groups))]
        if not tensors or not all(place in stored for place in places):
            raise UserError(
                f"{path} holds no elastic weights of this {agent}; name those that the run was made with"
            )
        orders = tuple(stored[place] for place in places)
        return cls(kind, path, architecture, tensors, orders, groups, agent)

    def cut(self, kept: Sequence[Sequence[int]], statistics: Mapping[str, Tensor]) -> nn.Module:
        """The network of the kept channels, in evaluation mode.

        Args:
            kept: per group the dense channel indices, in the order in which the network has them.
            statistics: state-dict entries that take the place of the source's: those of its norms.
        """
        turns = []
        for order, rows in zip(self.orders, kept, strict=True):
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            first = place[torch.tensor(rows, dtype=torch.int64)]
            rest = torch.ones(len(order), dtype=torch.bool)
            rest[first] = False
            turns.append(torch.cat([first, rest.nonzero().flatten()]))
        slicer = Slicer(self.architecture.build(), self.groups)
        network = slicer.network(slicer.permuted(self.tensors, turns), [len(rows) for rows in kept])
        network.load_state_dict({**network.state_dict(), **statistics})
        return network.eval()


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.named_buffers()}


def describe_start(
    path: Path, source: Source, start: nn.Module, widths: Sequence[int]
) -> dict[str, Any] | None:
    """The recipe of the network that a finetuning began with; its norms' statistics get a file of their own.

    Args:
        path: weight file of the result; the statistics lie beside it as ``…_start.safetensors``.
        source: what the network was cut out of.
        start: the network itself.
        widths: kept channels of each group: the first ones in the order of the source.

    Returns:
        JSON-ready; :func:`replay` turns it into the same network, bit for bit. None when the network does not
        come out of this source so.
    """
    kept = [order[:width].tolist() for order, width in zip(source.orders, widths, strict=True)]
    wanted = tensors_hash(start.state_dict())
    statistics = _buffers(start)
    try:
        found = tensors_hash(source.cut(kept, statistics).state_dict())
    except (RuntimeError, ValueError, IndexError, KeyError):  # another architecture or other widths
        return None
    if found != wanted:
        return None
    beside = path.with_name(f"{path.stem}_start.safetensors")
    save_tensors(beside, statistics)
    return {
        "source": {"kind": source.kind, "file": source.path.name, "hash": file_hash(source.path)},
        "agent": source.agent,
        "dense": source.architecture.to_dict(),
        "kept": {group.name: rows for group, rows in zip(source.groups, kept, strict=True)},
        "statistics": {"file": beside.name, "hash": file_hash(beside)},
        "state_hash": wanted,
    }


def replay(path: Path, source: Path) -> nn.Module:
    """The network that the finetuning of an exported file began with, bit for bit.

    Args:
        path: exported weight file; recipe and statistics lie beside it.
        source: the file of elastic or dense weights that the recipe names.

    Raises:
        UserError: no such recipe, another source, or statistics that are not the recipe's.
    """
    recipe = read_recipe(path)
    start = recipe.get("start")
    if not isinstance(start, dict):
        raise UserError(
            f"the recipe {recipe_path(path)} has no key 'start': nothing says what it was cut from"
        )
    beside = path.with_name(start["statistics"]["file"])
    for file, entry in ((source, start["source"]), (beside, start["statistics"])):
        if not file.is_file():
            raise UserError(f"{file} does not exist; the recipe {recipe_path(path)} needs {entry['file']}")
        if file_hash(file) != entry["hash"]:
            raise UserError(
                f"{file} is not the file that {recipe_path(path).name} names: {entry['file']} with the hash "
                f"{entry['hash']}"
            )
    dense = Architecture.from_dict(start["dense"])
    weights = Source.read(start["source"]["kind"], source, dense, start["agent"], int(recipe["image_size"]))
    network = weights.cut(list(start["kept"].values()), load_tensors(beside))
    if tensors_hash(network.state_dict()) != start["state_hash"]:
        raise UserError(f"what {source} gives is not the network of {recipe_path(path).name}; get both again")
    return network


def load(source: Path | str, network: str = "generator") -> nn.Module:
    """A network in evaluation mode; see :func:`gan.load`."""
    path = Path(source)
    if path.is_dir():
        path = path / f"{network}.safetensors"
        both = [one for one in ("A", "B") if path.with_stem(f"{network}_{one}").is_file()]
        if not path.is_file() and both:
            known = " and ".join(f"{network}_{one}" for one in both)
            raise UserError(
                f"{source} holds {known}; name one of them, as in gan.load(…, '{network}_{both[0]}')"
            )
        if not path.is_file():
            raise UserError(
                f"{source} holds no {path.name}; name a finished run, an exported folder or a weight file"
            )
    elif path.exists() and path.suffix != ".safetensors":
        raise UserError(f"{source} is no .safetensors file and no run folder; networks are loaded from these")
    return load_network(path)[0]
