"""Is there anything to find over uniform pruning? Long searches and hand-made shapes, finetuned, on test.

A cell is a task, a cost and a budget. Nothing is chosen on the test images: the plans are fixed before.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from tyro.conf import UseAppendAction

from envs.budget import Budget, budget_ends, kind_of
from envs.pruning_env import PruningEnv
from envs.rewards import Weights
from experiments import cli
from experiments.agreement import Interval, paired_difference
from experiments.build import (
    ImageCounts,
    build_budgets,
    build_env,
    build_learner,
    check_learner,
    check_reachable,
    image_counts,
    pick_device,
    with_latency,
)
from experiments.candidates import SHAPES, shape_proportions
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
from experiments.searching import find
from experiments.trials import Settings, Trial, TrialResult, run_trials
from experiments.watch import Watch
from gan.cost import CostKind
from gan.elastic import ElasticNetwork
from gan.errors import UserError, unknown
from gan.evaluation import KID
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.tasks import TASKS, UNPAIRED_TASKS, Task, load_elastic, load_task

DESCRIPTION = """Searches each cell (task, cost, budget) with many evaluations, finetunes the plan found, some
hand-made shapes and the uniform plan with several seeds, and compares them on the test images."""
EXAMPLES = (
    ("python experiments/headroom.py --cell edges2emoji:macs:0.1 --output FOLDER", "one cell"),
    (
        "python experiments/headroom.py --cell edges2emoji:macs:0.1 --cell edges2emoji:params:0.1 "
        "--output FOLDER",
        "several",
    ),
    ("python experiments/headroom.py --cell edges2emoji:macs:0.1 --output FOLDER --quick", "a look around"),
    ("python experiments/headroom.py --resume FOLDER", "go on after an interruption"),
)
LEVEL = 0.95
"""Of the intervals."""
SHOWN = (KID, "l1", "prdc_coverage", "macs", "params", "latency_ms")
"""Columns of ``gan.evaluation.COLUMNS`` that the report averages."""


@dataclass(frozen=True)
class Options:
    """Options of ``headroom.py``."""

    cell: Annotated[tuple[str, ...], UseAppendAction] = ()
    """TASK:COST:BUDGET, such as edges2emoji:macs:0.1; once for each cell."""
    evaluations: int = 2000
    """Plans that the search of a cell may score."""
    seeds: int = 3
    """Finetunings of every plan, with the seeds 0, 1, …"""
    epochs: int = 10
    """Epochs of a finetuning."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Hand-made shapes to finetune beside uniform and what is found."""
    algo: str = "cma-es"
    """Who searches: a name of agents/registry.py."""
    seed: int = 0
    """Of the search."""
    elastic: Path | None = None
    """File of elastic weights; without it those that come with the task."""
    output: Path | None = None
    """New folder."""
    resume: Path | None = None
    """Go on with this folder; its own options are used."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    quick: bool = False
    """Few evaluations, images, epochs and seeds: a look around, no result."""


@dataclass(frozen=True)
class Sizes:
    """What ``--quick`` makes small: numbers of plans, seeds, epochs and images; None = all."""

    evaluations: int
    seeds: int
    epochs: int
    images: ImageCounts

    @classmethod
    def of(cls, options: Options) -> Sizes:
        images = image_counts(options.quick)
        if options.quick:
            return cls(min(options.evaluations, 24), min(options.seeds, 2), 1, images)
        return cls(options.evaluations, options.seeds, options.epochs, images)


@dataclass(frozen=True)
class Cell:
    """Where to look.

    Attributes:
        task: an embedded task.
        cost: what the budget is a share of.
        budget: as in ``--budget``: a bare number is the generator's; fixed, because potentials at different
            budgets do not compare.
    """

    task: str
    cost: CostKind
    budget: str

    @classmethod
    def of(cls, text: str) -> Cell:
        """A cell from ``TASK:COST:BUDGET``.

        Raises:
            UserError: if a part is missing or unknown, or the budget is a range.
        """
        parts = text.split(":", 2)
        if len(parts) != 3 or not all(parts):
            raise UserError(f"a cell is TASK:COST:BUDGET, such as edges2emoji:macs:0.1; got {text!r}")
        task, cost, budget = parts
        known = TASKS | UNPAIRED_TASKS
        if task not in known:
            raise unknown("task", task, known)
        if cost not in get_args(CostKind):
            raise unknown("cost", cost, get_args(CostKind))
        cell = cls(task, cost, budget)  # type: ignore[arg-type]
        if not all(one.fixed for one in cell.budgets.values()):
            raise UserError(f"the budget of the cell {text!r} is a range; give each budget a cell of its own")
        return cell

    @property
    def budgets(self) -> dict[str, Budget]:
        """Agent → budget."""
        return build_budgets(self.budget)

    @property
    def name(self) -> str:
        """Of the folder and in the report."""
        return f"{self.task}-{self.cost}-{self.budget}".replace("=", "").replace(",", "-")


@dataclass(frozen=True)
class CellFolder:
    """The paths of one cell.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def evaluations(self) -> Path:
        """The evaluation log of the search: an interrupted one is repeated from it."""
        return self.path / "evaluations.jsonl"

    @property
    def latency(self) -> Path:
        """The measured table that a budget of latency is counted with."""
        return self.path / "latency.json"

    @property
    def plans(self) -> Path:
        """Plans by name; written when the search is over."""
        return self.path / "plans.json"

    @property
    def trials(self) -> Path:
        """One line per finetuned plan and seed."""
        return self.path / "trials.jsonl"

    @property
    def result(self) -> Path:
        """Written last, so a cell that has it is done."""
        return self.path / "cell.json"


