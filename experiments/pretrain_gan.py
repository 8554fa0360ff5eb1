"""Train the dense networks of an embedded task; made the weights that the project ships.

Paired tasks train one pair (Pix2Pix), unpaired ones both directions (CycleGAN). Resumable: run the same
command again after an interruption, or with more ``--epochs`` or ``--minutes`` to go on. Every
``--keep-every`` epochs the averaged generators are kept beside the checkpoint, so that one can see where the
val images stop gaining.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments import cli
from experiments.build import pick_device
from experiments.figures import samples, save_image
from gan.checkpoints import save_network, save_tensors
from gan.cyclegan import (
    DIRECTIONS,
    CycleOptions,
    CycleTrainer,
    Direction,
    Translator,
    start_as_identity,
)
from gan.data import embedded_pairs, embedded_unpaired, to_float, to_uint8
from gan.distillation import NO_INGREDIENTS, PERCEPTUAL
from gan.errors import UserError, unknown
from gan.evaluation import KID
from gan.features import Extractor, load_extractor
from gan.fidelity import image_l1, kid
from gan.files import write_bytes, write_json, write_text
from gan.loop import LoopOptions, Trainer, TrainingProgress
from gan.networks import Architecture, UnetGenerator, initialise
from gan.runtime import quick_layout
from gan.scoring import run_batched
from gan.tasks import TASKS, UNPAIRED_TASKS, TaskRecipe
from gan.training import PairedTrainer, TrainingOptions

EXAMPLES = (
    ("python experiments/pretrain_gan.py --training.amp --minutes 30", "remake the embedded pair"),
    ("python experiments/pretrain_gan.py --epochs 5 --output try", "a short look"),
    (
        "python experiments/pretrain_gan.py --task edges2emoji_resnet --training.amp --epochs 70"
        " --training.learning-rate 2e-4 --training.gradient-penalty 0 --perceptual 0",
        "remake the ResNet's pair, which has the losses of Pix2Pix alone",
    ),
    (
        "python experiments/pretrain_gan.py --task noto2twemoji --cycle.amp --minutes 45 --cycle.cycle 3"
        " --cycle.smoothness 1 --cycle.gradient-penalty 0.15 --cycle.features 1",
        "remake both directions of the unpaired task",
    ),
)


@dataclass(frozen=True)
class Options:
    """Options of ``pretrain_gan.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    output: Path = Path("pretrained")
    """Folder for the checkpoint, the log and the finished networks."""
    epochs: int | None = None
    """Passes over the training images; those of the options below by default."""
    minutes: float | None = None
    """Train for so long instead."""
    ngf: int | None = None
    """Base width of the generators; the task's own by default."""
    ndf: int | None = None
    """Base width of the discriminators; the task's own by default."""
    keep_every: int = 10
    """Keep the averaged generators and a picture of val images every so many epochs."""
    perceptual: float = PERCEPTUAL
    """Weight of the distance to the target in early features of EfficientNet-Lite1, in the training of paired
    tasks; 0 is off."""
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(epochs=100, learning_rate=2e-3, gradient_penalty=0.15)
    )
    """Options of the training of paired tasks."""
    cycle: CycleOptions = field(default_factory=lambda: CycleOptions(epochs=100))
    """Options of the training of unpaired tasks."""


class Work(NamedTuple):
    """A training, ready to go.

    Attributes:
        trainer: with fresh weights.
        images: what it learns from.
        options: its own.
        architectures: name of each network → how it is built.
        networks: result of the training → name of each network → the network itself.
        measure: result of the training → figures on the val images.
        picture: result of the training → columns of val images.
    """

    trainer: Trainer[Any, Any, Any]
    images: Any
    options: LoopOptions
    architectures: Mapping[str, Architecture]
    networks: Callable[[Any], Mapping[str, nn.Module]]
    measure: Callable[[Any], Mapping[str, float]]
    picture: Callable[[Any], Mapping[str, Tensor]]


