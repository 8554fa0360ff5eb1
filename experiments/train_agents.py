"""The main job: prune a pretrained pair with cooperative agents, finetune it, measure it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from envs.budget import Budget
from envs.rewards import Weights
from experiments import cli
from experiments.build import (
    build_budgets,
    check_learner,
    check_reachable,
    pick_device,
    usual_warm_up,
    with_latency,
)
from experiments.road import QUICK_WARM_UP, run
from experiments.runs import (
    RunFolder,
    check_least,
    create_run,
    describe_run,
    flag,
    given_options,
    open_run,
    plain,
    read_options,
)
from experiments.transfer import adopt, find_policy, read_target
from gan.distillation import Ingredients
from gan.errors import UserError
from gan.own_task import OwnOptions
from gan.own_two_way import AnyOwn, make_own
from gan.task_folder import save_own
from gan.two_way import AnyTask, load_any_task, own_any_task

DESCRIPTION = """Prunes a pretrained generator and its discriminator with cooperative RL agents, finetunes
the smaller pair and compares it with the usual ways. Everything goes to a run folder."""
EXAMPLES = (
    ("python experiments/train_agents.py", "the embedded task, 10 to 21 minutes on 2 cores"),
    ("python experiments/train_agents.py --quick", "the same road in under a minute"),
    ("python experiments/train_agents.py --budget 0.25 --seed 1", "keep a quarter of the parameters"),
    ("python experiments/train_agents.py --algo random", "another learner, for comparison"),
    (
        "python experiments/train_agents.py --generator latest_net_G.pth --discriminator latest_net_D.pth "
        "--data facades",
        "your own networks and images",
    ),
    (
        "python experiments/train_agents.py --generator latest_net_G_A.pth "
        "--discriminator latest_net_D_A.pth --back latest_net_G_B.pth --data horse2zebra",
        "one direction of your own CycleGAN",
    ),
    (
        "python experiments/train_agents.py --generator latest_net_G_A.pth "
        "--discriminator latest_net_D_A.pth --back latest_net_G_B.pth "
        "--back-discriminator latest_net_D_B.pth --data horse2zebra",
        "both directions of it at once",
    ),
    ("python experiments/train_agents.py --task noto_and_twemoji", "the same, of an embedded one"),
    ("python experiments/train_agents.py --budget 0.05:0.5", "one policy for every budget; see pareto.py"),
    ("python experiments/train_agents.py --from runs/OTHER", "begin with the policy of another run"),
    ("python experiments/train_agents.py --resume runs/NAME", "go on with an interrupted run"),
)


@dataclass(frozen=True)
class Options:
    """Options of ``train_agents.py``."""

    task: str = "edges2emoji"
    """Embedded task: edges2emoji (a U-Net), edges2emoji_resnet; without pairs noto2twemoji, twemoji2noto, or
    noto_and_twemoji for both of them at once; or the folder of one of your own, of one direction or both."""
    own: Annotated[OwnOptions, OmitArgPrefixes] = field(default_factory=OwnOptions)
    """Your own networks and images, instead of --task."""
    algo: str = "mappo"
    """Learner: mappo, ippo; one controller: ppo, a2c, sac, td3, ddpg or an SB3 class such as sb3_contrib.TQC;
    cma-es, tpe, evolution, random; gradient; magnitude, uniform; or what you add to agents/registry.py."""
    seed: int = 0
    """Of the search and of the finetuning."""
    budget: str = "generator=0.1,discriminator=0.5"
    """Share of the cost to keep: [agent=]LOW[:HIGH],…; a bare number is the generator's. With both directions
    generator=… is for each of them, generator_A=… for one."""
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
        given = [flag(name) for name in given_options(options, free=("resume",))]
        if given:
            raise UserError(f"--resume goes on with the run's own options; leave out {', '.join(given)}")
        if folder.finished:
            raise UserError(
                f"the run {folder.path} is finished; there is nothing to resume: see {folder.evaluation}"
            )
        return read_options(folder, Options), folder
    options = replace(options, algo=check_learner(options.algo))
    check_least(options, evaluations=1, epochs=0, warm_up=0, seed=0)
    options.ingredients.check()
    own, task = open_task(options)
    budgets = build_budgets(options.budget, task.networks)
    notes = [] if own is None else [*own.notes]
    for one in task.ways.values():
        one.check_ingredients(options.ingredients)
    # As numbers: a default that changes later must not change what is resumed.
    paired = all(one.back is None for one in task.ways.values())
    options = replace(options, ingredients=options.ingredients.settled(paired))
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
        task = replace(task, folder=save_own(folder.task, own).resolve())
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


def open_task(options: Options) -> tuple[AnyOwn | None, AnyTask]:
    """The named task, or one made from the user's own networks and images, which is not written yet.

    Raises:
        UserError: both at once, or networks and images that do not fit.
    """
    device = pick_device(options.device)
    if not options.own.given:
        return None, load_any_task(options.task, device)
    if options.task != Options.task:
        raise UserError("--task and networks of your own exclude each other; leave one of them out")
    own = make_own(options.own, device)
    return own, own_any_task(own, device)


def first_warm_up(options: Options, task: AnyTask, budgets: dict[str, Budget]) -> tuple[int, list[str]]:
    """Steps of the run's own warm-up by default, and what to say of them."""
    if options.start == "dense" or all(one.elastic_path is not None for one in task.ways.values()):
        return 0, []
    if not options.own.given and task.folder is None:  # an embedded task without its weights is refused
        return 0, []
    if options.quick:
        return QUICK_WARM_UP, []
    print("timing a step of the elastic warm-up", flush=True)
    steps, note = usual_warm_up(task, budgets, options.cost)
    return steps, [note]


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
