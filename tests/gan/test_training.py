from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gan.loop
from gan.checkpoints import state_hash, tensors_hash
from gan.data import PairedImages
from gan.errors import UserError
from gan.loop import Critic, TrainingProgress, colour_jitter, rate_factor
from gan.networks import ResnetGenerator
from gan.training import (
    FINETUNING,
    Lessons,
    PairedTrainer,
    TrainingOptions,
    finetune,
)
from tests.gan.conftest import random, tiny_discriminator, tiny_generator, tiny_pairs

OPTIONS = TrainingOptions(epochs=4, batch_size=4, learning_rate=2e-3, shift=1)


def trainer(options: TrainingOptions = OPTIONS, dropout: bool = False) -> PairedTrainer:
    generator = tiny_generator()
    if dropout:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = ResnetGenerator(3, 3, (4, 4, 4, 4, 4, 4), "batch", True)
    return PairedTrainer(generator, tiny_discriminator(), options)


def hashes(trained: PairedTrainer) -> list[str]:
    return [state_hash(n) for n in (trained.generator, trained.discriminator, trained.averaged)]


def test_training_is_repeatable_and_the_seed_matters():
    first, again, other = (trainer(replace(OPTIONS, epochs=2, seed=seed)) for seed in (0, 0, 1))
    for one in (first, again, other):
        one.fit(tiny_pairs(12))
    assert hashes(first) == hashes(again)
    assert not set(hashes(first)) & set(hashes(other))


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("dropout", "penalty"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_a_resumed_training_equals_an_uninterrupted_one(dropout, penalty):
    """Bit for bit: order, augmentation, jitter and dropout go on where they were."""
    pairs, states = tiny_pairs(12), []
    options = replace(OPTIONS, gradient_penalty=penalty)
    whole = trainer(options, dropout)
    wanted = whole.fit(pairs, lambda _: states.append(saved(whole.state_dict())))
    torch.manual_seed(123)
    resumed = trainer(options, dropout)
    resumed.load_state_dict(states[0])  # after three steps: the penalty is due in the fifth
    told: list[TrainingProgress] = []
    result = resumed.fit(pairs, told.append)
    assert [progress.epoch for progress in told] == [2, 3, 4]
    assert hashes(resumed) == hashes(whole)
    assert state_hash(result) == state_hash(wanted)
    assert tensors_hash(states[0]["generator"]) != tensors_hash(states[3]["generator"])
    assert torch.equal(resumed.random.get_state(), whole.random.get_state())


def test_training_lowers_the_distance_to_the_targets():
    pairs = tiny_pairs(12)
    inputs, targets = pairs.tensors()

    def l1(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(inputs) - targets).abs().mean())

    told: list[TrainingProgress] = []
    trained = trainer(replace(OPTIONS, epochs=25, learning_rate=5e-3, ema=0.9))
    result = trained.fit(pairs, told.append)
    assert l1(result) < 0.5 * l1(tiny_generator())
    assert told[-1].losses["l1"] < 0.5 * told[0].losses["l1"]


def test_the_result_is_the_average_with_statistics_of_its_own():
    pairs = tiny_pairs(12)
    trained = trainer()
    result = trained.fit(pairs)
    assert not any(module.training for module in result.modules())
    for (_, mean), (_, value) in zip(
        trained.averaged.named_parameters(), result.named_parameters(), strict=True
    ):
        assert torch.equal(mean, value)
    assert state_hash(result) != state_hash(trained.averaged)
    inputs = pairs.tensors()[0]
    first = result.model.model[1].model[1](torch.nn.functional.leaky_relu(result.model.model[0](inputs), 0.2))
    norm = result.model.model[1].model[2]
    torch.testing.assert_close(norm.running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, first.var((0, 2, 3)))


def test_the_average_follows_its_decay():
    """decay = min(0.5, (1 + steps) / (10 + steps)): the first weights are soon forgotten."""
    trained = trainer(replace(OPTIONS, ema=0.5))
    means = [p.clone() for p in trained.averaged.parameters()]
    inputs, targets = tiny_pairs(4).tensors()
    for steps in range(3):
        trained.steps = steps
        trained.step(inputs, targets, 1e-2)
        decay = (1 + steps) / (10 + steps)
        for mean, value in zip(means, trained.generator.parameters(), strict=True):
            mean.mul_(decay).add_(value.detach(), alpha=1 - decay)
    for mean, found in zip(means, trained.averaged.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), mean)


