from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from gan.checkpoints import load_network, save_network, state_hash
from gan.cyclegan import CYCLE_FINETUNING
from gan.data import PairedImages, to_float
from gan.errors import UserError
from gan.folders import load_pairs, load_unpaired
from gan.networks import Architecture, with_image_statistics
from gan.official import OfficialNetwork, load_official, save_official
from gan.own_task import OwnOptions, choose_statistics, make_own_task, usual_multiple
from gan.task_folder import find_task_folder, load_own_task, save_own_task
from gan.tasks import AGENTS, load_task, own_task
from tests.gan import official_layout as layout
from tests.gan.conftest import random
from tests.gan.test_folders import picture, save, side_by_side


@pytest.fixture
def options(tmp_path: Path) -> OwnOptions:
    """A U-Net-16 on 16 × 16 pictures: made in milliseconds."""
    for split, count in (("train", 12), ("val", 9), ("test", 9)):
        for n in range(count):
            pair = side_by_side(picture(n, (16, 16)), picture(50 + n, (16, 16)))
            save(pair, tmp_path / "shapes" / split / f"{n}.png")
    torch.save(layout.unet(4, 4), tmp_path / "latest_net_G.pth")
    torch.save(layout.patch(1, 4), tmp_path / "latest_net_D.pth")
    return OwnOptions(tmp_path / "latest_net_G.pth", tmp_path / "latest_net_D.pth", tmp_path / "shapes")


def test_a_task_is_made_from_three_paths(options):
    own = make_own_task(options)
    assert own.name == "shapes"
    assert own.architectures["generator"].name == "unet_16"
    assert own.reading.preprocess.crop_size == own.reading.preprocess.load_size == 16
    assert [len(images) for images in own.images[:3]] == [12, 9, 9]
    assert own.multiples == {"generator": 1, "discriminator": 1}
    text = "\n".join(own.notes)
    assert "generator: unet_16, ngf 4, 3 → 3 channels, batch norm" in text
    assert "discriminator: n_layers, ndf 4, 6 → 1 channels, batch norm" in text
    assert "12 train, 9 val, 9 test pairs of 16 × 16 pixels" in text


def test_a_folder_says_all(options, tmp_path):
    own = make_own_task(replace(options, direction="BtoA", norm_statistics="image", gan_mode="lsgan"))
    folder = save_own_task(tmp_path / "task", own)
    for path in (options.generator, options.discriminator):
        path.unlink()  # the next training overwrites them
    load_pairs.cache_clear()
    back = load_own_task(folder)
    assert (back.name, back.data, back.reading, back.multiples, back.adversarial, back.notes) == (
        own.name,
        own.data,
        own.reading,
        own.multiples,
        "lsgan",
        own.notes,
    )
    assert back.architectures == own.architectures
    assert back.architectures["generator"].statistics == "image"
    assert back.sources == own.sources
    for agent in AGENTS:
        assert state_hash(back.networks[agent]) == state_hash(own.networks[agent])
    inputs, _ = back.images.val.tensors()
    with torch.no_grad():
        made = [own.networks["generator"](inputs), back.networks["generator"](inputs)]
    assert torch.equal(*made)


def test_programs_load_it_by_its_path(options, tmp_path):
    own = make_own_task(options)
    save_own_task(tmp_path / "run" / "task", own)
    assert find_task_folder(str(tmp_path / "run")) == tmp_path / "run" / "task"
    assert find_task_folder(str(tmp_path)) is None
    task = load_task(str(tmp_path / "run"))
    assert task.name == "shapes"
    assert load_task(task.reference).name == "shapes"
    assert task.reference == str(tmp_path / "run" / "task")
    assert [len(task.groups[agent]) for agent in AGENTS] == [7, 2]
    assert task.elastic_path is None
    with pytest.raises(UserError, match="comes without elastic weights"):
        task.shipped_elastic()
    with pytest.raises(UserError, match=r"is no task folder \(it has no task\.json\)"):
        load_task(str(tmp_path))


