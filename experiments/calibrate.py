"""How well the score before finetuning predicts the result after it, over plans of equal cost."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from envs.budget import unused_share
from envs.references import References
from envs.rewards import Weights, potential, term_scores
from experiments import cli
from experiments.agreement import (
    LEVEL,
    Interval,
    better_half,
    ceiling,
    kendall_interval,
    paired_difference,
    regret,
    reliability,
)
from experiments.build import (
    ImageCounts,
    build_budgets,
    check_counterparts,
    check_reachable,
    fixed_shares,
    image_counts,
    pick_device,
    prunable,
)
from experiments.candidates import NamedPlan, draw_plans, found_plan
from experiments.families import FEWEST_TO_HALVE, Halves, weigh
from experiments.figures import TERMS, Cloud, calibration, publish
from experiments.report import markdown_table
from experiments.runs import (
    check_least,
    create_run,
    describe_run,
    flag,
    given_options,
    open_run,
    plain,
    read_json,
    read_options,
)
from experiments.trials import (
    Settings,
    Trial,
    TrialLog,
    TrialResult,
    absolute_weights,
    dense_row,
    leaving_out_diverged,
    run_trials,
)
from experiments.watch import Watch
from gan.append_log import read_header
from gan.errors import UserError
from gan.evaluation import KID
from gan.evaluations import CountedScorer, EvaluationLog, PrunableNetwork, Scores
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.scoring import FORMULAS
from gan.surrogate import FEWEST, Scope, Surrogate, cautious, load_surrogate
from gan.tasks import AGENTS, Task, load_task, named_elastic

DESCRIPTION = """Draws plans of equal cost, scores them, finetunes them with several seeds, and reports how
well the score and each of its terms predict the finetuned result: Kendall's tau and the regret of the plan
that the score would pick. Val images only. Everything goes to a folder; interrupt it whenever you like."""
EXAMPLES = (
    ("python experiments/calibrate.py", "36 plans, 2 seeds: 40 minutes on 2 cores"),
    ("python experiments/calibrate.py --quick", "the same road in a minute"),
    ("python experiments/calibrate.py --found runs/NAME", "with the best plan of a run among them"),
    ("python experiments/calibrate.py --resume FOLDER", "go on with an interrupted study"),
    ("python experiments/calibrate.py --resume FOLDER --report", "table and figure of what is there"),
    (
        "python experiments/calibrate.py --resume FOLDER --score-with new=elastic.safetensors",
        "score the same plans with other elastic weights",
    ),
)
L1 = "l1"
FEWEST_PLANS, FEWEST_SEEDS = 4, 2
OWN = "default"
"""Name of the weights that are also finetuned."""
WITHOUT = "total without "
"""Name of a column, before a family."""
NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Options:
    """Options of ``calibrate.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Share of the cost to keep: [agent=]SHARE,…; a bare number is the generator's."""
    cost: Literal["macs", "params"] = "params"
    """What the budget is a share of."""
    plans: int = 36
    """Plans to draw, uniform among them."""
    seeds: int = 2
    """Finetunings of each plan, with the seeds 0, 1, …"""
    epochs: int = 10
    """Epochs of finetuning."""
    elastic: str = "elastic"
    """What is scored and finetuned: elastic (the task's own weights), dense, or a file of elastic weights."""
    found: tuple[Path, ...] = ()
    """Runs whose best plans join."""
    score_with: tuple[str, ...] = ()
    """NAME=FILE …: score the same plans with these elastic weights too; the finetuned results stay."""
    weights: Weights = field(default_factory=Weights)
    """Weights of the reward families in the total; also when a study is resumed."""
    surrogate: Path | None = None
    """Report on these predictions (survey.py), not on ones fitted to this study's plans alone; also when a
    study is resumed. Plans among their examples are predicted by the others."""
    seed: int = 0
    """Of the drawn plans."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    output: Path | None = None
    """New folder; without it runs/TASK-calibration-sSEED, numbered when that exists."""
    resume: Path | None = None
    """Go on with this study; its own options are used, but for workers, weights and score-with."""
    report: bool = False
    """With --resume: no new work, only the table and the figure of what is there."""
    quick: bool = False
    """Few plans, images and epochs: a look around, no result."""


FREE_ON_RESUME = ("resume", "report", "workers", "weights", "score_with", "surrogate")


@dataclass(frozen=True)
class Sizes:
    """What ``--quick`` makes small; None = all."""

    plans: int
    seeds: int
    epochs: int
    images: ImageCounts

    @classmethod
    def of(cls, options: Options) -> Sizes:
        images = image_counts(options.quick)
        if options.quick:
            return cls(min(options.plans, 5), min(options.seeds, 2), 1, images)
        return cls(options.plans, options.seeds, options.epochs, images)


@dataclass(frozen=True)
class StudyFolder:
    """The paths of one study.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def plans(self) -> Path:
        return self.path / "plans.json"

    @property
    def finetuned(self) -> Path:
        return self.path / "finetuned.jsonl"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.json"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def scatter(self) -> Path:
        return self.path / "scatter.png"

    @property
    def dense(self) -> Path:
        """Figures of the dense pair on the same images."""
        return self.path / "dense.json"

    @property
    def surrogate(self) -> Path:
        """What the finetuned plans say about others."""
        return self.path / "surrogate.json"

    def evaluations(self, name: str) -> Path:
        """The evaluation log of one set of elastic weights."""
        return self.path / ("evaluations.jsonl" if name == OWN else f"evaluations-{name}.jsonl")

    @property
    def scored(self) -> list[str]:
        """Names of the weights that the folder has logs of, the study's own first."""
        others = sorted(
            path.stem.removeprefix("evaluations-") for path in self.path.glob("evaluations-*.jsonl")
        )
        return [OWN, *others]


