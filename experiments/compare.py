"""Compare learners and ablations honestly: the same plans to score, the same finetuning, intervals."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from agents.registry import AGENTS as LEARNERS
from agents.registry import resolve_agent
from envs.rewards import Weights
from experiments import cli
from experiments.build import build_budgets, check_learner, check_reachable, fixed_shares, pick_device
from experiments.comparison import ABLATIONS, FULL, Done, Factory, Job, RunOptions, Study
from experiments.comparison_pace import (
    Countdown,
    Scale,
    Wanted,
    announce,
    by_log,
    missing_jobs,
    missing_trials,
    trials_of,
)
from experiments.comparison_report import Outcome, Tuned, write_report
from experiments.runs import (
    RunFolder,
    check_least,
    create_run,
    describe_run,
    given_options,
    open_run,
    read_json,
    resumed_options,
)
from experiments.trials import TrialResult, run_trials
from experiments.watch import Stage, Watch
from experiments.workers import work_off
from gan.cost import DEFAULT_COST
from gan.errors import UserError, unknown
from gan.evaluation import KID
from gan.tasks import load_task

DESCRIPTION = """Algorithms × variants × tasks × budgets × seeds, each with the same number of evaluations;
every best plan is finetuned alike and measured on unseen images. Says beforehand how long it will take, goes
on where it was interrupted, and writes tidy tables, a report and figures."""
EXAMPLES = (
    ("python experiments/compare.py --output runs/comparison", "all learners, five seeds"),
    ("python experiments/compare.py --algos mappo random uniform --seeds 3 --output FOLDER", "three of them"),
    ("python experiments/compare.py --algos mappo --variants all --output FOLDER", "what each part is for"),
    ("python experiments/compare.py --algos mappo random --quick --output FOLDER", "a look around"),
    ("python experiments/compare.py --resume FOLDER", "go on after an interruption"),
    ("python experiments/compare.py --resume FOLDER --seeds 7", "with more seeds than before"),
)
FREE_ON_RESUME = ("resume", "output", "workers", "only_plan")
"""Options that may differ from those of the interrupted comparison: no result depends on them."""
GROWING = ("algos", "variants", "tasks", "budgets", "seeds", "finetuning_seeds")
"""Options of which ``--resume`` may ask for more, or less: finished runs stay and are used where they fit."""

MOST_ON_CUDA = 4
"""Workers that share a GPU by default: each holds a context and the networks in its memory."""


@dataclass(frozen=True)
class Options:
    """Options of ``compare.py``."""

    algos: tuple[str, ...] = ()
    """Learners by their names in agents/registry.py; without it all of them."""
    variants: tuple[str, ...] = ()
    """Named ablations of each learner, or all; without it only the full method."""
    tasks: tuple[str, ...] = ()
    """Embedded tasks; without it edges2emoji."""
    budgets: tuple[str, ...] = ()
    """Shares of the cost to keep, each as in train_agents.py; without it generator=0.1,discriminator=0.5."""
    seeds: int | None = None
    """Searches of every kind, with the seeds 0, 1, …; 5 without it."""
    finetuning_seeds: int | None = None
    """Finetunings of every best plan, with the seeds 0, 1, …; 0 finetunes nothing, 1 without it."""
    cost: Literal["macs", "params", "latency"] = DEFAULT_COST
    """What the budgets are a share of."""
    evaluations: int = 300
    """Plans that each search may score."""
    reward: Literal["step", "final"] = "final"
    """Pay the gain at the end of the episode, for one evaluation each, or at every step."""
    weights: Weights = field(default_factory=Weights)
    """Weights of the reward families; all plans are judged by them in the end."""
    epochs: int = 10
    """Epochs of a finetuning."""
    warm_up: int = 0
    """Steps of an elastic warm-up for each task and seed, shared by its runs (0: the shipped weights)."""
    output: Path | None = None
    """New folder."""
    resume: Path | None = None
    """Go on with this folder; its own options are used, but learners, seeds, … may be added."""
    workers: int = 0
    """Processes of one thread each; 0 takes one for each core, at most 4 on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    only_plan: bool = False
    """Say how long it would take, and stop."""
    quick: bool = False
    """Few evaluations, images and epochs: a look around, no result."""

    @property
    def resolved(self) -> Options:
        """The same options with everything named that was left out."""
        variants = tuple(ABLATIONS) if "all" in self.variants else self.variants
        return replace(
            self,
            algos=tuple(map(resolve_agent, self.algos or LEARNERS)),
            variants=variants or (FULL,),
            tasks=self.tasks or (RunOptions().task,),
            budgets=self.budgets or (RunOptions().budget,),
            seeds=5 if self.seeds is None else self.seeds,
            finetuning_seeds=1 if self.finetuning_seeds is None else self.finetuning_seeds,
            evaluations=min(self.evaluations, 24) if self.quick else self.evaluations,
            epochs=1 if self.quick else self.epochs,
        )

    @property
    def scale(self) -> Scale:
        """How much is done at once, and how often."""
        assert self.finetuning_seeds is not None, "options are resolved first"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        usual = min(cores, MOST_ON_CUDA) if pick_device(self.device) == "cuda" else cores
        return Scale(self.workers or usual, self.finetuning_seeds)


