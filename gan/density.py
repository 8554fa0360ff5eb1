"""Local density: do small neighbourhoods of the dense outputs keep their crowd, in size and arrangement?

Our formulation of the idea in "Compressing Image-to-Image Translation GANs Using Local Density
Structures on Their Learned Manifold" (AAAI 2024): a kernel density estimate around the dense
generator's own samples.

Symbols: h_i feature of the dense output i, h'_i of the pruned one, N_i the K nearest neighbours of
h_i among the dense outputs, σ_i the mean distance to them, ε the length below which distances do not
count, ‖v‖_ε = √(‖v‖² + ε²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 5.0  # nats per centre: a crowd 150 times too thin is lost, and how far it went says no more
EPSILON = 1e-3  # ε in units of the median dense σ


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """Small neighbourhoods of the dense outputs, and their density there.

    The centres are those whose neighbours are nearest, in that order, passing over every sample that is
    already a neighbour of a chosen centre: without this the 16 densest neighbourhoods of 160 emoji
    are one clump of 23 images, with it they cover 57.

    Both gaps are exactly 0 for the dense features, finite for collapsed or duplicate outputs, and
    unchanged when all features are multiplied by one number.

    Attributes:
        dense: (N, d) float64 features h of the dense outputs.
        centres: (C,) index of each centre i.
        neighbours: (C, K) indices N_i, nearest first.
        spread: (C,) σ_i, floored at ε, > 0.
        epsilon: ε > 0, 10⁻³ of the median σ over all N samples (of the mean where more than half of the
            samples are duplicates; 10⁻³ where all are).
        log_density: (C,) log p_i.
        log_lengths: (C, P) log ‖h_j − h_k‖_ε of the P = K (K + 1) / 2 pairs in N_i ∪ {i}.
    """

    dense: Tensor
    centres: Tensor
    neighbours: Tensor
    spread: Tensor
    epsilon: float
    log_density: Tensor
    log_lengths: Tensor

    @classmethod
    def build(cls, features: Tensor, k: int = 7, centres: int = 16) -> Neighbourhoods:
        """Find the neighbourhoods of the dense features.

        Args:
            features: (N, d) features of the dense outputs, N > k.
            k: neighbours of a centre, ≥ 1.
            centres: how many centres, ≥ 1; all N samples if there are fewer.

        Raises:
            ValueError: if there are not enough samples.
        """
        if features.ndim != 2 or k < 1 or centres < 1 or len(features) <= k:
            raise ValueError(
                f"features are {tuple(features.shape)}, k is {k}, centres {centres}; "
                "neighbourhoods need (N, d) features with N > k ≥ 1 and at least one centre"
            )
        dense = features.detach().double()
        distances = _distances(dense, dense).fill_diagonal_(math.inf)
        nearest, neighbours = distances.sort(dim=1, stable=True)  # ties: the earlier sample
        neighbours = neighbours[:, :k]
        spread = nearest[:, :k].mean(dim=1)
        epsilon = EPSILON * (float(spread.median()) or float(spread.mean()) or 1.0)
        chosen = _choose(spread, neighbours, centres)
        neighbours, spread = neighbours[chosen], spread[chosen].clamp_min(epsilon)
        log_density = _log_density(dense[chosen], dense, chosen, spread, epsilon)
        log_lengths = _log_lengths(dense, chosen, neighbours, epsilon)
        return cls(dense, chosen, neighbours, spread, epsilon, log_density, log_lengths)

    def crowd_gap(self, features: Tensor) -> float:
        """How much the size of the crowds changed: mean over the centres of min(|log q_i − log p_i|, 5).

        log p_i = logsumexp_{j≠i}(−‖h_i − h_j‖²_ε / 2σ_i²) and log q_i the same with h'_j. The centre stays
        the dense one, so a crowd that moved away counts as lost; the sum runs over all j, so a crowd that
        collapsed into the neighbourhood counts too.

        Args:
            features: (N, d) features h' of the pruned outputs, in the order of the dense ones.

        Returns:
            Nats, in [0, 5].
        """
        made = self._checked(features)
        log_density = _log_density(self.dense[self.centres], made, self.centres, self.spread, self.epsilon)
        return float((log_density - self.log_density).abs().clamp_max(CLIP).mean())

    def arrangement_gap(self, features: Tensor) -> float:
        """How much the crowds were rearranged: mean over pairs of (log ‖h'_j − h'_k‖_ε − log ‖h_j − h_k‖_ε)².

        Pairs are those in N_i ∪ {i}, over all centres i; ``features`` as in :meth:`crowd_gap`.

        Returns:
            Squared nats, ≥ 0.
        """
        return float(self._stretch(features).square().mean())

    def arrangement_mean(self, features: Tensor) -> float:
        """The signed mean of the same differences, in nats: > 0 longer (noise), < 0 shorter (blur)."""
        return float(self._stretch(features).mean())

    def _stretch(self, features: Tensor) -> Tensor:
        made = self._checked(features)
        return _log_lengths(made, self.centres, self.neighbours, self.epsilon) - self.log_lengths

    def _checked(self, features: Tensor) -> Tensor:
        if features.shape != self.dense.shape:
            raise ValueError(
                f"features are {tuple(features.shape)}, the dense ones {tuple(self.dense.shape)}; "
                "compare the outputs for the same images, in the same order"
            )
        return features.detach().to(self.dense)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (n, m), by differences: a matrix product would round duplicates apart."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _choose(spread: Tensor, neighbours: Tensor, count: int) -> Tensor:
    order = spread.argsort(stable=True).tolist()
    rows = neighbours.tolist()
    chosen: list[int] = []
    covered: set[int] = set()
    for i in order:
        if len(chosen) < count and i not in covered:
            chosen.append(i)
            covered.update((i, *rows[i]))
    taken = set(chosen)
    chosen += [i for i in order if i not in taken]  # too few apart from each other: fill up
    return torch.tensor(chosen[:count], device=spread.device)


def _log_density(centres: Tensor, samples: Tensor, own: Tensor, spread: Tensor, epsilon: float) -> Tensor:
    """(C,) log of the sum of Gaussian kernels at the centres, each without its own sample."""
    squared = _distances(centres, samples).square() + epsilon**2
    exponents = -squared / (2 * spread[:, None].square())
    return exponents.scatter(1, own[:, None], -math.inf).logsumexp(dim=1)


def _log_lengths(samples: Tensor, centres: Tensor, neighbours: Tensor, epsilon: float) -> Tensor:
    """(C, P) log ‖s_j − s_k‖_ε of the pairs of each centre and its neighbours."""
    members = samples[torch.cat([centres[:, None], neighbours], dim=1)]
    rows, columns = torch.triu_indices(members.shape[1], members.shape[1], offset=1, device=samples.device)
    lengths = _distances(members, members)[:, rows, columns]
    return 0.5 * (lengths.square() + epsilon**2).log()
