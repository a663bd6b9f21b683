"""Charts of the report, as inline SVG.

matplotlib draws them; their colours are then turned into CSS variables of the page, so that light and dark mode are one
drawing. Text stays text, in the page's font.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jpo_ray.evaluation.histories import Curve
from jpo_ray.evaluation.looks import COLORS, MARKERS, ROLES, SERIES_HEX, Look, color_of, line_look, rate_look, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_PER_INCH = 72  # matplotlib's SVG unit is a point, so sizes below are the SVG's own
WIDTH = 400  # narrow, so that text stays legible when a phone shows the chart at its full width
SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": ROLES["line"],
    "axes.labelcolor": ROLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": ROLES["line"],
    "grid.linewidth": 0.6,
    "xtick.color": ROLES["line"],
    "ytick.color": ROLES["line"],
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "text.color": ROLES["ink"],
}
LEAST_LABELLED = 7.0  # percent of a bar that have room for their number


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn."""

    curve: Curve
    series: int
    style: int = 0  # of `STYLES`
    validation: bool = False  # drawn strong and with markers, training values faint


def line_chart(name: str, label: str, lines: Sequence[Line], *, unit: str = "") -> str:
    """Curves over steps."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for line in lines:
            look = line_look(SERIES_HEX.format(color_of(line.series)), line.style, validation=line.validation)
            if len(line.curve.steps) == 1:
                look["marker"] = "o"
            axes.plot(line.curve.steps, line.curve.values, **look)
        axes.grid(axis="y")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return _svg(name, label, draw, height=230)


def histogram(name: str, label: str, values: NDArray[np.float32], band: tuple[float, float]) -> str:
    """Similarities of pairs; what lies outside the configured band is shaded."""

    def draw(axes: "Axes") -> None:
        low, high = min(0.0, float(values.min())), 1.0
        axes.hist(values, bins=40, range=(low, high), color=ROLES["data"])
        for start, end in ((low, band[0]), (band[1], high)):
            if start < end:
                axes.axvspan(start, end, color=ROLES["muted"], alpha=0.18, linewidth=0)
        axes.set_xlim(low, high)
        axes.grid(axis="y")
        axes.set_xlabel("cosine similarity of the two instructions")
        axes.set_ylabel("pairs")

    return _svg(name, label, draw, height=230)


def win_rate_chart(name: str, label: str, models: Mapping[str, Any], series: Mapping[str, int]) -> str:
    """One row per model: each temperature a marker, the mean a diamond, lines are 95 % intervals."""
    keys = [*temperatures_of(models), "mean"]
    step = min(0.2, 0.72 / len(keys))
    row_height = max(64, 15 * len(keys) + 10)

    def draw(axes: "Axes") -> None:
        for row, (model, entry) in enumerate(models.items()):
            color = SERIES_HEX.format(color_of(series.get(model, 0)))
            for position, key in enumerate(keys):
                y = row + step * (position - (len(keys) - 1) / 2)
                _draw_rate(axes, entry, key, y, rate_look(color, key, position))
        axes.set_yticks(range(len(models)), [shortened(model) for model in models], color=ROLES["ink"])
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.axvline(50, color=ROLES["muted"], linewidth=1, linestyle=(0, (2, 2)))
        axes.grid(axis="x")
        axes.set_xlabel("win rate against gold, percent")
        axes.spines["left"].set_visible(False)

    return _svg(name, label, draw, height=60 + row_height * len(models))


def interval_chart(
    name: str, label: str, curves: Mapping[str, Sequence[tuple[float, float, float, float]]], x_label: str, y_label: str
) -> str:
    """A curve for each key, of points (x, y, low, high), with its interval as a band; x is logarithmic where it spans
    more than a factor of eight.
    """

    def draw(axes: "Axes") -> None:
        places = sorted({point[0] for points in curves.values() for point in points})
        for number, (key, points) in enumerate(curves.items()):
            x, y, low, high = zip(*points, strict=True)
            color = SERIES_HEX.format(number % (COLORS - 1) + 1)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, y, color=color, linewidth=1.8, marker=MARKERS[number % len(MARKERS)], markersize=4, label=key)
        if places[0] > 0 and places[-1] > 8 * places[0]:
            axes.set_xscale("log")
        axes.set_xticks(places, [f"{place:,g}" for place in places], rotation=30 if len(places) > 5 else 0)
        axes.minorticks_off()
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    return _svg(name, label, draw, height=290)


def rate_rows(
    name: str,
    label: str,
    rows: Mapping[str, tuple[float, float, float]],
    others: Mapping[str, Mapping[str, float]],
    x_label: str,
) -> str:
    """A row for each key, of (rate, low, high): a diamond on its interval; hollow markers for what others found, by
    their name and the row's.
    """

    def draw(axes: "Axes") -> None:
        for place, (rate, low, high) in enumerate(rows.values()):
            axes.hlines(place, low, high, color=SERIES_HEX.format(1), linewidth=2.2)
            own = "here" if others and place == 0 else None
            axes.plot([rate], [place], marker="D", color=SERIES_HEX.format(1), markersize=6.5, linestyle="", label=own)
        for number, (other, rates) in enumerate(others.items()):
            points = [(rates[key], place) for place, key in enumerate(rows) if key in rates]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker=MARKERS[number % len(MARKERS)], markerfacecolor="none",
                    color=SERIES_HEX.format(0), markersize=6, linestyle="none", label=other,
                )  # fmt: skip
        if others:
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
        axes.set_yticks(range(len(rows)), [shortened(key, 30) for key in rows], color=ROLES["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)

    return _svg(name, label, draw, height=60 + 24 * len(rows) + (18 * (len(others) + 1) if others else 0))


def stacked_bars(name: str, label: str, bars: Mapping[str, Mapping[str, float | None]]) -> str:
    """A bar for each key, its parts in percent side by side and named in a legend; the last one is grey."""
    parts = list(dict.fromkeys(part for values in bars.values() for part in values))

    def draw(axes: "Axes") -> None:
        for row, values in enumerate(bars.values()):
            left = 0.0
            for series, part in enumerate(parts):
                width = values.get(part) or 0.0
                color = SERIES_HEX.format(0 if part == parts[-1] else series % (COLORS - 1) + 1)
                axes.barh(row, width, left=left, height=0.55, color=color, label=part if row == 0 else None)
                if width >= LEAST_LABELLED:
                    axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color=ROLES["surface"])
                left += width
        axes.set_yticks(range(len(bars)), [shortened(key, 24) for key in bars], color=ROLES["ink"])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("percent")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(parts), frameon=False)

    return _svg(name, label, draw, height=90 + 34 * len(bars))


def temperatures_of(models: Mapping[str, Any]) -> list[str]:
    """Temperature keys of win rates, ascending."""
    keys = {key for entry in models.values() for key in entry["win_rate"] if key != "mean"}
    return sorted(keys, key=float)


def _draw_rate(axes: "Axes", entry: Mapping[str, Any], key: str, y: float, look: Look) -> None:
    rate = entry["win_rate"].get(key)
    if rate is None:
        return
    low, high = entry["ci95"] if key == "mean" else entry.get("ci95_by_temperature", {}).get(key, [None, None])
    if low is not None and high is not None:
        axes.hlines(y, low, high, color=look["color"], linewidth=2.6 if key == "mean" else 1.3)
    axes.plot([rate], [y], **look)


def _svg(name: str, label: str, draw: Any, height: float) -> str:
    with blank(name, height) as figure:
        figure.set_layout_engine("constrained")
        draw(figure.add_subplot())
        return inlined(figure, name, label)


@contextmanager
def blank(name: str, height: float) -> Iterator["Figure"]:
    """A figure as wide as all of them, under `SETTINGS`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        # A name in a script that matplotlib's own font lacks is drawn by the browser all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH), dpi=POINTS_PER_INCH)


