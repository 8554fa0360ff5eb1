"""The road of a run, from the dense networks to the table: search, slice, finetune, measure, draw.

Written once for a task of one direction and for both directions of a translator: what belongs to a direction
is done for each of ``task.ways``; one search finds the plan for all networks, one finetuning trains them
together.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor, nn

from envs.budget import Budget
from envs.records import Evaluation
from experiments.build import (
    ImageCounts,
    build_budgets,
    build_learner,
    elastic_options,
    finetuning_of,
    image_counts,
    pick_device,
    save_pair,
    warm_up,
    with_latency,
)
from experiments.credit import describe_credit, share_credit, write_credit
from experiments.figures import NetworkWidths, Series, curves, publish, samples, save_image, widths
from experiments.report import evaluation_table, latency_errors, print_latency
from experiments.runs import RunFolder, read_json, read_metrics, task_of
from experiments.searching import Problem, find, learn, write_plans
from experiments.selection import KID, Verdict
from experiments.selection import measure as validate
from experiments.transfer import begin, write_transfer
from experiments.watch import Watch
from gan.cyclegan import CycleOptions
from gan.distillation import DensePair
from gan.elastic import ElasticNetwork
from gan.errors import Diverged
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.files import file_hash, write_json
from gan.loop import TrainingProgress
from gan.plans import Plan
from gan.scoring import run_batched
from gan.tasks import AGENTS, Task, load_elastic, save_elastic
from gan.training import Lessons, TrainingOptions
from gan.two_way import (
    AnyTask,
    TwoWayTask,
    by_agent,
    cut,
    load_any_task,
    part_of,
    share_of,
)

if TYPE_CHECKING:
    from experiments.train_agents import Options

Pairs = Mapping[str, tuple[nn.Module, nn.Module]]
"""Direction → (generator, discriminator); ``""`` where there is one direction."""
QUICK_WARM_UP = 10
"""Steps of the warm-up with ``--quick``."""
FINETUNED = ("l1_slice", "uniform", "pruned")
"""Stages that are finetuned, each from its ``_raw`` one."""
EQUAL_TIME = "uniform_equal_time"
"""The uniform plan, finetuned for as long as search and finetuning of the agents' plan took."""


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


def run(options: Options, folder: RunFolder, console: Console) -> None:
    """Search, slice, finetune, measure; everything that comes out goes to the folder."""
    watch, sizes = Watch(console), Sizes.of(options)
    with watch.stage("load"):
        task = load_any_task(task_of(folder), pick_device(options.device))
        if options.cost == "latency":
            task = with_latency(task, folder.latency)
    about = f"[bold]{folder.path}[/bold]  {task.name}, {options.algo}, seed {options.seed}"
    for line in (about, *read_json(folder.about).get("notes", [])):
        console.print(line, highlight=False, soft_wrap=True)
    weights = prepare_weights(options, task, folder, watch)
    best, uniform = search(options, sizes, task, weights, folder, watch)
    console.print(f"best plan: {describe(best)}", highlight=False, soft_wrap=True)

    stages: dict[str, Pairs] = {
        "dense": {
            way: (one.networks["generator"], one.networks["discriminator"]) for way, one in task.ways.items()
        },
        "l1_slice_raw": cut(task, task.ordered(), uniform),
        "uniform_raw": cut(task, weights, uniform),
        "pruned_raw": cut(task, weights, best.plan),
    }
    finetune = Finetuning(task, options, sizes, watch)
    for name in FINETUNED:
        stages[name] = finetune(name, stages[f"{name}_raw"])
    if options.equal_time:
        seconds = watch.seconds["search"] + watch.seconds["references"] + watch.seconds["finetune pruned"]
        stages[EQUAL_TIME] = finetune(EQUAL_TIME, stages["uniform_raw"], seconds)
    with watch.stage("validate"):
        verdicts = keep_better(task, stages, sizes.images.judged, finetune.diverged)
    save_stages(folder, task, stages, uniform, best.plan)

    shown = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
    shown += [EQUAL_TIME] if options.equal_time else []
    tables = measure(task, sizes, stages, shown, watch)
    with watch.stage("pictures"):
        draw(options, folder, task, sizes, stages, best.plan, uniform)
    protocol = describe_protocol(task, sizes)
    rows = {row_name(name, way): row for name in shown for way, row in tables[name].items()}
    val = {name: verdict.to_dict() for name, verdict in verdicts.items()}
    evaluation: dict[str, Any] = {"seconds": watch.seconds, "protocol": protocol, "val": val, "rows": rows}
    if options.cost == "latency":
        with watch.stage("latency"):
            errors = by_agent(
                {
                    way: latency_errors(
                        one, {"uniform": part_of(uniform, way), "pruned": part_of(best.plan, way)}
                    )
                    for way, one in task.ways.items()
                }
            )
        evaluation["latency"] = errors
    if folder.transfer.is_file():
        evaluation["transfer"] = read_json(folder.transfer)
    # Written last: a run that has it is finished.
    write_json(folder.evaluation, evaluation)
    for way, one in task.ways.items():
        if way:
            console.print(f"direction {way}: {one.name}", highlight=False)
        evaluation_table({name: tables[name][way] for name in shown}, console)
    for name, verdict in verdicts.items():
        if verdict.kept == "before":
            console.print(f"{name}: {verdict.sentence}", highlight=False, soft_wrap=True)
    if options.cost == "latency":
        print_latency(errors, console)
    console.print(f"{protocol}\neverything is in {folder.path}", highlight=False, soft_wrap=True)


