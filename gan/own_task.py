"""A user's own pair of checkpoints and folder of images: read, checked, and what is left open chosen.

A pair is made from options once; then it is a folder that says all (``gan.task_folder``). Both directions of
a CycleGAN are two such pairs (``gan.own_two_way``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from gan.checkpoints import load_tensors
from gan.cost import build_cost_model, published_macs
from gan.cyclegan import agent_of
from gan.data import PairedImages, to_float
from gan.errors import UserError, unknown
from gan.factories import example_inputs, first_channels, is_factory, make_network
from gan.files import file_hash
from gan.folders import (
    Direction,
    OddImages,
    PairedSplits,
    Preprocess,
    PreprocessKind,
    Reading,
    load_drawn,
    load_pairs,
)
from gan.losses import AdversarialKind
from gan.networks import Architecture, NormKind, StatisticsKind, unet_levels, with_image_statistics
from gan.official import OfficialNetwork, check_finite, check_pair, load_official, read_state
from gan.runtime import mark_layout
from gan.trial_cuts import run, shapes_of, tried_groups

AGENTS = ("generator", "discriminator")
USUAL_SIZE = 256
"""Crop in pixels for generators that take any size."""
JUDGED = 32
"""Val images that the norm statistics are chosen on."""


@dataclass(frozen=True)
class OwnOptions:
    """Your own networks and images, instead of --task."""

    generator: Path | None = None
    """Checkpoint of pytorch-CycleGAN-and-pix2pix, such as latest_net_G.pth; its options are inferred."""
    discriminator: Path | None = None
    """Its discriminator, such as latest_net_D.pth."""
    data: Path | None = None
    """Folder of images: train/ val/ test/ with A|B side by side, or trainA/ trainB/ testA/ testB/."""
    back: Path | None = None
    """CycleGAN: the generator of the way back, such as latest_net_G_B.pth beside latest_net_G_A.pth and
    latest_net_D_A.pth. Alone it stays as it is and closes the cycle; the images of --data need no partners
    then."""
    back_discriminator: Path | None = None
    """With --back: the discriminator of the way back too, such as latest_net_D_B.pth. Both directions are
    pruned together then, by four agents."""
    generator_factory: str | None = None
    """module:factory that builds a generator of any other kind; --generator is then its state dict (.pth or
    .safetensors), or left out where the factory loads it."""
    discriminator_factory: str | None = None
    """The same for the discriminator."""
    direction: Direction = "AtoB"
    """What the generator translates."""
    load_size: int = 0
    """Pixels that images are resized to before the crop; 0: as the crop."""
    crop_size: int = 0
    """Side of the crop in pixels; 0: the size of a U-Net, 256 for others."""
    preprocess: PreprocessKind = "resize_and_crop"
    """How images get to that size."""
    odd_images: OddImages = "refuse"
    """Refuse a folder with unreadable or odd images, or skip those."""
    norm_statistics: Literal["auto", "running", "image"] = "auto"
    """BatchNorm with running statistics or those of the image at hand (Pix2Pix at batch size 1); auto: what
    gives the lower L1 on val."""
    dropout: bool = False
    """Finetune a U-Net with dropout, which leaves no trace in its weights."""
    gan_mode: AdversarialKind | None = None
    """The adversarial loss that the pair was trained with; vanilla without it, lsgan with --back."""
    train_images: int = 0
    """At most so many images to train on, spread evenly; 0: all."""
    val_images: int = 160
    """The same for what plans are scored on."""
    test_images: int = 512
    """The same for the final figures."""
    memory_gb: float = 4.0
    """Refuse to hold more images than that."""
    generator_multiple: int = 0
    """Widths of the generator are multiples of it; 0: 8 for large networks, less for small ones."""
    discriminator_multiple: int = 0
    """The same for the discriminator."""

    @property
    def given(self) -> bool:
        """Whether the user asks for a task of their own."""
        return self != OwnOptions()

    def check(self) -> None:
        """Refuse options that make no task.

        Raises:
            UserError: what is missing or out of range.
        """
        missing = [
            f"--{name}"
            for name in (*AGENTS, "data")
            if getattr(self, name) is None and getattr(self, f"{name}_factory", None) is None
        ]
        if missing:
            raise UserError(
                f"a task of your own needs --generator, --discriminator and --data; {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
        if self.back_discriminator is not None and self.back is None:
            raise UserError(
                "--back-discriminator asks for both directions of a CycleGAN, and --back is missing: name "
                "the generator of the way back, such as latest_net_G_B.pth"
            )
        for name in ("load_size", "crop_size", "generator_multiple", "discriminator_multiple"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 (pick one) or more"
                )
        known = ("auto", *get_args(StatisticsKind))
        if self.norm_statistics not in known:
            raise unknown("norm statistics", self.norm_statistics, known)
        if self.gan_mode is not None and self.gan_mode not in get_args(AdversarialKind):
            raise unknown("GAN mode", self.gan_mode, get_args(AdversarialKind))


@dataclass(frozen=True)
class OwnTask:
    """Dense pair, images, and how they were read.

    Attributes:
        name: of the image folder.
        data: the image folder, absolute.
        reading: how it was read.
        multiples: agent → widths are multiples of it.
        adversarial: the loss that the pair was trained with.
        networks: agent → dense network in evaluation mode, with the norm statistics that were chosen.
        architectures: agent → how to build it.
        sources: agent → checkpoint that it came from, and its hash.
        images: the pairs; where there is a way back, each image beside one that was drawn for it.
        notes: sentences for the user: what was inferred, chosen, left out.
        back: the generator of the way back of an unpaired translator and how to build it, or None.
    """

    name: str
    data: Path
    reading: Reading
    multiples: Mapping[str, int]
    adversarial: AdversarialKind
    networks: Mapping[str, nn.Module]
    architectures: Mapping[str, Architecture]
    sources: Mapping[str, Mapping[str, str]]
    images: PairedSplits
    notes: tuple[str, ...]
    back: tuple[nn.Module, Architecture] | None = None


OwnPair = Mapping[str, OfficialNetwork]
"""Agent → network as it was read."""


def make_own_task(options: OwnOptions, device: str = "cpu") -> OwnTask:
    """Read checkpoints and images of one direction, choose what is left open; nothing is written.

    Args:
        options: the user's; :func:`gan.own_two_way.make_own` also takes those of both directions.
        device: where the norm statistics are tried out.

    Raises:
        UserError: with what to do.
    """
    options.check()
    pair, back = load_own_pair(options), _load_back(options)
    check_pair(pair["generator"], pair["discriminator"], back)
    task = assemble(options, pair, back, reading_for(options, pair["generator"].architecture), device)
    return replace(task, notes=(*task.notes, *describe_images(task)))


def assemble(
    options: OwnOptions,
    pair: OwnPair,
    back: OfficialNetwork | None,
    reading: Reading,
    device: str = "cpu",
    way: str = "",
) -> OwnTask:
    """A task of networks that fit together, with its images; its notes are about the networks alone.

    Args:
        options: that they were read by.
        pair: of the direction.
        back: the generator of the way back, where images have no partners.
        reading: how the images are read.
        device: where the norm statistics are tried out.
        way: ``A`` or ``B``, where this is one direction of two.

    Raises:
        UserError: images that cannot be used, or that the networks cannot see.
    """
    assert options.data is not None
    generator, judge = pair["generator"], pair["discriminator"].architecture
    if options.dropout and unet_levels(generator.architecture.name):
        generator = _with_dropout(generator)
    data = options.data.resolve()
    images = load_pairs(data, reading) if back is None else load_drawn(data, reading)
    for one in [generator, *([] if back is None else [back])]:
        check_sizes(images.val, one.architecture, judge)
    statistics, chosen = choose_statistics(generator, images.val, options.norm_statistics, device)
    found = {"generator": generator, "discriminator": pair["discriminator"]}
    settled = {agent: _settle(one, statistics) for agent, one in found.items()}
    notes = [note for one in found.values() for note in one.notes]
    for agent, (network, architecture) in settled.items():
        notes.append(f"{agent_of(agent, way)}: {describe(network, architecture, images.val)}")
    closing = None if back is None else _settle(back, statistics)
    if closing is not None and not way:  # of two directions, the other one tells of it
        notes.append(f"way back: {describe(*closing, images.val)}")
    return OwnTask(
        name=agent_of(data.name or "own", way),
        data=data,
        reading=reading,
        multiples={
            agent: getattr(options, f"{agent}_multiple") or usual_multiple(architecture)
            for agent, (_, architecture) in settled.items()
        },
        adversarial=options.gan_mode or ("vanilla" if back is None else "lsgan"),
        networks={agent: network for agent, (network, _) in settled.items()},
        architectures={agent: architecture for agent, (_, architecture) in settled.items()},
        sources={agent: _source(options, agent) for agent in AGENTS},
        images=images,
        notes=(*notes, *([chosen] if chosen else [])),
        back=closing,
    )


def describe_images(task: OwnTask) -> list[str]:
    """Sentences on the images of a task: what was left out or stands in, how many there are, of what size."""
    train, val, test, notes = task.images
    kind = "pairs" if task.back is None else "images of either domain, unpaired,"
    sides = " × ".join(str(side) for side in val.inputs.shape[-2:])
    return [*notes, f"{len(train)} train, {len(val)} val, {len(test)} test {kind} of {sides} pixels"]


def _with_dropout(generator: OfficialNetwork) -> OfficialNetwork:
    """A U-Net with the same weights and dropout, which leaves no trace in them."""
    made = replace(generator.architecture, dropout=True)
    network = made.build()
    network.load_state_dict(generator.network.state_dict())
    return OfficialNetwork(network.eval(), made, ())


def _settle(one: OfficialNetwork, statistics: StatisticsKind) -> tuple[nn.Module, Architecture]:
    """A network with the norm statistics that were chosen, read-only, and how to build it."""
    network, architecture, _ = one
    if architecture.norm == "batch" and statistics == "image":
        network, architecture = with_image_statistics(network), replace(architecture, statistics="image")
    return network.requires_grad_(False), architecture


def _load_back(options: OwnOptions) -> OfficialNetwork | None:
    """The generator of the way back; of the same code as the generator, where that is the user's own."""
    if options.back is None:
        return None
    if options.generator_factory is None:
        return load_official(options.back)
    return load_foreign(options.generator_factory, options.back, "generator", options.crop_size or USUAL_SIZE)