# The road


def main(options: Options) -> None:
    """Draw, score, finetune, report."""
    console = Console()
    options, folder = open_study(options)
    if options.report:  # also while another process is at work there
        report(options, folder, console)
        return
    with cli.resumable("calibrate", folder.path, f"{folder.path} is readable as it is"):
        work(options, folder, Watch(console))
        report(options, folder, console)


def open_study(options: Options) -> tuple[Options, StudyFolder]:
    """Check the options and make the folder with its plans, or open the one to resume.

    Raises:
        UserError: options that no study can use; nothing has been written then.
    """
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; it must be 1 or more")
    extra = score_files(options.score_with)
    if options.surrogate is not None:
        load_surrogate(options.surrogate)
    if options.resume is not None:
        return reopen_study(options, options.resume)
    if options.report:
        raise UserError("--report needs the study to report on: --resume FOLDER --report")
    check_least(options, plans=FEWEST_PLANS, seeds=FEWEST_SEEDS, epochs=1, seed=0)
    budgets = build_budgets(options.budget)
    shares = fixed_shares(budgets, options.budget)
    task = load_task(options.task, pick_device(options.device))
    check_counterparts(task, "val")
    check_reachable(task, budgets, options.cost)
    for weights in (options.elastic, *extra.values()):
        named_elastic(weights, task)
    options = replace(options, elastic=absolute_weights(options.elastic))
    networks = prunable(task, options.cost)
    if options.surrogate is not None:
        options = replace(options, surrogate=options.surrogate.resolve())
        check_surrogate(options, task)
    random = np.random.default_rng(options.seed)
    plans = draw_plans(networks, shares, Sizes.of(options).plans, random, "l1")
    for path in options.found:
        named = found_plan(path, options.task, networks, shares)
        if named.plan.key not in {other.plan.key for other in plans}:
            taken = {other.label for other in plans}
            label = named.label if named.label not in taken else f"found:{path}"
            plans.append(replace(named, label=label))
    made = create_run(options.task, "calibration", options.seed, options.output)
    folder = StudyFolder(made.path)
    write_json(
        folder.plans,
        [{"label": p.label, "kind": p.kind, **p.plan.to_dict()} for p in plans],
    )
    describe_run(made, options, device=str(task.device), threads=torch.get_num_threads())
    return options, folder


