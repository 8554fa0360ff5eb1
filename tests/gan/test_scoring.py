from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gan import scoring
from gan.append_log import LogMismatch
from gan.balance import balance_gap
from gan.checkpoints import state_hash, tensors_hash
from gan.cost import build_cost_model
from gan.data import PairedImages
from gan.elastic import ElasticNetwork
from gan.evaluations import FAMILIES, CountedScorer, EvaluationLog
from gan.losses import paired_input
from gan.norm_statistics import recompute_statistics
from gan.plans import Plan
from gan.runtime import frozen_copy, quick_layout
from gan.scoring import PairAgent, Scorer, Yardstick, run_batched
from tests.gan.conftest import Pair, fake_extractor, make_pair, random, tiny_discriminator, tiny_generator

DENSE = Plan.of({"generator": (8, 12, 16, 12, 8), "discriminator": (8, 12)}, "l1")
SMALL = Plan.of({"generator": (4, 8, 8, 4, 4), "discriminator": (4, 6)}, "l1")


def yardstick_of(
    pair: Pair, pairs: PairedImages | None = None, name: str = "efficientnet_lite0"
) -> Yardstick:
    return Yardstick(pair.generator, pair.discriminator, pairs or pair.pairs, fake_extractor(name))


def scorer_of(
    pair: Pair,
    yardstick: Yardstick | None = None,
    elastic: dict[str, ElasticNetwork] | None = None,
    cache: int = 8,
) -> Scorer:
    elastic = elastic or pair.ordered()
    agents = {
        agent: PairAgent(
            elastic[agent],
            build_cost_model(network, pair.groups[agent], [pair.statistics[agent][:1]]),
            pair.statistics[agent],
        )
        for agent, network in (("generator", pair.generator), ("discriminator", pair.discriminator))
    }
    return Scorer(
        agents["generator"],
        agents["discriminator"],
        yardstick or yardstick_of(pair),
        multiples={"generator": 4, "discriminator": 2},
        cache=cache,
    )


@pytest.fixture
def yardstick(pair: Pair) -> Yardstick:
    return yardstick_of(pair)


@pytest.fixture
def scorer(pair: Pair) -> Scorer:
    return scorer_of(pair)


def test_the_dense_outputs_have_no_gap(pair, yardstick):
    gaps, diagnostics = yardstick.generator_gaps(yardstick.outputs)
    assert set(gaps) == set(FAMILIES) - {"balance_gap", "recovery_gap"}
    assert gaps == dict.fromkeys(gaps, 0.0)
    assert diagnostics == {"arrangement_mean": 0.0}
    discriminator = frozen_copy(pair.discriminator, amp=False)  # as the scorer holds it
    assert yardstick.balance_gap(yardstick.outputs, discriminator) == 0.0


def test_other_outputs_have_every_gap(pair, yardstick):
    outputs = run_batched(tiny_generator(9), yardstick.inputs)
    gaps, _ = yardstick.generator_gaps(outputs)
    assert all(gap > 0 for term, gap in gaps.items() if term != "real_gap")
    assert yardstick.balance_gap(outputs, pair.discriminator) > 0
    assert yardstick.balance_gap(yardstick.outputs, tiny_discriminator(9)) > 0


def test_gaps_by_hand(yardstick):
    outputs = (yardstick.outputs * 0.5).clone()
    gaps, _ = yardstick.generator_gaps(outputs)
    assert gaps["l1_gap"] == pytest.approx(float(yardstick.outputs.abs().mean()) / 2)
    features = yardstick.extractor(outputs)
    distances = [float((a - b).norm()) for a, b in zip(features, yardstick.features, strict=True)]
    middle = yardstick.features.mean(0)
    spread = sum(float((row - middle).norm()) for row in yardstick.features) / 12
    assert gaps["feature_gap"] == pytest.approx(sum(distances) / 12 / spread)


