"""One run of a comparison: its options, its named ablation, its folder, and who searches it in a worker."""

from __future__ import annotations

import os
import shutil
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from agents.registry import RULES, WITHOUT_OBSERVATIONS, WITHOUT_STEPS
from envs.pruning_env import PruningEnv, Reward
from envs.rewards import Weights
from experiments.build import (
    ImageCounts,
    build_budgets,
    build_learner,
    elastic_options,
    image_counts,
    warm_up,
    with_latency,
)
from experiments.credit import share_credit, write_credit
from experiments.runs import RunFolder, describe_run, plain
from experiments.searching import Incumbent, Problem, find, judging, learn, write_plans
from experiments.trials import Discriminator, Settings
from gan.cost import DEFAULT_COST, CostKind
from gan.elastic import ElasticOptions
from gan.errors import unknown
from gan.evaluations import CountedScorer, EvaluationLog, PlanScorer
from gan.files import file_hash, write_json
from gan.tasks import Start, Task, load_task, named_elastic, save_elastic

FULL = "full"
"""The variant that nothing is taken from."""
ABLATIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "no_feedback": {"feedback": False},
    "generator_only": {"held": ("discriminator",)},
    "whole_discriminator": {"held": ("discriminator",), "discriminator": "dense"},
    "discriminator_only": {"held": ("generator",)},
    "without_density": {"weights.density": 0.0},
    "without_fidelity": {"weights.fidelity": 0.0},
    "without_balance": {"weights.balance": 0.0},
    "without_recovery": {"weights.recovery": 0.0},
    "final_reward": {"reward": "final"},
    "step_reward": {"reward": "step"},
    "own_critics": {"algo": "ippo"},
    "raw_weights": {"start": "dense"},
}
"""Variant → what it changes in ``RunOptions``; a dot reaches into the weights of the reward families.

``generator_only`` leaves the discriminator uniform at its budget; ``whole_discriminator`` is the same search,
finetuned beside the whole dense discriminator. ``raw_weights`` searches and finetunes raw slices of the dense
pair.
"""
QUICK_WARM_UP = 10
"""Steps of a warm-up with ``--quick``."""
SCORERS = 3
"""Scorers that a worker keeps: one, and those of the raw weights beside it."""


