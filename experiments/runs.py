"""The run folder: the only file that knows its shape.

A run folder explains itself: what was asked, what came out, and everything in between, readable at
any moment. Files are replaced whole or appended line by line, so an interruption costs at most the
line that was being written.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from tyro.conf import OmitArgPrefixes

from gan.errors import UserError
from gan.files import write_json, write_text
from gan.plans import Plan

if TYPE_CHECKING:
    from envs.records import Episode

T = TypeVar("T")
PROJECT = "gan-pruning-rl"
PACKAGES = (
    PROJECT,
    "torch",
    "torchvision",
    "numpy",
    "gymnasium",
    "pettingzoo",
    "stable-baselines3",
    "torch-pruning",
    "onnxruntime",
    "safetensors",
)
"""Distributions whose version can change a result."""
TRAIN = "python experiments/train_agents.py"
EPOCHS = "log.jsonl"
"""What ``finetune.py`` writes after every epoch."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes:
        path: the folder itself.
    """

    path: Path

    @property
    def options(self) -> Path:
        """Resolved options of the run."""
        return self.path / "options.json"

    @property
    def about(self) -> Path:
        """Command, start, versions, commit, machine."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One row per episode."""
        return self.path / "metrics.csv"

    @property
    def evaluations(self) -> Path:
        """The evaluation log: one line per scored plan."""
        return self.path / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def policy(self) -> Path:
        """Folder of the agent's own files."""
        return self.path / "policy"

    @property
    def task(self) -> Path:
        """Folder of the user's own networks and how their images were read, where the run has such."""
        return self.path / "task"

    @property
    def plan(self) -> Path:
        """The best plan, the policy's plan and the uniform one."""
        return self.path / "plan.json"

    @property
    def elastic(self) -> Path:
        """Weights that plans are scored with, where the run made them itself."""
        return self.elastic_of("")

    def elastic_of(self, way: str) -> Path:
        """The same of one direction, where the run has both."""
        return self.path / (f"elastic_{way}.safetensors" if way else "elastic.safetensors")

    @property
    def elastic_reference(self) -> Path:
        """Hash and origin of those weights."""
        return self.path / "elastic.json"

    @property
    def ranking(self) -> Path:
        """Order in which the channels of each group are kept."""
        return self.path / "ranking.json"

    @property
    def latency(self) -> Path:
        """Measured latency tables of both networks, where the budget is a share of latency."""
        return self.path / "latency.json"

    @property
    def evaluation(self) -> Path:
        """The final figures; written last, so a run that has it is finished."""
        return self.path / "evaluation.json"

    @property
    def credit(self) -> Path:
        """Which network's plan earned how much of the gain."""
        return self.path / "credit.json"

    @property
    def source(self) -> Path:
        """Folder of the policy that the search began with, where it began with one."""
        return self.path / "source"

    @property
    def transfer(self) -> Path:
        """What that policy was worth before any learning, and the evaluations that it saved."""
        return self.path / "transfer.json"

    @property
    def pareto(self) -> Path:
        """Folder of the front of a policy that was trained on a range of budgets."""
        return self.path / "pareto"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def widths(self) -> Path:
        return self.path / "widths.png"

    @property
    def samples(self) -> Path:
        return self.path / "samples.png"

    def weights(self, network: str, stage: str = "") -> Path:
        """Weight file of a network; its recipe lies beside it as ``.json``.

        Args:
            network: agent name, such as ``generator``.
            stage: empty for the finetuned result, ``raw`` before finetuning.
        """
        return self.path / (f"{network}_{stage}.safetensors" if stage else f"{network}.safetensors")

    def result(self, network: str) -> Path:
        """Weight file of a network that the run has made.

        Raises:
            UserError: its networks have other names (those of both directions do), or it is unfinished.
        """
        path = self.weights(network)
        if not path.is_file() and self.plan.is_file():
            names = read_json(self.plan)["best"]["widths"]
            if network not in names:
                known = ", ".join(names)
                raise UserError(f"the run {self.path} has no {network!r} but {known}; name one by --network")
        self.require(path)
        return path

    @property
    def finished(self) -> bool:
        return self.evaluation.is_file()

    def require(self, *files: Path) -> None:
        """Make sure that the run has got as far as these files.

        Raises:
            UserError: the names of the missing ones and how to go on.
        """
        missing = [file.name for file in files if not file.exists()]
        if missing:
            check_no_study(self)
            raise UserError(
                f"the run {self.path} is unfinished: it has no {' and no '.join(missing)} yet; "
                f"finish it with: {TRAIN} --resume {self.path}"
            )


