"""Use a result: images in, translated images out, with the pruned or the dense generator."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tyro.conf import Positional

from experiments import cli
from experiments.runs import open_run, read_json
from gan.checkpoints import load_network
from gan.data import to_float, to_uint8
from gan.errors import UserError
from gan.tasks import load_task

EXAMPLES = (
    ("python experiments/translate.py runs/NAME --input drawings --output made", "with the pruned generator"),
    (
        "python experiments/translate.py runs/NAME --dense --input drawings --output made",
        "with the dense one",
    ),
    ("python experiments/translate.py generator.safetensors --input a --output b", "with a weight file"),
)
DESCRIPTION = """Translates every image of a folder; the results keep their names, as PNG."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Options:
    """Options of ``translate.py``."""

    model: Positional[Path]
    """Run folder, or a generator's .safetensors file with its recipe beside it."""
    input: Path
    """Folder of images, or one image."""
    output: Path
    """New or empty folder for the results."""
    dense: bool = False
    """Use the run's dense generator instead of the pruned one."""
    batch_size: int = 16
    """Images per pass."""


def load_generator(model: Path, dense: bool) -> tuple[nn.Module, int]:
    """The generator in evaluation mode and the image size that it was trained on.

    Raises:
        UserError: neither a finished run nor a generator's weight file.
    """
    if model.is_file():
        if dense:
            raise UserError(
                "--dense needs a run folder, which knows its dense pair; a weight file is used as it is"
            )
        network, architecture, recipe = load_network(model)
        if not architecture.is_generator:
            raise UserError(f"{model} holds the discriminator {architecture.name!r}; name a generator's file")
        return network, int(recipe.get("image_size", 256))
    run = open_run(model)
    if dense:
        task = load_task(read_json(run.options)["task"])
        return task.networks["generator"], task.image_size
    run.require(run.weights("generator"))
    network, _, recipe = load_network(run.weights("generator"))
    return network, int(recipe["image_size"])


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


def read_image(path: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size); others are resized, transparency becomes white.

    Raises:
        UserError: not readable as an image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # converted as it is, 16-bit grey would be cut off at 255
                levels = (np.asarray(image) // 256).astype(np.uint8)
                layered = Image.fromarray(levels).convert("RGBA")
            else:
                layered = ImageOps.exif_transpose(image).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as an image ({error}); remove it or save it again as PNG"
        ) from error
    flat = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    if flat.size != (size, size):
        flat = flat.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1)


def main(options: Options) -> None:
    """Read everything first, then write: an unreadable image leaves no half of a result."""
    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be 1 or more")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(f"--output {options.output} exists and is not empty; name a new folder")
    generator, size = load_generator(options.model, options.dense)
    files = find_images(options.input)
    names = [file.stem for file in files]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(
            f"several images are called {doubled[0]!r} (results are {doubled[0]}.png); rename one of them"
        )
    images = torch.stack([read_image(file, size) for file in files])
    started = time.perf_counter()
    with torch.no_grad():
        made = torch.cat([to_uint8(generator(to_float(chunk))) for chunk in images.split(options.batch_size)])
    seconds = time.perf_counter() - started
    options.output.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, made, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(options.output / f"{name}.png")
    each = 1e3 * seconds / len(files)
    print(f"{len(files)} images of {size} × {size} pixels in {options.output}; {each:.1f} ms each")


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
