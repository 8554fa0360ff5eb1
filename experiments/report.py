"""What a run ends with: the table, and how far a latency budget's table is from the clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gan.latency import check_prediction
from gan.plans import Plan
from gan.tasks import Task

SHOWN = (
    ("macs", "generator MACs, M", lambda v: f"{v / 1e6:.1f}"),
    ("params", "parameters, M", lambda v: f"{v / 1e6:.2f}"),
    ("latency_ms", "latency, ms", lambda v: f"{v:.1f}"),
    ("discriminator_macs", "D MACs, M", lambda v: f"{v / 1e6:.1f}"),
    ("l1", "L1 ↓", lambda v: f"{v:.4f}"),
    ("psnr", "PSNR ↑", lambda v: f"{v:.2f}"),
    ("kid_efficientnet_lite0", "KID* ↓", lambda v: f"{v:.3f}"),
    ("fid_efficientnet_lite0", "FID* ↓", lambda v: f"{v:.1f}"),
    ("prdc_density", "density* ↑", lambda v: f"{v:.3f}"),
    ("prdc_coverage", "coverage* ↑", lambda v: f"{v:.3f}"),
    ("crowd_gap", "crowd gap ↓", lambda v: f"{v:.3f}"),
    ("arrangement_gap", "arrangement gap ↓", lambda v: f"{v:.3f}"),
    ("balance_gap", "balance gap ↓", lambda v: f"{v:.3f}"),
)
"""Key of a row, its heading, how it is printed."""


def evaluation_table(rows: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print the rows of ``evaluation.json`` side by side, one figure a line: it fits 80 columns.

    The file keeps the full names and all digits. What could not be measured is a dash.
    """
    images = next(iter(rows.values()))["n_images"]
    title = f"* features of EfficientNet-Lite0 at 112 px, {images} images"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in rows:
        table.add_column(
            name.replace("uniform_equal_time", "uniform_\nequal_time"), justify="right", no_wrap=True
        )
    for key, heading, form in SHOWN:
        table.add_row(heading, *(form(row[key]) if key in row else "–" for row in rows.values()))
    console.print(table)


def show_table(table: Path, console: Console) -> None:
    """Print the table that a study ends with, and where the rest is.

    Args:
        table: the Markdown file in the study's folder.
        console: where to.
    """
    console.print(table.read_text(), highlight=False, soft_wrap=True)
    console.print(f"everything is in {table.parent}", highlight=False, soft_wrap=True)


def markdown_table(lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head. A ``|`` in a cell does not end it."""
    heads, *rows = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


LatencyErrors = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Agent → plan → ``table_ms``, ``measured_ms`` and ``error``, their ratio less 1."""


def latency_errors(task: Task, plans: Mapping[str, Plan], rounds: int = 10) -> LatencyErrors:
    """Cut plans out and time them, all in turns and the dense network among them, beside the table's word.

    Args:
        task: with latency tables.
        plans: name → plan.
        rounds: visits to each network.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for agent, network in task.networks.items():
        named = {
            "dense": list(task.dense_widths[agent]),
            **{name: list(plan[agent]) for name, plan in plans.items()},
        }
        widths = np.array(list(named.values()), dtype=np.int64)
        cost, example = task.cost_model(agent), [task.example(agent)]
        times = check_prediction(network, task.groups[agent], example, cost, widths, rounds=rounds)
        found[agent] = {
            name: {
                "table_ms": round(float(table), 4),
                "measured_ms": round(float(measured), 4),
                "error": round(float(table / measured) - 1.0, 4),
            }
            for name, table, measured in zip(named, times.predicted_ms, times.measured_ms, strict=True)
        }
    return found


def print_latency(errors: LatencyErrors, console: Console) -> None:
    """One line a plan: what the table says, what the clock says, and both as shares of the dense network."""
    console.print("latency, one image, one thread: the table that the budget was counted with, and the clock")
    for agent, plans in errors.items():
        dense = plans["dense"]
        for name, row in plans.items():
            shares = [row[key] / dense[key] for key in ("table_ms", "measured_ms")]
            console.print(
                f"  {agent}, {name}: {row['table_ms']:.2f} ms ({shares[0]:.1%}) by the table, "
                f"{row['measured_ms']:.2f} ms ({shares[1]:.1%}) measured: error {row['error']:+.1%}",
                highlight=False,
                soft_wrap=True,
            )
