from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gan.cost import build_cost_model
from gan.data import to_float, to_uint8
from gan.elastic import order_channels
from gan.evaluation import COLUMNS, Judge, count, latency_ms
from gan.fidelity import density_coverage, frechet_distance, kid
from gan.norm_statistics import recompute_statistics
from gan.scoring import run_batched
from tests.gan.conftest import Pair, fake_extractor, tiny_discriminator, tiny_generator, tiny_pairs

WIDTHS = (4, 8, 8, 4, 4)


@pytest.fixture
def judge(pair: Pair) -> Judge:
    return Judge.build(pair.generator, pair.discriminator, tiny_pairs(16, seed=2), fake_extractor())


@pytest.fixture
def small(pair: Pair) -> nn.Module:
    elastic = order_channels(pair.generator, pair.groups["generator"])
    return recompute_statistics(elastic.network(WIDTHS), pair.statistics["generator"])


def test_a_row_has_exactly_the_columns(judge, pair):
    row = judge.row(pair.generator, pair.discriminator)
    assert tuple(row) == COLUMNS
    assert all(math.isfinite(value) for value in row.values())
    assert row["n_images"] == 32
    assert row["latency_ms"] > 0
    for name in ("macs", "params", "discriminator_macs", "n_images"):
        assert type(row[name]) is int


def test_figures_carry_the_name_of_their_extractor(pair):
    judge = Judge.build(pair.generator, pair.discriminator, tiny_pairs(12), fake_extractor("toy"))
    row = judge.row(pair.generator, pair.discriminator)
    assert {"kid_toy", "fid_toy"} <= set(row)
    assert not any("efficientnet" in name for name in row)


def test_the_dense_row_has_no_gaps_but_for_rounding(judge, pair):
    row = judge.row(pair.generator, pair.discriminator)
    for gap in ("crowd_gap", "arrangement_gap", "balance_gap"):
        assert row[gap] == pytest.approx(0, abs=0.01)


def test_a_smaller_pair_is_farther_from_the_dense_one(judge, pair, small):
    dense, row = judge.row(pair.generator, pair.discriminator), judge.row(small, pair.discriminator)
    assert row["balance_gap"] > 0.05
    assert row["crowd_gap"] > 0.05
    assert row["arrangement_gap"] > dense["arrangement_gap"]
    assert row["macs"] < dense["macs"]
    assert row["params"] < dense["params"]
    assert row["discriminator_macs"] == dense["discriminator_macs"]


def test_size_and_cost_are_those_of_the_networks(judge, pair, small):
    groups = pair.groups["generator"]
    cost = build_cost_model(pair.generator, groups, [torch.zeros(1, 3, 8, 8)])
    critic = tiny_discriminator(0, (4, 6))
    row = judge.row(small, critic)
    assert row["macs"] == cost.macs(torch.tensor(WIDTHS).numpy())
    assert row["params"] == sum(p.numel() for p in small.parameters())
    assert row["discriminator_macs"] == 16 * 16 * 6 * 4 + 9 * 16 * 4 * 6 + 4 * 16 * 6


def test_figures_are_measured_on_rounded_outputs_of_all_images_and_flips(judge, pair, small):
    row = judge.row(small, pair.discriminator)
    pairs = tiny_pairs(16, seed=2)
    inputs, targets = pairs.with_flips().tensors()
    made = to_float(to_uint8(run_batched(small, inputs)))
    real, fake = judge.yardstick.extractor(targets), judge.yardstick.extractor(made)
    assert row["kid_efficientnet_lite0"] == pytest.approx(kid(real, fake), abs=1e-6)
    assert row["fid_efficientnet_lite0"] == pytest.approx(frechet_distance(real, fake), abs=1e-6)
    density, coverage = density_coverage(real, fake, k=5)
    assert (row["prdc_density"], row["prdc_coverage"]) == pytest.approx((density, coverage), abs=1e-6)
    error = (made - targets)[:16].double()  # paired figures: the images as they are
    assert row["l1"] == pytest.approx(float(error.abs().mean()), abs=1e-6)
    ratios = [10 * math.log10(4 / float(one.square().mean())) for one in error]
    assert row["psnr"] == pytest.approx(sum(ratios) / 16, abs=1e-5)


class Perfect(nn.Module):
    """Knows the targets by heart."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.numpy().tobytes(): y for x, y in zip(inputs, targets, strict=True)}
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.known[image.numpy().tobytes()] for image in x])


def test_a_perfect_generator_gets_perfect_figures(judge, pair):
    network = Perfect(*tiny_pairs(16, seed=2).with_flips().tensors())
    row = judge.row(network, pair.discriminator)
    assert row["l1"] == pytest.approx(0, abs=1e-6)
    assert row["psnr"] == 100
    assert row["fid_efficientnet_lite0"] == pytest.approx(0, abs=1e-5)
    assert row["kid_efficientnet_lite0"] < 0  # unbiased: below 0 for a set against itself
    assert (row["prdc_density"], row["prdc_coverage"]) == (1.0, 1.0)


def test_judging_is_repeatable(judge, pair, small):
    first, second = (judge.row(small, pair.discriminator) for _ in range(2))
    del first["latency_ms"], second["latency_ms"]
    assert first == second


def test_count():
    generator, image = tiny_generator(), torch.zeros(1, 3, 8, 8)
    macs, params = count(generator, [image])
    assert params == sum(p.numel() for p in generator.parameters())
    down = [(16, 3 * 8), (4, 8 * 12), (1, 12 * 16)]  # output pixels, in × out
    up = [(1, 16 * 12), (4, 24 * 8), (16, 16 * 3)]  # input pixels, in × out
    assert macs == 16 * sum(pixels * channels for pixels, channels in [*down, *up])


def test_latency_runs_on_one_thread_and_gives_the_threads_back():
    seen = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
            return x

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert 0 < latency_ms(Watch(), torch.zeros(1, 3, 8, 8), runs=3) < math.inf
        assert torch.get_num_threads() == 2
        with pytest.raises(TypeError):
            latency_ms(nn.Identity(), torch.zeros(1, 3, 8, 8), runs="3")  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, False)] * 8  # five to warm up
