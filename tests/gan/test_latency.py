from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gan.cost import CostModel, build_cost_model
from gan.errors import UserError
from gan.groups import CONVOLUTIONS, find_groups
from gan.latency import (
    LatencyTable,
    LayerTable,
    calibrate,
    check_prediction,
    measure_latency,
    monotone,
    random_widths,
    read_latency,
    write_latency,
)
from gan.networks import Architecture
from gan.stopwatch import time_once
from tests.gan.conftest import tiny_discriminator, tiny_generator

IMAGE = torch.zeros(1, 3, 8, 8)
MULTIPLE = 4


class FakeTimer:
    """0.01 ms a module that runs and a time per multiply-accumulate; counts its calls."""

    def __init__(self, per_mac: float = 1e-6) -> None:
        self.per_mac, self.calls = per_mac, 0

    def __call__(self, module: nn.Module, inputs: Sequence[Tensor]) -> float:
        self.calls += 1
        spent = 0.0
        hooks = []

        def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            nonlocal spent
            spent += 0.01
            if isinstance(module, CONVOLUTIONS):
                pixels = args[0] if isinstance(module, nn.ConvTranspose2d) else out
                area = module.kernel_size[0] * module.kernel_size[1]
                positions = pixels.shape[-1] * pixels.shape[-2]
                spent += self.per_mac * positions * area * module.in_channels * module.out_channels

        for part in module.modules():
            if next(part.children(), None) is None:
                hooks.append(part.register_forward_hook(note))
        with torch.no_grad():
            module(*inputs)
        for hook in hooks:
            hook.remove()
        return spent


def measured(network: nn.Module, image: Tensor, multiple: int = MULTIPLE, **options: object) -> CostModel:
    """A cost model with a table by the fake clock, each point once."""
    groups = find_groups(network, [image])
    options = {"timer": FakeTimer(), "rounds": 1, "runs": 1, **options}
    table = measure_latency(network, groups, [image], multiple, **options)  # type: ignore[arg-type]
    return build_cost_model(network, groups, [image]).with_latency(table)


@pytest.fixture(scope="module")
def generator() -> nn.Module:
    return tiny_generator()


@pytest.fixture(scope="module")
def cost(generator: nn.Module) -> CostModel:
    return measured(generator, IMAGE)


def one_layer(
    grid_in: Sequence[int], grid_out: Sequence[int], milliseconds: Sequence[Sequence[float]]
) -> LayerTable:
    return LayerTable(np.array(grid_in), np.array(grid_out), np.array(milliseconds, dtype=np.float64))


def test_bilinear_by_hand():
    layer = one_layer([2, 4, 8], [1, 3], [[1, 2], [3, 6], [3, 10]])
    table = LatencyTable((layer,), scale=2.0, overhead_ms=0.5)
    dense_ms = 0.5 + 2 * 10

    def read(w_in: int, w_out: int) -> float:
        value = float(table.milliseconds(np.array([w_in]), np.array([w_out])))
        return value - 1e-4 * dense_ms * ((w_in + w_out) / 11 - 1)  # without the even slope

    assert read(8, 3) == pytest.approx(20.5)
    assert read(2, 1) == pytest.approx(2.5)
    assert read(3, 1) == pytest.approx(0.5 + 2 * 2)
    assert read(3, 2) == pytest.approx(0.5 + 2 * (1 + 2 + 3 + 6) / 4)
    assert read(6, 3) == pytest.approx(0.5 + 2 * 8)
    assert read(1, 1) == pytest.approx(read(2, 1))  # beyond the grid its edge counts


def test_layers_are_summed_over_any_leading_axes():
    layers = (one_layer([3], [2, 6], [[1, 5]]), one_layer([2, 6], [1], [[2], [4]]))
    table = LatencyTable(layers, 1.0, 0.0)
    widths = np.array([[2, 4, 6], [6, 4, 2]])
    many = table.milliseconds(
        np.stack([np.full_like(widths, 3), widths], -1), np.stack([widths, np.ones_like(widths)], -1)
    )
    assert many.shape == (2, 3)
    np.testing.assert_allclose(many[0], [3, 6, 9], rtol=1e-3)
    assert many[0].tolist() == many[1, ::-1].tolist()
    assert many[0, 2] == pytest.approx(9, rel=1e-12)  # the slope leaves the dense network alone


def test_one_disturbed_point_does_not_raise_all_larger_ones():
    clean = np.array([[1.0, 2, 3], [2, 4, 6], [3, 6, 9]])
    assert np.array_equal(monotone(clean), clean)
    noisy = clean.copy()
    noisy[0, 0] = 7.0
    flattened = monotone(noisy)
    assert (np.diff(flattened, axis=0) >= 0).all()
    assert (np.diff(flattened, axis=1) >= 0).all()
    assert flattened[2, 2] == 9
    assert flattened[1, 1] < 7
    random = np.random.default_rng(0)
    for _ in range(20):
        values = monotone(random.uniform(size=(4, 5)))
        assert (np.diff(values, axis=0) >= 0).all()
        assert (np.diff(values, axis=1) >= 0).all()


