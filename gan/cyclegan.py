"""Pretraining and finetuning of unpaired translators: two generators that undo each other.

Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.data import PairedImages, UnpairedImages, unpaired_batches
from gan.errors import UserError
from gan.feature_critic import FeatureCritic
from gan.loop import (
    Critic,
    LoopOptions,
    Trainer,
    adam,
    average_into,
    run_network,
    set_rate,
    trainable_copy,
    with_statistics,
)
from gan.losses import AdversarialKind, output_distillation, total_variation
from gan.networks import UnetGenerator
from gan.runtime import frozen_copy

Direction = Literal["A", "B"]
DIRECTIONS: tuple[Direction, Direction] = ("A", "B")
"""``A`` translates domain A into B, ``B`` translates B into A, as in pytorch-CycleGAN-and-pix2pix."""
TWO_WAY_TASKS: dict[str, tuple[str, str]] = {"noto_and_twemoji": ("noto2twemoji", "twemoji2noto")}
"""Embedded task of four networks → the tasks of its directions A and B; see ``gan.two_way``."""


def agent_of(kind: str, way: str) -> str:
    """``generator_A`` of the direction A; ``generator`` of the only direction, ``""``."""
    return f"{kind}_{way}" if way else kind


@dataclass(frozen=True)
class CycleOptions(LoopOptions):
    """Options of unpaired training; the defaults are those of CycleGAN (Zhu et al. 2017) where it has any."""

    batch_size: int = 4
    """Images of each domain per step."""
    jitter: float = 0.1
    """Strength of the colour augmentation of what the discriminators see; colours are part of a style."""
    adversarial: AdversarialKind = "lsgan"
    """Loss of the pairs."""
    ema: float = 0.999
    """Decay per step of the averaged generators, which are the result."""
    shift: int = 2
    """Largest shift of the augmentation, in pixels; how far drawings reach is part of a style."""
    cycle: float = 10.0
    """Weight of the distance between an image and its translation there and back."""
    identity: float = 0.5
    """Weight of the distance between a target image and its own translation, as a share of that."""
    smoothness: float = 0.0
    """Weight of the total variation of what a generator changes, its output minus its input: for styles that
    differ in colour and shading. A grain that nobody sees hides what closes the cycle; this makes it dear."""
    features: float = 0.0
    """Weight of critics that see early maps of EfficientNet-Lite1, beside the discriminators, which see
    pixels; they are not part of the result. 0 is off."""
    pool: int = 50
    """Made images that the discriminators are shown again; 0 shows them the newest only."""
    discriminator_batches: int = 1
    """Batches that the discriminators learn from for each that the generators learn from. Discriminators that
    lag behind let grain and haloes pass, and those pay: they hide what closes the cycle."""


SLOPE = 1.6
"""Of the tanh that a generator starts as: 0.92 for white, 1.6 times the contrast in the middle."""


@torch.no_grad()
def start_as_identity(generator: UnetGenerator) -> None:
    """Let a fresh U-Net begin with what it is given: tanh(1.6 x) and noise, instead of noise alone.

    Most of a style translation is its input. The outermost skip is wide enough to hold it: four channels for
    each of the image's, one for each place of a 2 × 2 block, raised by 1 so that no ReLU cuts them, and laid
    out again by the last convolution. What the other channels add is learnt.

    Raises:
        UserError: the outermost level is too narrow, has no bias, or makes other channels than it is given.
    """
    top = generator.model.model
    down, up = top[0], top[-2]
    assert isinstance(down, nn.Conv2d)
    assert isinstance(up, nn.ConvTranspose2d)
    channels = down.in_channels
    if (
        up.out_channels != channels
        or down.out_channels < 4 * channels
        or down.bias is None
        or up.bias is None
    ):
        raise UserError(
            f"a U-Net of {channels} → {up.out_channels} channels and {down.out_channels} at the top cannot "
            "start as the identity; it needs instance norm, equal channels, and four times as many at the top"
        )
    kept = slice(0, 4 * channels)
    for weights in (down.weight, up.weight):
        weights[kept] = 0
    down.bias[kept], up.bias[:] = 1, -SLOPE
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                place = 4 * channel + 2 * row + column
                # Kernels of 4 with padding 1: tap 1 + row of a block is its pixel in that row.
                down.weight[place, channel, 1 + row, 1 + column] = 1
                up.weight[place, channel, 1 + row, 1 + column] = SLOPE


class Translator(NamedTuple):
    """One direction.

    Attributes:
        generator: (N, 3, H, W) → (N, 3, H, W).
        discriminator: images of the target domain (N, 3, H, W) → patch logits. None: the generator is fixed,
            and there to close the cycle of the other direction.
    """

    generator: nn.Module
    discriminator: nn.Module | None


class ImagePool:
    """Made images of earlier steps, so that a discriminator does not forget what it has learnt to see.

    Shrivastava et al., "Learning from Simulated and Unsupervised Images through Adversarial Training",
    CVPR 2017.

    Args:
        size: images that are kept; 0 keeps none.
        random: of the choice.
    """

    def __init__(self, size: int, random: torch.Generator) -> None:
        self.size, self.random = size, random
        self.images: list[Tensor] = []

    def exchange(self, images: Tensor) -> Tensor:
        """As many images as came (N, C, H, W), without gradients.

        While the pool fills, they are those that came. Then each is, at even odds, one from the pool, whose
        place the newcomer takes.
        """
        if self.size == 0:
            return images.detach()
        shown = []
        for image in images.detach():
            if len(self.images) < self.size:
                self.images.append(image.clone())
                shown.append(image)
                continue
            place = int(torch.randint(self.size, (), generator=self.random))
            if float(torch.rand((), generator=self.random)) < 0.5:
                shown.append(self.images[place])
                self.images[place] = image.clone()
            else:
                shown.append(image)
        return torch.stack(shown)

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": torch.stack(self.images)} if self.images else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images = list(state["images"].unbind()) if state else []


class _Learner:
    """One direction in training."""

    def __init__(self, translator: Translator, options: CycleOptions, random: torch.Generator) -> None:
        assert translator.discriminator is not None
        self.generator = translator.generator
        self.averaged = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.optimizer = adam(self.generator)
        self.critic = Critic(translator.discriminator, options, random)
        self.beholder: FeatureCritic | None = None
        if options.features > 0:
            device = next(self.generator.parameters()).device
            self.beholder = FeatureCritic(options, random, device)
        self.pool = ImagePool(options.pool, random)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "generator": self.generator,
            "averaged": self.averaged,
            "optimizer": self.optimizer,
            "critic": self.critic,
            "pool": self.pool,
        }
        return parts if self.beholder is None else parts | {"beholder": self.beholder}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


class CycleTrainer(Trainer[UnpairedImages, tuple[Tensor, Tensor], dict[Direction, nn.Module]]):
    """Trains both directions of an unpaired translator, or one against the fixed generator of the other.

    Args:
        translators: both directions, trained in place; at least one has a discriminator.
        options: see ``CycleOptions``.
        teachers: direction → dense generator for distillation; needed for every direction that learns when
            the weight of distillation is above 0; copied.

    Attributes:
        learners: the directions that learn.
    """

    def __init__(
        self,
        translators: Mapping[Direction, Translator],
        options: CycleOptions,
        teachers: Mapping[Direction, nn.Module] | None = None,
    ) -> None:
        super().__init__(options, next(translators["A"].generator.parameters()).device)
        self.options: CycleOptions = options
        self.generators = {direction: translators[direction].generator for direction in DIRECTIONS}
        self.learners: dict[Direction, _Learner] = {}
        for direction in DIRECTIONS:
            if translators[direction].discriminator is None:
                self.generators[direction].eval().requires_grad_(False)
            else:
                self.learners[direction] = _Learner(translators[direction], options, self.random)
        if not self.learners:
            raise ValueError("nothing to train: hand in the discriminator of at least one direction")
        self.teachers = {
            direction: frozen_copy(network, options.amp) for direction, network in (teachers or {}).items()
        }
        if options.distillation > 0 and not set(self.learners) <= set(self.teachers):
            raise ValueError("distillation needs a teacher for every direction: hand in the dense generators")

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs; tensors and numbers only."""
        learners = {direction: learner.state_dict() for direction, learner in self.learners.items()}
        return {"learners": learners, **self._progress()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a training with the same options.

        Raises:
            KeyError: it was one of other directions.
        """
        for direction, learner in self.learners.items():
            learner.load_state_dict(state["learners"][direction])
        self._restore_progress(state)

    def step(self, first: Tensor, second: Tensor, learning_rate: float) -> dict[str, Tensor]:
        """One update of all networks that learn; returns the losses (0-d tensors).

        Args:
            first, second: images of the domains A and B, (N, 3, H, W) in [−1, 1]; the generators learn from
                the first of ``discriminator_batches`` equal parts, the discriminators from all of them.
            learning_rate: of the generators.
        """
        options = self.options
        parts = zip(
            first.chunk(options.discriminator_batches),
            second.chunk(options.discriminator_batches),
            strict=True,
        )
        first, second = next(parts)
        sources: dict[Direction, Tensor] = {"A": first, "B": second}
        targets: dict[Direction, Tensor] = {"A": second, "B": first}
        made = {direction: self._translate(direction, source) for direction, source in sources.items()}
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for direction, back in zip(DIRECTIONS, reversed(DIRECTIONS), strict=True):
            returned = self._translate(back, made[direction])
            lost = F.l1_loss(returned, sources[direction])
            total = total + options.cycle * lost
            losses[f"cycle {direction}"] = lost.detach()
        for direction, learner in self.learners.items():
            fooling = learner.critic.fooled(None, made[direction])
            total = total + fooling
            losses[f"adversarial {direction}"] = fooling.detach()
            if learner.beholder is not None:
                unseen = learner.beholder.fooled(made[direction])
                total = total + options.features * unseen
                losses[f"features {direction}"] = unseen.detach()
            if options.identity > 0:
                same = F.l1_loss(self._translate(direction, targets[direction]), targets[direction])
                total = total + options.identity * options.cycle * same
                losses[f"identity {direction}"] = same.detach()
            if options.smoothness > 0:
                rough = total_variation(made[direction] - sources[direction])
                total = total + options.smoothness * rough
                losses[f"roughness {direction}"] = rough.detach()
            if options.distillation > 0:
                with torch.no_grad():
                    lesson = run_network(self.teachers[direction], sources[direction], options.amp)
                distilled = output_distillation(made[direction], lesson)
                total = total + options.distillation * distilled
                losses[f"distillation {direction}"] = distilled.detach()
        for learner in self.learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        for learner in self.learners.values():
            set_rate(learner.optimizer, learning_rate)
            learner.optimizer.step()
            average_into(learner.averaged, learner.generator, options.ema, self.steps)
        found = [self._judge(made, targets, learning_rate)]
        for more_first, more_second in parts:
            with torch.no_grad():
                made = {
                    direction: self._translate(direction, source)
                    for direction, source in zip(DIRECTIONS, (more_first, more_second), strict=True)
                    if direction in self.learners
                }
            found.append(self._judge(made, {"A": more_second, "B": more_first}, learning_rate))
        for direction in self.learners:
            losses[f"discriminator {direction}"] = torch.stack([lost[direction] for lost, _ in found]).mean()
        self.margins.append(torch.stack([margin for _, margin in found]).mean())
        return losses

    def _judge(
        self, made: Mapping[Direction, Tensor], real: Mapping[Direction, Tensor], learning_rate: float
    ) -> tuple[dict[Direction, Tensor], Tensor]:
        """One update of every discriminator; returns their losses, and the mean of their margins (0-d)."""
        lost, margins = {}, []
        for direction, learner in self.learners.items():
            shown = learner.pool.exchange(made[direction])
            rate = learning_rate * self.options.discriminator_rate
            lost[direction], margin = learner.critic.learn(None, real[direction], shown, rate)
            margins.append(margin)
            if learner.beholder is not None:
                learner.beholder.learn(real[direction], shown, rate)
        return lost, torch.stack(margins).mean()

    def _translate(self, direction: Direction, images: Tensor) -> Tensor:
        return run_network(self.generators[direction], images, self.options.amp)

    def _steps_per_epoch(self, images: UnpairedImages) -> int:
        size = min(self._shown, len(images.first), len(images.second))
        return max(1, len(images) // size)

    @property
    def _shown(self) -> int:
        """Images of each domain that a step is given."""
        return self.options.batch_size * self.options.discriminator_batches

    def _epoch(self, images: UnpairedImages) -> Iterator[tuple[Tensor, Tensor]]:
        yield from unpaired_batches(images, self._shown, self.random, self.options.shift)

    def _learn(self, batch: tuple[Tensor, Tensor], rate: float) -> dict[str, Tensor]:
        first, second = batch
        return self.step(first.to(self.device), second.to(self.device), rate)

    def _set_training(self, training: bool) -> None:
        for learner in self.learners.values():
            learner.generator.train(training)
            learner.critic.network.train(training)

    def result(self, images: UnpairedImages, count: int = 512) -> dict[Direction, nn.Module]:
        """Direction → a copy of its averaged generator, BatchNorm statistics of ``count`` of its inputs."""
        sources = dict(zip(DIRECTIONS, images.take(count).tensors(), strict=True))
        return {
            direction: with_statistics(learner.averaged, sources[direction])
            for direction, learner in self.learners.items()
        }

    def pairs(self, result: Mapping[Direction, nn.Module]) -> dict[Direction, tuple[nn.Module, nn.Module]]:
        """Direction → the generator of :meth:`fit` and the discriminator, ready to use."""
        ready = {}
        for direction, learner in self.learners.items():
            critic = copy.deepcopy(learner.critic.network).eval().requires_grad_(False)
            networks = result[direction], critic
            ready[direction] = tuple(one.to(memory_format=torch.contiguous_format) for one in networks)
        return ready  # type: ignore[return-value]


class OneWayTrainer(Trainer[PairedImages, tuple[Tensor, Tensor], nn.Module]):
    """Trains one direction against the fixed generator of the way back; hands out what a paired trainer does.

    Args:
        generator: of the direction that learns, trained in place.
        discriminator: of its target domain, trained in place.
        back: the generator of the way back, (N, 3, H, W) → (N, 3, H, W); it only closes the cycle.
        options: see ``CycleOptions``.
        teacher: the dense generator; needed when the weight of distillation is above 0.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        back: nn.Module,
        options: CycleOptions,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__(options, next(generator.parameters()).device)
        self.cycle = CycleTrainer(
            {"A": Translator(generator, discriminator), "B": Translator(back, None)},
            options,
            {} if teacher is None else {"A": teacher},
        )
        self.random, self.margins = self.cycle.random, self.cycle.margins

    @property
    def generator(self) -> nn.Module:
        return self.cycle.generators["A"]

    @property
    def discriminator(self) -> nn.Module:
        return self.cycle.learners["A"].critic.network

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs; tensors and numbers only."""
        return self.cycle.state_dict() | self._progress()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a training with the same options."""
        self.cycle.load_state_dict(state)
        self._restore_progress(state)

    def _steps_per_epoch(self, images: PairedImages) -> int:
        return self.cycle._steps_per_epoch(UnpairedImages.of(images))

    def _epoch(self, images: PairedImages) -> Iterator[tuple[Tensor, Tensor]]:
        return self.cycle._epoch(UnpairedImages.of(images))

    def _learn(self, batch: tuple[Tensor, Tensor], rate: float) -> dict[str, Tensor]:
        self.cycle.steps = self.steps
        losses = self.cycle._learn(batch, rate)
        return {name.removesuffix(" A").replace(" B", " back"): value for name, value in losses.items()}

    def _set_training(self, training: bool) -> None:
        self.cycle._set_training(training)

    def result(self, images: PairedImages, count: int = 512) -> nn.Module:
        """A copy of the averaged generator with BatchNorm statistics of ``count`` training inputs."""
        return self.cycle.result(UnpairedImages.of(images), count)["A"]

    def pair(self, result: nn.Module) -> tuple[nn.Module, nn.Module]:
        """What a finetuning hands out: the result of :meth:`fit` and the discriminator, ready to use."""
        return self.cycle.pairs({"A": result})["A"]


CYCLE_FINETUNING = CycleOptions(epochs=10, learning_rate=5e-4, decay_from=0.3, distillation=20.0, ema=0.99)
"""Defaults of finetuning one direction: short, so the rate is higher and falls sooner."""


def cycle_finetuner(
    generator: nn.Module,
    discriminator: nn.Module,
    back: nn.Module,
    teacher: nn.Module,
    options: CycleOptions = CYCLE_FINETUNING,
) -> OneWayTrainer:
    """The trainer of one pruned direction, ready to fit, on copies.

    Seeds torch's own generator, which dropout draws from.

    Args:
        generator, discriminator: the pruned direction.
        back: the dense generator of the way back.
        teacher: the dense generator of this direction.
        options: of the training.
    """
    generator, discriminator = (trainable_copy(one, options.amp) for one in (generator, discriminator))
    torch.manual_seed(options.seed)
    return OneWayTrainer(generator, discriminator, back, options, teacher)
