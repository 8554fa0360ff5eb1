import math

import pytest
import torch

from gan.density import CLIP, Neighbourhoods


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaps(neighbourhoods: Neighbourhoods, features: torch.Tensor) -> list[float]:
    return [
        neighbourhoods.crowd_gap(features),
        neighbourhoods.arrangement_gap(features),
        neighbourhoods.arrangement_mean(features),
    ]


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """Five clumps of 12 samples in 20 dimensions."""
    return 4 * normal(5, 1, 20).expand(5, 12, 20).reshape(60, 20) + normal(60, 20, seed=1)


@pytest.fixture(scope="module")
def neighbourhoods(dense) -> Neighbourhoods:
    return Neighbourhoods.build(dense)


LINE = torch.tensor([[0.0], [1.0], [3.0]])  # nearest: 1, 0, 1; σ: 1, 1, 2; median σ: 1; ε: 0.001
MOVED = torch.tensor([[0.0], [2.0], [3.0]])


def log_sum(*exponents: float) -> float:
    return math.log(sum(math.exp(e) for e in exponents))


def test_neighbourhoods_by_hand():
    found = Neighbourhoods.build(LINE, k=1, centres=3)
    assert found.centres.tolist() == [0, 2, 1]  # 1 is a neighbour of 0 and comes last
    assert found.neighbours.tolist() == [[1], [1], [0]]
    assert found.spread.tolist() == [1, 2, 1]
    assert found.epsilon == pytest.approx(1e-3)
    wanted = [log_sum(-1 / 2, -9 / 2), log_sum(-9 / 8, -4 / 8), log_sum(-1 / 2, -4 / 2)]
    assert found.log_density.tolist() == pytest.approx(wanted, abs=1e-6)


def test_crowd_by_hand():
    """The crowd of 0 stands at 2 and 3 now, that of 3 at 0 and 2, that of 1 (still at 1) at 0 and 3."""
    found = Neighbourhoods.build(LINE, k=1, centres=3)
    changes = [
        log_sum(-4 / 2, -9 / 2) - log_sum(-1 / 2, -9 / 2),
        log_sum(-9 / 8, -1 / 8) - log_sum(-9 / 8, -4 / 8),
        0.0,
    ]
    assert found.crowd_gap(MOVED) == pytest.approx(sum(map(abs, changes)) / 3, abs=1e-6)


def test_arrangement_by_hand():
    """The pairs 0-1, 3-1, 1-0 had the lengths 1, 2, 1 and have 2, 1, 2."""
    found = Neighbourhoods.build(LINE, k=1, centres=3)
    assert found.arrangement_gap(MOVED) == pytest.approx(math.log(2) ** 2, abs=1e-5)
    assert found.arrangement_mean(MOVED) == pytest.approx(math.log(2) / 3, abs=1e-5)


def test_the_dense_features_have_no_gap_at_all(neighbourhoods, dense):
    assert gaps(neighbourhoods, dense.clone()) == [0.0, 0.0, 0.0]


def test_centres_have_near_neighbours_and_come_from_several_clumps(neighbourhoods, dense):
    few = Neighbourhoods.build(dense, centres=5)
    assert {int(i) // 12 for i in few.centres} == set(range(5))
    for row, i in zip(few.neighbours, few.centres, strict=True):
        assert {int(j) // 12 for j in row} == {int(i) // 12}
    assert len(set(neighbourhoods.centres.tolist())) == 16


def test_noise_lengthens_and_blur_shortens(neighbourhoods, dense):
    noisy = dense + normal(60, 20, seed=2)
    clumps = dense.reshape(5, 12, 20)
    blurred = (0.5 * clumps + 0.5 * clumps.mean(dim=1, keepdim=True)).reshape(60, 20)
    assert neighbourhoods.arrangement_mean(noisy) > 0.1
    assert neighbourhoods.arrangement_mean(blurred) == pytest.approx(math.log(0.5), abs=1e-3)


def test_gaps_grow_with_noise(neighbourhoods, dense):
    crowd, arrangement, _ = zip(
        *(gaps(neighbourhoods, dense + level * normal(60, 20, seed=2)) for level in (0, 0.1, 0.5, 2)),
        strict=True,
    )
    assert list(crowd) == sorted(crowd)
    assert list(arrangement) == sorted(arrangement)
    assert crowd[0] == arrangement[0] == 0 < min(crowd[1], arrangement[1])


def test_a_crowd_that_moved_away_is_lost_but_keeps_its_arrangement(neighbourhoods, dense):
    crowd, arrangement, mean = gaps(neighbourhoods, dense + 1000)
    assert crowd == CLIP
    assert arrangement == pytest.approx(0, abs=1e-6)
    assert mean == pytest.approx(0, abs=1e-6)


def test_a_crowd_that_collapsed_into_a_neighbourhood_counts(dense):
    """All outputs at one centre: its crowd has grown to N − 1 samples at distance 0."""
    found = Neighbourhoods.build(dense, centres=1)
    centre = int(found.centres[0])
    collapsed = dense[centre].expand(60, 20)
    grown = math.log(59) - float(found.log_density[0])
    assert found.crowd_gap(collapsed) == pytest.approx(min(grown, CLIP), abs=1e-5)
    assert found.crowd_gap(collapsed) > 1


def test_a_collapse_is_finite_and_worse_than_noise(neighbourhoods, dense):
    collapsed = gaps(neighbourhoods, torch.zeros(60, 20))
    noisy = gaps(neighbourhoods, dense + normal(60, 20, seed=2))
    assert all(math.isfinite(value) for value in collapsed)
    assert collapsed[1] > noisy[1]
    assert collapsed[2] < -5  # down to ε, 10⁻³ of a neighbourhood


def test_duplicates_are_finite(dense):
    for features in (torch.zeros(20, 4), torch.cat([dense[:1].expand(40, 20), dense[:20]])):
        found = Neighbourhoods.build(features)
        assert found.spread.min() >= found.epsilon > 0
        assert gaps(found, features.clone()) == [0.0, 0.0, 0.0]
        assert all(math.isfinite(value) for value in gaps(found, features + normal(*features.shape)))


@pytest.mark.parametrize("scale", [1e-4, 7.0, 1e4])
def test_the_scale_of_the_features_does_not_matter(neighbourhoods, dense, scale):
    made = dense + normal(60, 20, seed=2)
    scaled = Neighbourhoods.build(scale * dense)
    assert gaps(scaled, scale * made) == pytest.approx(gaps(neighbourhoods, made), rel=1e-4)


def test_the_order_of_the_samples_does_not_matter(neighbourhoods, dense):
    made, order = (
        dense + normal(60, 20, seed=2),
        torch.randperm(60, generator=torch.Generator().manual_seed(3)),
    )
    shuffled = Neighbourhoods.build(dense[order])
    assert gaps(shuffled, made[order]) == pytest.approx(gaps(neighbourhoods, made), rel=1e-9)


def test_fewer_samples_than_centres():
    found = Neighbourhoods.build(normal(9, 3))
    assert sorted(found.centres.tolist()) == list(range(9))
    assert found.log_lengths.shape == (9, 28)


def test_wrong_shapes_are_refused(neighbourhoods, dense):
    with pytest.raises(ValueError, match="N > k"):
        Neighbourhoods.build(normal(7, 3), k=7)
    with pytest.raises(ValueError, match="same images"):
        neighbourhoods.crowd_gap(dense[:-1])
