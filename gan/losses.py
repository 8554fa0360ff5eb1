"""Losses of training and finetuning: pure functions of tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gan.errors import unknown

AdversarialKind = Literal["vanilla", "lsgan", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialKind) -> Tensor:
    """Mean of the two halves; ``real`` and ``fake`` are logits of any shape.

    vanilla: Goodfellow et al. 2014; lsgan: Mao et al. 2017; hinge: Lim & Ye 2017.
    """
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    raise unknown("adversarial loss", kind, ("vanilla", "lsgan", "hinge"))


def generator_loss(fake: Tensor, kind: AdversarialKind) -> Tensor:
    """The non-saturating loss of the generator on the discriminator's logits."""
    if kind == "vanilla":
        return F.softplus(-fake).mean()
    if kind == "lsgan":
        return (fake - 1).square().mean()
    if kind == "hinge":
        return -fake.mean()
    raise unknown("adversarial loss", kind, ("vanilla", "lsgan", "hinge"))


def logit_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of patch logits, in units of the teacher's spread."""
    return (student - teacher).abs().mean() / teacher.std().clamp_min(1e-3)


def output_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of images in [−1, 1]."""
    return F.l1_loss(student, teacher)


def paired_input(condition: Tensor, image: Tensor) -> Tensor:
    """What a paired discriminator sees: (N, 3, H, W) twice → (N, 6, H, W)."""
    return torch.cat([condition, image], 1)
