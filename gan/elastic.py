"""Elastic weights: one copy of the dense pair that works at many widths at once.

Slicing trained weights without any training gives noise. The warm-up orders the channels by
importance, then trains the largest, the smallest and random prefixes together, taught by the dense
networks (the sandwich rule of Yu & Huang, "Universally Slimmable Networks", ICCV 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gan.data import PairedImages, to_float
from gan.distillation import (
    FeatureDistance,
    Lesson,
    PerceptualDistance,
    generator_taps,
    some_places,
)
from gan.errors import UserError
from gan.groups import ChannelGroup
from gan.importance import l1_importance, order_of
from gan.losses import (
    condition_of,
    discriminator_loss,
    generator_loss,
    logit_distillation,
    output_distillation,
    paired_input,
)
from gan.runtime import bfloat16_pays
from gan.slicing import Slicer
from gan.taps import recorded


@dataclass(frozen=True)
class ElasticNetwork:
    """Weights whose channels are in order of importance, ready to be cut to any width.

    Attributes:
        slicer: where the channels sit.
        tensors: full-width state dict, permuted; shared by all slices, never changed by them.
        orders: per group the dense index of each channel, most important first.
        importance: per group (channels,) importance in that order, descending.
    """

    slicer: Slicer
    tensors: dict[str, Tensor]
    orders: tuple[Tensor, ...]
    importance: tuple[Tensor, ...]

    def network(self, widths: Sequence[int], shared: bool = False) -> nn.Module:
        """A slice as a network of its own, in evaluation mode."""
        return self.slicer.network(self.tensors, widths, shared)


def order_channels(network: nn.Module, groups: Sequence[ChannelGroup]) -> ElasticNetwork:
    """Raw dense weights with their channels in order of importance: the start of the warm-up."""
    importance = l1_importance(network, groups)
    orders = order_of(importance)
    slicer = Slicer(network, groups)
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    descending = tuple(row[order] for row, order in zip(importance, orders, strict=True))
    return ElasticNetwork(slicer, slicer.permuted(tensors, orders), orders, descending)


@dataclass(frozen=True)
class ElasticOptions:
    """Options of the warm-up."""

    steps: int = 1200
    """Updates; each trains three widths of the generator."""
    batch_size: int = 16
    """Images per step."""
    learning_rate: float = 1e-3
    """Of Adam; falls along a cosine to 0."""
    ema: float = 0.995
    """Decay per step of the averaged weights, which are the result."""
    spread: float = 0.4
    """Standard deviation of a random width's log ratio around the plan's base ratio, group by group."""
    tilt: float = 0.0
    """The same for smooth profiles along the depth: narrow bottlenecks, wide ends, and the reverse."""
    largest: float = 1.0
    """Largest base ratio of a random plan."""
    adversarial: float = 0.0
    """Weight of fooling a critic that learns to tell the elastic outputs from the dense ones."""
    perceptual: float = 0.0
    """Weight of the distance to the dense outputs in early features of EfficientNet-Lite1, with which no
    figure is measured; that of the mean absolute difference is 1."""
    features: float = 0.0
    """Weight of the distance between the generator's feature maps and the dense ones, by kernel alignment."""
    shift: int = 8
    """Largest shift of the images, in pixels."""
    mixing: float = 0.5
    """Share of the images that get a patch of another one. The teacher labels any input, and mixed
    ones keep it from answering with memorised training images."""
    seed: int = 0
    """Of images, augmentation and widths."""

    def check(self) -> None:
        """Refuse what no warm-up can use.

        Raises:
            UserError: in one sentence.
        """
        for name in ("steps", "batch_size", "learning_rate", "largest"):
            value = getattr(self, name)
            if not 0 < value < math.inf:  # NaN too
                raise UserError(f"the warm-up's {name.replace('_', ' ')} is {value}; it must be above 0")
        for name in ("spread", "tilt", "adversarial", "perceptual", "features", "shift", "seed"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"the warm-up's {name} is {value}; it must be 0 or more")
        for name in ("ema", "mixing"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"the warm-up's {name} is {value}; it must be from 0 to 1")


