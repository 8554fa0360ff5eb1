"""Fidelity: how far two sets of features, or two stacks of images, are from each other.

Pure functions on tensors, in float64. What is biased or singular on few samples says so: choose with
:func:`mmd2_biased`, report :func:`kid`, and never choose by :func:`frechet_distance`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2048  # rows of a Gram matrix held at a time
PSNR_CAP = 100.0  # dB, for images that are (nearly) identical


class DensityCoverage(NamedTuple):
    """What :func:`density_coverage` returns.

    Attributes:
        density: ≥ 0, about 1 when the sets are alike; how deep the fakes sit among the reals.
        coverage: in [0, 1]; share of the reals with a fake nearby.
    """

    density: float
    coverage: float


class KernelReference:
    """One side of a squared maximum mean discrepancy, kept while many others are held against it.

    Args:
        features: (n, d) features of the reference.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features.detach().double()
        _check(self.features, self.features)
        self._self_mean = _kernel_sum(self.features, self.features) / len(features) ** 2

    def mmd2(self, features: Tensor) -> float:
        """Biased MMD² of (m, d) features to the reference; see :func:`mmd2_biased`."""
        y = features.detach().to(self.features)
        _check(self.features, y)
        if torch.equal(self.features, y):
            return 0.0  # the sums below may round differently
        n, m = len(self.features), len(y)
        own, cross = _kernel_sum(y, y) / m**2, _kernel_sum(self.features, y) / (n * m)
        return max(0.0, self._self_mean + own - 2 * cross)


def mmd2_biased(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy, V-statistic: mean k(x, x') + mean k(y, y') − 2 mean k(x, y).

    k(a, b) = (a·b / d + 1)³, the kernel of KID. The means include the diagonal: biased upwards by the
    finite samples, but ≥ 0, and 0 when the sets are the same.

    Args:
        x: (n, d) features.
        y: (m, d) features.

    Raises:
        ValueError: unless both are (samples, d) with the same d.
    """
    return KernelReference(x).mmd2(y)


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel distance: the unbiased U-statistic of MMD² with k(a, b) = (a·b / d + 1)³.

    Bińkowski et al. 2018 (arXiv:1801.01401), over all samples at once instead of random subsets: so it
    has no randomness. Not multiplied by 1000, as some tools do; it can be slightly negative.

    Args:
        x: (n, d) features, n ≥ 2.
        y: (m, d) features, m ≥ 2.

    Raises:
        ValueError: for other shapes.
    """
    x, y = x.detach().double(), y.detach().to(x.device).double()
    _check(x, y, least=2)
    n, m = len(x), len(y)
    within = sum((_kernel_sum(z, z) - _kernel_trace(z)) / (len(z) * (len(z) - 1)) for z in (x, y))
    return within - 2 * _kernel_sum(x, y) / (n * m)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets: ‖μ_x − μ_y‖² + tr(C_x + C_y − 2 (C_x C_y)^½).

    Heusel et al. 2017 (arXiv:1706.08500), covariances with n − 1. With X, Y the centred sets,
    C_x = XᵀX and C_y = YᵀY, the eigenvalues of C_x C_y are the squared singular values of X Yᵀ; so the
    last trace is their sum, without a matrix root and also where n < d. Below about 2d samples the
    estimate is biased upwards: report it with n, and never choose by it.

    Args:
        x: (n, d) features, n ≥ 2.
        y: (m, d) features, m ≥ 2.

    Raises:
        ValueError: for other shapes.
    """
    x, y = x.detach().double(), y.detach().to(x.device).double()
    _check(x, y, least=2)
    centred = [(z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    variance = sum(float(z.square().sum()) for z in centred)
    # Z and the R of its QR decomposition have the same ZᵀZ, and R has at most d rows.
    first, second = (torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z for z in centred)
    root = float(torch.linalg.svdvals(first @ second.T).sum())
    return max(0.0, float((x.mean(dim=0) - y.mean(dim=0)).square().sum()) + variance - 2 * root)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage, Naeem et al. 2020 (arXiv:2002.09797).

    With r_i the distance of the real sample i to its k-th nearest other real one: density is the number
    of pairs with ‖fake_j − real_i‖ < r_i over k · M, coverage the share of real samples with such a fake.
    Strictly smaller, as in the authors' code, so a set has density 1 against itself.

    Args:
        real: (N, d) features, N > k.
        fake: (M, d) features.
        k: neighbours, ≥ 1.

    Raises:
        ValueError: for other shapes.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    real, fake = real.detach().double(), fake.detach().to(real.device).double()
    _check(real, fake, least=1)
    if len(real) <= k:
        raise ValueError(f"{len(real)} real samples have no {k}-th neighbour; use more than {k}")
    among = _squared_distances(real, real).fill_diagonal_(-1)  # itself always first
    radius = among.kthvalue(k + 1, dim=1).values
    inside = _squared_distances(real, fake) < radius[:, None]
    return DensityCoverage(float(inside.sum()) / (k * len(fake)), float(inside.any(dim=1).double().mean()))


def image_l1(first: Tensor, second: Tensor) -> float:
    """Mean absolute difference of two stacks of images (N, C, H, W) in [−1, 1]; in [0, 2]."""
    _same_images(first, second)
    return float((first.double() - second.to(first.device).double()).abs().mean())


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [−1, 1] (range 2), mean over the images.

    Per image 10 log₁₀(2² / mean squared difference), at most ``PSNR_CAP`` = 100 dB, which identical images
    get; both are (N, C, H, W).
    """
    _same_images(first, second)
    error = (first.double() - second.to(first.device).double()).square().flatten(1).mean(dim=1)
    ratio = 10 * torch.log10(4 / error.clamp_min(4 * 10 ** (-PSNR_CAP / 10)))
    return float(ratio.mean())


def _kernel(dots: Tensor, d: int) -> Tensor:
    return (dots / d + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """Σ_ij k(x_i, y_j), a block of rows at a time."""
    return sum(float(_kernel(rows @ y.T, x.shape[1]).sum()) for rows in x.split(BLOCK))


def _kernel_trace(x: Tensor) -> float:
    """Σ_i k(x_i, x_i)."""
    return float(_kernel(x.square().sum(dim=1), x.shape[1]).sum())


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (squares - 2 * x @ y.T).clamp_min(0)


def _check(x: Tensor, y: Tensor, least: int = 1) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(
            f"features are {tuple(x.shape)} and {tuple(y.shape)}; both must be (samples, d) "
            f"with the same d and at least {least} samples"
        )


def _same_images(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 4 or len(first) == 0:
        raise ValueError(
            f"images are {tuple(first.shape)} and {tuple(second.shape)}; both must be the same (N, C, H, W)"
        )
