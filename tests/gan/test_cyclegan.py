from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gan.checkpoints import state_hash
from gan.cyclegan import (
    CYCLE_FINETUNING,
    SLOPE,
    CycleOptions,
    CycleTrainer,
    Direction,
    ImagePool,
    OneWayTrainer,
    Translator,
    cycle_finetuner,
    start_as_identity,
)
from gan.data import UnpairedImages, embedded_pairs, to_float
from gan.loop import TrainingProgress
from gan.losses import total_variation
from gan.networks import Architecture, initialise
from tests.gan.conftest import SIZE, random, tiny_discriminator, tiny_generator, tiny_pairs

OPTIONS = CycleOptions(epochs=3, batch_size=4, learning_rate=2e-3, shift=1, pool=6)


def critic(seed: int) -> nn.Module:
    """Sees images alone."""
    return tiny_discriminator(seed, in_channels=3)


def translators() -> dict[Direction, Translator]:
    return {
        "A": Translator(tiny_generator(0), critic(1)),
        "B": Translator(tiny_generator(2), critic(3)),
    }


def images(first: int = 12, second: int = 12) -> UnpairedImages:
    a, b = tiny_pairs(first), tiny_pairs(second, seed=5)
    return UnpairedImages(a.inputs, b.targets, a.names, b.names)


def trainer(options: CycleOptions = OPTIONS) -> CycleTrainer:
    return CycleTrainer(translators(), options)


def hashes(trained: CycleTrainer) -> list[str]:
    return [
        state_hash(network)
        for learner in trained.learners.values()
        for network in (learner.generator, learner.critic.network, learner.averaged)
    ]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_training_is_repeatable_and_the_seed_matters() -> None:
    first, again, other = (trainer(replace(OPTIONS, epochs=2, seed=seed)) for seed in (0, 0, 1))
    for one in (first, again, other):
        one.fit(images())
    assert hashes(first) == hashes(again)
    assert not set(hashes(first)) & set(hashes(other))


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_a_resumed_training_equals_an_uninterrupted_one(features: float) -> None:
    """Bit for bit: order, augmentation, jitter, the pools and what sees features go on where they were."""
    states: list[dict[str, Any]] = []
    options = replace(OPTIONS, features=features)
    whole = trainer(options)
    wanted = whole.fit(images(), lambda _: states.append(saved(whole.state_dict())))
    resumed = trainer(options)
    resumed.load_state_dict(states[0])
    told: list[TrainingProgress] = []
    result = resumed.fit(images(), told.append)
    assert [progress.epoch for progress in told] == [2, 3]
    assert hashes(resumed) == hashes(whole)
    assert {d: state_hash(n) for d, n in result.items()} == {d: state_hash(n) for d, n in wanted.items()}
    assert len(whole.learners["A"].pool.images) == OPTIONS.pool


def test_the_losses_by_hand() -> None:
    """Each is the distance that its name says, of the networks before the step."""
    options = replace(OPTIONS, jitter=0.0, distillation=2.0, smoothness=3.0, pool=0)
    taught = CycleTrainer(translators(), options, {"A": tiny_generator(7), "B": tiny_generator(8)})
    taught._set_training(False)  # BatchNorm must say the same twice
    networks = copy.deepcopy(translators())
    (a, _), (b, _) = tiny_pairs(4).tensors(), tiny_pairs(4, seed=5).tensors()
    losses = taught.step(a, b, 1e-3)
    there, back = networks["A"].generator, networks["B"].generator
    judge = networks["A"].discriminator
    assert judge is not None
    with torch.no_grad():
        made, other = there(a), back(b)
        wanted = {
            "cycle A": (back(made) - a).abs().mean(),
            "cycle B": (there(other) - b).abs().mean(),
            "identity A": (there(b) - b).abs().mean(),
            "identity B": (back(a) - a).abs().mean(),
            "adversarial A": (judge(made) - 1).square().mean(),
            "distillation B": (other - tiny_generator(8)(b)).abs().mean(),
            "roughness A": total_variation(made - a),
            "discriminator A": 0.5 * ((judge(b) - 1).square().mean() + judge(made).square().mean()),
        }
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert set(losses) == {
        f"{kind} {direction}"
        for kind in ("cycle", "adversarial", "identity", "roughness", "distillation", "discriminator")
        for direction in "AB"
    }


def test_without_identity_and_teachers_their_losses_are_left_out() -> None:
    told: list[TrainingProgress] = []
    trainer(replace(OPTIONS, epochs=1, identity=0.0)).fit(images(), told.append)
    kinds = {name.split()[0] for name in told[0].losses}
    assert kinds == {"cycle", "adversarial", "discriminator"}


