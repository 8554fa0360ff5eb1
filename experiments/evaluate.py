"""Measure a task's dense pair, and its uniform slices before any finetuning: where a search starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from envs.budget import Budget, default_budgets, uniform_widths
from experiments import cli
from experiments.build import check_reachable, pick_device, prunable
from experiments.report import evaluation_table
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.fidelity import image_l1
from gan.files import write_json
from gan.plans import Plan
from gan.scoring import run_batched
from gan.tasks import AGENTS, load_task

EXAMPLES = (
    ("python experiments/evaluate.py", "dense pair and uniform slices of the elastic weights"),
    ("python experiments/evaluate.py --start dense", "the same, cut from the dense weights"),
)


@dataclass(frozen=True)
class Options:
    """Options of ``evaluate.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    budgets: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)
    """Shares of the generator's cost."""
    cost: Literal["macs", "params"] = "params"
    """What that cost is."""
    start: Literal["elastic", "dense"] = "elastic"
    """Weights that slices are cut from."""
    split: Literal["val", "test"] = "test"
    """Images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run."""
    output: Path | None = None
    """Also write the rows to this JSON file."""


def main(options: Options) -> None:
    """Measure and print."""
    if options.output is not None:
        cli.check_new_file(options.output)
    task = load_task(options.task, pick_device(options.device))
    networks = prunable(task, options.cost)
    plans = {}
    for share in options.budgets:
        budgets = default_budgets(AGENTS, {"generator": Budget.of(share)})
        check_reachable(task, budgets, options.cost)
        widths = {agent: uniform_widths(networks[agent], budgets[agent].low) for agent in AGENTS}
        plans[f"{share:g}"] = Plan.of(widths, "l1")
    weights = task.elastic_weights(options.start)
    pairs = getattr(task, options.split)
    dense = task.networks["generator"], task.networks["discriminator"]
    judge = Judge.build(*dense, pairs, load_extractor(device=task.device))
    yardstick = judge.yardstick
    rows = {"dense": {**judge.row(*dense), "l1_to_dense": 0.0}}
    for name, plan in plans.items():
        generator, discriminator = task.cut(weights, plan)
        made = run_batched(generator, yardstick.inputs)
        distance = round(image_l1(made, yardstick.outputs), 4)
        rows[name] = {**judge.row(generator, discriminator), "l1_to_dense": distance}
    console = Console()
    console.print(
        f"{len(pairs)} {options.split} images of {task.name}; columns: share of the {options.cost}",
        soft_wrap=True,
    )
    evaluation_table(rows, console)
    distances = "  ".join(f"{name} {row['l1_to_dense']:.3f}" for name, row in rows.items())
    console.print(f"L1 to the dense outputs: {distances}", highlight=False, soft_wrap=True)
    if options.output is not None:
        write_json(options.output, rows)


if __name__ == "__main__":
    cli.run(main, Options, __doc__ or "", EXAMPLES)
