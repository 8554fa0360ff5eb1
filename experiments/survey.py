"""What does finetuning make of plans of any size? The examples behind the predicted recovery.

Random plans over a whole range of budgets are finetuned; plans that other studies have finetuned join them.
``gan.surrogate`` is fitted to all, and judged by what it says of plans that it has not seen. The file
``surrogate.json`` leads searches when it lies in ``gan/assets/TASK``; ``calibrate.py --surrogate`` judges it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from experiments import cli
from experiments.agreement import Interval, kendall_interval
from experiments.build import (
    build_budgets,
    check_reachable,
    image_counts,
    pick_device,
    prunable,
    with_latency,
)
from experiments.candidates import NamedPlan, best_of_run, draw_over_range, found_plan
from experiments.figures import MOST_SERIES, Cloud, calibration, publish
from experiments.report import markdown_table, show_table
from experiments.runs import (
    RunFolder,
    check_least,
    create_run,
    describe_run,
    open_run,
    plain,
    read_json,
    read_options,
    resumed_options,
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
from gan.errors import UserError
from gan.evaluation import KID
from gan.evaluations import CountedScorer, EvaluationLog
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.scoring import FORMULAS
from gan.surrogate import CAUTION, FEWEST, Scope, Searched, Surrogate, load_surrogate
from gan.tasks import AGENTS, Task, load_task

DESCRIPTION = """Finetunes random plans over a range of budgets and fits the predicted recovery to them: the
reward family that says what finetuning makes of a plan. Val images only."""
EXAMPLES = (
    ("python experiments/survey.py", "48 plans from 4 to 50 % of the MACs: 30 minutes on 2 cores"),
    ("python experiments/survey.py --join STUDY --found runs/NAME", "with plans that are finetuned already"),
    (
        "python experiments/survey.py --plans 0 --join gan/assets/edges2emoji/surrogate.json STUDY",
        "add a study to the predictions that ship",
    ),
    ("python experiments/survey.py --quick", "the same road in a minute"),
    ("python experiments/survey.py --resume FOLDER", "go on after an interruption"),
)
OWN, FOUND = "survey", "found"
FREE_ON_RESUME = ("resume", "workers", "join")
"""Options that may differ from those of the interrupted survey: no finetuning depends on them."""


@dataclass(frozen=True)
class Options:
    """Options of ``survey.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    budget: str = "generator=0.04:0.5,discriminator=0.1:1"
    """Ranges that every plan's budgets are drawn from: [agent=]LOW:HIGH,…; log-uniform."""
    cost: Literal["macs", "params"] = "macs"
    """What these are a share of."""
    plans: int = 48
    """Plans to draw; 0 where enough join."""
    seeds: int = 1
    """Finetunings of each: more plans say more than more seeds."""
    epochs: int = 10
    """Epochs of finetuning."""
    elastic: str = "elastic"
    """What plans are cut from: elastic (the task's own weights), dense, or a file of elastic weights."""
    found: tuple[Path, ...] = ()
    """Runs whose best plans are finetuned too; the predictions may then lead searches at their budgets."""
    join: tuple[Path, ...] = ()
    """Folders of calibrate.py, discriminators.py or survey.py whose finetuned plans join, and predictions
    (surrogate.json) whose examples do; also when a survey is resumed."""
    seed: int = 0
    """Of the drawn plans."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    output: Path | None = None
    """New folder; without it runs/TASK-survey-sSEED, numbered when that exists."""
    resume: Path | None = None
    """Go on with this folder; its own options are used."""
    quick: bool = False
    """Few plans, images and epochs: a look around, no result."""


@dataclass(frozen=True)
class Sizes:
    """What ``--quick`` makes small, beside the images."""

    plans: int
    epochs: int

    @classmethod
    def of(cls, options: Options) -> Sizes:
        if options.quick:
            return cls(min(options.plans, FEWEST), 1)
        return cls(options.plans, options.epochs)


@dataclass(frozen=True)
class SurveyFolder:
    """The paths of one survey.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def plans(self) -> Path:
        """What is finetuned here."""
        return self.path / "plans.json"

    @property
    def searched(self) -> Path:
        """Budgets of the runs whose best plans are among them."""
        return self.path / "searched.json"

    @property
    def finetuned(self) -> Path:
        """One line per finished finetuning."""
        return self.path / "finetuned.jsonl"

    @property
    def dense(self) -> Path:
        """Figures of the dense pair on the same images."""
        return self.path / "dense.json"

    @property
    def evaluations(self) -> Path:
        """The gaps of all plans before finetuning."""
        return self.path / "evaluations.jsonl"

    @property
    def surrogate(self) -> Path:
        """The predictions, as ``gan.surrogate`` reads them."""
        return self.path / "surrogate.json"

    @property
    def report(self) -> Path:
        """Everything below as JSON."""
        return self.path / "survey.json"

    @property
    def table(self) -> Path:
        return self.path / "table.md"

    @property
    def figure(self) -> Path:
        """Predictions of unseen plans against what came out."""
        return self.path / "predicted.png"


