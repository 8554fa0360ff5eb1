"""What makes a small network good? Ways of finetuning the same plans, side by side, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from envs.budget import check_reachable, uniform_widths
from experiments import cli
from experiments.agreement import Interval, paired_difference
from experiments.build import ImageCounts, build_budgets, fixed_shares, image_counts, pick_device, prunable
from experiments.candidates import found_plans
from experiments.figures import Estimates, intervals, publish
from experiments.report import markdown_table, show_table
from experiments.runs import (
    STUDY_FREE_ON_RESUME,
    RunFolder,
    check_least,
    create_run,
    describe_run,
    open_run,
    plain,
    read_json,
    resumed_options,
)
from experiments.trials import Settings, Split, Trial, TrialResult, dense_row, run_trials
from experiments.watch import Watch
from gan.distillation import Ingredients
from gan.errors import Diverged, UserError, unknown
from gan.evaluation import KID
from gan.evaluations import PrunableNetwork
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.tasks import AGENTS, Task, load_task

DESCRIPTION = """Finetunes the same plans in several ways, each with the same seeds and for as many epochs or
minutes, and compares the results. Recipes are named; a + joins some."""
EXAMPLES = (
    (
        "python experiments/recipes.py",
        "each ingredient alone, uniform at 25 % of the MACs, one seed",
    ),
    (
        "python experiments/recipes.py --recipes base,l1_30,l1_30+alignment --minutes 3 --seeds 3",
        "some, for equal minutes",
    ),
    (
        "python experiments/recipes.py --found runs/NAME --budget 0.1 --split both",
        "a found plan; val decides, test is shown in the end",
    ),
    ("python experiments/recipes.py --resume FOLDER", "go on after an interruption"),
)
LEVEL = 0.95
"""Of the intervals."""
BASE = "base"
"""The default: what all others are compared with."""
DENSE = "dense"
"""The dense pair as it is."""
COLUMNS = (KID, "l1", "prdc_density", "prdc_coverage", "seconds", "margin_spread")
"""Figures of a finetuning: four of ``gan.evaluation.COLUMNS``, its seconds, and the standard deviation of the
discriminator's margin over its steps."""


@dataclass(frozen=True)
class Recipe:
    """A way of finetuning.

    Attributes:
        ingredients: fields of ``gan.distillation.Ingredients``.
        training: fields of ``gan.training.TrainingOptions``.
        weights: what plans are cut from: ``elastic``, ``dense``.
    """

    ingredients: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    weights: Literal["elastic", "dense"] = "elastic"

    def __add__(self, other: Recipe) -> Recipe:
        """Both; where they contradict each other, the second."""
        weights = "dense" if "dense" in (self.weights, other.weights) else "elastic"
        return Recipe(
            {**self.ingredients, **other.ingredients},
            {**self.training, **other.training},
            weights,  # type: ignore[arg-type]
        )


RECIPES: dict[str, Recipe] = {
    BASE: Recipe(),
    "plain": Recipe({"perceptual": 0.0}),
    "native": Recipe({"perceptual": 0.0}, {"distillation": 0.0}),
    "no_outputs": Recipe(training={"distillation": 0.0}),
    "outputs_100": Recipe(training={"distillation": 100.0}),
    "alignment": Recipe({"features": "alignment"}),
    "adapters": Recipe({"features": "adapters"}),
    "variants": Recipe({"variants": 8}),
    "unseen": Recipe({"unseen": 16}),
    "match_target": Recipe({"matching": "target"}),
    "match_teacher": Recipe({"matching": "teacher"}),
    "match_both": Recipe({"matching": "both"}),
    "perceptual_20": Recipe({"perceptual": 20.0}),
    "perceptual_50": Recipe({"perceptual": 50.0}),
    "perceptual_200": Recipe({"perceptual": 200.0}),
    "perceptual_500": Recipe({"perceptual": 500.0}),
    "dense_adversary": Recipe({"adversary": "dense"}),
    "both_adversaries": Recipe({"adversary": "both"}),
    "cosine": Recipe({"schedule": "cosine"}),
    "restarts": Recipe({"schedule": "restarts"}),
    "online": Recipe({"online": True}),
    "from_dense": Recipe(weights="dense"),
    "l1_30": Recipe(training={"l1": 30.0, "distillation": 15.0}),
    "l1_300": Recipe(training={"l1": 300.0, "distillation": 150.0}),
    "lsgan": Recipe(training={"adversarial": "lsgan"}),
    "hinge": Recipe(training={"adversarial": "hinge"}),
    "jitter_04": Recipe(training={"jitter": 0.4}),
    "rate_1e3": Recipe(training={"learning_rate": 1e-3}),
    "rate_4e3": Recipe(training={"learning_rate": 4e-3}),
    "rate_5e4": Recipe(training={"learning_rate": 5e-4}),
    "r1": Recipe(training={"gradient_penalty": 0.15}),
    "r1_1": Recipe(training={"gradient_penalty": 1.0}),
    "r1_005": Recipe(training={"gradient_penalty": 0.05}),
    "ema_0998": Recipe(training={"ema": 0.998}),
}
"""Name → what it changes in the finetuning that is the default; ``plain`` has native losses and output
distillation alone."""
OPPONENTS = {
    "dense, trained on": "from_dense+no_outputs",
    "dense, trained on, plain": "from_dense+native",
    "dense, trained on, R1": "from_dense+no_outputs+r1",
}
"""What it is called → recipe of the dense pair's own further training, without a teacher."""


