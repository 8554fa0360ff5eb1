"""Train the elastic weights of a task: one copy of the pair that works at many widths.

Those of the embedded tasks come with the project and were made by this command; for the user's own
networks ``train_agents.py`` runs the same warm-up by itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from experiments import cli
from experiments.build import build_budgets, check_reachable, pick_device, warm_up
from experiments.watch import Watch
from gan.elastic import ElasticOptions
from gan.files import write_json
from gan.tasks import load_task, named_elastic, save_elastic

EXAMPLES = (
    ("python experiments/train_elastic.py --output elastic.safetensors", "remake the embedded task's"),
    ("python experiments/train_elastic.py --budget 0.25 --output e.safetensors", "for larger budgets"),
    (
        "python experiments/train_elastic.py --start elastic --warm-up.perceptual 2 --output e.safetensors",
        "go on with the task's own, with a perceptual distance",
    ),
)


@dataclass(frozen=True)
class Options:
    """Options of ``train_elastic.py``."""

    output: Path
    """File to write; its recipe lies beside it."""
    task: str = "edges2emoji"
    """Task name."""
    budget: str = "generator=0.05,discriminator=0.25"
    """Lowest budgets that plans will be asked for: [agent=]LOW,…"""
    cost: Literal["macs", "params"] = "macs"
    """What these are a share of."""
    start: str = "dense"
    """Weights to go on from: dense, elastic (the task's own), or a file of elastic weights."""
    warm_up: ElasticOptions = field(default_factory=lambda: ElasticOptions(steps=2500))
    """Options of the warm-up."""


def main(options: Options) -> None:
    """Train and write."""
    cli.check_new_file(options.output)
    cli.check_new_file(options.output.with_suffix(".json"))
    options.warm_up.check()
    task = load_task(options.task, pick_device("auto"))
    budgets = build_budgets(options.budget)
    check_reachable(task, budgets, options.cost)
    start = named_elastic(options.start, task)
    watch = Watch()
    with watch.stage("elastic warm-up", options.warm_up.steps) as stage:

        def on_step(step: int, steps: int, loss: float) -> None:
            stage.at(step, steps)
            stage.say(f"L1 to dense {loss:.3f}")
            if step % 200 == 0 and not watch.console.is_terminal:
                print(f"step {step}/{steps} L1 to dense {loss:.4f}", flush=True)

        weights = warm_up(task, budgets, options.cost, options.warm_up, on_step, start)
    save_elastic(options.output, weights, task)
    command = cli.command("train_elastic", options, Options(options.output))
    recipe = {"task": options.task, "command": command, "budget": options.budget, "cost": options.cost}
    recipe |= {"start": options.start} | asdict(options.warm_up)
    write_json(options.output.with_suffix(".json"), recipe)
    print(f"{options.output}")


if __name__ == "__main__":
    cli.run(main, Options, __doc__ or "", EXAMPLES)
