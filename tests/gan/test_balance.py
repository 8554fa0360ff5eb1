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
    assert balance_gap(REAL, FAKE, FAKE.clone(), REAL.clone(), FAKE.clone()) == 0.0


def test_a_worse_generator_by_hand():
    """Same discriminator, fakes that it sees 2 and 0 lower on average: a mean of 1, in units of 1."""
    made = logits((-1.0, -1.0), (-2.0, 2.0))
    assert balance_gap(REAL, FAKE, made, REAL, made) == pytest.approx(1)


def test_another_discriminator_by_hand():
    """Dense logits 3 5 0 2 | 1 1 -1 1 less their mean of 1.5: products with the fakes' half turned round."""
    turned = logits((-1.0, 1.0), (1.0, 1.0))
    dense = [1.5, 3.5, -1.5, 0.5, -0.5, -0.5, -2.5, -0.5]
    pruned = [1.5, 3.5, -1.5, 0.5, -2.5, -0.5, -0.5, -0.5]
    wanted = 1 - sum(a * b for a, b in zip(dense, pruned, strict=True)) / sum(a * a for a in dense)
    assert balance_gap(REAL, FAKE, FAKE, REAL, turned) == pytest.approx(wanted)
    assert wanted == pytest.approx(4 / 24)


def test_both_terms_add_up():
    """The dense discriminator sees 3 less in every fake; the pruned one says the opposite of all."""
    made = FAKE - 3
    assert balance_gap(REAL, FAKE, made, -REAL, -made) == pytest.approx(3 + 2)


def test_scale_and_offset_of_the_pruned_discriminator_do_not_matter():
    assert balance_gap(REAL, FAKE, FAKE, 0.2 * REAL + 7, 0.2 * FAKE + 7) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rest", [0.0, 1e-6])
def test_a_dull_discriminator_cannot_hide(rest):
    """Constant margins at the dense mean (2) would zero a difference of means, a tiny copy a correlation."""
    dull = torch.full_like(REAL, 2.0), torch.zeros_like(FAKE)
    assert float(margins(*dull).mean()) == float(margins(REAL, FAKE).mean())
    assert balance_gap(REAL, FAKE, FAKE, *dull) > 0.25
    assert balance_gap(REAL, FAKE, FAKE, rest * REAL, rest * FAKE) == pytest.approx(1, abs=1e-2)


def test_the_gap_grows_with_noise_and_ignores_order_and_unit():
    def noisy(scale: float) -> tuple[torch.Tensor, ...]:
        return REAL, FAKE, FAKE + noise(scale, 2), REAL + noise(scale), FAKE + noise(scale, 1)

    steps = [balance_gap(*noisy(scale)) for scale in (0, 0.1, 1, 5)]
    assert steps == sorted(steps)
    assert steps[0] == 0 < steps[1]
    assert balance_gap(*(x.flip(0) for x in noisy(1))) == pytest.approx(balance_gap(*noisy(1)))
    assert balance_gap(*(10 * x for x in noisy(1))) == pytest.approx(balance_gap(*noisy(1)))


def test_equal_margins_are_measured_in_floored_units():
    flat, zero = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    root_mean_square = 0.5**0.5
    half = zero + 0.5
    assert balance_gap(flat, zero, zero, flat, zero) == 0.0
    assert balance_gap(flat, zero, half, flat, half) == pytest.approx(0.5 / (FLOOR * root_mean_square))
    assert balance_gap(zero, zero, half, zero, half) == pytest.approx(0.5 / FLOOR)
    assert balance_gap(zero, zero, zero, zero, zero) == 0.0


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="same images in the same order"):
        margins(REAL, FAKE[:1])
    with pytest.raises(ValueError, match="same images in the same order"):
        balance_gap(REAL, FAKE, FAKE, REAL[:, 0], FAKE)
    with pytest.raises(ValueError, match="same images in the same order"):
        balance_gap(REAL, FAKE, FAKE[:1], REAL, FAKE)
