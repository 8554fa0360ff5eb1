"""What every training of translators shares: options, critics, schedules, and the loop over epochs."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gan.errors import Diverged, unknown
from gan.losses import AdversarialKind, discriminator_loss, generator_loss, paired_input
from gan.norm_statistics import cumulative_statistics
from gan.runtime import quick_layout

Images = TypeVar("Images")
Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LoopOptions:
    """Options of every training of translators."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step (of each domain); 16 keeps BatchNorm's statistics steady."""
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
    gradient_penalty: float = 0.0
    """Weight of R1, the squared gradient of the discriminator at real images: it keeps the discriminator from
    memorising them, and from being fooled by what no eye sees."""
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


CYCLES = 4
"""Of the schedule with warm restarts: 1/15, 2/15, 4/15 and 8/15 of the training."""


def rate_factor(schedule: str, share: float, decay_from: float = 0.5) -> float:
    """The learning rate at a share of the training, as a share of the largest: in [0, 1].

    ``linear`` is constant up to ``decay_from``, then falls to 0. ``cosine`` and ``restarts`` (cycles that
    double in length): Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    if schedule == "linear":
        return min(1.0, (1.0 - share) / max(1e-9, 1.0 - decay_from))
    if schedule == "restarts":
        units = min(share, 1.0) * (2**CYCLES - 1)  # cycle i begins at 2^i − 1 units and takes 2^i
        cycle = min(CYCLES - 1, int(math.log2(units + 1)))
        share = (units - (2**cycle - 1)) / 2**cycle
    elif schedule != "cosine":
        raise unknown("schedule", schedule, ("linear", "cosine", "restarts"))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def adam(network: nn.Module) -> torch.optim.Adam:
    """The optimiser of every network here; its rate is set in each step."""
    return torch.optim.Adam(network.parameters(), betas=(0.5, 0.999), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all of an optimiser's groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


PENALTY_EVERY = 2
"""Steps from one gradient penalty to the next, whose weight makes up for it (Karras et al., CVPR 2020)."""


class Critic:
    """A discriminator in training: it learns, and it says how well it is fooled.

    Args:
        network: input and image stacked (N, 6, H, W) → patch logits, or, in unpaired training, the image
            alone; trained in place.
        options: of the training.
        random: of the colour jitter.
    """

    def __init__(self, network: nn.Module, options: LoopOptions, random: torch.Generator) -> None:
        self.network, self.options, self.random = network, options, random
        self.optimizer = adam(network)
        self.steps = 0

    def learn(
        self, inputs: Tensor | None, targets: Tensor, fake: Tensor, rate: float
    ) -> tuple[Tensor, Tensor]:
        """One update at a learning rate; returns the loss and the margin (0-d).

        Args:
            inputs: what the images were made from, or None for a discriminator that sees images alone.
            targets, fake: real and made images (N, 3, H, W).
            rate: learning rate.
        """
        set_rate(self.optimizer, rate)
        self.network.requires_grad_(True)
        real_logits = self._judge(inputs, targets)
        fake_logits = self._judge(inputs, fake.detach())
        loss = discriminator_loss(real_logits, fake_logits, self.options.adversarial)
        if self.options.gradient_penalty > 0 and self.steps % PENALTY_EVERY == 0:
            weight = PENALTY_EVERY * self.options.gradient_penalty
            loss = loss + weight * self._gradient_penalty(inputs, targets)
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach(), (real_logits.mean() - fake_logits.mean()).detach()

    def fooled(self, inputs: Tensor | None, fake: Tensor) -> Tensor:
        """The generator's loss (0-d) for its outputs; gradients reach the outputs alone."""
        self.network.requires_grad_(False)  # spares the gradients of its kernels
        return generator_loss(self._judge(inputs, fake), self.options.adversarial)

    def _gradient_penalty(self, inputs: Tensor | None, targets: Tensor) -> Tensor:
        """R1 (0-d): Mescheder et al., "Which Training Methods for GANs do actually Converge?", ICML 2018.

        The logits of a map are summed up and divided by the root of their number: if the patches that they
        see did not overlap, this would be the mean over patches of the squared length of a logit's gradient.
        """
        images = targets.detach().clone().requires_grad_(True)
        seen = images if inputs is None else paired_input(inputs, images)
        logits = run_network(self.network, seen, self.options.amp)
        total = logits.sum() / math.sqrt(logits[0].numel())
        (gradient,) = torch.autograd.grad(total, images, create_graph=True)
        return gradient.square().sum((1, 2, 3)).mean()

    def _judge(self, inputs: Tensor | None, images: Tensor) -> Tensor:
        """Logits of colour-jittered images."""
        if self.options.jitter > 0:
            images = colour_jitter(images, self.options.jitter, self.random)
        seen = images if inputs is None else paired_input(inputs, images)
        return run_network(self.network, seen, self.options.amp)

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"].cpu())


