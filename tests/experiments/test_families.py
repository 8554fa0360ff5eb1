from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments import families
from experiments.agreement import kendall, kendall_gain
from experiments.families import FACTORS, weigh


def study(plans: int = 24, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A family that knows the result but for noise, one that knows nothing, and the result."""
    random = np.random.default_rng(seed)
    truth = random.standard_normal(plans)
    parts = {
        "knows": truth + 0.3 * random.standard_normal(plans),
        "guesses": random.standard_normal(plans),
    }
    return parts, -truth


def test_a_gain_is_the_difference_of_two_taus_on_the_same_resamples() -> None:
    parts, metric = study()
    knows, guesses = parts.values()
    gain = kendall_gain(knows, guesses, -metric, resamples=500)
    assert gain.value == pytest.approx(kendall(knows, -metric) - kendall(guesses, -metric))
    assert 0 < gain.low < gain.value < gain.high
    nothing = kendall_gain(knows, 2 * knows + 1, -metric, resamples=500)  # the same order
    assert (nothing.value, nothing.low, nothing.high) == pytest.approx((0, 0, 0))
    assert np.isnan(kendall_gain(knows, np.ones_like(knows), -metric).value)


def test_what_knows_adds_and_what_guesses_does_not() -> None:
    parts, kid = study()
    halves = weigh(parts, kid, kid)
    assert halves.additions["knows"].held_out.low > 0.2
    assert halves.additions["knows"].kid.low > 0
    assert halves.additions["guesses"].held_out.value < 0.02
    assert halves.additions["guesses"].kid.high < 0
    assert halves.chosen.value > 0.1  # the given weights count the guess as much as the knowledge


def test_halves_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the definition: weights in a loop, tau by scipy, on three splits."""
    monkeypatch.setattr(families, "SPLITS", 3)
    parts, kid = study(plans=11, seed=3)
    names = list(parts)
    random = np.random.default_rng(0)
    given, chosen, added = [], [], []
    for _ in range(3):
        order = random.permutation(11)
        half, other = order[:5], order[5:]
        taus = {
            factors: [
                kendall(
                    sum(f * parts[name][rows] for f, name in zip(factors, names, strict=True)), -kid[rows]
                )
                for rows in (half, other)
            ]
            for factors in itertools.product(FACTORS, repeat=2)
            if any(factors)
        }
        best = max(taus, key=lambda factors: taus[factors][0])
        without = max((f for f in taus if f[1] == 0), key=lambda factors: taus[factors][0])
        given.append(taus[1.0, 1.0][1])
        chosen.append(taus[best][1] - taus[1.0, 1.0][1])
        added.append(taus[best][1] - taus[without][1])
    halves = weigh(parts, kid, kid)
    assert halves.given == pytest.approx(np.mean(given))
    assert halves.chosen.value == pytest.approx(np.mean(chosen))
    assert halves.additions["guesses"].held_out.value == pytest.approx(np.mean(added))


def test_a_family_that_is_constant_adds_nothing() -> None:
    parts, kid = study()
    halves = weigh({**parts, "silent": np.zeros(len(kid))}, kid, kid)
    silent = halves.additions["silent"]
    assert (silent.kid.value, silent.held_out.value) == pytest.approx((0, 0))