def create_run(
    task: str, algo: str, seed: int, output: Path | None = None, root: Path = Path("runs")
) -> RunFolder:
    """Make a new run folder.

    Args:
        task: task name or the path of a user's checkpoint; only its last part enters the name.
        algo: name of the agent.
        seed: seed of the run.
        output: the folder to make; ``None`` takes ``root/<task>-<algo>-s<seed>`` or the first of
            ``…-2``, ``…-3`` that is free.
        root: where default names go.

    Raises:
        UserError: ``output`` exists, or the folder cannot be made.
    """
    if output is not None:
        try:
            return RunFolder(_make(output))
        except FileExistsError:
            raise UserError(
                f"--output {output} exists; name a new folder, or go on with that run: --resume {output}"
            ) from None
    name = f"{Path(task).stem}-{algo}-s{seed}"
    attempt = 1
    while True:
        try:
            return RunFolder(_make(root / (name if attempt == 1 else f"{name}-{attempt}")))
        except FileExistsError:  # also when another process was quicker
            attempt += 1


def _make(path: Path) -> Path:
    """Make a folder and its parents; FileExistsError is left to the caller."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
    except OSError as error:  # FileExistsError too: a parent is a file
        raise UserError(
            f"cannot make the folder {path.parent} ({error.strerror}); use another --output"
        ) from error
    try:
        path.mkdir()
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {path} ({error.strerror}); use another --output"
        ) from error
    return path


def open_run(path: Path) -> RunFolder:
    """An existing run folder, finished or not.

    Raises:
        UserError: no such folder, or one that no run has written.
    """
    if not path.exists():
        raise UserError(f"the run {path} does not exist; runs lie in runs/ unless --output says otherwise")
    folder = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{path} is a file; a run is the folder that {TRAIN} writes")
    if not folder.options.is_file() or not folder.about.is_file():
        raise UserError(f"{path} is no run folder: it has no options.json and run.json; {TRAIN} writes one")
    for file in (folder.options, folder.about):
        if not isinstance(read_json(file), dict):
            raise UserError(f"{file} holds no JSON object; another program wrote it, or make the run again")
    return folder


def check_no_study(folder: RunFolder) -> None:
    """Refuse a folder of many runs where one is wanted: they are told by their number of seeds.

    Raises:
        UserError: with what to name instead.
    """
    if folder.options.is_file() and "seeds" in read_json(folder.options):
        raise UserError(
            f"{folder.path} is the folder of a study, not of a run; name a run that {TRAIN} made, or one "
            "that lies within the study"
        )


def plain(value: Any) -> Any:
    """The JSON-ready form of options and results.

    Dataclasses become objects, paths strings, arrays lists; NaN and infinities become ``null``,
    which is what JSON has for them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def describe_run(folder: RunFolder, options: Any, **more: Any) -> None:
    """Write ``options.json`` and ``run.json``.

    Args:
        folder: the run.
        options: the resolved options, a dataclass with at least ``task``, ``algo`` and ``seed``.
        more: further keys of ``run.json``, such as the device.
    """
    write_json(folder.options, plain(options))
    about = {
        "format": 1,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        **more,
    }
    write_json(folder.about, plain(about))