def recipe_of(name: str) -> Recipe:
    """A recipe, or the sum of several: ``alignment+cosine``.

    Raises:
        UserError: an unknown part.
    """
    total = Recipe()
    for part in name.split("+"):
        if part not in RECIPES:
            raise unknown("recipe", part, RECIPES)
        total += RECIPES[part]
    Ingredients(**total.ingredients).check()
    return total


@dataclass(frozen=True)
class Options:
    """Options of ``recipes.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    recipes: str = ",".join(RECIPES)
    """Names, separated by commas; a + joins several to one. The first is what others are compared with."""
    budget: str = "generator=0.25,discriminator=0.5"
    """Share of the cost to keep: [agent=]SHARE,…; a bare number is the generator's."""
    cost: Literal["macs", "params"] = "macs"
    """What shares are of."""
    found: tuple[Path, ...] = ()
    """Runs whose best plans are finetuned beside uniform."""
    epochs: int = 10
    """Epochs of finetuning."""
    minutes: float | None = None
    """Finetune for this long instead."""
    seeds: int = 1
    """Finetunings of each, with the seeds 0, 1, …"""
    dense: bool = False
    """Also train the dense pair on for as long: the fair opponent."""
    split: Split | Literal["both"] = "val"
    """Measure on val, where choices are made, on test, where they are shown, or on both: then the tables of
    test are written when all has been finetuned."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    output: Path | None = None
    """New folder; without it runs/TASK-recipes-s0, numbered when that exists."""
    resume: Path | None = None
    """Go on with this folder; its own options are used."""
    quick: bool = False
    """Few images and epochs: a look around, no result."""

    @property
    def names(self) -> list[str]:
        """The recipes' names."""
        return [name.strip() for name in self.recipes.split(",") if name.strip()]


class Sizes(NamedTuple):
    """What ``--quick`` makes small; None = by epochs."""

    epochs: int
    seconds: float | None
    images: ImageCounts

    @classmethod
    def of(cls, options: Options) -> Sizes:
        seconds = None if options.minutes is None else 60 * options.minutes
        if options.quick:
            return cls(1, None if seconds is None else min(seconds, 3.0), image_counts(True))
        return cls(options.epochs, seconds, image_counts(False))


@dataclass(frozen=True)
class Row:
    """A plan, finetuned in one way.

    Attributes:
        means: name of ``COLUMNS`` → mean over the seeds.
        kid: (seeds,) KID by seed.
        to_first: KID minus that of the first recipe with the same seed; negative is better.
    """

    means: Mapping[str, float]
    kid: tuple[float, ...]
    to_first: Interval


def main(options: Options) -> None:
    """Every recipe on every plan with every seed; the report after each recipe."""
    console = Console()
    options, folder = open_study(options)
    watch = Watch(console)
    with cli.resumable("recipes", folder.path):
        task = load_task(options.task, pick_device(options.device))
        settings = settings_of(Recipe(), options)
        dense = dense_row(task, settings)
        results: dict[str, list[TrialResult]] = {}
        diverged: dict[str, str] = {}
        for name in options.names:
            try:
                results[name] = finetune_all(name, options, folder, watch)
            except Diverged as error:
                if name == options.names[0]:  # what the others are compared with
                    raise
                diverged[name] = str(error)
            report(options, folder, tables_of(results), dense, diverged)
        if options.dense:
            results |= {name: train_dense_on(name, options, folder, watch) for name in OPPONENTS}
            report(options, folder, tables_of(results), dense, diverged)
        if settings.with_test:
            shown = dense_row(task, replace(settings, split="test"))
            report(options, folder, tables_of(results, test=True), shown, diverged, test=True)
    for name in ("table.md", "table_test.md"):
        if (folder.path / name).is_file():
            show_table(folder.path / name, console)


