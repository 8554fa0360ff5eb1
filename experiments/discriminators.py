"""Does it matter which discriminator a generator is finetuned beside? Equal generator plans, on val images.

The discriminators differ in their weights (the dense ones or a slice of the elastic ones), in how much of
them is kept, and, at an equal share, in what the balance gap says of them before finetuning.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from envs.budget import check_reachable, keep_ratio, project, random_proportions, uniform_widths
from experiments import cli
from experiments.agreement import Interval, paired_difference
from experiments.build import (
    ImageCounts,
    build_budgets,
    check_counterparts,
    fixed_shares,
    image_counts,
    pick_device,
    prunable,
)
from experiments.candidates import found_plans, shape_proportions
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
from experiments.trials import Settings, Trial, TrialResult, absolute_weights, run_trials
from experiments.watch import Watch
from gan.evaluation import KID
from gan.evaluations import CountedScorer, EvaluationLog, PrunableNetwork
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.tasks import AGENTS, load_task

DESCRIPTION = """Finetunes the same generators beside different discriminators: the whole dense one, ones cut
evenly to several shares, and those that the balance gap likes best and least. Compares them on val images."""
EXAMPLES = (
    ("python experiments/discriminators.py", "two generators, 7 discriminators, 3 seeds: 42 finetunings"),
    ("python experiments/discriminators.py --quick", "a look around"),
    ("python experiments/discriminators.py --found runs/NAME", "beside the best plan of a run"),
    ("python experiments/discriminators.py --resume FOLDER", "go on after an interruption"),
)
LEVEL = 0.95
"""Of the intervals."""
DRAWN = 64
"""Random discriminators that the balance gap chooses from, besides the even one."""
FEWEST_SEEDS = 2
FULL, SMALLEST, LARGEST, FOUND = "full, dense weights", "smallest gap", "largest gap", "found"
COLUMNS = ("cost", "gap", KID, "l1", "prdc_coverage", "margin_mean", "margin_spread", "seconds")
"""Figures of a finetuning: the share of the discriminator's cost that is kept, the pair's balance gap before
it, three figures of ``gan.evaluation.COLUMNS`` after it, and how the discriminator's margin went in it."""
MEAN = "mean of the generators"

Table = Mapping[str, NDArray[np.float64]]
"""Discriminator → (seeds, ``COLUMNS``) figures."""