def test_a_name_means_what_lies_there_now(options, tmp_path, monkeypatch):
    for place, name in (("here", "first"), ("there", "second")):
        save_own_task(tmp_path / place / "task", replace(make_own_task(options), name=name))
    monkeypatch.chdir(tmp_path / "here")
    here = load_task("task")
    assert here.name == "first"
    assert load_task("task") is here
    monkeypatch.chdir(tmp_path / "there")
    assert load_task("task").name == "second"  # remembered by its place, not by its words
    (tmp_path / "there" / "task" / "elastic.safetensors").touch()
    assert load_task("task").elastic_path == tmp_path / "there" / "task" / "elastic.safetensors"
    monkeypatch.chdir(tmp_path)
    assert all(file.is_file() for file in here.weight_files.values())


def test_grey_inputs_reach_every_place(options, tmp_path):
    torch.save(layout.unet(4, 4, came=1), options.generator)
    torch.save(layout.patch(1, 4, came=4), options.discriminator)
    task = own_task(make_own_task(options))
    assert task.example("generator").shape == (1, 1, 16, 16)
    assert task.example("discriminator").shape == (1, 4, 16, 16)
    shown = task.statistics_inputs(8)
    assert shown["generator"].shape == (8, 1, 16, 16)
    assert shown["discriminator"].shape == (8, 4, 16, 16)


def biased(statistics: str) -> tuple[OfficialNetwork, PairedImages]:
    """A network, and targets that it makes with the given statistics alone."""
    state = layout.unet(4, 2)
    network = Architecture("unet_16", base_width=2).build().eval()
    network.load_state_dict(state)
    inputs = torch.randint(0, 256, (6, 3, 16, 16), generator=random(), dtype=torch.uint8)
    teacher = network if statistics == "running" else with_image_statistics(network)
    with torch.no_grad():
        targets = ((teacher(to_float(inputs)) + 1) * 127.5).round().to(torch.uint8)
    pairs = PairedImages(inputs, targets, tuple("abcdef"))
    return OfficialNetwork(network, Architecture("unet_16", base_width=2), ()), pairs


@pytest.mark.parametrize("statistics", ["running", "image"])
def test_the_statistics_are_those_that_val_prefers(statistics):
    found, why = choose_statistics(*biased(statistics), "auto")
    assert found == statistics
    assert f"norm statistics: {statistics} (L1 on 6 val images: running 0." in why


def test_asked_for_statistics_are_taken_and_other_norms_have_none():
    network, pairs = biased("running")
    assert choose_statistics(network, pairs, "image")[0] == "image"
    other = network._replace(architecture=replace(network.architecture, norm="instance"))
    assert choose_statistics(other, pairs, "image") == ("running", "")


def test_both_networks_get_the_statistics(options):
    own = make_own_task(replace(options, norm_statistics="image"))
    for agent in AGENTS:
        assert own.architectures[agent].statistics == "image"
        assert not any(isinstance(module, nn.BatchNorm2d) for module in own.networks[agent].modules())


