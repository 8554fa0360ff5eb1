"""Trials: finetune many plans, in worker processes, into a log that any interruption leaves readable."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from experiments.aggregate import swing
from experiments.build import ImageCounts, finetuning_of, pick_device
from experiments.workers import work_off
from gan.append_log import AppendLog
from gan.checkpoints import state_hash
from gan.cyclegan import CycleOptions
from gan.data import PairedImages
from gan.distillation import NO_INGREDIENTS, DensePair, Ingredients
from gan.elastic import ElasticNetwork
from gan.errors import Diverged, UserError, unknown
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.files import file_hash
from gan.loop import LoopOptions, TrainingProgress
from gan.plans import Plan
from gan.tasks import AGENTS, Task, load_task, named_elastic
from gan.training import Lessons, TrainingOptions

Split = Literal["val", "test"]
Discriminator = Literal["pruned", "dense"]


@dataclass(frozen=True)
class Trial:
    """A plan to finetune.

    Attributes:
        label: what the plan is called; the same plan under two labels is finetuned once.
        plan: widths of both networks.
        seed: of order, augmentation and dropout.
        discriminator: finetune beside the slice of the plan, or beside the whole dense discriminator.
    """

    label: str
    plan: Plan
    seed: int
    discriminator: Discriminator = "pruned"

    @property
    def key(self) -> tuple[str, int, str]:
        """Trials with equal keys have equal results."""
        return self.plan.key, self.seed, self.discriminator

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` reads it back and leaves alone what stands beside."""
        return {
            "label": self.label,
            "plan": self.plan.to_dict(),
            "seed": self.seed,
            "discriminator": self.discriminator,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        return cls(data["label"], Plan.from_dict(data["plan"]), data["seed"], data["discriminator"])


@dataclass(frozen=True)
class Failure:
    """A trial whose finetuning diverged.

    Attributes:
        trial: what was finetuned.
        reason: a sentence.
    """

    trial: Trial
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {**self.trial.to_dict(), "diverged": self.reason}


@dataclass(frozen=True)
class TrialResult:
    """What came out of a trial.

    Attributes:
        trial: what was finetuned.
        raw: figures (``gan.evaluation.COLUMNS``) of the slice before finetuning.
        row: the same after it.
        margin_mean: mean over the training steps of the discriminator's margin: its mean logit on real
            images minus that on made ones.
        margin_spread: standard deviation of that margin over the steps.
        seconds: of finetuning and measuring.
        margins: that margin in every training step; empty where a log of an older version has none.
        test: ``row`` on the test images, where the settings ask for it.
    """

    trial: Trial
    raw: Mapping[str, float]
    row: Mapping[str, float]
    margin_mean: float
    margin_spread: float
    seconds: float
    margins: tuple[float, ...] = ()
    test: Mapping[str, float] = field(default_factory=dict)

    @property
    def margin_swing(self) -> float:
        """How far the margin strays but for the noise of single batches; NaN without ``margins``."""
        return swing(self.margins)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` reads it back."""
        return {
            **self.trial.to_dict(),
            "raw": dict(self.raw),
            "row": dict(self.row),
            "margin_mean": self.margin_mean,
            "margin_spread": self.margin_spread,
            "seconds": round(self.seconds, 2),
            "margins": [round(margin, 4) for margin in self.margins],
            **({"test": dict(self.test)} if self.test else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialResult:
        numbers = (data[name] for name in ("margin_mean", "margin_spread", "seconds"))
        margins = tuple(map(float, data.get("margins", ())))
        mean, spread, seconds = map(float, numbers)
        raw, row, test = dict(data["raw"]), dict(data["row"]), dict(data.get("test", {}))
        return cls(Trial.from_dict(data), raw, row, mean, spread, seconds, margins, test)


def absolute_weights(weights: str) -> str:
    """``elastic``, ``dense``, or the absolute path of a file, so that a study is resumed from anywhere."""
    return weights if weights in ("elastic", "dense") else str(Path(weights).resolve())


@dataclass(frozen=True)
class Settings:
    """What all trials of one log share.

    Attributes:
        task: an embedded task.
        weights: what plans are cut from: ``elastic`` (the task's own), ``dense``, or a file of elastic ones.
        epochs: of finetuning, ≥ 1.
        split: images that the results are measured on.
        train_images: train on so many, spread evenly; None = all.
        judge_images: measure on so many of the split; None = all.
        device: where the networks run.
        seconds: finetune for so long instead of for ``epochs``; None = epochs.
        ingredients: what finetuning adds to native losses and output distillation.
        training: names and values of fields of the task's training options that differ from those of
            finetuning.
        with_test: measure the results on the test images too, to be shown once val has decided.
    """

    task: str
    weights: str
    epochs: int
    split: Split = "val"
    train_images: int | None = None
    judge_images: int | None = None
    device: str = "cpu"
    seconds: float | None = None
    ingredients: Ingredients = field(default_factory=Ingredients)
    training: tuple[tuple[str, Any], ...] = ()
    with_test: bool = False

    @classmethod
    def of(
        cls,
        task: str,
        weights: str,
        epochs: int,
        images: ImageCounts,
        device: str,
        split: Split = "val",
    ) -> Settings:
        """Those of a program: ``device`` as in ``--device``, the images by their counts."""
        return cls(task, weights, epochs, split, images.train, images.judged, pick_device(device))

    def check(self) -> None:
        """Refuse what no trial can use.

        Raises:
            UserError: in one sentence.
        """
        if self.epochs < 1:
            raise UserError(f"trials train for {self.epochs} epochs; they need 1 or more")
        if self.split not in ("val", "test"):
            raise unknown("split", self.split, ("val", "test"))
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"trials train for {self.seconds} seconds; they need a finite number above 0")
        self.ingredients.check()

    def options(self, seed: int, task: Task) -> TrainingOptions | CycleOptions:
        """Those of one finetuning."""
        return replace(finetuning_of(task, self.epochs, seed, self.seconds), **dict(self.training))

    def elastic(self, task: Task) -> Mapping[str, ElasticNetwork]:
        """The weights that plans are cut from."""
        return named_elastic(self.weights, task)

    def judged(self, task: Task) -> PairedImages:
        """The images that the results are measured on."""
        return (task.val if self.split == "val" else task.test).take(self.judge_images)

    def weights_hash(self, task: Task) -> str:
        """Identity of what plans are cut from: ``dense``, or a hash of the file of elastic weights."""
        path = task.elastic_path if self.weights == "elastic" else Path(self.weights)
        return "dense" if self.weights == "dense" or path is None else file_hash(path)

    def fingerprint(self, task: Task) -> dict[str, Any]:
        """What the results depend on: the header of their log."""
        options = asdict(self.options(0, task))
        extractor = load_extractor(device=task.device)
        # Named only where there are any: logs of finetunings without them stay readable.
        added: dict[str, Any] = {"with_test": True} if self.with_test else {}
        paired = task.back is None
        if self.ingredients.settled(paired) != NO_INGREDIENTS:
            added["ingredients"] = self.ingredients.described(paired)
        return {
            **added,
            "task": self.task,
            "weights": self.weights_hash(task),
            "dense_pair": {agent: state_hash(task.networks[agent]) for agent in AGENTS},
            "finetuning": {name: value for name, value in options.items() if name != "seed"},
            "split": self.split,
            "train_images": self.train_images,
            "judge_images": self.judge_images,
            "extractor": f"{extractor.name} {extractor.fingerprint}",
        }


def dense_row(task: Task, settings: Settings) -> dict[str, float]:
    """Figures (``gan.evaluation.COLUMNS``) of the dense pair on the images that trials are measured on."""
    images = settings.judged(task)
    pair = task.networks["generator"], task.networks["discriminator"]
    return Judge.build(*pair, images, load_extractor(device=task.device)).row(*pair)


class Workbench:
    """Does trials, one after the other; holds what they share.

    Args:
        task: networks and images.
        weights: agent → what plans are cut from.
        settings: see :class:`Settings`.
    """

    def __init__(self, task: Task, weights: Mapping[str, ElasticNetwork], settings: Settings) -> None:
        self.task, self.weights, self.settings = task, weights, settings
        self.train = task.train.take(settings.train_images)
        generator, discriminator = (task.networks[agent] for agent in AGENTS)
        judge_of = partial(Judge.build, generator, discriminator)
        extractor = load_extractor(device=task.device)
        self.judge = judge_of(settings.judged(task), extractor)
        shown = replace(settings, split="test").judged(task) if settings.with_test else None
        self.shown = None if shown is None else judge_of(shown, extractor)
        self.dense = DensePair(generator, discriminator, task.groups["generator"])
        self._lessons: tuple[int, Lessons] | None = None
        self._raw: dict[tuple[str, str], dict[str, float]] = {}

    @classmethod
    def build(cls, settings: Settings) -> Workbench:
        """Load what the settings name."""
        task = load_task(settings.task, settings.device)
        return cls(task, settings.elastic(task), settings)

    def __call__(self, trial: Trial) -> TrialResult:
        """Cut a plan out, finetune it, measure it before and after.

        Raises:
            Diverged: a loss was no longer finite.
        """
        started = time.perf_counter()
        pair = self.pair(trial)
        place = trial.plan.key, trial.discriminator
        if place not in self._raw:
            self._raw[place] = self.judge.row(*pair)
        margins: list[float] = []

        def on_epoch(progress: TrainingProgress) -> None:
            margins.extend(progress.margins)

        settings = self.settings
        options = settings.options(trial.seed, self.task)
        lessons = self.lessons(options)
        trainer = self.task.finetuner(*pair, lessons, options, settings.ingredients, self.dense)
        try:
            tuned = trainer.pair(trainer.fit(self.train, on_epoch))
        except Diverged as error:
            raise Diverged(f"{trial.label}, seed {trial.seed}: {error}") from error
        return TrialResult(
            trial,
            self._raw[place],
            self.judge.row(*tuned),
            statistics.fmean(margins),
            statistics.pstdev(margins),
            time.perf_counter() - started,
            tuple(round(margin, 4) for margin in margins),
            {} if self.shown is None else self.shown.row(*tuned),
        )

    def pair(self, trial: Trial) -> tuple[nn.Module, nn.Module]:
        """What a trial starts from."""
        generator, discriminator = self.task.cut(self.weights, trial.plan)
        if trial.discriminator == "dense":
            discriminator = self.task.networks["discriminator"]
        return generator, discriminator

    def lessons(self, options: LoopOptions) -> Lessons:
        """The teacher's answers for the seed of a training; those of the seed before are forgotten.

        Where time is what trials share, each asks its own teacher: nobody gains steps from coming second.
        """
        if self.settings.seconds is not None:
            return Lessons(self.task.networks["generator"], 0, options.amp)
        if self._lessons is None or self._lessons[0] != options.seed:
            self._lessons = None  # freed first: two sets of answers need not fit side by side
            self._lessons = options.seed, Lessons(self.task.networks["generator"], amp=options.amp)
        return self._lessons[1]


class TrialLog:
    """Append-only ``finetuned.jsonl``: a header line, then one line per trial.

    Attributes:
        results: key of a trial → its result.
        diverged: key of a trial that has none → why.

    Raises:
        UserError: if the file was written under other settings, or is damaged.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.results: dict[tuple[str, int, str], TrialResult] = {}
        self.diverged: dict[tuple[str, int, str], str] = {}
        self._file = AppendLog(path, fingerprint, self._read, kind="log of trials", entries="results")

    def _read(self, entry: Mapping[str, Any]) -> None:
        if "diverged" in entry:
            self._take(Failure(Trial.from_dict(entry), str(entry["diverged"])))
        else:
            self._take(TrialResult.from_dict(entry))

    def _take(self, outcome: TrialResult | Failure) -> None:
        if isinstance(outcome, Failure):
            self.diverged[outcome.trial.key] = outcome.reason
        else:
            self.results[outcome.trial.key] = outcome

    def append(self, outcome: TrialResult | Failure) -> None:
        self._file.append(outcome.to_dict())
        self._take(outcome)

    def known(self, trials: Sequence[Trial]) -> list[TrialResult]:
        """Results of those trials that the log has, in their order and under their labels."""
        return [
            replace(self.results[trial.key], trial=trial) for trial in trials if trial.key in self.results
        ]


def run_trials(
    settings: Settings,
    trials: Sequence[Trial],
    log: Path,
    *,
    workers: int = 2,
    on_done: Callable[[TrialResult], None] | None = None,
) -> list[TrialResult]:
    """Finetune plans and measure them; what the log has already is not done again.

    Two workers of one thread each are 1.7 times as fast as one of two threads. This process alone writes
    the log, a line per finished trial, so an interruption costs the trials under way and nothing else. A
    trial that diverges stops none of the others, and is not trained again when the log is.

    Args:
        settings: what all of them share.
        trials: what to do; equal plans and seeds are done once.
        log: ``.jsonl`` file to read and to append to.
        workers: processes.
        on_done: called after each new trial that has a result.

    Returns:
        One result per trial, in their order.

    Raises:
        UserError: settings that no trial can use, a log that was written under others, or a worker that
            was killed.
        Diverged: trainings that did, when all others are done and in the log.
        RuntimeError: a defect in a worker, with its traceback.
    """
    settings.check()
    if workers < 1:
        raise UserError(f"{workers} workers cannot finetune; take 1 or more")
    loaded = load_task(settings.task, settings.device)
    settings.elastic(loaded)  # refused here, where it is a sentence
    loaded.check_ingredients(settings.ingredients)
    journal = TrialLog(log, settings.fingerprint(loaded))

    def keep(outcome: TrialResult | Failure) -> None:
        journal.append(outcome)
        if on_done is not None and isinstance(outcome, TrialResult):
            on_done(outcome)

    ended = {*journal.results, *journal.diverged}
    missing = {trial.key: trial for trial in trials if trial.key not in ended}
    jobs = list(missing.values())
    work_off(Factory(settings), jobs, lane=lambda trial: trial.seed, workers=workers, keep=keep)
    reasons = {trial.key: journal.diverged[trial.key] for trial in trials if trial.key in journal.diverged}
    if reasons:
        raise Diverged(
            f"{len(reasons)} of {len({trial.key for trial in trials})} finetunings diverged, the others are "
            f"kept in {log}; the first: {next(iter(reasons.values()))}"
        )
    return journal.known(trials)


@contextmanager
def leaving_out_diverged(console: Console) -> Iterator[None]:
    """Around :func:`run_trials`, for who reads the log and can do without some trials: they are told of."""
    try:
        yield
    except Diverged as error:
        console.print(f"left out: {error}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Factory:
    """Makes a worker's workbench, in the worker, which gets one thread."""

    settings: Settings

    def __call__(self) -> Callable[[Trial], TrialResult | Failure]:
        torch.set_num_threads(1)
        bench = Workbench.build(self.settings)

        def do(trial: Trial) -> TrialResult | Failure:
            try:
                return bench(trial)
            except Diverged as error:
                return Failure(trial, str(error))

        return do
