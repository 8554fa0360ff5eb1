"""Take a result along: weights with a recipe, checked ONNX, a loader that needs nothing of this project."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tyro.conf import Positional

from envs.budget import kind_of
from experiments import cli
from experiments.report import evaluation_table
from experiments.runs import RunFolder, open_run, plain, task_of, versions
from experiments.translate import find_images, load_translator
from gan.checkpoints import load_network, recipe_path
from gan.data import to_float
from gan.errors import UserError
from gan.evaluation import Judge
from gan.export import TOLERANCE, Parity, Source, describe_start, export_onnx
from gan.factories import is_factory
from gan.features import load_extractor
from gan.files import file_hash, write_json
from gan.loader import write_loader
from gan.networks import Architecture
from gan.official import save_official
from gan.runtime import OnnxNetwork
from gan.tasks import Task
from gan.two_way import agent_of, direction_of, load_any_task

DESCRIPTION = """Writes a pruned network for use elsewhere: safetensors with a recipe that says what it was
cut out of, ONNX whose outputs were compared with the network's, a .pth file for pytorch-CycleGAN-and-pix2pix,
and a Python file that loads it with torch and safetensors alone."""
EXAMPLES = (
    ("python experiments/export.py runs/NAME", "the result of a run, to runs/NAME/export"),
    ("python experiments/export.py runs/NAME --half --output mobile", "with an ONNX file in fp16"),
    (
        "python experiments/export.py generator.safetensors --images photos",
        "a weight file, checked on photos",
    ),
)
CHECKED = 64
"""Images that ONNX is compared on, at most."""
FEW = 8
"""The same with ``--quick``."""


@dataclass(frozen=True)
class Options:
    """Options of ``export.py``."""

    model: Positional[Path]
    """Finished run, or a .safetensors file with its recipe beside it."""
    output: Path | None = None
    """New folder; without it export/ in the run, or NAME_export beside the file."""
    network: str = "generator"
    """Which network of the run; with both directions generator_A, discriminator_A, generator_B, …"""
    images: Path | None = None
    """Folder of real inputs for the comparison, where the task is not known."""
    source: Path | None = None
    """Elastic weights that the run was made with, if they are neither its own nor the task's."""
    half: bool = False
    """Also write ONNX in fp16, with figures of its own."""
    tolerance: float = TOLERANCE
    """Largest difference that the ONNX file may have from the network, of values in [-1, 1]."""
    quick: bool = False
    """Compare few images and measure no quality: a look around."""


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        weights: its file.
        network: in evaluation mode.
        architecture: with its widths.
        recipe: as it was saved.
        task: where its images come from, if that is known; of its direction, where the run has both.
        run: the run that it is the result of, if it comes from one.
        agent: its name in the run.
    """

    weights: Path
    network: nn.Module
    architecture: Architecture
    recipe: Mapping[str, Any]
    task: Task | None
    run: RunFolder | None
    agent: str = "generator"

    @property
    def kind(self) -> str:
        """``generator`` or ``discriminator``."""
        return kind_of(self.agent)

    @property
    def way(self) -> str:
        """Its direction, ``""`` where the run has one."""
        return self.agent.removeprefix(self.kind).removeprefix("_")


def read_subject(model: Path, network: str) -> Subject:
    """The network of a finished run or of a file.

    Raises:
        UserError: neither of them.
    """
    if model.is_file():
        return Subject(model, *load_network(model), None, None)
    run = open_run(model)
    weights = run.result(network)
    task, _ = direction_of(load_any_task(task_of(run)), network)
    return Subject(weights, *load_network(weights), task, run, network)


def real_inputs(subject: Subject, options: Options) -> Tensor:
    """(N, C, H, W) inputs in [-1, 1] that the network was made for.

    Raises:
        UserError: none are known.
    """
    channels = subject.architecture.in_channels
    if options.images is not None:
        translator = load_translator(subject.weights, dense=False)
        images = [translator.read(file) for file in find_images(options.images)]
        alike = [image for image in images if image.shape == images[0].shape]
        return to_float(torch.stack(alike[: FEW if options.quick else CHECKED]))
    if subject.task is None:
        raise UserError(
            f"nothing says what images {subject.weights} is for; name a folder of them with --images"
        )
    inputs, targets = subject.task.val.take(FEW if options.quick else CHECKED).tensors()
    return inputs if channels == inputs.shape[1] else torch.cat([inputs, targets], 1)


def find_start(subject: Subject, path: Path, extra: Path | None) -> dict[str, Any] | None:
    """The recipe of what finetuning began with, by the first source that gives it bit for bit, or None.

    Args:
        subject: of a run; anything else has no start.
        path: where the exported weights lie; the statistics go beside them.
        extra: elastic weights that the user names.

    Raises:
        UserError: the named weights do not give it: the recipe would silently name others, or none.
    """
    if subject.run is None or subject.task is None or subject.kind not in subject.task.architectures:
        return None
    raw = subject.run.weights(subject.agent, "raw")
    if not raw.is_file():
        return None
    start, architecture, recipe = load_network(raw)
    dense = subject.task.architectures[subject.kind]
    own = subject.run.elastic_of(subject.way)
    candidates = [("elastic", file) for file in (extra, own, subject.task.elastic_path) if file]
    candidates += [("dense", file) for file in (subject.task.weight_files.get(subject.kind),) if file]
    for kind, file in candidates:
        if file.is_file():
            source = Source.read(kind, file, dense, subject.kind, int(recipe["image_size"]))
            found = describe_start(path, source, start, architecture.widths or dense.dense_widths)
            if found is not None:
                return found
        if file == extra:
            raise UserError(
                f"--source {extra} is not what the run's {subject.agent} was cut out of; name the elastic "
                "weights that the run was made with, or leave it out"
            )
    return None


def quality(
    subject: Subject, discriminator: nn.Module, written: Mapping[str, Path]
) -> tuple[dict[str, dict[str, float]], int]:
    """Rows of figures on the test images: dense, pruned, and every ONNX file as ONNX Runtime computes it."""
    task = subject.task
    assert task is not None
    judge = Judge.build(
        task.networks["generator"], task.networks["discriminator"], task.test, load_extractor()
    )
    rows = {
        "dense": judge.row(task.networks["generator"], task.networks["discriminator"]),
        "pruned": judge.row(subject.network, discriminator),
    }
    for name, path in written.items():
        row = judge.row(OnnxNetwork(path), discriminator)
        rows[name] = {**row, **{key: rows["pruned"][key] for key in ("macs", "params")}}
    return rows, len(task.test)


def main(options: Options) -> None:
    """Write everything, or nothing."""
    if not 0 < options.tolerance < 1:
        raise UserError(f"--tolerance is {options.tolerance}; it must lie between 0 and 1")
    if options.source is not None and not options.source.is_file():
        raise UserError(f"--source {options.source} does not exist; name a file of elastic weights")
    subject = read_subject(options.model, options.network)
    if options.source is not None and subject.run is None:
        raise UserError("--source is for runs, which know what they were cut to; leave it out for a file")
    name = options.network if subject.run is not None else subject.weights.stem
    images = real_inputs(subject, options)
    output = options.output or (
        subject.run.path / (f"export_{subject.way}" if subject.way else "export")
        if subject.run is not None
        else subject.weights.with_name(f"{subject.weights.stem}_export")
    )
    console = Console()
    with cli.new_folder(output) as folder:
        weights = folder / f"{name}.safetensors"
        shutil.copyfile(subject.weights, weights)
        start = find_start(subject, weights, options.source)
        write_json(recipe_path(weights), {**subject.recipe, **({"start": start} if start else {})})
        parities, files = write_models(subject, images, folder, name, options)
        if subject.architecture.is_generator and not is_factory(subject.architecture.name):
            save_official(folder / "latest_net_G.pth", subject.network)
            write_loader(folder / f"pruned_{name}.py", subject.architecture, weights.name, "latest_net_G.pth")
        about: dict[str, Any] = {
            "from": str(subject.weights),
            "versions": versions(),
            "parity": {key: asdict(parity) for key, parity in parities.items()},
        }
        rows: dict[str, dict[str, float]] = {}
        if subject.run is not None and subject.kind == "generator" and not options.quick:
            discriminator = load_network(subject.run.weights(agent_of("discriminator", subject.way)))[0]
            rows, count = quality(subject, discriminator, files)
            about |= {"rows": rows, "protocol": f"{count} test images, as in the run's table"}
        about["files"] = {
            file.name: {"bytes": file.stat().st_size, "hash": file_hash(file)}
            for file in sorted(folder.iterdir())
        }
        write_json(folder / "export.json", plain(about))
    if rows:
        evaluation_table(rows, console)
    tell(console, output, about, parities, start)


def write_models(
    subject: Subject, images: Tensor, folder: Path, name: str, options: Options
) -> tuple[dict[str, Parity], dict[str, Path]]:
    """The ONNX files: how far they are from the network, and where they lie."""
    parities, files = {}, {}
    about = {
        "weights_hash": str(subject.recipe.get("weights_hash", "")),
        "task": subject.recipe.get("task", ""),
    }
    for key, half in (("onnx", False), ("onnx_fp16", True))[: 2 if options.half else 1]:
        files[key] = folder / (f"{name}_fp16.onnx" if half else f"{name}.onnx")
        tolerance = None if half else options.tolerance
        parities[key] = export_onnx(
            files[key], subject.network, images, half=half, tolerance=tolerance, about=about
        )
    return parities, files


def tell(
    console: Console,
    output: Path,
    about: Mapping[str, Any],
    parities: Mapping[str, Parity],
    start: Mapping[str, Any] | None,
) -> None:
    """What was written, and how far it is from the network."""
    for file, entry in about["files"].items():
        console.print(f"{entry['bytes'] / 1e6:8.2f} MB  {output / file}", highlight=False, soft_wrap=True)
    for key, parity in parities.items():
        sizes = ", ".join(f"{height} × {width}" for height, width in parity.sizes)
        console.print(
            f"{key}: differs from the network by at most {parity.max_difference:.1e} "
            f"({parity.images} images; sizes tried: {sizes}; sizes are multiples of {parity.size_multiple})",
            highlight=False,
            soft_wrap=True,
        )
    if start is not None:
        source = start["source"]
        console.print(
            f"the recipe repeats the start of the finetuning from {source['file']} ({source['hash']})",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
