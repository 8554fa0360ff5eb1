from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan.checkpoints import state_hash
from gan.data import PairedImages
from gan.distillation import (
    NO_INGREDIENTS,
    PERCEPTUAL,
    PLACES,
    DensePair,
    DiscriminatorMatching,
    FeatureDistance,
    Ingredients,
    Lesson,
    PerceptualDistance,
    Teacher,
    behind,
    discriminator_taps,
    generator_taps,
    recorded,
    some_places,
)
from gan.errors import UserError
from gan.features import load_differentiable_stages, load_efficientnet_lite, load_efficientnet_lite0, prepare
from gan.groups import find_groups
from gan.loop import trainable_copy
from gan.networks import ResnetGenerator
from gan.training import FINETUNING, Lessons, PairedTrainer, TrainingProgress, finetune, finetuner
from tests.gan.conftest import Pair, _pair, pair, random, tiny_discriminator, tiny_generator, tiny_pairs

__all__ = ["Pair", "_pair", "pair"]  # fixtures

NARROW = (4, 6, 8, 6, 4)
OPTIONS = replace(FINETUNING, epochs=3, batch_size=4, shift=1)
EVERYTHING = Ingredients(
    features="adapters", matching="both", adversary="both", schedule="restarts", online=True
)


@pytest.fixture
def dense(pair: Pair) -> DensePair:
    return DensePair(pair.generator, pair.discriminator, pair.groups["generator"])


def student() -> tuple[nn.Module, nn.Module]:
    return tiny_generator(3, NARROW), tiny_discriminator(4, (4, 6))


def losses_of(ingredients: Ingredients, dense: DensePair, **options: Any) -> dict[str, float]:
    told: list[TrainingProgress] = []
    finetune(
        *student(),
        dense.generator,
        tiny_pairs(8),
        replace(OPTIONS, epochs=1, **options),
        told.append,
        ingredients,
        dense,
    )
    return told[-1].losses


def test_taps_stand_behind_the_norms_of_maps_that_are_large_enough(pair: Pair) -> None:
    taps = generator_taps(pair.generator, pair.groups["generator"])
    modules = dict(pair.generator.named_modules())
    assert len(taps) == 2  # the maps of 4 pixels; those of 2 and 1 are too small
    assert [type(modules[name]).__name__ for name in taps] == ["Conv2d", "BatchNorm2d"]
    assert discriminator_taps(pair.discriminator) == ("model.0", "model.3")
    assert behind(pair.discriminator, "model.2") == "model.3"
    resnet = ResnetGenerator(3, 3, (4, 4, 4, 4, 4, 4), "instance", False)
    groups = find_groups(resnet, [torch.zeros(1, 3, 16, 16)])
    kinds = {type(resnet.get_submodule(name)).__name__ for name in generator_taps(resnet, groups)}
    assert kinds == {"InstanceNorm2d"}
    with pytest.raises(ValueError, match="nothing to compare"):
        generator_taps(pair.generator, pair.groups["generator"][1:3])


def test_recorded_leaves_nothing_behind(pair: Pair) -> None:
    taps = generator_taps(pair.generator, pair.groups["generator"])
    inputs = pair.pairs.tensors()[0]
    with recorded(pair.generator, taps) as maps, torch.no_grad():
        pair.generator(inputs)
    assert {name: value.shape[1] for name, value in maps.items()} == dict(zip(taps, (8, 8), strict=True))
    maps.clear()
    with torch.no_grad():
        pair.generator(inputs)
    assert not maps


def test_places_are_those_of_the_moment() -> None:
    small, large = torch.rand(2, 3, 4, 4), torch.arange(400.0).reshape(1, 1, 20, 20)
    assert torch.equal(some_places(small, 5), small.flatten(2).transpose(1, 2))
    first = some_places(large, 1)
    assert first.shape == (1, PLACES, 1)
    assert len(first.unique()) == PLACES
    assert torch.equal(first, some_places(large, 1))
    assert not torch.equal(first, some_places(large, 2))
    assert {int(v) % 2 for v in first.flatten()} == {0, 1}  # both phases of a transposed convolution


