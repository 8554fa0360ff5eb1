"""What the machine can do; ONNX on the CPU: small graphs, sessions, batches side by side.

The only importer of onnx and onnxruntime; both are imported when first needed.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gan.errors import UserError

Network = TypeVar("Network", bound=nn.Module)
PLAIN_LAYOUT = "plain_layout"
"""Attribute of a network whose kernels stay as they are."""
OPSET = 17
IR_VERSION = 8  # the first that knows opset 17; older runtimes refuse newer files


def require(package: str) -> ModuleType:
    """Import an optional module by its dotted name.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.split(".")[0]
        raise UserError(f"the package {top!r} is missing ({error}); install it: pip install {top}") from error


def default_threads() -> int:
    """The thread count that torch was told (``OMP_NUM_THREADS``, ``torch.set_num_threads``), ≥ 1."""
    return torch.get_num_threads()


def bfloat16_pays(device: torch.device) -> bool:
    """True where the processor multiplies bfloat16 natively; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def quick_layout(network: Network, amp: bool) -> Network:
    """Lay a network's kernels out as its convolutions are quickest, in place; the numbers stay.

    ``channels_last`` is quicker wherever it runs in bfloat16, and on the CPU in float32 too: a step of
    finetuning and a scored plan take a tenth less time with AVX2. Not so with instance norms, which copy
    every map back: the residual generator's step takes a seventh more (docs/results.md, "Speed").

    Args:
        network: on the device where it will run.
        amp: whether it runs in bfloat16.
    """
    if getattr(network, PLAIN_LAYOUT, False):
        return network
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    copies = any(isinstance(module, nn.InstanceNorm2d | nn.GroupNorm) for module in network.modules())
    pays = amp or (device.type == "cpu" and not copies)
    return network.to(memory_format=torch.channels_last) if pays else network


def frozen_copy(network: Network, amp: bool) -> Network:
    """A copy that is asked and never trained, laid out for quick convolutions; in evaluation mode."""
    return quick_layout(copy.deepcopy(network).eval().requires_grad_(False), amp)


def mark_layout(network: Network, inputs: Sequence[Tensor]) -> Network:
    """Keep :func:`quick_layout` from a network that does not run so, and return it.

    Code that merges channels with rows by ``view`` needs the plain layout; of networks that are not ours
    nobody knows that before they run.

    Args:
        network: that runs on the inputs in its plain layout.
        inputs: example inputs, one tensor per argument of ``forward``.
    """
    try:
        with torch.no_grad():
            copy.deepcopy(network).eval().to(memory_format=torch.channels_last)(*inputs)
    except Exception:  # the network is anybody's
        setattr(network, PLAIN_LAYOUT, True)  # copies and slices take it with them
    return network


def session(model: bytes | Path, threads: int = 1) -> Any:
    """Open an ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: a serialised ONNX model or the path of one.
        threads: threads that work inside one operator, ≥ 1.

    Raises:
        UserError: if onnxruntime is missing.
        ValueError: if ``threads`` is below 1.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; it must be at least 1")
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # Idle workers would spin on the cores that torch needs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class BatchRunner:
    """A model with one input and one output, run on batches side by side, one thread each.

    Whole batches scale over cores better than the threads inside an operator do (EfficientNet-Lite0,
    160 images, 2 cores: 197 ms against 222 ms), and as every batch is computed by one thread the
    result does not depend on ``threads``.

    Args:
        model: serialised ONNX model whose first axis is the batch.
        threads: batches in flight, ≥ 1.
        batch_size: rows a batch, ≥ 1; small batches stay in the cache.
    """

    def __init__(self, model: bytes | Path, threads: int, batch_size: int = 8) -> None:
        if threads < 1 or batch_size < 1:
            raise ValueError(f"threads is {threads}, batch_size {batch_size}; both must be at least 1")
        self.threads = threads
        self.batch_size = batch_size
        self._session = session(model)
        self._input = self._session.get_inputs()[0].name

    def _run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run(None, {self._input: batch})[0]

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map (N, …) to (N, …), N ≥ 1."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if self.threads == 1 or len(batches) == 1:
            return np.concatenate([self._run(batch) for batch in batches])
        # A pool per call costs 0.1 ms and leaves no thread behind for a fork to lose.
        with ThreadPoolExecutor(self.threads) as pool:
            return np.concatenate(list(pool.map(self._run, batches)))