def random_widths(
    dense: Sequence[int],
    multiple: int,
    smallest: Sequence[int],
    options: ElasticOptions,
    random: torch.Generator,
) -> tuple[int, ...]:
    """Widths of a random plan: a base ratio between the smallest plan's and the largest, and noise.

    The base is uniform in log, so that small plans, where quality is lost, are seen as often as large ones.
    The noise is a smooth profile along the depth (two cosines: one end against the other, ends against the
    middle) plus independent noise per group.
    """
    ratios = torch.tensor([s / d for s, d in zip(smallest, dense, strict=True)], dtype=torch.float64)
    lowest = math.log(float(ratios.mean()))
    highest = max(lowest, math.log(options.largest))
    base = highest + (lowest - highest) * float(torch.rand((), generator=random, dtype=torch.float64))
    noise = torch.randn(len(dense), generator=random, dtype=torch.float64) * options.spread
    if options.tilt > 0:
        depth = (torch.arange(len(dense), dtype=torch.float64) + 0.5) * (math.pi / len(dense))
        amplitudes = torch.randn(2, generator=random, dtype=torch.float64) * options.tilt
        noise += amplitudes[0] * depth.cos() + amplitudes[1] * (2 * depth).cos()
    widths = []
    for channels, ratio in zip(dense, torch.exp(base + noise).tolist(), strict=True):
        width = multiple * max(1, round(ratio * channels / multiple))
        widths.append(int(min(channels, width)))
    return tuple(widths)


