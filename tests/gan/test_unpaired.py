"""Tasks without pairs on the road from the dense pair to the table: the discriminator sees images alone."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import gan.tasks
from experiments.build import finetuning_of
from gan.checkpoints import load_network, save_network, state_hash
from gan.cyclegan import CYCLE_FINETUNING, CycleOptions, OneWayTrainer
from gan.data import PairedImages, UnpairedImages, embedded_pairs
from gan.distillation import Ingredients
from gan.elastic import ElasticOptions, train_elastic
from gan.errors import UserError
from gan.evaluation import COLUMNS, Judge
from gan.groups import find_groups
from gan.losses import condition_of, paired_input
from gan.networks import Architecture, initialise
from gan.norm_statistics import recompute_statistics
from gan.plans import Plan
from gan.scoring import Yardstick, run_batched
from gan.tasks import TASKS, UNPAIRED_TASKS, Task, load_task
from gan.training import FINETUNING, Lessons, PairedTrainer
from tests.gan.conftest import (
    DISCRIMINATOR_WIDTHS,
    GENERATOR_WIDTHS,
    fake_extractor,
    random,
    tiny_discriminator,
    tiny_generator,
    tiny_pairs,
)

DENSE = Plan.of({"generator": (8, 12, 16, 12, 8), "discriminator": (8, 12)}, "l1")
SMALL = Plan.of({"generator": (4, 8, 8, 4, 4), "discriminator": (4, 6)}, "l1")


def drawn(count: int, seed: int) -> PairedImages:
    first, second = tiny_pairs(count, seed=seed), tiny_pairs(count, seed=seed + 10)
    return UnpairedImages(first.inputs, second.targets, first.names, second.names).drawn()


def make_task(seed: int = 0) -> Task:
    """One direction of a tiny translator, BatchNorm statistics those of its full-width slices."""
    train, val = (drawn(12, seed) for seed in (1, 0))
    generator, back, discriminator = (
        tiny_generator(seed),
        tiny_generator(seed + 3),
        tiny_discriminator(seed + 1, in_channels=3),
    )
    inputs, targets = train.tensors()
    recompute_statistics(generator, inputs)
    seen = torch.cat([targets[::2], run_batched(generator, inputs[::2])])
    recompute_statistics(discriminator, seen)
    networks = {"generator": generator, "discriminator": discriminator}
    for network in (*networks.values(), back):
        network.requires_grad_(False)
    return Task(
        name="tiny",
        networks=networks,
        architectures={
            "generator": Architecture("unet_8", base_width=8, widths=GENERATOR_WIDTHS),
            "discriminator": Architecture(
                "n_layers", 3, 1, base_width=8, layers=1, widths=DISCRIMINATOR_WIDTHS
            ),
        },
        groups={agent: find_groups(network, [inputs[:1]]) for agent, network in networks.items()},
        train=train,
        val=val,
        test=tiny_pairs(12, seed=2),
        multiples={"generator": 4, "discriminator": 2},
        elastic_path=None,
        adversarial="lsgan",
        back=back,
    )


@pytest.fixture(scope="session")
def _task() -> Task:
    return make_task()


@pytest.fixture
def task(_task: Task) -> Task:
    return copy.deepcopy(_task)


def test_how_many_channels_a_discriminator_takes_says_what_it_is_told() -> None:
    inputs, images = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    assert condition_of(tiny_discriminator(), inputs, 3) is inputs
    nothing = condition_of(tiny_discriminator(in_channels=3), inputs, 3)
    assert nothing.shape == (2, 0, 8, 8)
    assert torch.equal(paired_input(nothing, images), images)
    grey = torch.zeros(2, 1, 8, 8)
    assert condition_of(tiny_discriminator(in_channels=4), grey, 3) is grey
    with pytest.raises(ValueError, match=r"takes 5 channels; .* need 3 \(the image alone\) or 6"):
        condition_of(tiny_discriminator(in_channels=5), inputs, 3)


def test_no_output_is_held_against_the_target_in_its_row(task: Task) -> None:
    order = torch.randperm(12, generator=random())
    other = PairedImages(task.val.inputs, task.val.targets[order], task.val.names)
    made = tiny_generator(5)
    found = []
    for pairs in (task.val, other):
        yardstick = Yardstick(*task.networks.values(), pairs, fake_extractor())
        gaps, _ = yardstick.generator_gaps(run_batched(made, yardstick.inputs))
        found.append(gaps)
    assert found[0] == pytest.approx(found[1])
    assert found[0]["real_gap"] > 0


def test_the_dense_pair_has_no_gaps_and_a_small_plan_has(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda device: fake_extractor())
    monkeypatch.setattr(gan.tasks, "bfloat16_pays", lambda device: False)
    scorer = task.scorer("macs", "dense", statistics_images=12)
    dense, small = scorer.score(DENSE), scorer.score(SMALL)
    for name, gap in dense.gaps.items():
        assert gap == pytest.approx(0, abs=1e-4), name
    assert all(small.gaps[name] > 0.01 for name in ("mmd_gap", "l1_gap", "balance_gap"))


def test_examples_and_statistics_show_the_discriminator_images_alone(task: Task) -> None:
    assert task.example("generator").shape == task.example("discriminator").shape == (1, 3, 8, 8)
    shown = task.statistics_inputs(12)["discriminator"]
    inputs, targets = task.train.tensors()
    assert torch.equal(shown[:6], targets[::2])
    torch.testing.assert_close(shown[6:], run_batched(task.networks["generator"], inputs[::2]))


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_the_warm_up_teaches_a_discriminator_of_images_alone(task: Task, adversarial: float) -> None:
    start = task.ordered()
    options = ElasticOptions(
        steps=30, batch_size=8, learning_rate=5e-3, shift=1, adversarial=adversarial, seed=1
    )
    smallest = (4, 4, 4, 4, 4), (4, 4)
    trained = train_elastic(
        (task.networks["generator"], task.networks["discriminator"]),
        (start["generator"], start["discriminator"]),
        smallest,
        (4, 2),
        task.train,
        options,
    )
    shown = task.statistics_inputs(12)

    def distance(place: int, agent: str, elastic: object) -> float:
        network = recompute_statistics(elastic.network(smallest[place]), shown[agent])  # type: ignore[attr-defined]
        wanted = run_batched(task.networks[agent], shown[agent])
        return float((run_batched(network, shown[agent]) - wanted).abs().mean())

    for place, agent in enumerate(("generator", "discriminator")):
        assert distance(place, agent, trained[place]) < distance(place, agent, start[agent])


def test_pairs_are_finetuned_by_the_trainer_of_their_task(task: Task) -> None:
    pair = task.networks["generator"], task.networks["discriminator"]
    before = state_hash(task.back)
    options = replace(CYCLE_FINETUNING, epochs=1, shift=1)
    trainer = task.finetuner(*pair, Lessons(pair[0]), options)
    assert isinstance(trainer, OneWayTrainer)
    generator, discriminator = trainer.pair(trainer.fit(task.train))
    assert state_hash(generator) != state_hash(pair[0])
    assert state_hash(discriminator) != state_hash(pair[1])
    assert state_hash(task.back) == before
    task.check_ingredients(Ingredients())
    for given in (Ingredients(schedule="cosine"), Ingredients(perceptual=100.0)):
        with pytest.raises(UserError, match="need pairs; task 'tiny' has none"):
            task.finetuner(*pair, pair[0], options, given)
    paired = replace(task, back=None).finetuner(tiny_generator(), tiny_discriminator(), pair[0], FINETUNING)
    assert isinstance(paired, PairedTrainer)


def test_the_row_of_figures_counts_the_discriminator_with_what_it_sees(task: Task) -> None:
    judge = Judge.build(
        task.networks["generator"], task.networks["discriminator"], task.test, fake_extractor()
    )
    row = judge.row(task.networks["generator"], task.networks["discriminator"])
    assert set(row) == set(COLUMNS)
    macs = 4 * 4 * 8 * 3 * 16 + 3 * 3 * 12 * 8 * 16 + 2 * 2 * 12 * 16  # places × out × in × kernel
    assert row["discriminator_macs"] == macs


def test_without_counterparts_nothing_is_held_against_them(task: Task) -> None:
    pair = task.networks["generator"], task.networks["discriminator"]
    assert task.test.partners
    assert not any(images.partners for images in (task.train, task.val, task.val.take(3), task.val.swapped()))
    row = Judge.build(*pair, task.val, fake_extractor()).row(*pair)
    assert set(COLUMNS) - set(row) == {"l1", "psnr"}
    assert row["n_images"] == 24


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both ways of the unpaired task, narrow and with random weights."""
    folder = tmp_path / "noto2twemoji"
    folder.mkdir()
    recipe = UNPAIRED_TASKS["noto2twemoji"]
    for seed, way in enumerate("AB"):
        for kind in ("generator", "discriminator"):
            architecture = replace(getattr(recipe, kind), base_width=4)
            network = initialise(architecture.build(), random(seed))
            save_network(folder / f"{kind}_{way}.safetensors", network, architecture, {})
    monkeypatch.setattr(gan.tasks, "ASSETS", tmp_path)
    return tmp_path


