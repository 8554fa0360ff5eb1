"""What a pair is worth: one row of figures, on images that played no part in any choice."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gan.cost import build_cost_model
from gan.data import PairedImages, to_float, to_uint8
from gan.features import Extractor
from gan.fidelity import density_coverage, frechet_distance, image_l1, kid, psnr
from gan.losses import condition_of, paired_input
from gan.scoring import Yardstick, run_batched

KID = "kid_efficientnet_lite0"
"""The primary metric."""
COLUMNS = (
    "macs",
    "params",
    "latency_ms",
    "discriminator_macs",
    "l1",
    "psnr",
    KID,
    "fid_efficientnet_lite0",
    "prdc_density",
    "prdc_coverage",
    "crowd_gap",
    "arrangement_gap",
    "balance_gap",
    "n_images",
)
"""A row; what belongs to an extractor carries its name."""
AGAINST_COUNTERPARTS = ("l1", "psnr")
"""Columns that hold every output against the true counterpart of its input."""


def count(network: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, int]:
    """(MACs, parameters) of a network for one image of the shape of ``inputs``."""
    model = build_cost_model(network, (), inputs)
    none = torch.zeros(0, dtype=torch.int64).numpy()
    return int(model.macs(none)), sum(p.numel() for p in network.parameters())


@torch.no_grad()
def latency_ms(network: nn.Module, image: Tensor, runs: int = 30) -> float:
    """Median milliseconds for one image (1, 3, H, W) on one thread, after a warm-up."""
    threads = torch.get_num_threads()
    if image.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        times = []
        for run in range(runs + 5):
            start = time.perf_counter()
            network(image)
            if image.device.type == "cuda":
                torch.cuda.synchronize()
            if run >= 5:
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e3 * statistics.median(times)


@dataclass(frozen=True)
class Judge:
    """Measures pairs on one split, all in the same way.

    Distribution metrics see every image and its mirror image (the generator runs on both) against the
    real targets and their mirror images; paired ones see the images as they are. ``n_images`` is the
    number behind the distribution metrics.

    Attributes:
        yardstick: the dense pair on the split.
        flipped_inputs: (2N, 3, H, W) inputs and mirrored inputs, in [−1, 1].
        real_features: (2N, d) features of the targets and the mirrored targets.
    """

    yardstick: Yardstick
    flipped_inputs: Tensor
    real_features: Tensor

    @classmethod
    def build(
        cls, generator: nn.Module, discriminator: nn.Module, pairs: PairedImages, extractor: Extractor
    ) -> Judge:
        """Measure the dense pair once."""
        yardstick = Yardstick(generator, discriminator, pairs, extractor)
        both = pairs.with_flips()
        inputs, targets = (images.to(yardstick.inputs.device) for images in both.tensors())
        return cls(yardstick, inputs, extractor(targets))

    def row(self, generator: nn.Module, discriminator: nn.Module) -> dict[str, float]:
        """All of ``COLUMNS`` for a pair in evaluation mode; outputs are rounded to 8 bits, as in files.

        Where no image has a true counterpart, those of ``AGAINST_COUNTERPARTS`` are missing.
        """
        yardstick = self.yardstick
        extractor_name = yardstick.extractor.name
        made = to_float(to_uint8(run_batched(generator, self.flipped_inputs)))
        outputs = made[: len(yardstick.inputs)]
        look = yardstick.extractor.look(made)
        features = look.features
        density, coverage = density_coverage(self.real_features, features, k=5)
        gaps, _ = yardstick.generator_gaps(outputs, look.first(len(outputs)))
        image = yardstick.inputs[:1]
        macs, params = count(generator, [image])
        condition = condition_of(discriminator, image, yardstick.targets.shape[1])
        discriminator_macs, _ = count(discriminator, [paired_input(condition, yardstick.targets[:1])])
        row = {
            "macs": macs,
            "params": params,
            "latency_ms": latency_ms(generator, image),
            "discriminator_macs": discriminator_macs,
            "l1": image_l1(outputs, yardstick.targets),
            "psnr": psnr(outputs, yardstick.targets),
            f"kid_{extractor_name}": kid(self.real_features, features),
            f"fid_{extractor_name}": frechet_distance(self.real_features, features),
            "prdc_density": density,
            "prdc_coverage": coverage,
            "crowd_gap": gaps["crowd_gap"],
            "arrangement_gap": gaps["arrangement_gap"],
            "balance_gap": yardstick.balance_gap(outputs, discriminator),
            "n_images": len(made),
        }
        unknown = () if yardstick.pairs.partners else AGAINST_COUNTERPARTS
        return {
            name: int(value) if name in INTEGERS else round(float(value), 6)
            for name, value in row.items()
            if name not in unknown
        }


INTEGERS = ("macs", "params", "discriminator_macs", "n_images")
