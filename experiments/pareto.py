"""One policy, every budget: its front of cost against quality, beside uniform pruning and other searches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.console import Console
from tyro.conf import Positional, arg

from envs.budget import kind_of
from envs.pruning_env import PruningEnv
from envs.rewards import Weights, term_rewards
from experiments import cli
from experiments.build import build_budgets, build_learner, check_counterparts, pick_device
from experiments.credit import Searched, reopen, settings_of
from experiments.figures import FrontForm, Frontier, FrontPanel, check_drawable, fronts, publish
from experiments.front import Place, halvings, hypervolume, undominated
from experiments.report import markdown_table
from experiments.runs import (
    RunFolder,
    open_run,
    plain,
    read_json,
    scored_plans,
    spent_evaluations,
    task_of,
)
from experiments.trials import Settings, Split, Trial, TrialResult, dense_row, run_trials
from experiments.watch import Watch
from gan.append_log import read_header
from gan.cost import DEFAULT_COST
from gan.errors import UserError
from gan.evaluation import KID
from gan.files import write_json, write_text
from gan.plans import Plan
from gan.tasks import check_one_pair, load_task

DESCRIPTION = """Asks a policy that was trained on a range of budgets (train_agents.py --budget 0.05:0.5) for
plans over that range, and draws what they cost against what is wrong with them, the dense pair at the top
right; runs at fixed budgets are drawn beside it. Says what every front cost in evaluations, and its
hypervolume. Writes front.json, table.md, front.png and front.pdf; repeated, it reads what it
has scored and finetuned."""
EXAMPLES = (
    ("python experiments/pareto.py runs/edges2emoji-mappo-s0", "the front before finetuning: seconds"),
    ("python experiments/pareto.py runs/RANGE runs/EVOLUTION-*", "beside searches at fixed budgets"),
    ("python experiments/pareto.py runs/RANGE --scored", "and all that the search scored on its way"),
    ("python experiments/pareto.py runs/RANGE --finetune", "and after finetuning, on val"),
)
GAP = "gap"
"""What plans are judged by before finetuning."""
METRICS = {GAP: "gap to dense, before finetuning", KID: "KID* after finetuning", "l1": "L1 after finetuning"}
"""Metric, lower is better → what it is called."""


@dataclass(frozen=True)
class Options:
    """Options of ``pareto.py``."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """Folders of runs whose searches are over: one or more whose budget is a range, others beside them."""
    points: int = 5
    """Budgets over the range, log-spaced, its ends among them."""
    scored: bool = False
    """Also draw the front of all plans that each search scored on its way, which costs nothing more."""
    finetune: bool = False
    """Also finetune every plan, as its run does, and measure it."""
    seeds: int = 1
    """Finetunings of every plan, with the seeds 0, 1, …"""
    split: Literal["val", "test"] = "val"
    """Images that finetuned plans are measured on."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    output: Path | None = None
    """Folder of the results, made if missing; without it pareto/ in the first run whose budget is a range."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""


@dataclass(frozen=True)
class Known:
    """A run that was named.

    Attributes:
        folder: where it lies.
        options: content of its ``options.json``.
    """

    folder: RunFolder
    options: Mapping[str, Any]

    @property
    def ranged(self) -> bool:
        """Whether its generators' budgets are ranges."""
        budgets = build_budgets(self.options["budget"])
        return any(not budget.fixed for agent, budget in budgets.items() if kind_of(agent) == "generator")

    @property
    def evaluations(self) -> int:
        """That its search spent."""
        return spent_evaluations(self.folder)

    @property
    def reward(self) -> tuple[Weights, str]:
        """What its search was led by: the weights, and which predicted recovery stood behind them."""
        surrogate = read_header(self.folder.evaluations).get("surrogate", "none")
        return Weights(**self.options.get("weights", {})), str(surrogate)


@dataclass(frozen=True)
class Point:
    """A plan of a front.

    Attributes:
        plan: the plan.
        budgets: agent → keep ratio that it was made for.
        cost: its generators' share of the dense cost, in (0, 1].
        score: potential at its budgets, 0 = uniform; None for budgets at which nothing gives it a unit.
        values: metric → value, lower is better.
    """

    plan: Plan
    budgets: Mapping[str, float]
    cost: float
    score: float | None
    values: Mapping[str, float]