def test_both_ways_of_one_translator_are_tasks(assets: Path) -> None:
    there, back = (load_task(name) for name in ("noto2twemoji", "twemoji2noto"))
    for task, other in ((there, back), (back, there)):
        assert state_hash(task.back) == state_hash(other.networks["generator"])
        assert not any(p.requires_grad for p in task.back.parameters())
        assert task.adversarial == "lsgan"
        assert task.networks["discriminator"](task.example("discriminator")).shape == (1, 1, 14, 14)
    truth = embedded_pairs("noto2twemoji", "test")
    assert torch.equal(there.test.inputs, truth.inputs)
    assert torch.equal(there.test.targets, truth.targets)
    assert torch.equal(back.test.inputs, truth.targets)
    assert torch.equal(back.test.targets, truth.inputs)


def test_finetuning_goes_on_with_the_losses_of_pretraining(assets: Path) -> None:
    task = load_task("noto2twemoji")
    assert not task.cycle_weights
    assert finetuning_of(task, 1, 0).cycle == CYCLE_FINETUNING.cycle
    training = asdict(CycleOptions(cycle=2.0, smoothness=3.0, adversarial="hinge", learning_rate=9.0))
    file = task.weight_files["generator"]
    network, architecture, _ = load_network(file)
    save_network(file, network, architecture, {"training": training})
    task = load_task("noto2twemoji")
    options = finetuning_of(task, 1, 0)
    assert (options.cycle, options.smoothness, options.adversarial) == (2.0, 3.0, "hinge")
    assert options.learning_rate == CYCLE_FINETUNING.learning_rate


