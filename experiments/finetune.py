"""Finetune a plan: of a finished run, or of a file; as long as one likes, and resumable after every epoch."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from rich.console import Console
from torch import nn
from tyro.conf import OmitArgPrefixes, Positional

from experiments import cli
from experiments.build import finetuning_of, image_counts, pick_device, save_pair
from experiments.figures import LearningCurve, learning_curves, save_figure
from experiments.report import evaluation_table
from experiments.runs import (
    EPOCHS,
    RunFolder,
    check_least,
    create_run,
    describe_run,
    flag,
    given_options,
    open_run,
    plain,
    read_json,
    read_options,
    task_of,
)
from experiments.selection import KID, L1, Verdict, measure
from experiments.watch import Watch
from gan.append_log import AppendLog
from gan.checkpoints import load_network, state_hash
from gan.cyclegan import CycleOptions, OneWayTrainer
from gan.data import PairedImages
from gan.distillation import DensePair, Ingredients
from gan.elastic import ElasticNetwork
from gan.errors import UserError, unknown
from gan.evaluation import Judge
from gan.features import Extractor, load_extractor
from gan.files import file_hash, write_bytes, write_json, write_text
from gan.loop import TrainingProgress
from gan.plans import Plan
from gan.task_folder import find_both
from gan.tasks import AGENTS, Task, load_elastic, load_task
from gan.training import FINETUNING, PairedTrainer, TrainingOptions

Pair = tuple[nn.Module, nn.Module]
DESCRIPTION = """Finetunes the pruned pair of a plan with native GAN losses, distillation from the dense pair
and further ingredients. Val images decide when to stop, test images are looked at once, in the end."""
EXAMPLES = (
    ("python experiments/finetune.py runs/NAME --epochs 40", "the best plan of a run, longer"),
    ("python experiments/finetune.py plan.json --task edges2emoji --minutes 30", "a plan of one's own"),
    ("python experiments/finetune.py runs/NAME --features alignment --schedule cosine", "with ingredients"),
    ("python experiments/finetune.py --resume runs/NAME", "go on with an interrupted finetuning"),
)
DEFAULT_TASK = "edges2emoji"


@dataclass(frozen=True)
class Options:
    """Options of ``finetune.py``."""

    source: Positional[Path | None] = None
    """Finished run folder, or a JSON file: {"widths": {"generator": […], "discriminator": […]}}."""
    task: str | None = None
    """Embedded task; a run knows its own, for a file it is edges2emoji by default."""
    plan: str = "best"
    """Which plan of a run: best, proposed or uniform."""
    epochs: int | None = None
    """Passes over the training images; 10 unless --minutes is given."""
    minutes: float | None = None
    """Train for this long instead; measuring does not count."""
    start: Literal["elastic", "dense"] | None = None
    """Cut the plan out of elastic weights or of the dense ones; by default what the run did, or elastic."""
    elastic: Path | None = None
    """File of elastic weights; without it the run's own, or those that come with the task."""
    ingredients: Annotated[Ingredients, OmitArgPrefixes] = field(default_factory=Ingredients)
    """What is added to native losses and output distillation."""
    learning_rate: float | None = None
    """Of the generator; this and the next three: by default what train_agents.py finetunes the task with."""
    distillation: float | None = None
    """Weight of the distance to the dense generator's outputs."""
    gradient_penalty: float | None = None
    """Weight of R1, which keeps the discriminator from memorising; 0 leaves it out."""
    ema: float | None = None
    """Decay per step of the averaged weights, which are the result."""
    validate_every: int = 1
    """Measure the averaged weights on val every so many epochs."""
    patience: int = 0
    """Stop after so many measurements without a better KID on val; 0 never stops early."""
    seed: int = 0
    """Of order, augmentation, dropout and adapters."""
    output: Path | None = None
    """New folder; without it runs/TASK-finetune-sSEED, numbered when that exists."""
    resume: Path | None = None
    """Go on with this finetuning; its own options are used."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    quick: bool = False
    """Few images and epochs: a look around, no result."""


@dataclass(frozen=True)
class FinetuneFolder:
    """The paths of one finetuning, beside those of ``runs.RunFolder``.

    Attributes:
        run: the folder.
    """

    run: RunFolder

    @property
    def log(self) -> Path:
        """One line per epoch: losses, seconds and, where measured, the val figures."""
        return self.run.path / EPOCHS

    @property
    def checkpoint(self) -> Path:
        """Everything that a resumed training needs, of the last whole epoch."""
        return self.run.path / "checkpoint.pt"

    @property
    def curve(self) -> Path:
        return self.run.path / "curve.png"


class EpochLog:
    """Append-only ``log.jsonl``; of an epoch that was trained again the last line counts.

    Attributes:
        entries: epoch → its line; 0 is the start.

    Raises:
        UserError: the file was written from another start or with other options, or is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.entries: dict[int, dict[str, Any]] = {}
        self._file = AppendLog(path, header, self._read, kind="log of a finetuning", entries="epochs")

    def _read(self, entry: Mapping[str, Any]) -> None:
        # JSON has no NaN, which a finetuning that went astray ends with: null stands for it
        self.entries[int(entry["epoch"])] = {k: math.nan if v is None else v for k, v in entry.items()}

    def append(self, entry: Mapping[str, Any]) -> None:
        self._file.append(entry)
        self._read(entry)

    def cut(self, epoch: int) -> None:
        """Forget what came after an epoch: it will be trained again."""
        self.entries = {place: entry for place, entry in self.entries.items() if place <= epoch}

    @property
    def validated(self) -> list[dict[str, Any]]:
        """Entries with val figures, in the order of the epochs."""
        return [self.entries[epoch] for epoch in sorted(self.entries) if KID in self.entries[epoch]]

    def stale(self, patience: int) -> bool:
        """Whether the last ``patience`` measurements of trained weights bettered none before them."""
        values = [entry[KID] for entry in self.validated if entry["epoch"] > 0]
        return 0 < patience < len(values) and min(values[-patience:]) >= min(values[:-patience])