def test_critics_of_features_have_their_say() -> None:
    """Their loss is told, it changes what is learnt, and they are no part of what is handed out."""
    told: list[TrainingProgress] = []
    plain, seen = (trainer(replace(OPTIONS, epochs=1, features=weight)) for weight in (0.0, 1.0))
    plain.fit(images())
    result = seen.fit(images(), told.append)
    assert {"features A", "features B"} <= set(told[0].losses)
    assert not set(hashes(plain)) & set(hashes(seen))
    for generator, discriminator in seen.pairs(result).values():
        assert generator.state_dict().keys() == tiny_generator(0).state_dict().keys()
        assert discriminator.state_dict().keys() == critic(0).state_dict().keys()


def test_smoothness_keeps_grain_out_of_what_is_changed() -> None:
    """The same training, with and without: what it adds to its input varies less from pixel to pixel."""
    roughness = []
    inputs = to_float(torch.as_tensor(images().first))
    for weight in (0.0, 20.0):
        one = trainer(replace(OPTIONS, epochs=6, smoothness=weight))
        result = one.fit(images())["A"]
        with torch.no_grad():
            roughness.append(float(total_variation(result(inputs) - inputs)))
    assert roughness[1] < 0.9 * roughness[0]


def test_discriminators_may_learn_from_more_batches_than_generators() -> None:
    """What the generators learn from is the first part alone; the discriminators go on."""
    one, two = trainer(), trainer(replace(OPTIONS, discriminator_batches=2))
    pairs = images(8)
    first, second = (to_float(torch.as_tensor(domain)) for domain in (pairs.first, pairs.second))
    few, many = one.step(first[:4], second[:4], 2e-3), two.step(first, second, 2e-3)
    for name in ("cycle A", "adversarial A", "identity B"):
        torch.testing.assert_close(few[name], many[name])
    assert few["discriminator A"] != many["discriminator A"]
    assert [t.learners["A"].critic.steps for t in (one, two)] == [1, 2]
    assert one._steps_per_epoch(images(16, 16)) == 2 * two._steps_per_epoch(images(16, 16))


def test_training_lets_the_two_undo_each_other() -> None:
    told: list[TrainingProgress] = []
    trainer(replace(OPTIONS, epochs=12, learning_rate=5e-3)).fit(images(), told.append)
    for direction in "AB":
        name = f"cycle {direction}"
        assert told[-1].losses[name] < 0.8 * told[0].losses[name]


