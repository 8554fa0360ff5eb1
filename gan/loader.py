"""One Python file that builds a pruned generator without this project, for whoever gets its weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from gan import errors, networks
from gan.errors import UserError
from gan.files import write_text
from gan.networks import Architecture, resnet_blocks, unet_levels

_TEMPLATE = '''"""A pruned {name}: this file builds the network and loads {weights}, which lies beside it.

    from {module} import load
    network = load()  # a torch.nn.Module: (N, {in_channels}, H, W) in [-1, 1] -> (N, {out_channels}, H, W)

It needs torch and safetensors, nothing else; torch alone where {checkpoint} is loaded instead, as in
load("{checkpoint}"). In a checkout of pytorch-CycleGAN-and-pix2pix, put
{checkpoint} into checkpoints/NAME and start its test.py through this file, with the options that it
takes anyway:

    python {module}.py test.py --dataroot DATA --name NAME --model test

The network always runs as in evaluation mode, also without test.py's --eval.
"""

from __future__ import annotations

import copy
import difflib
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name({weights!r})


def build(*_: object, **__: object) -> nn.Module:
    """The network without its weights; takes any arguments, and needs none."""
    network = {build}.eval()
    network.train = lambda mode=True: network  # the statistics of its norms are fixed
    return network


def load(path: str | Path = WEIGHTS) -> nn.Module:
    """The network with its weights, of a .safetensors or a .pth file, in evaluation mode."""
    network = build()
    if Path(path).suffix == ".pth":
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return network
    from safetensors.torch import load_file  # the rest of this file does without

    network.load_state_dict(load_file(path))
    return network


{classes}

def run(script: str) -> None:
    """Run a program of pytorch-CycleGAN-and-pix2pix with this network as its generator."""
    sys.path.insert(0, str(Path(script).resolve().parent))
    from models import networks

    networks.UnetGenerator = networks.ResnetGenerator = build
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python {module}.py test.py --dataroot DATA --name NAME --model test")
    del sys.argv[0]
    run(sys.argv[0])
'''


def loader_source(architecture: Architecture, module: str, weights: str, checkpoint: str) -> str:
    """A Python file that builds the network and loads its weights with torch and safetensors alone.

    The classes are those of ``gan.networks``, word for word. Run as a program it starts the ``test.py`` of
    pytorch-CycleGAN-and-pix2pix with this network in place of that repository's generators.

    Args:
        architecture: of the generator, with its widths.
        module: name of the file, without ``.py``.
        weights: name of the safetensors file beside it.
        checkpoint: name of the ``.pth`` file beside it.

    Raises:
        UserError: not a generator.
    """
    if unet_levels(architecture.name):
        parts: list[Any] = [networks.UnetLevel, networks.UnetGenerator]
    elif resnet_blocks(architecture.name):
        parts = [networks.ResnetBlock, networks.ResnetGenerator]
    else:
        raise UserError(f"a loader is for generators; {architecture.name!r} is a discriminator")
    widths = architecture.dense_widths if architecture.widths is None else architecture.widths
    channels = architecture.in_channels, architecture.out_channels
    # With its dropout, which is never on: the keys of a residual block count it.
    arguments = ", ".join(map(repr, (*channels, tuple(widths), architecture.norm, architecture.dropout)))
    build = f"{parts[-1].__name__}({arguments})"
    needed: list[Any] = [errors.UserError, errors.unknown, networks.make_norm, *parts]
    if architecture.statistics == "image":
        needed += [networks.ImageNorm2d, networks.with_image_statistics]
        build = f"with_image_statistics({build})"
    return _TEMPLATE.format(
        name=architecture.name,
        module=module,
        weights=weights,
        checkpoint=checkpoint,
        in_channels=architecture.in_channels,
        out_channels=architecture.out_channels,
        build=build,
        classes="\n\n".join(inspect.getsource(part) for part in needed),
    )


def write_loader(path: Path, architecture: Architecture, weights: str, checkpoint: str) -> Path:
    """Write :func:`loader_source` to ``path``, a ``.py`` file."""
    return write_text(path, loader_source(architecture, path.stem, weights, checkpoint))
