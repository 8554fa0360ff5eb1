"""How far can it shrink? Finetuned quality against cost, for uniform, the agents' and the usual plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from experiments import cli, headroom
from experiments.build import (
    check_counterparts,
    check_learner,
    check_reachable,
    image_counts,
    pick_device,
)
from experiments.figures import Curve, publish, quality_curves
from experiments.headroom import Cell, CellFolder
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
from gan.errors import UserError
from gan.evaluation import KID
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.tasks import load_task

DESCRIPTION = """Prunes to several shares of the cost: uniformly, as the agents find, and by the usual L1
slice of the dense weights. Finetunes all equally and draws quality against cost, the dense pair as a line."""
EXAMPLES = (
    ("python experiments/sweep.py", "50 % to 1 % of the MACs, one seed"),
    ("python experiments/sweep.py --shares 0.25 0.1 0.04 --seeds 3", "fewer shares, more seeds"),
    ("python experiments/sweep.py --cost params --algo cma-es", "parameters, another search"),
    ("python experiments/sweep.py --resume FOLDER", "go on after an interruption"),
)
UNIFORM, FOUND, L1_SLICE = "uniform", "found", "l1_slice"
SHOWN = {KID: "KID* ↓", "l1": "L1 ↓", "prdc_coverage": "coverage* ↑"}
"""Columns of ``gan.evaluation.COLUMNS`` that are drawn, and their titles."""


@dataclass(frozen=True)
class Options:
    """Options of ``sweep.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    shares: tuple[float, ...] = (0.5, 0.25, 0.1, 0.04, 0.02, 0.01)
    """Shares of the generator's cost to keep."""
    discriminator: float = 0.5
    """Share of the discriminator's."""
    cost: Literal["macs", "params"] = "macs"
    """What shares are of."""
    algo: str = "mappo"
    """Who searches: a name of agents/registry.py."""
    evaluations: int = 300
    """Plans that each search may score."""
    seeds: int = 1
    """Finetunings of every plan, with the seeds 0, 1, …"""
    epochs: int = 10
    """Epochs of a finetuning."""
    seed: int = 0
    """Of the searches."""
    split: Split = "test"
    """Measure on test; nothing is chosen here. Or on val."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    output: Path | None = None
    """New folder; without it runs/TASK-sweep-sSEED, numbered when that exists."""
    resume: Path | None = None
    """Go on with this folder; its own options are used."""
    quick: bool = False
    """Few evaluations, images and epochs: a look around, no result."""


def main(options: Options) -> None:
    """Search at every share, finetune everything, draw."""
    console = Console()
    options, folder = open_sweep(options)
    watch = Watch(console)
    with cli.resumable("sweep", folder.path):
        plans = {share: plans_at(share, options, folder, watch) for share in options.shares}
        report(options, folder, finetune_all(plans, options, folder, watch))
    show_table(folder.path / "table.md", console)


def open_sweep(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder, or open the one to resume.

    Raises:
        UserError: options that no sweep can use; nothing has been written then.
    """
    check_least(options, workers=1)
    if options.resume is not None:
        folder = open_run(options.resume)
        return resumed_options(folder, options, STUDY_FREE_ON_RESUME), folder
    check_least(options, seeds=1, epochs=1, evaluations=1, seed=0)
    options = replace(options, algo=check_learner(options.algo))
    # as folders and tables name them
    if not options.shares or len({f"{share:g}" for share in options.shares}) < len(options.shares):
        raise UserError(f"--shares is {options.shares}; name one or more, each once")
    task = load_task(options.task, pick_device(options.device))
    check_counterparts(task, options.split)
    for share in options.shares:
        check_reachable(task, cell_of(share, options).budgets, options.cost)
    task.shipped_elastic()
    folder = create_run(options.task, "sweep", options.seed, options.output)
    describe_run(folder, options, device=str(task.device), threads=torch.get_num_threads())
    return options, folder


def cell_of(share: float, options: Options) -> Cell:
    """The budget of one share."""
    return Cell(options.task, options.cost, f"generator={share:g},discriminator={options.discriminator:g}")


def plans_at(share: float, options: Options, folder: RunFolder, watch: Watch) -> dict[str, Plan]:
    """The uniform and the found plan at a share; an interrupted search is repeated from its log."""
    place = CellFolder(folder.path / f"{options.cost}-{share:g}")
    place.path.mkdir(exist_ok=True)
    if not place.plans.is_file():
        watch.console.print(f"[bold]{share:.1%} of the {options.cost}[/bold]")
        search = headroom.Options(
            evaluations=options.evaluations,
            shapes=(),
            algo=options.algo,
            seed=options.seed,
            device=options.device,
            quick=options.quick,
        )
        write_json(place.plans, headroom.search(cell_of(share, options), place, search, watch))
    return {name: Plan.from_dict(plan) for name, plan in read_json(place.plans)["plans"].items()}


