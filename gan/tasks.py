"""Named tasks: ready data, dense pair and scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gan.checkpoints import load_network, load_tensors, save_tensors, tensors_hash
from gan.cost import DEFAULT_COST, CostKind, CostModel, build_cost_model
from gan.cyclegan import CycleOptions, Direction, OneWayTrainer, cycle_finetuner
from gan.data import SPLITS, PairedImages, embedded_pairs, embedded_unpaired
from gan.distillation import NO_INGREDIENTS, DensePair, Ingredients
from gan.elastic import ElasticNetwork, order_channels
from gan.errors import UserError, unknown
from gan.factories import groups_of
from gan.features import lite_weights, load_extractor
from gan.files import file_hash
from gan.folders import Preprocess
from gan.groups import ChannelGroup, find_groups
from gan.latency import LatencyTable, measure_latency
from gan.losses import AdversarialKind, condition_of, paired_input
from gan.networks import Architecture
from gan.norm_statistics import recompute_statistics
from gan.own_task import AGENTS, OwnTask
from gan.plans import Plan
from gan.runtime import bfloat16_pays
from gan.scoring import FORMULAS, PairAgent, Scorer, Yardstick, run_batched
from gan.slicing import Slicer
from gan.surrogate import Scope, Surrogate, load_surrogate
from gan.task_folder import (
    TASK_FILE,
    elastic_places,
    find_both,
    find_task_folder,
    load_own_task,
    neighbours,
)
from gan.training import Lessons, PairedTrainer, TrainingOptions, finetuner

Start = Literal["elastic", "dense"]
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class TaskRecipe:
    """What an embedded task is made of.

    Attributes:
        about: one line for the user.
        images: name of its pairs in ``gan.data.embedded_pairs``.
        generator, discriminator: the dense networks.
        direction: which way of an unpaired translator this is; None where the images are paired.
        folder: of its networks in the assets, where that is not the task's name.
    """

    about: str
    images: str
    generator: Architecture
    discriminator: Architecture
    direction: Direction | None = None
    folder: str | None = None


_PATCH_GAN = Architecture("basic", in_channels=6, out_channels=1, base_width=32)
TASKS: dict[str, TaskRecipe] = {
    "edges2emoji": TaskRecipe(
        "Pix2Pix, 64 × 64: Canny edges → Noto emoji, a U-Net",
        "edges2emoji",
        Architecture("unet_64", base_width=32),
        _PATCH_GAN,
    ),
    "edges2emoji_resnet": TaskRecipe(
        "the same images, CycleGAN's generator: six residual blocks, instance norm",
        "edges2emoji",
        Architecture("resnet_6blocks", base_width=24, norm="instance"),
        _PATCH_GAN,
    ),
}
"""Embedded task → what it is made of."""
_CYCLE_GAN = (
    Architecture("unet_64", base_width=12, norm="instance"),
    # Two halvings: logits of 34 × 34 pixels. One of 70 × 70 would see whole images, and remember them.
    # Instance norm: after 500 steps on the real drawings of both styles, it tells 82 % of unseen ones apart;
    # without norm 70 %, with BatchNorm 54 %.
    Architecture("n_layers", in_channels=3, out_channels=1, base_width=32, norm="instance", layers=2),
)
UNPAIRED_TASKS: dict[str, TaskRecipe] = {
    "noto2twemoji": TaskRecipe(
        "CycleGAN, 64 × 64: Noto emoji → Twemoji, unpaired, U-Nets",
        "noto2twemoji",
        *_CYCLE_GAN,
        direction="A",
    ),
    "twemoji2noto": TaskRecipe(
        "the way back of the same translator: Twemoji → Noto emoji",
        "noto2twemoji",
        *_CYCLE_GAN,
        direction="B",
        folder="noto2twemoji",
    ),
}
"""Embedded task without pairs → what it is made of; both ways of one translator were trained together."""
CYCLE_WEIGHTS = ("cycle", "identity", "smoothness")
"""Options of unpaired training that finetuning takes over."""
STATISTICS_IMAGES = 64
"""Train images behind the BatchNorm statistics of a slice."""
MULTIPLES = {"generator": 4, "discriminator": 2}
"""Of the small embedded networks. With 4 the uniform discriminator would leave 4.8 % of a 50 % budget
unused and random plans 1.5 %: a search would win by filling the budget. With 2 it is 0.15 % and 0.8 %."""


@dataclass(frozen=True)
class Task:
    """A dense pair, its images and what is needed to prune it.

    Attributes:
        name: key of ``TASKS``, or the name of the user's image folder.
        networks: agent → dense network, in evaluation mode; read-only.
        architectures: agent → how to build it.
        groups: agent → channel groups in forward order.
        train, val, test: pairs for training, for every choice, and for the final figures.
        multiples: agent → widths are multiples of it.
        elastic_path: elastic weights that come with the task, or None.
        surrogate_path: predictions of finetuned results that come with them, or None.
        latency: agent → measured table of its latency, or None: then there is no cost ``latency`` yet.
        folder: task folder of a user's own pair, absolute; None for embedded tasks.
        preprocess: how its images got to their size.
        adversarial: the loss that the pair was trained with.
        cycle_weights: weights of the unpaired losses that the pair was trained with (``cycle``, ``identity``,
            ``smoothness``), as far as that is known; finetuning goes on with them.
        weight_files: agent → file of its dense network, where it has one.
        back: the dense generator of the way back, which closes the cycle; None where images are paired.
            Without pairs, train and val hold each input beside an image that was drawn once; test holds it
            beside its true counterpart in embedded tasks, and like val in others.
    """

    name: str
    networks: Mapping[str, nn.Module]
    architectures: Mapping[str, Architecture]
    groups: Mapping[str, tuple[ChannelGroup, ...]]
    train: PairedImages
    val: PairedImages
    test: PairedImages
    multiples: Mapping[str, int]
    elastic_path: Path | None
    surrogate_path: Path | None = None
    latency: Mapping[str, LatencyTable] | None = None
    folder: Path | None = None
    preprocess: Preprocess | None = None
    adversarial: AdversarialKind = "vanilla"
    cycle_weights: Mapping[str, Any] = field(default_factory=dict)
    weight_files: Mapping[str, Path] = field(default_factory=dict)
    back: nn.Module | None = None

    @property
    def reference(self) -> str:
        """What :func:`load_task` loads this task by."""
        return self.name if self.folder is None else str(self.folder)

    @property
    def ways(self) -> dict[str, Task]:
        """Direction → its task: this one alone. A task of both directions has ``A`` and ``B``."""
        return {"": self}

    @property
    def device(self) -> torch.device:
        return next(self.networks["generator"].parameters()).device

    @property
    def image_size(self) -> int:
        """Height of the images, in pixels."""
        return int(self.val.inputs.shape[-2])

    def example(self, agent: str) -> Tensor:
        """One input of the network, (1, C, H, W)."""
        pairs = (self.val.inputs, self.val.targets)
        image, target = (torch.zeros(1, *images.shape[1:], device=self.device) for images in pairs)
        if agent == "generator":
            return image
        return paired_input(self._condition(image), target)

    def _condition(self, inputs: Tensor) -> Tensor:
        """What the discriminator is told of the inputs."""
        return condition_of(self.networks["discriminator"], inputs, self.val.targets.shape[1])

    def cost_model(self, agent: str) -> CostModel:
        """What widths of one network cost; with latency where it has been measured."""
        model = build_cost_model(self.networks[agent], self.groups[agent], [self.example(agent)])
        return model if self.latency is None else model.with_latency(self.latency[agent])

    def with_latency(self, tables: Mapping[str, LatencyTable] | None = None) -> Task:
        """The same task with latency tables: the given ones, or measured now, on the task's device."""
        if tables is None:
            tables = {
                agent: measure_latency(
                    self.networks[agent], self.groups[agent], [self.example(agent)], self.multiples[agent]
                )
                for agent in AGENTS
            }
        return replace(self, latency=tables)

    @property
    def dense_widths(self) -> dict[str, tuple[int, ...]]:
        """Agent → width of each channel group before pruning, in forward order."""
        return {agent: tuple(group.channels for group in self.groups[agent]) for agent in AGENTS}

    def ordered(self) -> dict[str, ElasticNetwork]:
        """The dense weights with their channels in order of importance."""
        return {agent: order_channels(self.networks[agent], self.groups[agent]) for agent in AGENTS}

    def shipped_elastic(self) -> dict[str, ElasticNetwork]:
        """The elastic weights that come with the task.

        Raises:
            UserError: there are none, or they belong to another dense pair.
        """
        if self.elastic_path is None:
            dense = self.weight_files.get("generator")
            advice = "make them with --warm-up 1200"
            if dense is not None:
                file = dense.with_name(dense.name.replace("generator", "elastic"))
                command = f"python experiments/train_elastic.py --task {self.reference} --output {file}"
                advice = f"make them: {command}; or for one run, with --warm-up 1200"
            raise UserError(
                f"task {self.name!r} comes without elastic weights; {advice}; or use --start dense"
            )
        return load_elastic(self.elastic_path, self)

    def elastic_weights(self, start: Start) -> dict[str, ElasticNetwork]:
        """What plans are cut from: the shipped elastic weights or the raw dense ones."""
        if start not in ("elastic", "dense"):
            raise unknown("start", start, ("elastic", "dense"))
        return self.ordered() if start == "dense" else self.shipped_elastic()

    def surrogate(self, cost: CostKind, budgets: Mapping[str, tuple[float, float]]) -> Surrogate | None:
        """The shipped predictions of finetuned results, where they hold; None elsewhere.

        They hold for plans that are cut from the shipped elastic weights, with the gaps that they were fitted
        with, at budgets where what searches found is among the plans that were finetuned.

        Args:
            cost: what the budgets are a share of.
            budgets: agent → smallest and largest keep ratio.
        """
        if self.surrogate_path is None or self.elastic_path is None:
            return None
        found = load_surrogate(self.surrogate_path)
        if found.scope != Scope(file_hash(self.elastic_path), found.scope.metric, FORMULAS):
            return None
        return found if found.covers(cost, budgets) else None

    def scorer(
        self,
        cost: CostKind = DEFAULT_COST,
        start: Start = "elastic",
        *,
        weights: Mapping[str, ElasticNetwork] | None = None,
        probe: int | None = None,
        statistics_images: int = STATISTICS_IMAGES,
        surrogate: Surrogate | None = None,
    ) -> Scorer:
        """A scorer on the val images.

        Args:
            cost: what budgets speak of; latency is measured first where the task has no tables yet.
            start: where slices come from, unless ``weights`` hands them in.
            weights: agent → elastic weights.
            probe: number of val images; all of them by default.
            statistics_images: train images on which every slice's BatchNorm statistics are recomputed.
            surrogate: what the ``recovery_gap`` is read from; see :meth:`surrogate`.
        """
        if cost not in get_args(CostKind):
            raise unknown("cost", cost, get_args(CostKind))
        costs = self.with_latency() if cost == "latency" and self.latency is None else self
        weights = self.elastic_weights(start) if weights is None else weights
        pairs = self.val.take(probe)
        extractor = load_extractor(device=self.device)
        yardstick = Yardstick(self.networks["generator"], self.networks["discriminator"], pairs, extractor)
        shown = self.statistics_inputs(statistics_images)
        agents = {
            agent: PairAgent(
                weights[agent],
                costs.cost_model(agent),
                shown[agent],
            )
            for agent in AGENTS
        }
        return Scorer(
            agents["generator"],
            agents["discriminator"],
            yardstick,
            multiples=self.multiples,
            cost_kind=cost,
            ranking="l1",
            amp=bfloat16_pays(self.device),
            surrogate=surrogate,
        )

    def finetuner(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        teacher: nn.Module | Lessons,
        options: TrainingOptions | CycleOptions,
        ingredients: Ingredients = NO_INGREDIENTS,
        dense: DensePair | None = None,
    ) -> PairedTrainer | OneWayTrainer:
        """The trainer of a pruned pair, ready to fit on copies of its networks.

        Args:
            generator, discriminator: the pruned pair.
            teacher: the dense generator, or its lessons.
            options: paired ones, or cycle ones where the task has no pairs.
            ingredients: what paired training adds; most need ``dense``.
            dense: the dense pair.

        Raises:
            UserError: ingredients for a task without pairs.
        """
        if self.back is None:
            assert isinstance(options, TrainingOptions)
            return finetuner(generator, discriminator, teacher, options, ingredients, dense)
        assert isinstance(options, CycleOptions)
        self.check_ingredients(ingredients)
        taught_by = teacher.teacher if isinstance(teacher, Lessons) else teacher
        return cycle_finetuner(generator, discriminator, self.back, taught_by, options)

    def check_ingredients(self, ingredients: Ingredients) -> None:
        """Refuse what only pairs can be taught with, and what needs weights that are not installed.

        Raises:
            UserError: ingredients for a task without pairs, or without their weights.
        """
        settled = ingredients.settled(paired=self.back is None)
        if self.back is None:
            if settled.perceptual:
                lite_weights(1)
        elif settled != NO_INGREDIENTS:
            raise UserError(
                f"ingredients of finetuning need pairs; task {self.name!r} has none: leave their options out"
            )

    def cut(self, weights: Mapping[str, ElasticNetwork], plan: Plan) -> tuple[nn.Module, nn.Module]:
        """The networks of a plan, cut out for real, with BatchNorm statistics of their own."""
        shown = self.statistics_inputs()
        generator, discriminator = (
            recompute_statistics(weights[agent].network(plan[agent]), shown[agent]) for agent in AGENTS
        )
        return generator, discriminator

    def statistics_inputs(self, images: int = STATISTICS_IMAGES) -> dict[str, Tensor]:
        """Train images for BatchNorm statistics; real and made ones apart, as in the training."""
        inputs, targets = (x.to(self.device) for x in self.train.take(images).tensors())
        half = slice(0, None, 2)  # as many images as the generator sees, half of them made
        condition, target = inputs[half], targets[half]
        made = run_batched(self.networks["generator"], condition)
        told = self._condition(condition)
        return {
            "generator": inputs,
            "discriminator": torch.cat([paired_input(told, target), paired_input(told, made)]),
        }


