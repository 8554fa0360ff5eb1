"""A convolutional network → an ONNX model: its forward pass is traced by torch.fx and written node by node.

No exporter is needed, sizes stay free because nothing is run, and BatchNorms are folded into the convolutions
before them. What a network may consist of stands in ``_MODULES`` and ``_FUNCTIONS``; the error names anything
else.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gan.errors import UserError
from gan.groups import CONVOLUTIONS, without_inplace
from gan.networks import ImageNorm2d
from gan.runtime import ConvGraph

INPUT = "input"
FREE_SIZES = ("height", "width")


def write_onnx(network: nn.Module, image: Tensor, half: bool = False) -> bytes:
    """The network in evaluation mode as a serialised ONNX model, with free batch, height and width.

    Args:
        network: one image in, one image out; it is copied, never changed.
        image: (1, C, H, W) of the usual size; says how many channels go in and out.
        half: kernels and arithmetic in fp16; what goes in and comes out stays float32.

    Raises:
        UserError: a layer or an operation that this writer does not know, by name.
    """
    network = without_inplace(copy.deepcopy(network)).eval().cpu()
    with torch.no_grad():
        made = network(image.cpu())
    graph = ConvGraph(half)
    # What is traced is never taken for a layer itself.
    result = _Writer(
        nn.Sequential(network) if isinstance(network, tuple(_MODULES)) else network, graph
    ).write()
    same = made.shape[-2:] == image.shape[-2:]
    sizes = FREE_SIZES if same else ("output_height", "output_width")
    return graph.model(INPUT, (image.shape[1], *FREE_SIZES), result, (made.shape[1], *sizes))


def size_step(network: nn.Module, image: Tensor) -> int:
    """Heights and widths that the network takes are multiples of this, as far as trying can say.

    Tried on shapes alone: the smallest power of 2 by which the usual size can grow so that the output has the
    size of the input; the usual size itself where there is none.
    """
    height, width = image.shape[-2:]
    shapes = copy.deepcopy(network).eval().to("meta")
    step = 1
    while step < max(height, width):
        if all(
            _keeps_size(shapes, image.shape[1], height + more * step, width + more * step) for more in (1, 3)
        ):
            return step
        step *= 2
    return math.gcd(height, width)


def _keeps_size(shapes: nn.Module, channels: int, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            made = shapes(torch.empty(1, channels, height, width, device="meta"))
    except RuntimeError:
        return False
    return made.shape[-2:] == (height, width)


class _Tracer(fx.Tracer):
    """Steps into every module but those that ONNX has a word for."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(_MODULES))


class _Writer:
    """Writes a traced network into a graph.

    Args:
        network: in evaluation mode, without in-place activations.
        graph: receives the nodes.
    """

    def __init__(self, network: nn.Module, graph: ConvGraph) -> None:
        self.network, self.graph = network, graph
        try:
            self.traced = _Tracer().trace(network)
        except Exception as error:  # whatever the network's own code does with a stand-in for a tensor
            raise UserError(
                f"{type(network).__name__} cannot be traced for ONNX ({error}); its forward pass must not "
                "depend on values or sizes"
            ) from error
        self.modules = dict(network.named_modules())
        self.values: dict[fx.Node, Any] = {}
        self.folded: set[fx.Node] = set()

    def write(self) -> str:
        """All nodes; returns the name of the result."""
        for node in self.traced.nodes:
            if node.op == "output":
                result = self._value(node.args[0])
                if not isinstance(result, str):
                    raise UserError("only networks with one output can be written as ONNX")
                return result
            self.graph.scope = _label(node)
            self.values[node] = self._write(node)
        raise AssertionError("a traced graph ends in an output")

    def _value(self, argument: Any) -> Any:
        """What stands for an argument in the graph: names for nodes, everything else as it is."""
        return fx.map_arg(argument, lambda node: self.values[node])

    def _write(self, node: fx.Node) -> Any:
        arguments, options = self._value(node.args), self._value(node.kwargs)
        if node.op == "placeholder":
            if INPUT in self.values.values():
                raise UserError("only networks with one input can be written as ONNX")
            return self.graph.start(INPUT)
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if node in self.folded:
                return arguments[0]
            if isinstance(module, CONVOLUTIONS):
                return self._convolution(node, module, arguments[0])
            return next(write for kind, write in _MODULES.items() if isinstance(module, kind))(
                self.graph, module, arguments[0]
            )
        if node.op == "get_attr" and isinstance(value := attrgetter(str(node.target))(self.network), Tensor):
            return self.graph.constant(_array(value))
        write = _FUNCTIONS.get(node.target if node.op == "call_function" else str(node.target))
        if write is None or node.op == "get_attr":
            raise UserError(
                f"ONNX: {_label(node)} is no operation that can be written; known are the layers "
                f"{', '.join(sorted(kind.__name__ for kind in _MODULES))} and the functions cat, add, sub, "
                "mul, div, relu, leaky_relu, tanh, sigmoid, interpolate"
            )
        try:
            return write(self.graph, *arguments, **options)
        except TypeError as error:  # a setting that the functions below do not have
            raise UserError(f"ONNX: {_label(node)} cannot be written as it is called ({error})") from error

    def _convolution(self, node: fx.Node, module: nn.Conv2d | nn.ConvTranspose2d, x: str) -> str:
        """A convolution together with the BatchNorm behind it, if nothing else reads its output."""
        weight, bias = _array(module.weight).astype(np.float64), np.zeros(module.out_channels)
        if module.bias is not None:
            bias = _array(module.bias).astype(np.float64)
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_module":
            norm = self.modules[str(users[0].target)]
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
                scale, shift = _affine(norm)
                weight, bias = _times(module, weight, scale), bias * scale + shift
                self.folded.add(users[0])
        kernel, offset = weight.astype(np.float32), bias.astype(np.float32)
        stride, dilation = _pair(module.stride), _pair(module.dilation)
        if isinstance(module, nn.ConvTranspose2d):
            return self.graph.conv_transposed(
                x,
                kernel,
                offset,
                stride,
                _pair(module.padding),
                _pair(module.output_padding),
                module.groups,
                dilation,
            )
        if isinstance(module.padding, str):
            raise UserError(f"ONNX: {node.target} has padding {module.padding!r}; give it in pixels")
        x, (down, across) = _bordered(self.graph, module, x)
        sides = (across, across, down, down)
        return self.graph.conv(x, kernel, offset, stride, sides, module.groups, dilation)


