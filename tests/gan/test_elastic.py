from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gan.checkpoints import state_hash, tensors_hash
from gan.data import PairedImages, to_float, to_uint8
from gan.distillation import (
    FeatureDistance,
    Lesson,
    PerceptualDistance,
    generator_taps,
    recorded,
    some_places,
)
from gan.elastic import (
    Adversary,
    ElasticNetwork,
    ElasticOptions,
    order_channels,
    random_widths,
    teaching_images,
    train_elastic,
)
from gan.errors import UserError
from gan.importance import l1_importance
from gan.losses import output_distillation, paired_input
from gan.norm_statistics import recompute_statistics
from tests.gan.conftest import Pair, random, tiny_pairs

OPTIONS = ElasticOptions(steps=30, batch_size=8, learning_rate=5e-3, shift=1)
SMALLEST = ((4, 4, 4, 4, 4), (4, 4))
Trained = tuple[ElasticNetwork, ElasticNetwork]


def train(pair: Pair, options: ElasticOptions, on_step: object = None) -> Trained:
    start = pair.ordered()
    return train_elastic(
        (pair.generator, pair.discriminator),
        (start["generator"], start["discriminator"]),
        SMALLEST,
        (4, 2),
        tiny_pairs(12, seed=1),
        options,
        on_step,  # type: ignore[arg-type]
    )


def test_ordering_keeps_the_function_and_sorts_by_importance(pair):
    elastic = order_channels(pair.generator, pair.groups["generator"])
    inputs = pair.statistics["generator"]
    full = elastic.network(elastic.slicer.dense_widths)
    torch.testing.assert_close(full(inputs), pair.generator(inputs))
    found = l1_importance(full, pair.groups["generator"])
    for row, wanted, order, channels in zip(
        found, elastic.importance, elastic.orders, elastic.slicer.dense_widths, strict=True
    ):
        torch.testing.assert_close(row, wanted)
        assert bool((wanted.diff() <= 0).all())
        assert sorted(order.tolist()) == list(range(channels))


def test_ordering_copies(pair):
    before = state_hash(pair.generator)
    elastic = order_channels(pair.generator, pair.groups["generator"])
    for tensor in elastic.tensors.values():
        tensor.zero_()
    assert state_hash(pair.generator) == before


def distance(pair: Pair, elastic: ElasticNetwork, widths: Sequence[int]) -> float:
    """Mean absolute difference to the dense outputs on the training images."""
    inputs = pair.statistics["generator"]
    with torch.no_grad():
        made = recompute_statistics(elastic.network(widths), inputs)(inputs)
        return float((made - pair.generator(inputs)).abs().mean())


def logit_distance(pair: Pair, elastic: ElasticNetwork, widths: Sequence[int]) -> float:
    seen = pair.statistics["discriminator"]
    with torch.no_grad():
        made = recompute_statistics(elastic.network(widths), seen)(seen)
        return float((made - pair.discriminator(seen)).abs().mean())


def test_a_few_steps_bring_small_widths_nearer_to_the_dense_pair(pair):
    start = pair.ordered()
    generator, discriminator = train(pair, OPTIONS)
    for widths in (SMALLEST[0], (4, 8, 8, 8, 4)):
        assert distance(pair, generator, widths) < 0.9 * distance(pair, start["generator"], widths)
    assert logit_distance(pair, discriminator, SMALLEST[1]) < 0.9 * logit_distance(
        pair, start["discriminator"], SMALLEST[1]
    )


def test_the_dense_pair_and_the_start_are_unchanged(pair):
    start = pair.ordered()
    before = [
        state_hash(pair.generator),
        state_hash(pair.discriminator),
        *(tensors_hash(elastic.tensors) for elastic in start.values()),
    ]
    trained = train_elastic(
        (pair.generator, pair.discriminator),
        (start["generator"], start["discriminator"]),
        SMALLEST,
        (4, 2),
        tiny_pairs(12),
        replace(OPTIONS, steps=3),
    )
    after = [
        state_hash(pair.generator),
        state_hash(pair.discriminator),
        *(tensors_hash(elastic.tensors) for elastic in start.values()),
    ]
    assert after == before
    for elastic, old in zip(trained, start.values(), strict=True):
        assert elastic.orders is old.orders
        assert elastic.importance is old.importance
        for name, tensor in elastic.tensors.items():
            assert not tensor.requires_grad
            same = torch.equal(tensor, old.tensors[name])
            assert same == ("running" in name or "num_batches" in name), name


def test_the_warm_up_depends_on_its_seed_alone(pair):
    options = replace(OPTIONS, steps=4)
    first = train(pair, options)
    torch.rand(1000)  # the global generator plays no part
    again, other = train(pair, options), train(pair, replace(options, seed=1))
    assert [tensors_hash(e.tensors) for e in first] == [tensors_hash(e.tensors) for e in again]
    for one, two in zip(first, other, strict=True):
        assert tensors_hash(one.tensors) != tensors_hash(two.tensors)


