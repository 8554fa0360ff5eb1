from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gan.tasks
from experiments import recipes
from experiments.recipes import BASE, DENSE, KID, OPPONENTS, RECIPES, Options, recipe_of
from experiments.trials import Settings, Trial, TrialResult
from gan.distillation import Ingredients
from gan.errors import Diverged
from gan.tasks import Task
from gan.training import TrainingOptions
from tests.gan.conftest import Pair, _pair, fake_extractor, pair, task

__all__ = ["Pair", "_pair", "pair", "task"]  # fixtures

OPTIONS = Options(
    task="tiny", budget="generator=0.6,discriminator=0.6", recipes="native,from_dense", seeds=2, quick=True
)


class Fake:
    """Trials whose KID says what they were made with."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self.diverges = ""
        """Name of the log whose trials do."""

    def __call__(
        self, settings: Settings, trials: Sequence[Trial], log: Path, *, on_done: Any, **_: Any
    ) -> list[TrialResult]:
        self.settings.append(settings)
        if log.stem == self.diverges:
            raise Diverged("1 of 2 finetunings diverged")
        results = []
        for trial in trials:
            kid = 2.0 + trial.seed - (0.5 if settings.weights == "dense" else 0.0)
            row = {KID: kid, "l1": 0.2, "prdc_density": 0.4, "prdc_coverage": 0.5}
            test = {**row, KID: 10 * kid} if settings.with_test else {}
            results.append(TrialResult(trial, row, row, 1.0, 0.25, 10.0, test=test))
            on_done(results[-1])
        log.write_text("trials")
        return results


@pytest.fixture
def fake(task: Task, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(recipes, "load_task", lambda *_: task)
    monkeypatch.setattr(recipes, "run_trials", made)
    monkeypatch.setattr(Task, "shipped_elastic", lambda self: self.ordered())
    for module in (gan.tasks, recipes.dense_row.__globals__):
        target = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(target, "load_extractor", lambda **_: fake_extractor())
    return made


def test_the_road_and_its_resume(fake: Fake, tmp_path: Path) -> None:
    output = tmp_path / "study"
    recipes.main(replace(OPTIONS, output=output, dense=True, split="test"))
    found = json.loads((output / "recipes.json").read_text())
    rows = found["rows"]
    assert rows["uniform"]["from_dense"]["to_first"] == pytest.approx([-0.5, -0.5, -0.5])
    assert rows["uniform"]["native"]["kid"] == pytest.approx([2.0, 3.0])
    assert set(rows[DENSE]) == set(OPPONENTS)
    assert all(row["kid"] == pytest.approx([1.5, 2.5]) for row in rows[DENSE].values())
    assert [(one.weights, one.split, one.training) for one in fake.settings] == [
        ("elastic", "test", (("distillation", 0.0),)),
        ("dense", "test", ()),
        ("dense", "test", (("distillation", 0.0),)),
        ("dense", "test", (("distillation", 0.0),)),
        ("dense", "test", (("distillation", 0.0), ("gradient_penalty", 0.15))),
    ]
    assert [one.ingredients.perceptual for one in fake.settings] == [0.0, None, None, 0.0, None]
    assert not any(one.with_test for one in fake.settings)
    assert sorted(path.name for path in output.glob("*.jsonl")) == [
        "dense_trained_on.jsonl",
        "dense_trained_on_R1.jsonl",
        "dense_trained_on_plain.jsonl",
        "from_dense.jsonl",
        "native.jsonl",
    ]
    assert (output / "recipes.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "recipes.pdf").read_bytes().startswith(b"%PDF")
    before = (output / "table.md").read_text()
    assert "| from_dense | 2.0000 | -0.5000 (-0.5000 to -0.5000) |" in before
    recipes.main(Options(resume=output))
    assert (output / "table.md").read_text() == before


def test_a_recipe_that_diverges_is_named_and_left_out(fake: Fake, tmp_path: Path) -> None:
    output = tmp_path / "study"
    fake.diverges = "from_dense"
    recipes.main(replace(OPTIONS, recipes="native,from_dense,l1_30", output=output))
    found = json.loads((output / "recipes.json").read_text())
    assert list(found["rows"]["uniform"]) == ["native", "l1_30"]
    assert found["diverged"] == {"from_dense": "1 of 2 finetunings diverged"}
    assert "- from_dense: 1 of 2 finetunings diverged" in (output / "table.md").read_text()


def test_nothing_is_compared_with_a_recipe_that_diverges(fake: Fake, tmp_path: Path) -> None:
    fake.diverges = "native"
    with pytest.raises(Diverged):
        recipes.main(replace(OPTIONS, output=tmp_path / "study"))


def test_val_decides_and_test_is_shown_beside_it(fake: Fake, tmp_path: Path) -> None:
    output = tmp_path / "study"
    recipes.main(replace(OPTIONS, output=output, split="both"))
    assert all(one.split == "val" and one.with_test for one in fake.settings)
    val, test = (json.loads((output / f"recipes{end}.json").read_text()) for end in ("", "_test"))
    assert val["rows"]["uniform"]["from_dense"]["kid"] == pytest.approx([1.5, 2.5])
    assert test["rows"]["uniform"]["from_dense"]["kid"] == pytest.approx([15.0, 25.0])
    assert test["rows"]["uniform"]["from_dense"]["to_first"] == pytest.approx([-5.0, -5.0, -5.0])
    assert "on the val images" in val["protocol"]
    assert "on the test images" in test["protocol"]
    assert val["dense"] != test["dense"]
    assert {"table.md", "table_test.md", "recipes_test.png"} <= {path.name for path in output.iterdir()}


def test_one_recipe_alone_has_a_table_and_no_figure(fake: Fake, tmp_path: Path) -> None:
    output = tmp_path / "study"
    recipes.main(replace(OPTIONS, recipes=BASE, seeds=1, output=output))
    assert "| base | 2.0000 |  |" in (output / "table.md").read_text()
    assert not (output / "recipes.png").exists()


def test_minutes_take_the_place_of_epochs() -> None:
    settings = recipes.settings_of(recipe_of(BASE), Options(minutes=2.0))
    assert settings.seconds == 120


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_changes_what_it_names(name: str) -> None:
    recipe = recipe_of(name)
    assert Ingredients(**recipe.ingredients) == replace(Ingredients(), **recipe.ingredients)
    replace(TrainingOptions(), **recipe.training)
    assert (name == BASE) == (recipe == recipes.Recipe())


def test_recipes_are_joined() -> None:
    both = recipe_of("alignment+l1_30+from_dense")
    assert both.ingredients == {"features": "alignment"}
    assert both.training["l1"] == 30
    assert both.weights == "dense"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--recipes bass", "unknown recipe 'bass'"),
        ("--recipes ,", "there is no recipe to compare"),
        ("--recipes base,base", "names a recipe twice"),
        ("--recipes online+variants", "leave out --online or --variants"),
        ("--seeds 0", "--seeds is 0"),
        ("--minutes 0", "0.0 seconds"),
        ("--workers 0", "--workers is 0"),
        ("--budget 0.1:0.5", "is a range"),
        ("--found nowhere --budget 0.6", "nowhere does not exist"),
        ("--resume nowhere", "nowhere does not exist"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_bad_input_is_a_sentence(arguments: str, sentence: str, refused: Callable[..., None]) -> None:
    refused(recipes.main, Options, arguments.split(), sentence)