@dataclass(frozen=True)
class Front:
    """Plans at several budgets, and what it took to find them.

    Attributes:
        label: whose they are.
        form: how it is drawn.
        evaluations: spent in all: those of the searches, and one for every plan that a policy was asked for.
        points: by rising cost.
    """

    label: str
    form: FrontForm
    evaluations: int
    points: tuple[Point, ...]

    def places(self, metric: str) -> list[Place]:
        """In halvings of the cost, and the metric."""
        return [Place(halvings(point.cost), point.values[metric]) for point in self.points]


class Judged:
    """Points on one yardstick: the scorer, the weights and the units of one run.

    The gap of a plan is Σ weight · gap / spread over the reward's terms, with the spreads at the middle of
    the range: unlike the score it has the same unit and the same zero, the dense pair, at every budget.

    Args:
        env: environment of the run whose yardstick it is.
    """

    def __init__(self, env: PruningEnv) -> None:
        self.env = env
        self.spreads = env.references.at({agent: b.at(0.5) for agent, b in env.budgets.items()}).spreads

    def budgets(self, points: int) -> list[dict[str, float]]:
        """Log-spaced over the ranges, their ends among them; all networks move together."""
        ranges = self.env.budgets.items()
        return [{agent: b.at(float(place)) for agent, b in ranges} for place in np.linspace(0, 1, points)]

    def point(self, plan: Plan, budgets: Mapping[str, float]) -> Point:
        """Score a plan, uncounted."""
        gaps = self.env.scorer.score(plan, counted=False).gaps
        inside = all(b.low <= budgets[agent] <= b.high for agent, b in self.env.budgets.items())
        score = self.env.evaluate(plan, budgets, counted=False).potential if inside else None
        return Point(plan, dict(budgets), self.cost(plan), score, {GAP: self.gap(gaps)})

    def gap(self, gaps: Mapping[str, float]) -> float:
        """A plan's gaps by term → its one gap."""
        units = {term: gap / self.spreads[term] for term, gap in gaps.items()}
        return math.fsum(term_rewards(units, self.env.weights).values())

    def cost(self, plan: Plan) -> float:
        """The generators' share of the dense cost."""
        networks = [(a, n) for a, n in self.env.scorer.networks.items() if kind_of(a) == "generator"]
        kept = sum(float(network.cost_of(np.array(plan[agent]))) for agent, network in networks)
        return kept / sum(float(network.cost_of(network.channels)) for _, network in networks)

    def front(self, label: str, form: FrontForm, evaluations: int, plans: Sequence[Asked]) -> Front:
        """Plans with their budgets → a front."""
        points = sorted((self.point(*asked) for asked in plans), key=lambda point: point.cost)
        return Front(label, form, evaluations, tuple(points))


Asked = tuple[Plan, Mapping[str, float]]


def policy_front(
    judged: Judged, run: Known, env: PruningEnv, budgets: Sequence[Mapping[str, float]], label: str
) -> Front:
    """Ask the policy of a run for a plan at each budget.

    Args:
        judged: the yardstick.
        run: whose policy.
        env: its own environment, for what its policy sees depends on it.
        budgets: to ask for.
        label: of the front.
    """
    run.folder.require(run.folder.policy)
    agent = build_learner(run.options["algo"], int(run.options["seed"]), None)
    agent.load(run.folder.policy)
    plans = [(agent.propose(env, budget), budget) for budget in budgets]
    asked = len({plan.key for plan, _ in plans})
    return judged.front(label, "line", run.evaluations + asked, plans)


def fixed_front(judged: Judged, runs: Sequence[Known], label: str) -> Front:
    """The best plans of runs at fixed budgets."""
    best = [read_json(run.folder.plan)["best"] for run in runs]
    plans = [(Plan.from_dict(one), one["budgets"]) for one in best]
    return judged.front(label, "points", sum(run.evaluations for run in runs), plans)


def uniform_front(judged: Judged, budgets: Sequence[Mapping[str, float]]) -> Front:
    """Equal proportions at each budget; nothing is searched for them."""
    return judged.front(
        "uniform", "line", 0, [(judged.env.uniform_plan(budget), budget) for budget in budgets]
    )