Results = dict[str, dict[float, list[TrialResult]]]
"""Way of pruning → share → results, a seed each."""


def finetune_all(
    plans: Mapping[float, Mapping[str, Plan]], options: Options, folder: RunFolder, watch: Watch
) -> Results:
    """Finetune every plan with every seed; what the logs have already is read."""
    shared = settings_of(options)
    ways = {
        "elastic": [(name, share, plans[share][name]) for name in (UNIFORM, FOUND) for share in plans],
        "dense": [(L1_SLICE, share, plans[share][UNIFORM]) for share in plans],
    }
    results: Results = {}
    for weights, jobs in ways.items():
        labels = [(name, share) for _ in range(options.seeds) for name, share, _ in jobs]
        trials = [
            Trial(f"{name} {share:g}", plan, seed)
            for seed in range(options.seeds)
            for name, share, plan in jobs
        ]
        with watch.stage(f"finetune {weights}", len({trial.key for trial in trials})) as stage:

            def on_done(result: TrialResult, stage: Any = stage) -> None:
                stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

            log = folder.path / f"{weights}.jsonl"
            done = run_trials(
                replace(shared, weights=weights), trials, log, workers=options.workers, on_done=on_done
            )
        for (name, share), result in zip(labels, done, strict=True):
            results.setdefault(name, {}).setdefault(share, []).append(result)
    return results


def settings_of(options: Options) -> Settings:
    """What all finetunings share, but for what plans are cut from."""
    epochs = 1 if options.quick else options.epochs
    images = image_counts(options.quick)
    return Settings.of(options.task, "elastic", epochs, images, options.device, options.split)


# The report


def report(options: Options, folder: RunFolder, results: Results) -> None:
    """Write ``sweep.json``, ``table.md``, ``sweep.png`` and ``sweep.pdf``."""
    task = load_task(options.task, pick_device(options.device))
    settings = settings_of(options)
    dense = dense_row(task, settings)
    evaluations = min(24, options.evaluations) if options.quick else options.evaluations
    protocol = (
        f"{options.task}, {options.cost}: {settings.epochs} epochs of finetuning, {options.seeds} seeds; "
        f"found by {options.algo} with {evaluations} evaluations at each share; the discriminator keeps "
        f"{options.discriminator:.0%}; KID* and coverage* (EfficientNet-Lite0 at 112 px) and L1 on the "
        f"{options.split} images"
    )
    rows = {
        name: {f"{share:g}": [dict(one.row) for one in ones] for share, ones in by_share.items()}
        for name, by_share in results.items()
    }
    write_json(folder.path / "sweep.json", plain({"protocol": protocol, "dense": dict(dense), "rows": rows}))
    table = f"# Quality against cost\n\n{protocol}.\n\n{markdown(results, dense)}\n"
    write_text(folder.path / "table.md", table)
    panels = {
        title: [curve(name, column, by_share) for name, by_share in results.items()]
        for column, title in SHOWN.items()
    }
    lines = {title: float(dense[column]) for column, title in SHOWN.items()}
    unit = {"macs": "MACs", "params": "parameters"}[options.cost]
    figure = quality_curves(panels, lines, f"share of the generator's {unit} that is kept", options.task)
    publish(figure, folder.path / "sweep.png")


def curve(name: str, column: str, by_share: Mapping[float, Sequence[TrialResult]]) -> Curve:
    """One line of a panel: every seed's value at every share."""
    shares = sorted(by_share)
    values = np.array([[one.row[column] for one in by_share[share]] for share in shares])
    return Curve(name, np.array(shares), values)


def markdown(results: Results, dense: Mapping[str, float]) -> str:
    """A share a row: each way's KID, L1 and coverage, and KID as a multiple of the dense pair's."""
    heads = ["kept", *(f"{name}: KID* (× dense), L1, coverage*" for name in results)]
    dense_cell = f"{dense[KID]:.4f}, {dense['l1']:.4f}, {dense['prdc_coverage']:.3f}"
    lines = [heads, ["dense", dense_cell, *([""] * (len(results) - 1))]]
    for share in sorted(next(iter(results.values())), reverse=True):
        cells = [f"{share:.1%}"]
        for by_share in results.values():
            kid, l1, coverage = (
                math.fsum(one.row[column] for one in by_share[share]) / len(by_share[share])
                for column in SHOWN
            )
            cells.append(f"{kid:.4f} ({kid / dense[KID]:.2f}), {l1:.4f}, {coverage:.3f}")
        lines.append(cells)
    return markdown_table(lines)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
