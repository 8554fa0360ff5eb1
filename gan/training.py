"""One loop for pretraining and finetuning paired translators."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.data import PairedImages, batches
from gan.errors import UserError
from gan.losses import AdversarialKind, discriminator_loss, generator_loss, output_distillation, paired_input
from gan.norm_statistics import cumulative_statistics


@dataclass(frozen=True)
class TrainingOptions:
    """Options of the loop; the defaults are those of Pix2Pix (Isola et al. 2017) where it has any."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 16
    """Pairs per step; 16 keeps BatchNorm's statistics steady."""
    learning_rate: float = 2e-4
    """Of Adam, for the generator."""
    discriminator_rate: float = 0.5
    """The discriminator's learning rate as a share of that: on a thousand images it wins too soon."""
    jitter: float = 0.2
    """Strength of the colour augmentation of what the discriminator sees."""
    decay_from: float = 0.5
    """Share of the training after which the learning rate falls linearly to 0."""
    adversarial: AdversarialKind = "vanilla"
    """Loss of the pair."""
    l1: float = 100.0
    """Weight of the image distance to the target, beside the adversarial loss."""
    distillation: float = 0.0
    """Weight of the image distance to the dense generator's output."""
    ema: float = 0.998
    """Decay per step of the averaged generator, which is the result."""
    shift: int = 6
    """Largest shift of the augmentation, in pixels."""
    seed: int = 0
    """Of order, augmentation and dropout."""
    seconds: float | None = None
    """Train for this long instead of for ``epochs``."""
    amp: bool = False
    """Run the networks in bfloat16; losses and weights stay float32. See ``gan.runtime.bfloat16_pays``."""


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training is.

    Attributes:
        epoch: passes done.
        share: of the whole training, in [0, 1].
        losses: mean of each loss over the last epoch.
        seconds: since the start.
        margins: the discriminator's margin in each step of the last epoch: its mean logit on real images
            minus that on made ones.
    """

    epoch: int
    share: float
    losses: dict[str, float]
    seconds: float
    margins: tuple[float, ...] = ()


class Lessons:
    """A teacher that remembers its answers, step by step.

    Trainings with the same options and images see the same batches in the same order, so the teacher's
    outputs of the first one serve the others: of several finetunings only the first pays for them.

    Args:
        teacher: the dense generator.
        limit: batches that are remembered, of 0.4 MB each at 16 images of 64 × 64 (float16).
    """

    def __init__(self, teacher: nn.Module, limit: int = 1000) -> None:
        self.teacher = teacher.eval()
        self.limit = limit
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, step: int, inputs: Tensor) -> Tensor:
        """The teacher's outputs (N, 3, H, W) for the inputs of a step.

        Whether the inputs are those of the first time is checked by a projection of them: another order of
        images is answered by the teacher itself.
        """
        mark = inputs.flatten(1).sum(1)
        if step in self._known:
            seen, outputs = self._known[step]
            if seen.shape == mark.shape and torch.equal(seen, mark):
                return outputs.float()
        outputs = self.teacher(inputs).float()
        if step in self._known or len(self._known) < self.limit:
            # Rounded at once, so that the first training and the later ones see the same lesson.
            self._known[step] = (mark, outputs.half())
            outputs = self._known[step][1].float()
        return outputs


def colour_jitter(images: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Brightness, saturation and contrast of each image (N, 3, H, W) changed at random, differentiably.

    Real and made images alike, so that the discriminator learns on more than it can memorise: Zhao et al.,
    "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020.
    """
    draws = (2 * torch.rand(3, len(images), 1, 1, 1, generator=random) - 1).to(images.device) * strength
    images = images + draws[0]
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (1 + 2 * draws[1])
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + draws[2])


