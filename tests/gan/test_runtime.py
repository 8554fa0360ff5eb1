import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gan.errors import UserError
from gan.runtime import (
    BatchRunner,
    ConvGraph,
    OnnxNetwork,
    mark_layout,
    metadata_of,
    quick_layout,
    require,
    session,
    with_metadata,
)

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
BIAS = RNG.standard_normal(4).astype(np.float32)
DEPTHWISE = RNG.standard_normal((4, 1, 1, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> bytes:
    graph = ConvGraph()
    x = graph.relu6(graph.conv("x", WEIGHT, BIAS, stride=(2, 2), padding=(0, 1, 0, 1), groups=1))
    y = graph.conv(x, DEPTHWISE, BIAS, stride=(1, 1), padding=(0, 0, 0, 0), groups=4)
    return graph.model("x", (3, 8, 8), graph.pool(graph.add(x, y)), (4,))


def eager(images: torch.Tensor) -> torch.Tensor:
    weight, bias, depthwise = map(torch.from_numpy, (WEIGHT, BIAS, DEPTHWISE))
    x = F.relu6(F.conv2d(F.pad(images, (0, 1, 0, 1)), weight, bias, stride=2))
    return (x + F.conv2d(x, depthwise, bias, groups=4)).mean(dim=(2, 3))


def test_a_built_graph_equals_torch(model):
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = session(model).run(None, {"x": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(made), eager(images), atol=1e-5, rtol=1e-5)


def test_a_session_opens_a_file(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    assert session(path, threads=2).run(None, {"x": np.zeros((2, 3, 8, 8), np.float32)})[0].shape == (2, 4)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_batches_and_threads_do_not_matter(model, threads, batch_size):
    images = RNG.standard_normal((11, 3, 8, 8)).astype(np.float32)
    made = BatchRunner(model, threads, batch_size)(images)
    np.testing.assert_allclose(made, eager(torch.from_numpy(images)).numpy(), atol=1e-5, rtol=1e-5)


def test_a_missing_package_is_a_sentence():
    with pytest.raises(UserError, match="pip install no_such_package"):
        require("no_such_package.inner")


def test_thread_and_batch_counts_are_checked(model):
    with pytest.raises(ValueError, match="threads is 0"):
        session(model, threads=0)
    with pytest.raises(ValueError, match="batch_size 0"):
        BatchRunner(model, threads=1, batch_size=0)


def test_a_model_runs_as_a_module(model):
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = OnnxNetwork(model, threads=2).eval()
    assert next(network.parameters()).device.type == "cpu"
    torch.testing.assert_close(network(images), eager(images), atol=1e-5, rtol=1e-5)


def test_metadata_is_added_to_what_is_there(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(with_metadata(with_metadata(model, {"a": "1", "b": "2"}), {"b": "3"}))
    assert metadata_of(path) == {"a": "1", "b": "3"}


def test_operators_by_hand():
    x = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    graph = ConvGraph()
    padded = graph.pad("x", (1, 0, 0, 1), "reflect")
    scaled = graph.scaled(padded, np.array([2.0], np.float32), np.array([1.0], np.float32))
    made = session(graph.model("x", (1, 4, 4), scaled, (1, 5, 5))).run(None, {"x": x})[0]
    expected = 2 * np.pad(x, ((0, 0), (0, 0), (0, 1), (1, 0)), mode="reflect") + 1
    np.testing.assert_array_equal(made, expected)
    graph = ConvGraph()
    raised = graph.conv_transposed(
        "x", np.ones((1, 1, 2, 2), np.float32), np.zeros(1, np.float32), (2, 2), (0, 0), (0, 0), 1
    )
    made = session(graph.model("x", (1, 4, 4), raised, (1, 8, 8))).run(None, {"x": x})[0]
    np.testing.assert_array_equal(made[0, 0], np.kron(x[0, 0], np.ones((2, 2))))


class Merging(nn.Module):
    """Merges channels with rows by ``view``, which only the plain layout allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 8 * 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def laid_out(network: nn.Module) -> bool:
    return network.get_submodule("conv").weight.is_contiguous(memory_format=torch.channels_last)


def test_a_quick_layout_leaves_the_numbers_alone():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 4, 3))
    network.add_module("up", nn.ConvTranspose2d(4, 3, 3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = network(images)
    assert quick_layout(network, amp=False) is network
    assert laid_out(network)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(network(images), plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4), nn.GroupNorm(1, 4), nn.BatchNorm2d(4)])
def test_norms_of_single_images_keep_the_plain_layout_in_float32(norm):
    for amp in (False, True):
        network = nn.Sequential()
        network.add_module("conv", nn.Conv2d(3, 4, 3))
        network.add_module("norm", norm)
        assert laid_out(quick_layout(network, amp)) is (amp or isinstance(norm, nn.BatchNorm2d))


@pytest.mark.gpu
def test_float32_keeps_its_layout_on_the_gpu():
    for amp in (False, True):
        network = nn.Sequential()
        network.add_module("conv", nn.Conv2d(3, 4, 3))
        assert laid_out(quick_layout(network.cuda(), amp)) is amp


def test_code_that_needs_the_plain_layout_keeps_it():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="view"):
        quick_layout(Merging(), amp=False)(images)
    network = mark_layout(Merging(), [images[:1]])
    assert not laid_out(network)
    for amp in (False, True):
        copied = quick_layout(copy.deepcopy(network), amp)
        torch.testing.assert_close(copied(images), network(images))
    other = nn.Sequential()
    other.add_module("conv", nn.Conv2d(3, 4, 3))
    assert laid_out(quick_layout(mark_layout(other, [images[:1]]), amp=False))