@pytest.mark.parametrize("kind", ["alignment", "adapters"])
def test_feature_distance_falls_when_it_is_followed(pair: Pair, kind: Any) -> None:
    inputs = pair.pairs.tensors()[0]
    taps = generator_taps(pair.generator, pair.groups["generator"])
    narrow = tiny_generator(3, NARROW).requires_grad_(True).train()
    distance = FeatureDistance(kind, taps, narrow, pair.generator, seed=0)
    assert (len(list(distance.parameters())) > 0) == (kind == "adapters")
    lesson = Teacher(pair.generator, taps, amp=False)(inputs, 0)
    optimizer = torch.optim.Adam([*narrow.parameters(), *distance.parameters()], lr=0.02)
    values = []
    for _ in range(30):
        with recorded(narrow, taps) as maps:
            narrow(inputs)
        loss = distance(maps, lesson)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]


def test_equal_networks_have_aligned_features(pair: Pair) -> None:
    inputs = pair.pairs.tensors()[0]
    taps = generator_taps(pair.generator, pair.groups["generator"])
    teacher = Teacher(pair.generator, taps, amp=False)
    with recorded(pair.generator, taps) as maps, torch.no_grad():
        pair.generator(inputs)
    distance = FeatureDistance("alignment", taps, pair.generator, pair.generator, 0)
    assert float(distance(maps, teacher(inputs, 0))) == pytest.approx(0.0, abs=1e-5)
    assert float(distance(maps, teacher(inputs.flip(0), 0))) > 0.05  # the same maps, of other images


def test_a_teacher_remembers_what_it_says_live(pair: Pair) -> None:
    inputs = pair.pairs.tensors()[0]
    taps = generator_taps(pair.generator, pair.groups["generator"])
    teacher = Teacher(pair.generator, taps, amp=False)
    teacher.study(1, inputs, batch_size=5)
    rows = torch.tensor([7, 0, 3])
    live, known = teacher(inputs[rows], 1), teacher.remembered(1, rows)
    torch.testing.assert_close(known.outputs, live.outputs, atol=1e-3, rtol=0)  # float16
    for name in taps:
        torch.testing.assert_close(known.features[name], live.features[name], atol=1e-5, rtol=1e-4)
    assert known.moment == live.moment == 1
    teacher.network = nn.Identity()  # not asked again
    teacher.study(1, inputs)


def test_matching_is_zero_for_what_is_wanted_and_grows(pair: Pair) -> None:
    inputs, targets = pair.pairs.tensors()
    before = state_hash(pair.discriminator)
    matching = DiscriminatorMatching(pair.discriminator, amp=False)
    noise = torch.randn(targets.shape, generator=random())
    values = [float(matching(inputs, targets + s * noise, [targets])) for s in (0.0, 0.1, 0.5)]
    assert values[0] == 0
    assert values[0] < values[1] < values[2]
    both = float(matching(inputs, targets + 0.1 * noise, [targets, targets + 0.1 * noise]))
    assert both == pytest.approx(values[1] / 2, rel=1e-4)
    made = (targets + noise).requires_grad_()
    matching(inputs, made, [targets]).backward()
    assert float(made.grad.abs().sum()) > 0
    assert all(p.grad is None for p in matching.network.parameters())
    assert state_hash(pair.discriminator) == before


