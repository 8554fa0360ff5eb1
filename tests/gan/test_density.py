import math

import pytest
import torch

from gan.density import EPSILON, Neighbourhoods


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    """Five clumps of 12 samples in 20 dimensions."""
    return 4 * normal(5, 1, 20).expand(5, 12, 20).reshape(60, 20) + normal(60, 20, seed=1)


@pytest.fixture(scope="module")
def neighbourhoods(dense) -> Neighbourhoods:
    return Neighbourhoods.build(dense)


LINE = torch.tensor([[0.0], [1.0], [3.0]])  # nearest: 1, 0, 1, at distances of 1, 1, 2; ε: 0.001
MOVED = torch.tensor([[0.0], [2.0], [3.0]])


def test_neighbourhoods_by_hand():
    one = Neighbourhoods.build(LINE, k=1)
    assert one.neighbours.tolist() == [[1], [0], [1]]
    assert one.epsilon == pytest.approx(1e-3)
    assert one.log_radius.tolist() == pytest.approx([math.log(r) for r in (1, 1, 2)], abs=1e-6)
    two = Neighbourhoods.build(LINE, k=2)
    assert two.neighbours.tolist() == [[1, 2], [0, 2], [1, 0]]
    assert two.log_radius.tolist() == pytest.approx(
        [math.log(r) / 2 for r in (1 * 3, 1 * 2, 2 * 3)], abs=1e-5
    )


def test_crowd_by_hand():
    """Two thirds of the radii change by a factor of 2, both times.

    Around 0, 1, 3 the nearest other sample was at 1, 1, 2 and is at 2, 1, 1; around 0, 2, 3 it is at 2, 1, 1
    and would be at 1, 1, 2 in the dense crowd.
    """
    found = Neighbourhoods.build(LINE, k=1)
    assert found.compare(MOVED).crowd == pytest.approx(2 / 3 * math.log(2), abs=1e-6)


def test_both_halves_of_the_crowd_by_hand():
    """All samples move by +10 and keep their own radii, 1, 1, 2.

    The nearest other one of the moved crowd is at 11, 9, 7 from the dense samples 0, 1, 3, the nearest of
    the dense crowd at 7, 8, 12 from the moved ones 10, 11, 13.
    """
    found = Neighbourhoods.build(LINE, k=1)
    dense_half = sum(map(math.log, (11 / 1, 9 / 1, 7 / 2))) / 3
    moved_half = sum(map(math.log, (7 / 1, 8 / 1, 12 / 2))) / 3
    gaps = found.compare(LINE + 10)
    assert gaps.crowd == pytest.approx((dense_half + moved_half) / 2, abs=1e-6)
    assert gaps.arrangement == pytest.approx(0, abs=1e-9)


def test_arrangement_by_hand():
    """The pairs 0-1, 1-0, 3-1 had the lengths 1, 1, 2 and have 2, 2, 1."""
    gaps = Neighbourhoods.build(LINE, k=1).compare(MOVED)
    assert gaps.arrangement == pytest.approx(math.log(2), abs=1e-6)
    assert gaps.stretch == pytest.approx(math.log(2) / 3, abs=1e-6)


def test_a_collapse_by_hand():
    """All at 1, so that lengths of 1, 1, 2 become ε.

    Of the dense samples 1 alone gets nearer company, at ε; of the collapsed ones the second alone is denser
    than in the dense crowd, where 0 is its nearest.
    """
    gaps = Neighbourhoods.build(LINE, k=1).compare(torch.ones(3, 1))
    assert gaps.crowd == pytest.approx(math.log(1 / EPSILON) / 3, abs=1e-5)
    assert gaps.arrangement == pytest.approx(math.log(1 / EPSILON) + math.log(2) / 3, abs=1e-5)
    assert gaps.stretch == pytest.approx(-gaps.arrangement)