def open_study(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder, or open the one to resume.

    Raises:
        UserError: options that no study can use; nothing has been written then.
    """
    check_least(options, workers=1)
    if options.resume is not None:
        folder = open_run(options.resume)
        return resumed_options(folder, options, STUDY_FREE_ON_RESUME), folder
    if not options.names:
        raise UserError("there is no recipe to compare; name some, such as --recipes base,alignment")
    if len(set(options.names)) < len(options.names):
        raise UserError("--recipes names a recipe twice; once is enough")
    for name in options.names:
        recipe_of(name)
    check_least(options, seeds=1)
    task = load_task(options.task, pick_device(options.device))
    if task.back is not None:
        raise UserError(f"recipes finetune paired networks; {options.task} is unpaired: take another task")
    settings_of(Recipe(), options).check()
    options = replace(options, found=tuple(path.resolve() for path in options.found))
    plans = plans_of(options, prunable(task, options.cost))
    if any(recipe_of(name).weights == "elastic" for name in options.names):
        task.shipped_elastic()
    folder = create_run(options.task, "recipes", 0, options.output)
    describe_run(folder, options, device=str(task.device), threads=torch.get_num_threads())
    # The runs that plans come from may go: a resumed study reads them here.
    write_json(folder.path / "plans.json", {name: plan.to_dict() for name, plan in plans.items()})
    return options, folder


def plans_of(options: Options, networks: Mapping[str, PrunableNetwork]) -> dict[str, Plan]:
    """Name → plan at the budget: uniform, and the best ones of the runs.

    Raises:
        UserError: a budget out of reach, or a run without a plan of that budget.
    """
    shares = fixed_shares(build_budgets(options.budget), options.budget)
    for agent in AGENTS:
        check_reachable(networks[agent], shares[agent], agent)
    uniform = Plan.of({agent: uniform_widths(networks[agent], shares[agent]) for agent in AGENTS}, "l1")
    found = found_plans(options.found, options.task, networks, shares)
    return {"uniform": uniform, **found}


def settings_of(recipe: Recipe, options: Options) -> Settings:
    """What all finetunings with one recipe share."""
    sizes = Sizes.of(options)
    split: Split = "val" if options.split == "both" else options.split
    shared = Settings.of(options.task, recipe.weights, sizes.epochs, sizes.images, options.device, split)
    return replace(
        shared,
        seconds=sizes.seconds,
        ingredients=Ingredients(**recipe.ingredients),
        training=tuple(recipe.training.items()),
        with_test=options.split == "both",
    )


def finetune_all(name: str, options: Options, folder: RunFolder, watch: Watch) -> list[TrialResult]:
    """Finetune all plans with one recipe; what its log has already is read."""
    plans = {key: Plan.from_dict(plan) for key, plan in read_json(folder.path / "plans.json").items()}
    trials = [Trial(key, plan, seed) for seed in range(options.seeds) for key, plan in plans.items()]
    return finetune(name, recipe_of(name), trials, options, folder, watch)


def train_dense_on(name: str, options: Options, folder: RunFolder, watch: Watch) -> list[TrialResult]:
    """The dense pair after as much further training."""
    task = load_task(options.task, pick_device(options.device))
    trials = [Trial(DENSE, dense_plan(task), seed, "dense") for seed in range(options.seeds)]
    return finetune(name, recipe_of(OPPONENTS[name]), trials, options, folder, watch)


def tables_of(
    results: Mapping[str, Sequence[TrialResult]], test: bool = False
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Plan → recipe → (seeds, ``COLUMNS``) figures.

    Args:
        results: recipe → its finetunings, seed by seed.
        test: of the test images, where they were measured beside val.
    """
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for name, finetunings in results.items():
        for result in finetunings:
            rows.setdefault(result.trial.label, {}).setdefault(name, []).append(figures(result, test))
    return {plan: {name: np.array(values) for name, values in of.items()} for plan, of in rows.items()}


def dense_plan(task: Task) -> Plan:
    """Everything is kept."""
    return Plan.of(task.dense_widths, "l1")


def finetune(
    name: str, recipe: Recipe, trials: list[Trial], options: Options, folder: RunFolder, watch: Watch
) -> list[TrialResult]:
    """Results of the trials with one recipe, in their order."""
    with watch.stage(name, len(trials)) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        log = folder.path / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl"
        settings = settings_of(recipe, options)
        return run_trials(settings, trials, log, workers=options.workers, on_done=on_done)


def figures(result: TrialResult, test: bool = False) -> list[float]:
    """``COLUMNS`` of one finetuning."""
    row = result.test if test else result.row
    own = {"seconds": result.seconds, "margin_spread": result.margin_spread}
    return [own[name] if name in own else row[name] for name in COLUMNS]


# The report


def summarise(table: Mapping[str, NDArray[np.float64]], first: NDArray[np.float64]) -> dict[str, Row]:
    """Recipe → its row; differences to ``first`` (seeds, ``COLUMNS``) are paired by seed."""
    rows = {}
    for name, values in table.items():
        kid, reference = (these[:, COLUMNS.index(KID)] for these in (values, first))
        means = dict(zip(COLUMNS, values.mean(0).tolist(), strict=True))
        rows[name] = Row(means, tuple(kid.tolist()), paired_difference(kid, reference, LEVEL))
    return rows


def report(
    options: Options,
    folder: RunFolder,
    tables: Mapping[str, Mapping[str, NDArray[np.float64]]],
    dense: Mapping[str, float],
    diverged: Mapping[str, str],
    test: bool = False,
) -> None:
    """Write ``recipes.json``, ``table.md``, ``recipes.png`` and ``.pdf``.

    Of test beside val they are called ``recipes_test.json`` and so on.

    Args:
        options: of the study.
        folder: where they go.
        tables: plan → recipe → (seeds, ``COLUMNS``) figures.
        dense: figures of the dense pair on the same images.
        diverged: recipe that is left out → why.
        test: these are the figures of the test images, beside those of val.
    """
    sizes, first = Sizes.of(options), options.names[0]
    split, end = ("test", "_test") if test else (settings_of(Recipe(), options).split, "")
    length = f"{sizes.epochs} epochs" if sizes.seconds is None else f"{sizes.seconds / 60:g} minutes"
    protocol = (
        f"{options.task} at {options.budget} of the {options.cost}, {length} of finetuning, "
        f"{options.seeds} seeds; KID*, density* and coverage* (EfficientNet-Lite0 at 112 px) and L1 on the "
        f"{split} images; the dense pair has KID* {dense[KID]:.4f}, L1 {dense['l1']:.4f}, coverage* "
        f"{dense['prdc_coverage']:.3f}; seconds with measuring, on one thread each"
    )
    rows = {
        plan: summarise(table, tables["uniform" if plan == DENSE else plan][first])
        for plan, table in tables.items()
    }
    write_json(
        folder.path / f"recipes{end}.json",
        plain({"protocol": protocol, DENSE: dict(dense), "rows": rows, "diverged": diverged}),
    )
    parts = ["# Ways of finetuning", f"{protocol}."]
    for plan, of_plan in rows.items():
        parts += [f"## {plan}", markdown(of_plan, first, options.seeds)]
    if diverged:
        parts += ["## Left out", "\n".join(f"- {name}: {reason}" for name, reason in diverged.items())]
    write_text(folder.path / f"table{end}.md", "\n\n".join(parts) + "\n")
    panels = [
        estimates(plan, of_plan, rows["uniform" if plan == DENSE else plan][first].kid, first)
        for plan, of_plan in rows.items()
    ]
    if any(panel.labels for panel in panels):
        label = f"KID* minus that of {first}, same seeds (negative is better)"
        shown = [panel for panel in panels if panel.labels]
        publish(intervals(shown, label, f"{options.task}, {length}"), folder.path / f"recipes{end}.png")


def estimates(plan: str, rows: Mapping[str, Row], reference: tuple[float, ...], first: str) -> Estimates:
    """One panel of the figure: every recipe but the first, which is the zero line."""
    others = {name: row for name, row in rows.items() if name != first}
    values = np.array([np.subtract(row.kid, reference) for row in others.values()])
    ends = [row.to_first[1:] for row in others.values()]
    bounds = np.array([end if np.isfinite(end).all() else (np.nan, np.nan) for end in ends])
    return Estimates(plan, tuple(others), values, bounds)


def markdown(rows: Mapping[str, Row], first: str, seeds: int) -> str:
    """The table of one plan, a recipe a row."""
    heads = ["recipe", "KID* ↓", f"Δ to {first}", "L1 ↓", "density* ↑", "coverage* ↑", "seconds"]
    lines = [heads]
    for name, row in rows.items():
        means, (mean, low, high) = row.means, row.to_first
        interval = f" ({low:+.4f} to {high:+.4f})" if seeds > 1 else ""
        lines.append(
            [
                name,
                f"{means[KID]:.4f}",
                "" if name == first else f"{mean:+.4f}{interval}",
                f"{means['l1']:.4f}",
                f"{means['prdc_density']:.3f}",
                f"{means['prdc_coverage']:.3f}",
                f"{means['seconds']:.0f}",
            ]
        )
    return markdown_table(lines)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
