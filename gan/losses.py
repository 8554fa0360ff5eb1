"""Losses of training and finetuning: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
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


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and across, (N, C, H, W) → 0-d.

    Rudin, Osher & Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D 60, 1992;
    anisotropic.
    """
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()


def kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """How alike two sets of features are, whatever their channels are called: in [0, 1], 1 = alike.

    Linear centred kernel alignment, ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of features X, Y with zero mean: the cosine
    between XXᵀ and YYᵀ, so neither a rotation nor the scale of the channels matters, and the two may have
    different numbers of them. Computed between channels, at n·(c² + cd + d²) products instead of n²·(c + d).
    Cristianini et al., "On Kernel-Target Alignment", NeurIPS 2001; centred: Kornblith et al., "Similarity of
    Neural Network Representations Revisited", ICML 2019; to compress generators: Jin et al., "Teachers Do
    More Than Teach", CVPR 2021.

    Args:
        student: (n, c) features at n places.
        teacher: (n, d) features at the same places.
    """
    x, y = student - student.mean(0), teacher - teacher.mean(0)
    shared = (y.T @ x).square().sum()
    return shared / ((x.T @ x).norm() * (y.T @ y).norm()).clamp_min(1e-12)


def scaled_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features (n, d), in units of the teacher's variance."""
    variance = (teacher - teacher.mean(0)).square().mean()
    return (student - teacher).square().mean() / variance.clamp_min(1e-6)


def relative_distance(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Mean over feature maps of ‖made − wanted‖₁ / ‖wanted‖₁; every map counts the same, whatever its scale.

    Perceptual distance: Johnson et al., "Perceptual Losses for Real-Time Style Transfer", ECCV 2016. In the
    layers of a discriminator: Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with
    Conditional GANs", CVPR 2018.
    """
    distances = [
        (a - b).abs().mean() / b.detach().abs().mean().clamp_min(1e-6)
        for a, b in zip(made, wanted, strict=True)
    ]
    return torch.stack(distances).mean()


def paired_input(condition: Tensor, image: Tensor) -> Tensor:
    """What a paired discriminator sees: (N, 3, H, W) twice → (N, 6, H, W)."""
    return torch.cat([condition, image], 1)


def condition_of(discriminator: nn.Module, inputs: Tensor, channels: int) -> Tensor:
    """What a discriminator is told of the inputs (N, C, H, W): all of them, or nothing, (N, 0, H, W).

    A paired discriminator takes input and image stacked, an unpaired one the image alone; how many channels
    its first convolution takes says which it is. The answer goes into :func:`paired_input`.

    Args:
        discriminator: the network.
        inputs: of the generator.
        channels: of the images that are judged.

    Raises:
        ValueError: its first convolution takes neither.
    """
    taken = next(m.in_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d))
    if taken == channels:
        return inputs[:, :0]
    if taken == inputs.shape[1] + channels:
        return inputs
    raise ValueError(
        f"the discriminator takes {taken} channels; images of {channels} channels need {channels} (the image "
        f"alone) or {inputs.shape[1] + channels} (input and image)"
    )
