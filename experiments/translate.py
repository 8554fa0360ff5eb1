"""Use a result: images in, translated images out, with the pruned or the dense generator."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tyro.conf import Positional

from experiments import cli
from experiments.runs import open_run, task_of
from gan.checkpoints import load_network
from gan.data import to_float, to_uint8
from gan.errors import UserError
from gan.folders import SUFFIXES, Preprocess, as_tensor, open_image
from gan.two_way import direction_of, load_any_task

EXAMPLES = (
    ("python experiments/translate.py runs/NAME --input drawings --output made", "with the pruned generator"),
    (
        "python experiments/translate.py runs/NAME --dense --input drawings --output made",
        "with the dense one",
    ),
    ("python experiments/translate.py generator.safetensors --input a --output b", "with a weight file"),
)
DESCRIPTION = """Translates every image of a folder; the results keep their names, as PNG."""


@dataclass(frozen=True)
class Options:
    """Options of ``translate.py``."""

    model: Positional[Path]
    """Run folder, or a generator's .safetensors file with its recipe beside it."""
    input: Path
    """Folder of images, or one image."""
    output: Path
    """New or empty folder for the results."""
    network: str = "generator"
    """Which generator of a run with both directions: generator_A or generator_B."""
    dense: bool = False
    """Use the run's dense generator instead of the pruned one."""
    batch_size: int = 16
    """Images per pass."""


@dataclass(frozen=True)
class Translator:
    """A generator and what it takes.

    Attributes:
        network: in evaluation mode.
        channels: of an input: 3, or 1 for grey.
        height, width: of the images that it was trained on, in pixels.
        preprocess: how those were made, for networks of the user's; None: resized.
    """

    network: nn.Module
    channels: int
    height: int
    width: int
    preprocess: Preprocess | None

    def read(self, path: Path) -> Tensor:
        """One image as uint8 (channels, H, W), as the test images were made.

        Raises:
            UserError: not readable as an image, or too small for the crop.
        """
        image = open_image(path)
        if self.preprocess is not None:
            try:
                image = self.preprocess.without_margin()(image)
            except ValueError as error:
                raise UserError(f"{path}: {error}; use larger images") from error
        elif image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        return as_tensor(image, self.channels)


def load_translator(model: Path, dense: bool, network: str = "generator") -> Translator:
    """The generator of a run or of a weight file.

    Args:
        model: run folder or weight file.
        dense: the run's dense one.
        network: which of the run's.

    Raises:
        UserError: neither a finished run nor a generator's weight file, or no such network.
    """
    if model.is_file():
        if dense:
            raise UserError(
                "--dense needs a run folder, which knows its dense pair; a weight file is used as it is"
            )
        path = model
    else:
        run = open_run(model)
        path = run.weights(network) if dense else run.result(network)
        if dense:
            task, kind = direction_of(load_any_task(task_of(run)), network)
            if kind != "generator":
                raise UserError(f"--network is {network}, a discriminator; name a generator")
            channels, height, width = task.val.inputs.shape[1:]
            return Translator(task.networks[kind], channels, height, width, task.preprocess)
    module, architecture, recipe = load_network(path)
    if not architecture.is_generator:
        raise UserError(f"{model} holds the discriminator {architecture.name!r}; name a generator's file")
    height = int(recipe.get("image_size", 256))
    width = int(recipe.get("image_width", height))
    preprocess = Preprocess(**recipe["preprocess"]) if "preprocess" in recipe else None
    return Translator(module, architecture.in_channels, height, width, preprocess)


def find_images(source: Path) -> list[Path]:
    """Image files of a folder, sorted by name, or the one file.

    Raises:
        UserError: missing, or no image in it.
    """
    if not source.exists():
        raise UserError(f"--input {source} does not exist; name a folder of images, or one image")
    files = (
        [source] if source.is_file() else sorted(f for f in source.iterdir() if f.suffix.lower() in SUFFIXES)
    )
    if not files:
        raise UserError(f"--input {source} has no images; allowed are {', '.join(sorted(SUFFIXES))}")
    return files


def main(options: Options) -> None:
    """Read everything first, then write: an unreadable image leaves no half of a result."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be 1 or more")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(f"--output {options.output} exists and is not empty; name a new folder")
    translator = load_translator(options.model, options.dense, options.network)
    files = find_images(options.input)
    names = [file.stem for file in files]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(
            f"several images are called {doubled[0]!r} (results are {doubled[0]}.png); rename one of them"
        )
    images = [translator.read(file) for file in files]
    started = time.perf_counter()
    made: list[Tensor] = []
    with torch.no_grad():
        for batch in batches(images, options.batch_size):
            made += to_uint8(translator.network(to_float(batch)))
    seconds = time.perf_counter() - started
    options.output.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, made, strict=True):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(options.output / f"{name}.png")
    each = 1e3 * seconds / len(files)
    sizes = sorted({f"{image.shape[-1]} × {image.shape[-2]}" for image in made})
    print(f"{len(files)} images of {', '.join(sizes)} pixels in {options.output}; {each:.1f} ms each")


def batches(images: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Stacks of neighbours of one size."""
    for _, alike in itertools.groupby(images, key=lambda image: image.shape):
        yield from torch.stack(list(alike)).split(size)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
