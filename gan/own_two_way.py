"""Both directions of a user's own CycleGAN: four checkpoints and two domains of images, two tasks in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from gan.checkpoints import state_hash
from gan.cyclegan import DIRECTIONS, Direction
from gan.errors import UserError
from gan.networks import Architecture
from gan.official import check_pair
from gan.own_task import (
    AGENTS,
    OwnOptions,
    OwnPair,
    OwnTask,
    assemble,
    describe_images,
    load_own_pair,
    make_own_task,
    reading_for,
)


@dataclass(frozen=True)
class OwnTwoWay:
    """Four dense networks and their images.

    Attributes:
        name: of the image folder.
        ways: direction → its task; each one's ``back`` is the generator of the other. ``A`` translates the
            images of trainA/ into those of trainB/, whichever of them ``--generator`` was.
        notes: sentences for the user: what was inferred, chosen, left out.
    """

    name: str
    ways: Mapping[Direction, OwnTask]
    notes: tuple[str, ...]


AnyOwn = OwnTask | OwnTwoWay


def make_own(options: OwnOptions, device: str = "cpu") -> AnyOwn:
    """A task of the user's own networks and images, of one direction or both; nothing is written.

    Args:
        options: the user's.
        device: where the norm statistics are tried out.

    Raises:
        UserError: with what to do.
    """
    make = make_own_task if options.back_discriminator is None else make_own_two_way
    return make(options, device)


def make_own_two_way(options: OwnOptions, device: str = "cpu") -> OwnTwoWay:
    """Read four checkpoints and the images of both domains; nothing is written.

    Args:
        options: the user's, with ``back`` and ``back_discriminator``.
        device: where the norm statistics are tried out.

    Raises:
        UserError: with what to do.
    """
    options.check()
    returning = replace(
        options,
        generator=options.back,
        discriminator=options.back_discriminator,
        back=None,
        back_discriminator=None,
    )
    there, back = load_own_pair(options), load_own_pair(returning)
    check_both(there, back)
    reading = reading_for(options, there["generator"].architecture)
    first, second = DIRECTIONS if reading.direction == "AtoB" else reversed(DIRECTIONS)
    one = assemble(options, there, back["generator"], reading, device, first)
    other = assemble(returning, back, there["generator"], reading.reversed(), device, second)
    ways = {first: replace(one, back=_generator(other)), second: replace(other, back=_generator(one))}
    notes = dict.fromkeys((*(note for way in DIRECTIONS for note in ways[way].notes), *describe_images(one)))
    assert options.data is not None
    return OwnTwoWay(
        options.data.resolve().name or "own", {way: ways[way] for way in DIRECTIONS}, tuple(notes)
    )


def _generator(task: OwnTask) -> tuple[nn.Module, Architecture]:
    return task.networks["generator"], task.architectures["generator"]


def check_both(there: OwnPair, back: OwnPair) -> None:
    """Make sure that four networks make a translator of both directions.

    Args:
        there: what ``--generator`` and ``--discriminator`` hold.
        back: what ``--back`` and ``--back-discriminator`` hold.

    Raises:
        UserError: exchanged files, one file for both directions, or channels that do not fit.
    """
    _check_kinds(there, back)
    (made, judge), (returned, other) = (
        tuple(pair[agent].architecture for agent in AGENTS) for pair in (there, back)
    )
    sees = judge.in_channels, other.in_channels
    if sees[0] != sees[1] and sees == (returned.out_channels, made.out_channels):
        raise UserError(
            f"--discriminator sees {sees[0]} channels and --back-discriminator {sees[1]}, but --generator "
            f"makes {made.out_channels} and --back {returned.out_channels}; exchange the two discriminators, "
            "or the two generators"
        )
    check_pair(there["generator"], there["discriminator"], back["generator"])
    if sees[1] == returned.in_channels + returned.out_channels:
        raise UserError(
            f"--back-discriminator sees {sees[1]} channels, so it was trained on pairs (Pix2Pix); name the "
            f"discriminator of unpaired images, which sees {returned.out_channels}, such as "
            "latest_net_D_B.pth"
        )
    if sees[1] != returned.out_channels:
        raise UserError(
            f"--back-discriminator sees {sees[1]} channels, but the images that --back makes have "
            f"{returned.out_channels}: are the files of one training?"
        )
    if state_hash(there["discriminator"].network) == state_hash(back["discriminator"].network):
        raise UserError(
            "--discriminator and --back-discriminator hold the same weights; name those of the other "
            "direction by --back-discriminator"
        )


def _check_kinds(there: OwnPair, back: OwnPair) -> None:
    """Make sure that every option names a network of its kind.

    Raises:
        UserError: what the wrong ones hold.
    """
    named = [(f"--{agent}", agent, there[agent]) for agent in AGENTS]
    named += [("--back", "generator", back["generator"])]
    named += [("--back-discriminator", "discriminator", back["discriminator"])]
    wrong = []
    for option, wanted, found in named:
        held = "generator" if found.architecture.is_generator else "discriminator"
        if held != wanted:
            wrong.append((option, held, f"{option} holds the {held} {found.architecture.name!r}"))
    if not wrong:
        return
    exchanged = len(wrong) == 2 and wrong[0][1] != wrong[1][1]
    advice = (
        f"exchange {wrong[0][0]} and {wrong[1][0]}"
        if exchanged
        else "--generator and --back name generators (latest_net_G_A.pth, latest_net_G_B.pth), "
        "--discriminator and --back-discriminator their discriminators"
    )
    raise UserError(f"{' and '.join(sentence for *_, sentence in wrong)}; {advice}")
