import math

import pytest
import torch

from gan.fidelity import (
    BLOCK,
    KernelReference,
    density_coverage,
    frechet_distance,
    image_l1,
    kid,
    mmd2_biased,
    psnr,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# k(a, b) = (a b + 1)³ for d = 1
X = torch.tensor([[1.0], [0.0]])  # Gram: 8 1 / 1 1
Y = torch.tensor([[2.0], [0.0]])  # Gram: 125 1 / 1 1; cross: 27 1 / 1 1


def test_mmd_by_hand():
    assert mmd2_biased(X, Y) == pytest.approx(11 / 4 + 128 / 4 - 2 * 30 / 4)


def test_kid_by_hand():
    assert kid(X, Y) == pytest.approx(2 / 2 + 2 / 2 - 2 * 30 / 4)


def test_the_kernel_divides_by_the_dimension():
    wide = torch.cat([X, X], dim=1)  # a·b and d both double
    assert mmd2_biased(wide, torch.cat([Y, Y], dim=1)) == pytest.approx(mmd2_biased(X, Y))


def test_mmd_is_exactly_zero_for_the_same_set_and_zero_for_the_same_set_in_another_order():
    x = normal(40, 30)
    assert mmd2_biased(x, x.clone()) == 0.0
    assert mmd2_biased(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert mmd2_biased(x, x.flip(0)) >= 0


def test_a_kept_reference_gives_the_same_numbers():
    x, others = normal(20, 8), [normal(n, 8, seed=n) for n in (5, 20, 31)]
    reference = KernelReference(x)
    assert [reference.mmd2(y) for y in others] == [mmd2_biased(x, y) for y in others]


def test_blocks_do_not_matter():
    x, y = normal(BLOCK + 1, 2), normal(7, 2, seed=1)
    gram = (x.double() @ y.double().T / 2 + 1) ** 3
    own = [(z.double() @ z.double().T / 2 + 1) ** 3 for z in (x, y)]
    assert mmd2_biased(x, y) == pytest.approx(float(own[0].mean() + own[1].mean() - 2 * gram.mean()))


def test_kid_is_unbiased_and_mmd_is_not():
    """Over many pairs of samples of one distribution the mean KID is 0, the mean biased MMD² is not."""
    pairs = [(normal(6, 3, seed=2 * i), normal(6, 3, seed=2 * i + 1)) for i in range(200)]
    kids = torch.tensor([kid(x, y) for x, y in pairs])
    assert abs(kids.mean()) < 3 * kids.std() / math.sqrt(len(kids))
    assert min(mmd2_biased(x, y) for x, y in pairs) > 0


def test_frechet_by_hand():
    """Crosses with axes (a, b) have the covariance diag(2a²/3, 2b²/3), which commute."""
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]) + torch.tensor([5.0, 7.0])
    assert frechet_distance(x, y) == pytest.approx(25 + 49 + 2 / 3 * ((3 - 1) ** 2 + (1 - 2) ** 2))


def skewed_sets() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two plane sets whose covariances do not commute, and their distance in closed form."""
    x = normal(9, 2).double() @ torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double()
    y = normal(12, 2, seed=1).double() @ torch.tensor([[1.0, 0.0], [-3.0, 0.5]]).double() + 1
    a, b = x.T.cov(), y.T.cov()
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()  # tr √M of a 2 × 2 matrix
    return x, y, float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root)


def test_frechet_with_more_samples_than_dimensions():
    x, y, wanted = skewed_sets()
    assert frechet_distance(x, y) == pytest.approx(wanted, rel=1e-9)


def test_frechet_with_fewer_samples_than_dimensions():
    """An isometry into 50 dimensions keeps the distance, though both covariances are singular there."""
    x, y, wanted = skewed_sets()
    into = torch.linalg.qr(normal(50, 2, seed=2).double()).Q.T
    assert frechet_distance(x @ into, y @ into) == pytest.approx(wanted, rel=1e-9)


def test_every_distance_of_a_set_to_itself():
    x = normal(30, 50)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert density_coverage(x, x) == (1.0, 1.0)
    images = x.reshape(30, 2, 5, 5)
    assert image_l1(images, images) == 0.0
    assert psnr(images, images) == 100.0


@pytest.mark.parametrize("metric", [mmd2_biased, kid, frechet_distance])
def test_distances_grow_with_noise(metric):
    x, noise = normal(60, 20), normal(60, 20, seed=1)
    values = [metric(x, x + level * noise) for level in (0.0, 0.3, 1.0, 3.0)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@pytest.mark.parametrize("metric", [mmd2_biased, kid, frechet_distance])
def test_distances_ignore_order_and_side(metric):
    x, y = normal(16, 20), normal(13, 20, seed=1) + 0.5
    assert metric(x.flip(0), y.flip(0)) == pytest.approx(metric(x, y))
    assert metric(y, x) == pytest.approx(metric(x, y))


def test_distances_are_finite_for_a_collapsed_set():
    x, y = normal(16, 20), normal(1, 20, seed=1).expand(16, 20)
    values = [
        mmd2_biased(x, y),
        kid(x, y),
        frechet_distance(x, y),
        *density_coverage(x, y),
        *density_coverage(y, x),
    ]
    assert all(math.isfinite(value) for value in values)
    assert frechet_distance(x, y) > 10  # the lost variance of 20 dimensions


def test_density_and_coverage_by_hand():
    """Radii to the nearest other: 1 1 2 4. 0.5 lies in two balls, 2.5 in one, 20 in none."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0], [7.0]]), torch.tensor([[0.5], [2.5], [20.0]])
    density, coverage = density_coverage(real, fake, k=1)
    assert density == pytest.approx(3 / (1 * 3))
    assert coverage == pytest.approx(3 / 4)


def test_a_dropped_mode_costs_coverage_not_density():
    real = torch.cat([normal(40, 4), normal(40, 4, seed=1) + 100])
    density, coverage = density_coverage(real, normal(80, 4, seed=2))
    assert density > 0.7
    assert coverage <= 0.5


def test_density_takes_duplicates():
    """Balls of radius 0 hold nothing, not even their own copies."""
    assert density_coverage(torch.zeros(7, 2), torch.zeros(3, 2)) == (0.0, 0.0)


def test_l1_and_psnr_by_hand():
    first, second = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    second[0] = 0.2  # 10 log10(4 / 0.04) = 20 dB; the other image is identical: 100 dB
    assert image_l1(first, second) == pytest.approx(0.1)
    assert psnr(first, second) == pytest.approx((20 + 100) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "first", "second"),
    [
        (mmd2_biased, (4, 3), (4, 2)),
        (mmd2_biased, (4, 3, 1), (4, 3, 1)),
        (kid, (1, 3), (4, 3)),
        (frechet_distance, (4, 3), (1, 3)),
        (density_coverage, (5, 3), (9, 3)),
        (image_l1, (2, 3, 4, 4), (2, 3, 4, 5)),
        (psnr, (3, 4, 4), (3, 4, 4)),
    ],
)
def test_other_shapes_are_refused(function, first, second):
    with pytest.raises(ValueError, match=r"samples|images are"):
        function(torch.zeros(first), torch.zeros(second))