def test_the_learning_rate_falls_linearly_in_the_end(monkeypatch):
    trained = trainer(replace(OPTIONS, epochs=2, learning_rate=1.0, decay_from=0.5, discriminator_rate=0.25))
    rates: list[float] = []

    def step(inputs: Tensor, targets: Tensor, learning_rate: float, rows: Tensor) -> dict[str, Tensor]:
        rates.append(learning_rate)
        return {"l1": torch.zeros(())}

    monkeypatch.setattr(trained, "step", step)
    trained.fit(tiny_pairs(16))
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_schedules_by_hand():
    assert [rate_factor("linear", share, 0.5) for share in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    assert [rate_factor("cosine", share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert rate_factor("cosine", 0.25) == pytest.approx(0.5 + 2**-1.5)
    # Cycles of 1, 2, 4 and 8 fifteenths: each begins at the top and is half way down in its middle.
    for begin, length in ((0, 1), (1, 2), (3, 4), (7, 8)):
        assert rate_factor("restarts", (begin + 1e-9) / 15) == pytest.approx(1.0)
        assert rate_factor("restarts", (begin + length / 2) / 15) == pytest.approx(0.5)
        assert rate_factor("restarts", (begin + length - 1e-6) / 15) == pytest.approx(0.0, abs=1e-9)
    assert rate_factor("restarts", 1.0) == pytest.approx(0.0)
    with pytest.raises(UserError, match=r"unknown schedule 'cosin'; .* did you mean 'cosine'"):
        rate_factor("cosin", 0.5)


def test_the_callback_may_end_a_training_and_its_time_does_not_count(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(gan.loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told: list[TrainingProgress] = []

    def on_epoch(progress: TrainingProgress) -> bool:
        told.append(progress)
        clock[0] += 1000.0  # a measurement, say
        return progress.epoch == 2

    trained = trainer(replace(OPTIONS, epochs=10**9, seconds=50.0))
    result = trained.fit(tiny_pairs(12), on_epoch)
    assert [progress.epoch for progress in told] == [1, 2]
    assert [progress.seconds for progress in told] == [0.0, 0.0]
    assert not result.training


def test_the_discriminator_has_its_own_rate():
    trained = trainer(replace(OPTIONS, discriminator_rate=0.25))
    trained.step(*tiny_pairs(4).tensors(), 0.04)
    assert [group["lr"] for group in trained.generator_optimizer.param_groups] == [0.04]
    assert [group["lr"] for group in trained.discriminator_optimizer.param_groups] == [0.01]


def test_progress_is_told_after_each_epoch():
    told: list[TrainingProgress] = []
    trainer().fit(tiny_pairs(12), told.append)
    assert [progress.epoch for progress in told] == [1, 2, 3, 4]
    assert [progress.share for progress in told] == [0.25, 0.5, 0.75, 1.0]
    assert all(set(progress.losses) == {"discriminator", "adversarial", "l1"} for progress in told)
    assert [progress.seconds for progress in told] == sorted(progress.seconds for progress in told)


@pytest.mark.parametrize("adversarial", ["vanilla", "lsgan", "hinge"])
def test_every_adversarial_loss_trains_both(adversarial):
    trained = trainer(replace(OPTIONS, epochs=1, adversarial=adversarial))
    before = hashes(trained)
    trained.fit(tiny_pairs(12))
    assert not set(before) & set(hashes(trained))


def test_a_loss_that_is_not_finite_is_a_sentence():
    with pytest.raises(
        UserError, match=r"loss is no longer finite after \d+ steps .* 1e\+30; .* smaller one"
    ):
        trainer(replace(OPTIONS, learning_rate=1e30)).fit(tiny_pairs(12))


def test_seconds_end_a_training(monkeypatch):
    """On a clock that moves by a second a look."""
    ticks = itertools.count()
    monkeypatch.setattr(gan.loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    told: list[TrainingProgress] = []
    trained = trainer(replace(OPTIONS, epochs=10**9, seconds=20.0))
    trained.fit(tiny_pairs(12), told.append)
    assert 3 < trained.steps < 20
    assert told[-1].share == 1.0
    assert told[-1].seconds >= 20


def test_no_epochs_leave_the_weights_alone():
    trained = trainer(replace(OPTIONS, epochs=0))
    before = hashes(trained)
    trained.fit(tiny_pairs(12))
    assert (trained.steps, trained.epoch) == (0, 0)
    assert hashes(trained) == before


def test_distillation_needs_a_teacher():
    with pytest.raises(ValueError, match="distillation needs a teacher: hand in the dense generator"):
        trainer(replace(OPTIONS, distillation=1.0))


def test_distillation_pulls_towards_the_teacher():
    pairs, teacher = tiny_pairs(12), tiny_generator(5)
    inputs = pairs.tensors()[0]
    distances = {}
    for weight in (0.0, 300.0):
        options = replace(OPTIONS, epochs=8, learning_rate=5e-3, distillation=weight, l1=1.0, ema=0.9)
        trained = PairedTrainer(tiny_generator(), tiny_discriminator(), options, teacher)
        told: list[TrainingProgress] = []
        result = trained.fit(pairs, told.append)
        with torch.no_grad():
            distances[weight] = float((result(inputs) - teacher(inputs)).abs().mean())
        assert ("distillation" in told[-1].losses) == (weight > 0)
    assert distances[300.0] < 0.7 * distances[0.0]


def test_finetuning_leaves_its_arguments_alone():
    generator = tiny_generator(0, (4, 6, 8, 6, 4)).requires_grad_(False)
    discriminator = tiny_discriminator(1, (4, 6)).requires_grad_(False)
    teacher, pairs = tiny_generator(2).requires_grad_(False), tiny_pairs(12)
    arguments = (generator, discriminator, teacher)
    before = [state_hash(network) for network in arguments]
    images = copy.deepcopy(pairs)
    told: list[TrainingProgress] = []
    results = finetune(generator, discriminator, teacher, pairs, replace(FINETUNING, epochs=2), told.append)
    assert len(told) == 2
    assert [state_hash(network) for network in arguments] == before
    assert torch.equal(pairs.inputs, images.inputs)
    assert torch.equal(pairs.targets, images.targets)
    for network in arguments:
        assert not network.training
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    for result, argument in zip(results, arguments, strict=False):
        assert not any(module.training for module in result.modules())
        assert not any(p.requires_grad for p in result.parameters())
        assert state_hash(result) != state_hash(argument)
        found, wanted = result.state_dict(), argument.state_dict()
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}


def test_finetuning_depends_on_its_seed_alone():
    arguments = (tiny_generator(), tiny_discriminator(), tiny_generator(3), tiny_pairs(12))
    first, again, other = (
        state_hash(finetune(*arguments, replace(FINETUNING, epochs=1, seed=seed))[0]) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


class Counted(torch.nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return inputs / 3


def test_lessons_are_remembered_by_step_and_images():
    teacher = Counted()
    lessons = Lessons(teacher, limit=2)
    first, second = (torch.rand(4, 3, 8, 8, generator=random(seed)) for seed in (0, 1))
    told = lessons(0, first)
    torch.testing.assert_close(told, first / 3, atol=1e-3, rtol=0)  # kept as float16
    assert torch.equal(lessons(0, first), told)
    assert lessons.teacher.asked == 1
    torch.testing.assert_close(lessons(0, second), second / 3, atol=1e-3, rtol=0)  # other images, new answer
    assert lessons.teacher.asked == 2
    lessons(1, first)
    lessons(2, first)  # beyond the limit
    lessons(2, first)
    assert lessons.teacher.asked == 5
    lessons(1, first)
    assert lessons.teacher.asked == 5


def test_lessons_in_bfloat16_are_nearly_those_in_float32():
    teacher, images = tiny_generator(2), torch.rand(4, 3, 16, 16, generator=random(0)) * 2 - 1
    exact, rounded = Lessons(teacher)(0, images), Lessons(teacher, amp=True)(0, images)
    assert rounded.dtype == torch.float32
    assert 0 < float((exact - rounded).abs().mean()) < 0.02
    assert next(teacher.parameters()).is_contiguous()  # the teacher itself is left as it was


def test_finetunings_that_share_lessons_ask_the_teacher_once():
    teacher, pairs = Counted(), tiny_pairs(12)
    lessons, options = Lessons(teacher), replace(FINETUNING, epochs=2, batch_size=6)
    results = [
        state_hash(finetune(tiny_generator(), tiny_discriminator(), lessons, pairs, options)[0])
        for _ in range(2)
    ]
    assert results[0] == results[1]
    assert lessons.teacher.asked == 4  # two epochs of two batches, once


def test_finetuning_in_bfloat16_stays_near_float32():
    arguments = (tiny_generator(), tiny_discriminator(), tiny_generator(3), tiny_pairs(12))
    inputs = arguments[3].tensors()[0]
    exact, rounded = (
        finetune(*arguments, replace(FINETUNING, epochs=3, amp=amp))[0] for amp in (False, True)
    )
    for network in (exact, rounded):
        assert all(value.dtype == torch.float32 for value in network.parameters())
        assert all(value.is_contiguous() for value in network.parameters())
    with torch.no_grad():
        start = (arguments[0](inputs) - exact(inputs)).abs().mean()
        difference = (exact(inputs) - rounded(inputs)).abs().mean()
    assert 0 < float(difference) < 0.3 * float(start)


class Linear(nn.Module):
    """Two patch logits, each a weighted sum of the images' pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(2, 3 * 4 * 4, generator=random()))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weights.T)[:, None, None]


def test_the_gradient_penalty_by_hand():
    """The gradient of a linear discriminator is its weights, whatever the image; due every second step."""
    options = replace(OPTIONS, jitter=0.0, gradient_penalty=0.25)
    real, fake = (torch.randn(5, 3, 4, 4, generator=random(seed)) for seed in (1, 2))
    plain, kept = (Critic(Linear(), replace(options, gradient_penalty=g), random()) for g in (0.0, 0.25))
    weights = kept.network.weights.detach()
    wanted = 2 * 0.25 * float(weights.sum(0).square().sum()) / 2
    for penalised in (True, False, True):
        kept.network.load_state_dict(plain.network.state_dict())
        losses = [float(critic.learn(None, real, fake, 0.0)[0]) for critic in (plain, kept)]
        assert losses[1] - losses[0] == pytest.approx(wanted if penalised else 0.0, rel=1e-4, abs=1e-6)


def test_the_gradient_penalty_flattens_the_discriminator():
    flat, steep = (trainer(replace(OPTIONS, gradient_penalty=weight)) for weight in (10.0, 0.0))
    slopes = []
    for one in (flat, steep):
        one.fit(tiny_pairs(12))
        inputs, targets = tiny_pairs(12).tensors()
        images = targets.clone().requires_grad_(True)
        one.discriminator(torch.cat((inputs, images), 1)).sum().backward()
        slopes.append(float(images.grad.norm()))
    assert slopes[0] < slopes[1]


def test_colour_jitter_by_hand():
    """A grey image has no saturation to change: brightness and contrast remain."""
    image = torch.tensor([0.0, 0.4]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    brightness, _, contrast = (2 * torch.rand(3, 1, generator=random(4)) - 1).flatten().tolist()
    found = colour_jitter(image, 0.5, random(4))
    middle = 0.2 + 0.5 * brightness
    wanted = torch.tensor([-0.2, 0.2]) * (1 + 0.5 * contrast) + middle
    torch.testing.assert_close(found, wanted.reshape(1, 1, 1, 2).expand(1, 3, 1, 2))


def test_colour_jitter_treats_each_image_alone_and_lets_gradients_through():
    images = tiny_pairs(3).tensors()[0].requires_grad_()
    made = colour_jitter(images, 0.2, random())
    assert torch.equal(colour_jitter(images, 0.0, random()), images) or torch.allclose(
        colour_jitter(images, 0.0, random()), images, atol=1e-6
    )
    made[0].sum().backward()
    assert float(images.grad[0].abs().sum()) > 0
    assert float(images.grad[1:].abs().sum()) == 0


def test_a_set_smaller_than_a_batch_is_one_batch():
    trained = trainer(replace(OPTIONS, epochs=3, batch_size=16))
    trained.fit(PairedImages(*(x[:5] for x in (tiny_pairs(5).inputs, tiny_pairs(5).targets)), ("",) * 5))
    assert trained.steps == 3


def test_margins_are_told_step_by_step():
    """Before the step: the mean logit on real images minus that on made ones."""
    trained = trainer(replace(OPTIONS, jitter=0.0))
    inputs, targets = tiny_pairs(4).tensors()
    trained.generator.train()
    trained.discriminator.train()
    with torch.no_grad():
        fake = copy.deepcopy(trained.generator)(inputs)
        judge = copy.deepcopy(trained.discriminator)
        real, made = (judge(torch.cat([inputs, images], 1)).mean() for images in (targets, fake))
    trained.step(inputs, targets, 1e-3)
    torch.testing.assert_close(trained.margins, [real - made])
    told: list[TrainingProgress] = []
    trainer().fit(tiny_pairs(12), told.append)
    assert [len(progress.margins) for progress in told] == [3, 3, 3, 3]