def test_distances_far_below_a_wider_epsilon_do_not_count():
    """Two near-duplicates at 0 keep company at ε = 0.5 whether 0.01 or 0.02 apart; others move as before."""
    pairs = torch.tensor([[0.0], [0.01], [3.0], [4.0], [7.0], [8.0]])
    moved = torch.tensor([[0.0], [0.02], [3.0], [4.0], [7.0], [8.0]])
    narrow, wide = (Neighbourhoods.build(pairs, k=1, epsilon=share) for share in (EPSILON, 0.5))
    assert (narrow.epsilon, wide.epsilon) == pytest.approx((EPSILON, 0.5))
    assert wide.log_radius[0] == pytest.approx(math.log(math.hypot(0.01, 0.5)), abs=1e-6)
    # of six samples one finds its company twice as far, around the dense and around the moved ones
    assert narrow.compare(moved).crowd == pytest.approx(math.log(2) / 6, abs=1e-3)
    assert wide.compare(moved).crowd < 1e-3
    for epsilon in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            Neighbourhoods.build(pairs, k=1, epsilon=epsilon)


def test_the_dense_features_have_no_gap_at_all(neighbourhoods, dense):
    assert neighbourhoods.compare(dense.clone()) == (0.0, 0.0, 0.0)


def test_noise_lengthens_and_blur_shortens(neighbourhoods, dense):
    clumps = dense.reshape(5, 12, 20)
    blurred = (0.5 * clumps + 0.5 * clumps.mean(dim=1, keepdim=True)).reshape(60, 20)
    assert neighbourhoods.compare(dense + normal(60, 20, seed=2)).stretch > 0.1
    assert neighbourhoods.compare(blurred).stretch == pytest.approx(math.log(0.5), abs=1e-3)


def test_gaps_grow_with_noise(neighbourhoods, dense):
    gaps = [neighbourhoods.compare(dense + s * normal(60, 20, seed=2)) for s in (0, 0.1, 0.5, 2)]
    for values in ([g.crowd for g in gaps], [g.arrangement for g in gaps]):
        assert values == sorted(values)
        assert values[0] == 0 < values[1]


def test_a_crowd_that_moved_away_keeps_its_arrangement(neighbourhoods, dense):
    near, far = neighbourhoods.compare(dense + 10), neighbourhoods.compare(dense + 1000)
    assert far.crowd > near.crowd > 0.5
    assert far.arrangement == pytest.approx(0, abs=1e-4)  # the shift rounds float32
    assert far.stretch == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("place", [0.0, 100.0])
def test_a_collapse_is_finite_and_worse_than_noise(neighbourhoods, dense, place):
    collapsed = neighbourhoods.compare(torch.full((60, 20), place))
    noisy = neighbourhoods.compare(dense + normal(60, 20, seed=2))
    assert all(map(math.isfinite, collapsed))
    assert collapsed.crowd > 2 > noisy.crowd
    assert collapsed.arrangement > 5 > noisy.arrangement
    assert collapsed.stretch < -5  # down to ε, 10⁻³ of a neighbourhood


def test_garbage_in_many_directions_is_worse_than_a_good_crowd(dense):
    """Far from everything and from each other: what the dense half alone takes for a thin crowd."""
    found = Neighbourhoods.build(dense)
    good, garbage = dense + 0.3 * normal(60, 20, seed=2), 8 * normal(60, 20, seed=3)
    assert found.compare(garbage).crowd > 4 * found.compare(good).crowd


def test_duplicates_are_finite(dense):
    for features in (torch.zeros(20, 4), torch.cat([dense[:1].expand(40, 20), dense[:20]])):
        found = Neighbourhoods.build(features)
        assert found.epsilon > 0
        assert found.compare(features.clone()) == (0.0, 0.0, 0.0)
        assert all(map(math.isfinite, found.compare(features + normal(*features.shape))))


@pytest.mark.parametrize("scale", [1e-4, 7.0, 1e4])
def test_the_scale_of_the_features_does_not_matter(neighbourhoods, dense, scale):
    made = dense + normal(60, 20, seed=2)
    scaled = Neighbourhoods.build(scale * dense)
    assert scaled.compare(scale * made) == pytest.approx(neighbourhoods.compare(made), rel=1e-5)


def test_the_order_of_the_samples_does_not_matter(neighbourhoods, dense):
    made = dense + normal(60, 20, seed=2)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    shuffled = Neighbourhoods.build(dense[order])
    assert shuffled.compare(made[order]) == pytest.approx(neighbourhoods.compare(made), rel=1e-9)


def test_wrong_shapes_are_refused(neighbourhoods, dense):
    with pytest.raises(ValueError, match="N > k"):
        Neighbourhoods.build(normal(7, 3), k=7)
    with pytest.raises(ValueError, match="same images"):
        neighbourhoods.compare(dense[:-1])