class PairedTrainer:
    """Trains a generator and a paired discriminator, in place.

    Args:
        generator: (N, 3, H, W) → (N, 3, H, W).
        discriminator: input and image stacked (N, 6, H, W) → patch logits.
        options: see ``TrainingOptions``.
        teacher: the dense generator for distillation, or its remembered lessons; needed when the weight of
            distillation is above 0.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        options: TrainingOptions,
        teacher: nn.Module | Lessons | None = None,
    ) -> None:
        if options.distillation > 0 and teacher is None:
            raise ValueError("distillation needs a teacher: hand in the dense generator")
        self.generator, self.discriminator, self.options = generator, discriminator, options
        self.lessons = Lessons(teacher, limit=0) if isinstance(teacher, nn.Module) else teacher
        self.averaged = copy.deepcopy(generator).eval().requires_grad_(False)
        self.device = next(generator.parameters()).device
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), betas=(0.5, 0.999), fused=True)
            for network in (generator, discriminator)
        )
        self.random = torch.Generator().manual_seed(options.seed)
        self.epoch = self.steps = 0
        self.spent = 0.0
        self.margins: list[Tensor] = []  # of this epoch's steps; tensors: no step waits for the device

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs; tensors and numbers only."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "epoch": self.epoch,
            "steps": self.steps,
            "spent": self.spent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in (
            "generator",
            "discriminator",
            "averaged",
            "generator_optimizer",
            "discriminator_optimizer",
        ):
            getattr(self, name).load_state_dict(state[name])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.epoch, self.steps, self.spent = state["epoch"], state["steps"], state["spent"]

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> dict[str, Tensor]:
        """One update of both networks; returns the losses (0-d tensors)."""
        options = self.options
        rates = (learning_rate, learning_rate * options.discriminator_rate)
        for optimizer, rate in zip(
            (self.generator_optimizer, self.discriminator_optimizer), rates, strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate
        fake = self._run(self.generator, inputs)

        self.discriminator.requires_grad_(True)
        real_logits = self._judge(inputs, targets)
        fake_logits = self._judge(inputs, fake.detach())
        loss_discriminator = discriminator_loss(real_logits, fake_logits, options.adversarial)
        self.margins.append((real_logits.mean() - fake_logits.mean()).detach())
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        loss_discriminator.backward()
        self.discriminator_optimizer.step()

        self.discriminator.requires_grad_(False)  # spares the gradients of its kernels
        fooling = generator_loss(self._judge(inputs, fake), options.adversarial)
        distance = F.l1_loss(fake, targets)
        loss = fooling + options.l1 * distance
        losses = {
            "discriminator": loss_discriminator.detach(),
            "adversarial": fooling.detach(),
            "l1": distance.detach(),
        }
        if self.lessons is not None and options.distillation > 0:
            distilled = output_distillation(fake, self.lessons(self.steps, inputs))
            loss = loss + options.distillation * distilled
            losses["distillation"] = distilled.detach()
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.generator_optimizer.step()
        self.discriminator.requires_grad_(True)
        self._average()
        return losses

    def _run(self, network: nn.Module, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            return network(inputs).float()

    def _judge(self, inputs: Tensor, images: Tensor) -> Tensor:
        """Logits of the discriminator on colour-jittered images."""
        if self.options.jitter > 0:
            images = colour_jitter(images, self.options.jitter, self.random)
        return self._run(self.discriminator, paired_input(inputs, images))

    def _average(self) -> None:
        # A short warm-up of the decay: the average must not stay at the first weights in short trainings.
        decay = min(self.options.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for mean, value in zip(self.averaged.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def _share(self, started: float, steps_per_epoch: int) -> float:
        if self.options.seconds is not None:
            return min(1.0, (self.spent + time.perf_counter() - started) / max(self.options.seconds, 1e-9))
        steps = self.options.epochs * steps_per_epoch
        return min(1.0, self.steps / steps) if steps > 0 else 1.0

    def fit(
        self, pairs: PairedImages, on_epoch: Callable[[TrainingProgress], None] | None = None
    ) -> nn.Module:
        """Train to the end; returns the averaged generator, its statistics fresh, in evaluation mode.

        Args:
            pairs: the training images.
            on_epoch: called after each pass; may save :meth:`state_dict`.

        Raises:
            UserError: when a loss is no longer finite.
        """
        options = self.options
        per_epoch = max(1, len(pairs) // min(options.batch_size, len(pairs)))
        started = time.perf_counter()
        while (share := self._share(started, per_epoch)) < 1.0:
            self.generator.train()
            self.discriminator.train()
            sums: dict[str, Tensor] = {}
            done = 0
            self.margins.clear()
            for inputs, targets, _ in batches(pairs, options.batch_size, self.random, options.shift):
                share = self._share(started, per_epoch)
                if share >= 1.0:
                    break
                rate = options.learning_rate * min(1.0, (1.0 - share) / max(1e-9, 1.0 - options.decay_from))
                losses = self.step(inputs.to(self.device), targets.to(self.device), rate)
                self.steps += 1
                done += 1
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value
            self.epoch += 1
            means = {name: float(value) / max(1, done) for name, value in sums.items()}
            bad = [name for name, value in means.items() if not torch.isfinite(torch.tensor(value))]
            if bad:
                raise UserError(
                    f"the {' and '.join(bad)} loss is no longer finite after {self.steps} steps at a "
                    f"learning rate of {options.learning_rate:g}; train with a smaller one"
                )
            if on_epoch is not None:
                now = time.perf_counter()
                self.spent, started = self.spent + now - started, now
                margins = tuple(torch.stack(self.margins).tolist()) if self.margins else ()
                on_epoch(
                    TrainingProgress(self.epoch, self._share(now, per_epoch), means, self.spent, margins)
                )
        self.discriminator.eval()
        self.generator.eval()
        return self.result(pairs)

    def result(self, pairs: PairedImages, images: int = 512) -> nn.Module:
        """A copy of the averaged generator with BatchNorm statistics of ``images`` training inputs.

        Averaged weights need their own statistics; those of the trained network do not fit them.
        """
        network = copy.deepcopy(self.averaged)
        inputs, _ = pairs.take(images).tensors()
        with cumulative_statistics(network):
            for chunk in inputs.split(64):
                network(chunk.to(self.device))
        return network


FINETUNING = TrainingOptions(
    epochs=10, learning_rate=5e-4, decay_from=0.3, distillation=50.0, ema=0.99, shift=4
)
"""Defaults of finetuning: short, so the rate is higher and falls sooner, and the average forgets faster."""


def finetune(
    generator: nn.Module,
    discriminator: nn.Module,
    teacher: nn.Module | Lessons,
    pairs: PairedImages,
    options: TrainingOptions = FINETUNING,
    on_epoch: Callable[[TrainingProgress], None] | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Train a pruned pair on: native losses, and distillation from the dense generator.

    Args:
        generator, discriminator: the pruned pair; copied, not changed.
        teacher: the dense generator, or its :class:`Lessons` where several finetunings share them.

    Returns:
        The averaged generator and the discriminator, both in evaluation mode.
    """
    generator, discriminator = copy.deepcopy(generator), copy.deepcopy(discriminator)
    for network in (generator, discriminator):
        network.requires_grad_(True)
        if options.amp:
            network.to(memory_format=torch.channels_last)  # what bfloat16 convolutions are quick in
    torch.manual_seed(options.seed)  # dropout
    trainer = PairedTrainer(generator, discriminator, options, teacher)
    result = trainer.fit(pairs, on_epoch).to(memory_format=torch.contiguous_format)
    return result, discriminator.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
