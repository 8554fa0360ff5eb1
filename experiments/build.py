"""Options → ready objects; nothing else."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import nn

from agents.base import Agent
from agents.registry import build_agent, resolve_agent
from envs.budget import Budget, default_budgets, fixed_ratios, parse_budgets, uniform_widths
from envs.pruning_env import PruningEnv, check_budgets
from envs.records import Listener
from envs.rewards import Weights
from experiments.runs import RunFolder
from gan.checkpoints import save_network
from gan.cost import DEFAULT_COST
from gan.cyclegan import CYCLE_FINETUNING, CycleOptions
from gan.elastic import ElasticNetwork, ElasticOptions, train_elastic
from gan.errors import UserError
from gan.evaluations import CountedScorer, EvaluationLog, PlanScorer, PrunableNetwork
from gan.latency import read_latency, write_latency
from gan.plans import Plan
from gan.runtime import bfloat16_pays
from gan.task_folder import image_recipe
from gan.tasks import AGENTS, STATISTICS_IMAGES, Task
from gan.training import FINETUNING, TrainingOptions
from gan.two_way import AnyTask, agent_of, by_agent, share_of

TaskT = TypeVar("TaskT", bound=AnyTask)
WARM_UP_STEPS = 150, 1200
"""Fewest and most steps that a run's own warm-up takes by default; more than 1,200 gain little."""
WARM_UP_MINUTES = 20
"""What it may take between those."""


class ImageCounts(NamedTuple):
    """How many images a program works on; None = all.

    Attributes:
        probe: val images that plans are scored on.
        statistics: train images behind the BatchNorm statistics of a slice.
        train: images that finetuning learns from.
        judged: images that finetuned networks are measured on.
    """

    probe: int | None
    statistics: int
    train: int | None
    judged: int | None


def image_counts(quick: bool) -> ImageCounts:
    """All images, or the few of ``--quick``."""
    return ImageCounts(16, 16, 48, 32) if quick else ImageCounts(None, STATISTICS_IMAGES, None, None)


def build_budgets(text: str, agents: Iterable[str] = AGENTS) -> dict[str, Budget]:
    """``--budget`` → one budget per agent; the defaults where it is empty."""
    return parse_budgets(text, agents) if text else default_budgets(agents)


def fixed_shares(budgets: Mapping[str, Budget], text: str) -> dict[str, float]:
    """Agent → keep ratio.

    Raises:
        UserError: a budget is a range: plans of different cost do not compare.
    """
    shares = fixed_ratios(budgets)
    if len(shares) < len(budgets):
        raise UserError(f"the budget {text!r} is a range; plans are compared at one budget, such as 0.1")
    return shares


def prunable(task: AnyTask, cost: str = DEFAULT_COST) -> dict[str, PrunableNetwork]:
    """The networks of a task as a search sees them, without weights.

    The cost ``latency`` needs a task with tables: :func:`with_latency`.
    """
    return by_agent(
        {
            way: {
                kind: PrunableNetwork(
                    kind=kind,
                    groups=one.groups[kind],
                    multiple=one.multiples[kind],
                    cost=one.cost_model(kind),
                    cost_kind=cost,  # type: ignore[arg-type]
                    importance=(),
                )
                for kind in AGENTS
            }
            for way, one in task.ways.items()
        }
    )


def with_latency(task: TaskT, path: Path) -> TaskT:
    """The task with the latency tables of a run: read, or measured and written where there are none yet.

    Read back even when just measured, so that a resumed run counts with the same numbers.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        tables = task.latency or task.with_latency().latency
        assert tables is not None
        write_latency(path, tables)
    return task.with_latency(read_latency(path))  # type: ignore[return-value]


def check_reachable(task: AnyTask, budgets: dict[str, Budget], cost: str) -> None:
    """Refuse budgets below what the smallest plan costs, before anything is written.

    Raises:
        UserError: with the reachable range.
    """
    check_budgets(prunable(task, cost), budgets)


def check_counterparts(task: Task, split: Literal["val", "test"]) -> None:
    """Refuse a task for a study that holds outputs against true counterparts, where its images have none.

    Raises:
        UserError: with what to do.
    """
    if not (task.val if split == "val" else task.test).partners:
        raise UserError(
            f"the {split} images of {task.name} have no true counterparts, and this study compares with them "
            "(L1); take a task that has"
        )


def smallest_plan(
    task: Task, budgets: dict[str, Budget], cost: str = DEFAULT_COST
) -> dict[str, tuple[int, ...]]:
    """Uniform widths at the lowest budget of each network."""
    networks = prunable(task, cost)
    return {
        agent: tuple(int(w) for w in uniform_widths(networks[agent], budgets[agent].low)) for agent in AGENTS
    }


def warm_up(
    task: Task,
    budgets: dict[str, Budget],
    cost: str,
    options: ElasticOptions,
    on_step: object = None,
    start: Mapping[str, ElasticNetwork] | None = None,
) -> dict[str, ElasticNetwork]:
    """Train elastic weights for the budgets of a run; from the dense weights, or on from ``start``."""
    smallest = smallest_plan(task, budgets, cost)
    begun = task.ordered() if start is None else start
    trained = train_elastic(
        (task.networks["generator"], task.networks["discriminator"]),
        (begun["generator"], begun["discriminator"]),
        (smallest["generator"], smallest["discriminator"]),
        (task.multiples["generator"], task.multiples["discriminator"]),
        task.train,
        options,
        on_step,  # type: ignore[arg-type]
    )
    return dict(zip(AGENTS, trained, strict=True))


def batch_size(task: Task, most: int = 16) -> int:
    """Images per step: all of ``most`` up to 128 × 128 pixels, a quarter at 256 × 256: memory stays alike."""
    return max(1, min(most, most * 128 * 128 // task.val.inputs[0, 0].numel()))


def elastic_options(task: Task, steps: int, seed: int) -> ElasticOptions:
    """Options of a run's own warm-up."""
    return ElasticOptions(steps=steps, seed=seed, batch_size=batch_size(task))