@dataclass(frozen=True)
class Finetuned:
    """A plan whose end is known.

    Attributes:
        source: ``survey``, ``found``, or the name of the folder or file that it came from.
        plan: its widths.
        kid: (n,) one per seed, of the first study that has it: a seed repeated says nothing new.
    """

    source: str
    plan: Plan
    kid: tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """How well the predictions of unseen plans agree with what came out.

    Attributes:
        plans: number of plans.
        tau: Kendall's tau-b of leave-one-out predictions, with its bootstrap interval over plans.
        apart: tau when no plan of the source was seen at all; NaN for a single source.
        error: root mean square of the left-out error, of the log KID.
        z: root mean square of it in predicted standard deviations; 1 = they are honest.
    """

    plans: int
    tau: Interval
    apart: Interval
    error: float
    z: float


def main(options: Options) -> None:
    """Draw, finetune, fit, report."""
    console = Console()
    options, made = open_survey(options)
    folder = SurveyFolder(made.path)
    watch = Watch(console)
    with cli.resumable("survey", folder.path):
        work(options, folder, watch)
        report(options, folder, watch)
    show_table(folder.table, console)


def open_survey(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder with its plans, or open the one to resume.

    Raises:
        UserError: options that no survey can use; nothing has been written then.
    """
    # absolute, so that it is resumed from wherever one is
    options = replace(options, join=tuple(path.resolve() for path in options.join))
    options = replace(options, elastic=absolute_weights(options.elastic))
    if options.resume is not None:
        made = open_run(options.resume)
        if not SurveyFolder(made.path).plans.is_file():
            raise UserError(f"{made.path} is no survey: it has no plans.json; name a folder of survey.py")
        known = resumed_options(made, options, FREE_ON_RESUME)
        known = replace(known, join=options.join or read_options(made, Options).join)
        settings = settings_of(known)
        for path in known.join:
            joined(path, settings, load_task(settings.task, settings.device))
        return known, made
    check_least(options, plans=0 if options.join else FEWEST, seeds=1, epochs=1, workers=1, seed=0)
    task = load_task(options.task, pick_device(options.device))
    budgets = build_budgets(options.budget)
    check_reachable(task, budgets, options.cost)
    settings = settings_of(options)
    settings.elastic(task)  # refused here, where it is a sentence
    others = {one.plan.key for path in options.join for one in joined(path, settings, task)}
    random = np.random.default_rng(options.seed)
    plans = draw_over_range(prunable(task, options.cost), budgets, Sizes.of(options).plans, random, "l1")
    if len(others | {named.plan.key for named in plans}) < FEWEST:
        raise UserError(
            f"the budgets {options.budget!r} hold only {len({p.plan.key for p in plans})} different plans; "
            f"with the {len(others)} that join it takes {FEWEST}: draw more, give wider ranges, or join more"
        )
    searched: list[Searched] = []
    for path in options.found:
        named, budget = plan_of_run(path, task)
        if budget not in searched:
            searched.append(budget)
        if named.plan.key not in {other.plan.key for other in plans}:
            plans.append(NamedPlan(f"{FOUND}:{path}", FOUND, named.plan))
    made = create_run(options.task, OWN, options.seed, options.output)
    folder = SurveyFolder(made.path)
    write_json(folder.plans, [{"label": p.label, "kind": p.kind, **p.plan.to_dict()} for p in plans])
    write_json(folder.searched, plain(searched))
    describe_run(made, options, device=str(task.device), threads=torch.get_num_threads())
    return options, made


def settings_of(options: Options) -> Settings:
    """What all trials share."""
    epochs, images = Sizes.of(options).epochs, image_counts(options.quick)
    return Settings.of(options.task, options.elastic, epochs, images, options.device)


def plan_of_run(path: Path, task: Task) -> tuple[NamedPlan, Searched]:
    """The best plan of a finished run, whatever its budget, and at which budget it was searched.

    Raises:
        UserError: no run, no plan yet, or one that does not fit the task.
    """
    folder, options, best = best_of_run(path)
    cost = options.get("cost", "macs")
    budgets = best.get("budgets") if isinstance(best, dict) else None
    if not isinstance(budgets, dict) or set(budgets) != set(AGENTS):
        raise UserError(f"the best plan of {path} names no budgets; --found takes runs of train_agents.py")
    known = with_latency(task, folder.latency) if cost == "latency" else task
    named = found_plan(path, task.name, prunable(known, cost), budgets)
    return named, Searched(cost, {agent: float(share) for agent, share in budgets.items()})


class Known(NamedTuple):
    """A plan that another study has finetuned.

    Attributes:
        plan: its widths.
        kid: what finetuning made of it.
        key: two of the same key are one finetuning.
    """

    plan: Plan
    kid: float
    key: Hashable


def joined(path: Path, settings: Settings, task: Task) -> list[Known]:
    """What others have finetuned beside pruned discriminators, under the same settings.

    Raises:
        UserError: no finetuned plans there, or finetuned under other settings.
    """
    if path.is_file():
        surrogate = load_surrogate(path)
        surrogate.fit_for(path, task.dense_widths, settings.weights_hash(task), FORMULAS)
        return [Known(example.plan, example.metric, example.plan.key) for example in surrogate.examples]
    logs = [path / name for name in ("finetuned.jsonl", "trials.jsonl") if (path / name).is_file()]
    if not logs:
        raise UserError(
            f"{path} holds no finetuned plans; --join takes folders of calibrate.py, discriminators.py "
            "or survey.py, and files of predictions"
        )
    if logs[0].read_bytes().count(b"\n") < 2:
        raise UserError(f"{path} holds no finetuned plans yet; go on with it, or leave it out of --join")
    results = TrialLog(logs[0], settings.fingerprint(task)).results.values()
    return [_known(result) for result in results if result.trial.discriminator == "pruned"]


def _known(result: TrialResult) -> Known:
    return Known(result.trial.plan, result.row[KID], result.trial.key)


def work(options: Options, folder: SurveyFolder, watch: Watch) -> None:
    """Finetune what the log does not have."""
    settings = settings_of(options)
    task = load_task(settings.task, settings.device)
    if not folder.dense.is_file():
        with watch.stage("dense pair"):
            write_json(folder.dense, plain(dense_row(task, settings)))
    plans = [NamedPlan(item["label"], item["kind"], Plan.from_dict(item)) for item in read_json(folder.plans)]
    trials = [Trial(named.label, named.plan, seed) for named in plans for seed in range(options.seeds)]
    with watch.stage("finetune", len(trials)) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        with leaving_out_diverged(watch.console):
            run_trials(settings, trials, folder.finetuned, workers=options.workers, on_done=on_done)


def collect(options: Options, folder: SurveyFolder) -> list[Finetuned]:
    """All finetuned plans, each once: results of equal plans in several studies are taken together."""
    settings = settings_of(options)
    task = load_task(settings.task, settings.device)
    own = TrialLog(folder.finetuned, settings.fingerprint(task)).results.values()
    rows = [(FOUND if r.trial.label.startswith(FOUND) else OWN, _known(r)) for r in own]
    # folders before files: an example is the mean of finetunings that its folder may hold singly
    for path in sorted(options.join, key=Path.is_file):
        rows += [(path.stem if path.is_file() else path.name, one) for one in joined(path, settings, task)]
    found: dict[str, Finetuned] = {}
    seen: set[Hashable] = set()
    for source, one in rows:
        known = found.get(one.plan.key, Finetuned(source, one.plan, ()))
        if one.key in seen or (known.kid and one.key == one.plan.key):
            continue
        seen.add(one.key)
        found[one.plan.key] = Finetuned(known.source, one.plan, (*known.kid, one.kid))
    return list(found.values())


def score(
    plans: Sequence[Finetuned], options: Options, folder: SurveyFolder, watch: Watch
) -> list[Mapping[str, float]]:
    """The gaps of every plan before finetuning; those in the folder's log are not measured again."""
    settings, images = settings_of(options), image_counts(options.quick)
    task = load_task(settings.task, settings.device)
    with watch.stage("score", len(plans)) as stage:
        scorer = task.scorer(
            options.cost,
            weights=settings.elastic(task),
            probe=images.probe,
            statistics_images=images.statistics,
        )
        counted = CountedScorer(scorer, EvaluationLog(folder.evaluations, scorer.fingerprint))
        gaps = []
        for one in plans:
            gaps.append(counted.score(one.plan).gaps)
            stage.advance()
    return gaps


def fit(
    plans: Sequence[Finetuned], gaps: Sequence[Mapping[str, float]], options: Options, folder: SurveyFolder
) -> Surrogate:
    """The surrogate of all plans."""
    settings = settings_of(options)
    task = load_task(settings.task, settings.device)
    scope = Scope(settings.weights_hash(task), KID, FORMULAS)
    searched = [Searched(**one) for one in read_json(folder.searched)]
    for path in options.join:
        if path.is_file():
            searched += [one for one in load_surrogate(path).searched if one not in searched]
    return Surrogate.fitted(
        [one.plan for one in plans],
        gaps,
        [statistics.fmean(one.kid) for one in plans],
        read_json(folder.dense)[KID],
        task.dense_widths,
        scope,
        searched,
    )


def judge(plans: Sequence[Finetuned], surrogate: Surrogate) -> tuple[dict[str, Judged], NDArray[np.float64]]:
    """How good the predictions of unseen plans are, by source and over all.

    Returns:
        Source → figures, and the (k,) left-out predictions of the KID.
    """
    known = np.log([statistics.fmean(one.kid) / surrogate.dense for one in plans])
    left_out = np.array(surrogate.leave_one_out())
    sources = [one.source for one in plans]
    found = {}
    for source in [*dict.fromkeys(sources), "all"]:
        rows = np.array([source in ("all", other) for other in sources])
        error = left_out[rows, 0] - known[rows]
        apart = Interval(math.nan, math.nan, math.nan)
        if 0 < rows.sum() < len(plans) - FEWEST:
            said = surrogate.leave_out(rows)
            apart = kendall_interval([mean for mean, _ in said], known[rows])
        found[source] = Judged(
            int(rows.sum()),
            kendall_interval(left_out[rows, 0], known[rows]),
            apart,
            float(np.sqrt((error**2).mean())),
            float(np.sqrt(((error / left_out[rows, 1]) ** 2).mean())),
        )
    return found, surrogate.dense * np.exp(left_out[:, 0])


def report(options: Options, folder: SurveyFolder, watch: Watch) -> None:
    """Write the surrogate, ``survey.json``, ``table.md`` and ``predicted.png`` and ``.pdf``."""
    plans = collect(options, folder)
    surrogate = fit(plans, score(plans, options, folder, watch), options, folder)
    judged, predicted = judge(plans, surrogate)
    task = load_task(options.task, pick_device(options.device))
    costs = {agent: task.cost_model(agent) for agent in AGENTS}
    reach = {kind: surrogate.reach(costs, kind) for kind in ("macs", "params")}  # type: ignore[arg-type]
    document = {
        "dense": surrogate.dense,
        "reach": reach,
        "sources": judged,
        "plans": [
            {"source": one.source, **one.plan.to_dict(), KID: one.kid, "predicted": value}
            for one, value in zip(plans, predicted, strict=True)
        ],
    }
    write_json(folder.report, plain(document))
    surrogate.save(folder.surrogate)
    write_text(folder.table, table(judged, reach, surrogate))
    clouds = [Cloud("predicted KID of plans left out", "prediction", predicted, judged["all"].tau.value)]
    means = np.array([[statistics.fmean(one.kid)] for one in plans])
    title = f"{options.task}: {len(plans)} plans"
    publish(calibration(clouds, means, kinds_of(plans), title=title), folder.figure)


def kinds_of(plans: Sequence[Finetuned]) -> list[str]:
    """What each plan is drawn as: its source; where there are too many, all that joined look alike."""
    sources = [one.source for one in plans]
    if len(set(sources)) <= MOST_SERIES:
        return sources
    return [source if source in (OWN, FOUND) else "joined" for source in sources]


def table(judged: Mapping[str, Judged], reach: Mapping[str, Mapping[str, Any]], surrogate: Surrogate) -> str:
    """The report as Markdown."""
    led = "; ".join(
        f"{one.cost} " + ", ".join(f"{agent} {share:g}" for agent, share in one.budgets.items())
        for one in surrogate.searched
    )
    spans = "; ".join(
        f"{kind}: " + ", ".join(f"{agent} {low:.1%} to {high:.1%}" for agent, (low, high) in spans.items())
        for kind, spans in reach.items()
    )
    lines = [
        f"{len(surrogate.examples)} finetuned plans; the dense pair has KID {surrogate.dense:.3f}. "
        f"They reach over {spans}. They may lead searches at: {led or 'no budget'}; a search adds "
        f"{CAUTION:g} standard deviations to every prediction.",
        "",
    ]
    heads = ["plans of", "number", "τ, left out singly", "τ, left out together"]
    tabled = [[*heads, "error, log KID", "in deviations"]]
    for source, row in judged.items():
        one, apart = (
            "" if math.isnan(t.value) else f"{t.value:.2f} [{t.low:.2f}, {t.high:.2f}]"
            for t in (row.tau, row.apart)
        )
        tabled.append([source, str(row.plans), one, apart, f"{row.error:.3f}", f"{row.z:.2f}"])
    return "\n".join([*lines, markdown_table(tabled)]) + "\n"


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