def test_dropout_of_a_unet_is_asked_for(options, tmp_path):
    torch.save(layout.unet(6, 2), options.generator)
    for n in range(9):
        save(
            side_by_side(picture(n, (64, 64)), picture(n, (64, 64))), tmp_path / "big" / "train" / f"{n}.png"
        )
    for split in ("val", "test"):
        for n in range(9):
            save(
                side_by_side(picture(n, (64, 64)), picture(n, (64, 64))),
                tmp_path / "big" / split / f"{n}.png",
            )
    own = make_own_task(replace(options, data=tmp_path / "big", dropout=True))
    assert own.architectures["generator"].dropout
    assert any(isinstance(module, nn.Dropout) for module in own.networks["generator"].modules())
    assert "dropout leaves no trace" not in "\n".join(own.notes)


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [
        (Architecture("unet_256"), 8),
        (Architecture("resnet_9blocks", base_width=96), 8),
        (Architecture("unet_64", base_width=32), 4),
        (Architecture("unet_64", base_width=8), 1),
        (Architecture("basic", 6, 1), 4),
        (Architecture("basic", 6, 1, base_width=32), 2),
    ],
)
def test_usual_multiples(architecture, wanted):
    assert usual_multiple(architecture) == wanted


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"generator": None}, "--generator is missing"),
        ({"generator": None, "data": None}, "--generator and --data are missing"),
        ({"crop_size": 24}, r"unet_16 takes images whose sides are multiples of 16 .* would be 24 × 24"),
        ({"crop_size": -1}, "--crop-size is -1"),
        ({"norm_statistics": "batch"}, "unknown norm statistics 'batch'; known are auto, image, running"),
        ({"gan_mode": "wgangp"}, "unknown GAN mode 'wgangp'"),
        ({"data": Path("nowhere")}, "nowhere does not exist; name one with --data"),
        ({"generator": Path("nowhere.pth")}, r"nowhere\.pth does not exist"),
    ],
)
def test_options_that_make_no_task(options, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_own_task(replace(options, **changes))


def test_a_discriminator_too_deep_for_the_images(options):
    torch.save(layout.patch(4, 2), options.discriminator)
    with pytest.raises(UserError, match=r"16 × 16 pixels are too small for the discriminator 'n_layers'"):
        make_own_task(options)


def test_other_images_than_those_of_the_task_are_refused(options, tmp_path):
    folder = save_own_task(tmp_path / "task", make_own_task(options))
    Image.new("RGB", (32, 16)).save(options.data / "val" / "0.png")
    load_pairs.cache_clear()
    with pytest.raises(UserError, match=r"are not those that .* was made from"):
        load_own_task(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"reading": None},
        {"multiples": {}},
        {"multiples": {"generator": 0, "discriminator": 1}},
        {"adversarial": "wgan"},
        {"name": None, "data": 3},
    ],
)
def test_a_damaged_task_is_a_sentence(options, tmp_path, change):
    folder = save_own_task(tmp_path / "task", make_own_task(options))
    about = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match=r"task\.json is damaged \(.*\); make the task again"):
        load_own_task(folder)


def test_the_dense_pair_goes_back_to_where_it_came_from(options, tmp_path):
    """In, and out again as a checkpoint of the repository: the same tensors."""
    own = make_own_task(replace(options, norm_statistics="image"))
    back = load_official(save_official(tmp_path / "back.pth", own.networks["generator"]))
    assert state_hash(back.network) == state_hash(load_official(options.generator).network)


@pytest.fixture
def cycle(tmp_path: Path) -> OwnOptions:
    """One direction of a CycleGAN of U-Net-16s, and two domains of other names and sizes."""
    for split, first, second in (("train", 12, 15), ("test", 9, 11)):
        for n in range(first):
            save(picture(n, (16, 16)), tmp_path / "beasts" / f"{split}A" / f"horse {n}.png")
        for n in range(second):
            save(picture(50 + n, (16, 16)), tmp_path / "beasts" / f"{split}B" / f"zebra {n}.png")
    for name, state in (("G_A", layout.unet(4, 4)), ("G_B", layout.unet(4, 6))):
        torch.save(state, tmp_path / f"latest_net_{name}.pth")
    torch.save(layout.patch(1, 4, came=3), tmp_path / "latest_net_D_A.pth")
    return OwnOptions(
        tmp_path / "latest_net_G_A.pth",
        tmp_path / "latest_net_D_A.pth",
        tmp_path / "beasts",
        tmp_path / "latest_net_G_B.pth",
        val_images=4,
    )


@pytest.fixture
def images_for_all(monkeypatch):
    """Splits may be as small as the pictures at hand."""
    monkeypatch.setattr("gan.folders.FEWEST", 4)
    monkeypatch.setattr("gan.folders.LEAST_SHARE", 4)


def test_a_direction_of_a_cyclegan_needs_no_partners(cycle, images_for_all):
    own = make_own_task(cycle)
    assert own.adversarial == "lsgan"
    assert own.reading.channels == (3, 3)
    train, val, test, notes = own.images
    assert not any(images.partners for images in (train, val, test))
    # 4 training images of either domain are for choices; to be measured on, no image is there twice
    assert [len(images) for images in (train, val, test)] == [11, 4, 9]
    assert len({tuple(image.flatten().tolist()) for image in test.targets}) == 9
    assert "horse" in test.names[0]
    assert "zebra" in test.names[0]
    assert any(note.startswith("test has 9 and 11 images: 9 of either") for note in notes)
    text = "\n".join(own.notes)
    assert "way back: unet_16, ngf 6" in text
    assert "norm statistics: image, as the repository's test.py runs it" in text


