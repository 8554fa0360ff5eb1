"""The main job: prune a pretrained pair with cooperative agents, finetune it, measure it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from torch import nn
from tyro.conf import OmitArgPrefixes, arg

from envs.budget import Budget
from envs.records import Evaluation
from envs.rewards import Weights
from experiments import cli
from experiments.build import (
    ImageCounts,
    build_budgets,
    build_learner,
    check_learner,
    check_reachable,
    elastic_options,
    finetuning_of,
    image_counts,
    pick_device,
    save_pair,
    usual_warm_up,
    warm_up,
    with_latency,
)
from experiments.credit import describe_credit, share_credit, write_credit
from experiments.figures import NetworkWidths, Series, curves, samples, save_figure, save_image, widths
from experiments.report import evaluation_table, latency_errors, print_latency
from experiments.runs import (
    RunFolder,
    check_least,
    create_run,
    describe_run,
    flag,
    given_options,
    open_run,
    plain,
    read_json,
    read_metrics,
    read_options,
    task_of,
)
from experiments.searching import Problem, find, learn, write_plans
from experiments.selection import KID, Verdict, measure
from experiments.transfer import adopt, begin, find_policy, read_target, write_transfer
from experiments.watch import Watch
from gan.cyclegan import CycleOptions
from gan.data import PairedImages
from gan.distillation import DensePair, Ingredients
from gan.elastic import ElasticNetwork
from gan.errors import UserError
from gan.evaluation import Judge
from gan.features import load_extractor
from gan.files import file_hash, write_json
from gan.loop import TrainingProgress
from gan.own_task import OwnOptions, OwnTask, make_own_task, save_own_task
from gan.plans import Plan
from gan.scoring import run_batched
from gan.tasks import AGENTS, Task, load_elastic, load_task, own_task, save_elastic
from gan.training import Lessons, TrainingOptions

Pair = tuple[nn.Module, nn.Module]
EQUAL_TIME = "uniform_equal_time"
"""The uniform plan, finetuned for as long as search and finetuning of the agents' plan took."""
QUICK_WARM_UP = 10
"""Steps of the warm-up with ``--quick``."""
DESCRIPTION = """Prunes a pretrained generator and its discriminator with cooperative RL agents, finetunes
the smaller pair and compares it with the usual ways. Everything goes to a run folder."""
EXAMPLES = (
    ("python experiments/train_agents.py", "the embedded task, about 7 minutes on 2 cores"),
    ("python experiments/train_agents.py --quick", "the same road in under a minute"),
    ("python experiments/train_agents.py --budget 0.25 --seed 1", "keep a quarter of the parameters"),
    ("python experiments/train_agents.py --algo random", "another learner, for comparison"),
    (
        "python experiments/train_agents.py --generator latest_net_G.pth --discriminator latest_net_D.pth "
        "--data facades",
        "your own networks and images",
    ),
    ("python experiments/train_agents.py --budget 0.05:0.5", "one policy for every budget; see pareto.py"),
    ("python experiments/train_agents.py --from runs/OTHER", "begin with the policy of another run"),
    ("python experiments/train_agents.py --resume runs/NAME", "go on with an interrupted run"),
)


@dataclass(frozen=True)
class Options:
    """Options of ``train_agents.py``."""

    task: str = "edges2emoji"
    """Embedded task: edges2emoji (a U-Net), edges2emoji_resnet; or the folder of one of your own."""
    own: Annotated[OwnOptions, OmitArgPrefixes] = field(default_factory=OwnOptions)
    """Your own networks and images, instead of --task."""
    algo: str = "mappo"
    """Learner: mappo, ippo; one controller: ppo, a2c, sac, td3, ddpg or an SB3 class such as sb3_contrib.TQC;
    cma-es, tpe, evolution, random; gradient; magnitude, uniform; or what you add to agents/registry.py."""
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
    from_: Annotated[Path | None, arg(name="from")] = None
    """Begin with the policy of this run, of whatever task or size, or of a folder that one was saved to."""
    reference: Path | None = None
    """With --from: a run of the same problem without it, to say how many evaluations were saved."""
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
    warm_up: int | None = None
    """Steps of a warm-up of one's own (0: the elastic weights that come with the task). By default 0 where
    there are some; else as many as take about 20 minutes, 150 to 1,200."""
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
    with cli.resumable("train_agents", folder.path, f"{folder.path} is readable as it is"):
        run(options, folder, console)