def own_task(own: OwnTask, device: str = "cpu", folder: Path | None = None) -> Task:
    """A user's own pair and images as a task.

    Args:
        own: as made or loaded.
        device: where the networks run.
        folder: where it lies, once it is written; elastic weights are looked for there and in its run.
    """
    networks = {agent: network.to(device) for agent, network in own.networks.items()}
    seen = {agent: architecture.in_channels for agent, architecture in own.architectures.items()}
    size = own.images.val.inputs.shape[-2:]
    places = [] if folder is None else elastic_places(folder)
    return Task(
        own.name,
        networks,
        own.architectures,
        {
            agent: groups_of(
                own.architectures[agent].name, network, [torch.zeros(1, seen[agent], *size, device=device)]
            )
            for agent, network in networks.items()
        },
        own.images.train,
        own.images.val,
        own.images.test,
        own.multiples,
        next((path for path in places if path.is_file()), None),
        folder=None if folder is None else folder.resolve(),
        preprocess=own.reading.preprocess,
        adversarial=own.adversarial,
        back=None if own.back is None else own.back[0].to(device),
        weight_files={} if folder is None else {agent: folder / f"{agent}.safetensors" for agent in AGENTS},
    )


def embedded_images(recipe: TaskRecipe) -> tuple[PairedImages, PairedImages, PairedImages]:
    """Train, val and test images of an embedded task; without pairs, only test knows true counterparts."""
    if recipe.direction is None:
        train, val, test = (embedded_pairs(recipe.images, split) for split in SPLITS)
        return train, val, test
    domains = embedded_unpaired(recipe.images, "train"), embedded_unpaired(recipe.images, "val")
    test = embedded_pairs(recipe.images, "test")
    if recipe.direction == "B":
        domains, test = (domains[0].swapped(), domains[1].swapped()), test.swapped()
    return domains[0].drawn(), domains[1].drawn(), test