def test_an_adversary_changes_the_generator_and_neither_teacher(pair):
    before = [state_hash(network) for network in (pair.generator, pair.discriminator)]
    plain, fought = (train(pair, replace(OPTIONS, steps=3, adversarial=weight)) for weight in (0.0, 0.5))
    assert [state_hash(network) for network in (pair.generator, pair.discriminator)] == before
    assert tensors_hash(plain[0].tensors) != tensors_hash(fought[0].tensors)
    assert all(bool(tensor.isfinite().all()) for tensor in fought[0].tensors.values())


def test_the_perceptual_distance_is_one_to_the_dense_outputs(pair, monkeypatch):
    """With the loss that there is in its place only its scale changes, which Adam does not see."""

    class SameLoss(PerceptualDistance):
        def maps(self, targets: Tensor) -> list[Tensor]:
            return [targets]

        def from_maps(self, made: Tensor, wanted: Sequence[Tensor]) -> Tensor:
            return output_distillation(made, *wanted)

    def apart(first: Trained, second: Trained) -> float:
        one, two = (trained[0].tensors for trained in (first, second))
        return sum(float((one[name] - two[name]).float().abs().sum()) for name in one)

    options = replace(OPTIONS, steps=3)
    plain, perceived = train(pair, options), train(pair, replace(options, perceptual=2.0))
    monkeypatch.setattr("gan.elastic.PerceptualDistance", SameLoss)
    twice = train(pair, replace(options, perceptual=1.0))
    assert apart(twice, plain) < 0.02 * apart(perceived, plain)


def maps_apart(pair: Pair, elastic: ElasticNetwork, widths: Sequence[int]) -> float:
    """Distance of a slice's feature maps to the dense ones, on images that no warm-up here has seen."""
    slicer, (inputs, _) = elastic.slicer, tiny_pairs(12, seed=2).tensors()
    taps = generator_taps(pair.generator, slicer.groups)
    with torch.no_grad(), slicer.recorded(taps) as made, recorded(pair.generator, taps) as dense:
        slicer.run(elastic.tensors, widths, inputs, training=True)
        outputs = pair.generator.eval()(inputs)
    wanted = {name: some_places(maps, 0) for name, maps in dense.items()}
    distance = FeatureDistance("alignment", taps, pair.generator, pair.generator, 0)
    return float(distance(made, Lesson(outputs, wanted, 0)))


def test_feature_maps_are_brought_nearer_to_the_dense_ones(pair):
    plain, taught = (train(pair, replace(OPTIONS, features=weight)) for weight in (0.0, 5.0))
    distances = [maps_apart(pair, trained[0], SMALLEST[0]) for trained in (plain, taught)]
    assert distances[1] < 0.9 * distances[0]
    assert tensors_hash(plain[1].tensors) != tensors_hash(taught[1].tensors)  # its lessons hold made images


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("features", -1.0),
        ("steps", 0),
        ("batch_size", -1),
        ("learning_rate", float("nan")),
        ("spread", -0.1),
        ("mixing", 2.0),
    ],
)
def test_options_that_no_warm_up_can_use_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option.replace('_', ' ')} is {value}"):
        replace(OPTIONS, **{option: value}).check()


def test_the_adversary_learns_to_tell_made_from_dense(pair):
    inputs, lesson = tiny_pairs(12, seed=1).tensors()
    made = lesson.roll(1, dims=0)
    adversary = Adversary(pair.ordered()["discriminator"].network((8, 12)), OPTIONS)

    def margin() -> float:
        real, fake = (adversary.network(paired_input(inputs, images)) for images in (lesson, made))
        return float((real - fake).detach().mean())

    before = margin()
    for _ in range(30):
        adversary.learn(inputs, lesson, made)
    assert margin() > before
    made.requires_grad_()
    adversary.fooled(inputs, made).backward()
    assert float(made.grad.abs().sum()) > 0
    assert not any(parameter.requires_grad for parameter in adversary.network.parameters())