@pytest.mark.parametrize("name", ["noto2twemoji", "twemoji2noto"])
def test_images_to_train_and_choose_on_do_not_stand_beside_their_counterparts(
    assets: Path, name: str
) -> None:
    task = load_task(name)
    for split in ("train", "val"):
        truth = embedded_pairs("noto2twemoji", split)
        truth = truth if name == "noto2twemoji" else truth.swapped()
        images = getattr(task, split)
        assert sorted(images.names) == sorted(truth.names)
        rows = [truth.names.index(one) for one in images.names]
        assert torch.equal(images.inputs, truth.inputs[rows])
        assert not bool((images.targets == truth.targets[rows]).flatten(1).all(1).any())


def test_unknown_tasks_name_the_unpaired_ones_too() -> None:
    with pytest.raises(UserError, match="did you mean 'twemoji2noto'"):
        load_task("twemoji2notto")
    assert not set(TASKS) & set(UNPAIRED_TASKS)


def test_missing_networks_are_named_with_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gan.tasks, "ASSETS", tmp_path)
    for name in ("noto2twemoji", "twemoji2noto"):
        with pytest.raises(UserError, match=r"pretrain_gan\.py --task noto2twemoji --output /"):
            load_task(name)


def test_missing_elastic_weights_are_named_with_the_command_that_makes_them(assets: Path) -> None:
    task = load_task("twemoji2noto")
    with pytest.raises(UserError, match=r"train_elastic\.py --task twemoji2noto --output .*/elastic_B\.safe"):
        task.shipped_elastic()


def test_a_pair_is_asked_of_four_networks() -> None:
    with pytest.raises(UserError, match="takes one pair: name a direction, noto2twemoji or twemoji2noto"):
        load_task("noto_and_twemoji")


@pytest.mark.parametrize("name", ["noto2twemoji", "twemoji2noto"])
def test_the_shipped_translators_come_nearer_to_the_true_counterparts(name: str) -> None:
    """On drawings that no training has seen, nearer than the input is."""
    task = load_task(name)
    truth = embedded_pairs("noto2twemoji", "val").take(64)
    inputs, targets = (truth if name == "noto2twemoji" else truth.swapped()).tensors()
    made = run_batched(task.networks["generator"], inputs)
    assert float((made - targets).abs().mean()) < 0.99 * float((inputs - targets).abs().mean())
    assert task.cycle_weights["smoothness"] > 0  # finetuning goes on with the losses of its training


@pytest.mark.parametrize("name", ["noto2twemoji", "twemoji2noto"])
def test_the_shipped_elastic_weights_fit_the_shipped_translators(name: str) -> None:
    """Cut to a third of every width they make about the dense pictures; raw dense weights make noise."""
    task = load_task(name)
    inputs = task.val.take(32).tensors()[0]
    dense = run_batched(task.networks["generator"], inputs)
    distances = {}
    for start in ("elastic", "dense"):
        weights = task.elastic_weights(start)["generator"]
        widths = [width // 3 for width in weights.slicer.dense_widths]  # multiples of 4, as in plans
        made = run_batched(weights.network(widths), inputs)
        distances[start] = float((made - dense).abs().mean())
    assert distances["elastic"] < 0.1
    assert distances["elastic"] < 0.2 * distances["dense"]
