"""Worse images have larger gaps: six levels of known distortions, on the embedded task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from envs.budget import uniform_widths
from envs.rewards import Weights
from gan.distortions import DISTORTIONS, drop_modes, swap
from gan.norm_statistics import recompute_statistics
from gan.scoring import Scorer, Yardstick, run_batched
from gan.tasks import load_task

IMAGES = 64  # with 48 the two lightest levels are at times in the wrong order
LEVELS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
KEEP_RATIOS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.08)
WIDE = (0.9, 0.65, 0.47, 0.34, 0.25, 0.18)
"""Keep ratios nearer to one another; crowds in which background counted did not order such."""

DISTANCES = {"mmd_gap", "real_gap"}
PAIRED = {"l1_gap", "feature_gap", "balance_gap"}
DENSITY = {"crowd_gap", "arrangement_gap"}
ALL = DISTANCES | PAIRED | DENSITY
SEEN: dict[str, set[str]] = {
    "add_noise": ALL,
    "blur": ALL,
    "pull_together": ALL,
    "drop_modes": ALL,
    "swap": PAIRED | DENSITY,
    "width": ALL,
    "wide": {"crowd_gap"},
    "discriminator": {"balance_gap"},
}
"""What makes a pair worse → the gaps that must order its levels.

``width`` and ``wide``: uniform generators; ``discriminator``: the dense one with noise in its weights, beside
the dense generator.
"""

LEAST = 0.9  # Spearman; the gaps of 6 levels may have two neighbours in the wrong order, no more

Gaps = dict[str, float]


def uniform_slice(scorer: Scorer, agent: str, keep_ratio: float) -> nn.Module:
    widths = uniform_widths(scorer.networks[agent], keep_ratio)
    return scorer.slice(agent, tuple(int(width) for width in widths), shared=True)


def noisy_weights(network: nn.Module, level: float) -> nn.Module:
    """A copy with noise on every kernel, in units of the kernel's own standard deviation."""
    draws, noisy = torch.Generator().manual_seed(0), copy.deepcopy(network)
    for weight in noisy.parameters():
        if weight.ndim == 4:
            weight += level * weight.std() * torch.randn(weight.shape, generator=draws)
    return noisy


def gaps_of(yardstick: Yardstick, critic: nn.Module, outputs: Tensor) -> Gaps:
    gaps, _ = yardstick.generator_gaps(outputs)
    return {**gaps, "balance_gap": yardstick.balance_gap(outputs, critic)}


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return load_task().scorer(probe=IMAGES)


@pytest.fixture(scope="module")
def dense(scorer) -> Tensor:
    return scorer.yardstick.outputs


@pytest.fixture(scope="module")
def measured(scorer, dense) -> Mapping[str, Sequence[Gaps]]:
    """What makes a pair worse → its gaps at the six levels, beside the uniform discriminator at 50 %."""
    yardstick, critic = scorer.yardstick, uniform_slice(scorer, "discriminator", 0.5)
    made = {name: [distort(dense, level, 0) for level in LEVELS] for name, distort in DISTORTIONS.items()}
    for name, ratios in (("width", KEEP_RATIOS), ("wide", WIDE)):
        made[name] = [
            run_batched(uniform_slice(scorer, "generator", ratio), yardstick.inputs) for ratio in ratios
        ]
    measured = {
        name: [gaps_of(yardstick, critic, outputs) for outputs in rows] for name, rows in made.items()
    }
    critics = [noisy_weights(yardstick.discriminator, level) for level in LEVELS]
    measured["discriminator"] = [{"balance_gap": yardstick.balance_gap(dense, d)} for d in critics]
    return measured


def order(values: Sequence[float]) -> float:
    return float(spearmanr(range(len(values)), values).statistic)


@pytest.mark.parametrize("name", SEEN)
def test_gaps_grow_with_the_level(measured, name):
    found = {term: [gaps[term] for gaps in measured[name]] for term in sorted(SEEN[name])}
    wrong = {term: values for term, values in found.items() if not order(values) >= LEAST}
    assert not wrong


