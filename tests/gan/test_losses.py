from __future__ import annotations

import math

import pytest
import torch

from gan.errors import UserError
from gan.losses import (
    discriminator_loss,
    generator_loss,
    kernel_alignment,
    logit_distillation,
    output_distillation,
    paired_input,
    relative_distance,
    scaled_error,
    total_variation,
)

REAL = torch.tensor([[2.0, 0.0]])
FAKE = torch.tensor([[-3.0, 1.0]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("vanilla", 0.5 * ((softplus(-2) + softplus(0)) / 2 + (softplus(-3) + softplus(1)) / 2)),
        ("lsgan", 0.5 * ((1 + 1) / 2 + (9 + 1) / 2)),
        ("hinge", 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)),
    ],
)
def test_discriminator_loss_by_hand(kind, wanted):
    assert float(discriminator_loss(REAL, FAKE, kind)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("vanilla", (softplus(3) + softplus(-1)) / 2), ("lsgan", (16 + 0) / 2), ("hinge", (3 - 1) / 2)],
)
def test_generator_loss_by_hand(kind, wanted):
    assert float(generator_loss(FAKE, kind)) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["vanilla", "lsgan", "hinge"])
def test_the_two_pull_in_opposite_directions(kind):
    fake = torch.zeros(4, requires_grad=True)
    (up,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    (down,) = torch.autograd.grad(discriminator_loss(torch.zeros(4), fake + 0.1, kind), fake)
    assert bool((up < 0).all())  # the generator raises its logits
    assert bool((down > 0).all())  # the discriminator lowers them


def test_the_vanilla_loss_is_binary_cross_entropy():
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    wanted = 0.5 * (entropy(REAL, torch.ones_like(REAL)) + entropy(FAKE, torch.zeros_like(FAKE)))
    torch.testing.assert_close(discriminator_loss(REAL, FAKE, "vanilla"), wanted)


def test_large_logits_give_finite_losses():
    far = torch.tensor([1e4])
    assert float(discriminator_loss(-far, far, "vanilla")) == pytest.approx(1e4)
    assert float(generator_loss(-far, "vanilla")) == pytest.approx(1e4)


def test_an_unknown_kind_names_the_known_ones():
    for loss in (lambda: generator_loss(FAKE, "wgan"), lambda: discriminator_loss(REAL, FAKE, "wgan")):
        with pytest.raises(
            UserError, match=r"unknown adversarial loss 'wgan'; known are hinge, lsgan, vanilla"
        ):
            loss()


def test_logit_distillation_is_in_units_of_the_teachers_spread():
    teacher = torch.tensor([[1.0, 3.0]])  # standard deviation √2
    student = torch.tensor([[0.0, 5.0]])
    assert float(logit_distillation(student, teacher)) == pytest.approx(1.5 / 2**0.5)
    assert float(logit_distillation(10 * student, 10 * teacher)) == pytest.approx(1.5 / 2**0.5)
    assert math.isfinite(float(logit_distillation(student, torch.zeros(1, 2))))  # a teacher that says nothing


def test_output_distillation_is_the_mean_absolute_difference():
    assert float(output_distillation(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0]))) == 1.25


def test_the_paired_input_stacks_condition_and_image():
    condition, image = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    stacked = paired_input(condition, image)
    assert stacked.shape == (2, 6, 4, 4)
    assert stacked[:, :3].max() == 0
    assert stacked[:, 3:].min() == 1


def test_kernel_alignment_by_hand():
    """Against the cosine between the centred kernel matrices of the places."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, c, generator=random, dtype=torch.float64) for c in (3, 5))
    centre = torch.eye(7, dtype=torch.float64) - 1 / 7
    k, l = (centre @ z @ z.T @ centre for z in (x, y))  # noqa: E741
    wanted = (k * l).sum() / (k.norm() * l.norm())
    torch.testing.assert_close(kernel_alignment(x, y), wanted)


def test_kernel_alignment_does_not_know_what_channels_are_called():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, generator=random)
    turned = 3 * x @ torch.linalg.qr(torch.randn(4, 4, generator=random))[0] + 2
    assert float(kernel_alignment(x, turned)) == pytest.approx(1.0, abs=1e-5)
    other = torch.randn(50, 4, generator=random)
    values = [float(kernel_alignment(x, turned + s * other)) for s in (1.0, 5.0, 50.0)]
    assert 1 > values[0] > values[1] > values[2] > 0
    assert float(kernel_alignment(x, torch.ones(50, 2))) == 0.0  # a constant is like nothing


def test_total_variation_by_hand():
    image = torch.tensor([[0.0, 1.0], [4.0, 2.0]]).reshape(1, 1, 2, 2)
    assert float(total_variation(image)) == (4 + 1) / 2 + (1 + 2) / 2
    assert float(total_variation(torch.full((2, 3, 4, 5), 0.7))) == 0


def test_scaled_error_by_hand():
    teacher = torch.tensor([[1.0, 10.0], [3.0, 10.0]])  # variance 1 and 0: 0.5 on average
    assert float(scaled_error(teacher + 1, teacher)) == pytest.approx(2.0)
    assert float(scaled_error(5 * teacher, 5 * teacher + 5)) == pytest.approx(2.0)
    assert float(scaled_error(teacher, teacher)) == 0.0


def test_relative_distance_by_hand():
    """Each map counts the same, whatever its scale."""
    wanted = [torch.tensor([1.0, -1.0]), torch.tensor([100.0, 300.0, -200.0])]
    made = [torch.tensor([1.5, -1.0]), torch.tensor([100.0, 300.0, -140.0])]
    assert float(relative_distance(made, wanted)) == pytest.approx((0.25 + 0.1) / 2)
    assert float(relative_distance(wanted, wanted)) == 0.0
