"""Draw the reward and sparsity curves of searches, or the learning curves of finetunings, into one figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from experiments import cli
from experiments.figures import LearningCurve, Series, check_format, curves, learning_curves, save_figure
from experiments.runs import Finetuning, Run, is_finetuning, read_finetuning, read_run
from gan.errors import UserError

EXAMPLES = (
    ("python experiments/plot.py runs/edges2emoji-mappo-s0 --output curves.png", "one run"),
    ("python experiments/plot.py runs/edges2emoji-mappo-* --output all.pdf", "seeds and budgets compared"),
    ("python experiments/plot.py runs/edges2emoji-finetune-* --output tuned.png", "finetunings compared"),
)
DESCRIPTION = """Reward (total and by term) and sparsity of both networks over the evaluations of a search.

Runs that differ only in their seed become one line, their mean, inside the range that they span.
Folders of finetune.py are drawn by KID and L1 on the val images, with the dense pair as a line."""
APART = ("seed", "output", "resume", "reference")
"""Options in which two runs of one series may differ."""


@dataclass(frozen=True)
class Options:
    """Options of ``plot.py``."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    """Run folders: all of searches, or all of finetunings."""
    output: Path
    """File to write: .png, .pdf or .svg."""
    window: int = 30
    """Evaluations of the moving average."""


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested options as they stand on a command line: ``weights.density`` → ``0.1``."""
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def beginning(path: str) -> str:
    """What a policy began with: a run's name, without the seed, for runs of several seeds are one kind."""
    return "scratch" if path == "null" else re.sub(r"-s\d+$", "", Path(path).name)


def group(runs: Sequence[Run]) -> tuple[str, list[Series]]:
    """Sort runs into series.

    Returns:
        What all runs share (task, budget, …) as a title, and one series per kind of run, labelled
        by its algorithm and whatever else tells it from the others.
    """
    kinds: dict[str, list[Run]] = {}
    flat: dict[str, dict[str, str]] = {}
    for run in runs:
        options = {name: value for name, value in flatten(run.options).items() if name not in APART}
        if "from_" in options:
            options["from"] = beginning(options.pop("from_"))
        key = json.dumps(options, sort_keys=True)
        kinds.setdefault(key, []).append(run)
        flat[key] = options
    names = list(dict.fromkeys(name for options in flat.values() for name in options))
    differing = [name for name in names if len({options.get(name) for options in flat.values()}) > 1]
    series = []
    for key, members in kinds.items():
        options = flat[key]
        told = [
            options["algo"],
            *(f"{name} {options.get(name, '-')}" for name in differing if name != "algo"),
        ]
        series.append(Series(", ".join(told), tuple(run.metrics for run in members)))
    first = next(iter(flat.values()))
    shared = [first[name] for name in ("task",) if name not in differing]
    shared += [
        f"{name} {first[name]}" for name in ("budget", "cost") if name in first and name not in differing
    ]
    return ", ".join(shared), series


def main(options: Options) -> None:
    """Read the runs, draw, write."""
    if not options.runs:
        raise UserError("no run to draw; name one or more run folders, such as runs/edges2emoji-mappo-s0")
    if options.window < 1:
        raise UserError(f"--window is {options.window}; a moving average needs 1 evaluation or more")
    check_format(options.output)
    paths = {path.resolve(): path for path in options.runs}  # a run named twice is still one run
    tuned = [path for path in paths.values() if is_finetuning(path)]
    if tuned and len(tuned) < len(paths):
        searched = next(path for path in paths.values() if path not in tuned)
        raise UserError(f"{tuned[0]} is a finetuning and {searched} is not; draw them in two figures")
    if tuned:
        title, learned = tunings([read_finetuning(path) for path in tuned])
        save_figure(learning_curves(learned, title), options.output)
        print(f"{options.output}: {', '.join(f'{one.label} ({epochs(one)} epochs)' for one in learned)}")
        return
    title, series = group([read_run(path) for path in paths.values()])
    save_figure(curves(series, options.window, title), options.output)
    print(f"{options.output}: {', '.join(f'{one.label} ({len(one.metrics)})' for one in series)}")


def epochs(curve: LearningCurve) -> int:
    """How many were trained; 0 is the start."""
    return int(curve.frame["epoch"].max())


def tunings(found: Sequence[Finetuning]) -> tuple[str, list[LearningCurve]]:
    """A title, and one curve per finetuning under the name of its folder, or its path where names are equal.

    Raises:
        UserError: finetunings of several tasks, whose figures cannot be compared.
    """
    tasks = list(dict.fromkeys(Path(one.options["task"]).name for one in found))
    if len(tasks) > 1:
        raise UserError(
            f"these are finetunings of {' and '.join(tasks)}; draw each task in a figure of its own"
        )
    names = [one.folder.path.resolve().name for one in found]
    labels = [
        name if names.count(name) == 1 else str(one.folder.path)
        for name, one in zip(names, found, strict=True)
    ]
    learned = [LearningCurve(label, one.epochs, one.dense) for label, one in zip(labels, found, strict=True)]
    return f"{tasks[0]}: finetuning, val images", learned


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