def load_own_pair(options: OwnOptions) -> dict[str, OfficialNetwork]:
    """Both networks of the direction that ``--generator`` and ``--discriminator`` name.

    Raises:
        UserError: missing or damaged files, networks of unknown kinds, or code that builds none to cut.
    """
    return {agent: _load_network(options, agent) for agent in AGENTS}


def _load_network(options: OwnOptions, agent: str) -> OfficialNetwork:
    """The network of an agent: of a checkpoint whose options are inferred, or of the user's own code."""
    path, factory = getattr(options, agent), getattr(options, f"{agent}_factory")
    if factory is None:
        return load_official(path)
    return load_foreign(factory, path, agent, options.crop_size or USUAL_SIZE)


def _source(options: OwnOptions, agent: str) -> dict[str, str]:
    """Where a network came from, for its recipe."""
    path = getattr(options, agent)
    if path is None:
        return {"source": getattr(options, f"{agent}_factory")}
    return {"source": str(path.resolve()), "source_hash": file_hash(path)}


def load_foreign(factory: str, path: Path | None, agent: str, size: int) -> OfficialNetwork:
    """A network that the user's own code builds.

    Args:
        factory: ``module:factory``.
        path: its state dict, ``.safetensors`` or ``.pth``; None keeps the weights that it comes with.
        agent: what it is to be.
        size: height and width of the images, in pixels.

    Raises:
        UserError: no such factory, weights that do not fit, a network that does not run on one image tensor,
            or nothing in it to cut.
    """
    network = make_network(factory)
    if path is not None:
        state = load_tensors(path) if path.suffix == ".safetensors" else read_state(path)
        check_finite(path, state)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise UserError(f"the weights in {path} do not fit the network of {factory}: {detail}") from error
    channels = first_channels(network)
    inputs = example_inputs([(channels, size, size)])
    made = run(network, inputs)
    image = isinstance(made, torch.Tensor) and made.dim() == 4
    if not image or (agent == "generator" and made.shape[2:] != inputs[0].shape[2:]):
        raise UserError(
            f"{factory} makes a {type(made).__name__} of {[*map(tuple, shapes_of(made))]} out of "
            f"{tuple(inputs[0].shape)}; a {agent} must "
            + ("make one image of the same size" if agent == "generator" else "make one map of logits")
        )
    found = tried_groups(network, inputs)
    if not found.groups:
        raise UserError(
            f"{factory} has no channels that can be cut; see why: "
            f"python experiments/check_network.py {factory}"
        )
    kinds = {type(module) for module in network.modules()}
    norm: NormKind = "instance" if nn.InstanceNorm2d in kinds else "none"
    architecture = Architecture(
        factory,
        channels,
        int(made.shape[1]),
        min(group.channels for group in found.groups),
        "batch" if nn.BatchNorm2d in kinds else norm,
        role="generator" if agent == "generator" else "discriminator",
        trace_size=size,
    )
    frozen = f"; frozen: {', '.join(group.name for group in found.frozen)}" if found.frozen else ""
    note = f"{agent}: {len(found.groups)} groups of {factory} can be cut{frozen}"
    return OfficialNetwork(mark_layout(network, inputs), architecture, (note,))


