from __future__ import annotations

import io

import pytest
from rich.console import Console

from experiments.report import SHOWN, evaluation_table, latency_errors, markdown_table, print_latency
from gan.evaluation import COLUMNS
from gan.latency import measure_latency
from gan.plans import Plan
from gan.tasks import load_task


def row(value: float) -> dict[str, float]:
    return {**dict.fromkeys(COLUMNS, value), "macs": 9.4e6, "n_images": 512}


def test_the_table_shows_every_figure_in_80_columns() -> None:
    text = io.StringIO()
    names = ["dense", "l1_slice", "uniform_raw", "uniform", "pruned_raw", "pruned"]
    rows = {name: row(place) for place, name in enumerate(names)}
    evaluation_table(rows, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    assert "512 images" in lines[0]
    assert all(name in text.getvalue() for name in names)
    kid = next(line for line in lines if line.strip().startswith("KID*"))
    assert kid.split()[2:] == ["0.000", "1.000", "2.000", "3.000", "4.000", "5.000"]
    macs = next(line for line in lines if "generator MACs" in line)
    assert macs.split()[-1] == "9.4"


def test_a_markdown_table_keeps_its_columns() -> None:
    lines = [["gap", "τ"], ["|made − dense|", "0.5"], ["", "–"]]
    assert markdown_table(lines).splitlines() == [
        "| gap | τ |",
        "| --- | --- |",
        r"| \|made − dense\| | 0.5 |",
        "|  | – |",
    ]


def test_every_column_of_a_row_is_shown_or_stands_in_the_title() -> None:
    assert {key for key, _, _ in SHOWN} | {"n_images"} == set(COLUMNS)


def test_a_latency_budget_is_compared_with_the_clock() -> None:
    task = load_task()
    tables = {
        agent: measure_latency(
            network,
            task.groups[agent],
            [task.example(agent)],
            task.multiples[agent],
            points=2,
            rounds=1,
            runs=1,
        )
        for agent, network in task.networks.items()
    }
    known = task.with_latency(tables)
    plan = Plan.of({"generator": (8,) * 11, "discriminator": (4,) * 4})
    errors = latency_errors(known, {"pruned": plan}, rounds=1)
    assert {agent: list(rows) for agent, rows in errors.items()} == {
        agent: ["dense", "pruned"] for agent in ("generator", "discriminator")
    }
    row = errors["generator"]["pruned"]
    assert row["table_ms"] == pytest.approx(
        float(known.cost_model("generator").milliseconds(plan["generator"])), abs=1e-4
    )
    assert row["error"] == pytest.approx(row["table_ms"] / row["measured_ms"] - 1, rel=0.01, abs=0.01)
    text = io.StringIO()
    rows = {"dense": {"table_ms": 8.0, "measured_ms": 10.0, "error": -0.2}}
    rows["pruned"] = {"table_ms": 2.0, "measured_ms": 2.0, "error": 0.0}
    print_latency({"generator": rows}, Console(file=text, width=200))
    assert "pruned: 2.00 ms (25.0%) by the table, 2.00 ms (20.0%) measured: error +0.0%" in text.getvalue()