def row_name(stage: str, way: str) -> str:
    """Key of a row of the table: ``pruned``, or ``pruned_A`` where there are both directions."""
    return f"{stage}_{way}" if way else stage


def prepare_weights(
    options: Options, task: AnyTask, folder: RunFolder, watch: Watch
) -> Mapping[str, ElasticNetwork]:
    """What plans are cut from: shipped elastic weights, a warm-up of the run's own, or raw dense weights."""
    if options.start == "dense":
        write_json(folder.elastic_reference, {"start": "dense"})
        return save_ranking(folder, task.ordered())
    if not options.warm_up:
        shipped = task.shipped_elastic()
        paths = {way: one.elastic_path for way, one in task.ways.items() if one.elastic_path is not None}
        refer(folder, {way: {"file": path.name, "hash": file_hash(path)} for way, path in paths.items()})
        return save_ranking(folder, shipped)
    budgets = build_budgets(options.budget, task.networks)
    for way, one in task.ways.items():
        if not folder.elastic_of(way).exists():
            own_weights(options, one, share_of(budgets, way), way, folder, watch)
    refer(folder, {way: {"hash": file_hash(folder.elastic_of(way))} for way in task.ways})
    # Read back even when just made: fp16 on disk, and a resumed run must see the same numbers.
    made = {way: load_elastic(folder.elastic_of(way), one) for way, one in task.ways.items()}
    return save_ranking(folder, by_agent(made))


def own_weights(
    options: Options, task: Task, budgets: dict[str, Budget], way: str, folder: RunFolder, watch: Watch
) -> None:
    """Make and write the elastic weights of one direction."""
    assert options.warm_up is not None
    steps = min(QUICK_WARM_UP, options.warm_up) if options.quick else options.warm_up
    with watch.stage(f"elastic warm-up {way}".strip(), steps) as stage:

        def on_step(step: int, steps: int, loss: float) -> None:
            stage.at(step, steps)
            stage.say(f"L1 to dense {loss:.3f}")

        made = warm_up(task, budgets, options.cost, elastic_options(task, steps, options.seed), on_step)
    save_elastic(folder.elastic_of(way), made, task)


def refer(folder: RunFolder, files: Mapping[str, Mapping[str, str]]) -> None:
    """Write which elastic weights were used: direction → what names them."""
    named = files.get("", {"ways": files})
    write_json(folder.elastic_reference, {"start": "elastic", **named})


def save_ranking(folder: RunFolder, weights: Mapping[str, ElasticNetwork]) -> Mapping[str, ElasticNetwork]:
    """Write which dense channels each width keeps."""
    orders = {agent: [order.tolist() for order in network.orders] for agent, network in weights.items()}
    write_json(folder.ranking, orders)
    return weights


