"""Every picture that the project draws, in one style that also reads in grey.

Figures are built on their own canvas, without pyplot: nothing is global, nothing stays open.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from experiments.aggregate import SMOOTH, moving_average, swing
from gan.errors import UserError
from gan.files import write_bytes

if TYPE_CHECKING:  # torch takes seconds to load, and a plot of a run needs none of it
    from torch import Tensor

    from gan.groups import ChannelGroup

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 130,
}
COLOURS = ("#0e2946", "#c74357", "#e8b53a", "#439966", "#523184", "#79b4c9", "#78512f", "#989898")
"""Of eight brightnesses, neighbours far apart; markers do the rest: figures must read in grey."""
MARKERS = "osD^vPX*"
MOST_SERIES = len(COLOURS)
MOST_CURVES = 2 * MOST_SERIES
"""Labels that one figure of scores shows apart: a second round of colours is dashed."""
MOST_COLUMNS = 3
"""Panels beside each other: more would be too small to read on a page."""
FORMATS = (".png", ".pdf", ".svg")
PUBLISHED = (".png", ".pdf")
"""Formats of a study's figures."""

TERMS: dict[str, str] = {
    "crowd_gap": "density: crowds of patches",
    "arrangement_gap": "density: arrangement",
    "mmd_gap": "fidelity: MMD² to dense",
    "l1_gap": "fidelity: L1 to dense",
    "real_gap": "fidelity: distance to real",
    "feature_gap": "fidelity: features to dense",
    "recovery_gap": "predicted recovery",
    "balance_gap": "adversarial balance",
}
"""Reward term → title of its panel, in the order of the panels; unknown terms follow under their own name."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of the file's suffix.

    Raises:
        UserError: a suffix other than ``FORMATS``, or a folder that does not exist.
    """
    check_format(path)
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=path.suffix[1:].lower())
    return write_bytes(path, buffer.getvalue())


def publish(figure: Figure, path: Path) -> None:
    """Write a study's figure twice: as a picture to look at and as vectors to print.

    Args:
        figure: the figure.
        path: the file of the picture; ``PUBLISHED`` are the suffixes.

    Raises:
        UserError: a folder that does not exist.
    """
    for suffix in PUBLISHED:
        save_figure(figure, path.with_suffix(suffix))


def check_format(path: Path) -> None:
    """Refuse a figure file that cannot be written, before any work is done.

    Raises:
        UserError: a suffix other than ``FORMATS``, or a folder that does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"cannot write a figure to {path}: its name must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(
            f"cannot write a figure to {path}: the folder {path.parent} does not exist; make it first"
        )


# Curves


@dataclass(frozen=True)
class Series:
    """Runs that differ in nothing but their seed: one line and its spread.

    Attributes:
        label: name in the legend.
        metrics: one frame per seed, as ``runs.read_metrics`` gives them; each with a row or more.
    """

    label: str
    metrics: tuple[pd.DataFrame, ...]


@dataclass(frozen=True)
class Band:
    """A curve over seeds on a common axis.

    Attributes:
        x: (k,) evaluations, ascending.
        mean: (k,) mean over seeds.
        low: (k,) lowest seed.
        high: (k,) highest seed.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(series: Series, column: str, window: int, points: int = 200) -> Band | None:
    """Moving average of a column for each seed, then mean and range over seeds.

    Seeds end at different numbers of evaluations; the band covers what all of them have. None if
    no frame has numbers in the column.
    """
    lines = []
    for frame in series.metrics:
        if column in frame and frame[column].notna().any():
            evaluations = frame["evaluations"].to_numpy(dtype=np.float64)
            averages = moving_average(evaluations, frame[column].to_numpy(dtype=np.float64), window)
            keep = np.append(np.diff(evaluations) > 0, True) & ~np.isnan(
                averages
            )  # episodes of known plans repeat
            lines.append((evaluations[keep], averages[keep]))
    if not lines:
        return None
    first = max(x[0] for x, _ in lines)
    last = max(first, min(x[-1] for x, _ in lines))
    common = lines[0][0] if len(lines) == 1 else np.linspace(first, last, points)
    rows = np.stack([np.interp(common, x, y) for x, y in lines])
    return Band(common, rows.mean(0), rows.min(0), rows.max(0))