def test_the_balance_is_that_of_all_five_kinds_of_logits(pair, yardstick):
    critic, outputs = tiny_discriminator(9), run_batched(tiny_generator(9), yardstick.inputs)
    judged = [
        run_batched(network, paired_input(yardstick.inputs, images))
        for network, images in (
            (pair.discriminator, yardstick.targets),
            (pair.discriminator, yardstick.outputs),
            (pair.discriminator, outputs),
            (critic, yardstick.targets),
            (critic, outputs),
        )
    ]
    wanted = balance_gap(*judged)
    assert yardstick.balance_gap(outputs, critic) == pytest.approx(wanted)
    known = yardstick.logits_on_real(critic)
    assert yardstick.balance_gap(outputs, critic, known) == pytest.approx(wanted)
    assert yardstick.balance_gap(outputs, critic, known, judged[2]) == pytest.approx(wanted)


def test_the_real_images_are_no_farther_from_themselves(yardstick):
    gaps, _ = yardstick.generator_gaps(yardstick.targets)
    assert gaps["real_gap"] == 0.0  # nearer to the real ones than the dense outputs are: no gap
    assert yardstick.dense_to_real > 0
    assert gaps["mmd_gap"] > 0


def test_known_features_are_not_computed_again(yardstick):
    outputs = run_batched(tiny_generator(9), yardstick.inputs)
    look = yardstick.extractor.look(outputs)
    wanted = yardstick.generator_gaps(outputs)
    yardstick.extractor = None  # type: ignore[assignment]
    assert yardstick.generator_gaps(outputs, look) == wanted


def test_more_noise_is_a_larger_gap(yardstick):
    noise = torch.randn(yardstick.outputs.shape, generator=random())
    rows = [
        yardstick.generator_gaps((yardstick.outputs + level * noise).clamp(-1, 1))[0]
        for level in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
    ]
    for term in ("mmd_gap", "l1_gap", "feature_gap"):
        found = [row[term] for row in rows]
        assert found == sorted(found), term
        assert len(set(found)) == len(found), term


def shuffled(pairs: PairedImages, order: Tensor) -> PairedImages:
    return PairedImages(
        pairs.inputs[order], pairs.targets[order], tuple(pairs.names[i] for i in order.tolist())
    )


def test_gaps_do_not_depend_on_the_order_of_the_images(pair):
    """The probe is the same set, in another order."""
    order = torch.randperm(12, generator=random(3))
    wanted = scorer_of(pair).score(SMALL).gaps
    found = scorer_of(pair, yardstick_of(pair, shuffled(pair.pairs, order))).score(SMALL).gaps
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_outputs_do_not_depend_on_the_batch(pair, yardstick):
    inputs = yardstick.inputs
    for size in (1, 5, 12):
        torch.testing.assert_close(run_batched(pair.generator, inputs, size), yardstick.outputs)
    network = scorer_of(pair).slice("generator", SMALL["generator"])
    whole, _ = yardstick.generator_gaps(run_batched(network, inputs))
    alone, _ = yardstick.generator_gaps(run_batched(network, inputs, 1))
    assert alone == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert not run_batched(tiny_generator(), inputs, 5).requires_grad


@pytest.mark.parametrize("size", [1, 5])
def test_no_gap_depends_on_the_batch(pair, monkeypatch, size):
    """The balance neither: four passes of discriminators go into it."""
    wanted = scorer_of(pair).score(SMALL).gaps
    monkeypatch.setattr(scoring, "run_batched", lambda network, inputs: run_batched(network, inputs, size))
    found = scorer_of(pair, yardstick_of(pair)).score(SMALL).gaps
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert found["balance_gap"] > 1e-3


def test_the_whole_plan_has_no_gap_when_its_statistics_are_the_dense_ones(scorer):
    scores = scorer.score(DENSE)
    assert set(scores.gaps) == set(FAMILIES)
    assert scores.gaps == pytest.approx(dict.fromkeys(FAMILIES, 0.0), abs=1e-4)


