from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from experiments.aggregate import swing
from experiments.figures import (
    COLOURS,
    MOST_SERIES,
    Cloud,
    Estimates,
    Frontier,
    FrontPanel,
    GapHistory,
    Line,
    LinePanel,
    Margins,
    NetworkWidths,
    Series,
    balance,
    band,
    calibration,
    curves,
    fronts,
    improvements,
    intervals,
    moving_average,
    samples,
    save_figure,
    save_image,
    score_curves,
    widths,
)
from gan.errors import UserError
from gan.groups import ChannelGroup

Frames = Callable[..., pd.DataFrame]


def test_moving_average_by_hand() -> None:
    evaluations = np.array([10.0, 20.0, 20.0, 40.0, 50.0])
    values = np.array([1.0, 3.0, 5.0, np.nan, 7.0])
    # (0, 10]: 1; (0, 20]: 1, 3, 5; (20, 40]: none; (30, 50]: 7
    expected = [1.0, 3.0, 3.0, np.nan, 7.0]
    np.testing.assert_allclose(moving_average(evaluations, values, 20), expected)
    np.testing.assert_allclose(moving_average(evaluations, values, 1000), [1.0, 3.0, 3.0, 3.0, 4.0])


def test_band_of_one_run_is_its_own_curve(frame: Frames) -> None:
    one = frame(episodes=5)
    shape = band(Series("a", (one,)), "return", window=1)
    assert shape is not None
    np.testing.assert_allclose(shape.x, [10, 20, 30, 40, 50])
    np.testing.assert_allclose(shape.mean, one["return"])
    np.testing.assert_allclose(shape.low, shape.high)


def test_band_spans_its_runs_where_all_of_them_are(frame: Frames) -> None:
    low, high = frame(episodes=9), frame(episodes=5)
    low["return"], high["return"] = 1.0, 4.0
    shape = band(Series("a", (low, high, high)), "return", window=20)
    assert shape is not None
    assert (shape.x[0], shape.x[-1]) == (10, 50)
    np.testing.assert_allclose(shape.mean, 3.0)
    np.testing.assert_allclose(shape.low, 1.0)
    np.testing.assert_allclose(shape.high, 4.0)


def test_band_of_an_unknown_or_empty_column_is_none(frame: Frames) -> None:
    one = frame()
    one["best_potential"] = np.nan  # budgets were drawn
    assert band(Series("a", (one,)), "best_potential", 20) is None
    assert band(Series("a", (one,)), "crowd_gap.score", 20) is None


def test_curves_have_a_panel_for_the_return_each_network_and_each_term(frame: Frames) -> None:
    figure = curves([Series("mappo", (frame(),))], window=1, title="edges2emoji")
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [
        "return of an episode: improvement over uniform pruning (0)",
        "sparsity of the generator",
        "sparsity of the discriminator",
        "fidelity: MMD² to dense",
        "fidelity: distance to real (weight 0)",
    ]
    assert all(axes.get_xlabel() == "evaluations" and axes.get_ylabel() for axes in figure.axes)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), frame()["return"])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), 0.9)
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), 1 - 0.1**0.5)
    assert "edges2emoji" in figure.get_suptitle()


def test_curves_of_several_runs_have_a_legend_and_a_spread(frame: Frames) -> None:
    series = [Series("mappo", (frame(seed=1), frame(seed=2))), Series("random", (frame(seed=3),))]
    figure = curves(series, window=20)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["mappo (2 runs)", "random (1 run)"]
    assert len(figure.axes[0].collections) == 1  # one band: the runs that have several seeds
    colours = {line.get_color() for line in figure.axes[3].lines[:2]}
    markers = {line.get_marker() for line in figure.axes[3].lines[:2]}
    assert len(colours) == len(markers) == 2


def test_too_many_series_are_refused(frame: Frames) -> None:
    with pytest.raises(UserError, match="told apart"):
        curves([Series(str(i), (frame(),)) for i in range(MOST_SERIES + 1)])


def test_widths_are_bars_inside_outlines() -> None:
    generator = NetworkWidths("generator", ("conv", "up"), (32, 64), uniform=(8, 16), pruned=(16, 8))
    discriminator = NetworkWidths("discriminator", ("conv",), (64,), uniform=(32,), pruned=(32,))
    figure = widths([generator, discriminator])
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [0.5, 0.125, 0.25, 0.25]
    assert [bar.get_fill() for bar in left.patches] == [True, True, False, False]
    assert [label.get_text() for label in left.get_xticklabels()] == ["conv\n16 of 32", "up\n8 of 64"]
    assert left.get_title("left") == "generator: 24 of 96 channels kept"
    assert [bar.get_height() for bar in right.patches] == [0.5, 0.5]


def test_widths_label_groups_by_what_makes_them() -> None:
    group = ChannelGroup("up", 64, (), kind="transposed", kernel=4, stride=2, resolution=16)
    assert NetworkWidths.of("generator", (group,), (8,), (4,)).layers == ("up\n16 px",)