def main(options: Options) -> None:
    """Cut, train, choose, measure."""
    console = Console()
    options, folder = open_folder(options)
    with cli.resumable("finetune", folder.run.path, "whole epochs are kept"):
        run(options, folder, console)


def open_folder(options: Options) -> tuple[Options, FinetuneFolder]:
    """Check the options and make the folder with its start, or open the one to resume.

    Raises:
        UserError: an option that no finetuning can use; nothing has been written then.
    """
    if options.resume is not None:
        folder = open_run(options.resume)
        given = [
            "the run or plan" if name == "source" else flag(name)
            for name in given_options(options, free=("resume",))
        ]
        if given:
            raise UserError(f"--resume goes on with its own options; leave out {', '.join(given)}")
        if not is_finetuning(folder):
            raise UserError(f"{folder.path} is no finetuning; --resume takes the folder of one")
        known = read_options(folder, Options)
        if not all(folder.weights(agent, "raw").is_file() for agent in AGENTS):
            raise UserError(
                f"the finetuning {folder.path} stopped before it had begun; delete it and start again"
            )
        if folder.finished:
            raise UserError(f"the finetuning {folder.path} is finished: see {folder.evaluation}")
        return known, FinetuneFolder(folder)
    check(options)
    assert options.source is not None
    plan, task, weights, start = read_source(options)
    task.check_ingredients(options.ingredients)
    for agent in plan:
        if agent not in task.networks:
            raise unknown("network", agent, task.networks)
    try:
        pair = task.cut(weights, plan)
    except (KeyError, ValueError) as error:
        raise UserError(f"the plan of {options.source} does not fit {task.name}: {error.args[0]}") from error
    epochs = None if options.minutes is not None else options.epochs or FINETUNING.epochs
    source = options.source.resolve()
    # As numbers: a default that changes later must not change what is resumed.
    ingredients = options.ingredients.settled(task.back is None)
    options = replace(
        options, source=source, task=task.reference, start=start, epochs=epochs, ingredients=ingredients
    )
    folder = create_run(task.name, "finetune", options.seed, options.output)
    describe_run(folder, options, device=str(task.device), threads=torch.get_num_threads())
    write_json(folder.plan, {"best": plan.to_dict()})
    # In full precision: a resumed finetuning begins with the same numbers, wherever the run has gone.
    save_pair(folder, "raw", "raw", task, plan, pair, half=False)
    return options, FinetuneFolder(folder)