@pytest.mark.parametrize("name", [name for name in SEEN if name not in ("discriminator", "wide")])
def test_the_weighted_total_grows_with_the_level(measured, name):
    """In units of each gap at the smallest uniform generator, as the reward weighs them."""
    weights, unit = Weights(), measured["width"][-1]
    totals = [sum(weights.of(term) * gaps[term] / unit[term] for term in gaps) for gaps in measured[name]]
    assert order(totals) >= LEAST


def test_garbage_is_worse_for_the_crowd_than_any_good_elastic_generator(scorer, measured):
    yardstick = scorer.yardstick
    task, widths = load_task(), uniform_widths(scorer.networks["generator"], 0.25)
    raw = task.ordered()["generator"].network([int(width) for width in widths], shared=True)
    raw = recompute_statistics(raw, task.statistics_inputs()["generator"])
    gaps, _ = yardstick.generator_gaps(run_batched(raw, yardstick.inputs))
    good = [row["crowd_gap"] for row in measured["width"] if row["crowd_gap"] > 0]
    assert gaps["crowd_gap"] > 2 * max(good)
    assert measured["pull_together"][-1]["crowd_gap"] > gaps["crowd_gap"]  # a full collapse is worst


def test_the_narrowest_discriminator_is_less_balanced_than_a_wide_one(scorer, dense):
    """Of the shipped ones between them, that of 25 % is better than its wider neighbours."""
    wide, narrow = (uniform_slice(scorer, "discriminator", ratio) for ratio in (0.75, 0.08))
    assert scorer.yardstick.balance_gap(dense, narrow) > 1.2 * scorer.yardstick.balance_gap(dense, wide)


def test_distortions_change_nothing_at_level_0_and_depend_on_their_seed_alone(dense):
    few = dense[:8]
    for name, distort in DISTORTIONS.items():
        assert torch.equal(distort(few, 0.0, 0), few), name
        worse = distort(few, 0.5, 3)
        assert torch.equal(worse, distort(few, 0.5, 3)), name
        assert worse.shape == few.shape
        assert worse.abs().max() <= 1
        others = [distort(few, 0.5, seed) for seed in (4, 5, 6)]  # two may pick the same image
        assert (name == "blur") == all(torch.equal(worse, other) for other in others), name


def test_dropped_modes_are_copies_and_each_level_keeps_some_of_the_last(dense):
    def distinct(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    kept = [distinct(drop_modes(dense, level)) for level in LEVELS]
    assert [len(k) for k in kept] == [max(1, IMAGES - round(level * IMAGES)) for level in LEVELS]
    assert all(more < less for less, more in zip([distinct(dense), *kept], kept, strict=False))


def test_a_dropped_mode_becomes_the_nearest_kept_one():
    images = torch.tensor([0.0, 0.1, 1.0, 0.9])[:, None, None, None]
    assert drop_modes(images, 0.5, seed=1).flatten().tolist() in (
        pytest.approx([0.0, 0.0, 1.0, 1.0]),
        pytest.approx([0.0, 0.0, 0.9, 0.9]),
        pytest.approx([0.1, 0.1, 1.0, 1.0]),
        pytest.approx([0.1, 0.1, 0.9, 0.9]),
        pytest.approx([0.0, 0.1, 0.1, 0.1]),
        pytest.approx([0.9, 0.9, 1.0, 0.9]),
    )


def test_swapped_images_are_the_same_set(dense):
    swapped = swap(dense, 1.0)
    assert torch.equal(swapped.flatten(1).sort(dim=0).values, dense.flatten(1).sort(dim=0).values)
    assert not any(torch.equal(a, b) for a, b in zip(swapped, dense, strict=True))


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_other_levels_are_refused(dense, level):
    for distort in DISTORTIONS.values():
        with pytest.raises(ValueError, match="level"):
            distort(dense, level, 0)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"\(N ≥ 1, C, H, W\)"):
        swap(torch.zeros(3, 8, 8), 0.5)