def product(options: Options) -> Iterator[RunOptions]:
    """Every run of a comparison; a variant that changes nothing that its learner notices is left out.

    Seeds are the outer loop, so that an interrupted comparison has some runs of every kind. A variant that
    makes a learner another one of the comparison (``mappo`` with own critics is ``ippo``) is run as that.

    Args:
        options: resolved.
    """
    assert options.seeds is not None
    tasks, budgets = dict.fromkeys(options.tasks), dict.fromkeys(options.budgets)
    for seed, task, budget in itertools.product(range(options.seeds), tasks, budgets):
        runs = [
            RunOptions(
                task=task,
                algo=algo,
                seed=seed,
                budget=budget,
                cost=options.cost,
                evaluations=options.evaluations,
                reward=options.reward,
                weights=options.weights,
                epochs=options.epochs,
                quick=options.quick,
            ).varied(variant)
            for algo, variant in itertools.product(options.algos, options.variants)
        ]
        first: dict[RunOptions, RunOptions] = {}
        for run in sorted(runs, key=lambda run: run.variant != FULL):
            first.setdefault(run.noticed, run)
        yield from (run for run in runs if first[run.noticed] is run)


def main(options: Options) -> None:
    """Warm-ups, references, searches, finetunings, report; what is done is read."""
    console = Console()
    if options.only_plan and options.resume is None:
        options = options.resolved
        check(options)
        study = study_of(options, options.output or Path("nowhere"))
        announce(study, list(product(options)), options.scale, console)
        return
    options, folder = open_folder(options)
    study, runs = study_of(options, folder.path.resolve()), list(product(options))
    if options.only_plan:
        announce(study, runs, options.scale, console)
        return
    with cli.resumable("compare", folder.path):
        announce(study, runs, options.scale, console)
        compare(study, runs, options, console)


def compare(study: Study, runs: Sequence[RunOptions], options: Options, console: Console) -> None:
    """Do what is missing, then write the report."""
    watch, scale = Watch(console), options.scale
    for kind, jobs in missing_jobs(study, runs).items():
        work(kind, study, jobs, scale.workers, watch)
    tuned = finetune_all(study, runs, scale, watch)
    outcomes = [Outcome(run, read_json(study.result(run)), *tuned.get(run, ((), ()))) for run in runs]
    with watch.stage("report"):
        write_report(study.path, outcomes, protocol(options))
    console.print((study.path / "report.md").read_text(), highlight=False, soft_wrap=True, markup=False)
    console.print(f"everything is in {study.path}", highlight=False, soft_wrap=True)