def reading_for(options: OwnOptions, generator: Architecture) -> Reading:
    """How the images are read for a generator: its channels and, unless the options name one, its size."""
    own_size = generator.size_multiple if unet_levels(generator.name) else USUAL_SIZE
    crop = options.crop_size or own_size
    return Reading(
        direction=options.direction,
        preprocess=Preprocess(options.preprocess, options.load_size or crop, crop),
        odd_images=options.odd_images,
        channels=(generator.in_channels, generator.out_channels),
        train=options.train_images,
        val=options.val_images,
        test=options.test_images,
        memory_gb=options.memory_gb,
    )


def usual_multiple(architecture: Architecture) -> int:
    """What widths are multiples of: 8 and 4 for a generator and a discriminator of base width 64.

    An eighth (a sixteenth) of the base width leaves as fine a choice as the embedded tasks have; odd widths
    in large networks cost more time than they save. At the default budgets uniform plans then leave less
    unused than random ones: U-Net-256 0.2 % against 0.5 %, ResNet-9 1.5 % against 2.5 %, PatchGAN 0.5 %
    against 0.9 % (with multiples of 8 it would be 3.1 % against 1.6 %).
    """
    share = architecture.base_width // (8 if architecture.is_generator else 16)
    return next(multiple for multiple in (8, 4, 2, 1) if multiple <= max(1, share))