def usual_warm_up(task: AnyTask, budgets: dict[str, Budget], cost: str) -> tuple[int, str]:
    """Steps of the warm-up where the task comes without elastic weights, and a sentence on their time.

    As many as ``WARM_UP_MINUTES`` allow on this machine for all directions together, by the clock of one step
    of each, but neither fewer nor more than ``WARM_UP_STEPS``.
    """
    seconds = sum(_step_seconds(one, share_of(budgets, way), cost) for way, one in task.ways.items())
    fewest, most = WARM_UP_STEPS
    steps = max(fewest, min(most, 10 * int(6 * WARM_UP_MINUTES / seconds)))
    minutes = steps * seconds / 60
    return steps, (
        f"elastic warm-up of {steps} steps{' for each direction' if len(task.ways) > 1 else ''}, about "
        f"{minutes:.0f} min on this machine; --warm-up N takes another number"
    )


def _step_seconds(task: Task, budgets: dict[str, Budget], cost: str) -> float:
    clock: list[float] = []
    warm_up(task, budgets, cost, elastic_options(task, 2, 0), lambda *_: clock.append(time.perf_counter()))
    return clock[1] - clock[0]  # the first one also prepares kernels


def build_env(
    scorer: PlanScorer,
    budgets: dict[str, Budget],
    *,
    log: Path,
    evaluations: int,
    weights: Weights,
    reward: str,
    feedback: bool = True,
    held: Collection[str] = (),
    listener: Listener | None = None,
) -> PruningEnv:
    """The environment of a run, with its evaluation log."""
    counted = CountedScorer(scorer, EvaluationLog(log, scorer.fingerprint), evaluations)
    return PruningEnv(
        counted,
        budgets,
        weights=weights,
        reward=reward,  # type: ignore[arg-type]
        feedback=feedback,
        held=held,
        listener=listener,
    )


def pick_device(name: str) -> str:
    """``auto`` → ``cuda`` when there is one, else ``cpu``.

    Raises:
        UserError: ``cuda`` where there is none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UserError("--device is cuda, but torch finds no CUDA device; use --device cpu, or auto")
    return ("cuda" if found else "cpu") if name == "auto" else name


def check_learner(algo: str) -> str:
    """The learner's name in the registry; it is built once, so that what cannot be built is told of early.

    Raises:
        UserError: it is unknown, or a class that cannot steer the environment.
    """
    name = resolve_agent(algo)
    build_agent(name)
    return name


def build_learner(algo: str, seed: int, tensorboard: Path | None) -> Agent:
    """An agent from the registry."""
    return build_agent(algo, seed, tensorboard=tensorboard)


def finetuning(epochs: int, seed: int, device: torch.device, seconds: float | None = None) -> TrainingOptions:
    """Options of the finetuning stage; the same for every row of the table."""
    return replace(FINETUNING, epochs=epochs, seed=seed, seconds=seconds, amp=bfloat16_pays(device))


def finetuning_of(
    task: Task, epochs: int, seed: int, seconds: float | None = None
) -> TrainingOptions | CycleOptions:
    """Options of the finetuning stage for the images and the loss of a task."""
    if task.back is not None:
        domains = task.val.inputs.shape[1], task.val.targets.shape[1]
        options = replace(
            CYCLE_FINETUNING,
            epochs=epochs,
            seed=seed,
            seconds=seconds,
            amp=bfloat16_pays(task.device),
            batch_size=batch_size(task, CYCLE_FINETUNING.batch_size),
            adversarial=task.adversarial,
            **task.cycle_weights,
        )
        # A generator can take its targets as inputs only where they have as many channels.
        return options if domains[0] == domains[1] else replace(options, identity=0.0)
    paired = finetuning(epochs, seed, task.device, seconds)
    return replace(paired, batch_size=batch_size(task), adversarial=task.adversarial)


def save_pair(
    folder: RunFolder,
    stage: str,
    row: str,
    task: Task,
    plan: Plan,
    pair: tuple[nn.Module, nn.Module],
    half: bool,
    way: str = "",
) -> None:
    """Write the generator and the discriminator of a plan with their recipes.

    Args:
        folder: of the run.
        stage: part of the files' names, such as ``raw``; may be empty.
        row: which row of the table they are.
        task: its dense pair.
        plan: its widths.
        pair: its networks; the discriminator may be the dense one, trained on.
        half: write kernels in half precision.
        way: direction in the files' names, where the run has both.
    """
    for agent, network in zip(AGENTS, pair, strict=True):
        architecture = task.architectures[agent].pruned(_widths_of(network, task, agent, plan))
        recipe = {"task": task.name, "image_size": task.image_size, "row": row, "plan": plan.to_dict()}
        if task.preprocess is not None:
            recipe |= image_recipe(task.val.inputs.shape[-1], task.preprocess)
        save_network(folder.weights(agent_of(agent, way), stage), network, architecture, recipe, half=half)


def _widths_of(network: nn.Module, task: Task, agent: str, plan: Plan) -> tuple[int, ...]:
    """The plan's widths, or the dense ones where the dense discriminator took the pruned one's place."""
    shapes = [[p.shape for p in one.parameters()] for one in (network, task.networks[agent])]
    if shapes[0] == shapes[1]:
        return task.dense_widths[agent]
    return plan[agent]
