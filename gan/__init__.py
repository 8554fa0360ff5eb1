"""The networks, the images, the pruning and every number about them; no word of reinforcement learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def load(source: Path | str, network: str = "generator") -> nn.Module:
    """A network in evaluation mode, in one call.

    Args:
        source: a run folder, an exported folder, or a ``.safetensors`` file with its recipe beside it.
        network: which network of a folder, such as ``discriminator``.

    Raises:
        UserError: nothing of this kind, or damaged files; one sentence.
    """
    from gan import export  # torch is loaded only by those who ask for a network

    return export.load(source, network)
