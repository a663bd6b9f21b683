"""The report of a run as Markdown: its numbers as tables, its charts as files beside it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from jpo_ray.evaluation.charts import temperatures_of
from jpo_ray.evaluation.pages import NONE, duration_text, interval, number_text, percent
from jpo_ray.evaluation.panels import Panel
from jpo_ray.feedback.analysis import SHOWN


def markdown(summary: Mapping[str, Any], shown: Sequence[Panel]) -> str:
    """`report.md`, from the numbers of `summary.json`; `shown` are the charts in `figures/`."""
    counts = summary["counts"]
    sections = {
        "Win rates": [
            *_win_rates(summary["models"]),
            *_remarks(counts, "evaluate"),
            *_lengths(summary["lengths"]),
            *_raised(summary["raised"]),
        ],
        "What training did to the policies": [*_policies(summary["policies"]), *_remarks(counts, "policies")],
        "Models against each other": [*_tournament(summary["tournament"], counts), *_remarks(counts, "tournament")],
        "Training": _trainings(summary["trainings"]),
        "From data to training": [*_funnel(counts["funnel"]), *_remarks(counts, "judge")],
        "Judges": _judges(summary["judges"]),
        "Figures": [f"![{panel.title or panel.model}](figures/{panel.name}.svg)" for panel in shown],
        "Time and cost": _time(summary),
        "Versions": [table(["package", "version"], summary["versions"].items())],
        "Config": [f"```yaml\n{yaml.safe_dump(summary['config'], sort_keys=False, allow_unicode=True)}```"],
    }
    lines = ["# Alignment report", *(f"*{text}*" for text in summary["missing"].values())]
    for title, parts in sections.items():
        if kept := [part for part in parts if part]:
            lines += [f"## {title}", *kept]
    return "\n\n".join(lines) + "\n"


def table(heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; empty where there are no rows."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [list(heads), ["---"] * len(heads), *cells]]
    return "\n".join(lines) if cells else ""


def _win_rates(models: Mapping[str, Any]) -> list[str]:
    temperatures = temperatures_of(models)
    heads = ["model", *temperatures, "mean", "95 %", "against sft", "95 %"]
    rates, controlled = [], []
    for name, entry in models.items():
        over = entry["difference_to_sft"] or {"mean": None, "ci95": None}
        rates.append(
            [
                name,
                *(number_text(entry["win_rate"].get(key)) for key in [*temperatures, "mean"]),
                interval(entry["ci95"]),
                number_text(over["mean"], "+.1f"),
                interval(over["ci95"], "+.1f"),
            ]
        )
        if "length_controlled" in entry:
            of = entry["length_controlled"]
            said = of["reason"] or of.get("note", "")
            controlled.append([name, number_text(of["rate"]), interval(of.get("ci95")), said])
    verdicts = ["n", "wins", "ties", "losses", "invalid", "empty"]
    return [
        "Percent against gold, (wins + ties / 2) / valid; intervals resample instructions." if models else "",
        table(heads, rates),
        table(["model", "length-controlled", "95 %", ""], controlled),
        table(["model", *verdicts], ([name, *(of.get(key, 0) for key in verdicts)] for name, of in models.items())),
    ]


def _remarks(counts: Mapping[str, Any], artifact: str) -> list[str]:
    """An artifact's warning, and why verdicts are invalid."""
    of = counts.get(artifact, {})
    warning, reasons = of.get("warning"), of.get("invalid because")
    return [f"**{warning}**" if warning else "", f"Invalid: {reasons}" if reasons else ""]