def open_folder(options: Options) -> tuple[Options, RunFolder]:
    """Check the options and make the run's folder, or open the one to resume.

    Raises:
        UserError: an option that no run can use; nothing has been written then.
    """
    if options.resume is not None:
        folder = open_run(options.resume)
        names = [*given_options(options, free=("resume", "own")), *given_options(options.own, free=())]
        given = [flag(name) for name in names]
        if given:
            raise UserError(f"--resume goes on with the run's own options; leave out {', '.join(given)}")
        if folder.finished:
            raise UserError(
                f"the run {folder.path} is finished; there is nothing to resume: see {folder.evaluation}"
            )
        return read_options(folder, Options), folder
    options = replace(options, algo=check_learner(options.algo))
    check_least(options, evaluations=1, epochs=0, warm_up=0)
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}; it must be 0 or more, below 2^32")
    options.ingredients.check()
    budgets = build_budgets(options.budget)
    own, task = open_task(options)
    notes = [] if own is None else [*own.notes]
    if options.cost == "latency":
        task = task.with_latency()
    check_reachable(task, budgets, options.cost)
    policy = None if options.from_ is None else find_policy(options.from_, options.algo)
    if options.reference is not None and policy is None:
        raise UserError("--reference says what --from saves; give both, or leave it out")
    if options.warm_up is None:
        steps, note = first_warm_up(options, task, budgets)
        options, notes = replace(options, warm_up=steps), [*notes, *note]
    if options.start == "elastic" and not options.warm_up:
        task.shipped_elastic()
    target = None
    if options.reference is not None:
        asked = plain(replace(options, task=task.reference))
        target = read_target(options.reference, asked)
    folder = create_run(task.name, options.algo, options.seed, options.output)
    if own is not None:
        task = replace(task, folder=save_own_task(folder.task, own).resolve())
    options = replace(options, task=task.reference)
    about: dict[str, Any] = {"device": str(task.device), "threads": torch.get_num_threads(), "notes": notes}
    if policy is not None:
        assert options.from_ is not None
        adopt(policy, folder)
        about["transfer"] = {"source": options.from_.resolve(), "reference": target}
        options = replace(options, from_=options.from_.resolve())
    describe_run(folder, options, **about)
    if options.cost == "latency":
        with_latency(task, folder.latency)
    return options, folder


def open_task(options: Options) -> tuple[OwnTask | None, Task]:
    """The named task, or one made from the user's own networks and images, which is not written yet.

    Raises:
        UserError: both at once, or networks and images that do not fit.
    """
    device = pick_device(options.device)
    if not options.own.given:
        return None, load_task(options.task, device)
    if options.task != Options.task:
        raise UserError("--task and networks of your own exclude each other; leave one of them out")
    own = make_own_task(options.own, device)
    return own, own_task(own, device)


def first_warm_up(options: Options, task: Task, budgets: dict[str, Budget]) -> tuple[int, list[str]]:
    """Steps of the run's own warm-up by default, and what to say of them."""
    own = options.own.given or task.folder is not None  # an embedded task without its weights is refused
    if options.start == "dense" or task.elastic_path is not None or not own:
        return 0, []
    if options.quick:
        return QUICK_WARM_UP, []
    print("timing a step of the elastic warm-up", flush=True)
    steps, note = usual_warm_up(task, budgets, options.cost)
    return steps, [note]


