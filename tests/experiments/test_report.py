from __future__ import annotations

import io

from rich.console import Console

from experiments.report import SHOWN, evaluation_table
from gan.evaluation import COLUMNS


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


def test_every_column_of_a_row_is_shown_or_stands_in_the_title() -> None:
    assert {key for key, _, _ in SHOWN} | {"n_images"} == set(COLUMNS)