@dataclass(frozen=True)
class Row:
    """A plan after finetuning.

    Attributes:
        means: column of ``SHOWN`` → mean over the seeds (median for the latency).
        kid: (seeds,) KID on the test images by seed.
        kid_spread: standard deviation of it over the seeds; NaN for one seed.
        difference: KID minus that of uniform with the same seed: mean and interval; negative is better.
        relative: the mean difference as a share of uniform's mean KID.
    """

    means: Mapping[str, float]
    kid: tuple[float, ...]
    kid_spread: float
    difference: Interval
    relative: float


def main(options: Options) -> None:
    """Every cell: search, finetune, measure; the report after each."""
    console = Console()
    options, folder = open_folder(options)
    with cli.resumable("headroom", folder.path):
        results: dict[str, dict[str, Any]] = {}
        for text in options.cell:
            cell = Cell.of(text)
            console.print(f"[bold]{cell.name}[/bold]", highlight=False)
            results[cell.name] = run_cell(cell, CellFolder(folder.path / cell.name), options, Watch(console))
            write_report(folder, results, options)
    show_table(folder.path / "table.md", console)


def open_folder(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder, or open the one to resume.

    Raises:
        UserError: an option that no study can use; nothing has been written then.
    """
    if options.elastic is not None:  # absolute, so that it is resumed from wherever one is
        options = replace(options, elastic=options.elastic.resolve())
    if options.resume is not None:
        return reopen(options, options.resume)
    if not options.cell:
        raise UserError("there is no cell to look at; give one, such as --cell edges2emoji:macs:0.1")
    if options.output is None:
        raise UserError("the results need a folder; name a new one with --output FOLDER")
    options = replace(options, algo=check_learner(options.algo))
    for name in options.shapes:
        if name not in SHAPES:
            raise unknown("shape", name, SHAPES)
    check_least(options, evaluations=1, seeds=1, epochs=1, workers=1, seed=0)
    cells = [Cell.of(text) for text in options.cell]
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("--cell names the same cell twice; once is enough")
    tasks: dict[tuple[str, bool], Task] = {}  # with and without a latency table, which is measured once
    for cell in cells:
        key = cell.task, cell.cost == "latency"
        if key not in tasks:
            task = load_task(cell.task, pick_device(options.device))
            tasks[key] = task.with_latency() if cell.cost == "latency" else task
        check_reachable(tasks[key], cell.budgets, cell.cost)
        elastic_weights(tasks[key], options)
    folder = create_run("headroom", options.algo, options.seed, options.output)
    for cell in cells:
        if cell.cost == "latency":
            place = CellFolder(folder.path / cell.name)
            place.path.mkdir()
            with_latency(tasks[cell.task, True], place.latency)
    describe_run(folder, options, device=pick_device(options.device), threads=torch.get_num_threads())
    return options, folder


def reopen(options: Options, path: Path) -> tuple[Options, RunFolder]:
    """The options of an interrupted study; the same ones may be given again.

    Raises:
        UserError: other options than the study was begun with.
    """
    folder = open_run(path)
    return resumed_options(folder, options, STUDY_FREE_ON_RESUME), folder


def elastic_weights(task: Task, options: Options) -> Mapping[str, ElasticNetwork]:
    """What plans are cut from."""
    return task.shipped_elastic() if options.elastic is None else load_elastic(options.elastic, task)


def run_cell(cell: Cell, folder: CellFolder, options: Options, watch: Watch) -> dict[str, Any]:
    """Search, finetune and measure one cell; a part that is done is read.

    Returns:
        The content of ``cell.json``.
    """
    if folder.result.is_file():
        return read_json(folder.result)
    folder.path.mkdir(exist_ok=True)
    if not folder.plans.is_file():
        write_json(folder.plans, search(cell, folder, options, watch))
    found = read_json(folder.plans)
    plans = {name: Plan.from_dict(plan) for name, plan in found["plans"].items()}
    sizes = Sizes.of(options)
    trials = [Trial(name, plan, seed) for seed in range(sizes.seeds) for name, plan in plans.items()]
    with watch.stage("finetune", len(trials)) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        weights = str(options.elastic or "elastic")
        settings = Settings.of(cell.task, weights, sizes.epochs, sizes.images, options.device, "test")
        results = run_trials(settings, trials, folder.trials, workers=options.workers, on_done=on_done)
    content = {"cell": cell, "search": found["search"], "plans": found["plans"], "rows": summarise(results)}
    write_json(folder.result, plain(content))
    return read_json(folder.result)


def search(cell: Cell, folder: CellFolder, options: Options, watch: Watch) -> dict[str, Any]:
    """Look for a plan on the val images; an interrupted search is repeated from its log.

    Returns:
        The content of ``plans.json``: the plans to finetune, and what the search says of them.
    """
    sizes, task = Sizes.of(options), load_task(cell.task, pick_device(options.device))
    if cell.cost == "latency":
        task = with_latency(task, folder.latency)
    with watch.stage("scorer"):
        shipped = options.elastic is None and sizes.images.probe is None
        scorer = task.scorer(
            cell.cost,
            weights=elastic_weights(task, options),
            probe=sizes.images.probe,
            statistics_images=sizes.images.statistics,
            surrogate=task.surrogate(cell.cost, budget_ends(cell.budgets)) if shipped else None,
        )
    env = build_env(
        scorer,
        cell.budgets,
        log=folder.evaluations,
        evaluations=sizes.evaluations,
        weights=Weights(),
        reward="final",
    )
    with watch.stage("references") as stage:
        env.prepare(stage.at)
    with watch.stage("search", sizes.evaluations) as stage:
        env.listener = SearchBar(env, stage)
        learner = build_learner(options.algo, options.seed, None)
        learner.learn(env)
        env.listener = None
    return compare_plans(env, options.shapes, find(env, learner)["best"].plan)


class SearchBar:
    """Moves the search's bar."""

    def __init__(self, env: PruningEnv, stage: Any) -> None:
        self._env, self._stage = env, stage

    def on_plan(self, evaluation: Any) -> None:
        scorer, best = self._env.scorer, self._env.best
        self._stage.at(scorer.evaluations, scorer.limit)
        self._stage.say("" if best is None else f"best {best.potential:+.3f}")

    def on_episode(self, episode: Any) -> None:
        """Nothing to show: every plan is an episode."""


def compare_plans(
    env: PruningEnv, shapes: Sequence[str] = tuple(SHAPES), found: Plan | None = None
) -> dict[str, Any]:
    """Uniform, hand-made and found plans at an environment's budget, with their scores.

    Names may share a plan, as shapes do at tight budgets: it is finetuned once.

    Args:
        env: its search is over.
        shapes: keys of ``SHAPES``.
        found: what counts as found; by default the best plan that was scored.
    """
    assert env.best is not None  # budgets are fixed
    found = env.best.plan if found is None else found
    plans = {"uniform": env.uniform_plan(), **shaped_plans(env, shapes), "found": found}
    scores = {name: env.evaluate(plan, counted=False) for name, plan in plans.items()}
    return plain(
        {
            "plans": {name: plan.to_dict() for name, plan in plans.items()},
            "search": {
                "evaluations": env.scorer.evaluations,
                "potential": {name: evaluation.potential for name, evaluation in scores.items()},
                "gaps": {name: evaluation.scores.gaps for name, evaluation in scores.items()},
                "unused": {name: evaluation.unused for name, evaluation in scores.items()},
            },
        }
    )


def shaped_plans(env: PruningEnv, shapes: Sequence[str]) -> dict[str, Plan]:
    """Name of a shape → the plan that gives this shape to generators and leaves discriminators uniform."""
    networks = env.scorer.networks
    plans = {}
    for name in shapes:
        proportions = {
            agent: shape_proportions(name, network.groups)
            if kind_of(agent) == "generator"
            else np.ones(len(network.groups))
            for agent, network in networks.items()
        }
        plans[name] = env.plan_from_proportions(proportions)
    return plans


def summarise(results: Sequence[TrialResult]) -> dict[str, Row]:
    """Name of a plan → its row; differences are paired with uniform by seed.

    Args:
        results: the same seeds for every name, ``uniform`` among the names.
    """
    by_name: dict[str, dict[int, Mapping[str, float]]] = {}
    for result in results:
        by_name.setdefault(result.trial.label, {})[result.trial.seed] = result.row
    base = [row[KID] for _, row in sorted(by_name["uniform"].items())]
    rows = {}
    for name, seeds in by_name.items():
        ordered = [row for _, row in sorted(seeds.items())]
        kid = [row[KID] for row in ordered]
        # other processes disturb a timing upwards, so its median
        average = dict.fromkeys(SHOWN, statistics.fmean) | {"latency_ms": statistics.median}
        difference = paired_difference(kid, base, LEVEL)
        rows[name] = Row(
            means={column: average[column]([row[column] for row in ordered]) for column in SHOWN},
            kid=tuple(kid),
            kid_spread=statistics.stdev(kid) if len(kid) > 1 else math.nan,
            difference=difference,
            relative=difference.value / statistics.fmean(base),
        )
    return rows


def write_report(folder: RunFolder, results: Mapping[str, Mapping[str, Any]], options: Options) -> None:
    """Write ``headroom.json``, ``table.md`` and ``headroom.png`` and ``.pdf`` of the cells that are done.

    Args:
        folder: where they go.
        results: name of a cell → content of its ``cell.json``.
        options: of the study.
    """
    sizes = Sizes.of(options)
    protocol = (
        f"{sizes.evaluations} evaluations of {options.algo} on the val images, {sizes.epochs} epochs of "
        f"finetuning, {sizes.seeds} seeds; KID* (EfficientNet-Lite0 at 112 px) against the real targets of "
        "the test images and their mirror images; nothing was chosen on them"
    )
    write_json(folder.path / "headroom.json", {"protocol": protocol, "cells": dict(results)})
    tables = [f"## {name}\n\n{table(result)}" for name, result in results.items()]
    write_text(
        folder.path / "table.md", "\n\n".join([f"# Headroom over uniform\n\n{protocol}.", *tables, ""])
    )
    panels = [estimates(name, result["rows"]) for name, result in results.items()]
    label = "KID* minus uniform's, same seeds (negative is better)"
    title = f"mean and {LEVEL:.0%} interval over {sizes.seeds} seeds, dots are seeds"
    publish(intervals(panels, label, title), folder.path / "headroom.png")


def estimates(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Estimates:
    """One panel of the figure: every plan but uniform, which is the zero line."""
    others = {label: row for label, row in rows.items() if label != "uniform"}
    pairs = [np.subtract(row["kid"], rows["uniform"]["kid"]) for row in others.values()]
    ends = [row["difference"][1:] for row in others.values()]
    bounds = np.array([[math.nan if end is None else end for end in pair] for pair in ends], dtype=np.float64)
    return Estimates(name, tuple(others), np.array(pairs), bounds.reshape(len(others), 2))


def table(result: Mapping[str, Any]) -> str:
    """The Markdown table of a cell, a plan a row."""
    level = f"{LEVEL:.0%} interval"
    heads = ["plan", "score", "KID* ↓", f"Δ KID* to uniform ({level})", "Δ, %", "L1 ↓", "coverage* ↑"]
    heads += ["MACs, M", "params, k", "latency, ms"]
    lines = [heads]
    for name, row in result["rows"].items():
        value, low, high = row["difference"]
        spread = "" if row["kid_spread"] is None else f" ± {row['kid_spread']:.4f}"
        interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
        means = row["means"]
        lines.append(
            [
                name,
                f"{result['search']['potential'][name]:+.2f}",
                f"{means[KID]:.4f}{spread}",
                "" if name == "uniform" else f"{value:+.4f}{interval}",
                "" if name == "uniform" else f"{100 * row['relative']:+.1f}",
                f"{means['l1']:.4f}",
                f"{means['prdc_coverage']:.3f}",
                f"{means['macs'] / 1e6:.2f}",
                f"{means['params'] / 1e3:.1f}",
                f"{means['latency_ms']:.2f}",
            ]
        )
    return markdown_table(lines)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
