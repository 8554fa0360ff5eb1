"""What the machine can do; ONNX on the CPU: small graphs, sessions, batches side by side.

The only importer of onnx and onnxruntime; both are imported when first needed.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gan.errors import UserError

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


class ConvGraph:
    """Builds the ONNX graph of a plain convolutional network, node by node.

    Written by hand for frozen networks of a known shape: ``torch.onnx.export`` needs onnxscript and
    seconds (``dynamo=True``) or warns that it will go away (``dynamo=False``).

    Each method takes and returns names of values inside the graph.
    """

    def __init__(self) -> None:
        self._onnx = require("onnx")
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._count = 0
        self._bounds: tuple[str, str] | None = None

    def _name(self) -> str:
        self._count += 1
        return f"value_{self._count}"

    def _constant(self, array: NDArray[Any]) -> str:
        name = self._name()
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        name = self._name()
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def conv(
        self,
        x: str,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        groups: int,
    ) -> str:
        """2-d convolution; ``weight`` (out, in / groups, kH, kW), ``padding`` (left, right, top, bottom)."""
        left, right, top, bottom = padding
        return self._node(
            "Conv",
            [x, self._constant(weight), self._constant(bias)],
            strides=list(stride),
            pads=[top, left, bottom, right],
            group=groups,
            kernel_shape=list(weight.shape[2:]),
        )

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        if self._bounds is None:
            self._bounds = self._constant(np.float32(0)), self._constant(np.float32(6))  # type: ignore[arg-type]
        return self._node("Clip", [x, *self._bounds])

    def add(self, x: str, y: str) -> str:
        """x + y."""
        return self._node("Add", [x, y])

    def pool(self, x: str) -> str:
        """Global average: (N, C, H, W) → (N, C)."""
        return self.flat(self._node("GlobalAveragePool", [x]))

    def flat(self, x: str) -> str:
        """All values of a sample in a row: (N, …) → (N, d)."""
        return self._node("Flatten", [x], axis=1)

    def concat(self, rows: list[str]) -> str:
        """Rows behind each other: (N, d₁), (N, d₂), … → (N, d₁ + d₂ + …)."""
        return self._node("Concat", rows, axis=1)

    def model(self, source: str, inputs: tuple[int, ...], result: str, outputs: tuple[int, ...]) -> bytes:
        """Serialise and check the graph from ``source`` to ``result``; shapes are without the batch axis."""
        helper, kind = self._onnx.helper, self._onnx.TensorProto.FLOAT
        graph = helper.make_graph(
            self._nodes,
            "graph",
            [helper.make_tensor_value_info(source, kind, ["batch", *inputs])],
            [helper.make_tensor_value_info(result, kind, ["batch", *outputs])],
            self._constants,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        self._onnx.checker.check_model(model)
        return model.SerializeToString()