def inlined(figure: "Figure", name: str, label: str) -> str:
    """The SVG element alone, themed, with ids that no other chart of the page has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    for role, color in ROLES.items():
        body = body.replace(color, f"var(--{role})")
    for index in range(COLORS):
        body = body.replace(SERIES_HEX.format(index), f"var(--series-{index})")
    view_box = re.search(r'viewBox="[^"]*"', body)
    opening = f'<svg role="img" aria-label="{html.escape(label)}" {view_box.group() if view_box else ""} '
    return opening + 'xmlns:xlink="http://www.w3.org/1999/xlink">' + body[body.index(">") + 1 :]


def standalone(svg: str, colors: Mapping[str, str], above: str = "") -> str:
    """A chart of the page as a file of its own, on a white ground, in `colors` by the names of CSS variables; `above`
    it another such drawing.
    """
    parts = [part for part in (above, svg) if part]
    width, height, placed = 0.0, 0.0, []
    for part in parts:
        box = [float(number) for number in part.split('viewBox="', 1)[1].split('"', 1)[0].split()]
        placed.append(part.replace("<svg ", f'<svg y="{height:g}" width="{box[2]:g}" height="{box[3]:g}" ', 1))
        width, height = max(width, box[2]), height + box[3]
    ground = f'<rect width="{width:g}" height="{height:g}" fill="{colors["card"]}"/>'
    body = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: colors[found.group(1)], "".join(placed))
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{ground}{body}</svg>'
