"""Four checkpoints of a user's own CycleGAN, one task of both directions; and its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gan.checkpoints import state_hash
from gan.errors import UserError
from gan.folders import load_unpaired
from gan.official import save_official
from gan.own_task import OwnOptions
from gan.own_two_way import OwnTwoWay, make_own, make_own_two_way
from gan.task_folder import elastic_places, save_own
from gan.tasks import AGENTS, load_task
from gan.two_way import FOUR_AGENTS, TwoWayTask, load_any_task, load_two_way, own_any_task
from tests.gan import official_layout as layout
from tests.gan.conftest import randomise
from tests.gan.foreign import SeparableResnet
from tests.gan.test_folders import picture, save

FOREIGN = "tests.gan.foreign:SeparableResnet"


def write_four(folder: Path, first: int = 3, second: int = 3) -> OwnOptions:
    """Checkpoints for domains of so many channels, and options that name them."""
    states = {
        "G_A": layout.unet(3, 4, came=first, made=second),
        "G_B": layout.unet(3, 6, came=second, made=first),
        "D_A": layout.patch(1, 4, came=second),
        "D_B": layout.patch(1, 6, came=first),
    }
    for name, state in states.items():
        torch.save(state, folder / f"latest_net_{name}.pth")
    names = (folder / f"latest_net_{name}.pth" for name in ("G_A", "D_A", "G_B", "D_B"))
    generator, discriminator, back, back_discriminator = names
    return OwnOptions(
        generator, discriminator, folder / "beasts", back, back_discriminator, val_images=4, test_images=5
    )


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OwnOptions:
    """U-Net-8s on 8 × 8 pictures of two domains of other names and sizes."""
    monkeypatch.setattr("gan.folders.FEWEST", 4)
    monkeypatch.setattr("gan.folders.LEAST_SHARE", 4)
    for split, counts in (("train", (12, 15)), ("test", (6, 7))):
        for side, count, start in zip("AB", counts, (0, 50), strict=True):
            for n in range(count):
                save(picture(start + n, (8, 8)), tmp_path / "beasts" / f"{split}{side}" / f"{side}{n}.png")
    return write_four(tmp_path)


def hashes(task: TwoWayTask) -> dict[str, str]:
    return {agent: state_hash(network) for agent, network in task.networks.items()}


def test_four_checkpoints_are_two_directions(four: OwnOptions) -> None:
    own = make_own(four)
    assert isinstance(own, OwnTwoWay)
    assert own.name == "beasts"
    assert [one.name for one in own.ways.values()] == ["beasts_A", "beasts_B"]
    there, back = own.ways["A"], own.ways["B"]
    assert [one.architectures["generator"].base_width for one in (there, back)] == [4, 6]
    assert [one.architectures["discriminator"].base_width for one in (there, back)] == [4, 6]
    for one, other in ((there, back), (back, there)):
        assert one.back is not None
        assert one.back[0] is other.networks["generator"]
        assert one.adversarial == "lsgan"
    for name in ("train", "val", "test"):
        images, swapped = getattr(there.images, name), getattr(back.images, name)
        assert not images.partners
        assert torch.equal(images.inputs, swapped.targets)
        assert torch.equal(images.targets, swapped.inputs)
    # gigabytes at full size: rows of the larger domain are the images themselves
    assert there.images.train.targets.data_ptr() == back.images.train.inputs.data_ptr()
    text = "\n".join(own.notes)
    for line in ("generator_A: unet_8, ngf 4", "generator_B: unet_8, ngf 6", "discriminator_B: n_layers"):
        assert line in text
    assert "way back" not in text
    assert len(set(own.notes)) == len(own.notes)
    assert sum("images of either domain" in note for note in own.notes) == 1
    assert tuple(own_any_task(own).networks) == FOUR_AGENTS


def test_directions_are_named_by_what_they_translate(four: OwnOptions) -> None:
    """The checkpoints of the way back first: the same task."""
    other = replace(
        four,
        generator=four.back,
        discriminator=four.back_discriminator,
        back=four.generator,
        back_discriminator=four.discriminator,
        direction="BtoA",
    )
    tasks = [own_any_task(make_own(options)) for options in (four, other)]
    assert isinstance(tasks[0], TwoWayTask)
    assert isinstance(tasks[1], TwoWayTask)
    assert hashes(tasks[0]) == hashes(tasks[1])
    assert torch.equal(tasks[0].ways["B"].val.inputs, tasks[1].ways["B"].val.inputs)


def test_a_folder_keeps_all_four(four: OwnOptions, tmp_path: Path) -> None:
    own = make_own(replace(four, generator_multiple=2))
    made = own_any_task(own)
    save_own(tmp_path / "run" / "task", own)
    for path in (four.generator, four.discriminator, four.back, four.back_discriminator):
        assert path is not None
        path.unlink()
    load_unpaired.cache_clear()
    task = load_any_task(str(tmp_path / "run"))
    assert isinstance(task, TwoWayTask)
    assert isinstance(made, TwoWayTask)
    assert task.name == "beasts"
    assert task.reference == str(tmp_path / "run" / "task")
    assert hashes(task) == hashes(made)
    for way, one in task.ways.items():
        before = made.ways[way]
        assert one.architectures == before.architectures
        assert one.multiples == {"generator": 2, "discriminator": 1}
        assert torch.equal(one.test.inputs, before.test.inputs)
        assert one.back is not None
        assert before.back is not None
        assert state_hash(one.back) == state_hash(before.back)
        assert not any(
            p.requires_grad for network in (one.back, *one.networks.values()) for p in network.parameters()
        )
    assert not list(tmp_path.rglob("back.safetensors"))  # each way back lies in the other's folder


def test_one_of_its_directions_is_a_task_of_a_pair(four: OwnOptions, tmp_path: Path) -> None:
    folder = save_own(tmp_path / "task", make_own(four))
    with pytest.raises(
        UserError, match=r"has four networks and this takes one pair: .*/task/A or /.*/task/B"
    ):
        load_task(str(folder))
    task = load_task(str(folder / "B"))
    assert task.name == "beasts_B"
    assert task.architectures["generator"].base_width == 6
    with pytest.raises(
        UserError, match=r"train_elastic\.py --task .*/task/B --output .*/task/B/elastic\.safe"
    ):
        task.shipped_elastic()
    with pytest.raises(UserError, match="unknown task of two directions"):
        load_two_way(str(folder / "B"))


def test_elastic_weights_are_looked_for_where_a_run_keeps_them(four: OwnOptions, tmp_path: Path) -> None:
    folder = save_own(tmp_path / "run" / "task", make_own(four))
    own, of_run = elastic_places(folder / "B")
    assert own == folder / "B" / "elastic.safetensors"
    assert of_run == tmp_path / "run" / "elastic_B.safetensors"
    assert elastic_places(tmp_path / "run" / "C")[1] == tmp_path / "run" / "elastic.safetensors"


def test_another_image_is_noticed(four: OwnOptions, tmp_path: Path) -> None:
    folder = save_own(tmp_path / "task", make_own(four))
    (tmp_path / "beasts" / "testB" / "B3.png").rename(tmp_path / "beasts" / "testB" / "B99.png")
    load_unpaired.cache_clear()
    with pytest.raises(UserError, match=r"are not those that .* was made from"):
        load_any_task(str(folder))


@pytest.mark.parametrize("content", ["no JSON", "[]", json.dumps({"ways": ["A"]})])
def test_a_damaged_folder_is_a_sentence(four: OwnOptions, tmp_path: Path, content: str) -> None:
    folder = save_own(tmp_path / "task", make_own(four))
    (folder / "task.json").write_text(content)
    with pytest.raises(UserError, match=r"task\.json is damaged \(.*\); make the task again"):
        load_any_task(str(folder))


def test_a_folder_without_a_direction_is_a_sentence(four: OwnOptions, tmp_path: Path) -> None:
    folder = save_own(tmp_path / "task", make_own(four))
    (folder / "B" / "generator.safetensors").unlink()
    with pytest.raises(UserError, match=r"B/generator\.safetensors does not exist"):
        load_any_task(str(folder))


def test_a_grey_domain_is_judged_in_grey(four: OwnOptions, tmp_path: Path) -> None:
    options = write_four(tmp_path, first=1)
    task = own_any_task(make_own(options))
    assert task.ways["A"].example("generator").shape == (1, 1, 8, 8)
    assert task.ways["B"].example("discriminator").shape == (1, 1, 8, 8)
    exchanged = replace(
        options, discriminator=options.back_discriminator, back_discriminator=options.discriminator
    )
    with pytest.raises(UserError, match=r"--discriminator sees 1 channels and .* exchange the two discrim"):
        make_own_two_way(exchanged)


def test_code_of_the_users_own_makes_both_generators(four: OwnOptions, tmp_path: Path) -> None:
    for seed, path in enumerate((four.generator, four.back)):
        assert path is not None
        save_official(path, randomise(SeparableResnet(), seed))
    own = make_own(replace(four, generator_factory=FOREIGN, crop_size=8))
    assert isinstance(own, OwnTwoWay)
    assert [one.architectures["generator"].name for one in own.ways.values()] == [FOREIGN] * 2
    assert own.ways["A"].sources["generator"]["source"].endswith("latest_net_G_A.pth")
    task = own_any_task(own)
    assert {agent: len(task.ways["B"].groups[agent]) for agent in AGENTS} == {
        "generator": 7,
        "discriminator": 2,
    }


def test_a_generator_of_another_size_says_so(four: OwnOptions) -> None:
    assert four.back is not None
    torch.save(layout.unet(4, 4), four.back)
    with pytest.raises(UserError, match="unet_16 takes images whose sides are multiples of 16 pixels"):
        make_own(four)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"back": None}, "--back-discriminator asks for both directions of a CycleGAN, and --back is missing"),
    ({"back_discriminator": Path("nowhere.pth")}, r"nowhere\.pth does not exist"),
    (
        {"back": "back_discriminator", "back_discriminator": "back"},
        "--back holds the discriminator 'n_layers' and --back-discriminator holds the generator 'unet_8'; "
        "exchange --back and --back-discriminator",
    ),
    (
        {"generator": "discriminator", "discriminator": "generator"},
        "exchange --generator and --discriminator",
    ),
    (
        {"back_discriminator": "generator"},
        "--back-discriminator holds the generator 'unet_8'; --generator and --back name generators",
    ),
    ({"back": "generator"}, "--generator and --back hold the same weights; name those of the other"),
    (
        {"back_discriminator": "discriminator"},
        "--discriminator and --back-discriminator hold the same weights",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_files_that_are_no_translator_of_both_directions(
    four: OwnOptions, changes: dict[str, Any], sentence: str
) -> None:
    named = {
        name: getattr(four, value) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(UserError, match=sentence):
        make_own(replace(four, **named))


@pytest.mark.parametrize(
    ("option", "channels", "sentence"),
    [
        ("discriminator", 6, r"trained on pairs \(Pix2Pix\); leave out --back"),
        ("back_discriminator", 6, r"--back-discriminator sees 6 .* pairs \(Pix2Pix\); name the .* sees 3"),
        ("back_discriminator", 1, "--back-discriminator sees 1 channels, but the images that --back makes"),
    ],
)
def test_discriminators_that_judge_something_else(
    four: OwnOptions, option: str, channels: int, sentence: str
) -> None:
    torch.save(layout.patch(1, 8, came=channels), getattr(four, option))
    with pytest.raises(UserError, match=sentence):
        make_own(four)


def test_a_way_back_of_other_channels(four: OwnOptions) -> None:
    assert four.back is not None
    torch.save(layout.unet(3, 4, came=1), four.back)
    with pytest.raises(UserError, match="--back makes 3 channels of 1"):
        make_own(four)