def main(options: Options) -> None:
    """Pretrain, or go on where an earlier call stopped."""
    known = TASKS | UNPAIRED_TASKS
    if options.task not in known:
        raise unknown("task", options.task, known)
    if (together := known[options.task].folder) is not None:
        raise UserError(
            f"{options.task} is the way back of {together}: both are trained by --task {together}"
        )
    check(options)
    folder = options.output / options.task
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    device = torch.device(pick_device("auto"))
    prepare = unpaired_work if options.task in UNPAIRED_TASKS else paired_work
    work = prepare(known[options.task], options, device)
    trainer = work.trainer
    if checkpoint.exists():
        _check_same(folder, options)
        _go_on(trainer, checkpoint, device)
        print(f"going on after epoch {trainer.epoch}")
    write_json(folder / "options.json", _plain(options))
    # A training that died between its log and its checkpoint does the epoch again.
    rows = [row for row in _read_log(log) if row["epoch"] <= trainer.epoch]

    def on_epoch(progress: TrainingProgress) -> None:
        result = trainer.result(work.images)
        figures = {name: round(value, 6) for name, value in work.measure(result).items()}
        rows.append(
            {
                "epoch": progress.epoch,
                "seconds": round(progress.seconds, 1),
                "share": round(progress.share, 4),
                **figures,
                **progress.losses,
            }
        )
        write_text(log, "".join(json.dumps(row) + "\n" for row in rows))
        shown = " ".join(f"{name} {value:.4g}" for name, value in (progress.losses | figures).items())
        print(f"epoch {progress.epoch} ({progress.share:.0%}) {shown}", flush=True)
        if progress.epoch % options.keep_every == 0:
            for name, network in work.networks(result).items():
                if work.architectures[name].is_generator:
                    save_tensors(folder / f"{name}-{progress.epoch}.safetensors", network.state_dict())
            save_image(samples(work.picture(result), rows=16, pixels=64), folder / "samples.png")
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(trainer.state_dict(), temporary)
        temporary.replace(checkpoint)

    started = time.time()
    result = trainer.fit(work.images, on_epoch)
    recipe = {
        "task": options.task,
        "image_size": int(next(iter(work.picture(result).values())).shape[-1]),
        "command": cli.command("pretrain_gan", options, Options()),
        "training": asdict(work.options)
        | ({"perceptual": options.perceptual} if options.task in TASKS else {}),
        "epochs": trainer.epoch,
    }
    for name, network in work.networks(result).items():
        path = folder / f"{name}.safetensors"
        save_network(path, network, work.architectures[name], recipe, half=True)
    save_image(samples(work.picture(result), rows=16, pixels=64), folder / "samples.png")
    write_bytes(folder / "done", b"")
    print(f"done after {time.time() - started:.0f} s: {folder}")


