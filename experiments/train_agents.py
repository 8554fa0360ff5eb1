"""The main job: prune a pretrained pair with cooperative agents, finetune it, measure it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.console import Console
from torch import nn
from tyro.conf import OmitArgPrefixes

from agents.base import Agent
from agents.registry import AGENTS as LEARNERS
from envs.budget import budget_ends
from envs.pruning_env import PruningEnv
from envs.records import Evaluation
from envs.rewards import Weights
from experiments import cli
from experiments.build import (
    ImageCounts,
    build_budgets,
    build_env,
    build_learner,
    check_reachable,
    finetuning,
    image_counts,
    pick_device,
    save_pair,
    warm_up,
    with_latency,
)
from experiments.figures import NetworkWidths, Series, curves, samples, save_figure, save_image, widths
from experiments.report import evaluation_table
from experiments.runs import (
    MetricsLog,
    RunFolder,
    create_run,
    describe_run,
    flag,
    given_options,
    open_run,
    plain,
    read_metrics,
    read_options,
)
from experiments.watch import SearchListener, Watch
from gan.data import PairedImages
from gan.distillation import DensePair, Ingredients
from gan.elastic import ElasticNetwork, ElasticOptions
from gan.errors import UserError, unknown
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.files import file_hash, write_json
from gan.plans import Plan
from gan.scoring import run_batched
from gan.surrogate import Surrogate
from gan.tasks import AGENTS, Task, load_elastic, load_task, save_elastic
from gan.training import Lessons, TrainingOptions, TrainingProgress, finetune

Pair = tuple[nn.Module, nn.Module]
DESCRIPTION = """Prunes a pretrained generator and its discriminator with cooperative RL agents, finetunes
the smaller pair and compares it with the usual ways. Everything goes to a run folder."""
EXAMPLES = (
    ("python experiments/train_agents.py", "the embedded task, about 7 minutes on 2 cores"),
    ("python experiments/train_agents.py --quick", "the same road in under a minute"),
    ("python experiments/train_agents.py --budget 0.25 --seed 1", "keep a quarter of the parameters"),
    ("python experiments/train_agents.py --algo random", "another learner, for comparison"),
    ("python experiments/train_agents.py --resume runs/NAME", "go on with an interrupted run"),
)


@dataclass(frozen=True)
class Options:
    """Options of ``train_agents.py``."""

    task: str = "edges2emoji"
    """Embedded task: edges2emoji (a U-Net), edges2emoji_resnet."""
    algo: str = "mappo"
    """Learner: mappo, ippo, cmaes, evolution, random, uniform, or what you add to agents/registry.py."""
    seed: int = 0
    """Of the search and of the finetuning."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Share of the cost to keep: [agent=]LOW[:HIGH],…; a bare number is the generator's."""
    cost: Literal["macs", "params", "latency"] = "params"
    """What the budget is a share of; latency is measured, for one image on one thread."""
    evaluations: int = 300
    """Plans that the search may score."""
    output: Path | None = None
    """New run folder; without it runs/TASK-ALGO-sSEED, numbered when that exists."""
    start: Literal["elastic", "dense"] = "elastic"
    """Score and finetune slices of elastic weights, or raw slices of the dense ones."""
    reward: Literal["step", "final"] = "final"
    """Pay the gain at the end of the episode, for one evaluation each, or at every step."""
    weights: Weights = field(default_factory=Weights)
    """Weights of the reward families."""
    epochs: int = 10
    """Epochs of finetuning, for every row of the table."""
    ingredients: Annotated[Ingredients, OmitArgPrefixes] = field(default_factory=Ingredients)
    """What finetuning adds to native losses and output distillation, for every row of the table."""
    warm_up: int = 0
    """Steps of a warm-up of one's own (0: the elastic weights that come with the task)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""
    equal_time: bool = False
    """Also finetune the uniform plan for the search's seconds on top."""
    resume: Path | None = None
    """Go on with this run; its own options are used."""
    quick: bool = False
    """Few evaluations, images and epochs: a look around, no result."""


@dataclass(frozen=True)
class Sizes:
    """What ``--quick`` makes small: numbers of plans, epochs and images; None = all."""

    evaluations: int
    epochs: int
    images: ImageCounts

    @classmethod
    def of(cls, options: Options) -> Sizes:
        images = image_counts(options.quick)
        if options.quick:
            return cls(min(options.evaluations, 24), 1, images)
        return cls(options.evaluations, options.epochs, images)