def test_samples_keep_every_pixel_square_and_exact() -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    sheet = np.asarray(samples({"a": images[:, :1], "b": images}, rows=2, pixels=32))
    levels = ((images[1].numpy().astype(np.float64) + 1) * 127.5).round().astype(np.uint8)
    expected = levels.repeat(4, axis=1).repeat(4, axis=2).transpose(1, 2, 0)
    # the second row of the last column stands in the corner, inside a margin of 12 pixels
    np.testing.assert_array_equal(sheet[-44:-12, -44:-12], expected)


def test_samples_refuse_columns_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="same number and size"):
        samples({"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(3, 3, 8, 8)})


def test_figures_are_written_in_the_format_of_their_name(tmp_path: Path) -> None:
    figure = widths([NetworkWidths("generator", ("conv",), (32,), uniform=(8,), pruned=(16,))])
    image = Image.open(io.BytesIO(save_figure(figure, tmp_path / "a.png").read_bytes()))
    assert (image.format, image.size) == (
        "PNG",
        tuple(int(130 * inches) for inches in figure.get_size_inches()),
    )
    assert save_figure(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="must end in"):
        save_figure(figure, tmp_path / "a.txt")
    with pytest.raises(UserError, match="does not exist"):
        save_figure(figure, tmp_path / "none" / "a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png"]


def test_images_are_written_as_png(tmp_path: Path) -> None:
    path = save_image(samples({"a": torch.zeros(1, 3, 8, 8)}), tmp_path / "s.png")
    assert Image.open(io.BytesIO(path.read_bytes())).mode == "RGB"


def test_calibration_draws_a_panel_per_term_with_its_tau_and_the_range_of_the_seeds() -> None:
    results = np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 5.0]])
    clouds = [
        Cloud("total score", "score", np.array([0.0, 1.0, 2.0]), -0.5),
        Cloud("constant", "gap", np.ones(3), np.nan),
    ]
    figure = calibration(clouds, results, ["uniform", "iid", "iid"], title="some plans")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["total score · τ -0.50", "constant"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["score before finetuning", "gap before finetuning"]
    points = {tuple(map(float, line.get_ydata())) for line in figure.axes[0].lines}
    assert points == {(2.0,), (2.0, 4.5)}
    bars = [path.vertices[:, 1].tolist() for c in figure.axes[0].collections for path in c.get_paths()]
    assert sorted(bars) == [[1.0, 3.0], [2.0, 2.0], [4.0, 5.0]]


def line(label: str, end: float, points: int = 30, band: bool = True) -> Line:
    y = np.linspace(0, end, points)
    spread = 0.1 if band else np.nan
    return Line(label, np.arange(1.0, points + 1), y, y - spread, y + spread)


def test_score_curves_are_named_in_the_order_of_their_ends() -> None:
    panels = [
        LinePanel("one", (line("low", 0.5), line("high", 2.0), line("alone", 1.0, band=False))),
        LinePanel("two", (line("low", 0.5), line("high", 2.0))),
    ]
    figure = score_curves(panels, "score")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["high", "alone", "low"]
    first, second = figure.axes
    assert (len(first.collections), len(second.collections)) == (2, 2)  # a line without a band has none
    looks = [{one.get_color(): one.get_marker() for one in axes.lines[:2]} for axes in (first, second)]
    assert looks[0] == looks[1]  # a label looks alike in all panels
    assert first.get_ylabel() == "score"


def test_sixteen_curves_differ_in_grey_and_more_are_refused() -> None:
    names = [str(number) for number in range(2 * MOST_SERIES)]
    figure = score_curves([LinePanel("", tuple(line(name, 1.0) for name in names))], "score")
    drawn = figure.axes[0].lines[: len(names)]
    looks = {(one.get_marker(), one.get_linestyle(), str(one.get_markerfacecolor())) for one in drawn}
    assert len(looks) == len(names)
    with pytest.raises(UserError, match="at most 16"):
        score_curves([LinePanel("", tuple(line(name, 1.0) for name in [*names, "x"]))], "score")


def test_known_labels_look_the_same_in_every_figure() -> None:
    known = ("a", "b", "c")
    looks: dict[str, set[tuple[str, str, str]]] = {}
    for names in (("c", "other", "a"), ("a", "b", "c"), ("another", "c")):
        figure = score_curves([LinePanel("", tuple(line(name, 1.0) for name in names))], "score", "", known)
        drawn = [
            (str(one.get_color()), str(one.get_marker()), str(one.get_linestyle()))
            for one in figure.axes[0].lines[: len(names)]
        ]
        assert len(set(drawn)) == len(names)
        for name, look in zip(names, drawn, strict=True):
            looks.setdefault(name, set()).add(look)
    assert all(len(looks[name]) == 1 for name in known)


def test_colours_are_told_apart_in_grey() -> None:
    bright = [brightness(colour) for colour in COLOURS]
    assert min(np.diff(sorted(bright))) > 5
    assert all(abs(one - other) > 15 for one, other in itertools.pairwise(bright))
    assert max(bright) < 80  # and from the paper


def brightness(colour: str) -> float:
    """L* of CIELAB, 0 black to 100 white, under D65."""
    levels = np.array(to_rgb(colour))
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return float(116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16)


def test_improvements_show_numbers_and_intervals(tmp_path: Path) -> None:
    values = np.array([[np.nan, 0.75], [0.25, np.nan]])
    bounds = np.array([[[np.nan, np.nan], [0.5, 0.9]], [[np.nan, np.nan], [np.nan, np.nan]]])
    figure = improvements(["a", "b"], values, bounds)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.75\n0.50–0.90", "0.25"]
    assert save_figure(figure, tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_balance_draws_what_there_is() -> None:
    history = GapHistory((1.0, 0.5, 0.75), (1.0, 0.5, 0.5), 1.0)
    steps = np.sin(np.arange(100.0))
    both = [Margins("pruned", [steps, steps + 1]), Margins("whole", [2 * steps]), Margins("none", [()])]
    figure = balance(history, both, "title")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "every plan",
        "best plan so far",
        "uniform plan",
    ]
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names == [f"pruned (swing {swing(steps):.2f})", f"whole (swing {2 * swing(steps):.2f})"]
    assert "lowest to highest" in right.get_title(loc="left")
    assert len(balance(None, both[1:2]).axes) == len(balance(GapHistory((1.0,), (), 1.0)).axes) == 1
    with pytest.raises(ValueError, match="neither"):
        balance(None)


def test_intervals_of_rows_of_different_length() -> None:
    panel = Estimates(
        "x", ("a", "b"), np.array([[1.0, 2.0], [3.0, np.nan]]), np.array([[0.0, 3.0], [np.nan] * 2])
    )
    axes = intervals([panel], "gap").axes[0]
    centres = [one.get_xdata()[0] for one in axes.lines if one.get_marker() == "o"]
    assert centres == [1.5, 3.0]
    given = Estimates("x", ("a",), np.array([[1.0, 2.0]]), np.array([[0.0, 3.0]]), np.array([1.75]))
    axes = intervals([given], "gap").axes[0]
    assert [one.get_xdata()[0] for one in axes.lines if one.get_marker() == "o"] == [1.75]


def test_many_panels_of_intervals_stand_in_rows() -> None:
    panel = Estimates("x", ("a", "b"), np.array([[1.0], [3.0]]), np.array([[0.0, 3.0], [2.0, 4.0]]))
    one, five = intervals([panel], "gap"), intervals([panel] * 5, "gap")
    assert [axes.get_visible() for axes in five.axes] == [True] * 5 + [False]
    assert five.get_figheight() == 2 * one.get_figheight()
    assert five.get_figwidth() == intervals([panel] * 3, "gap").get_figwidth()


@pytest.mark.parametrize("panels", [1, 3])
def test_the_label_of_intervals_is_seen_whole(panels: int) -> None:
    """Longer than a panel is wide, where its rows have short names."""
    label = "KID* minus that beside the full one, same seeds (negative is better)"
    panel = Estimates("x", ("even 1", "even 0.5"), np.ones((2, 1)), np.array([[0.0, 3.0], [0.0, 4.0]]))
    figure = intervals([panel] * panels, label)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() == label]
    assert texts
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_fronts_have_the_dense_pair_at_the_top_right() -> None:
    lines = (
        Frontier("uniform", (0.1, 0.4), (3.0, 2.0), "line"),
        Frontier("policy", (0.1, 0.4), (2.0, 1.0), "line"),
        Frontier("runs", (0.1, 0.4), (2.5, 1.5), "points"),
        Frontier("met", (0.1, 0.2, 0.4), (1.9, 1.5, 0.9), "steps"),
    )
    figure = fronts([FrontPanel("gap", 0.0, lines), FrontPanel("KID*", 0.5, lines)], "cost", "task")
    for axes, dense in zip(figure.axes, (0.0, 0.5), strict=True):
        assert axes.yaxis_inverted()
        drawn = {tuple(map(float, line.get_ydata())): line for line in axes.lines}
        assert drawn[3.0, 2.0].get_linestyle() == "--"
        assert drawn[2.5, 1.5].get_linestyle() == "None"
        assert (dense,) in drawn
        markers = {line.get_marker() for line in axes.lines}
        assert len(markers) == 5  # steps have none
        assert drawn[1.9, 1.5, 0.9].get_drawstyle() == "steps-post"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["uniform", "policy", "runs", "met"]
    with pytest.raises(UserError, match=r"told apart"):
        fronts([FrontPanel("gap", 0.0, lines * 3)], "cost")
