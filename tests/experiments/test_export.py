from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gan
from experiments import cli, export
from experiments.build import save_pair
from experiments.runs import RunFolder
from gan.checkpoints import load_network, tensors_hash
from gan.evaluation import Judge
from gan.export import replay
from gan.plans import Plan
from gan.runtime import OnnxNetwork, metadata_of
from gan.tasks import load_task

PLAN = Plan.of(
    {"generator": (8, 12, 16, 16, 16, 16, 16, 16, 12, 8, 8), "discriminator": (8, 12, 16, 16)}, "l1"
)


def call(*arguments: str) -> None:
    cli.run(export.main, export.Options, "", (), list(arguments))


@pytest.fixture(scope="module")
def pairs() -> tuple[tuple[torch.nn.Module, ...], tuple[torch.nn.Module, ...]]:
    """The start of a finetuning and what might have come out of it."""
    task = load_task()
    start = task.cut(task.shipped_elastic(), PLAN)
    result = task.cut(task.shipped_elastic(), PLAN)
    with torch.no_grad():
        for network in result:
            for parameter in network.parameters():
                parameter.mul_(1.01)
    return start, result


@pytest.fixture
def run(make_run: Callable[..., RunFolder], pairs: tuple[tuple[torch.nn.Module, ...], ...]) -> RunFolder:
    """A run folder with a result."""
    folder = make_run(episodes=1)
    for stage, pair in zip(("raw", ""), pairs, strict=True):
        save_pair(folder, stage, stage or "pruned", load_task(), PLAN, pair, half=True)  # type: ignore[arg-type]
    return folder


def test_a_run_is_exported_whole(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(str(run.path), "--quick", "--half")
    folder = run.path / "export"
    names = {"generator.safetensors", "generator.json", "generator_start.safetensors", "generator.onnx"}
    names |= {"generator_fp16.onnx", "latest_net_G.pth", "pruned_generator.py", "export.json"}
    assert {path.name for path in folder.iterdir()} == names
    inputs = load_task().val.take(5).tensors()[0]
    network = gan.load(run.path)
    with torch.no_grad():
        outputs = network(inputs)
        assert torch.equal(gan.load(folder)(inputs), outputs)
        written = OnnxNetwork(folder / "generator.onnx")
        torch.testing.assert_close(written(inputs), outputs, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            OnnxNetwork(folder / "generator_fp16.onnx")(inputs), outputs, atol=0.05, rtol=0
        )
    state = torch.load(folder / "latest_net_G.pth", weights_only=True)
    assert tensors_hash(state) == tensors_hash(network.state_dict())
    about = json.loads((folder / "export.json").read_text())
    assert about["parity"]["onnx"]["max_difference"] <= 1e-4
    assert about["files"].keys() == names - {"export.json"}
    said = metadata_of(folder / "generator.onnx")
    recipe = json.loads((folder / "generator.json").read_text())
    assert (said["task"], said["weights_hash"]) == ("edges2emoji", recipe["weights_hash"])
    elastic = load_task().elastic_path
    assert elastic is not None
    again, start = (
        replay(folder / "generator.safetensors", elastic),
        load_network(run.weights("generator", "raw")),
    )
    assert tensors_hash(again.state_dict()) == tensors_hash(start[0].state_dict())
    printed = capsys.readouterr().out
    assert "differs from the network by at most" in printed
    assert "start of the finetuning from elastic.safetensors" in printed


def test_a_discriminator_and_a_bare_file(run: RunFolder, tmp_path: Path) -> None:
    call(str(run.path), "--quick", "--network", "discriminator", "--output", str(tmp_path / "d"))
    assert not list((tmp_path / "d").glob("*.p*"))  # neither loader nor .pth: those are for generators
    assert (tmp_path / "d" / "discriminator.onnx").is_file()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    call(str(run.weights("generator")), "--images", str(tmp_path / "photos"), "--output", str(tmp_path / "g"))
    recipe = json.loads((tmp_path / "g" / "generator.json").read_text())
    assert "start" not in recipe
    assert json.loads((tmp_path / "g" / "export.json").read_text())["parity"]["onnx"]["images"] == 1


def test_every_file_has_a_row_of_figures(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX network has the MACs of the network that it was written from."""
    rows = iter(
        [{"macs": 9.0, "params": 9.0}, {"macs": 4.0, "params": 3.0}, {"macs": 0.0, "params": 0.0, "l1": 0.5}]
    )

    class FakeJudge:
        def row(self, *_: object) -> dict[str, float]:
            return next(rows)

    monkeypatch.setattr(Judge, "build", lambda *_: FakeJudge())
    subject = export.read_subject(run.path, "generator")
    path = run.path / "generator.onnx"
    export.export_onnx(path, subject.network, load_task().val.take(2).tensors()[0])
    found, images = export.quality(subject, load_task().networks["discriminator"], {"onnx": path})
    assert found["onnx"] == {"macs": 4.0, "params": 3.0, "l1": 0.5}
    assert list(found) == ["dense", "pruned", "onnx"]
    assert images == len(load_task().test)


def test_a_network_that_differs_leaves_nothing_behind(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        call(str(run.path), "--quick", "--tolerance", "1e-12")
    assert stopped.value.code == 2
    assert "was not written" in capsys.readouterr().err
    assert sorted(run.path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "does not exist"),
        (["RUN", "--network", "critic"], "has no critic.safetensors"),
        (["RUN", "--output", "RUN"], "exists; name a new folder"),
        (["RUN", "--output", "nowhere/out"], "make it first"),
        (["RUN", "--tolerance", "0"], "--tolerance is 0.0"),
        (["FILE"], "name a folder of them with --images"),
        (["FILE", "--source", "OTHER"], "--source is for runs"),
        (["RUN", "--source", "nowhere"], "--source nowhere does not exist"),
        (["RUN", "--quick", "--source", "FILE"], "holds no elastic weights of this generator"),
        (["RUN", "--quick", "--source", "OTHER"], "is not what the run's generator was cut out of"),
    ],
)
def test_bad_input_is_one_sentence(
    run: RunFolder, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    other = load_task("edges2emoji_resnet").elastic_path
    places = {"RUN": str(run.path), "FILE": str(run.weights("generator")), "OTHER": str(other)}
    before = sorted(run.path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        call(*[places.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert sorted(run.path.iterdir()) == before