def main(options: Options) -> None:
    """The road of a run, from the dense pair to the table."""
    console = Console()
    options, folder = open_folder(options)
    try:
        run(options, folder, console)
    except KeyboardInterrupt:
        command = f"python experiments/train_agents.py --resume {folder.path}"
        raise KeyboardInterrupt(
            f"stopped; {folder.path} is readable as it is; go on with: {command}"
        ) from None


def open_folder(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the run's folder, or open the one to resume.

    Raises:
        UserError: an option that no run can use; nothing has been written then.
    """
    if options.resume is not None:
        folder = open_run(options.resume)
        given = [flag(name) for name in given_options(options, free=("resume",))]
        if given:
            raise UserError(f"--resume goes on with the run's own options; leave out {', '.join(given)}")
        if folder.finished:
            raise UserError(
                f"the run {folder.path} is finished; there is nothing to resume: see {folder.evaluation}"
            )
        return read_options(folder, Options), folder
    if options.algo not in LEARNERS:
        raise unknown("algorithm", options.algo, LEARNERS)
    for name, least in (("evaluations", 1), ("epochs", 0), ("warm_up", 0)):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be {least} or more"
            )
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}; it must be 0 or more, below 2^32")
    options.ingredients.check()
    budgets = build_budgets(options.budget)
    task = load_task(options.task, pick_device(options.device))
    if options.cost == "latency":
        task = task.with_latency()
    check_reachable(task, budgets, options.cost)
    if options.start == "elastic" and not options.warm_up:
        task.shipped_elastic()
    folder = create_run(options.task, options.algo, options.seed, options.output)
    describe_run(folder, options, device=str(task.device), threads=torch.get_num_threads())
    if options.cost == "latency":
        with_latency(task, folder.latency)
    return options, folder


def run(options: Options, folder: RunFolder, console: Console) -> None:
    """Search, slice, finetune, measure; everything that comes out goes to the folder."""
    watch, sizes = Watch(console), Sizes.of(options)
    console.print(
        f"[bold]{folder.path}[/bold]  {options.task}, {options.algo}, seed {options.seed}",
        highlight=False,
        soft_wrap=True,
    )
    with watch.stage("load"):
        task = load_task(options.task, pick_device(options.device))
        if options.cost == "latency":
            task = with_latency(task, folder.latency)
        train, test = task.train.take(sizes.images.train), task.test.take(sizes.images.judged)
    weights = prepare_weights(options, task, folder, watch)
    best, uniform = search(options, sizes, task, weights, folder, watch)
    console.print(f"best plan: {describe(best)}", highlight=False, soft_wrap=True)

    pairs: dict[str, Pair] = {
        "dense": (task.networks["generator"], task.networks["discriminator"]),
        "l1_slice_raw": task.cut(task.ordered(), uniform),
        "uniform_raw": task.cut(weights, uniform),
        "pruned_raw": task.cut(weights, best.plan),
    }
    tuned = finetuning(sizes.epochs, options.seed, task.device)
    # The stages see the same images in the same order: the teacher answers once for all of them.
    lessons = Lessons(task.networks["generator"])
    recipe = options.ingredients, DensePair(*pairs["dense"], task.groups["generator"])
    for name in ("l1_slice", "uniform", "pruned"):
        stage_name = f"finetune {name}"
        pairs[name] = finetune_stage(stage_name, pairs[f"{name}_raw"], lessons, train, tuned, watch, *recipe)
    if options.equal_time:
        seconds = watch.seconds["search"] + watch.seconds["references"] + watch.seconds["finetune pruned"]
        longer = replace(tuned, seconds=seconds)
        pairs["uniform_equal_time"] = finetune_stage(
            "finetune equal time", pairs["uniform_raw"], lessons, train, longer, watch, *recipe
        )
    save_pairs(folder, task, pairs, uniform, best.plan)

    rows = {}
    shown = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
    shown += ["uniform_equal_time"] if options.equal_time else []
    with watch.stage("evaluate", len(shown)) as stage:
        judge = Judge.build(*pairs["dense"], test, load_extractor(device=task.device))
        for name in shown:
            rows[name] = judge.row(*pairs[name])
            stage.advance(note=name)
    with watch.stage("pictures"):
        draw(folder, task, test, pairs, best.plan, uniform)
    protocol = (
        f"{len(test)} test images of {options.task}; distributions on these and their mirror images, "
        "against the real targets; nothing was chosen on them"
    )
    # Written last: a run that has it is finished.
    write_json(folder.evaluation, {"seconds": watch.seconds, "protocol": protocol, "rows": rows})
    evaluation_table(rows, console)
    console.print(f"{protocol}\neverything is in {folder.path}", highlight=False, soft_wrap=True)


def prepare_weights(
    options: Options, task: Task, folder: RunFolder, watch: Watch
) -> Mapping[str, ElasticNetwork]:
    """What plans are cut from: shipped elastic weights, a warm-up of the run's own, or raw dense weights."""
    if options.start == "dense":
        write_json(folder.elastic_reference, {"start": "dense"})
        return save_ranking(folder, task.ordered())
    if not options.warm_up:
        weights = task.shipped_elastic()
        assert task.elastic_path is not None
        write_json(
            folder.elastic_reference,
            {"start": "elastic", "file": task.elastic_path.name, "hash": file_hash(task.elastic_path)},
        )
        return save_ranking(folder, weights)
    if not folder.elastic.exists():
        steps = min(10, options.warm_up) if options.quick else options.warm_up
        with watch.stage("elastic warm-up", steps) as stage:

            def on_step(step: int, steps: int, loss: float) -> None:
                stage.at(step, steps)
                stage.say(f"L1 to dense {loss:.3f}")

            budgets = build_budgets(options.budget)
            made = warm_up(
                task, budgets, options.cost, ElasticOptions(steps=steps, seed=options.seed), on_step
            )
        save_elastic(folder.elastic, made, task)
    write_json(folder.elastic_reference, {"start": "elastic", "hash": file_hash(folder.elastic)})
    # Read back even when just made: fp16 on disk, and a resumed run must see the same numbers.
    return save_ranking(folder, load_elastic(folder.elastic, task))


def save_ranking(folder: RunFolder, weights: Mapping[str, ElasticNetwork]) -> Mapping[str, ElasticNetwork]:
    """Write which dense channels each width keeps."""
    orders = {agent: [order.tolist() for order in network.orders] for agent, network in weights.items()}
    write_json(folder.ranking, orders)
    return weights


def search(
    options: Options,
    sizes: Sizes,
    task: Task,
    weights: Mapping[str, ElasticNetwork],
    folder: RunFolder,
    watch: Watch,
) -> tuple[Evaluation, Plan]:
    """Let the agents look for a plan; returns the best one and the uniform plan at its budget.

    Scorer and environment end with this function: finetuning has use for their memory.
    """
    with watch.stage("scorer"):
        scorer = task.scorer(
            options.cost,
            weights=weights,
            probe=sizes.images.probe,
            statistics_images=sizes.images.statistics,
            surrogate=find_surrogate(options, sizes, task),
        )
    env = build_env(
        scorer,
        build_budgets(options.budget),
        log=folder.evaluations,
        evaluations=sizes.evaluations,
        weights=options.weights,
        reward=options.reward,
    )
    log = env.scorer.log
    assert log is not None
    if log.counted:
        watch.console.print(
            f"{len(log.counted)} plans are known from the log", highlight=False, soft_wrap=True
        )
    shutil.rmtree(folder.tensorboard, ignore_errors=True)  # the repeated search writes every event again
    agent = build_learner(options.algo, options.seed, folder.tensorboard)
    with watch.stage("references") as stage:
        env.prepare(stage.at)
    with watch.stage("search", sizes.evaluations) as stage:
        env.listener = SearchListener(
            MetricsLog(folder.metrics),
            scorer.networks,
            best=lambda: env.best.potential if env.best else None,
            spent=lambda: (env.scorer.evaluations, sizes.evaluations),
            stage=stage,
        )
        agent.learn(env)
        env.listener = None
    # What is read from the log took its time before the interruption.
    watch.seconds["references"] = round(watch.seconds["references"] + log.reference_seconds, 2)
    watch.seconds["search"] = round(watch.seconds["search"] + log.search_seconds, 2)
    if env.scorer.replay_left is not None:
        watch.console.print(
            f"note: the repeated search left the log at plan {env.scorer.replay_left}, because versions, "
            "device or threads are not those of the first time; it went on from there with plans of its own",
            highlight=False,
            soft_wrap=True,
        )
    folder.policy.mkdir(exist_ok=True)
    agent.save(folder.policy)
    best = pick(env, agent, folder)
    return best, env.uniform_plan(best.budgets)


def find_surrogate(options: Options, sizes: Sizes, task: Task) -> Surrogate | None:
    """Predictions of finetuned results, where those that come with the task hold."""
    shipped = options.start == "elastic" and not options.warm_up and sizes.images.probe is None
    return task.surrogate(options.cost, budget_ends(build_budgets(options.budget))) if shipped else None


def pick(env: PruningEnv, agent: Agent, folder: RunFolder) -> Evaluation:
    """The best plan that was scored, and beside it what the agents propose in the end.

    Where the budget was a range, plans of different budgets do not compare: the agents' plan at the
    lowest budget is taken.
    """
    lowest = {name: budget.low for name, budget in env.budgets.items()}
    proposed = env.evaluate(agent.propose(env, lowest), lowest, counted=False)
    best = proposed if env.best is None else env.best
    uniform = env.evaluate(env.uniform_plan(best.budgets), best.budgets, counted=False)
    found = {"best": best, "proposed": proposed, "uniform": uniform}
    described = {
        name: {
            **evaluation.plan.to_dict(),
            "potential": evaluation.potential,
            "scores": dict(evaluation.term_scores),
            "gaps": dict(evaluation.scores.gaps),
            "budgets": dict(evaluation.budgets),
            "unused": dict(evaluation.unused),
        }
        for name, evaluation in found.items()
    }
    write_json(folder.plan, plain(described))
    return best


def describe(evaluation: Evaluation) -> str:
    """One line: score and widths."""
    rows = "  ".join(f"{agent} {' '.join(map(str, evaluation.plan[agent]))}" for agent in evaluation.plan)
    return f"score {evaluation.potential:+.3f} (uniform 0)  {rows}"


def finetune_stage(
    name: str,
    pair: Pair,
    lessons: Lessons,
    train: PairedImages,
    options: TrainingOptions,
    watch: Watch,
    ingredients: Ingredients,
    dense: DensePair,
) -> Pair:
    """Finetune one pair, with a bar."""
    with watch.stage(name, 1.0 if options.seconds else options.epochs) as stage:

        def on_epoch(progress: TrainingProgress) -> None:
            stage.at(round(progress.share * (1.0 if options.seconds else options.epochs), 2), stage_total)
            stage.say(" ".join(f"{key} {value:.3f}" for key, value in progress.losses.items()))

        stage_total = 1.0 if options.seconds else options.epochs
        return finetune(*pair, lessons, train, options, on_epoch, ingredients, dense)


def save_pairs(folder: RunFolder, task: Task, pairs: Mapping[str, Pair], uniform: Plan, best: Plan) -> None:
    """Write the networks that a user may want: pruned before and after finetuning, and the uniform one."""
    for name, stage, plan in (
        ("pruned", "", best),
        ("pruned_raw", "raw", best),
        ("uniform", "uniform", uniform),
    ):
        save_pair(folder, stage, name, task, plan, pairs[name], half=True)


def draw(
    folder: RunFolder, task: Task, test: PairedImages, pairs: Mapping[str, Pair], best: Plan, uniform: Plan
) -> None:
    """The run's three pictures."""
    if folder.metrics.exists():
        options = read_options(folder, Options)
        label = f"{options.algo}, seed {options.seed}"
        window = max(10, Sizes.of(options).evaluations // 10)
        series = [Series(label, (read_metrics(folder),))]
        save_figure(curves(series, window, title=options.task), folder.curves)
    networks = [NetworkWidths.of(agent, task.groups[agent], uniform[agent], best[agent]) for agent in AGENTS]
    save_figure(widths(networks, title=f"{task.name}: channels kept"), folder.widths)
    shown = test.take(8)
    inputs, targets = shown.tensors()
    inputs = inputs.to(task.device)
    columns = {"input": inputs}
    for name in ("dense", "uniform", "pruned"):
        columns[name] = run_batched(pairs[name][0], inputs)
    save_image(
        samples({**{k: v.cpu() for k, v in columns.items()}, "target": targets}, rows=8), folder.samples
    )


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
