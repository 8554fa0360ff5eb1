"""Check your own networks and images, and write them as a task that every program takes by --task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from experiments import cli
from experiments.build import pick_device
from gan.errors import UserError
from gan.own_task import OwnOptions
from gan.own_two_way import make_own
from gan.task_folder import find_both, save_own
from gan.two_way import by_agent, own_any_task

EXAMPLES = (
    (
        "python experiments/make_task.py --generator latest_net_G.pth --discriminator latest_net_D.pth "
        "--data facades --output tasks/facades",
        "what was inferred is printed",
    ),
    ("python experiments/evaluate.py --task tasks/facades --start dense", "then: any program"),
    (
        "python experiments/make_task.py --generator latest_net_G_A.pth --discriminator latest_net_D_A.pth "
        "--back latest_net_G_B.pth --back-discriminator latest_net_D_B.pth --data horse2zebra "
        "--output tasks/horse2zebra",
        "both directions of a CycleGAN",
    ),
)


@dataclass(frozen=True)
class Options:
    """Options of ``make_task.py``."""

    output: Path
    """New folder for the task; its elastic weights may join it later as elastic.safetensors."""
    own: Annotated[OwnOptions, OmitArgPrefixes] = field(default_factory=OwnOptions)
    """Your own networks and images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the norm statistics are tried out."""


def main(options: Options) -> None:
    """Infer, check, choose, write."""
    if options.output.exists():
        raise UserError(f"--output {options.output} exists; name a new folder")
    own = make_own(options.own, pick_device(options.device))
    task = own_any_task(own)  # finds the channel groups, or says which layer is in their way
    print("\n".join(own.notes))
    multiples = by_agent({way: one.multiples for way, one in task.ways.items()})
    for agent, groups in by_agent({way: one.groups for way, one in task.ways.items()}).items():
        print(f"{agent}: {len(groups)} channel groups, widths are multiples of {multiples[agent]}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with cli.new_folder(options.output) as folder:
        save_own(folder, own)
    print(f"{options.output}: use it with --task {options.output}")
    if both := find_both(str(options.output)):
        print(f"one direction alone: --task {' or --task '.join(both.ways)}")


if __name__ == "__main__":
    cli.run(main, Options, __doc__ or "", EXAMPLES)