def check_sizes(images: PairedImages, generator: Architecture, discriminator: Architecture) -> None:
    """Make sure that both networks can see images of that size.

    Raises:
        UserError: with the sizes that they can see.
    """
    height, width = images.inputs.shape[-2:]
    multiple = generator.size_multiple
    if height % multiple or width % multiple:
        raise UserError(
            f"{generator.name} takes images whose sides are multiples of {multiple} pixels, but they would "
            f"be {width} × {height}; choose another --crop-size, and --preprocess resize_and_crop"
        )
    with torch.device("cpu" if is_factory(discriminator.name) else "meta"):
        network = discriminator.build().eval()
        seen = torch.zeros(1, discriminator.in_channels, height, width)
    try:
        network(seen)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"images of {width} × {height} pixels are too small for the discriminator {discriminator.name!r} "
            f"of {discriminator.layers} halvings; choose a larger --crop-size"
        ) from error


@torch.no_grad()
def choose_statistics(
    generator: OfficialNetwork, val: PairedImages, wanted: str, device: str = "cpu"
) -> tuple[StatisticsKind, str]:
    """The norm statistics to run with, and a sentence on why.

    Args:
        wanted: ``running``, ``image``, or ``auto``: the lower L1 to the targets, on a few val images.
    """
    if generator.architecture.norm != "batch":
        return "running", ""
    if wanted != "auto":
        return wanted, f"norm statistics: {wanted}, as asked for"  # type: ignore[return-value]
    if not val.partners:
        return "image", (
            "norm statistics: image, as the repository's test.py runs it unless told --eval; without true "
            "counterparts nothing says which is better (--norm-statistics running takes the others)"
        )
    shown = val.take(JUDGED)
    distances: dict[StatisticsKind, float] = {
        "running": _l1(generator.network, shown, device),
        "image": _l1(with_image_statistics(generator.network), shown, device),
    }
    best: StatisticsKind = "image" if distances["image"] < distances["running"] else "running"
    figures = ", ".join(f"{kind} {value:.4f}" for kind, value in distances.items())
    return best, f"norm statistics: {best} (L1 on {len(shown)} val images: {figures})"


def _l1(network: nn.Module, pairs: PairedImages, device: str) -> float:
    network, total = network.to(device), 0.0
    for inputs, targets in zip(pairs.inputs.split(4), pairs.targets.split(4), strict=True):
        made = network(to_float(inputs).to(device))
        total += float((made - to_float(targets).to(device)).abs().sum())
    network.to("cpu")
    return total / pairs.targets.numel()


def describe(network: nn.Module, architecture: Architecture, images: PairedImages) -> str:
    """One line: what a network is, and what it costs for images of that size."""
    channels = architecture.in_channels
    seen = torch.zeros(1, channels, *images.inputs.shape[-2:])
    cost = build_cost_model(network, (), [seen])
    none = torch.zeros(0, dtype=torch.int64).numpy()
    true, published = float(cost.macs(none)), published_macs(network, [seen])
    papers = f" ({published / 1e9:.3g} G as papers count)" if published > 1.01 * true else ""
    base = "ngf" if architecture.is_generator else "ndf"
    parts = [
        architecture.name,
        f"{base} {architecture.base_width}" + (" (pruned)" if architecture.widths else ""),
        f"{channels} → {architecture.out_channels} channels",
        f"{architecture.norm} norm",
        *(["dropout"] if architecture.dropout else []),
        f"{float(cost.params(none)) / 1e6:.3f} M parameters",
        f"{true / 1e9:.3g} G MACs{papers}",
    ]
    return ", ".join(parts)