def reopen_study(options: Options, path: Path) -> tuple[Options, StudyFolder]:
    """A study that exists, with its own options."""
    made, folder = open_run(path), StudyFolder(path)
    if not folder.plans.is_file():
        raise UserError(
            f"{path} is no study of plans: it has no plans.json; name one of calibrate.py's folders"
        )
    given = [flag(name) for name in given_options(options, FREE_ON_RESUME)]
    if given:
        raise UserError(f"--resume goes on with the study's own options; leave out {', '.join(given)}")
    if options.report and options.score_with:
        raise UserError("--report does no new work; leave it out to score plans with other weights")
    own = read_options(made, Options)
    files = score_files(own.score_with)
    for name, file in score_files(options.score_with).items():
        if files.setdefault(name, file) != file:
            raise UserError(f"{name!r} are other weights in this study: {files[name]}; take another name")
    merged = replace(
        own,
        score_with=tuple(f"{name}={file}" for name, file in files.items()),
        weights=options.weights,
        surrogate=options.surrogate or own.surrogate,
        workers=options.workers,
        resume=path,
        report=options.report,
    )
    if not options.report:
        task = load_task(own.task, pick_device(own.device))
        for weights in files.values():
            named_elastic(weights, task)
        if merged.surrogate is not None:
            check_surrogate(merged, task)
        stored = replace(own, score_with=merged.score_with)
        write_json(made.options, plain(stored))
    return merged, folder


