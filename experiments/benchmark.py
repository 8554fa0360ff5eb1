"""How fast scoring and finetuning are on this machine: plans per second, and where the time goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from envs.budget import project, random_proportions, uniform_widths
from experiments import cli
from experiments.build import build_budgets, finetuning, prunable
from gan.distillation import NO_INGREDIENTS, PERCEPTUAL, DensePair, Ingredients
from gan.elastic import ElasticOptions, train_elastic
from gan.errors import UserError
from gan.features import load_efficientnet_lite0, prepare
from gan.files import write_json
from gan.plans import Plan
from gan.scoring import run_batched
from gan.tasks import AGENTS, Task, load_task
from gan.training import FINETUNING, PairedTrainer, TrainingOptions, finetuner

EXAMPLES = (("make benchmark", "everything, about two minutes on 2 cores"),)
DESCRIPTION = """Times scoring and training on the embedded task. Ratios within one run are comparable;
seconds of different machines, or of a busy one, are not."""


@dataclass(frozen=True)
class Options:
    """Options of ``benchmark.py``."""

    task: str = "edges2emoji"
    """Embedded task."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Budgets of the scored plans."""
    plans: int = 20
    """Plans to score."""
    output: Path | None = None
    """Also write the figures to this JSON file."""


def median_seconds(call: Callable[[], object], runs: int) -> float:
    """Median of ``runs`` calls, after one that warms up."""
    call()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(options: Options) -> None:
    """Measure and print."""
    if options.plans < 2:
        raise UserError(f"--plans is {options.plans}; a rate needs 2 or more")
    if options.output is not None:
        cli.check_new_file(options.output)
    task = load_task(options.task)
    budgets = build_budgets(options.budget)
    started = time.perf_counter()
    scorer = task.scorer(start="elastic" if task.elastic_path else "dense")
    building = time.perf_counter() - started
    networks, yardstick = scorer.networks, scorer.yardstick
    random = np.random.default_rng(0)

    def draw() -> Plan:
        """A random plan of both networks: neither half of it is in a cache."""
        widths = {
            agent: project(network, random_proportions(network, random), budgets[agent].low).widths
            for agent, network in networks.items()
        }
        return Plan.of(widths, scorer.ranking)

    scorer.score(draw())
    times = []
    for plan in [draw() for _ in range(options.plans)]:
        started = time.perf_counter()
        scorer.score(plan)
        times.append(time.perf_counter() - started)
    per_plan = statistics.median(times)

    uniform = {agent: tuple(uniform_widths(networks[agent], budgets[agent].low).tolist()) for agent in AGENTS}
    generator = scorer.slice("generator", uniform["generator"], shared=True)
    critic = scorer.slice("discriminator", uniform["discriminator"], shared=True)
    outputs = run_batched(generator, yardstick.inputs)
    look = yardstick.extractor.look(outputs)
    on_real = yardstick.logits_on_real(critic)
    parts = {
        "slice generator, BatchNorm statistics": lambda: scorer.slice(
            "generator", uniform["generator"], True
        ),
        "run generator": lambda: run_batched(generator, yardstick.inputs),
        "features": lambda: yardstick.extractor.look(outputs),
        "gaps": lambda: yardstick.generator_gaps(outputs, look),
        "slice discriminator, BatchNorm statistics": lambda: scorer.slice(
            "discriminator", uniform["discriminator"], True
        ),
        "discriminator on real images": lambda: yardstick.logits_on_real(critic),
        "discriminator on outputs, balance": lambda: yardstick.balance_gap(outputs, critic, on_real),
    }
    stages = {name: median_seconds(call, 5) for name, call in parts.items()}
    eager, _ = load_efficientnet_lite0(yardstick.extractor.image_size)
    prepared = prepare(yardstick.outputs[:32], yardstick.extractor.image_size)
    with torch.no_grad():
        eager_seconds = median_seconds(lambda: eager.extract_features(prepared), 2) * len(outputs) / 32

    console = Console()
    table = Table(
        title=f"Scoring one plan: {len(yardstick.inputs)} probe images, all terms", title_justify="left"
    )
    table.add_column("stage")
    table.add_column("ms", justify="right")
    for name, value in stages.items():
        table.add_row(name, f"{1e3 * value:.0f}")
    table.add_row("features, the same network in eager torch", f"{1e3 * eager_seconds:.0f}", style="dim")
    table.add_row("a whole new plan (median)", f"{1e3 * per_plan:.0f}", style="bold")
    console.print(table)
    console.print(
        f"{1 / per_plan:.1f} plans/s, {torch.get_num_threads()} threads, "
        f"{building:.1f} s to build the scorer\n",
        highlight=False,
    )

    finetuned = side_by_side(finetuning_calls(task), 8)
    title = f"Finetuning a uniform slice at {SLICE:.0%} of the generator's MACs, as train_agents.py does"
    table = Table(title=title, title_justify="left")
    table.add_column("losses")
    table.add_column("ms per step", justify="right")
    table.add_column("speed against dense", justify="right")
    for name, seconds in finetuned.items():
        table.add_row(name, f"{1e3 * seconds:.0f}", f"{finetuned['dense pair, native'] / seconds:.2f}×")
    console.print(table)

    training = train_steps(task, uniform)
    table = Table(title="Training, steps of 16 images", title_justify="left")
    table.add_column("what")
    table.add_column("ms per step", justify="right")
    table.add_column("speed against dense", justify="right")
    for name, seconds in training.items():
        table.add_row(name, f"{1e3 * seconds:.0f}", f"{training['dense pair'] / seconds:.2f}×")
    console.print(table)
    if options.output is not None:
        figures = {
            "plans_per_second": 1 / per_plan,
            "probe_images": len(yardstick.inputs),
            "threads": torch.get_num_threads(),
            "score_seconds": stages,
            "eager_features_seconds": eager_seconds,
            "training_step_seconds": training,
            "finetuning_step_seconds": finetuned,
        }
        write_json(options.output, figures)


