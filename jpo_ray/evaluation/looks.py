"""What models, temperatures and curves look like: the same on charts, in the legends of their files and on the page."""

from collections.abc import Sequence
from typing import Any

COLORS = 8  # of `--series-N` in the page: 0 is the SFT model's grey, the others are for trained models
ROLES = {"ink": "#010101", "muted": "#010102", "line": "#010103", "surface": "#010104", "data": "#010105"}
SERIES_HEX = "#0202{:02x}"
NAME_LENGTH = 18  # characters that a row has for its name
MARKERS = ("o", "s", "^", "v", "P", "X")  # of temperatures, in order
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # of lines: solid, dashed, dotted, both

# What a key of a legend looks like, as matplotlib's `Line2D` takes it.
Look = dict[str, Any]


def series_of(models: Sequence[str]) -> dict[str, int]:
    """Number of each model, the same on every chart: 0 for `sft`, else 1, 2, .. in order."""
    trained = [model for model in models if model != "sft"]
    return {"sft": 0} | {model: number for number, model in enumerate(trained, start=1)}


def color_of(series: int) -> int:
    """Which of the colours a model has: over again when they are used up."""
    return (series - 1) % (COLORS - 1) + 1 if series else 0


def style_of(series: int) -> int:
    """Which of the line styles tells a model from those of its colour; from the 29th trained one on they repeat too."""
    return (series - 1) // (COLORS - 1) % len(STYLES) if series else 0


def line_look(color: str, style: int = 0, *, validation: bool = True) -> Look:
    """A validation curve, or a training curve."""
    return {
        "color": color,
        "linestyle": STYLES[style],
        "linewidth": 1.8 if validation else 1.2,
        "marker": "o" if validation else "",
        "markersize": 4,
        "alpha": 1.0 if validation else 0.55,
    }


def series_look(series: int) -> Look:
    """A model by its colour and line style alone."""
    return line_look(SERIES_HEX.format(color_of(series)), style_of(series)) | {"marker": ""}


def rate_look(color: str, key: str, place: int) -> Look:
    """Win rate of a model at the temperature `key`, in the given place among them, or the mean."""
    mean = key == "mean"
    return {
        "color": color,
        "linestyle": "",
        "marker": "D" if mean else MARKERS[place % len(MARKERS)],
        "markersize": 8.0 if mean else 5.5,
        "markerfacecolor": color if mean else ROLES["surface"],
    }


def shortened(text: str, limit: int = NAME_LENGTH) -> str:
    """Cut in the middle: names of a series of models differ at their ends."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"