def test_every_step_is_told(pair):
    told: list[tuple[int, int, float]] = []
    train(pair, replace(OPTIONS, steps=3), lambda *progress: told.append(progress))
    assert [(step, steps) for step, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(loss > 0 for *_, loss in told)


dense_and_smallest = st.lists(st.integers(1, 64), min_size=1, max_size=6).flatmap(
    lambda dense: st.tuples(st.just(dense), st.tuples(*[st.integers(1, width) for width in dense]))
)


@given(
    dense_and_smallest,
    st.integers(1, 16),
    st.floats(0, 2),
    st.floats(0, 2),
    st.floats(0.01, 1),
    st.integers(0, 2**31),
)
def test_random_widths_are_legal(widths, multiple, spread, tilt, largest, seed):
    dense, smallest = widths
    found = random_widths(
        dense, multiple, smallest, ElasticOptions(spread=spread, tilt=tilt, largest=largest), random(seed)
    )
    assert len(found) == len(dense)
    for width, channels in zip(found, dense, strict=True):
        assert type(width) is int
        assert width == channels or (0 < width < channels and width % multiple == 0)


def test_random_widths_lie_between_the_smallest_and_the_dense():
    dense, smallest = (32, 64, 128), (8, 16, 32)
    options = ElasticOptions(spread=0.0, tilt=0.0, largest=1.0)
    found = torch.tensor([random_widths(dense, 4, smallest, options, random(seed)) for seed in range(200)])
    ratios = found / torch.tensor(dense)
    assert float(ratios.min()) >= 0.25 - 2 / 32  # rounding
    assert float(ratios.max()) <= 1
    below = float((ratios[:, 2] < 0.5).float().mean())
    assert 0.35 < below < 0.65  # as many below as above the geometric middle


def test_tilted_widths_follow_the_depth():
    """Without noise of their own neighbours move together: ends against the middle, or end to end."""
    dense, smallest = (256,) * 9, (64,) * 9
    options = ElasticOptions(spread=0.0, tilt=1.0, largest=0.5)
    found = torch.tensor(
        [random_widths(dense, 4, smallest, options, random(seed)) for seed in range(100)], dtype=torch.float64
    ).log()
    steps = found.diff(dim=1).abs().mean()
    assert float(found.std(dim=1).mean()) > 0.3
    assert float(steps) < 0.6 * float(found.std(dim=1).mean())


def lessons(options: ElasticOptions, count: int = 6, pairs: PairedImages | None = None) -> list[Tensor]:
    images = teaching_images(pairs or tiny_pairs(12), options, random(options.seed))
    return [torch.stack(both) for both in islice(images, count)]


def test_lessons_never_end_and_keep_pairs_together():
    """Targets that are the inputs' negatives stay so through mirrors, turns, shifts and mixing."""
    inputs = tiny_pairs(12).inputs
    pairs = PairedImages(inputs, 255 - inputs, ("",) * 12)
    for batch in lessons(ElasticOptions(batch_size=5, shift=3), count=9, pairs=pairs):
        assert batch.shape == (2, 5, 3, 8, 8)
        torch.testing.assert_close(batch[1], -batch[0], atol=1e-6, rtol=0)


def test_lessons_hold_only_pixels_of_the_images():
    pairs = tiny_pairs(4)
    known = set(pairs.inputs.flatten().tolist())
    for batch in lessons(ElasticOptions(batch_size=4, shift=3), pairs=pairs):
        assert set(to_uint8(batch[0]).flatten().tolist()) <= known


def test_without_mixing_a_lesson_is_one_image_turned_and_rolled():
    pairs = tiny_pairs(3)
    turned = [
        torch.rot90(x, k, (-2, -1))
        for image in pairs.inputs
        for x in (image, image.flip(-1))
        for k in range(4)
    ]
    known = {
        torch.roll(x, (down, right), (-2, -1)).numpy().tobytes()
        for x in turned
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    }
    made = torch.cat(
        [batch[0] for batch in lessons(ElasticOptions(batch_size=3, shift=1, mixing=0.0), pairs=pairs)]
    )
    shown = {image.numpy().tobytes() for image in to_uint8(made)}
    assert shown <= known
    assert len(shown) > 12  # of 18: hardly one twice
    mixed = torch.cat(
        [batch[0] for batch in lessons(ElasticOptions(batch_size=3, shift=1, mixing=1.0), pairs=pairs)]
    )
    assert not {image.numpy().tobytes() for image in to_uint8(mixed)} <= known


def test_images_that_are_not_square_keep_their_shape():
    wide = torch.randint(0, 256, (4, 3, 8, 12), generator=random(), dtype=torch.uint8)
    for batch in lessons(ElasticOptions(batch_size=4), pairs=PairedImages(wide, wide, ("",) * 4)):
        assert batch.shape == (2, 4, 3, 8, 12)


@pytest.mark.parametrize("seed", [0, 1])
def test_lessons_depend_on_their_seed(seed):
    options = ElasticOptions(batch_size=4)
    same = [
        torch.equal(a, b) for a, b in zip(lessons(options), lessons(replace(options, seed=seed)), strict=True)
    ]
    assert all(same) if seed == 0 else not any(same)


def test_grey_inputs_stay_grey_beside_coloured_targets():
    pairs = tiny_pairs(6)
    grey = PairedImages(pairs.inputs[:, :1], pairs.targets, pairs.names)
    inputs, targets = next(teaching_images(grey, ElasticOptions(batch_size=4, mixing=0.0, shift=0), random()))
    assert inputs.shape == (4, 1, 8, 8)
    assert targets.shape == (4, 3, 8, 8)
    flat = to_float(grey.targets).sum((1, 2, 3))
    assert all(bool(((value - flat).abs() < 1e-3).any()) for value in targets.sum((1, 2, 3)))