def test_perceptual_distance_in_a_network_that_measures_nothing() -> None:
    stages = load_differentiable_stages(32, (0, 3))
    targets = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4, generator=random()) * 2 - 1, size=32)
    assert [tuple(maps.shape[1:]) for maps in stages(targets)] == [(16, 16, 16), (24, 8, 8)]
    whole = load_efficientnet_lite(1, 32)[0]
    with recorded(whole, ("_blocks.0", "_blocks.3")) as maps, torch.no_grad():
        whole.extract_features(prepare(targets, 32))
    assert all(torch.equal(a, b) for a, b in zip(stages(targets), maps.values(), strict=True))
    judge = load_efficientnet_lite0(32)[0]
    assert len(judge._blocks) < len(load_efficientnet_lite(1, 32)[0]._blocks)
    assert not torch.equal(judge._conv_stem.weight, stages.network._conv_stem.weight)
    distance = PerceptualDistance(stages)
    noise = torch.randn(targets.shape, generator=random())
    values = [float(distance(targets + s * noise, targets)) for s in (0.0, 0.1, 0.5)]
    assert values[0] == 0
    assert values[0] < values[1] < values[2]
    made = (targets + noise).requires_grad_()
    distance(made, targets).backward()
    assert float(made.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("shape", "size"), [((64, 64), 48), ((256, 256), 192), ((128, 256), 192), ((8, 8), 32), ((512, 512), 256)]
)
def test_larger_images_are_looked_at_more_closely(
    shape: tuple[int, int], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def load(image_size: int, device: str) -> nn.Module:
        asked.append(image_size)
        return nn.Identity()

    monkeypatch.setattr("gan.distillation.load_differentiable_stages", load)
    monkeypatch.setattr("gan.distillation.relative_distance", lambda made, wanted: (made - wanted).sum())
    images = torch.zeros(1, 3, *shape)
    assert float(PerceptualDistance()(images, images)) == 0
    assert asked == [size, size]  # for what is wanted and for what is made; loaded once, it is cached


@pytest.mark.parametrize(
    ("ingredients", "names"),
    [
        (Ingredients(features="alignment"), {"features"}),
        (Ingredients(features="adapters", variants=2), {"features"}),
        (Ingredients(matching="target"), {"matching"}),
        (Ingredients(matching="both"), {"matching"}),
        (Ingredients(), set()),
        (Ingredients(unseen=3), {"unseen"}),
        (Ingredients(unseen=3, features="alignment"), {"features", "unseen"}),
        (Ingredients(adversary="both"), set()),
        (
            Ingredients(online=True, features="alignment"),
            {"features", "online discriminator", "online adversarial", "online l1"},
        ),
    ],
)
@pytest.mark.parametrize("amp", [False, True])
def test_every_ingredient_trains_and_reports(
    dense: DensePair, ingredients: Ingredients, names: set[str], amp: bool
) -> None:
    before = [state_hash(network) for network in (dense.generator, dense.discriminator)]
    found = losses_of(ingredients, dense, amp=amp)
    assert set(found) == {"discriminator", "adversarial", "l1", "distillation", "perceptual"} | names
    assert [state_hash(network) for network in (dense.generator, dense.discriminator)] == before


def weights_after(ingredients: Ingredients, dense: DensePair | None) -> list[str]:
    made = finetune(
        *student(), tiny_generator(), tiny_pairs(8), replace(OPTIONS, epochs=1), None, ingredients, dense
    )
    return [state_hash(network) for network in made]


def test_no_ingredient_is_the_finetuning_without_any(dense: DensePair) -> None:
    plain = weights_after(NO_INGREDIENTS, None)
    assert weights_after(NO_INGREDIENTS, dense) == plain
    assert weights_after(Ingredients(perceptual=PERCEPTUAL), dense) == weights_after(Ingredients(), dense)
    for changed in (
        Ingredients(),
        *(
            replace(NO_INGREDIENTS, **change)
            for change in (
                {"features": "alignment"},
                {"matching": "target"},
                {"adversary": "dense"},
                {"schedule": "cosine"},
                {"variants": 1},
                {"online": True},
            )
        ),
    ):
        assert weights_after(changed, dense)[0] != plain[0], changed


def test_who_judges(dense: DensePair) -> None:
    def critics(adversary: Any) -> PairedTrainer:
        trainer = finetuner(*student(), dense.generator, OPTIONS, Ingredients(adversary=adversary), dense)
        trainer.step(*tiny_pairs(4).tensors(), 1e-3)
        return trainer

    pruned, whole, both = (critics(name) for name in ("pruned", "dense", "both"))
    sizes = [
        [sum(p.numel() for p in c.network.parameters()) for c in t.critics] for t in (pruned, whole, both)
    ]
    assert sizes[2] == [sizes[0][0], sizes[1][0]]
    assert sizes[0][0] < sizes[1][0]
    for critic, start in zip(both.critics, (student()[1], dense.discriminator), strict=True):
        assert state_hash(critic.network) != state_hash(start)  # both have learned
        assert all(p.requires_grad for p in critic.network.parameters())
    # How many look at the images must not change which images come next: lessons are shared.
    assert torch.equal(both.random.get_state(), pruned.random.get_state())


def test_both_is_the_mean_of_the_two_losses(dense: DensePair) -> None:
    inputs, targets = tiny_pairs(4).tensors()
    options = replace(OPTIONS, jitter=0.0)
    found = {}
    for name in ("pruned", "dense", "both"):
        trainer = finetuner(*student(), dense.generator, options, Ingredients(adversary=name), dense)  # type: ignore[arg-type]
        trainer._set_training(True)
        found[name] = trainer.step(inputs, targets, 1e-3)
    for loss in ("discriminator", "adversarial"):
        wanted = (found["pruned"][loss] + found["dense"][loss]) / 2
        torch.testing.assert_close(found["both"][loss], wanted)


def test_the_online_teacher_learns_natively_and_teaches_what_it_makes(dense: DensePair) -> None:
    inputs, targets = tiny_pairs(4).tensors()
    trainer = finetuner(*student(), dense.generator, OPTIONS, Ingredients(online=True), dense)
    trainer._set_training(True)
    assert trainer.online is not None
    alone = PairedTrainer(
        *(trainable_copy(one, amp=False).train() for one in (dense.generator, dense.discriminator)),
        replace(OPTIONS, distillation=0.0, seed=OPTIONS.seed + 2),
    )
    for _ in range(2):
        losses = trainer.step(inputs, targets, 1e-2)
        alone.step(inputs, targets, 0.4e-2)
        alone.steps += 1
    assert state_hash(trainer.online.generator) == state_hash(alone.generator)  # the student is no burden
    assert state_hash(trainer.online.generator) != state_hash(dense.generator)
    made = (trainer.made - trainer.online.made).abs().mean()  # type: ignore[operator]
    torch.testing.assert_close(losses["distillation"], made)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("ingredients", "amp"),
    [
        (EVERYTHING, False),
        (EVERYTHING, True),
        (Ingredients(features="alignment", variants=2), True),
        (Ingredients(unseen=4), False),
    ],
)
def test_a_resumed_training_with_ingredients_equals_an_uninterrupted_one(
    dense: DensePair, ingredients: Ingredients, amp: bool
) -> None:
    options, pairs = replace(OPTIONS, amp=amp), tiny_pairs(8)
    states: list[dict[str, Any]] = []

    def make() -> PairedTrainer:
        return finetuner(*student(), dense.generator, options, ingredients, dense)

    whole = make()
    wanted = whole.fit(pairs, lambda _: states.append(saved(whole.state_dict())))
    resumed = make()
    resumed.load_state_dict(states[0])
    result = resumed.fit(pairs)
    assert state_hash(result) == state_hash(wanted)
    for one, other in zip(whole.critics, resumed.critics, strict=True):
        assert state_hash(one.network) == state_hash(other.network)
    if whole.online is not None and resumed.online is not None:
        assert state_hash(whole.online.discriminator) == state_hash(resumed.online.discriminator)
    if ingredients.features == "adapters":
        assert state_hash(whole.distance) == state_hash(resumed.distance)  # type: ignore[arg-type]