def read_json(path: Path, otherwise: str = "make the run again") -> Any:
    """Read a JSON file, of a run folder or of the user's.

    Args:
        path: the file.
        otherwise: what to do where it is no JSON.

    Raises:
        UserError: missing, or no valid JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; {path.parent} is an unfinished run or none")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); {otherwise}") from error


def read_options(folder: RunFolder, kind: type[T]) -> T:
    """The options of a run as the dataclass ``kind`` that they were written from.

    Raises:
        UserError: an option that ``kind`` does not know: another version wrote the run.
    """
    try:
        return typing.cast("T", _restore(kind, read_json(folder.options)))
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{folder.options} was written by another program or version: {error.args[0]}; give a "
            "folder that this one wrote, or make the run again"
        ) from error


def task_of(folder: RunFolder) -> str:
    """What ``gan.two_way.load_any_task`` loads the run's task by, also after the run has been moved."""
    return str(folder.task) if folder.task.is_dir() else str(read_json(folder.options).get("task"))


def flag(name: str) -> str:
    """How an option is written on the command line; a keyword of Python ends in ``_`` as a field."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def check_least(options: Any, **least: float) -> None:
    """Refuse numbers that are too small, infinite or NaN, and seeds of more than 32 bits; None passes.

    Args:
        options: a dataclass of options.
        least: field → smallest value that is allowed.

    Raises:
        UserError: for the first that is not.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:
            raise UserError(f"{flag(name)} is {value}; it must be {smallest} or more")
        if name == "seed" and value is not None and value >= 2**32:
            raise UserError(f"{flag(name)} is {value}; it must be below 2^32")


GIVEN: ContextVar[tuple[type, frozenset[str]]] = ContextVar("GIVEN", default=(object, frozenset()))
"""While a program runs: the class of its options, and the flags of the command line, such as ``--seed``; one
may also be given its default. A program may make options of another one, which no flag is meant for."""


def given_options(options: Any, free: Sequence[str]) -> dict[str, Any]:
    """Name → value of the options that were given, or are not at their defaults; ``free`` ones left out.

    Args:
        options: a dataclass whose fields all have defaults.
        free: names, as of :func:`flat_options`, that are left out.
    """
    default = flat_options(type(options)())
    kind, flags = GIVEN.get()
    flags = flags if kind is type(options) else frozenset()
    return {
        name: value
        for name, value in flat_options(options).items()
        if name not in free and (flag(name) in flags or value != default[name])
    }