def check(options: Options) -> None:
    """Refuse what no finetuning can use."""
    if options.source is None:
        raise UserError(
            "there is nothing to finetune; give a run folder or a plan file, or --resume a folder"
        )
    if options.epochs is not None and options.minutes is not None:
        raise UserError("--epochs and --minutes exclude each other; give one")
    check_least(options, epochs=1, validate_every=1, patience=0, distillation=0, gradient_penalty=0, seed=0)
    for name in ("minutes", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{flag(name)} is {value}; it must be above 0")
    if options.ema is not None and not 0 <= options.ema < 1:
        raise UserError(f"--ema is {options.ema}; it must be 0 or more, below 1")
    if options.start == "dense" and options.elastic is not None:
        raise UserError("--elastic is of no use with --start dense; leave one out")
    options.ingredients.check()


def read_source(
    options: Options,
) -> tuple[Plan, Task, Mapping[str, ElasticNetwork], Literal["elastic", "dense"]]:
    """The plan, its task, and what it is cut from."""
    source, device = options.source, pick_device(options.device)
    assert source is not None
    if not source.is_dir():
        if not source.is_file():
            problem = "is no file" if source.exists() else "does not exist"
            raise UserError(f"{source} {problem}; give a run folder or a plan file")
        task, start = load_task(options.task or DEFAULT_TASK, device), options.start or "elastic"
        return read_plan(source, options.plan), task, cut_from(task, start, options.elastic), start
    folder = open_run(source)
    if is_finetuning(folder):
        began = read_json(folder.options)["source"]
        raise UserError(
            f"{source} is itself a finetuning; give what it began with, {began}, and more --epochs"
        )
    folder.require(folder.plan, folder.elastic_reference)
    known = task_of(folder)
    if find_both(known) is not None:
        raise UserError(
            f"the run {source} has both directions of a translator, and this finetunes one pair; both are "
            "finetuned for longer by a run with more epochs: train_agents.py --epochs"
        )
    if options.task not in (None, known):
        raise UserError(f"the run {source} is of task {known!r}; leave out --task")
    task, reference = load_task(known, device), read_json(folder.elastic_reference)
    start = options.start or ("elastic" if options.elastic else reference.get("start", "elastic"))
    own = folder.elastic if folder.elastic.is_file() else None
    weights = cut_from(task, start, options.elastic or own)
    shipped = start == "elastic" and options.elastic is None and own is None
    if shipped and task.elastic_path and reference.get("hash", "") != file_hash(task.elastic_path):
        raise UserError(
            f"the run {source} was made with other elastic weights than {task.name} comes with; "
            "name them with --elastic FILE, or use --start dense"
        )
    return read_plan(folder.plan, options.plan), task, weights, start


def cut_from(
    task: Task, start: Literal["elastic", "dense"], path: Path | None
) -> Mapping[str, ElasticNetwork]:
    """The weights that plans are cut from."""
    return load_elastic(path, task) if start == "elastic" and path else task.elastic_weights(start)


def read_plan(path: Path, name: str) -> Plan:
    """A plan of a JSON file: the file's only one, or one of several by name, as in a run's ``plan.json``.

    Raises:
        UserError: no such plan.
    """
    data = read_json(path, otherwise="a plan file is JSON: see docs/finetuning.md")
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no plan; it needs the key 'widths' with one list per network")
    if "widths" not in data and any(isinstance(value, dict) for value in data.values()):
        if name not in data:
            raise unknown("plan", name, data)
        data = data[name]
        if not isinstance(data, dict):
            raise UserError(
                f"{path} holds no plan {name!r}; it needs the key 'widths' with one list per network"
            )
    try:
        return Plan.from_dict(data)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no plan: {error}") from error


@dataclass(frozen=True)
class Images:
    """What is trained on, chosen on, measured on; few of each with ``--quick``."""

    train: PairedImages
    val: PairedImages
    test: PairedImages

    @classmethod
    def of(cls, task: Task, quick: bool) -> Images:
        counts = image_counts(quick)
        wanted = ((task.train, counts.train), (task.val, counts.judged), (task.test, counts.judged))
        return cls(*(pairs.take(count) for pairs, count in wanted))


def training_options(options: Options, task: Task) -> TrainingOptions | CycleOptions:
    """Those of the finetuning stage, with what was given."""
    epochs, minutes = options.epochs or FINETUNING.epochs, options.minutes
    if options.quick:
        epochs, minutes = min(epochs, 2), None if minutes is None else min(minutes, 0.1)
    chosen = finetuning_of(task, epochs, options.seed, None if minutes is None else 60 * minutes)
    names = ("learning_rate", "distillation", "gradient_penalty", "ema")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(chosen, **given)


def run(options: Options, folder: FinetuneFolder, console: Console) -> None:
    """Train to the end, decide on val, measure on test."""
    watch = Watch(console)
    with watch.stage("load"):
        task = load_task(str(options.task), pick_device(options.device))
        console.print(f"[bold]{folder.run.path}[/bold]  {task.name}, seed {options.seed}", highlight=False)
        images = Images.of(task, options.quick)
        plan = read_plan(folder.run.plan, "best")
        raw = load_pair(folder.run, task)
        dense = task.networks["generator"], task.networks["discriminator"]
        extractor = load_extractor(device=task.device)
        judge = Judge.build(*dense, images.val, extractor)
        training = training_options(options, task)
        log = EpochLog(folder.log, fingerprint(options, training, raw, task, extractor))
        beside = DensePair(*dense, task.groups["generator"])
        trainer = task.finetuner(*raw, dense[0], training, options.ingredients, beside)
        load_checkpoint(folder.checkpoint, trainer)
        log.cut(trainer.epoch)
        if 0 not in log.entries:
            log.append({"epoch": 0, "steps": 0, "seconds": 0.0, **measure(judge, raw[0])})
    if trainer.epoch:
        console.print(f"going on after epoch {trainer.epoch}", highlight=False)
    tuned = train(trainer, images, judge, log, folder, options, watch)
    if KID not in log.entries[trainer.epoch]:
        log.append({**log.entries[trainer.epoch], **measure(judge, tuned[0])})

    before, after = (log.entries[epoch] for epoch in (0, trainer.epoch))
    verdict = Verdict(before[KID], after[KID])
    result = raw if verdict.kept == "before" else tuned
    save_pair(folder.run, "", "", task, plan, result, half=True)
    with watch.stage("evaluate"):
        test = Judge.build(*dense, images.test, extractor)
        pairs = {"dense": dense, "before": raw, "after": tuned}
        rows = {name: test.row(*pair) for name, pair in pairs.items()}
    with watch.stage("pictures"):
        frame = pd.DataFrame([log.entries[epoch] for epoch in sorted(log.entries)])
        goal = measure(judge, dense[0])
        curve = LearningCurve(folder.run.path.name, frame, goal)
        save_figure(learning_curves([curve], f"{task.name}: finetuning, val images"), folder.curve)
    protocol = (
        f"{len(images.test)} test images of {task.name}; the last averaged weights, or the start where val "
        "prefers it; nothing was chosen on test"
    )
    table = pd.DataFrame([{"row": name, "kept": name == verdict.kept, **row} for name, row in rows.items()])
    write_text(folder.run.metrics, table.to_csv(index=False))
    # Written last: a finetuning that has it is finished.
    write_json(
        folder.run.evaluation,
        {
            # of the whole training, also where it went on after an interruption
            "seconds": watch.seconds | {"finetune": round(trainer.spent, 1)},
            "protocol": protocol,
            "verdict": verdict.sentence,
            "kept": verdict.kept,
            "val_of_dense": goal,
            "epochs": trainer.epoch,
            "steps": trainer.steps,
            "steps_per_second": round(trainer.steps / max(1e-9, trainer.spent), 3),
            "rows": rows,
        },
    )
    folder.checkpoint.unlink(missing_ok=True)
    evaluation_table(rows, console)
    console.print(
        f"{verdict.sentence}\n{protocol}\neverything is in {folder.run.path}", highlight=False, soft_wrap=True
    )


def train(
    trainer: PairedTrainer | OneWayTrainer,
    images: Images,
    judge: Judge,
    log: EpochLog,
    folder: FinetuneFolder,
    options: Options,
    watch: Watch,
) -> Pair:
    """Train with a bar; after every epoch a line in the log and a checkpoint."""
    total = 1.0 if trainer.options.seconds else float(trainer.options.epochs)
    with watch.stage("finetune", total) as stage:

        def on_epoch(progress: TrainingProgress) -> bool:
            last = progress.share >= 1.0
            entry = {
                "epoch": progress.epoch,
                "steps": trainer.steps,
                "seconds": round(progress.seconds, 2),
                **progress.losses,
            }
            if last or progress.epoch % options.validate_every == 0:
                entry |= measure(judge, trainer.result(images.train))
                distance = f", L1 {entry[L1]:.4f}" if L1 in entry else ""
                stage.say(f"val KID {entry[KID]:.3f}{distance}")
            stage.at(round(progress.share * total, 2), total)
            log.append(plain(entry))
            save_checkpoint(folder.checkpoint, trainer)
            return KID in entry and log.stale(options.patience)

        if log.stale(options.patience):  # it was stopped when it had ended
            return trainer.pair(trainer.result(images.train))
        return trainer.pair(trainer.fit(images.train, on_epoch))


def is_finetuning(folder: RunFolder) -> bool:
    """Whether this program made the folder."""
    return "source" in read_json(folder.options)


def fingerprint(
    options: Options, training: TrainingOptions | CycleOptions, raw: Pair, task: Task, extractor: Extractor
) -> dict[str, Any]:
    """What the log depends on."""
    return {
        "start": {agent: state_hash(network) for agent, network in zip(AGENTS, raw, strict=True)},
        "dense_pair": {agent: state_hash(task.networks[agent]) for agent in AGENTS},
        "extractor": f"{extractor.name} {extractor.fingerprint}",
        "training": plain(asdict(training)),
        "ingredients": plain(options.ingredients.described(isinstance(training, TrainingOptions))),
    }


def save_checkpoint(path: Path, trainer: PairedTrainer | OneWayTrainer) -> None:
    """Write the whole state of a training, beside and renamed."""
    data = io.BytesIO()
    torch.save(trainer.state_dict(), data)
    write_bytes(path, data.getvalue())


def load_checkpoint(path: Path, trainer: PairedTrainer | OneWayTrainer) -> None:
    """Go on from a checkpoint, if there is one.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return
    try:
        trainer.load_state_dict(torch.load(path, map_location=trainer.device, weights_only=True))
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        # torch's own message is a page long.
        raise UserError(f"{path} is damaged; delete it to train from the start again") from error


def load_pair(folder: RunFolder, task: Task) -> Pair:
    """The start, read back even when just made."""
    generator, discriminator = (
        load_network(folder.weights(agent, "raw"))[0].to(task.device).requires_grad_(False)
        for agent in AGENTS
    )
    return generator, discriminator


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
