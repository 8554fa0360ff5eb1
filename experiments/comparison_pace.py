"""What a comparison still has to do, and how long it will take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from agents.registry import RULES
from envs.budget import project, random_proportions
from envs.references import SPREAD_PLANS
from experiments.build import build_budgets, finetuning_of, smallest_plan
from experiments.comparison import Job, RunOptions, Study, WarmUp
from experiments.runs import counted_evaluations, read_json
from experiments.searching import Problem
from experiments.trials import Settings, Trial, TrialLog
from gan.distillation import Ingredients
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.plans import Plan
from gan.tasks import Task, load_task
from gan.training import TrainingProgress

PROBED_PLANS = 5
"""Plans that are scored to say how long scoring takes; the first is left out."""
PROBED_BATCHES = 4
"""Training steps of each of the two epochs that say how long finetuning takes; the first is left out."""

JUDGED_IMAGES = 32
"""Test images on which it is timed how long measuring a result takes."""


class Scale(NamedTuple):
    """How much is done at once, and how often.

    Attributes:
        workers: processes.
        finetuning_seeds: finetunings of every plan.
    """

    workers: int
    finetuning_seeds: int


class Countdown:
    """A line for every finished job, with the time that the others will take.

    Args:
        console: where it is printed.
        total: jobs.
        kind: what they are.
        workers: how many of them are under way at once.
    """

    def __init__(self, console: Console, total: int, kind: str, workers: int) -> None:
        self._console, self._total, self._kind, self._workers = console, total, kind, workers
        self._seconds: list[float] = []

    def tick(self, name: str, note: str, seconds: float) -> None:
        """A job is done: what it was, what came out, how long it took."""
        self._seconds.append(seconds)
        done = len(self._seconds)
        # of each job's own time: by the clock, the first of two that run side by side would count for both
        left = shared([statistics.fmean(self._seconds)] * (self._total - done), self._workers)
        self._console.print(
            f"  {done}/{self._total} {name}: {note}, {seconds:.0f} s; about {span(left)} of "
            f"{self._kind} left",
            highlight=False,
            soft_wrap=True,
        )


# What is to do


def missing_jobs(study: Study, runs: Sequence[RunOptions]) -> dict[str, list[Job]]:
    """Kind → jobs without a result, in the order in which the kinds have to be done."""
    searches = [run for run in runs if not study.result(run).is_file()]
    places = [place for run in searches for place in (study.place(run), study.place(run, judged=True))]
    references = [place for place in dict.fromkeys(places) if not study.references(place).is_file()]
    return {
        "warm-ups": [*missing_warm_ups(study, runs)],
        "references": [*references],
        "searches": [*searches],
    }


def missing_evaluations(study: Study, run: RunOptions) -> int:
    """Plans that a search without a result has still to score, at most.

    What an interrupted one has paid for is in its log; one is left for judging what it found.
    """
    if run.algo in RULES:
        return 1
    return max(1, run.evaluations - counted_evaluations(study.run(run)))


def missing_warm_ups(study: Study, runs: Sequence[RunOptions]) -> list[WarmUp]:
    """Elastic weights that have to be trained, one for each task and seed."""
    wanted = {(run.task, run.seed): run for run in runs}
    files = {key: study.elastic(*key) for key in wanted}
    budgets = tuple(dict.fromkeys(run.budget for run in runs))
    return [
        WarmUp(task, seed, wanted[task, seed].cost, budgets, Path(file), study.warm_up_steps)
        for (task, seed), file in files.items()
        if file != "elastic" and not Path(file).is_file()
    ]


class Wanted(NamedTuple):
    """A plan that a run needs finetuned.

    Attributes:
        run: whose it is.
        uniform: the uniform plan of its cell instead of its best one.
    """

    run: RunOptions
    uniform: bool


def by_log(study: Study, runs: Sequence[RunOptions]) -> dict[tuple[Path, Settings], list[Wanted]]:
    """The plans that are finetuned alike, from the same weights, by the log of it.

    The uniform plan is always cut from elastic weights, so that one number stands behind all variants of a
    cell: beside the uniform plan of raw weights, which ends far worse, raw weights would look like a gain.
    """
    groups: dict[tuple[Path, Settings], list[Wanted]] = {}
    for wanted in (Wanted(run, uniform) for run in runs for uniform in (False, True)):
        settings = study.settings(wanted.run, judged=wanted.uniform)
        log = study.finetuned(wanted.run.task, settings.weights)
        groups.setdefault((log, settings), []).append(wanted)
    return groups


def trials_of(study: Study, wanted: Wanted, seeds: Sequence[int]) -> list[Trial]:
    """The finetunings of a plan, after the search of its run."""
    run, result = wanted.run, read_json(study.result(wanted.run))
    if wanted.uniform:
        uniform = Plan.from_dict(result["uniform"])
        return [Trial(f"{run.cell} uniform", uniform, seed) for seed in seeds]
    plan = Plan.from_dict(result["plan"])
    return [Trial(f"{run.cell} {run.name}", plan, seed, run.discriminator) for seed in seeds]


def missing_trials(settings: Settings, trials: Sequence[Trial], log: Path) -> int:
    """How many different trials are still to be trained."""
    keys = {trial.key for trial in trials}
    if log.exists():
        journal = TrialLog(log, settings.fingerprint(load_task(settings.task, settings.device)))
        keys -= {*journal.results, *journal.diverged}
    return len(keys)


# How long it will take


class Pace(NamedTuple):
    """Seconds of the parts of a comparison, on one thread.

    Attributes:
        plan: to score a plan.
        trial: to finetune a plan and to measure it; 0 where nothing is trained.
        step: of an elastic warm-up; likewise.
    """

    plan: float
    trial: float
    step: float


def announce(study: Study, runs: Sequence[RunOptions], scale: Scale, console: Console) -> None:
    """Measure a few plans and training steps, and say how long the rest will take."""
    jobs = missing_jobs(study, runs)
    left, trains = len(jobs["searches"]), bool(jobs["warm-ups"] or scale.finetuning_seeds)
    kinds, cells = ({getattr(run, name) for run in runs} for name in ("label", "cell"))

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"{len(runs)} runs: {len(kinds)} kind(s), {len(cells)} cell(s)")
    if left < len(runs):
        say(f"{len(runs) - left} of them are done")
    paces = {run.task: probe(study, run, trains) for run in {run.task: run for run in runs}.values()}
    for task, pace in paces.items():
        tuning = f", {span(pace.trial)} to finetune and measure one" if scale.finetuning_seeds else ""
        say(f"{task}: {pace.plan:.2f} s to score a plan{tuning}, by a short probe on one thread")
    seconds = forecast(study, runs, scale, paces.__getitem__)
    parts = ", ".join(f"{name} {span(each)}" for name, each in seconds.items() if each > 0)
    workers = "1 worker" if scale.workers == 1 else f"{scale.workers} workers"
    total = span(math.fsum(seconds.values()))
    say(f"at most about {total} with {workers} on idle cores: {parts or 'no work'}")


def forecast(
    study: Study, runs: Sequence[RunOptions], scale: Scale, pace: Callable[[str], Pace]
) -> dict[str, float]:
    """Stage → wall seconds; learners that stop early or find the same plan twice need less.

    Args:
        study: what is done already.
        runs: all of them.
        scale: workers and finetuning seeds.
        pace: task → how long its parts take.
    """
    jobs = missing_jobs(study, runs)
    counts: dict[str, list[float]] = {
        "warm-ups": [job.steps * pace(job.task).step for job in jobs["warm-ups"] if isinstance(job, WarmUp)],
        "references": [(SPREAD_PLANS + 1) * pace(job.task).plan for job in jobs["references"]],
        "searches": [
            missing_evaluations(study, run) * pace(run.task).plan
            for run in jobs["searches"]
            if isinstance(run, RunOptions)
        ],
        "finetuning": [],
    }
    seeds = range(scale.finetuning_seeds)
    for (path, settings), group in by_log(study, runs).items() if seeds else ():
        done = [wanted for wanted in group if study.result(wanted.run).is_file()]
        trials = [trial for wanted in done for trial in trials_of(study, wanted, seeds)]
        # of the others no plan is known yet: each may be a new one, and the uniform one of each new cell is
        left = [wanted for wanted in group if wanted not in done]
        cells = {one.run.cell for one in left if one.uniform} - {one.run.cell for one in done if one.uniform}
        new = (sum(not one.uniform for one in left) + len(cells)) * len(seeds)
        number = missing_trials(settings, trials, path) + new
        counts["finetuning"] += [pace(settings.task).trial] * number
    return {kind: shared(seconds, scale.workers) for kind, seconds in counts.items()}


def shared(seconds: Sequence[float], workers: int) -> float:
    """Wall seconds of jobs that are handed out one by one to whoever is free."""
    ends = [0.0] * workers
    for each in seconds:
        ends[ends.index(min(ends))] += each
    return max(ends)


def span(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def probe(study: Study, run: RunOptions, trains: bool) -> Pace:
    """Score a few random plans and train a few steps, on one thread.

    Args:
        study: its device.
        run: one of the task.
        trains: whether there is anything to train.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = load_task(run.task, study.device)
        trial, step = seconds_of_training(task, run) if trains else (0.0, 0.0)
        return Pace(seconds_per_plan(task, run), trial, step)
    finally:
        torch.set_num_threads(threads)