def open_folder(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the folder, or open the one to resume.

    Raises:
        UserError: an option that no comparison can use; nothing has been written then.
    """
    more: list[str] = []
    if options.resume is not None:
        folder = open_run(options.resume)
        given = given_options(options, FREE_ON_RESUME)
        more = [name for name in GROWING if name in given]
        options = resumed_options(folder, options, (*FREE_ON_RESUME, *more)).resolved
        check(options)
    else:
        if options.output is None:
            raise UserError("the results need a folder; name a new one with --output FOLDER")
        options = options.resolved
        check(options)
        folder = create_run("comparison", "all", 0, options.output)
    if options.resume is None or (more and not options.only_plan):
        kept = replace(options, **{name: getattr(Options(), name) for name in FREE_ON_RESUME})
        describe_run(folder, kept, device=pick_device(options.device))
    return options, folder


def check(options: Options) -> None:
    """Refuse what no comparison can use.

    Args:
        options: resolved.

    Raises:
        UserError: in one sentence.
    """
    for name in options.variants:
        if name not in ABLATIONS:
            raise unknown("variant", name, ABLATIONS)
    check_least(options, seeds=1, finetuning_seeds=0, evaluations=1, epochs=1, warm_up=0, workers=0)
    for name in options.algos:
        check_learner(name)
    device = pick_device(options.device)
    for name, text in itertools.product(options.tasks, options.budgets):
        budgets = build_budgets(text)
        fixed_shares(budgets, text)
        loaded = load_task(name, device)
        if options.cost != "latency":  # whose tables are measured in the comparison's folder
            check_reachable(loaded, budgets, options.cost)
    for _ in product(options):  # a variant may leave no reward at all
        pass


def study_of(options: Options, path: Path) -> Study:
    """What all runs share, and where they lie."""
    return Study(path, options.weights, pick_device(options.device), options.warm_up, options.quick)


def protocol(options: Options) -> str:
    """How the results were made."""
    parts = [
        f"{options.evaluations} evaluations on the val images for every search, {options.seeds} seed(s); the "
        "best score is that of the best plan so far, judged by the same reward on elastic weights for all: "
        "0 = uniform, 1 = one typical difference between random plans in a term of weight 1. What is best so "
        "far is told by the search's own reward, so that the curve of another reward or of raw weights may "
        "fall.",
        "Intervals: 95 %, stratified bootstrap over the runs of each cell (Agarwal et al. 2021); IQM: the "
        "mean of the middle half of the runs (of all, where they are fewer than four). Share of a network: "
        "its part in the gain over uniform, its Shapley value, of a game of two players.",
    ]
    if options.finetuning_seeds:
        parts.append(
            f"Every best plan is finetuned for {options.epochs} epochs with {options.finetuning_seeds} "
            "seed(s); KID* (EfficientNet-Lite0 at 112 px) of the test images and their mirror images "
            "against the real targets; nothing was chosen on them. Margin swing: how far the discriminator's "
            "mean logit on real images minus that on made ones strays over the finetuning, as the standard "
            "deviation of its moving average over a 25th of the steps; smaller is steadier."
        )
    if options.finetuning_seeds and not options.warm_up:
        parts.append(
            "The uniform plan is one plan for all seeds: how far its result differs from finetuning to "
            "finetuning is in no interval."
        )
    return " ".join(parts)


def work(kind: str, study: Study, jobs: Sequence[Job], workers: int, watch: Watch) -> None:
    """Do jobs in worker processes; a line for each that is done, with what is left."""
    if not jobs:
        return
    for name, cost in {(job.task, job.cost) for job in jobs}:
        study.task(name, cost)  # latency is measured here, before workers disturb each other
    with watch.stage(kind, len(jobs)) as stage:
        countdown = Countdown(watch.console, len(jobs), kind, workers)

        def keep(done: Done) -> None:
            stage.advance(note=f"{done.name}: {done.note}")
            countdown.tick(*done)

        # runs that are scored by the same scorer are best done by one worker
        lane = lambda job: study.place(job) if isinstance(job, RunOptions) else job  # noqa: E731
        work_off(Factory(study), jobs, lane=lane, workers=workers, keep=keep)


def finetune_all(
    study: Study, runs: Sequence[RunOptions], scale: Scale, watch: Watch
) -> dict[RunOptions, Tuned]:
    """Finetune every best plan and the uniform one of its cell; equal plans are finetuned once.

    Returns:
        Run → the results of its plan and of the uniform one, one for each finetuning seed.
    """
    seeds = range(scale.finetuning_seeds)
    if not seeds:
        return {}
    tuned: dict[Wanted, tuple[TrialResult, ...]] = {}
    for (path, settings), group in by_log(study, runs).items():
        path.parent.mkdir(exist_ok=True)
        wanted = {one: trials_of(study, one, seeds) for one in group}
        trials = [trial for row in wanted.values() for trial in row]
        number = missing_trials(settings, trials, path)
        with watch.stage(f"finetune {path.stem}", number) as stage:
            countdown = Countdown(watch.console, number, "finetuning", scale.workers)

            def on_done(result: TrialResult, stage: Stage = stage, countdown: Countdown = countdown) -> None:
                stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")
                countdown.tick(result.trial.label, f"KID* {result.row[KID]:.4f}", result.seconds)

            results = run_trials(settings, trials, path, workers=scale.workers, on_done=on_done)
        known = {result.trial.key: result for result in results}
        for one, row in wanted.items():
            tuned[one] = tuple(known[trial.key] for trial in row)
    return {run: (tuned[Wanted(run, False)], tuned[Wanted(run, True)]) for run in runs}


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
