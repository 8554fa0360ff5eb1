"""What every test shares: one thread, fixed seeds."""

from __future__ import annotations

import os

# Set before torch and ONNX Runtime are loaded: small tensors on many threads are slower, several
# test processes share the cores, and sums must not depend on how many cores there are.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

torch.set_num_threads(1)

# Shared machines stall at times, so an example may take as long as it likes; the same examples in every run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """No test depends on the order of the tests."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that we call may still use the global generator
    torch.manual_seed(0)


class _OneMap(nn.Module):
    """A random convolution in the place of the stages of a perceptual distance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.layer(images.expand(-1, 3, -1, -1)).relu()]


@pytest.fixture(autouse=True)
def _cheap_perception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finetunings of tiny networks ask a tiny one; the programs, run as a user does, ask the real one."""
    with torch.random.fork_rng():
        stages = _OneMap()
    monkeypatch.setattr("gan.distillation.load_differentiable_stages", lambda **_: stages)