def run(options: Options, folder: RunFolder, console: Console) -> None:
    """Search, slice, finetune, measure; everything that comes out goes to the folder."""
    watch, sizes = Watch(console), Sizes.of(options)
    with watch.stage("load"):
        task = load_task(task_of(folder), pick_device(options.device))
        if options.cost == "latency":
            task = with_latency(task, folder.latency)
        train, test = task.train.take(sizes.images.train), task.test.take(sizes.images.judged)
    about = f"[bold]{folder.path}[/bold]  {task.name}, {options.algo}, seed {options.seed}"
    for line in (about, *read_json(folder.about).get("notes", [])):
        console.print(line, highlight=False, soft_wrap=True)
    weights = prepare_weights(options, task, folder, watch)
    best, uniform = search(options, sizes, task, weights, folder, watch)
    console.print(f"best plan: {describe(best)}", highlight=False, soft_wrap=True)

    pairs: dict[str, Pair] = {
        "dense": (task.networks["generator"], task.networks["discriminator"]),
        "l1_slice_raw": task.cut(task.ordered(), uniform),
        "uniform_raw": task.cut(weights, uniform),
        "pruned_raw": task.cut(weights, best.plan),
    }
    tuned = finetuning_of(task, sizes.epochs, options.seed)
    # The stages see the same images in the same order: the teacher answers once for all of them.
    lessons = Lessons(task.networks["generator"], remembered_batches(task, tuned.batch_size))
    recipe = options.ingredients, DensePair(*pairs["dense"], task.groups["generator"])
    for name in ("l1_slice", "uniform", "pruned"):
        stage_name = f"finetune {name}"
        raw = pairs[f"{name}_raw"]
        pairs[name] = finetune_stage(stage_name, task, raw, lessons, train, tuned, watch, *recipe)
    if options.equal_time:
        seconds = watch.seconds["search"] + watch.seconds["references"] + watch.seconds["finetune pruned"]
        longer = replace(tuned, seconds=seconds)
        pairs[EQUAL_TIME] = finetune_stage(
            "finetune equal time", task, pairs["uniform_raw"], lessons, train, longer, watch, *recipe
        )
    with watch.stage("validate"):
        verdicts = keep_better(task, pairs, task.val.take(sizes.images.judged))
    save_pairs(folder, task, pairs, uniform, best.plan)

    rows = {}
    shown = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
    shown += [EQUAL_TIME] if options.equal_time else []
    with watch.stage("evaluate", len(shown)) as stage:
        judge = Judge.build(*pairs["dense"], test, load_extractor(device=task.device))
        for name in shown:
            rows[name] = judge.row(*pairs[name])
            stage.advance(note=name)
    with watch.stage("pictures"):
        draw(folder, task, test, pairs, best.plan, uniform)
    protocol = (
        f"{len(test)} test images of {task.name}; distributions on these and their mirror images, "
        "against the real targets; nothing was chosen on them"
    )
    val = {name: verdict.to_dict() for name, verdict in verdicts.items()}
    evaluation = {"seconds": watch.seconds, "protocol": protocol, "val": val, "rows": rows}
    if options.cost == "latency":
        with watch.stage("latency"):
            errors = latency_errors(task, {"uniform": uniform, "pruned": best.plan})
        evaluation["latency"] = errors
    if folder.transfer.is_file():
        evaluation["transfer"] = read_json(folder.transfer)
    # Written last: a run that has it is finished.
    write_json(folder.evaluation, evaluation)
    evaluation_table(rows, console)
    for name, verdict in verdicts.items():
        if verdict.kept == "before":
            console.print(f"{name}: {verdict.sentence}", highlight=False, soft_wrap=True)
    if options.cost == "latency":
        print_latency(errors, console)
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
        steps = min(QUICK_WARM_UP, options.warm_up) if options.quick else options.warm_up
        with watch.stage("elastic warm-up", steps) as stage:

            def on_step(step: int, steps: int, loss: float) -> None:
                stage.at(step, steps)
                stage.say(f"L1 to dense {loss:.3f}")

            budgets = build_budgets(options.budget)
            made = warm_up(task, budgets, options.cost, elastic_options(task, steps, options.seed), on_step)
        save_elastic(folder.elastic, made, task)
    write_json(folder.elastic_reference, {"start": "elastic", "hash": file_hash(folder.elastic)})
    # Read back even when just made: fp16 on disk, and a resumed run must see the same numbers.
    return save_ranking(folder, load_elastic(folder.elastic, task))


def remembered_batches(task: Task, size: int) -> int:
    """Batches of the teacher's answers that are kept: 0.4 GB in half precision."""
    return int(4e8 / (2 * size * task.val.targets[0].numel()))


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


def finetune_stage(
    name: str,
    task: Task,
    pair: Pair,
    lessons: Lessons,
    train: PairedImages,
    options: TrainingOptions | CycleOptions,
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
        trainer = task.finetuner(*pair, lessons, options, ingredients, dense)
        return trainer.pair(trainer.fit(train, on_epoch))


def keep_better(task: Task, pairs: dict[str, Pair], val: PairedImages) -> dict[str, Verdict]:
    """Put the start back where finetuning made it worse on val; what was found for each finetuned pair."""
    judge = Judge.build(*pairs["dense"], val, load_extractor(device=task.device))
    measured = {name: measure(judge, generator)[KID] for name, (generator, _) in pairs.items()}
    verdicts = {}
    for name in pairs:
        start = "uniform_raw" if name == EQUAL_TIME else f"{name}_raw"
        if start in pairs:
            verdicts[name] = Verdict(measured[start], measured[name])
            if verdicts[name].kept == "before":
                pairs[name] = pairs[start]
    return verdicts


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
        save_figure(curves(series, window, title=task.name), folder.curves)
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