def search(
    options: Options,
    sizes: Sizes,
    task: AnyTask,
    weights: Mapping[str, ElasticNetwork],
    folder: RunFolder,
    watch: Watch,
) -> tuple[Evaluation, Plan]:
    """Let the agents look for a plan; returns the best one and the uniform plan at its budget.

    Scorer and environment end with this function: finetuning has use for their memory.
    """
    problem = Problem(
        options.budget, sizes.evaluations, options.cost, options.start, options.reward, options.weights
    )
    with watch.stage("scorer"):
        scorer = problem.scorer(task, weights, sizes.images, shipped=not options.warm_up)
    env = problem.env(scorer, folder)
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
    zero_shot = begin(agent, env, folder)
    with watch.stage("search", sizes.evaluations) as stage:
        incumbents = learn(env, agent, folder, stage)
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
    found = find(env, agent)
    if zero_shot is not None:
        found["zero_shot"] = zero_shot
        for line in write_transfer(folder, zero_shot, incumbents):
            watch.console.print(line, highlight=False, soft_wrap=True)
    write_plans(folder, found)
    credit = write_credit(folder, share_credit(env, found["best"].plan, found["best"].budgets))
    watch.console.print(describe_credit(credit), highlight=False, soft_wrap=True)
    return found["best"], found["uniform"].plan


def describe(evaluation: Evaluation) -> str:
    """One line: score and widths."""
    rows = "  ".join(f"{agent} {' '.join(map(str, evaluation.plan[agent]))}" for agent in evaluation.plan)
    return f"score {evaluation.potential:+.3f} (uniform 0)  {rows}"


class Finetuning:
    """Finetunes the stages of a run alike: the same images in the same order, the same teachers.

    Args:
        task: dense networks and images.
        options: of the run.
        sizes: of the run.
        watch: shows a bar for each stage.

    Attributes:
        diverged: names of the stages whose finetuning did; they are what they began with.
    """

    def __init__(self, task: AnyTask, options: Options, sizes: Sizes, watch: Watch) -> None:
        self.task, self.sizes, self.watch = task, sizes, watch
        self.ingredients = options.ingredients
        self.diverged: list[str] = []
        first = next(iter(task.ways.values()))  # both directions have images and losses of one kind
        self.training = finetuning_of(first, sizes.epochs, options.seed)
        # The teacher answers once for all stages.
        self.lessons = Lessons(
            first.networks["generator"],
            remembered_batches(first, self.training.batch_size),
            self.training.amp,
        )

    def __call__(self, name: str, pairs: Pairs, seconds: float | None = None) -> Pairs:
        """Train a stage on; for so many seconds, where they are given.

        A training that diverges is told of and gives its start back: the search before it took the time of
        the run, and the other stages can do without it.
        """
        try:
            return self._train(name, pairs, replace(self.training, seconds=seconds))
        except Diverged as error:
            self.diverged.append(name)
            self.watch.console.print(
                f"finetuning of {name} diverged, its start is kept: {error}", highlight=False, soft_wrap=True
            )
            return pairs

    def _train(self, name: str, pairs: Pairs, training: TrainingOptions | CycleOptions) -> Pairs:
        task = self.task
        total = 1.0 if training.seconds else training.epochs
        title = "finetune equal time" if name == EQUAL_TIME else f"finetune {name}"
        with self.watch.stage(title, total) as stage:

            def on_epoch(progress: TrainingProgress) -> None:
                stage.at(round(progress.share * total, 2), total)
                stage.say(" ".join(f"{key} {value:.3f}" for key, value in progress.losses.items()))

            if isinstance(task, TwoWayTask):
                assert isinstance(training, CycleOptions)
                return task.finetune(pairs, training, on_epoch, self.sizes.images.train)
            generator, discriminator = (task.networks[agent] for agent in AGENTS)
            dense = DensePair(generator, discriminator, task.groups["generator"])
            trainer = task.finetuner(*pairs[""], self.lessons, training, self.ingredients, dense)
            return {"": trainer.pair(trainer.fit(task.train.take(self.sizes.images.train), on_epoch))}


def remembered_batches(task: Task, size: int) -> int:
    """Batches of the teacher's answers that are kept: 0.4 GB in half precision."""
    return int(4e8 / (2 * size * task.val.targets[0].numel()))