@dataclass(frozen=True)
class Options:
    """Options of ``discriminators.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Share of the cost to keep: [agent=]SHARE,…; a bare number is the generator's."""
    cost: Literal["macs", "params"] = "params"
    """What shares are of."""
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    """Shares of the discriminator to keep evenly; those of the budget join them."""
    found: tuple[Path, ...] = ()
    """Runs whose best plans give the generators beside uniform, instead of a hand-made pyramid."""
    seeds: int = 3
    """Finetunings of each pair, with the seeds 0, 1, …"""
    epochs: int = 10
    """Epochs of finetuning."""
    elastic: str = "elastic"
    """What slices are cut from: elastic (the task's own weights), dense, or a file of elastic weights."""
    seed: int = 0
    """Of the drawn discriminators."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    output: Path | None = None
    """New folder; without it runs/TASK-discriminators-sSEED, numbered when that exists."""
    resume: Path | None = None
    """Go on with this folder; its own options are used."""
    quick: bool = False
    """Few discriminators to choose from, images, epochs and seeds: a look around, no result."""


@dataclass(frozen=True)
class Sizes:
    """What ``--quick`` makes small: numbers of discriminators, seeds, epochs and images; None = all."""

    drawn: int
    seeds: int
    epochs: int
    images: ImageCounts

    @classmethod
    def of(cls, options: Options) -> Sizes:
        images = image_counts(options.quick)
        if options.quick:
            return cls(8, min(options.seeds, 2), 1, images)
        return cls(DRAWN, options.seeds, options.epochs, images)


@dataclass(frozen=True)
class Row:
    """A discriminator after finetuning.

    Attributes:
        means: name of ``COLUMNS`` → mean over the seeds (median for the seconds).
        kid: (seeds,) KID by seed.
        kid_spread: standard deviation of it over the seeds.
        to_full: KID minus that beside the whole dense discriminator with the same seed; negative is better.
        to_even: the same against the even slice at the budget.
    """

    means: Mapping[str, float]
    kid: tuple[float, ...]
    kid_spread: float
    to_full: Interval
    to_even: Interval


def main(options: Options) -> None:
    """Choose the discriminators, finetune beside each, compare."""
    console = Console()
    options, folder = open_study(options)
    watch = Watch(console)
    with cli.resumable("discriminators", folder.path):
        pairs = choose(options, folder, watch)
        report(options, folder, pairs, finetune_all(options, folder, pairs, watch))
    show_table(folder.path / "table.md", console)


def open_study(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder, or open the one to resume.

    Raises:
        UserError: options that no study can use; nothing has been written then.
    """
    check_least(options, workers=1)
    if options.resume is not None:
        folder = open_run(options.resume)
        return resumed_options(folder, options, STUDY_FREE_ON_RESUME), folder
    check_least(options, seeds=FEWEST_SEEDS, epochs=1, seed=0)
    shares = shares_of(options)
    task = load_task(options.task, pick_device(options.device))
    check_counterparts(task, "val")
    networks = prunable(task, options.cost)
    for agent in AGENTS:
        check_reachable(networks[agent], shares[agent], agent)
    for share in (*options.shares, *shares.values()):  # as choose cuts it
        check_reachable(networks["discriminator"], share, "discriminator")
    options = replace(options, elastic=absolute_weights(options.elastic))
    settings_of(options).elastic(task)
    options = replace(options, found=tuple(path.resolve() for path in options.found))
    generator_plans(options, networks)
    folder = create_run(options.task, "discriminators", options.seed, options.output)
    describe_run(folder, options, device=str(task.device), threads=torch.get_num_threads())
    return options, folder


def shares_of(options: Options) -> dict[str, float]:
    """Agent → share of its cost to keep."""
    return fixed_shares(build_budgets(options.budget), options.budget)


def settings_of(options: Options) -> Settings:
    """What all finetunings of a study share."""
    sizes = Sizes.of(options)
    return Settings.of(options.task, options.elastic, sizes.epochs, sizes.images, options.device)


# The pairs


def generator_plans(options: Options, networks: Mapping[str, PrunableNetwork]) -> dict[str, Plan]:
    """Name → plan that fills the budgets: uniform, and the found ones or else a pyramid.

    Raises:
        UserError: a run without a plan, or with one that is not of this study's kind.
    """
    shares = shares_of(options)
    uniform = Plan.of({agent: uniform_widths(networks[agent], shares[agent]) for agent in AGENTS}, "l1")
    found = found_plans(options.found, options.task, networks, shares)
    if found:
        return {"uniform": uniform, **found}
    network = networks["generator"]
    shape = shape_proportions("pyramid", network.groups)
    pyramid = project(network, shape, shares["generator"]).widths.tolist()
    return {"uniform": uniform, "pyramid": uniform.replace("generator", pyramid)}