def flat_options(options: Any) -> dict[str, Any]:
    """Name → value as on the command line: options that a field holds without a prefix stand in its place."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        inside = OmitArgPrefixes in getattr(hints[field.name], "__metadata__", ())
        found |= flat_options(value) if inside else {field.name: value}
    return found


STUDY_FREE_ON_RESUME = ("resume", "workers")
"""Options of a study that may differ from those of the interrupted one: no result depends on them."""


def resumed_options(folder: RunFolder, options: T, free: Sequence[str]) -> T:
    """The options that an interrupted study was begun with; the same ones may be given again.

    Args:
        folder: the study.
        options: as they are given now, a dataclass whose fields all have defaults.
        free: names of fields that are taken as they are given now.

    Raises:
        UserError: other options than the study was begun with.
    """
    known = read_options(folder, type(options))
    given = given_options(options, free)
    begun = flat_options(known)
    changed = [flag(name) for name, value in given.items() if value != begun[name]]
    if changed:
        raise UserError(f"--resume goes on with the study's own options; leave out {', '.join(changed)}")
    return dataclasses.replace(known, **{name: getattr(options, name) for name in free})  # type: ignore[type-var]


def _restore(kind: Any, value: Any) -> Any:
    """The inverse of :func:`plain` for dataclasses of plain values, paths and tuples."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"it holds a {type(value).__name__} where options should be")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(kind)})
        if unknown:
            raise KeyError(f"unknown option {', '.join(unknown)}")
        return kind(**{name: _restore(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _restore(next(part for part in arguments if part is not types.NoneType), value)
    if origin is tuple:
        parts = arguments[:1] * len(value) if len(arguments) == 2 and arguments[1] is ... else arguments
        return tuple(_restore(part, item) for part, item in zip(parts, value, strict=True))
    if kind is Path:
        return Path(value)
    return value


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # the project itself, when it runs from a bare checkout
    return found


def commit() -> str | None:
    """Commit of the project's own checkout, with ``-dirty`` for changed files; None without git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside somebody else's repository
        dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def episode_row(episode: Episode, seconds: float) -> dict[str, float | None]:
    """The row of ``metrics.csv`` that an episode makes.

    Args:
        episode: what the environment reports at the end of an episode.
        seconds: wall seconds that this episode took.
    """
    return {**episode.row(), "seconds": round(seconds, 3)}


class MetricsLog:
    """Append-only ``metrics.csv``: a header, fixed by the first row, then one row per episode.

    A resumed run goes through its old episodes again. Rows that the file already has are not
    written twice; where the run leaves its old road (another device or version), the rows of the
    old road are cut off, so that the file always tells the story of one run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = ""
        self._past: dict[int, str] = {}
        if path.exists():
            lines = _whole_lines(path)
            write_text(path, "".join(lines))  # a torn last line must not be continued
            self._header = lines[0] if lines else ""
            self._past = {int(self._cells(line)["episode"]): line for line in lines[1:]}

    @property
    def columns(self) -> list[str]:
        """Names in the order of the file; empty before the first row."""
        return self._header.rstrip("\n").split(",") if self._header else []

    def append(self, row: Mapping[str, float | None]) -> None:
        """Write one row.

        Args:
            row: numbers by column, None for an empty cell; ``episode`` counts up from row to row.

        Raises:
            ValueError: other columns than the first row had.
        """
        if not self._header:
            self._header = ",".join(row) + "\n"
            write_text(self.path, self._header)
        wrong = sorted(set(row) ^ set(self.columns))
        if wrong:
            raise ValueError(
                f"the rows of {self.path} share the columns of the first; {', '.join(wrong)} differ"
            )
        line = ",".join(_number(row[column]) for column in self.columns) + "\n"
        episode = int(row["episode"] or 0)
        if episode in self._past:
            old, new = self._cells(self._past[episode]), self._cells(line)
            if {**old, "seconds": ""} == {**new, "seconds": ""}:
                return
            self._past = {place: past for place, past in self._past.items() if place < episode}
            write_text(self.path, self._header + "".join(self._past.values()))
        with self.path.open("a") as file:
            file.write(line)

    def _cells(self, line: str) -> dict[str, str]:
        return dict(zip(self.columns, line.rstrip("\n").split(","), strict=True))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, int | np.integer) else f"{float(value):.8g}"


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file that end in a newline: what a dying process left half-written is dropped."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(folder: RunFolder) -> pd.DataFrame:
    """All whole rows of ``metrics.csv``, one per episode.

    Raises:
        UserError: no episode has ended yet, or the file is none of ours.
    """
    lines = _whole_lines(folder.metrics) if folder.metrics.is_file() else []
    if len(lines) < 2:
        raise UserError(
            f"the run {folder.path} has no finished episode in metrics.csv: there is nothing to draw yet"
        )
    try:
        frame = pd.read_csv(io.StringIO("".join(lines)), dtype=float)
    except ValueError as error:
        raise UserError(f"{folder.metrics} is damaged ({error}); make the run again") from error
    missing = {"episode", "evaluations", "return"} - set(frame.columns)
    if missing:
        raise UserError(
            f"{folder.metrics} lacks the columns {', '.join(sorted(missing))}; make the run again"
        )
    return frame


def spent_evaluations(folder: RunFolder) -> int:
    """Evaluations that a search spent: also those of an episode that it did not finish.

    ``metrics.csv`` knows what was spent otherwise than on plans, but ends with the last whole episode; the
    evaluation log knows every plan.

    Raises:
        UserError: no episode has ended yet, or a file is damaged.
    """
    return max(counted_evaluations(folder), int(read_metrics(folder)["evaluations"].max()))


def counted_evaluations(folder: RunFolder) -> int:
    """Plans of the evaluation log that a search paid for; 0 where there is no log yet.

    Raises:
        UserError: the log is damaged.
    """
    return len(_counted(folder, dict))


def scored_plans(folder: RunFolder) -> list[tuple[Plan, dict[str, float]]]:
    """The plans that a search spent evaluations on, with their gaps, in the order of the evaluation log.

    Raises:
        UserError: the log is damaged.
    """
    return _counted(folder, lambda entry: (Plan.from_dict(entry["plan"]), dict(entry["gaps"])))


def _counted(folder: RunFolder, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """What ``read`` makes of the entries of the evaluation log that a search paid for."""
    lines = _whole_lines(folder.evaluations)[1:] if folder.evaluations.is_file() else []
    try:
        return [read(entry) for entry in map(json.loads, lines) if entry["counted"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.evaluations} is damaged ({error}); make the run again") from error


@dataclass(frozen=True)
class Run:
    """What a plot or a report needs of one run.

    Attributes:
        folder: where it lies.
        options: resolved options, nested as they were declared.
        metrics: one row per episode.
    """

    folder: RunFolder
    options: Mapping[str, Any]
    metrics: pd.DataFrame

    @property
    def seed(self) -> int:
        return int(self.options["seed"])


def read_run(path: Path) -> Run:
    """Read a run that has at least one finished episode.

    Raises:
        UserError: no such folder, no run folder, nothing finished, damaged; one sentence each.
    """
    folder = open_run(path)
    options = read_json(folder.options)
    missing = {"task", "algo", "seed"} - set(options)
    if missing:
        check_no_study(folder)
        raise UserError(f"{folder.options} lacks {', '.join(sorted(missing))}; make the run again")
    return Run(folder, options, read_metrics(folder))


@dataclass(frozen=True)
class Finetuning:
    """What a program reads of a finetuning.

    Attributes:
        folder: its paths.
        options: those it was made with.
        epochs: one row per epoch with ``epoch``, ``seconds`` and, where measured, ``val_kid`` and ``val_l1``;
            epoch 0 is the start.
        dense: the val figures of the dense pair; empty while the finetuning goes on, and where an older
            version did not keep them.
    """

    folder: RunFolder
    options: Mapping[str, Any]
    epochs: pd.DataFrame
    dense: Mapping[str, float]


def is_finetuning(path: Path) -> bool:
    """Whether ``finetune.py`` made a folder."""
    return (path / EPOCHS).is_file()


def read_finetuning(path: Path) -> Finetuning:
    """Read a finetuning, finished or under way; a torn last line is left out.

    Raises:
        UserError: no such folder, no run folder, nothing logged, damaged; one sentence each.
    """
    folder = open_run(path)
    log, options = folder.path / EPOCHS, read_json(folder.options)
    if not isinstance(options.get("task"), str):
        raise UserError(f"{folder.options} lacks the task; finetune again")
    try:
        whole = log.read_text().rpartition("\n")[0].splitlines()
        entries = {int(entry["epoch"]): entry for entry in map(json.loads, whole[1:])}
        measured = pd.DataFrame([entries[epoch] for epoch in sorted(entries)])
        drawn = [name for name in ("epoch", "seconds", "val_kid", "val_l1") if name in measured]
        if not {"seconds", "val_kid"} <= set(drawn):
            raise KeyError("no epoch with its seconds and KID")
        frame = measured[drawn].astype(float)
        about = read_json(folder.evaluation) if folder.evaluation.is_file() else {}
        dense = {name: float(value) for name, value in dict(about.get("val_of_dense", {})).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{log} cannot be drawn ({error}); wait for an epoch, or finetune again") from error
    return Finetuning(folder, options, frame, dense)
