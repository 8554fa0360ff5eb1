from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gan.tasks
from gan.checkpoints import load_tensors, save_tensors, state_hash, tensors_hash
from gan.elastic import ElasticNetwork
from gan.errors import UserError
from gan.evaluations import FAMILIES
from gan.norm_statistics import recompute_statistics
from gan.plans import Plan
from gan.scoring import run_batched
from gan.tasks import AGENTS, TASKS, Task, load_elastic, load_task, save_elastic
from tests.gan.conftest import fake_extractor, tiny_discriminator, tiny_generator

SMALL = {"generator": (4, 8, 8, 4, 4), "discriminator": (4, 6)}


@pytest.fixture
def _no_real_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan.tasks, "load_extractor", lambda device: fake_extractor())


@pytest.mark.parametrize(("name", "groups"), [("edges2emoji", 11), ("edges2emoji_resnet", 11)])
def test_the_shipped_tasks_load(name, groups):
    task = load_task(name)
    assert [len(split) for split in (task.train, task.val, task.test)] == [1084, 160, 256]
    assert task.image_size == 64
    assert {agent: len(groups) for agent, groups in task.groups.items()} == {
        "generator": groups,
        "discriminator": 4,
    }
    recipe = TASKS[name]
    assert task.architectures == {"generator": recipe.generator, "discriminator": recipe.discriminator}
    for agent, network in task.networks.items():
        assert tuple(g.channels for g in task.groups[agent]) == task.architectures[agent].dense_widths
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        assert set(task.multiples) == set(AGENTS)
        made = network(task.example(agent))
        assert made.shape == ((1, 3, 64, 64) if agent == "generator" else (1, 1, 6, 6))
    assert load_task(name) is task


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_pairs_were_trained(name):
    """Nearer to unseen drawings than any one picture is; the discriminator tells real from made."""
    task = load_task(name)
    inputs, targets = task.val.take(32).tensors()
    with torch.no_grad():
        made = task.networks["generator"](inputs)
        real, fake = (
            float(task.networks["discriminator"](torch.cat([inputs, images], 1)).mean())
            for images in (targets, made)
        )
    middle = targets.median(0).values
    assert float((made - targets).abs().mean()) < 0.75 * float((targets - middle).abs().mean())
    assert real > fake


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_elastic_weights_fit_the_shipped_pair(name):
    """Cut to a quarter of every width they still make the dense pictures; raw dense weights make noise."""
    task = load_task(name)
    shipped, raw = task.elastic_weights("elastic"), task.elastic_weights("dense")
    shown, inputs = task.statistics_inputs(32)["generator"], task.val.take(32).tensors()[0]
    dense = run_batched(task.networks["generator"], inputs)

    def distance(elastic: ElasticNetwork) -> float:
        widths = [width // 4 for width in elastic.slicer.dense_widths]
        made = run_batched(recompute_statistics(elastic.network(widths), shown), inputs)
        return float((made - dense).abs().mean())

    assert distance(shipped["generator"]) < 0.25
    assert distance(shipped["generator"]) < 0.6 * distance(raw["generator"])
    for agent, elastic in shipped.items():
        for order, row, group in zip(elastic.orders, elastic.importance, task.groups[agent], strict=True):
            assert sorted(order.tolist()) == list(range(group.channels))
            assert bool((row.diff() <= 0).all())


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(
        UserError, match=r"unknown task 'edges2emojy'; known are .*edges2emoji.*; did you mean"
    ):
        load_task("edges2emojy")
    assert "edges2emoji" in TASKS


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files that a test may break."""
    folder = tmp_path / "edges2emoji"
    folder.mkdir()
    for file in (gan.tasks.ASSETS / "edges2emoji").iterdir():
        if file.stem in AGENTS:
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(gan.tasks, "ASSETS", tmp_path)
    return folder


@pytest.mark.parametrize("name", ["generator.safetensors", "discriminator.safetensors", "generator.json"])
def test_a_missing_file_is_a_sentence(assets, name):
    (assets / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_task("edges2emoji")


def test_a_truncated_file_is_a_sentence(assets):
    file = assets / "discriminator.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"discriminator\.safetensors is damaged"):
        load_task("edges2emoji")


def test_elastic_weights_are_found_when_they_are_there(assets):
    assert load_task("edges2emoji").elastic_path is None
    (assets / "elastic.safetensors").write_bytes(b"")
    assert load_task("edges2emoji").elastic_path == assets / "elastic.safetensors"


def test_elastic_weights_survive_their_file(task, tmp_path):
    weights = task.ordered()
    found = load_elastic(save_elastic(tmp_path / "elastic.safetensors", weights, task), task)
    assert list(found) == ["generator", "discriminator"]
    for agent, network in found.items():
        wanted = weights[agent]
        assert network.tensors.keys() == wanted.tensors.keys()
        for name, tensor in network.tensors.items():
            original = wanted.tensors[name]
            assert torch.equal(tensor, original.half().float() if original.dim() > 1 else original), name
        for mine, theirs in ((network.orders, wanted.orders), (network.importance, wanted.importance)):
            assert len(mine) == len(task.groups[agent])
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        inputs = task.statistics_inputs(12)[agent]
        torch.testing.assert_close(
            network.network(SMALL[agent])(inputs), wanted.network(SMALL[agent])(inputs), atol=0.02, rtol=0.02
        )


@pytest.mark.parametrize("agent", AGENTS)
def test_elastic_weights_of_another_pair_are_refused(task, tmp_path, agent):
    path = save_elastic(tmp_path / "elastic.safetensors", task.ordered(), task)
    other = {"generator": tiny_generator(8), "discriminator": tiny_discriminator(8)}[agent]
    mixed = replace(task, networks={**task.networks, agent: other})
    with pytest.raises(UserError, match=f"made from another {agent} than task 'tiny' has; make them again"):
        load_elastic(path, mixed)


def test_other_files_are_no_elastic_weights(task, tmp_path):
    path = save_tensors(tmp_path / "elastic.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(UserError, match="made from another generator"):
        load_elastic(path, task)
    with pytest.raises(UserError, match="does not exist"):
        load_elastic(tmp_path / "none.safetensors", task)


def test_the_start_decides_where_slices_come_from(task, tmp_path):
    weights = task.ordered()
    weights["generator"].tensors["model.model.3.bias"] += 1
    shipped = replace(task, elastic_path=save_elastic(tmp_path / "e.safetensors", weights, task))
    bias = {
        start: shipped.elastic_weights(start)["generator"].tensors["model.model.3.bias"]
        for start in ("elastic", "dense")
    }
    torch.testing.assert_close(bias["elastic"], bias["dense"] + 1)
    dense = {agent: tensors_hash(network.tensors) for agent, network in task.ordered().items()}
    assert {
        agent: tensors_hash(network.tensors) for agent, network in shipped.elastic_weights("dense").items()
    } == dense
    with pytest.raises(UserError, match="unknown start 'raw'; known are dense, elastic"):
        task.elastic_weights("raw")  # type: ignore[arg-type]


def test_a_task_without_elastic_weights_says_so(task):
    with pytest.raises(UserError, match=r"'tiny' comes without elastic weights; .* --start dense"):
        task.elastic_weights("elastic")


def test_the_examples_fit_their_networks(task):
    assert task.example("generator").shape == (1, 3, 8, 8)
    assert task.example("discriminator").shape == (1, 6, 8, 8)
    assert task.device == torch.device("cpu")
    assert task.image_size == 8


def test_statistics_inputs_are_train_images(task):
    inputs, targets = task.train.take(8).tensors()
    shown = task.statistics_inputs(8)
    assert torch.equal(shown["generator"], inputs)
    with torch.no_grad():
        made = task.networks["generator"](inputs)
    real, fake = shown["discriminator"].split(4)  # as many images as the generator's, half of them made
    assert torch.equal(real, torch.cat([inputs, targets], 1)[::2])
    torch.testing.assert_close(fake, torch.cat([inputs, made], 1)[::2])


@pytest.mark.usefixtures("_no_real_extractor")
def test_the_scorer_works_on_val_images(task: Task):
    before = {agent: state_hash(network) for agent, network in task.networks.items()}
    scorer = task.scorer("params", "dense", statistics_images=12)
    plan = Plan.of(SMALL, scorer.ranking)
    gaps = scorer.score(plan).gaps
    assert set(gaps) == set(FAMILIES)
    sliced = task.ordered()["generator"].network(SMALL["generator"])
    recompute_statistics(sliced, task.train.tensors()[0])
    inputs = task.val.tensors()[0]
    with torch.no_grad():
        wanted = float((sliced(inputs) - task.networks["generator"](inputs)).abs().mean())
    assert gaps["l1_gap"] == pytest.approx(
        wanted, rel=1e-2
    )  # slices are scored in bfloat16 where that is quick
    assert {agent: network.multiple for agent, network in scorer.networks.items()} == task.multiples
    assert {network.cost_kind for network in scorer.networks.values()} == {"params"}
    for agent, network in scorer.networks.items():
        assert network.cost_of(network.channels) == sum(p.numel() for p in task.networks[agent].parameters())
    assert {agent: state_hash(network) for agent, network in task.networks.items()} == before


@pytest.mark.usefixtures("_no_real_extractor")
def test_the_scorer_takes_weights_and_a_smaller_probe(task):
    weights = task.ordered()
    weights["generator"].tensors["model.model.3.bias"] += 1
    scorer = task.scorer(weights=weights, probe=9)
    assert len(scorer.yardstick.inputs) == 9
    plain = task.scorer(start="dense", probe=9)
    plan = Plan.of(SMALL, "l1")
    assert scorer.score(plan).gaps["l1_gap"] > plain.score(plan).gaps["l1_gap"]
    assert scorer.fingerprint["weights"] != plain.fingerprint["weights"]
    assert scorer.fingerprint["probe"] == plain.fingerprint["probe"]


def test_an_unknown_cost_is_refused(task):
    with pytest.raises(UserError, match="unknown cost 'flops'; known are latency, macs, params"):
        task.scorer("flops")  # type: ignore[arg-type]


def test_the_file_of_elastic_weights_holds_half_precision_kernels(task, tmp_path):
    weights = task.ordered()
    path = save_elastic(tmp_path / "elastic.safetensors", weights, task)
    kernels = sum(t.numel() for n in weights.values() for t in n.tensors.values() if t.dim() > 1)
    rest = [t for n in weights.values() for t in n.tensors.values() if t.dim() <= 1]
    rows = [row for n in weights.values() for both in (n.orders, n.importance) for row in both]
    held = 2 * kernels + sum(t.numel() * t.element_size() for t in [*rest, *rows])
    assert held < path.stat().st_size < held + 16_000  # names and hashes
    assert all(t.dtype != torch.float16 for t in load_tensors(path).values())