def distances(network: nn.Module, teacher: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((network(inputs) - teacher(inputs)).abs().mean())


def test_one_direction_learns_against_the_fixed_generator_of_the_other() -> None:
    both = translators()
    fixed, teacher = tiny_generator(4), tiny_generator(6)
    before = state_hash(fixed)
    options = replace(OPTIONS, epochs=8, learning_rate=5e-3, distillation=300.0, ema=0.9)
    one = CycleTrainer({"A": both["A"], "B": Translator(fixed, None)}, options, {"A": teacher})
    told: list[TrainingProgress] = []
    data = images()
    result = one.fit(data, told.append)
    assert set(result) == {"A"}
    assert state_hash(fixed) == before
    assert not fixed.training
    assert "cycle B" in told[0].losses
    assert "adversarial B" not in told[0].losses
    inputs = data.tensors()[0]
    assert distances(result["A"], teacher, inputs) < 0.7 * distances(tiny_generator(0), teacher, inputs)
    generator, discriminator = one.pairs(result)["A"]
    assert generator is result["A"]
    assert not discriminator.training
    assert not any(p.requires_grad for p in discriminator.parameters())


def test_what_cannot_be_trained_is_refused() -> None:
    nobody: Mapping[Direction, Translator] = {
        "A": Translator(tiny_generator(), None),
        "B": Translator(tiny_generator(), None),
    }
    with pytest.raises(ValueError, match="nothing to train: hand in the discriminator"):
        CycleTrainer(nobody, OPTIONS)
    with pytest.raises(ValueError, match="distillation needs a teacher for every direction"):
        CycleTrainer(translators(), replace(OPTIONS, distillation=1.0), {"A": tiny_generator()})


def test_the_result_is_the_average_with_statistics_of_its_own_domain() -> None:
    trained = trainer()
    data = images()
    result = trained.fit(data)
    for direction, inputs in zip(("A", "B"), data.tensors(), strict=True):
        network = result[direction]
        averaged = trained.learners[direction].averaged
        for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
            assert torch.equal(mean, value)
        leaky = nn.functional.leaky_relu(network.model.model[0](inputs), 0.2)
        seen = network.model.model[1].model[1](leaky)
        torch.testing.assert_close(network.model.model[1].model[2].running_mean, seen.mean((0, 2, 3)))
        assert not network.training


def test_bfloat16_stays_near_float32() -> None:
    inputs = images().tensors()[0]
    exact, rounded = (trainer(replace(OPTIONS, amp=amp)).fit(images())["A"] for amp in (False, True))
    assert all(value.dtype == torch.float32 for value in rounded.parameters())
    assert 0 < distances(exact, rounded, inputs) < 0.3 * distances(tiny_generator(), exact, inputs)


def numbered(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, SIZE, SIZE)


def test_the_pool_shows_what_came_while_it_fills() -> None:
    pool = ImagePool(4, random())
    assert torch.equal(pool.exchange(numbered(0, 1)), numbered(0, 1))
    assert torch.equal(pool.exchange(numbered(2, 3)), numbered(2, 3))
    assert [int(image[0, 0, 0]) for image in pool.images] == [0, 1, 2, 3]


def test_a_full_pool_shows_old_ones_half_of_the_time_and_loses_none() -> None:
    pool = ImagePool(4, random())
    shown: list[int] = []
    for value in range(400):
        shown += pool.exchange(numbered(value))[:, 0, 0, 0].int().tolist()
    old = sum(value != place for place, value in enumerate(shown))
    assert 150 < old < 250
    assert len({int(image[0, 0, 0]) for image in pool.images}) == 4
    assert (
        max(shown.count(value) for value in set(shown)) == 2
    )  # when it came first, and once out of the pool


def test_a_pool_of_none_shows_the_newest_and_carries_no_gradients() -> None:
    pool = ImagePool(0, random())
    made = numbered(1, 2).clone().requires_grad_()
    assert torch.equal(pool.exchange(made), made)
    assert not pool.exchange(made).requires_grad
    assert pool.images == []
    assert not ImagePool(3, random()).exchange(made).requires_grad


def test_domains_of_different_sizes_train_together() -> None:
    trained = trainer(replace(OPTIONS, epochs=1))
    trained.fit(images(13, 5))
    assert trained.steps == 3


def one_way(options: CycleOptions = OPTIONS) -> OneWayTrainer:
    return OneWayTrainer(tiny_generator(0), critic(1), tiny_generator(4), options, tiny_generator(6))


def test_one_way_is_a_cycle_training_with_a_fixed_way_back() -> None:
    options = replace(OPTIONS, distillation=5.0)
    alone = one_way(options)
    told: list[TrainingProgress] = []
    result = alone.fit(images().drawn(), told.append)
    both = CycleTrainer(
        {"A": Translator(tiny_generator(0), critic(1)), "B": Translator(tiny_generator(4), None)},
        options,
        {"A": tiny_generator(6)},
    )
    assert state_hash(result) == state_hash(both.fit(images())["A"])
    assert set(told[0].losses) == {
        "cycle",
        "cycle back",
        "adversarial",
        "identity",
        "distillation",
        "discriminator",
    }
    assert len(told[0].margins) == 3


def test_a_resumed_one_way_training_equals_an_uninterrupted_one() -> None:
    states: list[dict[str, Any]] = []
    whole, resumed = one_way(), one_way()
    wanted = whole.fit(images().drawn(), lambda _: states.append(saved(whole.state_dict())))
    resumed.load_state_dict(states[0])
    result = resumed.fit(images().drawn())
    assert (resumed.epoch, resumed.steps) == (3, 9)
    assert state_hash(result) == state_hash(wanted)
    assert state_hash(resumed.discriminator) == state_hash(whole.discriminator)


def test_finetuning_leaves_its_arguments_alone() -> None:
    arguments = [tiny_generator(0, (4, 6, 8, 6, 4)), critic(1), tiny_generator(4), tiny_generator(6)]
    for network in arguments:
        network.requires_grad_(False)
    before = [state_hash(network) for network in arguments]
    options = replace(CYCLE_FINETUNING, epochs=1, shift=1)
    trainer = cycle_finetuner(arguments[0], arguments[1], arguments[2], arguments[3], options)
    pair = trainer.pair(trainer.fit(images().drawn()))
    assert [state_hash(network) for network in arguments] == before
    for network, argument in zip(pair, arguments, strict=False):
        assert not network.training
        assert state_hash(network) != state_hash(argument)
        shapes = [{k: v.shape for k, v in one.state_dict().items()} for one in (network, argument)]
        assert shapes[0] == shapes[1]


def test_a_u_net_may_start_as_what_it_is_given() -> None:
    generator = initialise(Architecture("unet_64", base_width=16, norm="instance").build(), random())
    inputs = embedded_pairs("noto2twemoji", "val").take(8).tensors()[0]
    start_as_identity(generator)
    with torch.no_grad():
        made = generator(inputs)
    wanted = torch.tanh(SLOPE * inputs)
    assert float((made - wanted).abs().mean()) < 0.1
    assert float((made - wanted.roll(1, -1)).abs().mean()) > 1.2 * float((made - wanted).abs().mean())
    top = generator.model.model
    silent = copy.deepcopy(generator)
    with torch.no_grad():
        silent.model.model[-2].weight[12:] = 0
    torch.testing.assert_close(silent(inputs), wanted, atol=1e-5, rtol=0)
    assert bool((top[0].weight[12:] != 0).any())


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("unet_64", base_width=8, norm="instance"),
        Architecture("unet_64", base_width=16, norm="batch"),
        Architecture("unet_64", in_channels=1, base_width=16, norm="instance"),
    ],
)
def test_some_u_nets_cannot(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="cannot start as the identity"):
        start_as_identity(architecture.build())  # type: ignore[arg-type]