def check(options: Options) -> None:
    """Refuse numbers that make no sense, before any work is done."""
    for name in ("ngf", "ndf", "keep_every", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    if options.minutes is not None and not options.minutes > 0:
        raise UserError(f"--minutes is {options.minutes:g}; it must be more than 0")
    replace(NO_INGREDIENTS, perceptual=options.perceptual).check()
    if options.minutes is not None and options.epochs is not None:
        raise UserError("--epochs and --minutes both say when to end; give one of them")


def paired_work(recipe: TaskRecipe, options: Options, device: torch.device) -> Work:
    """One generator and one discriminator that sees its input too."""
    length = _until(options.training, options)
    train, val = (embedded_pairs(recipe.images, split) for split in ("train", "val"))
    architectures = _architectures(recipe, options)
    generator, discriminator = _fresh(list(architectures.values()), length, device)
    added = replace(NO_INGREDIENTS, perceptual=options.perceptual)
    trainer = PairedTrainer(generator, discriminator, length, ingredients=added)
    inputs, targets = (to_float(images).to(device) for images in (val.inputs, val.targets))
    extractor = load_extractor(device=device)
    features = extractor(targets)

    def measure(result: nn.Module) -> dict[str, float]:
        return _figures(result, inputs, targets, features, extractor)

    return Work(
        trainer,
        train,
        length,
        architectures,
        lambda result: {"generator": result, "discriminator": discriminator},
        measure,
        lambda result: {
            "input": inputs[:16],
            "made": run_batched(result, inputs[:16]),
            "target": targets[:16],
        },
    )


def unpaired_work(recipe: TaskRecipe, options: Options, device: torch.device) -> Work:
    """Both directions, each a generator and a discriminator of its target domain.

    The val images are measured with their true counterparts: nothing is chosen by that.
    """
    length = _until(options.cycle, options)
    train, val = embedded_unpaired(recipe.images, "train"), embedded_pairs(recipe.images, "val")
    agents = [(kind, direction) for direction in DIRECTIONS for kind in ("generator", "discriminator")]
    kinds = _architectures(recipe, options)
    architectures = {f"{kind}_{direction}": kinds[kind] for kind, direction in agents}
    networks = dict(zip(architectures, _fresh(list(architectures.values()), length, device), strict=True))
    for one in DIRECTIONS:
        generator = networks[f"generator_{one}"]
        if isinstance(generator, UnetGenerator):
            start_as_identity(generator)
    trainer = CycleTrainer(
        {
            one: Translator(networks[f"generator_{one}"], networks[f"discriminator_{one}"])
            for one in DIRECTIONS
        },
        length,
    )
    first, second = (to_float(images).to(device) for images in (val.inputs, val.targets))
    domains: dict[Direction, tuple[Tensor, Tensor]] = {"A": (first, second), "B": (second, first)}
    extractor = load_extractor(device=device)
    features = {one: extractor(target) for one, (_, target) in domains.items()}

    def measure(result: Mapping[Direction, nn.Module]) -> dict[str, float]:
        row: dict[str, float] = {}
        for one, (source, target) in domains.items():
            figures = _figures(result[one], source, target, features[one], extractor)
            row |= {f"{name}_{one}": value for name, value in figures.items()}
        return row

    def named(result: Mapping[Direction, nn.Module]) -> dict[str, nn.Module]:
        return networks | {f"generator_{one}": result[one] for one in DIRECTIONS}

    def picture(result: Mapping[Direction, nn.Module]) -> dict[str, Tensor]:
        shown = slice(None, None, 10)
        columns = {"A": first[shown], "A to B": run_batched(result["A"], first[shown])}
        columns |= {"back": run_batched(result["B"], columns["A to B"])}
        return columns | {"B": second[shown], "B to A": run_batched(result["B"], second[shown])}

    return Work(trainer, train, length, architectures, named, measure, picture)


def _figures(
    generator: nn.Module, inputs: Tensor, targets: Tensor, features: Tensor, extractor: Extractor
) -> dict[str, float]:
    """KID and L1 of the outputs, rounded as in files; ``features`` are those of the targets."""
    made = to_float(to_uint8(run_batched(generator, inputs)))
    return {f"val_{KID}": kid(features, extractor(made)), "val_l1": image_l1(made, targets)}


def _until(training: Any, options: Options) -> Any:
    """The options of a loop with the end that the command line gives."""
    if options.minutes is not None:
        return replace(training, seconds=60 * options.minutes)
    return training if options.epochs is None else replace(training, epochs=options.epochs)


def _architectures(recipe: TaskRecipe, options: Options) -> dict[str, Architecture]:
    """Kind of network → how it is built."""
    asked = {
        "generator": (recipe.generator, options.ngf),
        "discriminator": (recipe.discriminator, options.ndf),
    }
    return {
        kind: architecture if width is None else replace(architecture, base_width=width)
        for kind, (architecture, width) in asked.items()
    }


def _fresh(architectures: list[Architecture], options: LoopOptions, device: torch.device) -> list[nn.Module]:
    """Networks with their first weights, drawn one after the other."""
    random = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    networks = [initialise(architecture.build(), random).to(device) for architecture in architectures]
    return [quick_layout(network, options.amp) for network in networks]


def _plain(options: Options) -> dict[str, Any]:
    """Options as JSON holds them."""
    return json.loads(json.dumps(asdict(options), default=str))


def _check_same(folder: Path, options: Options) -> None:
    """Refuse to go on with other options than a training began with; only its end may move."""
    before = json.loads((folder / "options.json").read_text())
    now = _plain(options)
    for one in (before, now):
        for name in ("epochs", "minutes"):
            one.pop(name, None)
    if before != now:
        raise UserError(f"{folder} holds a training with other options; use them again, or another --output")


def _go_on(trainer: Trainer[Any, Any, Any], checkpoint: Path, device: torch.device) -> None:
    try:
        trainer.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True))
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint} is damaged ({error}); delete it to start again") from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    cli.run(main, Options, __doc__ or "", EXAMPLES)
