"""The report's charts, from what a run holds: which panels there are, and what each says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jpo_ray.artifacts import Manifest
from jpo_ray.config import RunConfig
from jpo_ray.evaluation.charts import Line, histogram, line_chart, stacked_bars, temperatures_of, win_rate_chart
from jpo_ray.evaluation.histories import Log, averaged, curve
from jpo_ray.evaluation.looks import NAME_LENGTH, ROLES, Look, line_look, rate_look, series_look, style_of
from jpo_ray.evaluation.run_facts import joint_similarities
from jpo_ray.feedback.analysis import CELLS
from jpo_ray.runs import RunDir

# Measures shown for all trained models together: log key, title, unit.
MEASURES = (
    ("loss", "Loss", "nats"),
    ("rewards/accuracies", "Comparisons ranked right: all", "share"),
    ("joint/accuracy_conditional", "Ranked right: conditional (one instruction)", "share"),
    ("joint/accuracy_joint", "Ranked right: joint (two instructions)", "share"),
)


@dataclass(frozen=True)
class Panel:
    """A chart with its heading; `svg` is markup made by `charts`, the rest is text. `name` is its file's, which has the
    legend `keys` that the page says once for several charts.
    """

    name: str
    title: str
    svg: str
    note: str = ""
    model: str = ""  # the one model it shows, if it shows one
    keys: Mapping[str, Look] = field(default_factory=dict)


def win_rate_panel(models: Mapping[str, Any], series: Mapping[str, int]) -> Panel | None:
    if not any(entry["n"] for entry in models.values()):
        return None
    label = "Win rate against gold per model and temperature, with 95 % intervals"
    svg = win_rate_chart("win-rates", label, models, series)
    cut = any(len(name) > NAME_LENGTH for name in models)  # else the rows say the names themselves
    keys = {name: series_look(series[name]) | {"linestyle": "-"} for name in models if cut}
    keys |= {
        f"temperature {key}": rate_look(ROLES["ink"], key, place) for place, key in enumerate(temperatures_of(models))
    }
    keys |= {"mean over temperatures": rate_look(ROLES["ink"], "mean", 0)}
    keys |= {"95 % interval": _plain(0)}
    keys |= {"as good as gold": _plain(1) | {"color": ROLES["muted"], "linewidth": 1}}
    return Panel("win-rates", "Win rate per model and temperature", svg, keys=keys)


def similarity_panel(run: RunDir, config: RunConfig, standing: Mapping[str, Manifest]) -> Panel | None:
    """Similarity of the instructions of joint pairs; None where there are none."""
    values = joint_similarities(run, standing)
    if not len(values):
        return None
    joint = config.pairs.joint
    band = (joint.min_similarity, joint.max_similarity) if joint else (-1.0, 1.0)
    note = f"{len(values):,} joint pairs"
    if joint:
        limited = band != (-1.0, 1.0)
        note += f", strategy {joint.strategy}, " + (f"band {band[0]:g} to {band[1]:g}" if limited else "no band")
    svg = histogram("similarity", "Histogram of instruction similarity of joint pairs", values, band)
    return Panel("similarity", "Similarity of the instructions of joint pairs", svg, note)


def sft_panel(log: Log) -> Panel | None:
    lines = _train_and_validation(log, "loss", series=0)
    if not lines:
        return None
    svg = line_chart("sft-loss", "Loss of supervised fine-tuning over steps", lines, unit="nats")
    return Panel("sft-loss", "SFT loss", svg, keys=_curve_keys(lines))


def training_panels(logs: Mapping[str, Log], series: Mapping[str, int]) -> list[Panel]:
    """One panel per measure, all models in it."""
    panels = []
    for position, (key, title, unit) in enumerate(MEASURES):
        of_model = {
            name: _train_and_validation(log, key, series[name], style_of(series[name])) for name, log in logs.items()
        }
        lines = [line for some in of_model.values() for line in some]
        if lines:
            of = f"measure-{position}"
            keys = {name: series_look(series[name]) for name, some in of_model.items() if some}
            svg = line_chart(of, f"{title} over steps", lines, unit=unit)
            panels.append(Panel(of, title, svg, keys=keys | _curve_keys(lines)))
    return panels


def margin_panels(logs: Mapping[str, Log], series: Mapping[str, int]) -> list[Panel]:
    """One panel per model: the margin's response part (solid) and instruction part (dashed)."""
    panels = []
    for position, (name, log) in enumerate(logs.items()):
        response = _train_and_validation(log, "joint/margin_response", series[name])
        instruction = _train_and_validation(log, "joint/margin_instruction", series[name], style=1)
        lines = response + instruction
        if lines:
            label = f"Instruction part and response part of the margin of {name} over steps"
            svg = line_chart(f"margin-{position}", label, lines, unit="margin")
            parts = {"response part": response, "instruction part": instruction}
            keys = {part: _plain(some[0].style) for part, some in parts.items() if some} | _curve_keys(lines)
            panels.append(Panel(f"margin-{position}", f"Margin of {name}", svg, model=name, keys=keys))
    return panels


def _train_and_validation(log: Log, key: str, series: int, style: int = 0) -> list[Line]:
    """The training curve, averaged to what a chart can show, and the validation curve, in that order."""
    training, validation = averaged(curve(log, key)), curve(log, f"eval_{key}")
    lines = [Line(training, series, style)] if training else []
    return lines + ([Line(validation, series, style, validation=True)] if validation else [])


def _plain(style: int) -> Look:
    return line_look(ROLES["ink"], style) | {"marker": ""}


def _curve_keys(lines: Sequence[Line]) -> dict[str, Look]:
    """What tells training from validation, where a chart has both or either."""
    kinds = {"training (averaged)": False, "validation": True}
    return {
        text: line_look(ROLES["ink"], validation=validation)
        for text, validation in kinds.items()
        if any(line.validation == validation for line in lines)
    }


def logs_of(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Log histories of the trainings that have one."""
    return {name: state["log_history"] for name, state in states.items() if state.get("log_history")}


def interplay_panels(found: Mapping[str, Any]) -> list[Panel]:
    """What joint verdicts say about items that conditional ones ranked, where there is anything to draw."""
    titles = {
        "alike": "Both chosen or both rejected: how many joint verdicts are decisive",
        "mixed": "One chosen, one rejected: which of them the joint verdict prefers",
    }
    drawn = interplay_charts(found)
    return [Panel(name, title, drawn[name]) for name, title in titles.items() if drawn[name]]


def interplay_charts(found: Mapping[str, Any]) -> dict[str, str]:
    """Bars of the interplay: `alike` and `mixed`, each empty where there is nothing to draw."""
    bars = {f"{row['annotator']}, {row['dataset']}": row["shares"] for row in found["interplay"]}
    alike = {key: _two(shares["both alike"]) for key, shares in bars.items() if shares["both alike"] is not None}
    parts = {key: {cell: shares[cell] for cell in CELLS[2:]} for key, shares in bars.items()}
    mixed = {key: shares for key, shares in parts.items() if shares[CELLS[2]] is not None}
    labels = {
        "alike": "Joint verdicts on items ranked alike",
        "mixed": "Joint verdicts on a chosen and a rejected item",
    }
    drawn = {"alike": alike, "mixed": mixed}
    return {name: stacked_bars(name, labels[name], of) if of else "" for name, of in drawn.items()}


def _two(decisive: float) -> dict[str, float | None]:
    return {"decisive": decisive, "tie": 100 - decisive}
