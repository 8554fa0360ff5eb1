"""Pretraining and finetuning of paired translators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gan.data import PairedImages, augment, batches
from gan.distillation import (
    NO_INGREDIENTS,
    DensePair,
    DiscriminatorMatching,
    FeatureDistance,
    Ingredients,
    Lesson,
    PerceptualDistance,
    Teacher,
    generator_taps,
    some_places,
)
from gan.elastic import ElasticOptions, teaching_images
from gan.loop import (
    Critic,
    LoopOptions,
    Trainer,
    TrainingProgress,
    adam,
    average_into,
    run_network,
    set_rate,
    trainable_copy,
    with_statistics,
)
from gan.losses import output_distillation
from gan.runtime import frozen_copy
from gan.taps import recorded


class Lessons:
    """A teacher that remembers its answers, step by step.

    Trainings with the same options and images see the same batches in the same order, so the teacher's
    outputs of the first one serve the others: of several finetunings only the first pays for them.

    Args:
        teacher: the dense generator; copied.
        limit: batches that are remembered, of 0.4 MB each at 16 images of 64 × 64 (float16).
        amp: ask it in bfloat16.
    """

    def __init__(self, teacher: nn.Module, limit: int = 1000, amp: bool = False) -> None:
        self.teacher, self.amp = frozen_copy(teacher, amp), amp
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
        outputs = run_network(self.teacher, inputs, self.amp)
        if step in self._known or len(self._known) < self.limit:
            # Rounded at once, so that the first training and the later ones see the same lesson.
            self._known[step] = (mark, outputs.half())
            outputs = self._known[step][1].float()
        return outputs


@dataclass(frozen=True)
class TrainingOptions(LoopOptions):
    """Options of paired training; the defaults are those of Pix2Pix (Isola et al. 2017) where it has any."""

    l1: float = 100.0
    """Weight of the image distance to the target, beside the adversarial loss."""


class PairedTrainer(Trainer[PairedImages, tuple[Tensor, Tensor, Tensor], nn.Module]):
    """Trains a generator and a paired discriminator, in place.

    With an online teacher the dense pair trains in the same steps with native losses, as another trainer, and
    the generator is taught by what the dense one makes at that moment: the idea of Ren et al., "Online
    Multi-Granularity Distillation for GAN Compression", ICCV 2021.

    Args:
        generator: (N, 3, H, W) → (N, 3, H, W).
        discriminator: input and image stacked (N, 6, H, W) → patch logits.
        options: see ``TrainingOptions``.
        teacher: the dense generator for distillation, or its remembered lessons; needed when the weight of
            distillation is above 0 and ``dense`` is not given.
        ingredients: what is added to native losses and output distillation.
        dense: the dense pair; needed by most ingredients.

    Attributes:
        critics: the discriminators in training; the first is the pair's own.
        online: the dense pair in training beside this one, or None.
        made: the generator's outputs in the last step (N, 3, H, W), without gradients.
        maps: its feature maps at the taps in the last step, likewise.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        options: TrainingOptions,
        teacher: nn.Module | Lessons | None = None,
        ingredients: Ingredients = NO_INGREDIENTS,
        dense: DensePair | None = None,
    ) -> None:
        ingredients.check()
        ingredients = ingredients.settled()
        if ingredients.needs_dense and dense is None:
            raise ValueError("these ingredients need the dense pair: hand it in as dense")
        if teacher is None and dense is not None:
            teacher = dense.generator
        if options.distillation > 0 and teacher is None:
            raise ValueError("distillation needs a teacher: hand in the dense generator")
        super().__init__(options, next(generator.parameters()).device)
        self.options: TrainingOptions = options
        self.schedule = ingredients.schedule
        self.generator, self.ingredients = generator, ingredients
        self.lessons = Lessons(teacher, 0, options.amp) if isinstance(teacher, nn.Module) else teacher
        self.averaged = copy.deepcopy(generator).eval().requires_grad_(False)
        self.generator_optimizer = adam(generator)
        self.critics = [Critic(discriminator, options, self.random)]
        self.online: PairedTrainer | None = None
        self.teacher: Teacher | None = None
        self.distance: FeatureDistance | None = None
        self.adapter_optimizer: torch.optim.Adam | None = None
        self.matching: DiscriminatorMatching | None = None
        self.perceptual = PerceptualDistance(device=self.device) if ingredients.perceptual else None
        self.taps: tuple[str, ...] = ()
        self.unseen: Iterator[tuple[Tensor, Tensor]] | None = None  # anew in each epoch
        if dense is not None:
            self._add(dense)
        self.made: Tensor | None = None
        self.maps: dict[str, Tensor] = {}

    def _add(self, dense: DensePair) -> None:
        """What the ingredients need of the dense pair."""
        options, ingredients = self.options, self.ingredients
        if ingredients.adversary != "pruned":
            critic = trainable_copy(dense.discriminator, options.amp)
            if ingredients.adversary == "dense":
                self.critics = [Critic(critic, options, self.random)]
            else:  # random numbers of its own: the images must not depend on how many critics there are
                self.critics.append(Critic(critic, options, torch.Generator().manual_seed(options.seed + 1)))
        if ingredients.teaches_maps:
            self.taps = generator_taps(dense.generator, dense.groups)
            self.distance = FeatureDistance(
                ingredients.features,  # type: ignore[arg-type]
                self.taps,
                self.generator,
                dense.generator,
                options.seed,
            )
            if ingredients.features == "adapters":
                self.adapter_optimizer = adam(self.distance)
        if ingredients.online:
            native = replace(options, distillation=0.0, seed=options.seed + 2)
            self.online = PairedTrainer(
                trainable_copy(dense.generator, options.amp),
                trainable_copy(dense.discriminator, options.amp),
                native,
            )
            self.online.taps = self.taps
        elif ingredients.teaches_maps or ingredients.variants or ingredients.unseen:
            self.teacher = Teacher(dense.generator, self.taps, options.amp)
        if ingredients.matching != "none":
            self.matching = DiscriminatorMatching(dense.discriminator, options.amp)

    @property
    def discriminator(self) -> nn.Module:
        """The pair's own."""
        return self.critics[0].network

    @property
    def discriminator_optimizer(self) -> torch.optim.Adam:
        return self.critics[0].optimizer

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs; tensors and numbers only."""
        state = {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "discriminator_optimizer": self.discriminator_optimizer.state_dict(),
            **self._progress(),
        }
        if len(self.critics) > 1:
            state["critics"] = [critic.state_dict() for critic in self.critics[1:]]
        if self.distance is not None and self.adapter_optimizer is not None:
            state["adapters"] = self.distance.state_dict()
            state["adapter_optimizer"] = self.adapter_optimizer.state_dict()
        if self.online is not None:
            state["online"] = self.online.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a training with the same options and ingredients.

        Raises:
            KeyError: it lacks what the ingredients need.
        """
        for name in (
            "generator",
            "discriminator",
            "averaged",
            "generator_optimizer",
            "discriminator_optimizer",
        ):
            getattr(self, name).load_state_dict(state[name])
        if len(self.critics) > 1:
            for critic, saved in zip(self.critics[1:], state["critics"], strict=True):
                critic.load_state_dict(saved)
        if self.distance is not None and self.adapter_optimizer is not None:
            self.distance.load_state_dict(state["adapters"])
            self.adapter_optimizer.load_state_dict(state["adapter_optimizer"])
        if self.online is not None:
            self.online.load_state_dict(state["online"])
        self._restore_progress(state)
        self.critics[0].steps = self.steps  # its other parts are saved under names of their own

    def step(
        self, inputs: Tensor, targets: Tensor, learning_rate: float, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One update of all networks; returns the losses (0-d tensors).

        Args:
            inputs, targets: (N, 3, H, W) in [−1, 1].
            learning_rate: of the generator.
            rows: (N,) rows of the training images; needed where the teacher's answers are remembered.
        """
        options, ingredients = self.options, self.ingredients
        set_rate(self.generator_optimizer, learning_rate)
        losses: dict[str, Tensor] = {}
        if self.online is not None:
            online = self.online.step(inputs, targets, learning_rate * ingredients.online_rate)
            losses |= {f"online {name}": value for name, value in online.items()}
            self.online.steps += 1
        with recorded(self.generator, self.taps) as maps:
            fake = run_network(self.generator, inputs, options.amp)
        self.made = fake.detach()
        self.maps = {name: value.detach() for name, value in maps.items()}

        rate = learning_rate * options.discriminator_rate
        learned = [critic.learn(inputs, targets, fake, rate) for critic in self.critics]
        self.margins.append(learned[0][1])
        fooling = _mean([critic.fooled(inputs, fake) for critic in self.critics])
        distance = F.l1_loss(fake, targets)
        loss = fooling + options.l1 * distance
        losses |= {
            "discriminator": _mean([lost for lost, _ in learned]),
            "adversarial": fooling.detach(),
            "l1": distance.detach(),
        }
        lesson = self._lesson(inputs, rows)
        if lesson is not None and options.distillation > 0:
            distilled = output_distillation(fake, lesson.outputs)
            loss = loss + options.distillation * distilled
            losses["distillation"] = distilled.detach()
        if self.distance is not None and lesson is not None:
            features = self.distance(maps, lesson)
            loss = loss + ingredients.feature_weight * features
            losses["features"] = features.detach()
        if self.matching is not None:
            wanted = [targets] if ingredients.matching in ("target", "both") else []
            if lesson is not None and ingredients.matching in ("teacher", "both"):
                wanted.append(lesson.outputs)
            matched = self.matching(inputs, fake, wanted)
            loss = loss + ingredients.matching_weight * matched
            losses["matching"] = matched.detach()
        if self.perceptual is not None:
            perceived = self.perceptual(fake, targets)
            loss = loss + (ingredients.perceptual or 0.0) * perceived
            losses["perceptual"] = perceived.detach()
        if self.unseen is not None:
            followed = self._follow(next(self.unseen)[0].to(self.device))
            loss = loss + followed
            losses["unseen"] = followed.detach()
        self.generator_optimizer.zero_grad(set_to_none=True)
        if self.adapter_optimizer is not None:
            self.adapter_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.generator_optimizer.step()
        if self.adapter_optimizer is not None:
            set_rate(self.adapter_optimizer, learning_rate)
            self.adapter_optimizer.step()
        for critic in self.critics:
            critic.network.requires_grad_(True)
        average_into(self.averaged, self.generator, options.ema, self.steps)
        return losses

    def _lesson(self, inputs: Tensor, rows: Tensor | None) -> Lesson | None:
        """What the teacher says of a batch, where anything asks for it."""
        ingredients = self.ingredients
        asked = self.options.distillation > 0 or ingredients.matching in ("teacher", "both")
        if not asked and not self.taps:
            return None
        if self.online is not None:
            assert self.online.made is not None
            features = {name: some_places(self.online.maps[name], self.steps) for name in self.taps}
            return Lesson(self.online.made, features, self.steps)
        if self.teacher is not None and ingredients.variants:
            if rows is None:
                raise ValueError("remembered answers are found by the rows of the images: hand them in")
            return self.teacher.remembered(self.epoch % ingredients.variants, rows)
        if self.teacher is not None:
            return self.teacher(inputs, self.steps)
        return None if self.lessons is None else Lesson(self.lessons(self.steps, inputs), {}, self.steps)

    def _follow(self, inputs: Tensor) -> Tensor:
        """Weighted distance (0-d) to what the teacher makes of further inputs (N, 3, H, W)."""
        assert self.teacher is not None
        lesson = self.teacher(inputs, self.steps)
        with recorded(self.generator, self.taps) as maps:
            made = run_network(self.generator, inputs, self.options.amp)
        loss = self.options.distillation * output_distillation(made, lesson.outputs)
        if self.distance is not None:
            loss = loss + self.ingredients.feature_weight * self.distance(maps, lesson)
        return loss

    def _set_training(self, training: bool) -> None:
        self.generator.train(training)
        for critic in self.critics:
            critic.network.train(training)
        if self.online is not None:
            self.online._set_training(training)

    def _epoch(self, pairs: PairedImages) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one epoch: (inputs, targets) float32 in [−1, 1], and the rows."""
        options, variants = self.options, self.ingredients.variants
        if self.ingredients.unseen:
            # Random numbers of its own, by epoch: the other images stay the same, and so does a resumed run.
            drawn = torch.Generator().manual_seed((options.seed + 3) * 1_000_003 + self.epoch)
            images = ElasticOptions(batch_size=self.ingredients.unseen)
            self.unseen = teaching_images(pairs, images, drawn)
        if not variants:
            yield from batches(pairs, options.batch_size, self.random, options.shift)
            return
        variant = self.epoch % variants
        drawn = torch.Generator().manual_seed(options.seed * 1_000_003 + variant)
        moved = PairedImages(*augment(pairs.inputs, pairs.targets, options.shift, drawn), pairs.names)
        if self.teacher is not None:
            self.teacher.study(variant, moved.tensors()[0], options.batch_size)
        yield from batches(moved, options.batch_size, self.random, augmented=False)

    def _steps_per_epoch(self, images: PairedImages) -> int:
        return max(1, len(images) // min(self.options.batch_size, len(images)))

    def _begin_epoch(self) -> None:
        super()._begin_epoch()
        if self.online is not None:
            self.online.margins.clear()

    def _learn(self, batch: tuple[Tensor, Tensor, Tensor], rate: float) -> dict[str, Tensor]:
        inputs, targets, rows = batch
        return self.step(inputs.to(self.device), targets.to(self.device), rate, rows)

    def result(self, images: PairedImages, count: int = 512) -> nn.Module:
        """A copy of the averaged generator with BatchNorm statistics of ``count`` training inputs."""
        return with_statistics(self.averaged, images.take(count).tensors()[0])

    def pair(self, result: nn.Module) -> tuple[nn.Module, nn.Module]:
        """What a finetuning hands out: the result of :meth:`fit` and the discriminator, ready to use."""
        result = result.to(memory_format=torch.contiguous_format)
        critic = copy.deepcopy(self.discriminator).eval().requires_grad_(False)
        return result, critic.to(memory_format=torch.contiguous_format)


def _mean(values: Sequence[Tensor]) -> Tensor:
    """Of 0-d tensors; one alone is itself, to the last bit."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


FINETUNING = TrainingOptions(
    epochs=10, learning_rate=2e-3, decay_from=0.3, distillation=50.0, ema=0.99, shift=4
)
"""Defaults of finetuning: short, so the rate is higher and falls sooner, and the average forgets faster."""


def finetuner(
    generator: nn.Module,
    discriminator: nn.Module,
    teacher: nn.Module | Lessons,
    options: TrainingOptions = FINETUNING,
    ingredients: Ingredients = NO_INGREDIENTS,
    dense: DensePair | None = None,
) -> PairedTrainer:
    """The trainer of a pruned pair, ready to fit: see :func:`finetune` for the arguments.

    Seeds torch's own generator, which dropout draws from.
    """
    generator, discriminator = (trainable_copy(one, options.amp) for one in (generator, discriminator))
    torch.manual_seed(options.seed)
    return PairedTrainer(generator, discriminator, options, teacher, ingredients, dense)


def finetune(
    generator: nn.Module,
    discriminator: nn.Module,
    teacher: nn.Module | Lessons,
    pairs: PairedImages,
    options: TrainingOptions = FINETUNING,
    on_epoch: Callable[[TrainingProgress], bool | None] | None = None,
    ingredients: Ingredients = NO_INGREDIENTS,
    dense: DensePair | None = None,
) -> tuple[nn.Module, nn.Module]:
    """Train a pruned pair on: native losses, and distillation from the dense generator.

    Args:
        generator, discriminator: the pruned pair; copied, not changed.
        teacher: the dense generator, or its :class:`Lessons` where several finetunings share them.
        on_epoch: see :meth:`PairedTrainer.fit`.
        ingredients: what is added; most need ``dense``.

    Returns:
        The averaged generator and the discriminator, both in evaluation mode.
    """
    trainer = finetuner(generator, discriminator, teacher, options, ingredients, dense)
    return trainer.pair(trainer.fit(pairs, on_epoch))