def seconds_per_plan(task: Task, run: RunOptions) -> float:
    """Median seconds to score a random plan of raw weights: they cost what elastic ones cost."""
    problem = Problem(run.budget, 1, "params", "dense")
    scorer = problem.scorer(task, task.ordered(), run.images, shipped=False)
    rng, times = np.random.default_rng(0), []
    for _ in range(PROBED_PLANS):
        widths = {
            agent: project(network, random_proportions(network, rng), problem.budgets[agent].low).widths
            for agent, network in scorer.networks.items()
        }
        started = time.perf_counter()
        scorer.score(Plan.of(widths, scorer.ranking))
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def seconds_of_training(task: Task, run: RunOptions) -> tuple[float, float]:
    """Seconds of a whole finetuning with its measurement, and of a step of the elastic warm-up."""
    dense = task.networks["generator"], task.networks["discriminator"]
    plan = Plan.of(smallest_plan(task, build_budgets(run.budget), "params"), "l1")
    pair = task.cut(task.ordered(), plan)
    options = finetuning_of(task, 2, 0)
    few = task.train.take(PROBED_BATCHES * options.batch_size)
    ends: list[float] = []

    def on_epoch(progress: TrainingProgress) -> None:
        ends.append(progress.seconds)

    task.finetuner(*pair, dense[0], options, Ingredients()).fit(few, on_epoch)
    step = (ends[1] - ends[0]) / max(1, len(few) // options.batch_size)
    judge = Judge.build(*dense, task.test.take(JUDGED_IMAGES), load_extractor(device=task.device))
    started = time.perf_counter()
    judge.row(*pair)
    share = len(task.test.take(run.images.judged)) / len(task.test.take(JUDGED_IMAGES))
    measured = 2 * share * (time.perf_counter() - started)  # before and after finetuning
    steps = run.epochs * max(1, len(task.train.take(run.images.train)) // options.batch_size)
    # a step of the warm-up trains three widths of the generator
    return steps * step + measured, 3 * step
