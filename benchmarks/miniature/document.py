"""docs/results.md: what the experiments found beside the paper's numbers. `results.md.jinja` has the words."""

import os
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jpo_ray.artifacts import package_versions
from jpo_ray.evaluation.experiment_results import SIZES, curves_of, markdown_table, mean_of_all, saturation_text
from jpo_ray.evaluation.win_rates import interval_text
from jpo_ray.files import output_folder, read_json
from miniature.claims import Found, all_claims, highest
from miniature.figures import section_figure, table_5_figure

TABLE_5 = {  # win rates at temperatures 0.001, 0.5, 1.0, and their mean; TL;DR and Anthropic-Helpful
    "SFT": ("46.6 / 44.9 / 39.8 / 43.8", "59.1 / 56.2 / 56.8 / 57.4"),
    "DPO": ("66.5 / 67.0 / 69.5 / 67.7", "73.5 / 72 / 69.5 / 71.7"),
    "KTO": ("71.8 / 71.9 / 70.6 / 71.4", "72.8 / 72.9 / 68.8 / 71.5"),
    "JPO": ("72.7 / 71.9 / 74.2 / 72.9", "76.3 / 74.5 / 74.1 / 75.0"),
}
ENTRIES = {
    "sft": "SFT", "dpo": "DPO", "dpo-comparisons": "DPO, as many steps as JPO", "kto": "KTO",
    "kto-comparisons": "KTO, as many steps as JPO", "jpo": "JPO",
}  # fmt: skip
SECTIONS = {  # experiment -> heading, what was done, what the paper has
    "data_scaling": (
        "How much preference data is needed (Figure 7)",
        "Nested subsets of the same comparisons, conditional and joint, two epochs each, temperature 0.001.",
        "The paper: 42.4 at 100 comparisons, 71.7 at 9,000, within a point of it from 4,000 on.",
    ),
    "protocols": (
        "Conditional, joint, both (Figures 5 and 6)",
        "`both-half` has half of its comparisons from either protocol and as many as `conditional` or `joint` alone.",
        "The paper: joint alone 71.7 on TL;DR (SFT 43.8); half and half at fixed size 71.9, 4.2 above DPO.",
    ),
    "strategies": (
        "Which joint pairs to compare",
        "JPO on joint comparisons alone, as many of each strategy, temperature 0.001.",
        "The paper names this an open problem and has no numbers.",
    ),
    "bands": (
        "How alike the two instructions should be",
        "JPO on joint comparisons alone, drawn from pairs above a cosine similarity, temperature 0.001.",
        "The paper names a notion of similarity an open problem and has no numbers.",
    ),
    "selection": (
        "Which joint pairs to judge",
        "A fifth of the joint pairs is judged: at random, or in rounds where the outcome is least certain; temperature "
        "0.001.",
        "The paper names this an open problem and has no numbers.",
    ),
    "sweep": (
        "Learning rate and beta",
        "JPO, one seed, temperature 0.001.",
        "The paper: 5e-5 is the best of 1e-5, 5e-5, 5e-4 for a LoRA of Mistral-7B; beta 0.1.",
    ),
}


POLICY_METRICS = {  # of policies.json -> heading, form
    "accuracy_conditional": ("reward accuracy, conditional", "percent"),
    "accuracy_joint": ("reward accuracy, joint", "percent"),
    "ranking_accuracy": ("likelihood ranks right", "percent"),
    "chosen_log_ratio": ("chosen log-ratio", ".2f"),
    "rejected_log_ratio": ("rejected log-ratio", ".2f"),
    "kl": ("KL", ".2f"),
    "words": ("words", ".1f"),
    "distinct_2": ("distinct-2", ".3f"),
}


def write_document(found: Mapping[str, Found], main_run: Path, out: Path) -> None:
    """`results.md` in `out`; `main_run` is the run directory of the objectives."""
    claims = all_claims(found)
    context = {
        **_about(found),
        "claims": claims,
        "counts": Counter(claim.verdict for claim in claims),
        "temperatures": list(found["objectives"].groups[0].by_temperature),
        "table_5": _table_5(found["objectives"], main_run),
        "paper_table_5": TABLE_5,
        "joint": _joint(read_json(main_run / "tournament" / "tournament.json")),
        "policies": _policies(read_json(main_run / "policies" / "policies.json")),
    }
    titled = {ENTRIES[group.entry]: group for group in found["objectives"].groups if group.entry in ENTRIES}
    with output_folder(out):
        context["table_5_figure"] = table_5_figure(titled, TABLE_5, out)
        context["sections"] = [_section(name, found[name], out) for name in SECTIONS if name in found]
        words = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False)
        words.filters |= {"number": _number, "thousands": "{:,.0f}".format}
        staged = out / ".results.md.part"
        staged.write_text(words.get_template("results.md.jinja").render(context).strip() + "\n", encoding="utf-8")
        staged.replace(out / "results.md")