def check_one_pair(name: str) -> None:
    """Refuse a task of four networks where a program takes one pair.

    Raises:
        UserError: with the names of its directions.
    """
    both = find_both(name)
    if both is not None:
        raise UserError(
            f"{name} has four networks and this takes one pair: name a direction, {' or '.join(both.ways)}"
        )


def load_task(name: str = "edges2emoji", device: str = "cpu") -> Task:
    """A named task with its pretrained pair, or a user's own; remembered while its files stay what they are.

    Images of a user's own are read once in a process.

    Args:
        name: key of ``TASKS`` or ``UNPAIRED_TASKS``; or a task folder, or the folder of a run with networks
            of the user's.
        device: where the networks run.

    Raises:
        UserError: unknown name, or weight files that are missing or damaged.
    """
    known = TASKS | UNPAIRED_TASKS
    check_one_pair(name)
    if name in known:
        folder = ASSETS / (known[name].folder or name)
        return _embedded_task(name, folder, device, _state_of(folder))
    if (own := find_task_folder(name)) is not None:
        folder = own.resolve()  # the same words mean another folder once the working directory changes
        return _folder_task(folder, device, _state_of(folder, *neighbours(folder)))
    if Path(name).is_dir():
        raise UserError(f"{name} is no task folder (it has no {TASK_FILE}): make_task.py writes one")
    raise unknown("task", name, known)