def choose(options: Options, folder: RunFolder, watch: Watch) -> dict[str, Any]:
    """Generator → the discriminators that it is finetuned beside; read where that is done already.

    Every generator gets the same draws to choose from.

    Returns:
        The content of ``plans.json``: generator → ``plans`` (discriminator → plan of the pair) and ``gaps``
        (the balance gap beside the even discriminator at the budget, and beside each drawn one).
    """
    place = folder.path / "plans.json"
    if place.is_file():
        return read_json(place)
    sizes, shares, task = (
        Sizes.of(options),
        shares_of(options),
        load_task(options.task, pick_device(options.device)),
    )
    networks = prunable(task, options.cost)
    network, share = networks["discriminator"], shares["discriminator"]
    even = {one: uniform_widths(network, one).tolist() for one in sorted({*options.shares, *shares.values()})}
    rng = np.random.default_rng(options.seed)
    random = [project(network, random_proportions(network, rng), share).widths for _ in range(sizes.drawn)]
    drawn = [even[share], *(widths.tolist() for widths in random)]
    generators = generator_plans(options, networks)
    content: dict[str, Any] = {}
    with watch.stage("balance gaps", len(generators) * len(drawn)) as stage:
        weights = settings_of(options).elastic(task)
        scorer = task.scorer(
            options.cost,
            weights=weights,
            probe=sizes.images.probe,
            statistics_images=sizes.images.statistics,
        )
        log = EvaluationLog(folder.path / "evaluations.jsonl", scorer.fingerprint)
        counted = CountedScorer(scorer, log)
        for name, plan in generators.items():
            gaps = []
            for widths in drawn:
                gaps.append(counted.score(plan.replace("discriminator", widths)).gaps["balance_gap"])
                stage.advance()
            kept = {FULL: network.channels.tolist()}
            kept |= {even_name(one): even[one] for one in reversed(even)}
            kept |= {SMALLEST: drawn[int(np.argmin(gaps))], LARGEST: drawn[int(np.argmax(gaps))]}
            if name.startswith("found:"):
                kept[FOUND] = plan["discriminator"]
            plans = {label: plan.replace("discriminator", widths).to_dict() for label, widths in kept.items()}
            content[name] = {"plans": plans, "gaps": {"even": gaps[0], "drawn": gaps[1:]}}
    write_json(place, content)
    return content


def even_name(share: float) -> str:
    """A discriminator that is cut evenly, by the share that it keeps."""
    return f"even {share:g}"


# The finetunings


def trials_of(pairs: Mapping[str, Any], seeds: int) -> dict[tuple[str, str, int], Trial]:
    """(generator, discriminator, seed) → trial.

    Each seed begins with another discriminator: the first finetuning of a seed waits for the teacher's
    answers, and the median of the seconds over the seeds should not count that for always the same one.
    """
    trials = {}
    for seed in range(seeds):
        for generator, content in pairs.items():
            plans = list(content["plans"].items())
            for label, plan in plans[seed % len(plans) :] + plans[: seed % len(plans)]:
                beside: Literal["dense", "pruned"] = "dense" if label == FULL else "pruned"
                trial = Trial(f"{generator}, {label}", Plan.from_dict(plan), seed, beside)
                trials[generator, label, seed] = trial
    return trials


def finetune_all(
    options: Options, folder: RunFolder, pairs: Mapping[str, Any], watch: Watch
) -> dict[str, Table]:
    """Finetune what the log does not have.

    Returns:
        Generator → its table.
    """
    settings, seeds = settings_of(options), Sizes.of(options).seeds
    trials = trials_of(pairs, seeds)
    with watch.stage("finetune", len({trial.key for trial in trials.values()})) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        log = folder.path / "trials.jsonl"
        results = run_trials(settings, list(trials.values()), log, workers=options.workers, on_done=on_done)
    network = prunable(load_task(options.task), options.cost)["discriminator"]
    rows = dict(zip(trials, (figures(result, network) for result in results), strict=True))
    return {
        generator: {
            label: np.array([rows[generator, label, seed] for seed in range(seeds)])
            for label in content["plans"]
        }
        for generator, content in pairs.items()
    }


def figures(result: TrialResult, network: PrunableNetwork) -> list[float]:
    """``COLUMNS`` of one finetuning beside a discriminator of this network."""
    cost = keep_ratio(network, np.array(result.trial.plan["discriminator"]))
    measured = [result.row[name] for name in (KID, "l1", "prdc_coverage")]
    steadiness = [result.margin_mean, result.margin_spread, result.seconds]
    return [cost, result.raw["balance_gap"], *measured, *steadiness]


# The report


def with_mean(tables: Mapping[str, Table]) -> dict[str, Table]:
    """The tables and, of several, their mean seed by seed, over the discriminators that all have."""
    if len(tables) < 2:
        return dict(tables)
    first, *others = tables.values()
    common = [label for label in first if all(label in table for table in others)]
    return {**tables, MEAN: {label: np.mean([t[label] for t in tables.values()], axis=0) for label in common}}


