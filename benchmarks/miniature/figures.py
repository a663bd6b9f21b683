"""The figures of docs/results.md: what was found here, with the paper's numbers where it has any."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jpo_ray.evaluation.charts import interval_chart, rate_rows, standalone
from jpo_ray.evaluation.experiment_results import SIZES, Group, curves_of
from jpo_ray.evaluation.pages import light_colors, write_page

FOLDER = "figures"
RATE = "win rate against gold, percent"
TL_DR = "the paper, TL;DR"
PAPER_SIZES = [(100, 42.4), (9000, 71.7)]  # Figure 7: the ends of its curve
PAPER_PROTOCOLS = {TL_DR: {"sft": 43.8, "conditional": 67.7, "joint": 71.7, "both-half": 71.9, "both": 72.9}}


def table_5_figure(groups: Mapping[str, Group], paper: Mapping[str, Sequence[str]], out: Path) -> str:
    """Means over temperatures and seeds; `groups` and `paper` (rates at each temperature and their mean) by title."""
    others = {
        f"the paper, {dataset}": {title: float(rates[place].split(" / ")[-1]) for title, rates in paper.items()}
        for place, dataset in enumerate(("TL;DR", "Helpful"))
    }
    return _written("results-table-5", rate_rows("table-5", "Mean win rates", _rows(groups), others, RATE), out)


def section_figure(name: str, groups: Sequence[Group], out: Path) -> str | None:
    """A curve over the number of comparisons, else a row for each group; None where nothing has a rate."""
    label = f"Win rates of the experiment {name}"
    curves = curves_of(groups, SIZES)
    if curves:
        paper = [(float(size), rate, rate, rate) for size, rate in PAPER_SIZES]
        curves = {"here": next(iter(curves.values())), TL_DR: paper}
        return _written(f"results-{name}", interval_chart(name, label, curves, "training comparisons", RATE), out)
    rows = _rows(_titled(groups))
    others = PAPER_PROTOCOLS if name == "protocols" else {}
    return _written(f"results-{name}", rate_rows(name, label, rows, others, RATE), out) if rows else None


def _titled(groups: Sequence[Group]) -> dict[str, Group]:
    """By what tells them apart; the SFT model, which is the same in all runs, once."""
    entries = {group.entry for group in groups} - {"sft"}
    found: dict[str, Group] = {}
    for group in groups:
        settings = ", ".join(f"{name} {value}" for name, value in group.settings.items())
        named = group.entry if len(entries) > 1 or not settings else ""
        found.setdefault("sft" if group.entry == "sft" else " ".join(filter(None, [named, settings])), group)
    return found


def _rows(groups: Mapping[str, Group]) -> dict[str, tuple[float, float, float]]:
    return {title: (group.win_rate, *_ends(group)) for title, group in groups.items() if group.win_rate is not None}


def _ends(group: Group) -> tuple[float, float]:
    low, high = group.ci95
    assert group.win_rate is not None
    return group.win_rate if low is None else low, group.win_rate if high is None else high


def _written(name: str, svg: str, out: Path) -> str:
    """The figure's path below `out`, where it then is."""
    (out / FOLDER).mkdir(exist_ok=True)
    write_page(out / FOLDER / f"{name}.svg", standalone(svg, light_colors()))
    return f"{FOLDER}/{name}.svg"
