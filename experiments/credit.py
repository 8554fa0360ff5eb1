"""Who earned the gain of a plan, and how steady the pair stayed: credit and balance of a finished run."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from envs.pruning_env import PruningEnv
from experiments import cli
from experiments.build import image_counts, pick_device, with_latency
from experiments.figures import GapHistory, Margins, balance, publish
from experiments.runs import RunFolder, open_run, plain, read_json, task_of
from experiments.searching import Problem
from experiments.trials import Discriminator, Settings, Trial, TrialResult, run_trials
from experiments.watch import Watch
from gan.cost import DEFAULT_COST
from gan.distillation import Ingredients
from gan.errors import UserError
from gan.evaluation import KID
from gan.files import write_json
from gan.plans import Plan
from gan.tasks import load_task

DESCRIPTION = """What the generator's plan earned alone, the discriminator's alone, and both (Shapley values),
and the balance of the pair over the search and over finetuning, beside the same generator with the whole
discriminator. Writes credit.json, balance.json and balance.png and .pdf into the run's folder."""
EXAMPLES = (
    ("python experiments/credit.py runs/edges2emoji-mappo-s0", "two finetunings, about 3 minutes"),
    ("python experiments/credit.py runs/edges2emoji-mappo-s0 --seeds 3", "with their spread"),
    ("python experiments/credit.py runs/edges2emoji-mappo-s0 --seeds 0", "no finetuning: seconds"),
)
PRUNED, WHOLE = "both pruned", "generator alone pruned, whole discriminator"


@dataclass(frozen=True)
class Options:
    """Options of ``credit.py``."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run whose search is over."""
    seeds: int = 1
    """Finetunings of either pair, with the seeds 0, 1, …; 0 draws the search alone."""
    workers: int = 2
    """Processes that finetune, of one thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks run; auto takes CUDA when there is one."""


@dataclass(frozen=True)
class Credit:
    """What each network's part of a plan earned over the uniform plan.

    Attributes:
        joint: potential of the plan; the uniform plan has 0.
        alone: agent → potential of its part of the plan, everyone else uniform.
        shapley: agent → its share of ``joint``; they sum to it.
        terms: reward term → agent → its share of the weighted score of that term.
    """

    joint: float
    alone: Mapping[str, float]
    shapley: Mapping[str, float]
    terms: Mapping[str, Mapping[str, float]]


def shapley_values(gains: Mapping[frozenset[str], float], agents: Sequence[str]) -> dict[str, float]:
    """Each agent's mean marginal gain over all orders in which the agents could join.

    φ_i = Σ_S |S|! (n − |S| − 1)! / n! · (v(S ∪ i) − v(S)), over the S without i: Shapley, "A Value for
    n-Person Games", 1953. For two: half of the gain alone, half of what is gained by joining the other.

    Args:
        gains: every subset of the agents → its gain; that of the empty one is usually 0.
        agents: n of them.

    Returns:
        Agent → value; they sum to the gain of all minus that of none.
    """
    n = len(agents)
    values = {}
    for agent in agents:
        others = [other for other in agents if other != agent]
        parts = [
            math.factorial(len(joined))
            * math.factorial(n - len(joined) - 1)
            / math.factorial(n)
            * (gains[frozenset({*joined, agent})] - gains[frozenset(joined)])
            for joined in subsets(others)
        ]
        values[agent] = math.fsum(parts)
    return values


def subsets(agents: Collection[str]) -> list[tuple[str, ...]]:
    """All of them, the empty one first."""
    sizes = range(len(agents) + 1)
    return [subset for size in sizes for subset in itertools.combinations(agents, size)]


def share_credit(env: PruningEnv, plan: Plan, budgets: Mapping[str, float] | None = None) -> Credit:
    """Share the gain of a plan between the networks; scores 2ⁿ − 2 plans more than the search, uncounted.

    Args:
        env: scores the plans.
        plan: the result of the search.
        budgets: agent → keep ratio that it was made for; by default the environment's fixed ones.
    """
    agents = list(plan)
    uniform = env.uniform_plan(budgets)
    worth: dict[frozenset[str], Mapping[str, float]] = {}
    for subset in subsets(agents):
        mixed = Plan.of({a: (plan if a in subset else uniform)[a] for a in agents}, plan.ranking)
        worth[frozenset(subset)] = env.evaluate(mixed, budgets, counted=False).term_rewards
    gains = {subset: math.fsum(rewards.values()) for subset, rewards in worth.items()}
    return Credit(
        joint=gains[frozenset(agents)],
        alone={agent: gains[frozenset({agent})] for agent in agents},
        shapley=shapley_values(gains, agents),
        terms={
            term: shapley_values({subset: rewards[term] for subset, rewards in worth.items()}, agents)
            for term in worth[frozenset()]
        },
    )


def write_credit(folder: RunFolder, credit: Credit) -> Credit:
    """Write ``credit.json``."""
    write_json(folder.credit, plain(credit))
    return credit


def describe_credit(credit: Credit) -> str:
    """One line: who earned what."""
    whole = "both" if len(credit.alone) == 2 else "all"
    parts = [
        f"{agent} {credit.alone[agent]:+.3f} alone, {share:+.3f} of {whole}"
        for agent, share in credit.shapley.items()
    ]
    return f"gain over uniform {credit.joint:+.3f}: {'; '.join(parts)}"


@dataclass(frozen=True)
class Searched:
    """A finished search, ready to be asked for more.

    Attributes:
        env: its environment; what the log has is known.
        plan: its best plan.
        budgets: agent → keep ratio of that plan.
    """

    env: PruningEnv
    plan: Plan
    budgets: Mapping[str, float]


