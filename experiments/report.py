"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

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

    The file keeps the full names and all digits.
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
        table.add_row(heading, *(form(row[key]) for row in rows.values()))
    console.print(table)
