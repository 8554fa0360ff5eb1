"""Checkpoints of pytorch-CycleGAN-and-pix2pix: read without options, and written.

Such a ``.pth`` holds a state dict and nothing else. Everything that the repository asks for again as options
is read off its keys and shapes; what leaves no trace there is said.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gan.checkpoints import state_hash
from gan.errors import UserError
from gan.files import write_bytes
from gan.networks import Architecture, NormKind, unet_levels

PREFIXES = ("module.", "_orig_mod.")
"""What data parallelism and compilation put before every key."""
RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_BLOCK = re.compile(r"model\.(\d+)\.conv_block\.")
"""Keys of a residual block, and its place."""
LAYOUT = "the generators and discriminators of pytorch-CycleGAN-and-pix2pix"

State = dict[str, Tensor]


class OfficialNetwork(NamedTuple):
    """A network of a checkpoint.

    Attributes:
        network: in evaluation mode, on the CPU, float32.
        architecture: as inferred; it rebuilds the network.
        notes: sentences on what was dropped or assumed.
    """

    network: nn.Module
    architecture: Architecture
    notes: tuple[str, ...]


def read_state(path: Path) -> State:
    """The tensors of a checkpoint, float32 on the CPU, keys without prefixes.

    Only tensors and plain containers are read (``weights_only``): a stranger's file cannot run code.

    Raises:
        UserError: missing, damaged, not a plain state dict, or not all numbers.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist; name a file such as latest_net_G.pth")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # the word for a class that only weights_only=False would import
            raise UserError(
                f"the checkpoint {path} holds more than tensors; save the network alone: "
                "torch.save(net.state_dict(), path)"
            ) from error
        raise UserError(f"the checkpoint {path} is damaged or no checkpoint; get it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint {path} is damaged or no checkpoint; get it again") from error
    if not isinstance(data, Mapping):
        raise UserError(f"the checkpoint {path} holds a {type(data).__name__}; it must be a state dict")
    if not data:
        raise UserError(f"the checkpoint {path} holds no tensors; it must be a network's state dict")
    wrong = [str(key) for key, value in data.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(
            f"the checkpoint {path} is no plain state dict: {wrong[0]!r} is no tensor; "
            "save the network alone: torch.save(net.state_dict(), path)"
        )
    state = {_bare(str(key)): value for key, value in data.items()}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            raise UserError(
                f"the checkpoint {path} holds {key!r} in a form that no network takes (sparse, quantised, "
                "complex or without values); save the state dict of the network as it was trained"
            )
    check_finite(path, state)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights of a training that went astray: nothing else would notice before the table.

    Raises:
        UserError: a value is infinite or no number.
    """
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(
                f"the checkpoint {path} holds values in {key!r} that are no finite numbers: the training "
                "went astray; take the checkpoint of an earlier epoch"
            )


def _bare(key: str) -> str:
    while found := next((prefix for prefix in PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(found)
    return key


def infer_architecture(state: Mapping[str, Tensor]) -> Architecture:
    """Read name, channels, widths, depth, norm and dropout off a state dict.

    Dropout moves the keys of a residual block; in a U-Net it leaves no trace and is taken as off. Widths that
    are not those of an ngf or ndf are kept as they are: a pruned network.

    Raises:
        UserError: keys of another kind of network.
    """
    kernels = {key.removesuffix(".weight"): value for key, value in state.items() if value.dim() == 4}
    if any(_BLOCK.match(key) for key in state):
        found = _resnet(state, kernels)
    elif "model.model.0" in kernels:
        found = _unet(state, kernels)
    elif "net.0" in kernels:
        found = _pixel(state, kernels)
    elif "model.0" in kernels and "model.2" in kernels:
        found = _patch(state, kernels)
    else:
        raise UserError(
            f"the keys are those of no network that is known here ({_some(state)}); known are {LAYOUT}: "
            "unet, resnet, basic, n_layers, pixel"
        )
    return replace(found, widths=None) if found.widths == found.dense_widths else found


def _some(keys: Mapping[str, Any]) -> str:
    return ", ".join([*list(keys)[:3], "…"] if len(keys) > 3 else keys)


def _kernel(kernels: Mapping[str, Tensor], name: str) -> Tensor:
    """A convolution's weight.

    Raises:
        UserError: it is missing.
    """
    if name not in kernels:
        raise UserError(
            f"the convolution {name!r} is missing: the checkpoint is damaged, or none of {LAYOUT}"
        )
    return kernels[name]


def _norm(state: Mapping[str, Tensor], convolution: str, norm: str) -> NormKind:
    """The norm behind a convolution: only BatchNorm has weights, only with InstanceNorm there is a bias."""
    if f"{norm}.weight" in state:
        return "batch"
    return "instance" if f"{convolution}.bias" in state else "none"


def _unet(state: Mapping[str, Tensor], kernels: Mapping[str, Tensor]) -> Architecture:
    first, last = _kernel(kernels, "model.model.0"), _kernel(kernels, "model.model.3")
    down, up = [len(first)], []
    level = "model.model.1"
    while True:
        down.append(len(_kernel(kernels, f"{level}.model.1")))
        inner = f"{level}.model.3"
        bottleneck = inner in kernels  # there the way up follows at once
        up.append(_kernel(kernels, inner if bottleneck else f"{level}.model.5").shape[1])
        if bottleneck:
            break
        level = inner
    return Architecture(
        f"unet_{2 ** len(down)}",
        in_channels=first.shape[1],
        out_channels=last.shape[1],
        base_width=down[0],
        norm=_norm(state, f"{level}.model.3", f"{level}.model.4"),
        widths=(*down, *reversed(up)),
    )


def _resnet(state: Mapping[str, Tensor], kernels: Mapping[str, Tensor]) -> Architecture:
    blocks = sorted({int(found[1]) for key in state if (found := _BLOCK.match(key))})
    if f"model.{blocks[0]}.conv_block.0" in kernels:
        raise UserError(
            "the residual blocks pad with zeros; known are those that reflect, the repository's default"
        )
    n, first = len(blocks), _kernel(kernels, "model.1")
    dropout = f"model.{blocks[0]}.conv_block.6" in kernels
    stem = [len(_kernel(kernels, f"model.{place}")) for place in (1, 4, 7)]
    inside = [len(_kernel(kernels, f"model.{block}.conv_block.1")) for block in blocks]
    ups = [_kernel(kernels, f"model.{10 + n + place}").shape[1] for place in (0, 3)]
    return Architecture(
        f"resnet_{n}blocks",
        in_channels=first.shape[1],
        out_channels=len(_kernel(kernels, f"model.{17 + n}")),
        base_width=stem[0],
        norm=_norm(state, "model.1", "model.2"),
        dropout=dropout,
        widths=(*stem, *inside, *ups),
    )


def _patch(state: Mapping[str, Tensor], kernels: Mapping[str, Tensor]) -> Architecture:
    places = sorted(int(name.removeprefix("model.")) for name in kernels if re.fullmatch(r"model\.\d+", name))
    widths = tuple(len(kernels[f"model.{place}"]) for place in places[:-1])
    layers = len(widths) - 1
    if layers < 1:
        raise UserError(f"a discriminator of {len(places)} convolutions is none of {LAYOUT}")
    return Architecture(
        "basic" if layers == 3 else "n_layers",
        in_channels=kernels["model.0"].shape[1],
        out_channels=1,
        base_width=widths[0],
        norm=_norm(state, "model.2", "model.3"),
        layers=layers,
        widths=widths,
    )


def _pixel(state: Mapping[str, Tensor], kernels: Mapping[str, Tensor]) -> Architecture:
    first, second = (_kernel(kernels, f"net.{place}") for place in (0, 2))
    return Architecture(
        "pixel",
        in_channels=first.shape[1],
        out_channels=1,
        base_width=len(first),
        norm=_norm(state, "net.2", "net.3"),
        widths=(len(first), len(second)),
    )


def load_official(path: Path) -> OfficialNetwork:
    """Read a network from a checkpoint of pytorch-CycleGAN-and-pix2pix.

    Old InstanceNorms' running statistics are dropped, as the repository itself does: nothing reads them.

    Raises:
        UserError: missing, damaged, or a network of another kind; the sentence names what does not fit.
    """
    state = read_state(path)
    try:
        architecture = infer_architecture(state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    notes = []
    if architecture.norm != "batch":
        old = [key for key in state if key.rsplit(".", 1)[-1] in RUNNING]
        state = {key: value for key, value in state.items() if key not in old}
        if old:
            notes.append(f"{path.name}: the unused running statistics of an old InstanceNorm are left out")
    if architecture.widths is not None and min(architecture.widths) < 1:
        raise UserError(
            f"{path} looks like {architecture.name}, but a layer of it has no channels; get it again"
        )
    network = architecture.build()
    wanted = network.state_dict()
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # torch did not count before 0.4.1
            state[key] = torch.tensor(0)
    if wrong := _misfit(wanted, state):
        raise UserError(
            f"{path} looks like {architecture.name} with {architecture.norm} norm, but {wrong}; known are "
            f"{LAYOUT} as that repository writes them"
        )
    network.load_state_dict(state)
    if unet_levels(architecture.name):
        notes.append(f"{path.name}: dropout leaves no trace in a U-Net's weights; it is taken as off")
    return OfficialNetwork(network.eval(), architecture, tuple(notes))


def _misfit(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in keys or shapes; empty where there is none."""
    for key, value in wanted.items():
        if key not in found:
            return f"{key!r} is missing"
        if found[key].shape != value.shape:
            return f"{key!r} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
    extra = [key for key in found if key not in wanted]
    return f"{extra[0]!r} has no place in it" if extra else ""


def save_official(path: Path, network: nn.Module) -> Path:
    """Write a network as that repository does: its state dict, on the CPU, float32.

    Its ``test.py`` reads a dense network with the options that it was trained with. A pruned one has widths
    of its own, which no option there says.
    """
    state = OrderedDict(
        (name, (value.float() if value.is_floating_point() else value).detach().cpu().clone())
        for name, value in network.state_dict().items()
    )
    data = io.BytesIO()
    torch.save(state, data)
    return write_bytes(path, data.getvalue())


def check_pair(
    generator: OfficialNetwork, discriminator: OfficialNetwork, back: OfficialNetwork | None = None
) -> None:
    """Make sure that networks make a translator: a paired one, or with the way back an unpaired one.

    Raises:
        UserError: exchanged files, channels that do not fit, or one file for both ways.
    """
    made, judge = generator.architecture, discriminator.architecture
    if not made.is_generator or judge.is_generator:
        exchanged = not made.is_generator and judge.is_generator
        advice = "exchange --generator and --discriminator" if exchanged else "name one file of each kind"
        raise UserError(
            f"--generator holds the network {made.name!r} and --discriminator {judge.name!r}; {advice}"
        )
    paired, alone = made.in_channels + made.out_channels, made.out_channels
    seen = f"the discriminator sees {judge.in_channels} channels"
    if back is not None:
        _check_back(made, back.architecture)
    if judge.in_channels == (paired if back is None else alone):
        if back is not None and state_hash(generator.network) == state_hash(back.network):
            raise UserError(
                "--generator and --back hold the same weights; name those of the other direction by --back"
            )
        return
    if back is None and judge.in_channels == alone:
        raise UserError(
            f"{seen}, so it was trained on unpaired images (CycleGAN); paired work needs one that sees input "
            f"and output, {paired} channels; unpaired work needs the generator of the way back: "
            "--back latest_net_G_B.pth"
        )
    if back is not None and judge.in_channels == paired:
        raise UserError(
            f"{seen}, so it was trained on pairs (Pix2Pix); leave out --back, or name the discriminator of "
            f"unpaired images, which sees {alone}"
        )
    raise UserError(
        f"{seen}; beside a generator of {made.in_channels} → {made.out_channels} channels it must be "
        f"{paired if back is None else alone}: are the two files of one training?"
    )


def _check_back(there: Architecture, back: Architecture) -> None:
    """Make sure that a network is the way back of a generator.

    Raises:
        UserError: it is no generator, or takes or makes other channels.
    """
    if not back.is_generator:
        raise UserError(
            f"--back holds the discriminator {back.name!r}; name the generator of the way back, such as "
            "latest_net_G_B.pth"
        )
    if (back.in_channels, back.out_channels) != (there.out_channels, there.in_channels):
        raise UserError(
            f"--back makes {back.out_channels} channels of {back.in_channels}; the way back of a generator "
            f"of {there.in_channels} → {there.out_channels} channels must make {there.in_channels} of "
            f"{there.out_channels}: are the files of one training?"
        )