def _bordered(graph: ConvGraph, module: nn.Conv2d, x: str) -> tuple[str, tuple[int, int]]:
    """The input of a convolution and the zeros that it pads by itself: other borders become a node."""
    down, across = _pair(module.padding)
    if module.padding_mode == "zeros" or not (down or across):
        return x, (down, across)
    modes = {"reflect": "reflect", "replicate": "edge"}
    if module.padding_mode not in modes:
        raise UserError(f"ONNX: padding mode {module.padding_mode!r} is not known; use zeros or reflect")
    return graph.pad(x, (across, across, down, down), modes[module.padding_mode]), (0, 0)


def _times(module: nn.Module, weight: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """A kernel whose output channels are multiplied by ``scale`` (C,)."""
    if not isinstance(module, nn.ConvTranspose2d):
        return weight * scale[:, None, None, None]
    grouped = weight.reshape(module.groups, -1, *weight.shape[1:])  # (groups, in / groups, out / groups, …)
    return (grouped * scale.reshape(module.groups, 1, -1, 1, 1)).reshape(weight.shape)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().numpy()


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return int(first), int(second)


def _label(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _affine(norm: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(C,) scale and shift of a norm with fixed statistics."""
    mean, var = (_array(t).astype(np.float64) for t in (norm.running_mean, norm.running_var))
    weight = np.ones_like(mean) if norm.weight is None else _array(norm.weight).astype(np.float64)
    bias = np.zeros_like(mean) if norm.bias is None else _array(norm.bias).astype(np.float64)
    scale = weight / np.sqrt(var + norm.eps)
    return scale, bias - mean * scale


def _norm(graph: ConvGraph, norm: Any, x: str) -> str:
    """A BatchNorm by its statistics; an InstanceNorm by those of the image, unless it goes by its own."""
    if norm.running_var is not None and not isinstance(norm, ImageNorm2d):
        scale, shift = _affine(norm)
        return graph.scaled(x, scale.astype(np.float32), shift.astype(np.float32))
    weight = np.ones(norm.num_features, np.float32) if norm.weight is None else _array(norm.weight)
    bias = np.zeros(norm.num_features, np.float32) if norm.bias is None else _array(norm.bias)
    return graph.instance_norm(x, weight, bias, norm.eps)


def _group_norm(graph: ConvGraph, norm: nn.GroupNorm, x: str) -> str:
    weight = np.ones(norm.num_channels, np.float32) if norm.weight is None else _array(norm.weight)
    bias = np.zeros(norm.num_channels, np.float32) if norm.bias is None else _array(norm.bias)
    return graph.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _prelu(graph: ConvGraph, layer: nn.PReLU, x: str) -> str:
    """One slope, or one per channel."""
    positive = graph.pointwise("Relu", x)
    slopes = graph.constant(_array(layer.weight)[:, None, None])
    return graph.add(positive, graph.combine("Mul", graph.combine("Sub", x, positive), slopes))


def _pool(kind: str) -> Callable[[ConvGraph, Any, str], str]:
    def write(graph: ConvGraph, pool: Any, x: str) -> str:
        usual: dict[str, Any] = {"ceil_mode": False, "dilation": 1, "divisor_override": None}
        if any(_pair(pool.padding)):
            usual["count_include_pad"] = True
        found = {name: getattr(pool, name, value) for name, value in usual.items()}
        odd = [f"{name}={value}" for name, value in found.items() if value != usual[name]]
        if odd:
            raise UserError(f"ONNX: {type(pool).__name__} with {', '.join(odd)} is not known; leave it out")
        stride = pool.kernel_size if pool.stride is None else pool.stride
        return graph.window(kind, x, _pair(pool.kernel_size), _pair(stride), _pair(pool.padding))

    return write


def _upsample(graph: ConvGraph, layer: nn.Upsample, x: str) -> str:
    return _interpolate(graph, x, layer.size, layer.scale_factor, layer.mode, layer.align_corners)


def _interpolate(
    graph: ConvGraph,
    x: str,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    **_: Any,
) -> str:
    if scale_factor is None or size is not None:
        raise UserError("ONNX: interpolate needs a scale_factor; a size would fix the size of the images")
    if mode not in ("nearest", "bilinear"):
        raise UserError(f"ONNX: interpolate knows the modes nearest and bilinear; got {mode!r}")
    first, second = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * 2
    kind = "linear" if mode == "bilinear" else "nearest"
    return graph.resize(x, (float(first), float(second)), kind, bool(align_corners))


def _mean(graph: ConvGraph, pool: nn.AdaptiveAvgPool2d, x: str) -> str:
    if pool.output_size not in (1, (1, 1)):
        raise UserError(f"ONNX: AdaptiveAvgPool2d only to 1 pixel; got {pool.output_size}")
    return graph.pointwise("GlobalAveragePool", x)


def _pad(graph: ConvGraph, layer: Any, x: str) -> str:
    modes = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "edge", nn.ZeroPad2d: "constant"}
    return graph.pad(x, tuple(layer.padding), modes[type(layer)])


def _cat(graph: ConvGraph, rows: list[str], dim: int = 0, axis: int | None = None) -> str:
    if (dim if axis is None else axis) not in (1, -3):
        raise UserError("ONNX: only channels (axis 1) are concatenated")
    return graph.concat(list(rows))


def _unary(kind: str, **fixed: Any) -> Callable[..., str]:
    """A function of one value without settings; torch's ``inplace`` means nothing here."""

    def write(graph: ConvGraph, x: str, inplace: bool = False) -> str:
        return graph.pointwise(kind, x, **fixed)

    return write


def _leaky(graph: ConvGraph, x: str, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return graph.pointwise("LeakyRelu", x, alpha=float(negative_slope))


def _nothing(graph: ConvGraph, layer: Any, x: str) -> str:
    """A layer that does nothing in evaluation mode."""
    return x


def _dropout(graph: ConvGraph, x: str, p: float = 0.5, training: bool = False, inplace: bool = False) -> str:
    if training:
        raise UserError("ONNX: dropout with training=True stays random; leave it to the network's mode")
    return x


def _two(kind: str) -> Callable[..., str]:
    return lambda graph, x, y: graph.combine(kind, x, y)


_MODULES: Mapping[type[nn.Module], Callable[[ConvGraph, Any, str], str]] = {
    nn.Conv2d: _nothing,  # written by _Writer, together with the norm behind it
    nn.ConvTranspose2d: _nothing,
    nn.BatchNorm2d: _norm,
    nn.InstanceNorm2d: _norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    nn.ReLU: lambda graph, _, x: graph.pointwise("Relu", x),
    nn.ReLU6: lambda graph, _, x: graph.relu6(x),
    nn.LeakyReLU: lambda graph, layer, x: _leaky(graph, x, layer.negative_slope),
    nn.ELU: lambda graph, layer, x: graph.pointwise("Elu", x, alpha=float(layer.alpha)),
    nn.SiLU: lambda graph, _, x: graph.combine("Mul", x, graph.pointwise("Sigmoid", x)),
    nn.Tanh: lambda graph, _, x: graph.pointwise("Tanh", x),
    nn.Sigmoid: lambda graph, _, x: graph.pointwise("Sigmoid", x),
    nn.Identity: _nothing,
    nn.Dropout: _nothing,
    nn.Dropout2d: _nothing,
    nn.ReflectionPad2d: _pad,
    nn.ReplicationPad2d: _pad,
    nn.ZeroPad2d: _pad,
    nn.Upsample: _upsample,
    nn.PixelShuffle: lambda graph, layer, x: graph.depth_to_space(x, layer.upscale_factor),
    nn.MaxPool2d: _pool("MaxPool"),
    nn.AvgPool2d: _pool("AveragePool"),
    nn.AdaptiveAvgPool2d: _mean,
}
"""Layer → how it is written."""
_FUNCTIONS: Mapping[Any, Callable[..., str]] = {
    torch.cat: _cat,
    F.interpolate: _interpolate,
    F.leaky_relu: _leaky,
    F.dropout: _dropout,
    **{key: _two("Add") for key in (operator.add, operator.iadd, torch.add, "add", "add_")},
    **{key: _two("Sub") for key in (operator.sub, torch.sub, "sub")},
    **{key: _two("Mul") for key in (operator.mul, operator.imul, torch.mul, "mul", "mul_")},
    **{key: _two("Div") for key in (operator.truediv, torch.div, "div")},
    **{key: _unary("Relu") for key in (F.relu, torch.relu, "relu", "relu_")},
    **{key: _unary("Tanh") for key in (F.tanh, torch.tanh, "tanh")},
    **{key: _unary("Sigmoid") for key in (F.sigmoid, torch.sigmoid, "sigmoid")},
}
"""Function or name of a method → how it is written."""
