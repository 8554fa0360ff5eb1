"""A task of the user's own networks as a folder: written, found, read back.

The folder holds ``task.json`` and the dense networks with their recipes, so that a run does not depend on
``latest_net_G.pth``, which the next training overwrites. Images stay where they are. A task of both
directions holds the folder of each, ``A`` and ``B``, which is a task of one direction to every program.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

from gan.checkpoints import load_network, save_network
from gan.cyclegan import DIRECTIONS, TWO_WAY_TASKS
from gan.errors import UserError
from gan.files import write_json
from gan.folders import PairedSplits, Preprocess, Reading, load_drawn, load_pairs
from gan.losses import AdversarialKind
from gan.own_task import AGENTS, OwnTask
from gan.own_two_way import AnyOwn, OwnTwoWay

TASK_FILE = "task.json"
BACK = "back.safetensors"
"""File of the generator of the way back, where the folder of the other direction does not hold it."""
ELASTIC = "elastic.safetensors"


def _images_mark(images: PairedSplits) -> str:
    """A mark of which images a task was made from: all names, and the pixels of val."""
    digest = hashlib.sha256()
    for split in (images.train, images.val, images.test):
        digest.update("\n".join(split.names).encode() + b"\0")
    for pixels in (images.val.inputs, images.val.targets):
        digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_own(folder: Path, task: AnyOwn) -> Path:
    """Write the folder of a task of one direction or both; it is made where it is missing."""
    return save_own_two_way(folder, task) if isinstance(task, OwnTwoWay) else save_own_task(folder, task)


def save_own_two_way(folder: Path, task: OwnTwoWay) -> Path:
    """Write both directions, then what makes one task of them; the folder is made where it is missing."""
    for way, other in zip(DIRECTIONS, reversed(DIRECTIONS), strict=True):
        save_own_task(
            folder / way, task.ways[way], back=(Path("..") / other / "generator.safetensors").as_posix()
        )
    about = {"format": 1, "name": task.name, "ways": list(DIRECTIONS), "notes": list(task.notes)}
    write_json(folder / TASK_FILE, about)
    return folder


def save_own_task(folder: Path, task: OwnTask, back: str = BACK) -> Path:
    """Write the folder of one direction; it is made where it is missing.

    Args:
        folder: where.
        task: what.
        back: file of the way back, from the folder; one in another folder is left to that one's direction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = task.images.val.inputs.shape
    for agent in AGENTS:
        recipe = {**task.sources[agent], "task": task.name, "image_size": int(size[-2])}
        recipe |= image_recipe(size[-1], task.reading.preprocess)
        path = folder / f"{agent}.safetensors"
        save_network(path, task.networks[agent], task.architectures[agent], recipe)
    if task.back is not None and back == BACK:
        save_network(folder / BACK, *task.back, {"task": task.name, "image_size": int(size[-2])})
    about = {
        "format": 1,
        "name": task.name,
        "data": str(task.data),
        "reading": asdict(task.reading),
        "multiples": dict(task.multiples),
        "adversarial": task.adversarial,
        "paired": task.back is None,
        **({} if task.back is None else {"back": back}),
        "images": _images_mark(task.images),
        "notes": list(task.notes),
    }
    write_json(folder / TASK_FILE, about)
    return folder


def image_recipe(width: int, preprocess: Preprocess) -> dict[str, Any]:
    """What a weight file's recipe says of images, beside their height."""
    return {"image_width": int(width), "preprocess": asdict(preprocess)}


def find_task_folder(name: str) -> Path | None:
    """The task folder that a path means: itself, or that of a run; None when it is neither."""
    folder = Path(name)
    return next((f for f in (folder, folder / "task") if (f / TASK_FILE).is_file()), None)


class FourNetworks(NamedTuple):
    """A task of both directions, before anything of it is loaded.

    Attributes:
        name: of the task.
        ways: what the tasks of its directions A and B are loaded by.
        folder: where it lies; None where it is embedded.
    """

    name: str
    ways: tuple[str, str]
    folder: Path | None = None


def find_both(name: str) -> FourNetworks | None:
    """The task of both directions that a name means; None where it means a task of one pair, or nothing.

    Args:
        name: of an embedded task; or a task folder, or the folder of a run with networks of the user's.
    """
    if name in TWO_WAY_TASKS:
        return FourNetworks(name, TWO_WAY_TASKS[name])
    folder = find_task_folder(name)
    if folder is None:
        return None
    try:
        about = json.loads((folder / TASK_FILE).read_text())
    except ValueError:
        return None  # whoever loads it says so
    if not isinstance(about, dict) or about.get("ways") != list(DIRECTIONS):
        return None
    first, second = (str(folder / way) for way in DIRECTIONS)
    return FourNetworks(str(about.get("name", folder.name)), (first, second), folder)


def elastic_places(folder: Path) -> list[Path]:
    """Where the elastic weights of a task folder may lie: in it, or in the run that it belongs to."""
    here = folder.resolve()
    both = find_both(str(here.parent))
    if both is not None and str(here) in both.ways:
        return [folder / ELASTIC, here.parent.parent / f"elastic_{here.name}.safetensors"]
    return [folder / ELASTIC, here.parent / ELASTIC]


def neighbours(folder: Path) -> list[Path]:
    """The files beside a task folder that its task is read from, too: elastic weights, the way back."""
    try:
        back = json.loads((folder / TASK_FILE).read_text()).get("back", BACK)
        return [*elastic_places(folder), folder / str(back)]
    except (ValueError, AttributeError):  # damaged, as load_own_task will say
        return elastic_places(folder)


def load_own_task(folder: Path) -> OwnTask:
    """Read the folder of one direction back, and its images from where they are.

    Raises:
        UserError: damaged files, or images that are not those it was made from.
    """
    path = folder / TASK_FILE
    try:
        about = json.loads(path.read_text())
        reading = about["reading"]
        reading |= {"preprocess": Preprocess(**reading["preprocess"]), "channels": tuple(reading["channels"])}
        about["reading"] = Reading(**reading)
        name, data, mark = str(about["name"]), Path(about["data"]), about["images"]
        multiples = {agent: int(about["multiples"][agent]) for agent in AGENTS}
        adversarial, notes = about["adversarial"], tuple(about["notes"])
        if min(multiples.values()) < 1 or adversarial not in get_args(AdversarialKind):
            raise ValueError(f"multiples {multiples}, adversarial {adversarial!r}")
        paired = bool(about.get("paired", True))  # tasks of older versions do not say
        back_file = folder / str(about.get("back", BACK))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); make the task again") from error
    networks, architectures = {}, {}
    sources: dict[str, dict[str, str]] = {}
    for agent in AGENTS:
        network, architecture, recipe = load_network(folder / f"{agent}.safetensors")
        networks[agent], architectures[agent] = network.requires_grad_(False), architecture
        sources[agent] = {key: str(recipe[key]) for key in ("source", "source_hash") if key in recipe}
    back = None
    if not paired:
        network, architecture, _ = load_network(back_file)
        back = network.requires_grad_(False), architecture
    images = load_pairs(data, about["reading"]) if paired else load_drawn(data, about["reading"])
    if _images_mark(images) != mark:
        raise UserError(
            f"the images in {data} are not those that {folder} was made from; put them back, or make the "
            "task again"
        )
    return OwnTask(
        name,
        data,
        about["reading"],
        multiples,
        adversarial,
        networks,
        architectures,
        sources,
        images,
        notes,
        back,
    )