def test_variants_ask_the_teacher_once(dense: DensePair) -> None:
    ingredients = Ingredients(variants=2)
    trainer = finetuner(*student(), dense.generator, replace(OPTIONS, epochs=5), ingredients, dense)
    assert trainer.teacher is not None
    asked: list[int] = []
    ask = trainer.teacher.network.forward
    trainer.teacher.network.forward = lambda x: (asked.append(len(x)), ask(x))[1]  # type: ignore[func-returns-value]
    trainer.fit(tiny_pairs(8))
    assert sum(asked) == 2 * 8


def test_variants_repeat_the_same_images(dense: DensePair, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = finetuner(*student(), dense.generator, OPTIONS, Ingredients(variants=2), dense)
    epochs: list[dict[int, Tensor]] = []
    for epoch in range(4):
        trainer.epoch = epoch
        seen = {}
        for inputs, _, rows in trainer._epoch(tiny_pairs(8)):
            seen |= dict(zip(rows.tolist(), inputs, strict=True))
        epochs.append(seen)
    assert all(torch.equal(epochs[0][row], epochs[2][row]) for row in range(8))
    assert any(not torch.equal(epochs[0][row], epochs[1][row]) for row in range(8))


def test_unseen_images_teach_what_the_dense_generator_makes_of_them(dense: DensePair) -> None:
    trainer = finetuner(*student(), dense.generator, OPTIONS, Ingredients(unseen=3), dense)
    steps = [seen for epoch in range(2) for seen in unseen_of(trainer, epoch)]
    assert all(images.shape[0] == 3 for images in steps)
    assert len({float(images.sum()) for images in steps}) == len(steps)  # nothing comes twice
    assert all(map(torch.equal, unseen_of(trainer, 1), unseen_of(trainer, 1)))  # and after a pause
    plain, trained = (
        finetuner(*student(), dense.generator, OPTIONS, ingredients, dense)._epoch(tiny_pairs(8))
        for ingredients in (NO_INGREDIENTS, Ingredients(unseen=3))
    )
    for one, other in zip(plain, trained, strict=True):
        assert all(map(torch.equal, one, other))  # the training images are those of any finetuning
    inputs = steps[0]
    assert float(trainer._follow(inputs).detach()) > 0
    trainer.generator = trainable_copy(dense.generator, amp=False).eval()
    assert float(trainer._follow(inputs).detach()) == pytest.approx(0, abs=1e-6)


def unseen_of(trainer: PairedTrainer, epoch: int) -> list[Tensor]:
    """The further images of two steps."""
    trainer.epoch = epoch
    next(trainer._epoch(tiny_pairs(8)))
    assert trainer.unseen is not None
    return [next(trainer.unseen)[0] for _ in range(2)]


def test_what_is_not_handed_in_is_named(dense: DensePair) -> None:
    with pytest.raises(ValueError, match="hand it in as dense"):
        finetuner(*student(), dense.generator, OPTIONS, Ingredients(features="alignment"))
    trainer = finetuner(*student(), dense.generator, OPTIONS, Ingredients(variants=1), dense)
    with pytest.raises(ValueError, match="rows of the images"):
        trainer.step(*tiny_pairs(4).tensors(), 1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features": "align"}, "unknown features 'align'.*did you mean 'alignment'"),
        ({"adversary": "full"}, "unknown adversary 'full'; known are both, dense, pruned"),
        ({"feature_weight": -1.0}, "--feature-weight is -1.0; it must be 0 or more"),
        ({"perceptual": float("nan")}, "--perceptual is nan"),
        ({"online": True, "variants": 2}, "leave out --online or --variants"),
        ({"online": True, "unseen": 2}, "leave out --online or --unseen"),
    ],
)
def test_wrong_ingredients_are_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Ingredients(**change).check()