def score_files(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE …`` → name → file, absolute, or ``elastic`` or ``dense``.

    Raises:
        UserError: no such form, a name that is taken or no name for a file.
    """
    files: dict[str, str] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or not file or not NAME.fullmatch(name):
            raise UserError(
                f"--score-with {text!r} is not NAME=FILE with a name of letters, digits, '_', '.', '-'"
            )
        if name == OWN or name in files:
            raise UserError(f"--score-with names {name!r} twice; {OWN!r} are the study's own weights")
        files[name] = absolute_weights(file)
    return files


def settings_of(options: Options, weights: str) -> Settings:
    """What all trials of a study share."""
    sizes = Sizes.of(options)
    return Settings.of(options.task, weights, sizes.epochs, sizes.images, options.device)


def read_plans(folder: StudyFolder) -> list[NamedPlan]:
    """The study's plans, uniform first."""
    try:
        return [
            NamedPlan(item["label"], item["kind"], Plan.from_dict(item)) for item in read_json(folder.plans)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.plans} is damaged ({error}); make the study again") from error


def trials_of(plans: Sequence[NamedPlan], seeds: int) -> list[Trial]:
    """Every plan with every seed, plan by plan: whatever is finished first, plans are finished whole."""
    return [Trial(named.label, named.plan, seed) for named in plans for seed in range(seeds)]


def work(options: Options, folder: StudyFolder, watch: Watch) -> None:
    """Score and finetune what the logs do not have."""
    sizes = Sizes.of(options)
    watch.console.print(f"[bold]{folder.path}[/bold]  {options.task}", highlight=False, soft_wrap=True)
    plans = read_plans(folder)
    task = load_task(options.task, pick_device(options.device))
    for name, weights in {OWN: options.elastic, **score_files(options.score_with)}.items():
        score(options, name, weights, task, plans, folder, watch)
    if not folder.dense.is_file():
        with watch.stage("dense pair"):
            own = settings_of(options, options.elastic)
            content = {"row": dense_row(task, own), "weights": own.weights_hash(task)}
            write_json(folder.dense, plain(content))
    trials = trials_of(plans, sizes.seeds)
    with watch.stage("finetune", len(trials)) as stage:
        done = 0

        def on_done(result: TrialResult) -> None:
            nonlocal done
            done += 1
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")
            if not watch.console.is_terminal:
                watch.console.print(
                    f"{result.trial.label} seed {result.trial.seed}: KID {result.row[KID]:.3f}, "
                    f"L1 {result.row[L1]:.4f}, {result.seconds:.0f} s",
                    highlight=False,
                    soft_wrap=True,
                )

        settings = settings_of(options, options.elastic)
        with leaving_out_diverged(watch.console):
            run_trials(settings, trials, folder.finetuned, workers=options.workers, on_done=on_done)


def score(
    options: Options,
    name: str,
    weights: str,
    task: Task,
    plans: Sequence[NamedPlan],
    folder: StudyFolder,
    watch: Watch,
) -> None:
    """Score every plan, and what scores are measured against, with one set of weights."""
    sizes = Sizes.of(options)
    with watch.stage(f"score {name}") as stage:
        scorer = task.scorer(
            options.cost,
            weights=named_elastic(weights, task),
            probe=sizes.images.probe,
            statistics_images=sizes.images.statistics,
        )
        counted = CountedScorer(scorer, EvaluationLog(folder.evaluations(name), scorer.fingerprint))
        References(counted, build_budgets(options.budget)).prepare(stage.at)
        for number, named in enumerate(plans, start=1):
            counted.score(named.plan)
            stage.at(number, len(plans))


# The report


class Missing(UserError):
    """A log does not have all that is asked of it yet."""


class LoggedScorer:
    """A scorer that only knows what a log holds: reports need no weights."""

    def __init__(self, path: Path, networks: Mapping[str, PrunableNetwork]) -> None:
        self.networks, self.path = networks, path
        self.fingerprint = log_header(path)
        self.ranking = "l1"

    def score(self, plan: Plan) -> Scores:
        raise Missing(f"{self.path} has no scores of {plan.key} yet; go on with --resume {self.path.parent}")


def log_header(path: Path) -> dict[str, Any]:
    """What the entries of a log of this study depend on.

    Raises:
        Missing: none yet.
        UserError: no log.
    """
    if not path.is_file():
        raise Missing(f"{path} does not exist yet; go on with --resume {path.parent}")
    header = read_header(path)
    if not header:
        raise UserError(
            f"{path} is no log: its first line is no header; delete it and go on with --resume {path.parent}"
        )
    return header


@dataclass(frozen=True)
class Column:
    """Something that might predict the finetuned result.

    Attributes:
        name: in files: a gap, ``total``, ``total without FAMILY``, or a figure before finetuning.
        weights: name of the weights that it was scored with.
        title: for people.
        better: (k,) higher is better.
        drawn: (k,) as it is drawn: gaps lower-better, totals higher-better.
    """

    name: str
    weights: str
    title: str
    better: NDArray[np.float64]
    drawn: NDArray[np.float64]


class Prediction(NamedTuple):
    """How well a column predicts one metric over some plans.

    Attributes:
        tau: Kendall's tau-b with its bootstrap interval.
        regret: of the plan that the column picks, as a share of the best plan's metric.
    """

    tau: Interval
    regret: float


@dataclass(frozen=True)
class Study:
    """What a folder holds of the plans that are finished.

    Attributes:
        plans: k finished plans, uniform first.
        results: metric → (k, n) after finetuning.
        raw: metric → (k,) before it.
        columns: what was scored.
        notes: what is not finished.
        surrogate: the given one, or fitted to the finished plans; None where they are too few.
    """

    plans: tuple[NamedPlan, ...]
    results: Mapping[str, NDArray[np.float64]]
    raw: Mapping[str, NDArray[np.float64]]
    columns: tuple[Column, ...]
    notes: tuple[str, ...]
    surrogate: Surrogate | None


def read_study(options: Options, folder: StudyFolder) -> Study:
    """Everything that the logs hold of plans that are finetuned with every seed.

    Raises:
        UserError: fewer than ``FEWEST_PLANS`` plans are finished.
    """
    plans, seeds = read_plans(folder), Sizes.of(options).seeds
    networks = prunable(load_task(options.task), options.cost)
    log = TrialLog(folder.finetuned, log_header(folder.finetuned))
    results = {named.label: log.known(trials_of([named], seeds)) for named in plans}
    done = [named for named in plans if len(results[named.label]) == seeds]
    if len(done) < FEWEST_PLANS:
        raise Missing(
            f"{len(done)} of {len(plans)} plans are finetuned with all {seeds} seeds; a report needs "
            f"{FEWEST_PLANS}: go on with --resume {folder.path}"
        )
    notes = [] if len(done) == len(plans) else [f"{len(done)} of {len(plans)} plans are finished"]
    rows = [results[named.label] for named in done]
    surrogate = (
        fit_surrogate(options, folder, networks, done, rows)
        if options.surrogate is None
        else fitting_surrogate(options.surrogate, folder, networks)
    )
    columns: list[Column] = []
    for name in folder.scored:
        told = surrogate if name == OWN else None
        try:
            columns += scored_columns(options, name, folder.evaluations(name), networks, done, told)
        except Missing as missing:
            notes.append(str(missing))
    table = {metric: np.array([[one.row[metric] for one in row] for row in rows]) for metric in (KID, L1)}
    raw = {metric: np.array([row[0].raw[metric] for row in rows]) for metric in (KID, L1)}
    columns += [
        Column(f"raw {metric}", OWN, f"{title} before finetuning", -raw[metric], raw[metric])
        for metric, title in ((KID, "KID"), (L1, "L1"))
    ]
    return Study(tuple(done), table, raw, tuple(columns), tuple(notes), surrogate)


def check_surrogate(options: Options, task: Task) -> None:
    """Refuse predictions for another study before its plans are finetuned, not when it is reported on.

    Raises:
        UserError: they are for other networks, elastic weights or formulas.
    """
    assert options.surrogate is not None
    weights = settings_of(options, options.elastic).weights_hash(task)
    load_surrogate(options.surrogate).fit_for(options.surrogate, task.dense_widths, weights, FORMULAS)


def fitting_surrogate(path: Path, folder: StudyFolder, networks: Mapping[str, PrunableNetwork]) -> Surrogate:
    """The given predictions.

    Raises:
        UserError: they are for other networks, elastic weights or formulas than the study's.
    """
    given, header = load_surrogate(path), log_header(folder.evaluations(OWN))
    weights = given.scope.weights
    if folder.dense.is_file():
        weights = read_json(folder.dense)["weights"]
    channels = {agent: network.channels.tolist() for agent, network in networks.items()}
    return given.fit_for(path, channels, weights, str(header.get("formulas", given.scope.formulas)))


def fit_surrogate(
    options: Options,
    folder: StudyFolder,
    networks: Mapping[str, PrunableNetwork],
    plans: Sequence[NamedPlan],
    results: Sequence[Sequence[TrialResult]],
) -> Surrogate | None:
    """What the finished plans say about others; None while there are too few, or not all are scored."""
    try:
        header = log_header(folder.evaluations(OWN))
        known = EvaluationLog(folder.evaluations(OWN), header).scores
    except Missing:
        return None
    if len(plans) < FEWEST or not folder.dense.is_file() or any(p.plan.key not in known for p in plans):
        return None
    dense = read_json(folder.dense)
    scope = Scope(dense["weights"], KID, str(header.get("formulas", "")))
    channels = {agent: network.channels.tolist() for agent, network in networks.items()}
    return Surrogate.fitted(
        [named.plan for named in plans],
        [known[named.plan.key].gaps for named in plans],
        [statistics.fmean(one.row[KID] for one in row) for row in results],
        dense["row"][KID],
        channels,
        scope,
    )


class Predicting:
    """Logged scores with the recovery that a surrogate predicts: for its own examples without them.

    Args:
        scorer: gives the scores.
        surrogate: fitted to some of the plans.
    """

    def __init__(self, scorer: CountedScorer, surrogate: Surrogate) -> None:
        self.scorer, self.surrogate = scorer, surrogate
        self.networks, self.ranking = scorer.networks, scorer.ranking
        self.fingerprint: Mapping[str, str] = {}
        self._unseen = {
            example.plan.key: cautious(*prediction)
            for example, prediction in zip(surrogate.examples, surrogate.leave_one_out(), strict=True)
        }

    def score(self, plan: Plan) -> Scores:
        """The logged scores and the predicted recovery."""
        scores = self.scorer.score(plan, counted=False)
        gap = self._unseen.get(plan.key)
        gap = self.surrogate.gap(plan, scores.gaps) if gap is None else gap
        return Scores({**scores.gaps, "recovery_gap": gap}, scores.diagnostics)


def scored_columns(
    options: Options,
    name: str,
    path: Path,
    networks: Mapping[str, PrunableNetwork],
    plans: Sequence[NamedPlan],
    surrogate: Surrogate | None = None,
) -> list[Column]:
    """The total, the total without each of its families, and every gap, by one set of weights.

    Raises:
        Missing: the log does not have every plan and reference yet.
    """
    scorer = LoggedScorer(path, networks)
    counted = CountedScorer(scorer, EvaluationLog(path, scorer.fingerprint))
    if surrogate is not None:
        counted = CountedScorer(Predicting(counted, surrogate))
    budgets = build_budgets(options.budget)
    reference = References(counted, budgets).at(fixed_shares(budgets, options.budget))
    gaps = [counted.score(named.plan, counted=False).gaps for named in plans]
    scores = [term_scores(row, reference.uniform_gaps, reference.spreads) for row in gaps]

    def total(weights: Weights, label: str, title: str) -> Column:
        values = np.array([potential(row, weights) for row in scores])
        return Column(label, name, title, values, values)

    columns = [total(options.weights, "total", "total score")]
    for family, weight in asdict(options.weights).items():
        rest = {**asdict(options.weights), family: 0.0}
        known = family != "recovery" or surrogate is not None
        if weight > 0 and known and any(rest.values()):
            label = WITHOUT + family
            columns.append(total(Weights(**rest), label, label))
    for term in gaps[0]:
        if term == "recovery_gap" and surrogate is None:
            continue
        values = np.array([row[term] for row in gaps])
        columns.append(Column(term, name, TERMS.get(term, term), -values, values))
    return columns


def predictions(column: Column, study: Study) -> dict[str, dict[str, Prediction]]:
    """Metric → ``all`` plans or the ``better_half`` (by finetuned KID) → how well a column predicts it."""
    half = better_half(study.results[KID].mean(1))
    sets = {"all": np.arange(len(study.plans)), "better_half": half}
    return {
        metric: {
            where: Prediction(
                kendall_interval(column.better[rows], -means[rows]), regret(column.better[rows], means[rows])
            )
            for where, rows in sets.items()
        }
        for metric, means in ((metric, study.results[metric].mean(1)) for metric in (KID, L1))
    }


def additions(study: Study) -> Halves | None:
    """What each reward family adds to the total by the study's own weights; None where that says nothing."""
    own = {column.name: column.better for column in study.columns if column.weights == OWN}
    names = [name.removeprefix(WITHOUT) for name in own if name.startswith(WITHOUT)]
    parts = {name: own["total"] - own[WITHOUT + name] for name in names}
    if len(parts) < 2 or len(study.plans) < FEWEST_TO_HALVE:
        return None
    return weigh(parts, *(study.results[metric].mean(1) for metric in (KID, L1)))


def report(options: Options, folder: StudyFolder, console: Console) -> None:
    """Write ``calibration.json``, ``table.md`` and ``scatter.png`` and ``.pdf``, and print the table."""
    study = read_study(options, folder)
    found = {(column.weights, column.name): predictions(column, study) for column in study.columns}
    noise = {
        metric: {
            "reliability": reliability(study.results[metric]),
            "ceiling": ceiling(study.results[metric]),
            "ceiling_better_half": ceiling(study.results[metric], better=True),
        }
        for metric in (KID, L1)
    }
    means = study.results[KID].mean(1)
    own = next((c for c in study.columns if (c.weights, c.name) == (OWN, "total")), None)
    facts, halves = headline(study, noise, own), additions(study)
    document = {
        "protocol": protocol(options, study),
        "notes": study.notes,
        "options": asdict(options),
        "noise": {metric: named(parts) for metric, parts in noise.items()},
        "facts": facts,
        "predictors": [
            {"weights": weights, "name": name, **named(rows)} for (weights, name), rows in found.items()
        ],
        "families": None if halves is None else named(halves),
        "plans": plan_rows(options, study),
    }
    write_json(folder.calibration, plain(document))
    if study.surrogate is not None and options.surrogate is None:
        study.surrogate.save(folder.surrogate)
    rows = table_rows(study, found)
    write_text(folder.table, markdown(options, study, facts, rows, halves))
    panels = [
        Cloud(
            column.title,
            "score" if column.name == "total" else "gap",
            column.drawn,
            kendall_interval(column.better, -means).value,
        )
        for column in study.columns
        if column.weights == OWN and (column.name == "total" or column.name in TERMS)
    ]
    if panels:
        title = f"{options.task}: {len(study.plans)} plans at equal cost, {study.results[KID].shape[1]} seeds"
        kinds = [named.kind for named in study.plans]
        publish(calibration(panels, study.results[KID], kinds, title=title), folder.scatter)
    show(console, study, facts, rows, halves)
    console.print(f"everything is in {folder.path}", highlight=False, soft_wrap=True)


def named(value: Any) -> Any:
    """Named tuples as objects, at any depth, for JSON."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: named(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: named(item) for key, item in value.items()}
    return value


def protocol(options: Options, study: Study) -> str:
    """What the figures stand on."""
    sizes = Sizes.of(options)
    return (
        f"{len(study.plans)} plans of {options.task} at {options.budget} of the {options.cost}, each "
        f"finetuned {sizes.epochs} epochs with {sizes.seeds} seeds; KID (EfficientNet-Lite0, 112 px) and L1 "
        f"to the targets on val images, mean over seeds; {LEVEL:.0%} intervals"
    )


def headline(study: Study, noise: Mapping[str, Any], own: Column | None) -> list[str]:
    """Sentences: how reliable the results are, what can be reached, what the score picks."""
    kid, facts = study.results[KID], []
    for metric, title in ((KID, "KID"), (L1, "L1")):
        parts = noise[metric]["reliability"]
        facts.append(
            f"{title}: ICC of one seed {_with(parts.single)}, of the mean over seeds {_with(parts.average)}; "
            f"a perfect score would get tau {_with(noise[metric]['ceiling'])}, "
            f"in the better half {_with(noise[metric]['ceiling_better_half'])}"
        )
    means = kid.mean(1)
    uniform = next((i for i, named in enumerate(study.plans) if named.kind == "uniform"), None)
    best = int(means.argmin())
    if uniform is not None:
        places = {"best": best} | ({} if own is None else {"pick of the score": int(own.better.argmax())})
        for name, place in places.items():
            difference = paired_difference(kid[place], kid[uniform])
            facts.append(
                f"{name} ({study.plans[place].label}): KID {means[place]:.3f} against {means[uniform]:.3f} "
                f"of uniform, difference {_with(difference, 3)} (95 % t interval over seeds)"
                + ("; chosen by these results, so flattered by them" if name == "best" else "")
            )
    return facts


def _with(interval: Interval, digits: int = 2, *, signed: bool = False) -> str:
    if math.isnan(interval.value):
        return "–"
    sign = "+" if signed else ""
    return f"{interval.value:{sign}.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def plan_rows(options: Options, study: Study) -> list[dict[str, Any]]:
    """Every finished plan with all its numbers."""
    networks = prunable(load_task(options.task), options.cost)
    shares = fixed_shares(build_budgets(options.budget), options.budget)
    return [
        {
            "label": named.label,
            "kind": named.kind,
            **named.plan.to_dict(),
            "unused": {
                agent: unused_share(networks[agent], np.array(named.plan[agent]), shares[agent])
                for agent in AGENTS
            },
            "finetuned": {metric: study.results[metric][i] for metric in (KID, L1)},
            "raw": {metric: study.raw[metric][i] for metric in (KID, L1)},
            "predictors": {f"{c.weights}/{c.name}": c.drawn[i] for c in study.columns},
        }
        for i, named in enumerate(study.plans)
    ]


HEADINGS = ("score", "τ KID", "τ, better half", "regret", "in better half", "τ L1", "τ, better half")


def table_rows(
    study: Study, found: Mapping[tuple[str, str], Mapping[str, Mapping[str, Prediction]]]
) -> list[tuple[str, ...]]:
    """One row of text per column of the study, under ``HEADINGS``."""
    several = len({column.weights for column in study.columns}) > 1
    rows: list[tuple[str, ...]] = []
    for column in study.columns:
        parts = found[column.weights, column.name]
        kid, l1 = parts[KID], parts[L1]
        rows.append(
            (
                f"{column.weights}: {column.title}" if several else column.title,
                _with(kid["all"].tau),
                _with(kid["better_half"].tau),
                f"{kid['all'].regret:.1%}",
                f"{kid['better_half'].regret:.1%}",
                _with(l1["all"].tau),
                _with(l1["better_half"].tau),
            )
        )
    return rows


FAMILY_HEADINGS = ("family", "adds to τ KID", "to τ L1", "τ KID, weights of other halves")


def family_rows(halves: Halves) -> list[tuple[str, ...]]:
    """One row of text per family, under ``FAMILY_HEADINGS``."""
    return [
        (name, *(_with(interval, signed=True) for interval in addition))
        for name, addition in halves.additions.items()
    ]


def on_halves(halves: Halves) -> str:
    """A sentence: what choosing the weights of the families is worth."""
    return (
        f"weights that are chosen on a half of the plans change tau on the other half by "
        f"{_with(halves.chosen, signed=True)} from {halves.given:.2f} of the given ones "
        f"(in brackets, as in the last column: 5 and 95 % of the splits)"
    )


def markdown(
    options: Options,
    study: Study,
    facts: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    halves: Halves | None,
) -> str:
    """The tables as a Markdown file."""
    lines = [f"{protocol(options, study)}.", ""]
    lines += [*(f"- {fact}" for fact in (*facts, *study.notes)), ""]
    lines.append(markdown_table([HEADINGS, *rows]))
    if halves is not None:
        lines += ["", f"- {on_halves(halves)}", "", markdown_table([FAMILY_HEADINGS, *family_rows(halves)])]
    return "\n".join(lines) + "\n"


SHOWN = (0, 1, 3, 4, 5)
"""Columns that fit a terminal of 80 characters; the file has all."""


def show(
    console: Console,
    study: Study,
    facts: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    halves: Halves | None,
) -> None:
    """Print the same, shorter."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number in SHOWN:
        table.add_column(HEADINGS[number], justify="right" if number else "left", no_wrap=bool(number))
    for row in rows:
        table.add_row(*(row[number].partition(" [")[0] if number == 5 else row[number] for number in SHOWN))
    console.print(table)
    if halves is not None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, heading in enumerate(FAMILY_HEADINGS):
            table.add_column(heading, justify="right" if number else "left")
        for row in family_rows(halves):
            table.add_row(*row)
        console.print(table)
        facts = [*facts, on_halves(halves)]
    for fact in (*facts, *study.notes):
        console.print(fact, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