def test_a_small_plan_has_gaps_and_a_smaller_one_larger(scorer):
    smaller = Plan.of({"generator": (1, 1, 1, 1, 1), "discriminator": (1, 1)}, "l1")
    half, least = scorer.score(SMALL).gaps, scorer.score(smaller).gaps
    for term in ("mmd_gap", "l1_gap", "feature_gap", "balance_gap"):
        assert 1e-3 < half[term] < least[term], term


def test_only_the_balance_depends_on_the_discriminator(scorer):
    first = scorer.score(SMALL).gaps
    second = scorer.score(SMALL.replace("discriminator", (8, 12))).gaps
    assert {term for term in FAMILIES if first[term] != second[term]} == {"balance_gap"}


def test_scoring_is_repeatable_and_does_not_depend_on_the_plans_before(pair):
    plans = [SMALL, SMALL.replace("generator", (8, 4, 4, 12, 4)), SMALL.replace("discriminator", (2, 4))]
    first, second = scorer_of(pair), scorer_of(pair, cache=1)
    forward = [first.score(plan).gaps for plan in plans]
    backward = [second.score(plan).gaps for plan in reversed(plans)]
    assert forward == backward[::-1]


class Counting(nn.Module):
    """Counts the calls of a network's slices, also those that run from copies."""

    def __init__(self, network: nn.Module, calls: list[int]) -> None:
        super().__init__()
        self.network, self.calls = network, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.network(x)