def test_the_perceptual_distance_is_on_where_images_are_pairs_and_all_else_off() -> None:
    assert not Ingredients().needs_dense
    assert Ingredients().settled() == replace(NO_INGREDIENTS, perceptual=PERCEPTUAL)
    assert Ingredients().settled(paired=False) == NO_INGREDIENTS
    assert Ingredients(perceptual=3.0).settled(paired=False).perceptual == 3.0


def test_an_ingredient_that_diverges_is_a_sentence(dense: DensePair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiscriminatorMatching, "__call__", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="the matching loss is no longer finite"):
        losses_of(Ingredients(matching="target"), dense)


def test_shared_lessons_serve_trainings_with_other_ingredients(dense: DensePair) -> None:
    lessons = Lessons(dense.generator)
    asked: list[int] = []
    lessons.teacher = Counting(dense.generator, asked)
    for ingredients in (Ingredients(), Ingredients(adversary="both", matching="teacher")):
        pairs: PairedImages = tiny_pairs(8)
        finetune(*student(), lessons, pairs, replace(OPTIONS, epochs=1), None, ingredients, dense)
    assert len(asked) == 2  # two batches, once


class Counting(nn.Module):
    def __init__(self, network: nn.Module, asked: list[int]) -> None:
        super().__init__()
        self.network, self.asked = network, asked

    def forward(self, inputs: Tensor) -> Tensor:
        self.asked.append(len(inputs))
        return self.network(inputs)


def test_a_lesson_without_maps_has_none() -> None:
    assert Lesson(torch.zeros(1), {}, 0).features == {}
