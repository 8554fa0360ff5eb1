import pytest
import torch

from gan.balance import FLOOR, balance_gap, margins


def logits(*rows: tuple[float, float]) -> torch.Tensor:
    """Two samples (or more) with two patches each."""
    return torch.tensor(rows)[:, None, None, :]


REAL = logits((3.0, 5.0), (0.0, 2.0))  # means 4, 1
FAKE = logits((1.0, 1.0), (-1.0, 1.0))  # means 1, 0: margins 3, 1, standard deviation 1


def noise(scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(REAL.shape, generator=torch.Generator().manual_seed(seed))


def test_margins_by_hand():
    assert margins(REAL, FAKE).tolist() == [3.0, 1.0]


def test_the_dense_pair_has_no_gap_at_all():
    assert balance_gap(REAL, FAKE, REAL.clone(), FAKE.clone()) == 0.0


def test_a_worse_generator_by_hand():
    """Same discriminator, fakes that it sees 2 and 0 lower: margins change by 2 and 0, in units of 1."""
    pruned_fake = logits((-1.0, -1.0), (-1.0, 1.0))
    assert balance_gap(REAL, FAKE, REAL, pruned_fake) == pytest.approx((2 + 0) / 2)


def test_another_discriminator_by_hand():
    """All logits moved by +1: no margin changes, every logit does."""
    assert balance_gap(REAL, FAKE, REAL + 1, FAKE + 1) == pytest.approx(1)


def test_both_terms_add_up():
    """Only the real images' logits move by 2, and with them the margins."""
    assert balance_gap(REAL, FAKE, REAL + 2, FAKE) == pytest.approx(2 + 2)


def test_a_dull_discriminator_cannot_hide():
    """Constant margins at the dense mean (2) would zero a difference of means."""
    dull = torch.full_like(REAL, 2.0), torch.zeros_like(FAKE)
    assert float(margins(*dull).mean()) == float(margins(REAL, FAKE).mean())
    assert balance_gap(REAL, FAKE, dull[0], dull[1]) > 1


def test_the_gap_grows_with_noise_and_ignores_order_and_unit():
    steps = [balance_gap(REAL, FAKE, REAL + noise(s), FAKE + noise(s, 1)) for s in (0, 0.1, 1, 5)]
    assert steps == sorted(steps)
    four = REAL, FAKE, REAL + noise(1), FAKE + noise(1, 1)
    assert balance_gap(*(x.flip(0) for x in four)) == pytest.approx(balance_gap(*four))
    assert balance_gap(*(10 * x for x in four)) == pytest.approx(balance_gap(*four))


def test_equal_margins_are_measured_in_floored_units():
    flat, zero = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    root_mean_square = 0.5**0.5
    assert balance_gap(flat, zero, flat, zero) == 0.0
    assert balance_gap(flat, zero, flat, zero + 0.5) == pytest.approx(0.5 / (FLOOR * root_mean_square))
    assert balance_gap(zero, zero, zero, zero + 0.5) == pytest.approx(0.5 / FLOOR)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="same images in the same order"):
        margins(REAL, FAKE[:1])
    with pytest.raises(ValueError, match="same images in the same order"):
        balance_gap(REAL, FAKE, REAL[:, 0], FAKE)