def curves(series: Sequence[Series], window: int = 200, title: str = "") -> Figure:
    """Reward (total and by term) and sparsity of both networks over the search.

    Args:
        series: what to compare, at most ``MOST_SERIES``: more cannot be told apart.
        window: evaluations of the moving average, ≥ 1.
        title: what the runs have in common.

    Raises:
        UserError: too many series.
    """
    if len(series) > MOST_SERIES:
        raise UserError(
            f"{len(series)} kinds of runs cannot be told apart in one figure; draw at most {MOST_SERIES}"
        )
    columns = list(dict.fromkeys(column for one in series for frame in one.metrics for column in frame))
    found = [column.removesuffix(".score") for column in columns if column.endswith(".score")]
    terms = [term for term in TERMS if term in found] + [term for term in found if term not in TERMS]
    agents = [column.removesuffix(".sparsity") for column in columns if column.endswith(".sparsity")]
    panels = len(agents) + len(terms)
    rows = 1 + math.ceil(max(0, panels - 2) / 4)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(14, 0.9 + 2.6 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.02)
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, 4)
        total = figure.add_subplot(grid[0, :2])
        places = [grid[0, 2], grid[0, 3]] + [
            grid[row, column] for row in range(1, rows) for column in range(4)
        ]
        _total_panel(total, series, window)
        for agent, place in zip(agents, places, strict=False):
            _sparsity_panel(figure.add_subplot(place), series, agent, window)
        for term, place in zip(terms, places[len(agents) :], strict=False):
            _term_panel(figure.add_subplot(place), series, term, window)
        for axes in figure.axes:
            axes.set_xlabel("evaluations")
            axes.margins(x=0.02)
        spread = " · band: lowest to highest run" if any(len(one.metrics) > 1 for one in series) else ""
        average = f"moving average over {window} evaluations{spread}"
        figure.suptitle(f"{title} · {average}" if title else average, x=0.01, ha="left", fontsize=11)
        handles = [
            Line2D([], [], color=COLOURS[i], marker=MARKERS[i], label=f"{one.label} ({_runs(one)})")
            for i, one in enumerate(series)
        ]
        longest = max(len(str(handle.get_label())) for handle in handles)
        figure.legend(handles=handles, loc="outside lower left", ncols=max(1, min(4, 150 // (longest + 8))))
    return figure


def _runs(series: Series) -> str:
    return "1 run" if len(series.metrics) == 1 else f"{len(series.metrics)} runs"


def _draw(axes: Axes, shape: Band, place: int, dashed: bool = False) -> None:
    colour = COLOURS[place]
    every = max(1, len(shape.x) // 6)
    style = "--" if dashed else "-"
    marker = MARKERS[place]
    axes.plot(
        shape.x, shape.mean, style, color=colour, marker=marker, markevery=(every // 2, every), markersize=5
    )
    if (shape.high > shape.low).any():
        axes.fill_between(shape.x, shape.low, shape.high, color=colour, alpha=0.18, linewidth=0)


def _total_panel(axes: Axes, series: Sequence[Series], window: int) -> None:
    for place, one in enumerate(series):
        shape = band(one, "return", window)
        if shape is not None:
            _draw(axes, shape, place)
        best = band(one, "best_potential", 1)
        if best is not None:
            axes.plot(best.x, best.mean, ":", color=COLOURS[place], drawstyle="steps-post")
        if len(series) == 1 and len(one.metrics) == 1:  # single episodes of several runs would only blur
            frame = one.metrics[0]
            axes.plot(frame["evaluations"], frame["return"], ".", color="0.7", markersize=3, zorder=1)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_title("return of an episode: improvement over uniform pruning (0)")
    axes.set_ylabel("weighted score")
    handles = [
        Line2D([], [], color="0.3", label="final plan of the episodes"),
        Line2D([], [], color="0.3", linestyle=":", label="best plan so far"),
    ]
    axes.legend(handles=handles, loc="best", fontsize=8)


def _term_panel(axes: Axes, series: Sequence[Series], term: str, window: int) -> None:
    for place, one in enumerate(series):
        shape = band(one, f"{term}.score", window)
        if shape is not None:
            _draw(axes, shape, place)
    axes.axhline(0, color="0.4", linewidth=0.8)
    rewards = [
        frame[f"{term}.reward"] for one in series for frame in one.metrics if f"{term}.reward" in frame
    ]
    unpaid = bool(rewards) and not any(reward.any() for reward in rewards)
    axes.set_title(TERMS.get(term, term) + (" (weight 0)" if unpaid else ""))
    axes.set_ylabel("score")


def _sparsity_panel(axes: Axes, series: Sequence[Series], agent: str, window: int) -> None:
    for place, one in enumerate(series):
        for column, dashed in ((f"{agent}.sparsity", False), (f"{agent}.channel_sparsity", True)):
            shape = band(one, column, window)
            if shape is not None:
                _draw(axes, shape, place, dashed)
    axes.set_ylim(0, 1)
    axes.set_title(f"sparsity of the {agent}")
    axes.set_ylabel("share removed")
    handles = [
        Line2D([], [], color="0.3", label="of the cost"),
        Line2D([], [], color="0.3", linestyle="--", label="of the channels"),
    ]
    axes.legend(handles=handles, loc="best", fontsize=8)


# Scores and results


@dataclass(frozen=True)
class Cloud:
    """One panel of :func:`calibration`: plans as a term sees them before finetuning.

    Attributes:
        title: what the term is.
        label: of the x axis: ``gap`` or ``score``; the panel adds "before finetuning".
        x: (k,) its value for each plan.
        tau: Kendall's tau against the finetuned results, in the title; NaN where it is not defined.
    """

    title: str
    label: str
    x: NDArray[np.float64]
    tau: float


def calibration(
    clouds: Sequence[Cloud],
    results: NDArray[np.float64],
    kinds: Sequence[str],
    label: str = "finetuned KID",
    title: str = "",
) -> Figure:
    """What each term said before finetuning against what came out, one panel a term.

    Args:
        clouds: the panels, four a row.
        results: (k, n) finetuned results of k plans with n seeds; points are means, bars their range.
        kinds: k kinds of plans, at most ``MOST_SERIES`` different ones; ``uniform`` is drawn large and last.
        label: of the y axis.
        title: of the figure.
    """
    means = results.mean(1)
    errors = np.stack([means - results.min(1), results.max(1) - means])
    names = sorted(set(kinds), key=lambda kind: (kind == "uniform", kind))
    place = {name: number for number, name in enumerate(names)}
    columns = min(4, len(clouds))
    rows = math.ceil(len(clouds) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(max(7.0, 3.5 * columns), 0.9 + 2.9 * rows),
            layout=ConstrainedLayoutEngine(w_pad=0.1, wspace=0.02),
        )
        FigureCanvasAgg(figure)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes, cloud in zip(panels, clouds, strict=False):
            for name in names:
                rows_of = [i for i, kind in enumerate(kinds) if kind == name]
                axes.errorbar(
                    cloud.x[rows_of],
                    means[rows_of],
                    yerr=errors[:, rows_of],
                    fmt=_marker(name, place[name]),
                    color=_colour(name, place[name]),
                    markersize=11 if name == "uniform" else 5,
                    elinewidth=0.8,
                    zorder=3 if name == "uniform" else 2,
                )
            tau = "" if math.isnan(cloud.tau) else f" · τ {cloud.tau:.2f}"
            axes.set_title(cloud.title + tau)
            axes.set_xlabel(f"{cloud.label} before finetuning")
        for axes in panels[len(clouds) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(label)
        handles = [
            Line2D([], [], linestyle="", color=_colour(n, place[n]), marker=_marker(n, place[n]), label=n)
            for n in names
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
        bars = ["bar: lowest to highest seed"] if results.shape[1] > 1 else []
        figure.suptitle(" · ".join([title, *bars] if title else bars), x=0.01, ha="left", fontsize=11)
    return figure


def _marker(kind: str, place: int) -> str:
    return "*" if kind == "uniform" else MARKERS[place]


def _colour(kind: str, place: int) -> str:
    return "black" if kind == "uniform" else COLOURS[place]


# Widths


@dataclass(frozen=True)
class NetworkWidths:
    """Kept widths of one network, in forward order of its channel groups.

    Attributes:
        name: agent name.
        layers: (n,) labels of one or two short lines.
        dense: (n,) widths of the dense network.
        uniform: (n,) widths of the uniform plan at the same budget.
        pruned: (n,) widths of the plan.
    """

    name: str
    layers: tuple[str, ...]
    dense: tuple[int, ...]
    uniform: tuple[int, ...]
    pruned: tuple[int, ...]

    @classmethod
    def of(
        cls, name: str, groups: Sequence[ChannelGroup], uniform: Sequence[int], pruned: Sequence[int]
    ) -> NetworkWidths:
        """Label each group by what makes its channels and the height of its map."""
        layers = tuple(f"{'up' if g.kind == 'transposed' else 'conv'}\n{g.resolution} px" for g in groups)
        return cls(name, layers, tuple(g.channels for g in groups), tuple(uniform), tuple(pruned))


def widths(networks: Sequence[NetworkWidths], title: str = "") -> Figure:
    """Keep ratio of every layer: a bar for the plan, an outline for uniform, kept channels below."""
    with mpl.rc_context(STYLE):
        # Room for the titles; those of four networks are longer.
        counts = [max(3 if len(networks) <= 2 else 5, len(network.layers)) for network in networks]
        figure = Figure(figsize=(2.0 + 0.8 * sum(counts), 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(networks), width_ratios=counts, sharey=True, squeeze=False)
        for axes, network in zip(panels[0], networks, strict=True):
            place = np.arange(len(network.layers))
            dense = np.asarray(network.dense, dtype=np.float64)
            pruned = np.asarray(network.pruned) / dense
            uniform = np.asarray(network.uniform) / dense
            axes.bar(place, pruned, width=0.62, color="#5b8db8")
            axes.bar(place, uniform, width=0.8, fill=False, edgecolor="0.15", linewidth=1.2)
            kept = [f"{width} of {full}" for width, full in zip(network.pruned, network.dense, strict=True)]
            labels = [f"{layer}\n{text}" for layer, text in zip(network.layers, kept, strict=True)]
            axes.set_xticks(place, labels, fontsize=8)
            axes.set_title(f"{network.name}: {sum(network.pruned)} of {sum(network.dense)} channels kept")
            axes.grid(visible=False, axis="x")
        panels[0][0].set_ylabel("keep ratio of the channels")
        panels[0][0].set_ylim(0, 1)
        handles = [
            Patch(facecolor="#5b8db8", label="pruned"),
            Patch(fill=False, edgecolor="0.15", label="uniform at the same budget"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# Samples


def samples(columns: Mapping[str, Tensor], rows: int = 8, pixels: int = 128) -> Image.Image:
    """A grid of images, one row per sample and one titled column per kind, enlarged without smoothing.

    Args:
        columns: title → (N, 3, H, W) or (N, 1, H, W) float in [−1, 1], the same N and size.
        rows: at most so many samples, the first ones.
        pixels: aimed height of an image; the enlargement is the next whole factor, so pixels stay square.

    Raises:
        ValueError: columns of different sizes, or none.
    """
    shapes = {title: tuple(images.shape) for title, images in columns.items()}
    if len({(shape[0], *shape[2:]) for shape in shapes.values()}) != 1:
        raise ValueError(f"all columns need the same number and size of images; got {shapes}")
    count, _, height, width = next(iter(shapes.values()))
    count = min(count, rows)
    scale = max(1, round(pixels / height))
    tile_height, tile_width = height * scale, width * scale
    gap, margin = max(4, tile_width // 24), 12
    font = ImageFont.truetype(
        str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), max(11, tile_width // 8)
    )
    column_width = max(tile_width, *(math.ceil(font.getlength(title)) for title in columns))
    ascent, descent = font.getmetrics()
    head = margin + ascent + descent + 6
    size = (
        2 * margin + len(columns) * (column_width + gap) - gap,
        head + count * (tile_height + gap) - gap + margin,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(columns.items()):
        left = margin + column * (column_width + gap)
        middle = left + column_width / 2
        draw.text((middle, margin), title, fill="black", font=font, anchor="ma")
        for row in range(count):
            tile = _to_image(images[row]).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            top = head + row * (tile_height + gap)
            x = left + (column_width - tile_width) // 2
            sheet.paste(tile, (x, top))
            draw.rectangle((x - 1, top - 1, x + tile_width, top + tile_height), outline="#dddddd")
    return sheet


def _to_image(image: Tensor) -> Image.Image:
    """(1 or 3, H, W) float in [−1, 1] → RGB image, rounded to the nearest of 256 levels."""
    values = np.asarray(image.detach().cpu(), dtype=np.float64).clip(-1, 1)
    levels = np.rint((values + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0).copy())


def save_image(image: Image.Image, path: Path) -> Path:
    """Write an image as PNG, in one step."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return write_bytes(path, buffer.getvalue())


# Differences


@dataclass(frozen=True)
class Estimates:
    """One panel of :func:`intervals`.

    Attributes:
        title: of the panel.
        labels: n rows, from top to bottom.
        values: (n, k) k repetitions of each row; NaN where a row has fewer.
        bounds: (n, 2) ends of the interval of each row's estimate; NaN where there is none.
        centres: (n,) the estimates; by default the means.
    """

    title: str
    labels: tuple[str, ...]
    values: NDArray[np.float64]
    bounds: NDArray[np.float64]
    centres: NDArray[np.float64] | None = None


def intervals(panels: Sequence[Estimates], label: str, title: str = "") -> Figure:
    """Estimates with their intervals against a zero line, up to three panels beside each other.

    Args:
        panels: what to draw.
        label: of all horizontal axes.
        title: of the figure.
    """
    tallest = max(len(panel.labels) for panel in panels)
    columns = min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        longest = _legend_width([label for panel in panels for label in panel.labels])
        size = (max(6.5, (3.6 + longest) * columns), rows * (1.6 + 0.4 * max(2, tallest)))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid, panels, strict=False):
            centres = np.nanmean(panel.values, axis=1) if panel.centres is None else panel.centres
            for place, (values, bounds) in enumerate(zip(panel.values, panel.bounds, strict=True)):
                axes.plot(values, np.full(len(values), place), ".", color=COLOURS[2], markersize=5, zorder=4)
                axes.plot(bounds, (place, place), "-", color=COLOURS[0])
                axes.plot(centres[place], place, MARKERS[0], color=COLOURS[0], markersize=6)
            axes.axvline(0.0, color="0.2", linewidth=1.0)
            axes.set_yticks(range(len(panel.labels)), panel.labels)
            axes.set_ylim(len(panel.labels) - 0.5, -0.5)
            axes.set_title(panel.title)
        figure.supxlabel(label, fontsize=9)  # once: it may be wider than a panel
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


@dataclass(frozen=True)
class Curve:
    """One line of :func:`quality_curves`.

    Attributes:
        label: in the legend.
        places: (n,) shares of the cost, rising.
        values: (n, k) one value for each of k seeds.
    """

    label: str
    places: NDArray[np.float64]
    values: NDArray[np.float64]


def quality_curves(
    panels: Mapping[str, Sequence[Curve]], dense: Mapping[str, float], label: str, title: str = ""
) -> Figure:
    """Quality against cost on a logarithmic axis, a panel for each figure.

    Args:
        panels: title → lines; means over the seeds, with a band from the smallest to the largest.
        dense: title → value of the dense pair, drawn as a line.
        label: of the horizontal axes.
        title: of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels) + 0.6, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, lines) in zip(drawn, panels.items(), strict=True):
            axes.axhline(dense[name], color="0.35", linewidth=1.2, linestyle="--", label="dense")
            for place, line in enumerate(lines):
                colour, marker = COLOURS[place], MARKERS[place]
                axes.plot(
                    line.places, line.values.mean(1), color=colour, marker=marker, ms=5, label=line.label
                )
                if line.values.shape[1] > 1:
                    low, high = line.values.min(1), line.values.max(1)
                    axes.fill_between(line.places, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale("log")
            places = sorted({float(x) for line in lines for x in line.places})
            axes.set_xticks(places, [f"{100 * x:g} %" for x in places], fontsize=8)
            axes.minorticks_off()
            axes.set_title(name)
            axes.set_xlabel(label, fontsize=8)
        drawn[0].legend(fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class LearningCurve:
    """A finetuning, watched on val.

    Attributes:
        label: name in the legend.
        frame: one row per epoch with ``epoch``, ``seconds``, ``val_kid`` and, where it is known, ``val_l1``;
            NaN where nothing was measured. The start is epoch 0.
        dense: the same figures of the dense generator; empty where they are not known.
    """

    label: str
    frame: pd.DataFrame
    dense: Mapping[str, float]


def learning_curves(curves: Sequence[LearningCurve], title: str = "") -> Figure:
    """KID and L1 on val over one or several finetunings, the start at 0, the dense pair as a line.

    The horizontal axis counts minutes where one of them took two or more, else epochs.

    Raises:
        UserError: too many to tell apart.
    """
    if len(curves) > MOST_SERIES:
        raise UserError(
            f"{len(curves)} finetunings cannot be told apart in one figure; draw at most {MOST_SERIES}"
        )
    minutes = any(bool(curve.frame["seconds"].max() >= 120) for curve in curves)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4 if len(curves) == 1 else 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        panels = {"val_kid": "KID", "val_l1": "L1"}
        measured = [
            (column, name) for column, name in panels.items() if any(column in one.frame for one in curves)
        ]
        drawn = figure.subplots(1, len(measured), squeeze=False)[0]
        for axes, (column, name) in zip(drawn, measured, strict=True):
            for place, curve in enumerate(curves):
                if column not in curve.frame:
                    continue
                known = curve.frame[curve.frame[column].notna()]
                x = known["seconds"] / 60 if minutes else known["epoch"]
                looks = {**_looks(place), "markersize": 3}
                axes.plot(x, known[column], label=curve.label, **looks)
            for level in sorted({round(one.dense[column], 9) for one in curves if column in one.dense}):
                axes.axhline(level, color="0.35", linestyle="--", linewidth=1.2)
                axes.annotate(
                    "dense", (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom"
                )
            axes.set_title(f"{name}, lower is better")
            axes.set_xlabel("minutes of training" if minutes else "epochs")
        if len(curves) > 1:
            handles, _ = drawn[0].get_legend_handles_labels()
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(curves)), fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# Comparisons of learners


@dataclass(frozen=True)
class Line:
    """A curve with its band.

    Attributes:
        label: name in the legend.
        x: (k,) evaluations, ascending.
        y: (k,) the estimate.
        low, high: (k,) ends of the band; NaN where there is none.
    """

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class LinePanel:
    """One panel of :func:`score_curves`.

    Attributes:
        title: of the panel.
        lines: what to draw.
    """

    title: str
    lines: tuple[Line, ...]


def score_curves(
    panels: Sequence[LinePanel], label: str, title: str = "", fixed: Sequence[str] = ()
) -> Figure:
    """Best score against evaluations, a panel for each cell, the legend in the order of the last values.

    Args:
        panels: what to draw; equal labels look alike in all of them. At most ``MOST_CURVES`` labels.
        label: of the vertical axes.
        title: of the figure.
        fixed: labels that look the same in every figure, up to ``MOST_CURVES``; others take what is left.

    Raises:
        UserError: too many labels.
    """
    ends = {
        line.label: [other.y[-1] for panel in panels for other in panel.lines if other.label == line.label]
        for panel in panels
        for line in panel.lines
    }
    if len(ends) > MOST_CURVES:
        raise UserError(f"{len(ends)} curves cannot be told apart in one figure; draw at most {MOST_CURVES}")
    places = {name: place for place, name in enumerate(fixed[:MOST_CURVES]) if name in ends}
    free = (place for place in range(MOST_CURVES) if place not in places.values())
    places |= {name: next(free) for name in ends if name not in places}
    order = sorted(ends, key=lambda name: -float(np.mean(ends[name])))
    columns = min(MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        size = (1.4 + _legend_width(order) + max(4.8, 4.2 * columns), 0.8 + 3.4 * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, panels, strict=False):
            for line in panel.lines:
                place = places[line.label]
                every = max(1, len(line.x) // 6)
                offset = order.index(line.label) * every // len(order)  # markers of equal curves side by side
                looks = _looks(place)
                axes.plot(line.x, line.y, markevery=(offset, every), drawstyle="steps-post", **looks)
                known = ~np.isnan(line.low)
                if known.any():
                    axes.fill_between(
                        line.x[known],
                        line.low[known],
                        line.high[known],
                        color=looks["color"],
                        alpha=0.15,
                        linewidth=0,
                        step="post",
                    )
            axes.axhline(0, color="0.4", linewidth=0.8)
            axes.margins(x=0.02)
            axes.set_title(panel.title)
            axes.set_xlabel("evaluations")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel(label)
        handles = [Line2D([], [], label=name, **_looks(places[name])) for name in order]
        figure.legend(handles=handles, loc="outside right upper", handlelength=3.2)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _legend_width(labels: Sequence[str]) -> float:
    """Inches that the longest label takes: long ones must not squeeze the panels."""
    return 0.08 * max(map(len, labels))


def _looks(place: int) -> dict[str, Any]:
    """Colour, marker and line of a series: sixteen that differ in grey, too."""
    dashed = place >= MOST_SERIES
    colour = COLOURS[place % MOST_SERIES]
    return {
        "color": colour,
        "marker": MARKERS[place % MOST_SERIES],
        "linestyle": "--" if dashed else "-",
        "markerfacecolor": "white" if dashed else colour,
        "markersize": 5.5,
    }


def improvements(
    labels: Sequence[str],
    values: NDArray[np.float64],
    bounds: NDArray[np.float64],
    title: str = "",
) -> Figure:
    """Probability that a run of the row is better than one of the column, with its interval.

    Args:
        labels: n names, best first.
        values: (n, n) probabilities; NaN where there is none.
        bounds: (n, n, 2) ends of their intervals; NaN where there is none.
        title: of the figure.
    """
    n = len(labels)
    with mpl.rc_context(STYLE):
        margin = _legend_width(labels)
        size = (1.2 + margin + 0.95 * n, 1.3 + 0.5 * margin + 0.62 * max(3, n))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        # up to half grey only, so that black numbers can be read on it
        axes.imshow(np.ma.masked_invalid(values), cmap="Greys", vmin=0, vmax=2, aspect="auto")
        for row, column in itertools.product(range(n), repeat=2):
            value, (low, high) = values[row, column], bounds[row, column]
            if math.isnan(value):
                continue
            text = f"{value:.2f}" if math.isnan(low) else f"{value:.2f}\n{low:.2f}–{high:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(n), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), labels)
        axes.set_xlabel("than")
        axes.set_ylabel("probability of being better")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


# Balance


@dataclass(frozen=True)
class GapHistory:
    """The balance gap over a search.

    Attributes:
        gaps: of every plan, in the order in which they were scored.
        best: of the best plan so far, at each of them; empty where plans do not compare.
        uniform: of the uniform plan.
    """

    gaps: tuple[float, ...]
    best: tuple[float, ...]
    uniform: float


@dataclass(frozen=True)
class Margins:
    """The discriminator's margin over finetunings of one kind.

    Attributes:
        label: what was finetuned.
        margins: one sequence per finetuning, a number for each training step.
    """

    label: str
    margins: Sequence[Sequence[float]]


def balance(search: GapHistory | None, finetunings: Sequence[Margins] = (), title: str = "") -> Figure:
    """How evenly matched the pair is: the balance gap over the search, the margin over finetuning.

    Args:
        search: the left panel; None leaves it out.
        finetunings: the right panel; none leaves it out. At most ``MOST_SERIES``.
        title: of the figure.

    Raises:
        ValueError: nothing to draw.
    """
    finetunings = [one for one in finetunings if any(len(steps) for steps in one.margins)]
    panels = (search is not None) + bool(finetunings)
    if not panels:
        raise ValueError("there is neither a search nor a finetuning to draw")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * panels, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        places = list(figure.subplots(1, panels, squeeze=False)[0])
        if search is not None:
            _gap_panel(places.pop(0), search)
        if finetunings:
            _margin_panel(places.pop(0), finetunings)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _gap_panel(axes: Axes, search: GapHistory) -> None:
    places = np.arange(1, len(search.gaps) + 1)
    axes.plot(places, search.gaps, ".", color="0.65", markersize=4, label="every plan")
    if search.best:
        axes.plot(places, search.best, color=COLOURS[0], drawstyle="steps-post", label="best plan so far")
    axes.axhline(search.uniform, color=COLOURS[1], linestyle="--", label="uniform plan")
    axes.set_ylim(bottom=0)
    axes.set_title("balance gap over the search (0 = as dense)")
    axes.set_xlabel("plans in the order in which they were scored")
    axes.set_ylabel("balance gap")
    axes.legend(loc="best", fontsize=8)


def _margin_panel(axes: Axes, finetunings: Sequence[Margins]) -> None:
    for place, one in enumerate(finetunings):
        length = min(len(steps) for steps in one.margins if len(steps))
        rows = np.array([steps[:length] for steps in one.margins if len(steps)], dtype=np.float64)
        steps = np.arange(1.0, length + 1)
        window = max(1, round(length * SMOOTH))
        smooth = np.stack([moving_average(steps, row, window) for row in rows])
        looks = {**_looks(place), "linestyle": ("-", "--", ":", "-.")[place % 4]}
        every = max(1, length // 6)
        label = f"{one.label} (swing {np.mean([swing(row) for row in rows]):.2f})"
        axes.plot(
            steps, smooth.mean(0), label=label, markevery=(every // 2 + place * every // 8, every), **looks
        )
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=looks["color"], alpha=0.18, linewidth=0)
    many = max(len(one.margins) for one in finetunings) > 1
    axes.set_title("margin over finetuning" + (" · band: lowest to highest run" if many else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("training steps")
    axes.set_ylabel("discriminator's logit, real minus made")
    axes.legend(loc="best", fontsize=8)


# Fronts


FrontForm = Literal["line", "points", "steps"]


@dataclass(frozen=True)
class Frontier:
    """Plans of several costs.

    Attributes:
        label: name in the legend.
        costs: (k,) shares of the dense cost, ascending.
        values: (k,) what they are judged by, lower is better.
        form: a line where one learner answers over the whole range, points where each plan was sought alone,
            steps where many plans are what else was met.
    """

    label: str
    costs: tuple[float, ...]
    values: tuple[float, ...]
    form: FrontForm


@dataclass(frozen=True)
class FrontPanel:
    """One panel of :func:`fronts`.

    Attributes:
        title: what its plans are judged by, lower is better.
        dense: the same of the dense pair.
        frontiers: what to draw; the same labels in all panels, uniform pruning first.
    """

    title: str
    dense: float
    frontiers: tuple[Frontier, ...]


SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Ticks of an axis of costs."""


def check_drawable(number: int) -> None:
    """Refuse more fronts than one figure can show.

    Raises:
        UserError: more than ``MOST_SERIES``.
    """
    if number > MOST_SERIES:
        raise UserError(f"{number} fronts cannot be told apart in one figure; draw at most {MOST_SERIES}")


def fronts(panels: Sequence[FrontPanel], label: str, title: str = "") -> Figure:
    """Cost against quality, better upwards, the dense pair at the top right.

    Args:
        panels: one for each metric, with at most ``MOST_SERIES`` frontiers.
        label: of the costs.
        title: of the figure.

    Raises:
        UserError: too many frontiers.
    """
    check_drawable(len(panels[0].frontiers))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.6 * len(panels)), 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for place, one in enumerate(panel.frontiers):
                axes.plot(one.costs, one.values, **_front_looks(place, one.form))
            axes.plot([1.0], [panel.dense], **DENSE_LOOKS)
            axes.annotate(
                "dense", (1.0, panel.dense), (-9, 0), textcoords="offset points", ha="right", va="center"
            )
            axes.set_xscale("log")
            least = min(cost for one in panel.frontiers for cost in one.costs)
            ticks = [share for share in SHARES if share >= 0.9 * least]
            axes.set_xticks(ticks, [f"{share:g}" for share in ticks])
            axes.minorticks_off()
            axes.margins(x=0.06, y=0.08)
            axes.invert_yaxis()
            axes.set_title(panel.title)
            axes.set_xlabel(label)
        figure.axes[0].set_ylabel("better ↑ (lower values)" if len(panels) > 1 else "gap (lower is better) ↑")
        handles = [
            Line2D([], [], label=one.label, **_front_looks(place, one.form))
            for place, one in enumerate(panels[0].frontiers)
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=len(panels), handlelength=3.2)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


DENSE_LOOKS: dict[str, Any] = {"color": "0.1", "marker": "*", "markersize": 12, "linestyle": "none"}


def _front_looks(place: int, form: FrontForm) -> dict[str, Any]:
    """Uniform pruning, the first, is dashed and grey; points have no line, steps no markers."""
    if place == 0:
        grey = "0.45"
        return {
            "color": grey,
            "marker": "o",
            "markersize": 6,
            "markerfacecolor": "white",
            "linestyle": "--",
        }
    looks = _looks(place - 1)
    if form == "steps":  # what a plan reaches it reaches at every larger cost
        style = (0, (5, 1.5)) if place % 2 else "-."
        return {**looks, "marker": "none", "linewidth": 1.8, "linestyle": style, "drawstyle": "steps-post"}
    marker = MARKERS[place % MOST_SERIES]
    return {**looks, "marker": marker, "markersize": 6.5, "linestyle": "-" if form == "line" else "none"}