def test_every_increment_costs_more_even_where_the_table_is_flat(generator, cost):
    flat = replace(
        cost.latency,
        layers=tuple(
            replace(layer, milliseconds=np.full_like(layer.milliseconds, 0.1))
            for layer in cost.latency.layers
        ),
    )
    random = np.random.default_rng(0)
    for model in (cost, replace(cost, latency=flat)):
        for widths in random_widths(find_groups(generator, [IMAGE]), MULTIPLE, 10, random):
            base = float(model.of("latency", widths))
            assert base > 0
            for group in range(len(widths)):
                wider = widths.copy()
                wider[group] += 1
                if wider[group] <= model.dense[group]:
                    assert float(model.of("latency", wider)) > base * (1 + 1e-9)


def test_the_dense_and_the_smallest_network_are_met(generator, cost):
    clock = FakeTimer()
    smallest = tiny_generator(widths=[MULTIPLE] * 5)
    assert float(cost.of("latency", cost.dense)) == pytest.approx(clock(generator, [IMAGE]), rel=1e-9)
    assert float(cost.of("latency", np.full(5, MULTIPLE))) == pytest.approx(
        clock(smallest, [IMAGE]), rel=1e-3
    )


@pytest.mark.parametrize(
    ("build", "image"),
    [
        (tiny_generator, IMAGE),
        (tiny_discriminator, torch.zeros(1, 6, 8, 8)),
        (Architecture("resnet_6blocks", base_width=8, norm="instance").build, torch.zeros(1, 3, 16, 16)),
    ],
    ids=["unet", "patch", "resnet"],
)
def test_the_table_predicts_sliced_networks(build, image):
    network = build().eval()
    groups = find_groups(network, [image])
    model = measured(network, image)
    plans = random_widths(groups, MULTIPLE, 12, np.random.default_rng(0))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    checked = check_prediction(network, groups, [image], model, plans, timer=FakeTimer(), rounds=1, runs=1)
    # That clock is bilinear in the widths, as the table is: what is left are the norms and joints.
    assert checked.error < 0.02
    assert checked.rank_correlation > 0.95
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_random_widths_are_allowed(generator):
    groups = find_groups(generator, [IMAGE])
    plans = random_widths(groups, 5, 40, np.random.default_rng(0))
    channels = np.array([group.channels for group in groups])
    assert plans.shape == (40, 5)
    assert ((plans % 5 == 0) | (plans == channels)).all()
    assert ((plans >= 5) & (plans <= channels)).all()
    assert len(np.unique(plans, axis=0)) > 10


def test_layers_of_one_geometry_are_timed_once():
    network = Architecture("resnet_6blocks", base_width=4).build().eval()
    image = torch.zeros(1, 3, 16, 16)
    clock = FakeTimer()
    table = measured(network, image, timer=clock, points=2).latency
    distinct = {id(layer): layer for layer in table.layers}.values()
    assert len(table.layers) == 18
    assert len(distinct) < 10
    points = sum(layer.milliseconds.size for layer in distinct)
    assert clock.calls == 2 * (points + 2)  # one to warm up, one that counts; two whole networks
    dense = (table.layers[0].widths_in[-1], table.layers[-1].widths_out[-1])
    assert dense == (3, 3)


def test_calibration():
    assert calibrate((10.0, 1.0), (22.0, 4.0)) == (2.0, 2.0)
    assert calibrate((11.0, 1.0), (21.0, 1.0)) == (2.0, -1.0)
    assert calibrate((10.0, 1.0), (5.0, 6.0)) == (0.5, 0.0)  # a negative scale is none
    assert calibrate((3.0, 3.0), (6.0, 6.0)) == (2.0, 0.0)


def test_the_file_gives_the_same_numbers(cost, tmp_path):
    path = write_latency(tmp_path / "latency.json", {"generator": cost.latency})
    again = read_latency(path)["generator"]
    random = np.random.default_rng(0)
    widths = random.integers(4, 9, size=(20, 5))
    assert np.array_equal(replace(cost, latency=again).of("latency", widths), cost.of("latency", widths))
    assert again.conditions == cost.latency.conditions
    assert again.conditions["threads"] == 1
    assert again.conditions["torch"] == torch.__version__


def test_files_that_are_none_are_refused(cost, tmp_path):
    path = tmp_path / "latency.json"
    with pytest.raises(UserError, match="does not exist"):
        read_latency(path)
    whole = json.loads(write_latency(path, {"generator": cost.latency}).read_text())
    torn = json.loads(json.dumps(whole))
    torn["networks"]["generator"]["tables"][1]["milliseconds"].pop()
    for text in (json.dumps(whole)[:200], "[]", json.dumps({**whole, "format": 2}), json.dumps(torn)):
        path.write_text(text)
        with pytest.raises(UserError, match="is no latency table"):
            read_latency(path)


def test_a_table_of_another_network_is_refused(cost):
    other = tiny_generator(widths=(8, 12, 20, 12, 8))
    model = build_cost_model(other, find_groups(other, [IMAGE]), [IMAGE])
    with pytest.raises(UserError, match="measure it again"):
        model.with_latency(cost.latency)
    with pytest.raises(ValueError, match="no latency table"):
        model.of("latency", model.dense)


def test_the_clock_counts_without_gradients():
    layer = nn.Conv2d(3, 3, 1)
    kept = []
    layer.register_forward_hook(lambda _m, _a, out: kept.append(out.requires_grad))
    assert time_once(layer, [IMAGE]) > 0
    assert kept == [False]