def run_network(network: nn.Module, inputs: Tensor, amp: bool) -> Tensor:
    """Float32 outputs of a network that itself may run in bfloat16."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=amp):
        return network(inputs).float()


def trainable_copy(network: nn.Module, amp: bool) -> nn.Module:
    """A copy that can be trained, laid out for quick convolutions."""
    return quick_layout(copy.deepcopy(network).requires_grad_(True), amp)


@torch.no_grad()
def average_into(averaged: nn.Module, network: nn.Module, decay: float, steps: int) -> None:
    """Move the averaged parameters towards a network's own, after ``steps`` earlier steps.

    A short warm-up of the decay: the average must not stay at the first weights in short trainings.
    """
    decay = min(decay, (1 + steps) / (10 + steps))
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def with_statistics(averaged: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy of an averaged network with BatchNorm statistics of ``inputs`` (N, C, H, W); evaluation mode.

    Averaged weights need their own statistics; those of the trained network do not fit them.
    """
    network = copy.deepcopy(averaged)
    device = next(network.parameters()).device
    with cumulative_statistics(network):
        if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            for chunk in inputs.split(64):
                network(chunk.to(device))
    return network


class Trainer(ABC, Generic[Images, Batch, Result]):
    """The loop over epochs and steps: what a step is, a subclass says.

    Args:
        options: see ``LoopOptions``.
        device: of the networks.

    Attributes:
        random: of order, augmentation and colour jitter.
        epoch, steps: passes and updates done.
        spent: seconds of training up to the last call of ``on_epoch``.
        margins: the discriminator's margin in each step of this epoch, (0-d) tensors: no step waits for the
            device.
        schedule: of the learning rate, see :func:`rate_factor`.
    """

    schedule = "linear"

    def __init__(self, options: LoopOptions, device: torch.device) -> None:
        self.options, self.device = options, device
        self.random = torch.Generator().manual_seed(options.seed)
        self.epoch = self.steps = 0
        self.spent = 0.0
        self.margins: list[Tensor] = []

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs; tensors and numbers only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a training with the same options."""

    @abstractmethod
    def result(self, images: Images) -> Result:
        """What the training has made so far, ready to use."""

    @abstractmethod
    def _steps_per_epoch(self, images: Images) -> int:
        """Steps of one pass."""

    @abstractmethod
    def _epoch(self, images: Images) -> Iterator[Batch]:
        """The batches of one pass."""

    @abstractmethod
    def _learn(self, batch: Batch, rate: float) -> dict[str, Tensor]:
        """One update of all networks at a learning rate; returns the losses (0-d)."""

    @abstractmethod
    def _set_training(self, training: bool) -> None:
        """Put the networks that learn into training or evaluation mode."""

    def _begin_epoch(self) -> None:
        self._set_training(True)
        self.margins.clear()

    def _progress(self) -> dict[str, Any]:
        """The loop's own part of a state dict."""
        return {
            "random": self.random.get_state(),
            "torch_random": torch.get_rng_state(),
            "epoch": self.epoch,
            "steps": self.steps,
            "spent": self.spent,
        }

    def _restore_progress(self, state: dict[str, Any]) -> None:
        # Random states never leave the CPU, also when the file was read onto another device.
        self.random.set_state(state["random"].cpu())
        torch.set_rng_state(state["torch_random"].cpu())
        self.epoch, self.steps, self.spent = state["epoch"], state["steps"], state["spent"]

    def _share(self, started: float, steps_per_epoch: int) -> float:
        if self.options.seconds is not None:
            return min(1.0, (self.spent + time.perf_counter() - started) / max(self.options.seconds, 1e-9))
        steps = self.options.epochs * steps_per_epoch
        return min(1.0, self.steps / steps) if steps > 0 else 1.0

    def fit(
        self, images: Images, on_epoch: Callable[[TrainingProgress], bool | None] | None = None
    ) -> Result:
        """Train to the end; returns :meth:`result`, in evaluation mode.

        Args:
            images: the training images.
            on_epoch: called after each pass; may save the state dict; True ends the training. Its own
                time does not count.

        Raises:
            Diverged: when a loss is no longer finite.
        """
        options = self.options
        per_epoch = self._steps_per_epoch(images)
        started = time.perf_counter()
        while (share := self._share(started, per_epoch)) < 1.0:
            self._begin_epoch()
            sums: dict[str, Tensor] = {}
            done = 0
            for batch in self._epoch(images):
                share = self._share(started, per_epoch)
                if share >= 1.0:
                    break
                rate = options.learning_rate * rate_factor(self.schedule, share, options.decay_from)
                losses = self._learn(batch, rate)
                self.steps += 1
                done += 1
                for name, value in losses.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value
            self.epoch += 1
            means = {name: float(value) / max(1, done) for name, value in sums.items()}
            bad = [name for name, value in means.items() if not math.isfinite(value)]
            if bad:
                raise Diverged(
                    f"the {' and '.join(bad)} loss is no longer finite after {self.steps} steps at a "
                    f"learning rate of {options.learning_rate:g}; train with a smaller one"
                )
            if on_epoch is not None:
                now = time.perf_counter()
                self.spent += now - started
                margins = tuple(torch.stack(self.margins).tolist()) if self.margins else ()
                share = self._share(now, per_epoch)
                stop = on_epoch(TrainingProgress(self.epoch, share, means, self.spent, margins))
                started = time.perf_counter()
                if stop is True:
                    break
        self._set_training(False)
        return self.result(images)
