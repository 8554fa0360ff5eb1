"""What a comparison says: tidy tables, a report in Markdown, figures as PNG and PDF."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.aggregate import (
    LEVEL,
    hold_last,
    iqm_curve,
    iqm_interval,
    probability_of_improvement,
)
from experiments.agreement import NOTHING, Interval, paired_difference
from experiments.comparison import RunOptions
from experiments.figures import (
    MOST_CURVES,
    Estimates,
    Figure,
    Line,
    LinePanel,
    Margins,
    balance,
    improvements,
    intervals,
    publish,
    score_curves,
)
from experiments.report import markdown_table
from experiments.trials import TrialResult
from gan.evaluation import COLUMNS, KID
from gan.files import write_text

KEYS = ["task", "cost", "budget", "cell", "label", "algo", "variant", "seed"]
"""Columns that say which run a row is of."""
EVERYWHERE = "all cells"
WHOLE = "whole discriminator"
"""In the labels of generators that were finetuned beside the whole dense discriminator."""
LOOKS = (
    *("mappo", "ippo", "ppo", "cma-es", "evolution", "random", "gradient", "tpe"),
    *("uniform", "magnitude", "a2c", "sac", "td3", "ddpg"),
)
"""Learners that look the same in every figure; the first eight have a colour each."""
MOST_MARGINS = 4
"""Labels whose margins one figure shows: more bands hide each other."""


Tuned = tuple[tuple[TrialResult, ...], tuple[TrialResult, ...]]
"""Finetunings of a run's plan, and of the uniform plan of its cell."""


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        run: its options.
        result: content of its ``result.json``.
        tuned: its plan after finetuning, one result per finetuning seed; may be empty.
        uniform: the uniform plan of its cell after finetuning, with the same seeds.
    """

    run: RunOptions
    result: Mapping[str, Any]
    tuned: tuple[TrialResult, ...] = ()
    uniform: tuple[TrialResult, ...] = ()

    @property
    def keys(self) -> dict[str, Any]:
        """The columns ``KEYS``."""
        return {name: getattr(self.run, name) for name in KEYS}

    def scores(self, last: int) -> NDArray[np.float64]:
        """(last,) the score of the best plan so far at 1, 2, …, ``last`` evaluations."""
        curve = self.result["curve"]
        return hold_last(curve["evaluations"], curve["score"], last)


def run_rows(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per run: scores, gaps, credit, seconds; after finetuning the means over its seeds."""
    rows = []
    for one in outcomes:
        result = one.result
        row: dict[str, Any] = {
            **one.keys,
            **{name: result[name] for name in ("score", "own_score", "proposed_score", "evaluations")},
            **{name: result[name] for name in ("requests", "seconds")},
            **{f"{term}.score": score for term, score in result["scores"].items()},
        }
        for agent, widths in result["plan"]["widths"].items():
            row[f"{agent}.alone"] = result["credit"]["alone"][agent]
            row[f"{agent}.share"] = result["credit"]["shapley"][agent]
            row[f"{agent}.widths"] = " ".join(map(str, widths))
        if one.tuned:
            row |= {name: mean([each.row[name] for each in one.tuned]) for name in COLUMNS}
            row["margin_mean"] = mean([each.margin_mean for each in one.tuned])
            row["margin_spread"] = mean([each.margin_spread for each in one.tuned])
            row["margin_swing"] = mean([each.margin_swing for each in one.tuned])
            row["finetuning_seconds"] = mean([each.seconds for each in one.tuned])
            base = mean([each.row[KID] for each in one.uniform])
            row["kid_uniform"], row["kid_change"] = base, row[KID] / base - 1
        rows.append(row)
    return pd.DataFrame(rows)


