"""Local density: do small neighbourhoods of the dense outputs keep their crowd, in size and arrangement?

Our formulation of the idea in "Compressing Image-to-Image Translation GANs Using Local Density
Structures on Their Learned Manifold" (AAAI 2024). The paper estimates densities with kernels; with 160
samples in 1280 dimensions nearly all distances are alike, so that every kernel weighs the whole set
and hardly anything changes its sum. The distances to the nearest samples are the estimate that is left.

Symbols: h_i feature of the dense output i, h'_i of the pruned one, N_i the K nearest neighbours of h_i
among the other dense outputs, ε the length below which distances do not count, ‖v‖_ε = √(‖v‖² + ε²),
r_i(c; S) the geometric mean of ‖c − s_j‖_ε over the K samples of S nearest to c, sample i left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-3
"""ε in units of the median radius of a neighbourhood: keeps logarithms finite."""

PATCH_EPSILON = 0.3
"""The same for patches. A third of them show hardly more than background, at distances down to a hundredth of
the median radius; their logarithms drowned the rest, and followed shades of white. What they hide below 0.3
is no structure. Anything from 0.1 to 1 orders uniform widths; see docs/calibration.md."""


class DensityGaps(NamedTuple):
    """What :meth:`Neighbourhoods.compare` returns, in nats of length: 0.1 is 10 % longer or shorter.

    Attributes:
        crowd: ≥ 0, how much the crowds' sizes changed.
        arrangement: ≥ 0, how much they were rearranged.
        stretch: signed mean of the lengths' changes: > 0 longer (noise), < 0 shorter (blur, collapse).
    """

    crowd: float
    arrangement: float
    stretch: float


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """The small neighbourhoods of all dense outputs.

    Attributes:
        dense: (N, d) float64 features h of the dense outputs, less their mean.
        mean: (d,) that mean.
        neighbours: (N, K) indices N_i, nearest first.
        epsilon: ε > 0, a share of the median over i of the mean distance from h_i to N_i (of the mean over i
            where more than half of the samples are duplicates; of 1 where all are).
        log_radius: (N,) log r_i(h_i; h).
        log_lengths: (N, P) log ‖h_j − h_k‖_ε of the P = K (K + 1) / 2 pairs in N_i ∪ {i}.
    """

    dense: Tensor
    mean: Tensor
    neighbours: Tensor
    epsilon: float
    log_radius: Tensor
    log_lengths: Tensor

    @classmethod
    def build(cls, features: Tensor, k: int = 7, epsilon: float = EPSILON) -> Neighbourhoods:
        """Find the neighbourhoods of the dense features.

        Args:
            features: (N, d) features of the dense outputs, N > k.
            k: neighbours of a sample, ≥ 1.
            epsilon: ε as a share of that median distance, > 0.

        Raises:
            ValueError: if there are not enough samples, or ε is not above 0 and finite.
        """
        if features.ndim != 2 or k < 1 or len(features) <= k:
            raise ValueError(
                f"features are {tuple(features.shape)} and k is {k}; neighbourhoods need (N, d) features "
                "with N > k ≥ 1"
            )
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon is {epsilon}; it must be above 0 and finite")
        dense = features.detach().double()
        mean = dense.mean(dim=0)
        dense = dense - mean
        # By differences, not products: these ranks must not depend on how a product rounds.
        distances = torch.cdist(dense, dense, compute_mode="donot_use_mm_for_euclid_dist")
        nearest, neighbours = distances.fill_diagonal_(math.inf).sort(dim=1, stable=True)  # ties: earlier one
        neighbours = neighbours[:, :k]
        spread = nearest[:, :k].mean(dim=1)
        length = epsilon * (float(spread.median()) or float(spread.mean()) or 1.0)
        logs = _log_distances(dense, dense, length)
        return cls(dense, mean, neighbours, length, _log_radius(logs, k), _within(logs, neighbours))

    def compare(self, features: Tensor) -> DensityGaps:
        """How far the neighbourhoods of the pruned outputs are from those of the dense ones.

        crowd = ½ mean |log r_i(h_i; h') − log r_i(h_i; h)| + ½ mean |log r_i(h'_i; h') − log r_i(h'_i; h)|,
        over i: the crowd of both sets around each dense output, and around each pruned one. The log distance
        to the nearest neighbours is a log density but for its sign, the dimension as a factor and a constant
        (Loftsgaarden and Quesenberry 1965). Either half alone is blind. From the dense outputs, a crowd in
        one point is hardly farther off than a good one; from the pruned ones (where Wang, Kulkarni and Verdú
        2009, doi:10.1109/TIT.2009.2016060, estimate the Kullback–Leibler divergence), dense outputs that have
        lost all company do not count.

        arrangement = mean over i and pairs j, k in N_i ∪ {i} of |log ‖h'_j − h'_k‖_ε − log ‖h_j − h_k‖_ε|.

        Both are exactly 0 for the dense features, finite for collapsed or duplicate outputs, unchanged when
        all features are multiplied by one number, and do not depend on the order of the samples.

        Args:
            features: (N, d) features h' of the pruned outputs, in the order of the dense ones.

        Raises:
            ValueError: if the shape is not that of the dense features.
        """
        if features.shape != self.dense.shape:
            raise ValueError(
                f"features are {tuple(features.shape)}, the dense ones {tuple(self.dense.shape)}; "
                "compare the outputs for the same images, in the same order"
            )
        made = features.detach().to(self.dense) - self.mean
        if torch.equal(made, self.dense):
            return DensityGaps(0.0, 0.0, 0.0)  # the products below may round differently
        k = self.neighbours.shape[1]
        across = _log_distances(self.dense, made, self.epsilon)
        own = _log_distances(made, made, self.epsilon)
        around_dense = _log_radius(across, k) - self.log_radius
        around_made = _log_radius(own, k) - _log_radius(across.T, k)
        stretch = _within(own, self.neighbours) - self.log_lengths
        return DensityGaps(
            crowd=float(around_dense.abs().mean() + around_made.abs().mean()) / 2,
            arrangement=float(stretch.abs().mean()),
            stretch=float(stretch.mean()),
        )


def _log_distances(x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """(n, m) log ‖x_i − y_j‖_ε, by a matrix product: in float64 its rounding is far below ε²."""
    squared = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * (x @ y.T)
    return 0.5 * (squared.clamp_min(0) + epsilon**2).log()


def _log_radius(logs: Tensor, k: int) -> Tensor:
    """(N,) mean of each row's k smallest entries, its own sample left out."""
    return logs.clone().fill_diagonal_(math.inf).topk(k, dim=1, largest=False).values.mean(dim=1)


def _within(logs: Tensor, neighbours: Tensor) -> Tensor:
    """(N, P) entries of the pairs of each sample and its neighbours."""
    own = torch.arange(len(neighbours), device=neighbours.device)[:, None]
    members = torch.cat([own, neighbours], dim=1)
    rows, columns = torch.triu_indices(members.shape[1], members.shape[1], offset=1, device=members.device)
    return logs[members[:, rows], members[:, columns]]
