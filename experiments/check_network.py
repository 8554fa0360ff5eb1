"""Can your own network be pruned? Every channel group is cut and run; costs and slices are checked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from experiments import cli
from gan.conformance import Conformance, check_network
from gan.errors import UserError
from gan.factories import example_inputs, first_channels, make_network, parse_shape

DESCRIPTION = """Tries out whether a network of your own can be pruned: which groups of channels can be cut,
which stay and why, whether slices, masks and closed-form costs agree. Exit code 0: it can; 2: it cannot."""
EXAMPLES = (
    ("python experiments/check_network.py my_nets:Generator", "class or function in my_nets.py"),
    ("python experiments/check_network.py my_nets:Generator --input 3x128x128 5", "image and 5 labels"),
    (
        "python experiments/check_network.py my_nets:Generator --discriminator my_nets:Critic --multiple 8",
        "the pair",
    ),
)
SIZE = 64
"""Default height and width of the images."""
MARKS = {True: "yes", False: "NO", None: "–"}


@dataclass(frozen=True)
class Options:
    """Options of ``check_network.py``."""

    generator: Annotated[Positional[str], arg(metavar="MODULE:FACTORY")]
    """module:factory: a class of networks, or a function that says -> nn.Module; no arguments."""
    discriminator: str | None = None
    """The same for a discriminator."""
    input: tuple[str, ...] = ()
    """Shape of each argument of the generator's forward, such as 3x64x64 (image) or 5 (vector of labels); by
    default an image of 64 x 64 with the channels of the first convolution."""
    discriminator_input: tuple[str, ...] = ()
    """The same for the discriminator; by default as large as the first of the generator's."""
    multiple: int = 1
    """Widths are multiples of it."""


def main(options: Options) -> None:
    """Check, print, and fail where a network fails.

    Raises:
        UserError: a network that cannot be pruned as planned.
    """
    if options.multiple < 1:
        raise UserError(f"--multiple is {options.multiple}; it must be 1 or more")
    console = Console(width=None if sys.stdout.isatty() else 140)
    shapes = [parse_shape(text) for text in options.input]
    side: tuple[int, ...] = shapes[0][1:] if shapes and len(shapes[0]) == 3 else (SIZE, SIZE)
    jobs = [(options.generator, shapes)]
    if options.discriminator is not None:
        jobs.append((options.discriminator, [parse_shape(text) for text in options.discriminator_input]))
    failed = []
    for name, given in jobs:
        network = make_network(name)
        seen = given or [(first_channels(network), *side)]
        result = check_network(network, example_inputs(seen), options.multiple)
        show(name, seen, result, console)
        if not result.passed:
            failed.append(name)
    if failed:
        raise UserError(
            f"{' and '.join(failed)} cannot be pruned as planned: see NO and frozen above, and "
            "docs/own-network.md for what to change"
        )
    console.print("all of it can be pruned as planned")


def show(name: str, shapes: list[tuple[int, ...]], result: Conformance, console: Console) -> None:
    """One table of groups, one of what else was tried out."""
    seen = ", ".join("x".join(map(str, shape)) for shape in shapes)
    table = Table(title=f"{name} for {seen}", title_justify="left")
    for column in ("group", "channels", "cut to", "places", "can be cut"):
        table.add_column(column, justify="right" if column in ("channels", "cut to", "places") else "left")
    for group, width in zip(result.groups, result.tried, strict=True):
        table.add_row(group.name, str(group.channels), str(width), str(len(group.slots)), "yes")
    for frozen in result.frozen:
        table.add_row(frozen.name, str(frozen.channels), "", "", f"frozen: {frozen.reason}")
    console.print(table, highlight=False, markup=False)
    table = Table("tried out", "holds", "figures")
    for finding in result.findings:
        table.add_row(finding.name, MARKS[finding.passed], finding.detail)
    console.print(table, highlight=False, markup=False)
    if not result.groups:
        console.print("there is no group to cut: nothing to decide", highlight=False)
        return
    console.print(
        f"{result.macs / 1e6:.4g} M MACs, {result.params / 1e6:.4g} M parameters; with every group at its "
        f"narrowest {result.least_macs / result.macs:.1%} and {result.least_params / result.params:.1%}",
        highlight=False,
    )


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