def curve_rows(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per run and number of evaluations: the score of the best plan so far."""
    frames = []
    for one in outcomes:
        score = one.scores(one.run.evaluations)
        evaluations = np.arange(1, len(score) + 1)
        frames.append(pd.DataFrame({**one.keys, "evaluations": evaluations, "score": score}))
    return pd.concat(frames, ignore_index=True)


def finetuned_rows(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row per run and finetuning seed, and those of the uniform plan of each cell as ``uniform plan``."""
    rows: list[dict[str, Any]] = []
    known: set[tuple[Any, ...]] = set()
    for one in outcomes:
        for trial in one.tuned:
            rows.append({**one.keys, **trial_row(trial)})
        for trial in one.uniform:
            # where every seed has a warm-up of its own, the uniform plan ends otherwise for each
            key = one.run.cell, trial.trial.key, *trial.row.values()
            if key not in known:
                known.add(key)
                named = {"label": "uniform plan", "algo": "", "variant": "", "seed": ""}
                rows.append({**one.keys, **named, **trial_row(trial)})
    return pd.DataFrame(rows)


def trial_row(result: TrialResult) -> dict[str, Any]:
    """What came out of a finetuning, flat."""
    trial = result.trial
    return {
        "finetuning_seed": trial.seed,
        "discriminator": trial.discriminator,
        **result.row,
        "margin_mean": result.margin_mean,
        "margin_spread": result.margin_spread,
        "margin_swing": result.margin_swing,
        "finetuning_seconds": result.seconds,
    }


def mean(values: Sequence[float]) -> float:
    """Of at least one number."""
    return float(np.mean(values))


@dataclass(frozen=True)
class Strata:
    """The runs of a comparison, by label and cell.

    Attributes:
        runs: as :func:`run_rows` gives them.
        cells: the cells that count.
    """

    runs: pd.DataFrame
    cells: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """Those with runs in every one of the cells, best IQM of the score first."""
        everyone = self.runs["label"].unique()
        whole = [one for one in everyone if all(len(part) for part in self.of(one, "score"))]
        return sorted(whole, key=lambda one: -iqm_interval(self.of(one, "score"), resamples=1).value)

    def of(self, label: str, column: str) -> list[NDArray[np.float64]]:
        """Per cell (n,) numbers of the label's runs; runs without one are left out."""
        mine = self.runs[self.runs["label"] == label]
        if column not in mine:
            return [np.empty(0) for _ in self.cells]
        return [
            mine.loc[mine["cell"] == cell, column].dropna().to_numpy(dtype=np.float64) for cell in self.cells
        ]

    def better(self, first: str, second: str, column: str, sign: float) -> Interval:
        """Probability of improvement in a column; NaN where one of them lacks numbers."""
        pair = [[sign * part for part in self.of(label, column)] for label in (first, second)]
        whole = all(len(part) for parts in pair for part in parts)
        return probability_of_improvement(*pair) if whole else NOTHING

    def better_than_uniform(self, label: str, column: str, sign: float, base: str | None) -> Interval:
        """The same over the uniform plan: 0 in scores, its own result after finetuning in ``base``."""
        mine = self.of(label, column)
        if not all(len(part) for part in mine):
            return NOTHING
        theirs = [np.zeros(1) for _ in mine] if base is None else self.of(label, base)
        return probability_of_improvement([sign * part for part in mine], [sign * part for part in theirs])


def with_interval(estimate: Interval, form: str = "{:+.2f}") -> str:
    """``+1.20 (+0.90 to +1.40)``; the interval only where there is one, nothing for NaN."""
    if math.isnan(estimate.value):
        return ""
    text = form.format(estimate.value)
    if math.isnan(estimate.low) or math.isinf(estimate.low):
        return text
    return f"{text} ({form.format(estimate.low)} to {form.format(estimate.high)})"


def standings(strata: Strata) -> str:
    """The main table of one or all cells, a label a row."""
    tuned = KID in strata.runs
    heads = ["learner", "runs", "best score", "better than uniform", "seconds of search"]
    shares = [column for column in strata.runs if column.endswith(".share")]
    heads += [f"share of the {column.removesuffix('.share')}" for column in shares]
    if tuned:
        heads += ["KID* ↓ finetuned", "Δ to uniform, %", "better than uniform, KID*", "margin swing"]
    lines = [heads]
    for label in strata.labels:
        line = [
            label,
            str(sum(len(part) for part in strata.of(label, "score"))),
            with_interval(iqm_interval(strata.of(label, "score"))),
            with_interval(strata.better_than_uniform(label, "score", 1.0, None), "{:.2f}"),
            f"{mean(np.concatenate(strata.of(label, 'seconds')).tolist()):.0f}",
            *(f"{mean(np.concatenate(strata.of(label, column)).tolist()):+.2f}" for column in shares),
        ]
        if tuned:
            kid, change = strata.of(label, KID), strata.of(label, "kid_change")
            whole = all(len(part) for part in kid)
            line += [
                # cells have levels of their own, so that a mean over them says nothing
                with_interval(iqm_interval(kid), "{:.4f}") if whole and len(kid) == 1 else "",
                with_interval(iqm_interval([100 * part for part in change]), "{:+.1f}") if whole else "",
                with_interval(strata.better_than_uniform(label, KID, -1.0, "kid_uniform"), "{:.2f}"),
                f"{mean(np.concatenate(strata.of(label, 'margin_swing')).tolist()):.3f}" if whole else "",
            ]
        lines.append(line)
    return markdown_table(lines)


def improvement_table(strata: Strata, column: str, sign: float) -> str:
    """Probability that a run of the row is better than one of the column."""
    labels = strata.labels
    lines = [["better than →", *labels]]
    for first in labels:
        cells = [
            "" if first == second else with_interval(strata.better(first, second, column, sign), "{:.2f}")
            for second in labels
        ]
        lines.append([first, *cells])
    return markdown_table(lines)


def paired_table(runs: pd.DataFrame) -> str:
    """Every label against the first one by cell and seed: mean differences with Student's t intervals.

    Where labels are variants of one learner, this is what each of them changes.
    """
    first = str(runs["label"].iloc[0])
    columns = [("score", "score"), (KID, "KID* ↓"), ("margin_swing", "margin swing"), ("l1", "L1 ↓")]
    columns = [(name, head) for name, head in columns if name in runs]
    keys = ["cell", "seed"]
    base = runs[runs["label"] == first].set_index(keys)
    lines = [[f"minus {first}", "pairs", *(head for _, head in columns)]]
    for label in runs["label"].unique():
        mine = runs[runs["label"] == label].set_index(keys)
        common = mine.index.intersection(base.index)
        if label == first or not len(common):
            continue
        parts = []
        for name, _ in columns:
            both = pd.DataFrame({"a": mine.loc[common, name], "b": base.loc[common, name]}).dropna()
            estimate = paired_difference(both["a"], both["b"], LEVEL) if len(both) else NOTHING
            parts.append(with_interval(estimate, "{:+.4f}"))
        lines.append([label, str(len(common)), *parts])
    return markdown_table(lines)


def short(title: str) -> str:
    """The name of a cell in two lines, so that it fits above its panel."""
    return title.replace(", ", "\n", 1)


def undrawn(runs: pd.DataFrame) -> list[str]:
    """Labels that one figure of curves has no room for: those of the lowest scores."""
    means = runs.groupby("label", sort=False)["score"].mean()
    return list(means.sort_values(ascending=False, kind="stable").index[MOST_CURVES:])


def draw_scores(
    outcomes: Sequence[Outcome], strata: Sequence[tuple[str, Strata]], without: Collection[str] = ()
) -> Figure:
    """Best score against evaluations, a panel for each cell and one for all.

    Args:
        outcomes: the runs.
        strata: title and runs of each panel.
        without: labels to leave out.
    """
    last = min(one.run.evaluations for one in outcomes)
    curves: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for one in outcomes:
        curves.setdefault((one.run.label, one.run.cell), []).append(one.scores(last))
    panels = []
    for title, part in strata:
        lines = []
        for label in (one for one in part.labels if one not in without):
            estimate = iqm_curve([np.array(curves[label, cell]) for cell in part.cells])
            lines.append(Line(label, np.arange(1.0, last + 1), *estimate))
        panels.append(LinePanel(short(title), tuple(lines)))
    runs = max(len(rows) for rows in curves.values())
    spread = f"IQM and {LEVEL:.0%} stratified bootstrap band" if runs > 1 else "one run each"
    return score_curves(panels, "best score (0 = uniform)", spread, LOOKS)


def draw_finetuned(strata: Sequence[tuple[str, Strata]]) -> Figure:
    """Finetuned KID against uniform's, a panel for each cell."""
    panels = []
    for title, part in strata:
        labels = [one for one in part.labels if all(len(rows) for rows in part.of(one, "kid_change"))]
        changes = [np.concatenate(part.of(label, "kid_change")) * 100 for label in labels]
        ends = [iqm_interval([100 * rows for rows in part.of(label, "kid_change")]) for label in labels]
        longest = max(map(len, changes))
        values = np.array([np.append(row, np.full(longest - len(row), np.nan)) for row in changes])
        estimates, bounds = np.array(ends)[:, 0], np.array(ends)[:, 1:]
        panels.append(Estimates(short(title), tuple(labels), values, bounds, estimates))
    label = "finetuned KID* against uniform's, % (negative is better)"
    return intervals(panels, label, f"IQM and its {LEVEL:.0%} interval, dots are runs")


def draw_improvements(strata: Strata, column: str, sign: float, title: str) -> Figure:
    """The matrix of :func:`improvement_table`."""
    labels = strata.labels
    table = np.full((len(labels), len(labels), 3), math.nan)
    for row, first in enumerate(labels):
        for place, second in enumerate(labels):
            if first != second:
                table[row, place] = strata.better(first, second, column, sign)
    return improvements(labels, table[..., 0], table[..., 1:], title)


def margin_lines(outcomes: Sequence[Outcome]) -> list[Margins]:
    """The discriminator's margin over finetuning, by label; what one looks for comes first.

    That is the generator beside the whole discriminator, where that was asked for, the first label, uniform.
    """
    margins: dict[str, list[Sequence[float]]] = {}
    for one in outcomes:
        margins.setdefault(one.run.label, []).extend(trial.margins for trial in one.tuned if trial.margins)
    lines = [Margins(label, rows) for label, rows in margins.items() if rows]
    first = next((line.label for line in lines if WHOLE not in line.label), None)
    return sorted(
        lines, key=lambda line: (WHOLE not in line.label, line.label != first, line.label != "uniform")
    )


def write_report(folder: Path, outcomes: Sequence[Outcome], protocol: str) -> None:
    """Write ``runs.csv``, ``curves.csv``, ``finetuned.csv``, ``report.md`` and the figures.

    Args:
        folder: of the comparison.
        outcomes: the finished runs; at least one.
        protocol: how they were made, a sentence or more.
    """
    runs = run_rows(outcomes)
    write_text(folder / "runs.csv", runs.to_csv(index=False))
    write_text(folder / "curves.csv", curve_rows(outcomes).to_csv(index=False))
    places = {one.run.cell: one.run.place for one in outcomes}
    cells = tuple(places)
    strata = [(place, Strata(runs, (cell,))) for cell, place in places.items()]
    whole = Strata(runs, cells)
    if len(cells) > 1 and whole.labels:
        strata.append((EVERYWHERE, whole))
    without = undrawn(runs)
    figures = {"scores": draw_scores(outcomes, strata, without)}
    parts = ["# Comparison", protocol, "![best score against evaluations](scores.png)"]
    if without:
        parts += [f"Not drawn, for more curves cannot be told apart: {'; '.join(without)}."]
    for title, part in reversed(strata):
        parts += [f"## {title}", standings(part)]
    last = strata[-1][1]
    tuned = KID in runs
    if len(last.labels) > 1:
        figures["improvement"] = draw_improvements(last, "score", 1.0, "best score")
        parts += ["## Probability of improvement: best score", improvement_table(last, "score", 1.0)]
        parts += ["![probability of improvement](improvement.png)"]
    if tuned:
        write_text(folder / "finetuned.csv", finetuned_rows(outcomes).to_csv(index=False))
        figures["finetuned"] = draw_finetuned(strata)
        parts += ["## After finetuning", "![finetuned KID](finetuned.png)"]
        if len(last.labels) > 1:
            figures["improvement_kid"] = draw_improvements(last, KID, -1.0, "finetuned KID*")
            parts += [improvement_table(last, KID, -1.0)]
            parts += ["![probability of improvement, KID](improvement_kid.png)"]
        lines = margin_lines(outcomes)
        if lines:
            figures["balance"] = balance(None, lines[:MOST_MARGINS])
            parts += ["![the discriminator's margin over finetuning](balance.png)"]
        if lines[MOST_MARGINS:]:
            others = "; ".join(line.label for line in lines[MOST_MARGINS:])
            parts += [
                f"Not drawn, for more bands hide each other: {others}. Their margins' swing stands above."
            ]
    if len(runs["label"].unique()) > 1:
        parts += ["## Paired differences", paired_table(runs)]
    write_text(folder / "report.md", "\n\n".join([*parts, ""]))
    for name, figure in figures.items():
        publish(figure, folder / f"{name}.png")