FilesState = tuple[tuple[Path, int, int], ...]
"""Path, time of the last change in ns and size in bytes of some files."""


def _state_of(folder: Path, *more: Path) -> FilesState:
    """The state of the files that a task is read from: those of a folder and some more."""
    files = sorted({file for file in [*folder.glob("*"), *more] if file.is_file()})
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=8)
def _folder_task(folder: Path, device: str, state: FilesState) -> Task:
    """The task of a folder whose files are in this state."""
    return own_task(load_own_task(folder), device, folder)


@lru_cache(maxsize=8)
def _embedded_task(name: str, folder: Path, device: str, state: FilesState) -> Task:
    """The task of a name that the project knows, of weights that lie in a folder in this state."""
    recipe = (TASKS | UNPAIRED_TASKS)[name]
    way = "" if recipe.direction is None else f"_{recipe.direction}"
    networks, architectures, groups = {}, {}, {}
    trained_with: Mapping[str, Any] = {}
    files = {agent: folder / f"{agent}{way}.safetensors" for agent in AGENTS}
    missing = [file for file in files.values() if not file.is_file()]
    if missing:
        raise UserError(
            f"the pretrained networks of task {name!r} are not there ({missing[0]}); make them, in hours: "
            f"python experiments/pretrain_gan.py --task {recipe.folder or name} --output {ASSETS}"
        )
    train, val, test = embedded_images(recipe)
    for agent, file in files.items():
        network, architecture, made = load_network(file)
        trained_with = made.get("training", trained_with)
        network = network.to(device).requires_grad_(False)
        example = torch.zeros(1, architecture.in_channels, *val.inputs.shape[-2:], device=device)
        networks[agent], architectures[agent] = network, architecture
        groups[agent] = find_groups(network, [example])
    back = None
    if recipe.direction is not None:
        other = "B" if recipe.direction == "A" else "A"
        back = load_network(folder / f"generator_{other}.safetensors")[0].to(device).requires_grad_(False)
    elastic = folder / f"elastic{way}.safetensors"
    found = elastic if elastic.is_file() else None
    surrogate = folder / f"surrogate{way}.json"
    return Task(
        name,
        networks,
        architectures,
        groups,
        train,
        val,
        test,
        MULTIPLES,
        found,
        surrogate if surrogate.is_file() else None,
        adversarial=trained_with.get("adversarial", "vanilla" if back is None else "lsgan"),
        cycle_weights={name: trained_with[name] for name in CYCLE_WEIGHTS if name in trained_with},
        weight_files=files,
        back=back,
    )