@dataclass(frozen=True)
class RunOptions:
    """Options of one run of a comparison, resolved; they stand in its ``options.json``."""

    task: str = "edges2emoji"
    """Embedded task."""
    algo: str = "mappo"
    """Learner."""
    variant: str = FULL
    """Name of the ablation."""
    seed: int = 0
    """Of the search."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Share of the cost to keep."""
    cost: CostKind = DEFAULT_COST
    """What the budget is a share of."""
    evaluations: int = 300
    """Plans that the search may score."""
    start: Start = "elastic"
    """Slices of elastic weights, or of the raw dense ones."""
    reward: Reward = "final"
    """Paid at the end of an episode, or at every step."""
    weights: Weights = field(default_factory=Weights)
    """Weights of the reward families."""
    feedback: bool = True
    """Whether agents see what their peer and the last joint step did."""
    held: tuple[str, ...] = ()
    """Agents whose networks stay uniform."""
    discriminator: Discriminator = "pruned"
    """Which discriminator the result is finetuned beside."""
    epochs: int = 10
    """Epochs of finetuning."""
    quick: bool = False
    """Few images and epochs."""

    @property
    def cell(self) -> str:
        """Runs of one cell compare directly."""
        return f"{Path(self.task).name}-{self.cost}-{_flat(self.budget)}"

    @property
    def place(self) -> str:
        """The cell in words."""
        return f"{Path(self.task).name}, {self.budget.replace('=', ' ').replace(',', ', ')} of {self.cost}"

    @property
    def label(self) -> str:
        """Runs of one label differ in nothing but their seed, within a cell."""
        return self.algo if self.variant == FULL else f"{self.algo}, {self.variant.replace('_', ' ')}"

    @property
    def name(self) -> str:
        """Of the run's folder, below that of its cell."""
        parts = [self.algo, *([] if self.variant == FULL else [self.variant]), f"s{self.seed}"]
        return "-".join(parts)

    @property
    def problem(self) -> Problem:
        return Problem.of_run(plain(self))

    @property
    def images(self) -> ImageCounts:
        return image_counts(self.quick)

    def varied(self, variant: str) -> RunOptions:
        """These options with one named change.

        Raises:
            UserError: there is no such variant.
        """
        if variant not in ABLATIONS:
            raise unknown("variant", variant, ABLATIONS)
        changed = self
        for name, value in ABLATIONS[variant].items():
            outer, _, inner = name.partition(".")
            if inner:
                value = replace(getattr(changed, outer), **{inner: value})
            changed = replace(changed, **{outer: value})
        return replace(changed, variant=variant)

    @property
    def noticed(self) -> RunOptions:
        """What the learner can notice of these options; runs that are equal in it have equal results."""
        usual, changed = RunOptions(), replace(self, variant="")
        if self.algo in WITHOUT_STEPS:
            changed = replace(changed, reward=usual.reward)
        if self.algo in WITHOUT_OBSERVATIONS:
            changed = replace(changed, feedback=usual.feedback)
        if self.algo == "uniform":  # its plan is the one that held networks have, whatever is paid
            changed = replace(changed, weights=usual.weights, held=usual.held)
        return changed

    @property
    def twin(self) -> RunOptions | None:
        """The variant whose search is this one's: it differs in what its result is finetuned beside alone."""
        if self.discriminator == "pruned":
            return None
        same = {name: value for name, value in ABLATIONS[self.variant].items() if name != "discriminator"}
        variant = next((name for name, changes in ABLATIONS.items() if changes == same), None)
        return replace(self, variant=variant, discriminator="pruned") if variant else None


class Place(NamedTuple):
    """What a scorer and its reference plans depend on.

    Attributes:
        task: name of the task.
        cost: what budgets speak of.
        budget: as in ``--budget``.
        weights: ``elastic`` (the task's own), ``dense``, or a file of elastic ones.
    """

    task: str
    cost: CostKind
    budget: str
    weights: str

    @property
    def start(self) -> Start:
        return "dense" if self.weights == "dense" else "elastic"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{Path(self.task).name}-{self.cost}-{_flat(self.budget)}-{Path(self.weights).stem}"


def _flat(budget: str) -> str:
    """A budget as part of a file's name."""
    return budget.replace("=", "").replace(",", "-")


@dataclass(frozen=True)
class Study:
    """A comparison on disk, and what all of its runs share; travels to the workers.

    Attributes:
        path: folder of the comparison.
        weights: of the reward families, by which all plans are judged in the end.
        device: where the networks run.
        warm_up: steps of an elastic warm-up of one's own for every task and seed; 0 takes the shipped weights
            where a task has them, and a warm-up of the default length where it has none.
        quick: few images.
    """

    path: Path
    weights: Weights
    device: str = "cpu"
    warm_up: int = 0
    quick: bool = False

    def run(self, run: RunOptions) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.path / "runs" / run.cell / run.name)

    def result(self, run: RunOptions) -> Path:
        """What came out of a search; written last, so a run that has it is done."""
        return self.run(run).path / "result.json"

    def references(self, place: Place) -> Path:
        """Evaluation log of the plans that scores are measured against; a run begins with a copy."""
        return self.path / "references" / f"{place.name}.jsonl"

    def finetuned(self, task: str, weights: str) -> Path:
        """Log of the finetunings from these weights."""
        return self.path / "finetuned" / f"{Path(task).name}-{Path(weights).stem}.jsonl"

    def latency(self, task: str) -> Path:
        """Measured tables, for budgets of latency."""
        return self.path / f"latency-{Path(task).name}.json"

    def task(self, name: str, cost: CostKind = DEFAULT_COST) -> Task:
        """A task, with its latency tables where they are needed."""
        task = load_task(name, self.device)
        return with_latency(task, self.latency(name)) if cost == "latency" else task

    def elastic(self, task: str, seed: int) -> str:
        """What the runs of a task and seed are cut from: ``elastic`` (shipped), or the file of a warm-up."""
        if not self.warm_up and load_task(task, self.device).elastic_path is not None:
            return "elastic"
        return str(self.path / "elastic" / f"{Path(task).name}-s{seed}.safetensors")

    @property
    def warm_up_steps(self) -> int:
        """Of a warm-up, where one is needed."""
        return QUICK_WARM_UP if self.quick else self.warm_up or ElasticOptions().steps

    def place(self, run: RunOptions, judged: bool = False) -> Place:
        """Where a run's plans are scored, or judged: there always by elastic weights."""
        raw = run.start == "dense" and not judged
        return Place(run.task, run.cost, run.budget, "dense" if raw else self.elastic(run.task, run.seed))

    def settings(self, run: RunOptions, judged: bool = False) -> Settings:
        """How a run's plan is finetuned, or, judged, the uniform plan that it is compared with.

        Measured on the test images, which nothing was chosen on.
        """
        weights = self.place(run, judged).weights
        return Settings.of(run.task, weights, run.epochs, run.images, self.device, "test")


