from __future__ import annotations

import itertools

import numpy as np
import pytest

from experiments import families
from experiments.agreement import kendall
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
    knows, guesses = parts.values()
    products = {(a / max(a, b), b / max(a, b)) for a, b in itertools.product(FACTORS, repeat=2) if a or b}

    def taus(rows: np.ndarray) -> dict[tuple[float, float], float]:
        return {(a, b): kendall((a * knows + b * guesses)[rows], -kid[rows]) for a, b in products}

    def judged(here: dict, there: dict) -> float:
        return float(np.mean([there[w] for w in here if here[w] > max(here.values()) - 1e-9]))

    random = np.random.default_rng(0)
    given, chosen, added = [], [], []
    for _ in range(3):
        order = random.permutation(11)
        here, there = taus(order[:5]), taus(order[5:])
        given.append(there[1.0, 1.0])
        chosen.append(judged(here, there) - given[-1])
        without = {weights: tau for weights, tau in here.items() if weights[1] == 0}
        added.append(judged(here, there) - judged(without, there))
    halves = weigh(parts, kid, kid)
    assert halves.given == pytest.approx(np.mean(given))
    assert halves.chosen.value == pytest.approx(np.mean(chosen))
    assert halves.additions["guesses"].held_out.value == pytest.approx(np.mean(added))


def test_the_order_of_the_families_means_nothing() -> None:
    """Halves have few plans and many ties: no family may win them by standing first."""
    parts, kid = study(plans=12, seed=5)
    forth, back = (weigh(dict(rows), kid, kid) for rows in (parts.items(), reversed(parts.items())))
    assert forth.chosen == pytest.approx(back.chosen)
    for name in parts:
        assert forth.additions[name].held_out == pytest.approx(back.additions[name].held_out)


def test_where_all_plans_end_alike_nothing_is_told() -> None:
    parts, kid = study()
    halves = weigh(parts, np.ones_like(kid), kid)
    assert np.isnan([halves.chosen.value, halves.additions["knows"].held_out.value]).all()
    assert np.isnan(halves.additions["knows"].kid.value)
    assert not np.isnan(halves.additions["knows"].l1.value)


def test_a_family_that_is_constant_adds_nothing() -> None:
    parts, kid = study()
    halves = weigh({**parts, "silent": np.zeros(len(kid))}, kid, kid)
    silent = halves.additions["silent"]
    assert silent.kid.value == 0
    assert silent.held_out.value == pytest.approx(
        0, abs=0.005
    )  # among ties, what it multiplies is counted too