class OnnxNetwork(nn.Module):
    """An ONNX model with one input and one output as a module: it runs where a network of torch would.

    Args:
        model: a serialised model or the path of one.
        threads: threads that work inside one operator, ≥ 1.
    """

    def __init__(self, model: bytes | Path, threads: int = 1) -> None:
        super().__init__()
        self._session = session(model, threads)
        self._input = self._session.get_inputs()[0].name
        # Programs ask a network's parameters for its device.
        self.place = nn.Parameter(torch.zeros(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, …) float32 on the CPU → (N, …)."""
        return torch.from_numpy(self._session.run(None, {self._input: x.numpy()})[0])


class ConvGraph:
    """Builds the ONNX graph of a convolutional network, node by node.

    Written by hand for frozen networks: ``torch.onnx.export`` needs onnxscript and seconds
    (``dynamo=True``) or warns that it will go away (``dynamo=False``).

    Each method takes and returns names of values inside the graph: ``scope/Operator_number``.

    Args:
        half: constants and arithmetic in fp16; what comes in and goes out stays float32.

    Attributes:
        scope: where the next nodes belong, such as a module's name; the runtime keeps it in its profiles.
    """

    def __init__(self, half: bool = False) -> None:
        self._onnx = require("onnx")
        self._half = half
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._count = 0
        self._bounds: tuple[str, str] | None = None
        self.scope = ""

    def _name(self) -> str:
        self._count += 1
        return f"value_{self._count}"

    def constant(self, array: NDArray[Any]) -> str:
        """A fixed value, in the graph's precision."""
        name = self._name()
        array = np.asarray(array)
        if self._half and array.dtype == np.float32:
            array = array.astype(np.float16)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        self._count += 1
        name = f"{self.scope}/{kind}_{self._count}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def conv(
        self,
        x: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        groups: int,
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        """2-d convolution; ``weight`` (out, in / groups, kH, kW), ``padding`` (left, right, top, bottom)."""
        left, right, top, bottom = padding
        return self._node(
            "Conv",
            [x, self.constant(weight), self.constant(bias)],
            strides=list(stride),
            pads=[top, left, bottom, right],
            group=groups,
            dilations=list(dilation),
            kernel_shape=list(weight.shape[2:]),
        )

    def conv_transposed(
        self,
        x: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int],
        groups: int,
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        """2-d transposed convolution; ``weight`` (in, out / groups, kH, kW), paddings (height, width)."""
        return self._node(
            "ConvTranspose",
            [x, self.constant(weight), self.constant(bias)],
            strides=list(stride),
            pads=[*padding, *padding],
            output_padding=list(output_padding),
            group=groups,
            dilations=list(dilation),
            kernel_shape=list(weight.shape[2:]),
        )

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        if self._bounds is None:
            self._bounds = self.constant(np.float32(0)), self.constant(np.float32(6))  # type: ignore[arg-type]
        return self._node("Clip", [x, *self._bounds])

    def pointwise(self, kind: str, x: str, **attributes: Any) -> str:
        """An operator of one input that ONNX knows by this name, such as ``Relu`` or ``Tanh``."""
        return self._node(kind, [x], **attributes)

    def add(self, x: str, y: str) -> str:
        """x + y."""
        return self.combine("Add", x, y)

    def combine(self, kind: str, x: str | float, y: str | float) -> str:
        """``Add``, ``Sub``, ``Mul`` or ``Div`` of two values, one of which may be a plain number."""
        names = [v if isinstance(v, str) else self.constant(np.float32(v)) for v in (x, y)]  # type: ignore[arg-type]
        return self._node(kind, names)

    def scaled(self, x: str, scale: NDArray[np.float32], shift: NDArray[np.float32]) -> str:
        """scale · x + shift per channel, both (C,)."""
        product = self._node("Mul", [x, self.constant(scale[:, None, None])])
        return self._node("Add", [product, self.constant(shift[:, None, None])])

    def instance_norm(
        self, x: str, scale: NDArray[np.float32], shift: NDArray[np.float32], epsilon: float
    ) -> str:
        """Every channel of every image to mean 0 and variance 1, then scale · x + shift, both (C,).

        In float32 even when all else is fp16: sums over an image leave the range of fp16.
        """
        half, self._half = self._half, False
        x = self._cast(x, "FLOAT") if half else x
        made = self._node(
            "InstanceNormalization", [x, self.constant(scale), self.constant(shift)], epsilon=epsilon
        )
        self._half = half
        return self._cast(made, "FLOAT16") if half else made

    def group_norm(
        self, x: str, groups: int, scale: NDArray[np.float32], shift: NDArray[np.float32], epsilon: float
    ) -> str:
        """Every group of channels to mean 0 and variance 1, then scale · x + shift per channel, both (C,).

        Groups as the channels of an instance norm: opset 17 has no group norm.
        """
        rows = self._node("Reshape", [x, self.constant(np.array([0, groups, -1], dtype=np.int64))])
        one = np.ones(groups, np.float32)
        even = self.instance_norm(rows, one, np.zeros_like(one), epsilon)
        return self.scaled(self._node("Reshape", [even, self._node("Shape", [x])]), scale, shift)

    def pad(self, x: str, padding: tuple[int, int, int, int], mode: str, value: float = 0.0) -> str:
        """Pad an image by (left, right, top, bottom) pixels; ``mode`` constant, reflect or edge."""
        left, right, top, bottom = padding
        pads = self.constant(np.array([0, 0, top, left, 0, 0, bottom, right], dtype=np.int64))
        return self._node("Pad", [x, pads, self.constant(np.array(value, dtype=np.float32))], mode=mode)

    def pool(self, x: str) -> str:
        """Global average: (N, C, H, W) → (N, C)."""
        return self.flat(self._node("GlobalAveragePool", [x]))

    def window(
        self, kind: str, x: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> str:
        """``MaxPool`` or ``AveragePool``; a padded border counts in the average."""
        more = {"count_include_pad": 1} if kind == "AveragePool" else {}
        return self._node(
            kind,
            [x],
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=[*padding, *padding],
            **more,
        )

    def resize(self, x: str, scale: tuple[float, float], mode: str, corners: bool = False) -> str:
        """Enlarge (height, width) by factors, as torch does; ``mode`` nearest or linear.

        Args:
            corners: the corners of both images coincide (only for linear).
        """
        scales = np.array([1.0, 1.0, *scale], dtype=np.float32)
        half, self._half = self._half, False  # factors are float32 by definition
        name = self.constant(scales)
        self._half = half
        coordinates = "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"
        more = {"nearest_mode": "floor"} if mode == "nearest" else {}
        return self._node(
            "Resize", [x, "", name], mode=mode, coordinate_transformation_mode=coordinates, **more
        )

    def depth_to_space(self, x: str, block: int) -> str:
        """(N, C · block², H, W) → (N, C, H · block, W · block), channel by channel."""
        return self._node("DepthToSpace", [x], blocksize=block, mode="CRD")

    def flat(self, x: str) -> str:
        """All values of a sample in a row: (N, …) → (N, d)."""
        return self._node("Flatten", [x], axis=1)

    def concat(self, rows: list[str]) -> str:
        """Channels behind each other: (N, d₁, …), (N, d₂, …), … → (N, d₁ + d₂ + …, …)."""
        return self._node("Concat", rows, axis=1)

    def _cast(self, x: str, kind: str) -> str:
        return self._node("Cast", [x], to=getattr(self._onnx.TensorProto, kind))

    def start(self, source: str) -> str:
        """The value inside the graph that comes in under this name."""
        return self._cast(source, "FLOAT16") if self._half else source

    def model(
        self, source: str, inputs: tuple[int | str, ...], result: str, outputs: tuple[int | str, ...]
    ) -> bytes:
        """Serialise and check the graph from ``source`` to ``result``, which goes out as ``output``.

        Shapes are without the batch axis; a word in place of a number is a size that stays free.
        """
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        last = self._onnx.helper.make_node(
            "Cast" if self._half else "Identity", [result], ["output"], **({"to": kind} if self._half else {})
        )
        graph = helper.make_graph(
            [*self._nodes, last],
            "graph",
            [helper.make_tensor_value_info(source, kind, ["batch", *inputs])],
            [helper.make_tensor_value_info("output", kind, ["batch", *outputs])],
            self._constants,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        self._onnx.checker.check_model(model)
        return model.SerializeToString()


def with_metadata(model: bytes, metadata: Mapping[str, str]) -> bytes:
    """The same serialised model with these keys in its metadata."""
    onnx = require("onnx")
    proto = onnx.load_model_from_string(model)
    known = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, {**known, **metadata})
    return proto.SerializeToString()


def metadata_of(model: bytes | Path) -> dict[str, str]:
    """Metadata of a serialised model or of a file."""
    return dict(session(model).get_modelmeta().custom_metadata_map)
