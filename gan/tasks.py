"""Named tasks: ready data, dense pair and scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gan.checkpoints import load_network, load_tensors, save_tensors, tensors_hash
from gan.cost import DEFAULT_COST, CostKind, CostModel, build_cost_model
from gan.data import SPLITS, PairedImages, embedded_pairs
from gan.elastic import ElasticNetwork, order_channels
from gan.errors import UserError, unknown
from gan.features import load_extractor
from gan.files import file_hash
from gan.groups import ChannelGroup, find_groups
from gan.latency import LatencyTable, measure_latency
from gan.losses import paired_input
from gan.networks import Architecture
from gan.norm_statistics import recompute_statistics
from gan.plans import Plan
from gan.runtime import bfloat16_pays
from gan.scoring import FORMULAS, PairAgent, Scorer, Yardstick, run_batched
from gan.slicing import Slicer
from gan.surrogate import Scope, Surrogate, load_surrogate

Start = Literal["elastic", "dense"]
AGENTS = ("generator", "discriminator")
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class TaskRecipe:
    """What an embedded task is made of.

    Attributes:
        about: one line for the user.
        images: name of its pairs in ``gan.data.embedded_pairs``.
        generator, discriminator: the dense networks.
    """

    about: str
    images: str
    generator: Architecture
    discriminator: Architecture


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
STATISTICS_IMAGES = 64
"""Train images behind the BatchNorm statistics of a slice."""
MULTIPLES = {"generator": 4, "discriminator": 2}
"""Of the small embedded networks. With 4 the uniform discriminator would leave 4.8 % of a 50 % budget
unused and random plans 1.5 %: a search would win by filling the budget. With 2 it is 0.15 % and 0.8 %."""


@dataclass(frozen=True)
class Task:
    """A dense pair, its images and what is needed to prune it.

    Attributes:
        name: key of ``TASKS``.
        networks: agent → dense network, in evaluation mode; read-only.
        architectures: agent → how to build it.
        groups: agent → channel groups in forward order.
        train, val, test: pairs for training, for every choice, and for the final figures.
        multiples: agent → widths are multiples of it.
        elastic_path: elastic weights that come with the task, or None.
        surrogate_path: predictions of finetuned results that come with them, or None.
        latency: agent → measured table of its latency, or None: then there is no cost ``latency`` yet.
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

    @property
    def device(self) -> torch.device:
        return next(self.networks["generator"].parameters()).device

    @property
    def image_size(self) -> int:
        """Height of the images, in pixels."""
        return int(self.val.inputs.shape[-2])

    def example(self, agent: str) -> Tensor:
        """One input of the network, (1, C, H, W)."""
        image = torch.zeros(1, *self.val.inputs.shape[1:], device=self.device)
        return image if agent == "generator" else paired_input(image, image)

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

    def ordered(self) -> dict[str, ElasticNetwork]:
        """The dense weights with their channels in order of importance."""
        return {agent: order_channels(self.networks[agent], self.groups[agent]) for agent in AGENTS}

    def shipped_elastic(self) -> dict[str, ElasticNetwork]:
        """The elastic weights that come with the task.

        Raises:
            UserError: there are none, or they belong to another dense pair.
        """
        if self.elastic_path is None:
            raise UserError(
                f"task {self.name!r} comes without elastic weights; train them first, or use --start dense"
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
        return {
            "generator": inputs,
            "discriminator": torch.cat([paired_input(condition, target), paired_input(condition, made)]),
        }


@cache
def load_task(name: str = "edges2emoji", device: str = "cpu") -> Task:
    """A named task, with its pretrained pair.

    Raises:
        UserError: unknown name, or weight files that are missing or damaged.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    folder = ASSETS / name
    networks, architectures, groups = {}, {}, {}
    train, val, test = (embedded_pairs(TASKS[name].images, split) for split in SPLITS)
    for agent in AGENTS:
        network, architecture, _ = load_network(folder / f"{agent}.safetensors")
        network = network.to(device).requires_grad_(False)
        example = torch.zeros(1, architecture.in_channels, *val.inputs.shape[-2:], device=device)
        networks[agent], architectures[agent] = network, architecture
        groups[agent] = find_groups(network, [example])
    elastic = folder / "elastic.safetensors"
    found = elastic if elastic.is_file() else None
    surrogate = folder / "surrogate.json"
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


def _hash_tensor(network: nn.Module) -> Tensor:
    return torch.tensor(list(bytes.fromhex(tensors_hash(network.state_dict()))), dtype=torch.uint8)
