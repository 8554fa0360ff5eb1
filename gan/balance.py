"""Adversarial balance: are the pruned discriminator and generator as evenly matched as the dense pair?

Symbols: D, G the dense pair, D', G' the pruned one, x an input, y its real image. A discriminator gives
a map of patch logits (N, 1, H, W), > 0 for "real".
"""

from __future__ import annotations

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
    pruned_real: Tensor,
    pruned_fake: Tensor,
) -> float:
    """How far the pruned pair's balance is from the dense pair's.

    gap = mean |m' − m| / s + mean |D'(x, y) − D(x, y)| / s, with m = D(x, y) − D(x, G(x)),
    m' = D'(x, y) − D'(x, G'(x)) and s the standard deviation of m over the samples; the second mean runs
    over samples and patches. The absolute values stand inside the means because a dull discriminator can
    zero a difference of two means. Margins do not see a shift of all logits, which the second term does.

    Args:
        dense_real: (N, 1, H, W) D(x, y).
        dense_fake: D(x, G(x)).
        pruned_real: D'(x, y).
        pruned_fake: D'(x, G'(x)).

    Returns:
        ≥ 0, in standard deviations of the dense margins (floored at 10⁻³ of the dense logits' root mean
        square); exactly 0 for the dense pair.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(dense_real, pruned_real)
    _same_shape(dense_fake, pruned_fake)
    dense_margins = margins(dense_real, dense_fake)
    dense_logits = torch.cat([dense_real, dense_fake]).double()
    floor = FLOOR * float(dense_logits.square().mean().sqrt()) or FLOOR
    unit = max(float(dense_margins.std(correction=0)), floor)
    margin_change = float((margins(pruned_real, pruned_fake) - dense_margins).abs().mean())
    logit_change = float((pruned_real.double() - dense_real.double()).abs().mean())
    return (margin_change + logit_change) / unit


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 4:
        raise ValueError(
            f"logits are {tuple(first.shape)} and {tuple(second.shape)}; both must be the same (N, 1, H, W), "
            "for the same images in the same order"
        )