def save_elastic(path: Path, weights: Mapping[str, ElasticNetwork], task: Task) -> Path:
    """Write the elastic weights of a task to one safetensors file: kernels fp16, the rest as it is.

    The dense pair's hash goes in, so that weights never meet a pair that they were not made from.
    """
    tensors: dict[str, Tensor] = {}
    for agent, network in weights.items():
        tensors |= {f"{agent}/weights/{name}": tensor for name, tensor in network.tensors.items()}
        for kind, rows in (("order", network.orders), ("importance", network.importance)):
            tensors |= {f"{agent}/{kind}/{index}": row for index, row in enumerate(rows)}
        tensors[f"{agent}/made_from"] = _hash_tensor(task.networks[agent])
    return save_tensors(path, tensors, half=True)


def load_elastic(path: Path, task: Task) -> dict[str, ElasticNetwork]:
    """Read :func:`save_elastic` back.

    Raises:
        UserError: missing or damaged file, or one that was made from another dense pair.
    """
    tensors = load_tensors(path)
    result = {}
    for agent in AGENTS:
        made_from = tensors.get(f"{agent}/made_from")
        if made_from is None or not torch.equal(made_from, _hash_tensor(task.networks[agent])):
            raise UserError(
                f"the elastic weights {path} were made from another {agent} than task {task.name!r} has; "
                "make them again: python experiments/train_elastic.py"
            )
        groups = task.groups[agent]
        prefix = f"{agent}/weights/"
        weights = {
            name.removeprefix(prefix): t.to(task.device)
            for name, t in tensors.items()
            if name.startswith(prefix)
        }
        orders = tuple(tensors[f"{agent}/order/{index}"] for index in range(len(groups)))
        importance = tuple(tensors[f"{agent}/importance/{index}"] for index in range(len(groups)))
        result[agent] = ElasticNetwork(Slicer(task.networks[agent], groups), weights, orders, importance)
    return result


def named_elastic(name: str, task: Task) -> dict[str, ElasticNetwork]:
    """What plans are cut from: ``elastic`` (the task's own weights), ``dense``, or a file of elastic ones.

    Raises:
        UserError: as :func:`load_elastic`.
    """
    if name in ("elastic", "dense"):
        return task.elastic_weights(name)  # type: ignore[arg-type]
    return load_elastic(Path(name), task)


def _hash_tensor(network: nn.Module) -> Tensor:
    return torch.tensor(list(bytes.fromhex(tensors_hash(network.state_dict()))), dtype=torch.uint8)