def scored_front(judged: Judged, runs: Sequence[Known], front: Front) -> Front:
    """A front with all that its searches scored on their way: the plans that no other dominates.

    A search at a fixed budget hands over one plan, a policy one for each budget that it is asked for; what
    else they scored has been paid for.

    Args:
        judged: the yardstick.
        runs: whose searches.
        front: what they were asked for, or found.
    """
    points = list(front.points)
    for run in runs:
        for plan, gaps in scored_plans(run.folder):
            points.append(Point(plan, {}, judged.cost(plan), None, {GAP: judged.gap(gaps)}))
    ahead: dict[Place, Point] = {}
    for point in points:
        ahead.setdefault(Place(halvings(point.cost), point.values[GAP]), point)
    kept = tuple(ahead[place] for place in undominated(list(ahead)))
    return Front(f"{front.label}: all that was scored", "steps", front.evaluations, kept)


def check_one_yardstick(runs: Sequence[Known]) -> None:
    """Refuse logs whose gaps do not compare.

    Raises:
        UserError: a search without an evaluation log, or scored otherwise than the first one.
    """
    home = read_header(runs[0].folder.evaluations)
    for run in runs:
        header = read_header(run.folder.evaluations)
        if not header:
            raise UserError(f"--scored needs the evaluation log of {run.folder.path}; leave out one of both")
        for name in home:
            if header.get(name) != home[name]:
                raise UserError(
                    f"{run.folder.path} was scored with another {name} than {runs[0].folder.path} "
                    f"({header.get(name)}, {home[name]}), so that their logs do not compare; leave out that "
                    "run or --scored"
                )


def open_runs(paths: Sequence[Path]) -> tuple[list[Known], list[Known]]:
    """The runs whose budget is a range, and the others.

    Raises:
        UserError: none of the first kind, an unfinished search, or plans that do not compare.
    """
    runs = []
    for path in {path.resolve(): path for path in paths}.values():  # once each: evaluations are added up
        folder = open_run(path)
        folder.require(folder.plan, folder.metrics, folder.elastic_reference)
        check_one_pair(task_of(folder))
        runs.append(Known(folder, read_json(folder.options)))
    ranged, fixed = ([run for run in runs if run.ranged is kind] for kind in (True, False))
    if not ranged:
        raise UserError(
            "a front needs a run whose generator had a range of budgets; "
            "make one with train_agents.py --budget 0.05:0.5"
        )
    home = ranged[0]
    for run in runs:
        for name, default in (("task", None), ("cost", DEFAULT_COST), ("quick", False)):
            if run.options.get(name, default) != home.options.get(name, default):
                raise UserError(
                    f"{run.folder.path} differs from {home.folder.path} in {name} "
                    f"({run.options.get(name)}, {home.options.get(name)}); their plans do not compare"
                )
        if read_json(run.folder.elastic_reference).get("hash") != origin(home):
            raise UserError(
                f"{run.folder.path} cuts its plans from other elastic weights than {home.folder.path}; "
                "their plans do not compare"
            )
    for run in ranged:
        if build_budgets(run.options["budget"]) != build_budgets(home.options["budget"]):
            raise UserError(
                f"the policies of {home.folder.path} and {run.folder.path} know other ranges "
                f"({home.options['budget']}, {run.options['budget']}); draw their fronts one at a time"
            )
    return ranged, fixed


def other_rewards(home: Known, runs: Sequence[Known]) -> str:
    """Which runs sought something else than the yardstick measures, in a sentence; empty where none did.

    At some budgets, not over ranges, a predicted recovery leads searches: their plans are its answer.
    """
    names = [run.folder.path.name for run in runs if run.reward != home.reward]
    if not names:
        return ""
    return (
        f" {', '.join(names)} searched by another reward than {home.folder.path.name} (other weights, or a "
        "predicted recovery): before finetuning they are judged by what they did not seek."
    )


def origin(run: Known) -> str | None:
    """Hash of the elastic weights of a run; None for raw slices."""
    found = read_json(run.folder.elastic_reference).get("hash")
    return None if found is None else str(found)