def counted_slices(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Calls of the sliced networks from now on; recomputing statistics is not among them."""
    calls: dict[str, list[int]] = {"generator": [], "discriminator": []}
    original = scorer.slice

    def slice(agent: str, widths: Sequence[int], shared: bool = False) -> nn.Module:
        return Counting(original(agent, widths, shared), calls[agent])

    monkeypatch.setattr(scorer, "slice", slice)
    return calls


def test_generator_outputs_are_cached_by_generator_plan(scorer, monkeypatch):
    calls = counted_slices(scorer, monkeypatch)
    scorer.score(SMALL)
    assert calls == {"generator": [12], "discriminator": [12] * 2}  # real and made images
    scorer.score(SMALL.replace("discriminator", (2, 2)))
    assert calls == {"generator": [12], "discriminator": [12] * 4}
    scorer.score(SMALL.replace("generator", (4, 4, 4, 4, 4)))
    assert calls == {"generator": [12] * 2, "discriminator": [12] * 5}  # made images only
    scorer.score(SMALL)
    assert calls == {"generator": [12] * 2, "discriminator": [12] * 6}


def test_the_cache_forgets_the_oldest(pair, monkeypatch):
    scorer = scorer_of(pair, cache=2)
    calls = counted_slices(scorer, monkeypatch)
    for width in (4, 8, 12, 12, 8, 4):
        scorer.score(SMALL.replace("generator", (4, width, 4, 4, 4)))
    assert len(calls["generator"]) == 4  # 4, 8, 12, and 4 again


def test_scoring_changes_neither_the_weights_nor_the_dense_pair(pair):
    elastic = pair.ordered()
    scorer = scorer_of(pair, elastic=elastic)

    def hashes() -> list[str]:
        return [
            state_hash(pair.generator),
            state_hash(pair.discriminator),
            *(tensors_hash(network.tensors) for network in elastic.values()),
        ]

    before = hashes()
    scorer.score(SMALL)
    scorer.score(DENSE)
    scorer.slice("generator", SMALL["generator"])
    assert hashes() == before


def test_a_slice_has_statistics_of_its_own(scorer, pair):
    sliced = scorer.slice("generator", SMALL["generator"])
    inputs = pair.statistics["generator"]
    first = sliced.model.model[0](inputs)
    second = sliced.model.model[1].model[1](torch.nn.functional.leaky_relu(first, 0.2))
    norm = sliced.model.model[1].model[2]
    torch.testing.assert_close(norm.running_mean, second.mean((0, 2, 3)))
    assert norm.num_features == 8
    assert not sliced.training
    copied = quick_layout(scorer.elastic("generator").network(SMALL["generator"]), amp=False)
    assert torch.equal(
        run_batched(recompute_statistics(copied, inputs), inputs),
        run_batched(scorer.slice("generator", SMALL["generator"], shared=True), inputs),
    )


def test_what_a_search_may_know(scorer, pair):
    assert list(scorer.networks) == ["generator", "discriminator"]
    for agent, network in scorer.networks.items():
        assert network.kind == agent
        assert network.groups == pair.groups[agent]
        assert network.cost_kind == "macs"
        for row, group in zip(network.importance, network.groups, strict=True):
            assert row.shape == (group.channels,)
            assert bool((row > 0).all())
            assert bool((row[:-1] >= row[1:]).all())
    assert scorer.networks["generator"].multiple == 4
    assert scorer.networks["discriminator"].multiple == 2


@pytest.mark.parametrize("ranking", ["", "l2"])
def test_a_plan_of_another_ranking_is_refused(scorer, ranking):
    with pytest.raises(ValueError, match=f"ranks channels by {ranking!r}; these weights by 'l1'"):
        scorer.score(Plan.of({agent: DENSE[agent] for agent in DENSE}, ranking))


@pytest.mark.parametrize("widths", [(8, 12, 16, 12), (8, 12, 16, 12, 0), (9, 12, 16, 12, 8)])
def test_impossible_widths_are_refused(scorer, widths):
    with pytest.raises(ValueError, match=r"widths for|keeps"):
        scorer.score(DENSE.replace("generator", widths))


def test_the_fingerprint_names_all_that_scores_depend_on(pair):
    first = scorer_of(pair).fingerprint
    assert scorer_of(copy.deepcopy(pair)).fingerprint == first
    assert all(isinstance(value, str) and value for value in first.values())
    elastic = pair.ordered()
    elastic["discriminator"].tensors["model.0.bias"][0] += 1e-3
    other_extractor = replace(fake_extractor(), fingerprint="other weights")
    changed = {
        "weights": scorer_of(pair, elastic=elastic),
        "probe": scorer_of(pair, yardstick_of(pair, pair.pairs.take(11))),
        "extractor": scorer_of(
            pair, Yardstick(pair.generator, pair.discriminator, pair.pairs, other_extractor)
        ),
    }
    for key, scorer in changed.items():
        assert {k for k in first if scorer.fingerprint[k] != first[k]} == {key}


def test_the_fingerprint_sees_the_dense_discriminator_and_the_statistics_images(pair):
    first, elastic = scorer_of(pair).fingerprint, pair.ordered()
    fewer = {agent: images[:8] for agent, images in pair.statistics.items()}
    changed = {
        "probe": scorer_of(replace(pair, discriminator=tiny_discriminator(5)), elastic=elastic),
        "statistics": scorer_of(replace(pair, statistics=fewer), elastic=elastic),
    }
    for key, scorer in changed.items():
        assert {k for k in first if scorer.fingerprint[k] != first[k]} == {key}
        assert scorer.score(SMALL).gaps != scorer_of(pair).score(SMALL).gaps


def test_the_log_of_one_scorer_is_refused_by_another(pair, tmp_path):
    path = tmp_path / "evaluations.jsonl"
    scorer = scorer_of(pair)
    CountedScorer(scorer, EvaluationLog(path, scorer.fingerprint)).score(SMALL)
    again = CountedScorer(scorer, EvaluationLog(path, scorer_of(pair).fingerprint))
    assert again.score(SMALL).gaps == scorer.score(SMALL).gaps
    assert again.computed == 0
    with pytest.raises(LogMismatch, match="written with another probe, statistics, weights"):
        EvaluationLog(path, scorer_of(make_pair(4)).fingerprint)


def test_the_yardstick_sees_real_and_made_images_apart(pair, yardstick):
    with torch.no_grad():
        real = pair.discriminator(paired_input(yardstick.inputs, yardstick.targets))
        fake = pair.discriminator(paired_input(yardstick.inputs, yardstick.outputs))
    torch.testing.assert_close(yardstick.real_logits, real)
    torch.testing.assert_close(yardstick.fake_logits, fake)
    torch.testing.assert_close(yardstick.logits_on_real(pair.discriminator), real)
