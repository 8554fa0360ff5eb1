"""What a finetuning ends with: its last weights, or its start where the val images prefer that one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gan.data import to_float, to_uint8
from gan.evaluation import Judge
from gan.fidelity import image_l1, kid
from gan.scoring import run_batched

KID, L1 = "val_kid", "val_l1"
"""What is measured on val; the first decides."""


@dataclass(frozen=True)
class Verdict:
    """KID on the val images before and after a finetuning.

    Attributes:
        before, after: lower is better; NaN is worse than any number.
    """

    before: float
    after: float

    @property
    def kept(self) -> Literal["before", "after"]:
        """Which of the two is the result; equal ones are not told apart, and the finetuned pair stays."""
        if math.isnan(self.after):  # no comparison with NaN is true
            return "before"
        return "before" if self.before < self.after else "after"

    @property
    def sentence(self) -> str:
        """Both figures and what follows from them."""
        if math.isnan(self.after):
            return f"val KID {self.before:.3f} before, then finetuning diverged: the start is kept"
        what = "the finetuned pair is kept"
        if self.kept == "before":
            what = "finetuning made it worse, the start is kept"
        return f"val KID {self.before:.3f} before, {self.after:.3f} after: {what}"

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; NaN is null there."""
        before, after = (None if math.isnan(kid) else kid for kid in (self.before, self.after))
        return {"val_kid_before": before, "val_kid_after": after, "kept": self.kept}


def measure(judge: Judge, generator: nn.Module) -> dict[str, float]:
    """KID and L1 on the judge's images, as in its rows: outputs of 8 bits, the mirrored ones too for KID.

    No L1 where the images have no true counterparts.
    """
    yardstick = judge.yardstick
    made = to_float(to_uint8(run_batched(generator, judge.flipped_inputs)))
    figures = {KID: round(float(kid(judge.real_features, yardstick.extractor(made))), 6)}
    if yardstick.pairs.partners:
        figures[L1] = round(float(image_l1(made[: len(yardstick.inputs)], yardstick.targets)), 6)
    return figures