def summarise(table: Table, even: str) -> dict[str, Row]:
    """Discriminator → its row; differences are paired by seed."""
    rows = {}
    for label, values in table.items():
        kid = values[:, COLUMNS.index(KID)]
        means = dict(zip(COLUMNS, values.mean(0).tolist(), strict=True))
        rows[label] = Row(
            # other processes disturb a timing upwards, so its median
            means=means | {"seconds": float(np.median(values[:, COLUMNS.index("seconds")]))},
            kid=tuple(kid.tolist()),
            kid_spread=float(kid.std(ddof=1)),
            to_full=paired_difference(kid, table[FULL][:, COLUMNS.index(KID)], LEVEL),
            to_even=paired_difference(kid, table[even][:, COLUMNS.index(KID)], LEVEL),
        )
    return rows


def report(
    options: Options, folder: RunFolder, pairs: Mapping[str, Any], tables: Mapping[str, Table]
) -> None:
    """Write ``discriminators.json``, ``table.md`` and ``discriminators.png`` and ``.pdf``."""
    sizes, even = Sizes.of(options), even_name(shares_of(options)["discriminator"])
    rows = {name: summarise(table, even) for name, table in with_mean(tables).items()}
    protocol = (
        f"{options.task} at {options.budget} of the {options.cost}, {sizes.epochs} epochs of finetuning, "
        f"{sizes.seeds} seeds; KID* (EfficientNet-Lite0 at 112 px), L1 and coverage on the val images; "
        f"differences are paired by seed, with {LEVEL:.0%} t intervals; the smallest and the largest gap are "
        f"of {sizes.drawn} random discriminators and the even one at the budget"
    )
    gaps = {name: content["gaps"] for name, content in pairs.items()}
    document = {"protocol": protocol, "gaps": gaps, "rows": rows}
    write_json(folder.path / "discriminators.json", plain(document))
    parts = ["# The discriminator beside the generator", f"{protocol}."]
    for name, of_name in rows.items():
        parts.append(f"## {name}")
        if name in gaps:
            drawn = gaps[name]["drawn"]
            parts.append(
                f"Balance gap of the random ones: {min(drawn):.4f} to {max(drawn):.4f}, median "
                f"{statistics.median(drawn):.4f}; of the even one {gaps[name]['even']:.4f}."
            )
        parts.append(markdown(of_name, even))
    write_text(folder.path / "table.md", "\n\n".join(parts) + "\n")
    label = "KID* minus that beside the full one, same seeds (negative is better)"
    title = f"mean and {LEVEL:.0%} interval over {sizes.seeds} seeds, dots are seeds"
    panels = [estimates(name, of_name) for name, of_name in rows.items()]
    publish(intervals(panels, label, title), folder.path / "discriminators.png")


def estimates(name: str, rows: Mapping[str, Row]) -> Estimates:
    """One panel of the figure: every discriminator but the full one, which is the zero line."""
    others = {label: row for label, row in rows.items() if label != FULL}
    pairs = np.array([np.subtract(row.kid, rows[FULL].kid) for row in others.values()])
    bounds = np.array([row.to_full[1:] for row in others.values()])
    return Estimates(name, tuple(others), pairs, bounds)


def markdown(rows: Mapping[str, Row], even: str) -> str:
    """The table of one generator, a discriminator a row."""
    level = f"{LEVEL:.0%} interval"
    heads = ["discriminator", "cost kept", "gap before", "KID* ↓", f"Δ to full ({level})"]
    heads += [f"Δ to {even} ({level})", "L1 ↓", "coverage* ↑", "margin", "its sd", "seconds"]
    lines = [heads]
    for label, row in rows.items():
        means = row.means
        lines.append(
            [
                label,
                f"{means['cost']:.3f}",
                f"{means['gap']:.4f}",
                f"{means[KID]:.4f} ± {row.kid_spread:.4f}",
                "" if label == FULL else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row.to_full),
                "" if label == even else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row.to_even),
                f"{means['l1']:.4f}",
                f"{means['prdc_coverage']:.3f}",
                f"{means['margin_mean']:.2f}",
                f"{means['margin_spread']:.2f}",
                f"{means['seconds']:.0f}",
            ]
        )
    return markdown_table(lines)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
