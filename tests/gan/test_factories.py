from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gan.checkpoints import load_network, recipe_path, save_network, save_tensors
from gan.errors import UserError
from gan.factories import example_inputs, load_factory, make_network, parse_shape
from gan.loop import trainable_copy
from gan.networks import Architecture
from gan.own_task import load_foreign
from gan.slicing import Slicer
from gan.trial_cuts import tried_groups
from tests.gan.conftest import random, randomise
from tests.gan.foreign import SeparableResnet

NAME = "tests.gan.foreign:SeparableResnet"


def says_nothing():
    return nn.Conv2d(3, 3, 1)


def says_network() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def lost_its_weights() -> nn.Module:
    raise FileNotFoundError("no weights.pth here")


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Conv2d(8, 3, 3))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.at.all:make", "cannot be imported"),
        ("tests.gan.foreign:Missing", "has no 'Missing'"),
        ("tests.gan.foreign", "names no factory"),
        ("os:abort", "does not say that it makes a network"),
        (f"{__name__}:says_nothing", r"write def says_nothing\(\) -> nn.Module"),
        ("torch.nn:Conv2d", "must be callable without arguments"),
        (
            f"{__name__}:lost_its_weights",
            r"builds no network \(FileNotFoundError: no weights.pth here, in test_factories.py, line \d+\)",
        ),
        (f"{__name__}:lazy", r"'0.weight' has no shape yet; name the channels of lazy layers"),
    ],
)
def test_a_wrong_factory_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        make_network(name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def make(:\n", r"SyntaxError: .*, in broken_\w+.py, line 1"),
        ("\n1 / 0\n", r"ZeroDivisionError: .*, in broken_\w+.py, line 2"),
    ],
    ids=["syntax", "import"],
)
def test_a_module_that_does_not_run_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, code: str, sentence: str
) -> None:
    name = f"broken_{request.node.callspec.id}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=sentence):
        make_network(f"{name}:make")


def test_a_factory_is_a_class_or_a_function_that_says_so():
    assert load_factory(NAME) is SeparableResnet
    assert isinstance(make_network(f"{__name__}:says_network"), nn.Conv2d)


def test_shapes():
    assert [parse_shape("3x64x32"), parse_shape("5")] == [(3, 64, 32), (5,)]
    assert [x.shape for x in example_inputs([(3, 8, 8), (5,)])] == [(1, 3, 8, 8), (1, 5)]
    for text in ("3x64", "x", "0x8x8", "-3x8x8"):
        with pytest.raises(UserError, match="is no shape"):
            parse_shape(text)


def test_a_pruned_network_is_rebuilt_from_its_recipe(tmp_path: Path):
    dense = randomise(SeparableResnet())
    torch.save(dense.state_dict(), tmp_path / "g.pth")
    network, architecture, notes = load_foreign(NAME, tmp_path / "g.pth", "generator", 32)
    assert architecture == Architecture(NAME, base_width=8, norm="batch", role="generator", trace_size=32)
    assert architecture.is_generator
    assert architecture.dense_widths == (8, 16, 16, 16, 16, 8, 8)
    assert notes == (f"generator: 7 groups of {NAME} can be cut; frozen: image",)
    image = torch.randn(1, 3, 32, 32, generator=random())
    groups = tried_groups(network, [image]).groups
    widths = (3, 8, 5, 16, 1, 4, 8)
    smaller = Slicer(network, groups).network(network.state_dict(), widths)
    path = save_network(tmp_path / "small.safetensors", smaller, architecture.pruned(widths), {})
    found, read, _ = load_network(path)
    assert read == architecture.pruned(widths)
    assert torch.equal(found(image), smaller(image))
    recipe_path(path).write_text(recipe_path(path).read_text().replace("SeparableResnet", "StarGenerator"))
    with pytest.raises(UserError, match="does not run on inputs of 3x32x32"):
        load_network(path)


def test_weights_of_another_network_are_refused(tmp_path: Path):
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "g.pth")
    with pytest.raises(UserError, match=r"do not fit the network of tests\.gan\.foreign:Separable"):
        load_foreign(NAME, tmp_path / "g.pth", "generator", 32)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path):
    dense = randomise(SeparableResnet())
    next(dense.parameters()).data[0] = float("nan")
    save_tensors(tmp_path / "g.safetensors", dense.state_dict())
    with pytest.raises(UserError, match=r"g\.safetensors holds values in .* that are no finite numbers"):
        load_foreign(NAME, tmp_path / "g.safetensors", "generator", 32)


class ViewedGates(nn.Module):
    """Gates on pixels, by a ``view`` that merges channels with rows: runs in the plain layout alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 3, 3, padding=1)
        self.gates = nn.Parameter(torch.ones(3 * 16 * 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.second(self.first(x).relu())
        return torch.tanh((made.view(len(x), -1) * self.gates).view(x.shape))


def test_a_network_that_needs_the_plain_layout_is_scored_and_trained_in_it(tmp_path: Path):
    name = f"{__name__}:ViewedGates"
    network, architecture, _ = load_foreign(name, None, "generator", 16)
    images = torch.randn(2, 3, 16, 16, generator=random())
    cut = architecture.pruned((4,)).build()
    path = save_network(tmp_path / "small.safetensors", cut, architecture.pruned((4,)), {})
    read, _, _ = load_network(path)
    sliced = Slicer(network, tried_groups(network, [images]).groups).network(network.state_dict(), (4,), True)
    for one in (network, architecture.build(), cut, read, sliced):
        made = trainable_copy(one, amp=False)(images)
        torch.testing.assert_close(made, one(images))
        made.sum().backward()
    with pytest.raises(RuntimeError, match="view"):
        trainable_copy(ViewedGates(), amp=False)(images)


class ImageInADict(SeparableResnet):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"image": super().forward(x)}


def test_a_generator_hands_back_one_image():
    with pytest.raises(UserError, match=r"makes a dict of \[\(1, 3, 32, 32\)\] .* must make one image"):
        load_foreign(f"{__name__}:ImageInADict", None, "generator", 32)


def test_a_generator_with_labels_is_no_task():
    with pytest.raises(UserError, match="StarGenerator does not run on inputs of 8x32x32"):
        load_foreign("tests.gan.foreign:StarGenerator", None, "generator", 32)


def test_the_recipes_of_other_networks_stay_as_they_were():
    assert not {"role", "trace_size"} & set(Architecture("unet_64").to_dict())