def side_by_side(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn: whatever else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 2:  # the first ones warm up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


SLICE = 0.25
"""Share of the generator's MACs of the finetuned slice; its discriminator keeps half."""
OUTPUTS = "native, outputs"
KNOWN = f"{OUTPUTS} (remembered)"
INGREDIENTS: dict[str, Ingredients] = {
    OUTPUTS: NO_INGREDIENTS,
    f"{OUTPUTS}, perceptual distance (today's default)": Ingredients(),
    f"{OUTPUTS}, aligned features": replace(NO_INGREDIENTS, features="alignment"),
    KNOWN: replace(NO_INGREDIENTS, variants=1),
    f"{KNOWN}, aligned features": replace(NO_INGREDIENTS, features="alignment", variants=1),
    f"{KNOWN}, features by adapters": replace(NO_INGREDIENTS, features="adapters", variants=1),
    f"{KNOWN}, dense adversary": replace(NO_INGREDIENTS, variants=1, adversary="dense"),
    f"{KNOWN}, both adversaries": replace(NO_INGREDIENTS, variants=1, adversary="both"),
    f"{KNOWN}, matched in the dense D": replace(NO_INGREDIENTS, variants=1, matching="target"),
    f"{KNOWN}, perceptual distance": replace(NO_INGREDIENTS, variants=1, perceptual=PERCEPTUAL),
    f"{OUTPUTS} of an online teacher": replace(NO_INGREDIENTS, online=True),
}
"""What is timed → what finetuning adds."""


def finetuning_calls(task: Task) -> dict[str, Callable[[], object]]:
    """One training step each: the dense pair with native losses, then slices with more and more."""
    ordered, networks = task.ordered(), prunable(task, "macs")
    plans = {
        agent: tuple(uniform_widths(networks[agent], share).tolist())
        for agent, share in zip(AGENTS, (SLICE, 0.5), strict=True)
    }
    dense = DensePair(task.networks["generator"], task.networks["discriminator"], task.groups["generator"])
    images = task.train.take(16)
    inputs, targets = images.tensors()
    options, rows = finetuning(1, 0, task.device), torch.arange(16)

    def step_of(
        widths: Mapping[str, tuple[int, ...]], options: TrainingOptions, added: Ingredients
    ) -> Callable[[], object]:
        pair = [ordered[agent].network(widths[agent]) for agent in AGENTS]
        trainer = finetuner(pair[0], pair[1], dense.generator, options, added, dense)
        if trainer.teacher is not None and added.variants:
            trainer.teacher.study(0, inputs)
        return lambda: trainer.step(inputs, targets, options.learning_rate, rows)

    native = replace(options, distillation=0.0)
    calls = {
        "dense pair, native": step_of(task.dense_widths, native, NO_INGREDIENTS),
        "native": step_of(plans, native, NO_INGREDIENTS),
    }
    return calls | {name: step_of(plans, options, added) for name, added in INGREDIENTS.items()}


def train_steps(task: Task, uniform: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Median seconds of one training step: the dense pair, the finetuned uniform slice, the warm-up."""
    ordered = task.ordered()
    inputs, targets = task.train.take(16).tensors()
    teacher = task.networks["generator"]

    def step_of(widths: dict[str, tuple[int, ...]], options: TrainingOptions) -> float:
        pair = [ordered[agent].network(widths[agent]).requires_grad_(True).train() for agent in AGENTS]
        trainer = PairedTrainer(pair[0], pair[1], options, teacher)
        return median_seconds(lambda: trainer.step(inputs, targets, options.learning_rate), 8)

    result = {
        "dense pair": step_of(task.dense_widths, TrainingOptions()),
        "uniform slice, native losses": step_of(uniform, TrainingOptions()),
        "uniform slice, with output distillation": step_of(uniform, FINETUNING),
    }
    stamps = [time.perf_counter()]
    train_elastic(
        (task.networks["generator"], task.networks["discriminator"]),
        (ordered["generator"], ordered["discriminator"]),
        (uniform["generator"], uniform["discriminator"]),
        (task.multiples["generator"], task.multiples["discriminator"]),
        task.train,
        ElasticOptions(steps=8),
        lambda *_: stamps.append(time.perf_counter()),
    )
    result["elastic warm-up (three widths)"] = float(np.median(np.diff(stamps)[2:]))
    return result


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