def reopen(folder: RunFolder, options: Mapping[str, Any], device: str) -> Searched:
    """The environment of a run whose search is over, with its log.

    Args:
        folder: of the run.
        options: content of its ``options.json``.
        device: where the networks run.

    Raises:
        UserError: the search is not over, or its weights are not at hand.
    """
    folder.require(folder.evaluations, folder.plan, folder.elastic_reference)
    problem = Problem.of_run(options)
    task = load_task(task_of(folder), device)
    if problem.cost == "latency":
        task = with_latency(task, folder.latency)
    settings = settings_of(folder, options, device)
    images = image_counts(bool(options.get("quick")))
    shipped = settings.weights == "elastic"
    scorer = problem.scorer(task, settings.elastic(task), images, shipped)
    best = read_json(folder.plan)["best"]
    return Searched(problem.env(scorer, folder), Plan.from_dict(best), best["budgets"])


def settings_of(folder: RunFolder, options: Mapping[str, Any], device: str) -> Settings:
    """How the plans of a run are finetuned: as the run itself did, measured on the test images."""
    start = read_json(folder.elastic_reference).get("start", "elastic")
    weights = str(folder.elastic) if start == "elastic" and folder.elastic.is_file() else start
    quick = bool(options.get("quick"))
    epochs = 1 if quick else max(1, int(options.get("epochs", 10)))
    # Older versions knew no perceptual distance.
    ingredients = Ingredients(**{"perceptual": 0.0, **options.get("ingredients", {})})
    settings = Settings.of(task_of(folder), weights, epochs, image_counts(quick), device, "test")
    return replace(settings, ingredients=ingredients)


def balance_of_search(searched: Searched) -> GapHistory:
    """The balance gap of every plan that a search scored, and of its best plan so far."""
    env = searched.env
    log = env.scorer.log
    assert log is not None
    env.prepare()
    gaps, best, worth = [], [], -math.inf
    uniform = env.evaluate(env.uniform_plan(searched.budgets), searched.budgets, counted=False)
    held = uniform.scores.gaps["balance_gap"]
    fixed = all(budget.fixed for budget in env.budgets.values())
    for key in log.counted:
        gap = log.scores[key].gaps["balance_gap"]
        gaps.append(gap)
        if fixed:
            evaluation = env.evaluate(Plan.from_dict(json.loads(key)), searched.budgets, counted=False)
            if evaluation.potential > max(worth, 0.0):
                worth, held = evaluation.potential, gap
            best.append(held)
    return GapHistory(tuple(gaps), tuple(best), uniform.scores.gaps["balance_gap"])


def compare_discriminators(
    folder: RunFolder, plan: Plan, settings: Settings, seeds: int, workers: int, watch: Watch
) -> dict[str, list[TrialResult]]:
    """Finetune the plan, and its generator beside the whole dense discriminator; what is done is read."""
    beside: tuple[tuple[str, Discriminator], ...] = ((PRUNED, "pruned"), (WHOLE, "dense"))
    trials = [Trial(label, plan, seed, kind) for seed in range(seeds) for label, kind in beside]
    with watch.stage("finetune", len(trials)) as stage:

        def on_done(result: TrialResult) -> None:
            stage.advance(note=f"{result.trial.label} {result.row[KID]:.3f}")

        path = folder.path / "trials.jsonl"
        results = run_trials(settings, trials, path, workers=workers, on_done=on_done)
    return {label: [one for one in results if one.trial.label == label] for label in (PRUNED, WHOLE)}


def summary(results: Mapping[str, Sequence[TrialResult]]) -> dict[str, dict[str, float]]:
    """Pair → means over its finetunings: the margin, its spread and swing, balance gap, KID."""
    return {
        label: {
            "margin": statistics.fmean(one.margin_mean for one in rows),
            "margin_spread": statistics.fmean(one.margin_spread for one in rows),
            "margin_swing": statistics.fmean(one.margin_swing for one in rows),
            "balance_gap_before": statistics.fmean(one.raw["balance_gap"] for one in rows),
            "balance_gap_after": statistics.fmean(one.row["balance_gap"] for one in rows),
            KID: statistics.fmean(one.row[KID] for one in rows),
        }
        for label, rows in results.items()
    }


def main(options: Options) -> None:
    """Credit, balance, one figure."""
    if options.seeds < 0 or options.workers < 1:
        raise UserError(
            f"--seeds is {options.seeds} and --workers is {options.workers}; they must be at least 0 and 1"
        )
    console = Console()
    watch, folder = Watch(console), open_run(options.run)
    known, device = read_json(folder.options), pick_device(options.device)
    with watch.stage("scorer"):
        searched = reopen(folder, known, device)
    with watch.stage("credit"):
        credit = write_credit(folder, share_credit(searched.env, searched.plan, searched.budgets))
    console.print(describe_credit(credit), highlight=False, soft_wrap=True)
    search = balance_of_search(searched)
    results: dict[str, list[TrialResult]] = {}
    if options.seeds:
        settings = settings_of(folder, known, device)
        results = compare_discriminators(
            folder, searched.plan, settings, options.seeds, options.workers, watch
        )
    rows = summary(results)
    for label, row in rows.items():
        figures = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        console.print(f"{label}: {figures}", highlight=False, soft_wrap=True)
    write_json(folder.path / "balance.json", plain({"search": search, "finetuning": rows}))
    lines = [Margins(label, [one.margins for one in group]) for label, group in results.items()]
    title = f"{known['task']}, {known['algo']}, seed {known['seed']}, {known.get('cost', DEFAULT_COST)}"
    figure = balance(search, lines, title)
    publish(figure, folder.path / "balance.png")
    console.print(f"{folder.credit}, {folder.path / 'balance.png'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, Options, DESCRIPTION, EXAMPLES)