def teaching_images(
    pairs: PairedImages, options: ElasticOptions, random: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (inputs, targets), float32 in [−1, 1], strongly augmented.

    Mirrors, quarter turns, shifts and patches of other pairs: inputs that the dense generator has not
    memorised, on which it behaves as on unseen images.
    """
    n, size = len(pairs), min(options.batch_size, len(pairs))
    while True:
        for rows in torch.randperm(n, generator=random).split(size):
            if len(rows) < size:
                continue
            both = torch.cat([pairs.inputs[rows], pairs.targets[rows]], 1)
            draws = torch.randint(0, 8, (size,), generator=random).tolist()
            moves = torch.randint(-options.shift, options.shift + 1, (size, 2), generator=random).tolist()
            images = []
            for image, draw, (down, right) in zip(both, draws, moves, strict=True):
                square = image.shape[-1] == image.shape[-2]
                image = torch.rot90(image, draw % 4 if square else 2 * (draw % 2), (-2, -1))
                image = image.flip(-1) if draw >= 4 else image
                images.append(torch.roll(image, (down, right), (-2, -1)))
            mixed = torch.stack(images)
            height, width = mixed.shape[-2:]
            for i in range(size):
                if float(torch.rand((), generator=random)) < options.mixing:
                    top, left = (int(torch.randint(0, s // 2, (), generator=random)) for s in (height, width))
                    h, w = (int(torch.randint(s // 4, s // 2, (), generator=random)) for s in (height, width))
                    mixed[i, :, top : top + h, left : left + w] = images[i - 1][
                        :, top : top + h, left : left + w
                    ]
            inputs, targets = to_float(mixed).split([pairs.inputs.shape[1], pairs.targets.shape[1]], 1)
            yield inputs, targets


class Adversary:
    """A discriminator that learns during the warm-up to tell elastic outputs from dense ones.

    A distance between images alone is content with blur; what finetuning makes of a plan is not blurred,
    so neither should be what the plan is scored by.

    Args:
        network: where it starts from; trained in place.
        options: of the warm-up.
    """

    def __init__(self, network: nn.Module, options: ElasticOptions) -> None:
        self.network = network.train().requires_grad_(True)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.learning_rate / 5, betas=(0.5, 0.999)
        )

    def fooled(self, condition: Tensor, made: Tensor) -> Tensor:
        """The generator's loss (0-d) for its outputs (N, 3, H, W); reaches no weight of the adversary."""
        self.network.requires_grad_(False)
        return generator_loss(self.network(paired_input(condition, made)).float(), "vanilla")

    def learn(self, condition: Tensor, lesson: Tensor, made: Tensor) -> None:
        """One step: dense outputs are real, elastic ones are not."""
        self.network.requires_grad_(True)
        real, fake = (self.network(paired_input(condition, images)).float() for images in (lesson, made))
        self.optimizer.zero_grad(set_to_none=True)
        discriminator_loss(real, fake, "vanilla").backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def train_elastic(
    dense: tuple[nn.Module, nn.Module],
    networks: tuple[ElasticNetwork, ElasticNetwork],
    smallest: tuple[Sequence[int], Sequence[int]],
    multiples: tuple[int, int],
    pairs: PairedImages,
    options: ElasticOptions,
    on_step: Callable[[int, int, float], None] | None = None,
) -> tuple[ElasticNetwork, ElasticNetwork]:
    """Train a pair to work at many widths.

    Args:
        dense: the dense generator and discriminator: the teachers, unchanged.
        networks: their channel-ordered copies: the start, unchanged.
        smallest: the smallest widths that the search will ask for, of each.
        multiples: widths are multiples of these.
        pairs: training images.
        on_step: called with (step, steps, generator loss).

    Returns:
        The averaged weights of both. BatchNorm statistics in them are those of the start: recompute
        them for every slice.
    """
    random = torch.Generator().manual_seed(options.seed)
    teacher, critic = (network.eval() for network in dense)
    device = next(teacher.parameters()).device
    frozen = {"running_mean", "running_var", "num_batches_tracked"}
    weights: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []
    optimizers, schedules = [], []
    for network in networks:
        trained = {
            name: tensor.detach().clone().to(device).requires_grad_(name.rsplit(".", 1)[-1] not in frozen)
            for name, tensor in network.tensors.items()
        }
        weights.append(trained)
        averages.append({name: tensor.detach().clone() for name, tensor in trained.items()})
        leaves = [tensor for tensor in trained.values() if tensor.requires_grad]
        optimizers.append(torch.optim.Adam(leaves, lr=options.learning_rate, betas=(0.5, 0.999)))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], max(1, options.steps)))
    dense_widths = [network.slicer.dense_widths for network in networks]
    adversary = Adversary(networks[1].network(smallest[1]), options) if options.adversarial > 0 else None
    perceived = PerceptualDistance(device=device) if options.perceptual > 0 else None
    slicer = networks[0].slicer
    taps = generator_taps(teacher, slicer.groups) if options.features > 0 else ()
    alike = FeatureDistance("alignment", taps, teacher, teacher, options.seed)
    amp = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16_pays(device))
    images = teaching_images(pairs, options, random)
    for step in range(options.steps):
        inputs, targets = (x.to(device) for x in next(images))
        with torch.no_grad(), recorded(teacher, taps) as maps, amp():
            lesson = teacher(inputs).float()
        taught = Lesson(lesson, {name: some_places(maps[name], step) for name in taps}, step)
        seen_in_lesson = [] if perceived is None else perceived.maps(lesson)
        condition = condition_of(critic, inputs, targets.shape[1])
        optimizers[0].zero_grad(set_to_none=True)
        total = 0.0
        made = inputs
        draw = random_widths(dense_widths[0], multiples[0], smallest[0], options, random)
        for widths in (dense_widths[0], tuple(smallest[0]), draw):
            with slicer.recorded(taps) as maps, amp():
                made = slicer.run(weights[0], widths, inputs, training=True).float()
            loss = output_distillation(made, lesson)
            total += float(loss.detach())
            if adversary is not None:
                with amp():
                    loss = loss + options.adversarial * adversary.fooled(condition, made)
            if perceived is not None:
                loss = loss + options.perceptual * perceived.from_maps(made, seen_in_lesson)
            if taps:
                loss = loss + options.features * alike(maps, taught)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizers[0].step()
        if adversary is not None:
            with amp():
                adversary.learn(condition, lesson, made.detach())

        # One half of the batch keeps the discriminator's share of the step small; its task is the easier one.
        half = slice(0, max(1, len(inputs) // 2))
        shown = torch.cat([targets[half], lesson[half], made.detach()[half]])
        seen = paired_input(condition[half].repeat(3, 1, 1, 1), shown)
        with torch.no_grad(), amp():
            logits = critic(seen).float()
        optimizers[1].zero_grad(set_to_none=True)
        draw = random_widths(dense_widths[1], multiples[1], smallest[1], options, random)
        for widths in (dense_widths[1] if step % 2 else tuple(smallest[1]), draw):
            with amp():
                answer = networks[1].slicer.run(weights[1], widths, seen, training=True).float()
            logit_distillation(answer, logits).backward()  # type: ignore[no-untyped-call]
        optimizers[1].step()

        decay = min(options.ema, (1 + step) / (10 + step))
        for average, trained in zip(averages, weights, strict=True):
            for name, tensor in trained.items():
                if tensor.requires_grad:
                    average[name].lerp_(tensor.detach(), 1 - decay)
        for schedule in schedules:
            schedule.step()
        if on_step is not None:
            on_step(step + 1, options.steps, total / 3)
    first, second = (
        replace(network, tensors=average) for network, average in zip(networks, averages, strict=True)
    )
    return first, second
