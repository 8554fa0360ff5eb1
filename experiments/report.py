"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

SHOWN = (
    ("macs", "MMACs", lambda v: f"{v / 1e6:.1f}"),
    ("params", "params M", lambda v: f"{v / 1e6:.2f}"),
    ("latency_ms", "ms", lambda v: f"{v:.1f}"),
    ("discriminator_macs", "D MMACs", lambda v: f"{v / 1e6:.1f}"),
    ("l1", "L1 ↓", lambda v: f"{v:.4f}"),
    ("psnr", "PSNR ↑", lambda v: f"{v:.2f}"),
    ("kid_efficientnet_lite0", "KID* ↓", lambda v: f"{v:.3f}"),
    ("fid_efficientnet_lite0", "FID* ↓", lambda v: f"{v:.1f}"),
    ("prdc_density", "density ↑", lambda v: f"{v:.3f}"),
    ("prdc_coverage", "coverage ↑", lambda v: f"{v:.3f}"),
    ("crowd_gap", "crowd ↓", lambda v: f"{v:.3f}"),
    ("arrangement_gap", "arrange ↓", lambda v: f"{v:.3f}"),
    ("balance_gap", "balance ↓", lambda v: f"{v:.3f}"),
)
"""Key of a row, its heading, how it is printed."""


def evaluation_table(rows: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Print the rows of ``evaluation.json``; the full keys stay in the file."""
    images = next(iter(rows.values()))["n_images"]
    table = Table(title=f"* features of EfficientNet-Lite0 at 112 px, {images} images", title_justify="left")
    table.add_column("row")
    for _, heading, _ in SHOWN:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name, *(form(row[key]) for key, _, form in SHOWN), style="bold" if name == "pruned" else None
        )
    # Piped into a file the console believes in 80 columns and would cut the figures.
    console.print(table, width=max(console.width, 150))