@dataclass(frozen=True)
class WarmUp:
    """The elastic weights of one task and seed, for all of its budgets.

    Attributes:
        task: name of the task.
        seed: of the warm-up.
        cost: what budgets speak of.
        budgets: as in ``--budget``; the smallest plan is uniform at the lowest of them.
        file: where the weights go.
        steps: of the warm-up.
    """

    task: str
    seed: int
    cost: CostKind
    budgets: tuple[str, ...]
    file: Path
    steps: int


Job = WarmUp | Place | RunOptions


@dataclass(frozen=True)
class Factory:
    """Makes a worker's :class:`Searcher`, in the worker, which gets one thread."""

    study: Study

    def __call__(self) -> Searcher:
        torch.set_num_threads(1)
        return Searcher(self.study)


class Done(NamedTuple):
    """A finished job.

    Attributes:
        name: what it was.
        note: what came out, in a few words.
        seconds: that it took.
    """

    name: str
    note: str
    seconds: float


class Searcher:
    """Does the jobs of a comparison, one after the other; keeps the last scorers.

    Args:
        study: where everything goes.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._scorers: OrderedDict[Place, PlanScorer] = OrderedDict()

    def __call__(self, job: Job) -> Done:
        """Do a job, or what an interruption has left of it."""
        started = time.perf_counter()
        if isinstance(job, WarmUp):
            name, note = f"warm-up {job.task} s{job.seed}", self.warm_up(job)
        elif isinstance(job, Place):
            name, note = f"references {job.name}", self.prepare(job)
        else:
            name, note = f"{job.cell} {job.name}", self.search(job)
        return Done(name, note, time.perf_counter() - started)

    def warm_up(self, job: WarmUp) -> str:
        """Train elastic weights."""
        task = self.study.task(job.task, job.cost)
        budgets = [build_budgets(text) for text in job.budgets]
        lowest = {
            agent: min((each[agent] for each in budgets), key=lambda budget: budget.low)
            for agent in budgets[0]
        }
        made = warm_up(task, lowest, job.cost, elastic_options(task, job.steps, job.seed))
        job.file.parent.mkdir(exist_ok=True)
        save_elastic(job.file, made, task)
        return f"{job.steps} steps"

    def scorer(self, place: Place) -> PlanScorer:
        """A ready scorer."""
        if place not in self._scorers:
            task = self.study.task(place.task, place.cost)
            images = image_counts(self.study.quick)
            weights = named_elastic(place.weights, task)
            problem = Problem(place.budget, 1, place.cost, place.start)
            self._scorers[place] = problem.scorer(task, weights, images, place.weights == "elastic")
            if len(self._scorers) > SCORERS:
                self._scorers.popitem(last=False)
        return self._scorers[place]

    def prepare(self, place: Place) -> str:
        """Score the plans that all scores at a place are measured against."""
        path = self.study.references(place)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        scorer = self.scorer(place)
        log = EvaluationLog(partial, scorer.fingerprint)
        PruningEnv(CountedScorer(scorer, log), build_budgets(place.budget)).prepare()
        partial.replace(path)
        return f"{len(log.scores)} plans"

    def search(self, run: RunOptions) -> str:
        """Search, judge every best plan on the common yardstick, share the credit."""
        folder, place = self.study.run(run), self.study.place(run)
        folder.path.mkdir(parents=True, exist_ok=True)
        scorer = self.scorer(place)
        known = self.study.references(place)
        if run.twin is not None and self.study.result(run.twin).is_file():
            known = self.study.run(run.twin).evaluations
        self._begin(folder.evaluations, known)
        describe_run(folder, run, device=self.study.device, threads=torch.get_num_threads())
        self._refer(folder, run, place)
        env = run.problem.env(scorer, folder)
        agent = build_learner(run.algo, run.seed, None)
        env.prepare()
        log = env.scorer.log
        assert log is not None
        started = time.perf_counter()
        incumbents = learn(env, agent, folder)
        # what is read from the log took its time before an interruption
        seconds = log.search_seconds + time.perf_counter() - started
        found = find(env, agent)
        if run.algo in RULES:
            incumbents = [Incumbent(env.scorer.evaluations, found["best"])]
        write_plans(folder, found)
        yardstick = self.yardstick(run, env)
        judged = [yardstick.evaluate(one.evaluation.plan, counted=False) for one in incumbents]
        best = judged[-1]
        credit = write_credit(folder, share_credit(yardstick, best.plan))
        proposed = yardstick.evaluate(found["proposed"].plan, counted=False)
        result = {
            "score": best.potential,
            "own_score": found["best"].potential,
            "proposed_score": proposed.potential,
            "gaps": best.scores.gaps,
            "scores": best.term_scores,
            "plan": best.plan.to_dict(),
            "uniform": env.uniform_plan().to_dict(),
            "curve": {
                "evaluations": [one.evaluations for one in incumbents],
                "score": [one.potential for one in judged],
            },
            "credit": credit,
            "evaluations": env.scorer.evaluations,
            "requests": env.scorer.requests,
            "replay_left": env.scorer.replay_left,
            "seconds": round(seconds, 2),
        }
        write_json(self.study.result(run), plain(result))
        return f"score {best.potential:+.3f}"

    def yardstick(self, run: RunOptions, env: PruningEnv) -> PruningEnv:
        """Where the plans of all variants of a cell and seed are judged alike."""
        place = self.study.place(run, judged=True)
        if place == self.study.place(run):
            return judging(env, self.study.weights)
        path = self.study.run(run).path / "yardstick.jsonl"
        self._begin(path, self.study.references(place))
        scorer = self.scorer(place)
        return judging(
            env, self.study.weights, CountedScorer(scorer, EvaluationLog(path, scorer.fingerprint))
        )

    @staticmethod
    def _begin(log: Path, known: Path) -> None:
        """A new log begins with what is known, so that no run has to score that again."""
        if not log.exists():
            beside = log.with_suffix(".new")
            shutil.copyfile(known, beside)
            beside.replace(log)

    def _refer(self, folder: RunFolder, run: RunOptions, place: Place) -> None:
        """What the run's plans are cut from, and what its budget is counted with, as other programs ask."""
        reference: dict[str, str] = {"start": place.start}
        if place.start == "elastic":
            shipped = place.weights == "elastic"
            path = self.study.task(run.task).elastic_path if shipped else Path(place.weights)
            assert path is not None
            reference |= {"file": path.name, "hash": file_hash(path)}
            if not shipped and not folder.elastic.exists():
                _link(path, folder.elastic)
        if run.cost == "latency" and not folder.latency.exists():
            _link(self.study.latency(run.task), folder.latency)
        write_json(folder.elastic_reference, reference)


def _link(file: Path, place: Path) -> None:
    """The same file at another place; a copy where the file system knows no links."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
