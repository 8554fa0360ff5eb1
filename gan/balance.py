"""Adversarial balance: are the pruned discriminator and generator as evenly matched as the dense pair?

Symbols: D, G the dense pair, D', G' the pruned one, x an input, y its real image. A discriminator gives
a map of patch logits (N, 1, H, W), > 0 for "real".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = (
    1e-3  # smallest unit, as a share of the dense logits' size: equal margins are no reason to divide by 0
)


def margins(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Per-sample margin m = D(x, y) − D(x, G(x)), mean over patches.

    Args:
        real_logits: (N, 1, H, W) for real images.
        fake_logits: (N, 1, H, W) for generated ones, paired with them: by the task, or drawn once where
            the task has no pairs.

    Returns:
        (N,) float64.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(real_logits, fake_logits)
    return (real_logits.double() - fake_logits.double()).flatten(1).mean(dim=1)


def balance_gap(
    dense_real: Tensor,
    dense_fake: Tensor,
    judged_fake: Tensor,
    pruned_real: Tensor,
    pruned_fake: Tensor,
) -> float:
    """How far the pruned pair's balance is from the dense pair's.

    gap = mean |D(x, G'(x)) − D(x, G(x))| / s + 1 − corr(D', D), with s the standard deviation of the dense
    margins m over the samples. The mean runs over samples, of the mean over patches: how differently the
    dense discriminator judges what is made; absolute values, because a difference of two means can be zeroed.
    The correlation runs over all patches of the real and of the pruned generator's images: how far the pruned
    discriminator still tells apart what the dense one tells apart.

    The change of the margins, m' − m, would mix the two: an elastic D' is so far from D in scale and offset
    that the mean |m' − m| is large for the dense generator's outputs, shrinks when noise is added to them,
    and beside a narrow generator is smallest for the dullest D'. Scale and offset of D' are not seen here.

    Args:
        dense_real: (N, 1, H, W) D(x, y).
        dense_fake: D(x, G(x)).
        judged_fake: D(x, G'(x)).
        pruned_real: D'(x, y).
        pruned_fake: D'(x, G'(x)).

    Returns:
        ≥ 0, exactly 0 for the dense pair. The first term is in standard deviations of the dense margins, the
        second in [0, 2], 1 for a discriminator that is constant or says nothing of what the dense one says.
        No standard deviation counts as less than 10⁻³ of the dense logits' root mean square.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(dense_real, pruned_real)
    for fake in (judged_fake, pruned_fake):
        _same_shape(dense_fake, fake)
    dense_logits = torch.cat([dense_real, dense_fake]).double()
    floor = FLOOR * float(dense_logits.square().mean().sqrt()) or FLOOR
    unit = max(float(margins(dense_real, dense_fake).std(correction=0)), floor)
    made_change = float(margins(dense_fake, judged_fake).abs().mean())
    seen, said = torch.cat([dense_real, judged_fake]), torch.cat([pruned_real, pruned_fake])
    return made_change / unit + _disagreement(seen, said, floor)


def _disagreement(first: Tensor, second: Tensor, floor: float) -> float:
    """1 − correlation of two stacks of logits, neither of them with a standard deviation below ``floor``."""
    if torch.equal(first, second):
        return 0.0  # also where both are constant
    a, b = (x.double().flatten() - x.double().mean() for x in (first, second))
    spreads = (max(float(x.square().mean().sqrt()), floor) for x in (a, b))
    return max(0.0, 1 - float((a * b).mean()) / math.prod(spreads))


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"logits are {tuple(first.shape)} and {tuple(second.shape)}; both must be the same (N, 1, H, W), "
            "for the same images in the same order"
        )