def _raised(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    said = [f"Temperature {of['temperature']} ran as {of['effective_temperature']} ({of['engine']})." for of in rows]
    return [" ".join(said)]


def _lengths(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ["model", "samples", "mean characters", "cut at the token limit, percent"]
    cells = ([row["model"], row["samples"], f"{row['characters']:.0f}", f"{row['cut_percent']:.1f}"] for row in rows)
    return [table(heads, cells)]


def _policies(policies: Mapping[str, Any] | None) -> list[str]:
    heads = [
        "model", "reward accuracy, conditional", "joint", "likelihood ranks right", "chosen log-ratio", "rejected",
        "displaced", "KL", "words", "distinct-1", "distinct-2",
    ]  # fmt: skip
    rows = [
        [name, *(percent(of.get(key)) for key in ("accuracy_conditional", "accuracy_joint", "ranking_accuracy"))]
        + [number_text(of.get(key), "+.2f") for key in ("chosen_log_ratio", "rejected_log_ratio")]
        + ["yes" if of.get("displacement") else "", number_text(of.get("kl"), ".2f"), number_text(of.get("words"))]
        + [number_text(of.get(key), ".3f") for key in ("distinct_1", "distinct_2")]
        for name, of in (policies or {}).items()
    ]
    return [table(heads, rows)]


def _tournament(found: Mapping[str, Any] | None, counts: Mapping[str, Any]) -> list[str]:
    if found is None:
        return []
    names = found["matrix"]["models"]
    further = counts["tournament"].get("further samples not played", 0)
    one_each = f"One sample of each model, temperature and instruction plays; {further:,} further ones do not."
    rows = zip(names, *(found["matrix"][key] for key in ("win_rate", "ci95", "n", "invalid")), strict=True)
    matrix = ([name, *map(_cell, *cells)] for name, *cells in rows)
    ranks = [
        [name, number_text(of["win_rate"]), interval(of["win_rate_ci95"])]
        + [number_text(found["ranking"][kind]["models"][name]["win_rate"]) for kind in ("joint", "conditional")]
        + [of["n"], of["invalid"]]
        for name, of in found["ranking"]["both"]["models"].items()
    ]
    return [
        "Win rate of the row against the column on equal instructions, percent; n are valid verdicts:",
        table(["", *names], matrix),
        "Bradley-Terry ranking: the chance to beat another model, each on a random instruction.",
        table(["model", "wins, percent", "95 %", "joint alone", "equal instructions alone", "n", "invalid"], ranks),
        one_each if further else "",
        _agreement(found["agreement"].get("both")),
        found["ranking"]["both"].get("reason") or "",
    ]


def _agreement(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    tau, share = number_text(found["kendall_tau"], "+.2f"), percent(found["same_order_share"])
    return f"With the order by win rate against gold: Kendall's tau {tau}; the same order in {share} % of resamples."


def _cell(rate: float | None, ends: list[float | None] | None, n: int | None, invalid: int | None) -> str:
    """Of the matrix; its diagonal has nothing."""
    if n is None:
        return NONE
    counts = f"n {n:,}" + (f", invalid {invalid:,}" if invalid else "")
    return f"{NONE}, {counts}" if rate is None else f"{rate:.1f} ({interval(ends)}), {counts}"


def _trainings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = {
        "train_loss": "train loss", "eval_loss": "validation loss", "accuracy": "ranked right",
        "accuracy_conditional": "conditional", "accuracy_joint": "joint", "margin": "margin",
        "margin_instruction": "instruction part", "margin_response": "response part",
    }  # fmt: skip
    cells = (
        [row["name"], row["objective"], row["protocols"], number_text(row["steps"], ",")]
        + [number_text(row[key], ".3f") for key in keys]
        for row in rows
    )
    return [table(["model", "objective", "trained on", "steps", *keys.values()], cells)]


def _funnel(funnel: Mapping[str, Any]) -> list[str]:
    keys = ["pairs", "judged", "decisive", "ties", "flipped", "invalid", "preferences"]
    rows = funnel.get("comparisons", [])
    keys = [key for key in keys if rows and key in rows[0]]
    return [
        table(["train split", "count"], ([row["step"], f"{row['count']:,}"] for row in funnel.get("steps", []))),
        table(["protocol", "split", *keys], ([row["protocol"], row["split"], *(row[k] for k in keys)] for row in rows)),
    ]


def _judges(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    agreements = (
        [
            f"{row['one']} and {row['other']}",
            *(row[key] for key in ("dataset", "protocol", "comparisons")),
            number_text(row["score"]),
            number_text(row["kappa"], ".2f"),
            interval(row["kappa_ci95"], ".2f"),
        ]
        for row in found["agreements"]
    )
    interplay = (
        [row["annotator"], row["dataset"], *(number_text(row["shares"][cell]) for cell in SHOWN)]
        for row in found["interplay"]
    )
    heads = ["annotators", "dataset", "protocol", "comparisons", "agreement, percent", "Cohen's kappa", "95 %"]
    bias = ([name, of["decisive"], number_text(of["longer wins"])] for name, of in found["length_bias"].items())
    return [
        table(heads, agreements),
        "Joint verdicts on items that conditional ones ranked, percent:" if found["interplay"] else "",
        table(["annotator", "dataset", *SHOWN], interplay),
        table(["annotator", "decisive verdicts", "the longer response wins, percent"], bias),
    ]


def _time(summary: Mapping[str, Any]) -> list[str]:
    rows = []
    for stage, seconds in summary["seconds"].items():
        of = summary["spent"].get(stage)
        cost = [of["judgments"], of["tokens"], f"{of['cost']:.2f}"] if of else ["", "", ""]
        rows.append([stage, duration_text(seconds), *cost])
    return [table(["stage", "time", "judgments", "judge tokens", "US dollars"], rows)]