def _about(found: Mapping[str, Found]) -> dict[str, Any]:
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "trainings": sum(sum(each.entry != "sft" for each in one.measured) for one in found.values()),
        "minutes": round(sum(one.seconds or 0 for one in found.values()) / 60),
        "shares": ", ".join(
            f"{name} {'not timed' if one.seconds is None else format(one.seconds / 60, '.0f')}"
            for name, one in found.items()
        ),
        "machine": f"{os.cpu_count()} cores ({platform.machine()})",
        "versions": ", ".join(f"{name} {version}" for name, version in package_versions().items()),
    }


def _table_5(main: Found, run: Path) -> list[dict[str, Any]]:
    controlled: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, entry in read_json(run / "evaluate" / "win_rates.json")["models"].items():
        controlled[_entry(name)].append(entry.get("length_controlled") or {})
    groups = {group.entry: group for group in main.groups}
    return [
        {
            "title": title,
            "rates": list(groups[entry].by_temperature.values()),
            "mean": groups[entry].win_rate,
            "interval": interval_text(groups[entry].ci95),
            "seeds": ", ".join(map(_number, groups[entry].repetitions)) if entry != "sft" else "",
            "controlled": _with_interval(controlled[entry], "rate", "ci95"),
            "n": f"{groups[entry].n:,}",
            "invalid": f"{groups[entry].invalid:,}",
        }
        for entry, title in ENTRIES.items()
    ]


def _joint(tournament: Mapping[str, Any]) -> dict[str, Any]:
    ranking, agreement = tournament["ranking"], tournament["agreement"]
    rates: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for source in ("joint", "conditional"):
        for name, model in ranking[source]["models"].items():
            rates[_entry(name), source].append(model)
    return {
        "counts": {source: ranking[source]["n"] for source in ("joint", "conditional")},
        "models": agreement["joint"]["models"],
        "agreement": {source: agreement[source] for source in ("joint", "conditional", "both")},
        "rows": {
            title: [
                _with_interval(rates[entry, source], "win_rate", "win_rate_ci95") for source in ("joint", "conditional")
            ]
            for entry, title in ENTRIES.items()
        },
    }


def _with_interval(of_seeds: Sequence[Mapping[str, Any]], value: str, ci95: str) -> str:
    """Mean over seeds of a number and of the ends of its interval."""
    ends = [each.get(ci95) or [None, None] for each in of_seeds]
    low, high = (mean_of_all([end[side] for end in ends]) for side in (0, 1))
    return f"{_number(mean_of_all([each.get(value) for each in of_seeds]))} ({interval_text([low, high])})"


def _policies(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    members: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for name, of_model in metrics.items():
        members[_entry(name)].append(of_model)
    known = {key: about for key, about in POLICY_METRICS.items() if key in members["jpo"][0]}
    return {
        "heads": [heading for heading, _ in known.values()],
        "rows": {
            title: [_metric([each.get(key) for each in members[entry]], form) for key, (_, form) in known.items()]
            for entry, title in ENTRIES.items()
        },
    }


def _metric(values: Sequence[float | None], form: str) -> str:
    value = mean_of_all(values)
    return _number(100 * value) if form == "percent" and value is not None else _number(value, form)


def _section(name: str, found: Found, out: Path) -> dict[str, Any]:
    heading, done, paper = SECTIONS[name]
    sizes = [(x, rate) for points in curves_of(found.groups, SIZES).values() for x, rate, *_ in points]
    says = f"Here: {said}" if (said := saturation_text(sizes, 1.0)) else highest(found)
    return {
        "name": name, "heading": heading, "done": done, "paper": paper, "table": markdown_table(found.groups).strip(),
        "says": says, "figure": section_figure(name, found.groups, out),
        "seeds": ", ".join(dict.fromkeys(each.repetition for each in found.measured if each.repetition)),
    }  # fmt: skip


def _entry(model: str) -> str:
    """The entry of `train` that a model `entry-sSEED` came from."""
    return model.rsplit("-s", 1)[0]


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)