def keep_better(
    task: AnyTask, stages: dict[str, Pairs], images: int | None, diverged: Collection[str] = ()
) -> dict[str, Verdict]:
    """Put the start back where finetuning made it worse on val; row → what was found for it.

    Args:
        task: dense networks and images.
        stages: of a run; a finetuned stage keeps its start in the directions where that is better.
        images: of val that are looked at; None = all.
        diverged: stages whose finetuning came to nothing.
    """
    verdicts = {}
    extractor = load_extractor(device=task.device)
    starts = {name: f"{name}_raw" for name in FINETUNED} | {EQUAL_TIME: "uniform_raw"}
    starts = {name: start for name, start in starts.items() if name in stages}
    for way, one in task.ways.items():
        judge = Judge.build(*stages["dense"][way], one.val.take(images), extractor)
        looked_at = dict.fromkeys((*starts, *starts.values()))
        measured = {
            name: math.nan if name in diverged else validate(judge, stages[name][way][0])[KID]
            for name in looked_at
        }
        for name, start in starts.items():
            verdict = verdicts[row_name(name, way)] = Verdict(measured[start], measured[name])
            if verdict.kept == "before":
                stages[name] = {**stages[name], way: stages[start][way]}
    return verdicts


def save_stages(
    folder: RunFolder, task: AnyTask, stages: Mapping[str, Pairs], uniform: Plan, best: Plan
) -> None:
    """Write the networks that a user may want: pruned before and after finetuning, and the uniform ones."""
    for name, stage, plan in (
        ("pruned", "", best),
        ("pruned_raw", "raw", best),
        ("uniform", "uniform", uniform),
    ):
        for way, one in task.ways.items():
            save_pair(folder, stage, name, one, part_of(plan, way), stages[name][way], half=True, way=way)


def measure(
    task: AnyTask, sizes: Sizes, stages: Mapping[str, Pairs], shown: Sequence[str], watch: Watch
) -> dict[str, dict[str, dict[str, float]]]:
    """Stage → direction → figures on the test images."""
    tables: dict[str, dict[str, dict[str, float]]] = {name: {} for name in shown}
    with watch.stage("evaluate", len(shown) * len(task.ways)) as stage:
        extractor = load_extractor(device=task.device)
        for way, one in task.ways.items():
            judge = Judge.build(*stages["dense"][way], one.test.take(sizes.images.judged), extractor)
            for name in shown:
                tables[name][way] = judge.row(*stages[name][way])
                stage.advance(note=row_name(name, way))
    return tables


def describe_protocol(task: AnyTask, sizes: Sizes) -> str:
    """The sentence below the table."""
    test = next(iter(task.ways.values())).test.take(sizes.images.judged)
    where = " in each direction" if len(task.ways) > 1 else ""
    targets = "targets" if test.partners else "images of the target domain"
    return (
        f"{len(test)} test images of {task.name}{where}; distributions on these and their mirror images, "
        f"against the real {targets}; nothing was chosen on them"
    )


def draw(
    options: Options,
    folder: RunFolder,
    task: AnyTask,
    sizes: Sizes,
    stages: Mapping[str, Pairs],
    best: Plan,
    uniform: Plan,
) -> None:
    """The run's three pictures."""
    if folder.metrics.exists():
        label = f"{options.algo}, seed {options.seed}"
        window = max(10, sizes.evaluations // 10)
        series = [Series(label, (read_metrics(folder),))]
        publish(curves(series, window, title=task.name), folder.curves)
    groups = by_agent({way: one.groups for way, one in task.ways.items()})
    networks = [NetworkWidths.of(agent, row, uniform[agent], best[agent]) for agent, row in groups.items()]
    publish(widths(networks, title=f"{task.name}: channels kept"), folder.widths)
    columns: dict[str, Tensor] = {}
    for way, one in task.ways.items():
        shown = one.test.take(sizes.images.judged).take(8)
        inputs, targets = shown.tensors()
        inputs = inputs.to(one.device)
        pictures = {"input": inputs}
        for name in ("dense", "uniform", "pruned"):
            pictures[name] = run_batched(stages[name][way][0], inputs)
        if shown.partners:
            pictures["target"] = targets
        columns |= {f"{name} {way}".strip(): images.cpu() for name, images in pictures.items()}
    save_image(samples(columns, rows=8), folder.samples)
