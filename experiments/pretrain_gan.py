"""Train the dense pair of an embedded task; made the weights that the project ships.

Resumable: run the same command again after an interruption. Every ``--keep-every`` epochs the
averaged generator is kept beside the checkpoint, so that one can see where the val images stop gaining.
"""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from experiments import cli
from experiments.build import pick_device
from gan.checkpoints import save_network, save_tensors
from gan.data import embedded_pairs, to_float
from gan.errors import UserError, unknown
from gan.files import write_bytes
from gan.networks import initialise
from gan.tasks import TASKS
from gan.training import PairedTrainer, TrainingOptions, TrainingProgress

EXAMPLES = (
    ("python experiments/pretrain_gan.py", "remake the embedded pair, about 30 minutes on 2 cores"),
    ("python experiments/pretrain_gan.py --training.epochs 5 --output try", "a short look"),
    (
        "python experiments/pretrain_gan.py --task edges2emoji_resnet --training.amp --training.epochs 70",
        "remake the ResNet's pair",
    ),
)


@dataclass(frozen=True)
class Options:
    """Options of ``pretrain_gan.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    output: Path = Path("pretrained")
    """Folder for the checkpoint, the log and the finished pair."""
    ngf: int | None = None
    """Base width of the generator; the task's own by default."""
    ndf: int | None = None
    """Base width of the discriminator; the task's own by default."""
    keep_every: int = 10
    """Keep the averaged generator every so many epochs."""
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=90))
    """Options of the training loop."""


def main(options: Options) -> None:
    """Pretrain, or go on where an earlier call stopped."""
    for name in ("ngf", "ndf", "keep_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    if options.task not in TASKS:
        raise unknown("task", options.task, TASKS)
    recipe_of_task = TASKS[options.task]
    train, val = (embedded_pairs(recipe_of_task.images, split) for split in ("train", "val"))
    folder = options.output / options.task
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, settings = folder / "checkpoint.pt", folder / "options.json"
    resolved = json.loads(json.dumps(asdict(options), default=str))
    if checkpoint.exists() and json.loads(settings.read_text()) != resolved:
        raise UserError(f"{folder} holds a training with other options; use them again, or another --output")
    settings.write_text(json.dumps(resolved, indent=2) + "\n")

    generator_architecture, discriminator_architecture = (
        architecture if width is None else replace(architecture, base_width=width)
        for architecture, width in (
            (recipe_of_task.generator, options.ngf),
            (recipe_of_task.discriminator, options.ndf),
        )
    )
    random = torch.Generator().manual_seed(options.training.seed)
    torch.manual_seed(options.training.seed)
    device = pick_device("auto")
    generator = initialise(generator_architecture.build(), random).to(device)
    discriminator = initialise(discriminator_architecture.build(), random).to(device)
    if options.training.amp:
        for network in (generator, discriminator):
            network.to(memory_format=torch.channels_last)  # what bfloat16 convolutions are quick in
    trainer = PairedTrainer(generator, discriminator, options.training)
    if checkpoint.exists():
        try:
            trainer.load_state_dict(torch.load(checkpoint, map_location=device, weights_only=True))
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{checkpoint} is damaged ({error}); delete it to start again") from error
        print(f"going on after epoch {trainer.epoch}")

    def on_epoch(progress: TrainingProgress) -> None:
        inputs, targets = to_float(val.inputs).to(device), to_float(val.targets).to(device)
        result = trainer.result(train)
        with torch.no_grad():
            val_l1 = float(F.l1_loss(result(inputs), targets))
        row = {
            "epoch": progress.epoch,
            "seconds": round(progress.seconds, 1),
            "val_l1": val_l1,
            **progress.losses,
        }
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        losses = " ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
        print(f"epoch {progress.epoch}/{options.training.epochs} {losses} val_l1 {val_l1:.4f}", flush=True)
        if progress.epoch % options.keep_every == 0:
            save_tensors(folder / f"averaged-{progress.epoch}.safetensors", result.state_dict())
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(trainer.state_dict(), temporary)
        temporary.replace(checkpoint)

    started = time.time()
    result = trainer.fit(train, on_epoch)
    recipe = {
        "task": options.task,
        "image_size": int(train.inputs.shape[-1]),
        "command": f"python experiments/pretrain_gan.py --task {options.task}",
        "training": asdict(options.training),
        "epochs": trainer.epoch,
    }
    save_network(folder / "generator.safetensors", result, generator_architecture, recipe, half=True)
    save_network(
        folder / "discriminator.safetensors", discriminator, discriminator_architecture, recipe, half=True
    )
    write_bytes(folder / "done", b"")
    print(f"done after {time.time() - started:.0f} s: {folder}")


if __name__ == "__main__":
    cli.run(main, Options, __doc__ or "", EXAMPLES)