def group_labels(runs: Sequence[Known], kind: str) -> dict[str, list[Known]]:
    """Label → runs of one learner and seed; the seed is named where a learner has several."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        seeds.setdefault(run.options["algo"], set()).add(run.options["seed"])
    groups: dict[str, list[Known]] = {}
    for run in runs:
        algo, seed = run.options["algo"], run.options["seed"]
        label = f"{algo}, {kind}" + (f", seed {seed}" if len(seeds[algo]) > 1 else "")
        groups.setdefault(label, []).append(run)
    return groups


def make_fronts(
    ranged: Sequence[Known], fixed: Sequence[Known], points: int, device: str, scored: bool = False
) -> tuple[Judged, list[Front]]:
    """Every front before finetuning, uniform first; of all that was scored, where wanted, in the end."""
    opened: list[Searched] = [reopen(run.folder, run.options, device) for run in ranged]
    opened[0].env.prepare()
    judged = Judged(opened[0].env)
    budgets = judged.budgets(points)
    made = [uniform_front(judged, budgets)]
    searches: list[tuple[Sequence[Known], Front]] = []
    labels = group_labels(ranged, "one policy")
    for label, runs in labels.items():
        for number, run in enumerate(runs, start=1):
            name = label if len(runs) == 1 else f"{label}, run {number}"
            env = opened[ranged.index(run)].env
            made.append(policy_front(judged, run, env, budgets, name))
            searches.append(([run], made[-1]))
    for name, runs in group_labels(fixed, "a run a budget").items():
        made.append(fixed_front(judged, runs, name))
        searches.append((runs, made[-1]))
    if scored:
        made += [scored_front(judged, runs, front) for runs, front in searches]
    return judged, made


def finetune(
    made: Sequence[Front], settings: Settings, seeds: int, path: Path, workers: int, watch: Watch
) -> list[Front]:
    """The fronts with what finetuning makes of their plans; equal plans are finetuned once."""
    trials = [
        Trial(front.label, point.plan, seed)
        for seed in range(seeds)
        for front in made
        for point in front.points
    ]
    with watch.stage("finetune", len({trial.key for trial in trials})) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        results = run_trials(settings, trials, path, workers=workers, on_done=on_done)
    rows: dict[str, list[Mapping[str, float]]] = {}
    for result in {result.trial.key: result for result in results}.values():
        rows.setdefault(result.trial.plan.key, []).append(result.row)

    def tuned(point: Point) -> Point:
        means = {
            metric: statistics.fmean(row[metric] for row in rows[point.plan.key])
            for metric in METRICS
            if metric != GAP
        }
        return replace(point, values={**point.values, **means})

    return [replace(front, points=tuple(map(tuned, front.points))) for front in made]


def reference_place(made: Sequence[Front], metric: str) -> Place:
    """The worst place that counts: the dense cost, and the worst of the uniform plans."""
    return Place(halvings(1.0), max(point.values[metric] for point in made[0].points))


def metrics_of(made: Sequence[Front]) -> list[str]:
    """What the points were judged by."""
    return list(made[0].points[0].values)


def volumes(made: Sequence[Front]) -> dict[str, dict[str, float]]:
    """Label → metric → hypervolume, in halvings of the cost × the metric."""
    return {
        front.label: {
            metric: hypervolume(front.places(metric), reference_place(made, metric))
            for metric in metrics_of(made)
        }
        for front in made
    }


def table(made: Sequence[Front], dense: Mapping[str, float], cost: str, note: str) -> str:
    """``table.md``: the fronts in one line each, then their points."""
    metrics, areas = metrics_of(made), volumes(made)
    lines = [
        ["front", "evaluations in all", "plans", *(f"hypervolume ↑: {METRICS[metric]}" for metric in metrics)]
    ]
    for front in made:
        found = [f"{areas[front.label][metric]:.4f}" for metric in metrics]
        lines.append([front.label, str(front.evaluations), str(len(front.points)), *found])
    rows = [["front", f"{cost} kept", "score", *(f"{METRICS[metric]} ↓" for metric in metrics), "generator"]]
    rows.append(["dense", "1", "", *(f"{dense[metric]:.4f}" for metric in metrics), ""])
    for front in made:
        for point in front.points if front.form != "steps" else ():
            score = "" if point.score is None else f"{point.score:+.3f}"
            values = [f"{point.values[metric]:.4f}" for metric in metrics]
            widths = "; ".join(
                " ".join(map(str, point.plan[a])) for a in point.plan if kind_of(a) == "generator"
            )
            rows.append([front.label, f"{point.cost:.4f}", score, *values, widths])
    seen = (
        "Of all that was scored the plans stand that no other of them dominates; they are listed in "
        "front.json. "
        if any(front.form == "steps" for front in made)
        else ""
    )
    places = ", ".join(f"{METRICS[metric]} {reference_place(made, metric).value:.4f}" for metric in metrics)
    return (
        f"{markdown_table(lines)}\n\nHypervolume: the area that a front dominates, in halvings of the "
        f"generator's {cost} × the metric; reference point: the dense cost, and the worst of the "
        f"uniform plans ({places}). Evaluations: those of the searches, and one for every plan that a policy "
        f"was asked for; uniform plans and the random ones behind the unit of the scores are not counted. "
        f"{seen}A front of fewer plans, or of other budgets, dominates less for that alone; policies and "
        f"uniform were asked for {asked_budgets(made[0])}.\n\n"
        f"{markdown_table(rows)}\n\n{note}\n"
    )


def asked_budgets(front: Front) -> str:
    """The budgets of its generators, as text."""
    ratios = dict.fromkeys(
        ratio
        for point in front.points
        for agent, ratio in point.budgets.items()
        if kind_of(agent) == "generator"
    )
    return ", ".join(f"{ratio:.4g}" for ratio in ratios)


def panels(made: Sequence[Front], dense: Mapping[str, float]) -> list[FrontPanel]:
    """What :func:`experiments.figures.fronts` draws."""
    return [
        FrontPanel(
            METRICS[metric],
            dense[metric],
            tuple(
                Frontier(
                    f"{front.label} ({front.evaluations} evaluations)"
                    if front.evaluations
                    else f"{front.label} (no search)",
                    tuple(point.cost for point in front.points),
                    tuple(point.values[metric] for point in front.points),
                    front.form,
                )
                for front in made
            ),
        )
        for metric in metrics_of(made)
    ]


def main(options: Options) -> None:
    """Ask, score, finetune, draw."""
    for name, least in (("points", 2), ("seeds", 1), ("workers", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be {least} or more")
    if not options.runs:
        raise UserError("no run is named; name one whose budget was a range: pareto.py RUN [RUN ...]")
    if options.scored and options.finetune:
        raise UserError("--scored draws dozens of plans before finetuning; leave out --finetune, or --scored")
    console = Console()
    watch, device = Watch(console), pick_device(options.device)
    ranged, fixed = open_runs(options.runs)
    home, output = ranged[0], output_folder(options, ranged[0].folder)
    if options.scored:
        check_one_yardstick([*ranged, *fixed])
    if options.finetune:
        check_counterparts(load_task(task_of(home.folder), device), options.split)
    with watch.stage("plans"):
        judged, made = make_fronts(ranged, fixed, options.points, device, options.scored)
    check_drawable(len(made))  # before anything is finetuned for a figure that cannot be drawn
    dense = {GAP: 0.0}
    title = f"{home.options['task']}, one policy for every budget"
    note = "Gaps: Σ weight · gap / spread of the reward's terms on val, 0 = the dense pair."
    note += other_rewards(home, [*ranged[1:], *fixed])
    if options.finetune:
        split: Split = options.split
        settings = replace(settings_of(home.folder, home.options, device), split=split)
        log = output / f"finetuned-{split}.jsonl"
        made = finetune(made, settings, options.seeds, log, options.workers, watch)
        row = dense_row(load_task(settings.task, device), settings)
        dense |= {metric: row[metric] for metric in METRICS if metric in row}
        note += f" Finetuned for {settings.epochs} epochs, {options.seeds} seed(s), measured on {split}."
    cost = str(home.options.get("cost", DEFAULT_COST))
    text = table(made, dense, cost, note)
    write_json(output / "front.json", plain(content_of(made, dense, cost, judged)))
    write_text(output / "table.md", text)
    figure = fronts(panels(made, dense), f"share of the generator's {cost} kept", title)
    publish(figure, output / "front.png")
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(f"everything is in {output}", highlight=False, soft_wrap=True)


def output_folder(options: Options, home: RunFolder) -> Path:
    """The folder of the results, made if missing.

    Raises:
        UserError: it cannot be made.
    """
    path = home.pareto if options.output is None else options.output
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}); use another --output") from error
    return path


def content_of(
    made: Sequence[Front], dense: Mapping[str, float], cost: str, judged: Judged
) -> dict[str, Any]:
    """``front.json``."""
    areas = volumes(made)
    return {
        "cost": cost,
        "weights": judged.env.weights,
        "spreads": judged.spreads,
        "reference": {
            metric: {"cost": 1.0, "value": reference_place(made, metric).value} for metric in metrics_of(made)
        },
        "dense": dense,
        "fronts": [
            {
                "label": front.label,
                "evaluations": front.evaluations,
                "hypervolume": areas[front.label],
                "points": [{**plain(point), "plan": point.plan.to_dict()} for point in front.points],
            }
            for front in made
        ],
    }


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