def test_a_folder_keeps_the_way_back(cycle, images_for_all, tmp_path):
    own = make_own_task(cycle)
    folder = save_own_task(tmp_path / "task", own)
    for path in (cycle.generator, cycle.discriminator, cycle.back):
        path.unlink()
    back = load_own_task(folder)
    assert state_hash(back.back[0]) == state_hash(own.back[0])
    assert back.back[1] == own.back[1]
    assert torch.equal(back.images.test.targets, own.images.test.targets)
    task = own_task(back, folder=folder)
    assert not any(parameter.requires_grad for parameter in task.back.parameters())
    assert task.example("discriminator").shape == (1, 3, 16, 16)
    assert not task.test.partners
    pair = task.networks["generator"], task.networks["discriminator"]
    trainer = task.finetuner(*pair, pair[0], replace(CYCLE_FINETUNING, epochs=1))
    told = []
    trainer.fit(task.train, lambda progress: told.append(progress.losses))
    assert {"cycle", "cycle back", "identity", "adversarial", "distillation"} <= set(told[0])
    assert len(trainer.cycle.learners["A"].pool.images) == 8  # 2 steps of 4


def test_another_way_back_is_another_task(cycle, images_for_all, tmp_path):
    folder = save_own_task(tmp_path / "task", make_own_task(cycle))
    before = load_task(str(folder))
    assert load_task(str(folder)) is before
    network, architecture, _ = load_network(folder / "back.safetensors")
    with torch.no_grad():
        next(network.parameters()).add_(1)
    save_network(folder / "back.safetensors", network, architecture, {})
    assert state_hash(load_task(str(folder)).back) != state_hash(before.back)


def test_another_image_of_the_target_domain_is_noticed(cycle, images_for_all, tmp_path):
    folder = save_own_task(tmp_path / "task", make_own_task(cycle))
    (cycle.data / "trainB" / "zebra 3.png").rename(cycle.data / "trainB" / "zebra 99.png")
    load_unpaired.cache_clear()
    with pytest.raises(UserError, match=r"are not those that .* was made from"):
        load_own_task(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"back": None}, r"unpaired work needs the generator of the way back: --back"),
        ({"back": Path("nowhere.pth")}, r"nowhere\.pth does not exist"),
        ({"back": "discriminator"}, "--back holds the discriminator 'n_layers'"),
        ({"back": "generator"}, "--generator and --back hold the same weights; name those of the other"),
    ],
)
def test_ways_back_that_are_none(cycle, images_for_all, changes, sentence):
    changes = {
        name: getattr(cycle, value) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(UserError, match=sentence):
        make_own_task(replace(cycle, **changes))


def test_a_way_back_of_other_channels_or_a_discriminator_of_pairs(cycle, images_for_all, tmp_path):
    torch.save(layout.unet(4, 4, came=1), cycle.back)
    with pytest.raises(UserError, match=r"--back makes 3 channels of 1; .* must make 3 of 3"):
        make_own_task(cycle)
    torch.save(layout.unet(4, 4), cycle.back)
    torch.save(layout.patch(1, 4), cycle.discriminator)
    with pytest.raises(UserError, match=r"trained on pairs \(Pix2Pix\); leave out --back"):
        make_own_task(cycle)


def test_paired_work_on_images_without_partners_is_told_of_the_way_back(cycle, options):
    with pytest.raises(UserError, match=r"under one file name, unpaired work \(CycleGAN\) .*: --back"):
        make_own_task(replace(options, data=cycle.data))
    for split in ("train", "test"):
        for n in range(9):
            save(picture(n, (16, 16)), cycle.data / f"{split}B" / f"horse {n}.png")
    with pytest.raises(UserError, match=r"no partner.* skip; images without partners need --back"):
        make_own_task(replace(options, data=cycle.data))
